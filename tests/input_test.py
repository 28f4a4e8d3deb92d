"""Bad input ends with one sentence that names the field and the fix, and leaves nothing behind."""

import functools
import json
import os
import pathlib
import re
import resource
import shutil
import subprocess
import sys
import time

import jax
import pytest
from events_test import Wandb

from treerl import branching, config as C, functions, metrics, profiling, pruning, report, sharding, tasks, train
from treerl.advantages import ESTIMATORS, leaf_estimators
from treerl.checkpoint import Checkpoints
from treerl.config import default
from treerl.errors import UserError, writing
from treerl.experiment import Experiment, load
from treerl.survival import RULES

# of what Orbax leaves half done
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
ROOT = pathlib.Path(__file__).resolve().parent.parent
STEPS = 8
SIZES = {
    "steps": STEPS,
    "checkpoint_every": 2,
    "task.train_size": 32,
    "task.heldout_size": 8,
    "model.layers": 1,
    "model.width": 32,
    "warm_start.steps": 0,
    "evaluation.every": 100,
    "evaluation.batch": 8,
    "evaluation.samples": 2,
}


def files(folder: pathlib.Path) -> dict:
    """Path -> content of everything below a folder."""
    return {p.relative_to(folder): p.is_file() and p.read_bytes() for p in folder.rglob("*")}


def sentence(function, *args) -> str:
    """The message of the UserError that a call raises."""
    with pytest.raises(UserError) as error:
        function(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- the command line -----------------------------------------------------------------------------


ENVIRONMENT = dict(os.environ, JAX_PLATFORMS="cpu", PYTHONPATH=str(ROOT), XLA_FLAGS="")  # one device


def launch(entry: str, *flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", f"launch.{entry}", *flags]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("arg, flags, message", [
    ("", ["--config.sampler.slotz=3"], "sampler.slotz is no field of the config; did you mean sampler.slots?"),
    ("", ["--config.samplr.slots=3"], "samplr.slots is no field of the config; did you mean sampler.slots?"),
    ("", ["--config.nonsense=3"], "nonsense is no field of the config; --help_config lists them."),
    ("", ["--config.learning_rate=3"], "learning_rate is no field of the config; did you mean optimizer.learning_rate or "
     "quality.learning_rate or warm_start.learning_rate?"),
    ("", ["--config.optimizer.lr=3"], "optimizer.lr is no field of the config; did you mean optimizer.learning_rate?"),
    ("", ["--config.branching.tau=3"], "branching.tau is no field of the config; did you mean branching.tau_abs or branching.tau_rel?"),
    ("", ["--config.optimizer.zzz=3"], "optimizer.zzz is no field of the config; --help_config lists them."),
    ("", ["--config.advantage=grpo"],
     "advantage=grpo sets a whole section; set a field of it, such as --config.advantage.name=VALUE."),
    ("", ["--config.mesh=8"], "mesh=8 sets a whole section; set a field of it, such as --config.mesh.data=VALUE."),
    ("", ["--noconfig.remat"], "remat is no field of the config; did you mean learner.remat?"),
    ("", ["--config.sampler.slots=abc"], "sampler.slots=abc is no int; set one such as 8."),
    ("", ["--config.sampler.slots", "2.5"], "sampler.slots=2.5 is no int; set one such as 8."),
    ("", ["--config.learner.reference=maybe"], "learner.reference=maybe is no bool; set one such as False."),
    ("", ["--config.pruning.windows=(4,6"], "pruning.windows=(4,6 is no tuple; set one such as (4, 6)."),
    ("", ["--config.advantage.multipliers.ace.alpha=3"],
     "--config.advantage.multipliers.ace.alpha cannot be set alone; write --config.advantage.multipliers=\"{'ace': VALUE}\"."),
    ("", ["--config.advantage.options=clip=3"],
     "advantage.options=clip=3 is no dictionary; write it as --config.advantage.options=\"{'NAME': VALUE}\"."),
    ("", ["--config.advantage.multipliers={'ear': {}"],
     "advantage.multipliers={'ear': {} is no dictionary; write it as --config.advantage.multipliers=\"{'NAME': VALUE}\"."),
    ("", ["--config.advantage.options.clip=3"],
     "--config.advantage.options.clip cannot be set alone; write --config.advantage.options=\"{'clip': VALUE}\"."),
    ("", ["--config.text.graders={'mine.graders:length': 1.0}"],
     "text.graders has a name with a dot, which a config cannot hold; write package/module:function."),
    (":slots=3", [], "config argument 'slots' is unknown; known are seed, variant."),
    (":seed=x", ["--config.steps=3"], "config argument seed='x' is no int."),
    (":variant=ppo", [], "variant='ppo' is unknown; known are latr_depthwise, latr, grpo."),
    ("", ["--wrkdir=x"], "Unknown command line flag 'wrkdir'. Did you mean: workdir ?"),
    ("", ["steps=3"], "argument 'steps=3' is no flag; write flags as --name=value."),
    ("", ["--steps=3"], "--steps is no flag but a field of the experiment; write --config.steps=3."),
    ("", ["--branching.tau_abs", "0.1"],
     "--branching.tau_abs is no flag but a field of the experiment; write --config.branching.tau_abs=VALUE."),
])  # fmt: skip
def test_command_line_of_train(arg, flags, message, tmp_path):
    run = launch("train", f"--config=experiments/countdown.py{arg}", f"--workdir={tmp_path / 'run'}", *flags)
    assert (run.returncode, run.stdout, run.stderr) == (1, "", message + "\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("entry, flags, message", [
    ("train", ["--config=experiments/count.py:seed=1", "--workdir=x"],
     "--config=experiments/count.py is no file; give an experiment, such as experiments/countdown.py."),
    ("train", ["--config=experiments/countdown.py"], "--workdir is missing; add --workdir=VALUE, see --help."),
    ("train", ["--workdir=x"], "--config is missing; add --config=VALUE, see --help."),
    ("evaluate", [], "--workdir is missing; add --workdir=VALUE, see --help."),
    ("evaluate", ["--workdir=x", "--config.steps=3"], "Unknown command line flag 'config.steps'"),
    ("bench", [], "--suite is missing; add --suite=VALUE, see --help."),
    ("bench", ["--suite=step", "--out=/nowhere/out"],
     "--out=/nowhere/out cannot be written (No such file or directory); give a file that can, with room for "
     "the lines."),
])  # fmt: skip
def test_command_lines(entry, flags, message):
    run = launch(entry, *flags)
    assert (run.returncode, run.stdout, run.stderr) == (1, "", message + "\n")


@pytest.mark.parametrize("entry", sorted(p.stem for p in (ROOT / "launch").glob("*.py") if "entry.run(main" in p.read_text()))
def test_help(entry):
    """The docstring and every flag that the program defines or reads, one behind the other; exit status 0."""
    run, source = launch(entry, "--help"), (ROOT / "launch" / f"{entry}.py").read_text()
    assert (run.returncode, run.stderr) == (0, "")
    said, _, listed = run.stdout.partition("\n\nFlags:\n")
    assert said == source.split('"""')[1].strip()
    names = re.findall(r"^  --(?:\[no\])?([\w.]+)", listed, re.M)
    own = re.findall(r'DEFINE_\w+\(\s*"(\w+)"', source)
    together = ["coordinator_address", "num_processes", "process_id", "coordinator_timeout"] * ("together=True" in source)
    assert [name for name in names if name != "config.FIELD"] == [*own, *together, "verbosity"]
    assert max(map(len, listed.splitlines())) <= 120 and "absl" not in listed


def test_help_has_defaults():
    assert re.search(r"^  --seed +Another seed grows another tree\. The default is 0\.$", launch("generate", "--help").stdout, re.M)


def test_bugs_and_the_curious_get_a_traceback(tmp_path):
    experiment = tmp_path / "experiment.py"
    experiment.write_text("def get_config():\n    return int('a bug')\n")
    bug = launch("train", f"--config={experiment}", f"--workdir={tmp_path / 'run'}")
    curious = launch("evaluate", "--workdir=/nowhere/run", "--verbosity=1")
    for run, words in ((bug, "return int('a bug')"), (curious, "UserError: workdir=/nowhere/run has no config.json")):
        assert run.returncode == 1 and words in run.stderr
        assert "Traceback (most recent call last):\n  File " in run.stderr
    assert bug.stderr.startswith("Traceback")


# --- the fields -----------------------------------------------------------------------------------


def changed(**values):
    config = default()
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in values.items()})
    return config


@pytest.mark.parametrize("changes, message", [
    (dict(sampler__slots=0), "sampler.slots=0 cannot work; set it to 1 or more."),
    (dict(steps=-1), "steps=-1 cannot work; set it to 0 or more."),
    (dict(seed=-1), "seed=-1 cannot work; set it to 0 or more."),
    (dict(sampler__temperature=0.0), "sampler.temperature=0.0 cannot work; set it to a number above 0."),
    (dict(sampler__temperature=-1.0), "sampler.temperature=-1.0 cannot work; set it to a number above 0."),
    (dict(sampler__temperature=float("nan")), "sampler.temperature=nan cannot work; set it to a number above 0."),
    (dict(sampler__top_p=0.0), "sampler.top_p=0.0 cannot work; set it to a number above 0, at most 1."),
    (dict(sampler__top_p=1.5), "sampler.top_p=1.5 cannot work; set it to a number above 0, at most 1."),
    (dict(optimizer__b2=1.0), "optimizer.b2=1.0 cannot work; set it to a number from 0 to below 1."),
    (dict(model__dtype="float8"), "model.dtype='float8' cannot work; set it to float32, bfloat16 or float16."),
    (dict(data_dir=""), "data_dir='' cannot work; set it to a folder."),
    (dict(sampler__slots=True), "sampler.slots=True is no int; set one such as 8."),
    (dict(pruning__windows=(4, "a")),
     "pruning.windows=(4, 'a') cannot work; set it to lengths of 1 or more, such as (4, 6)."),
    (dict(sampler__lengths=(8, 4)),
     "sampler.lengths=(8, 4) must ascend and stay below sampler.answer_length=16; mend either."),
    (dict(sampler__lengths=(16,)),
     "sampler.lengths=(16,) must ascend and stay below sampler.answer_length=16; mend either."),
    *[(dict(branching__share=share),
       f"branching.share={share} cannot work; set it to (step, share) pairs that ascend from step 0, "
       "shares from 0 to 1, such as ((0, 0.5), (100, 1.0)).")
      for share in (
          (3,), (), ((1, 0.5),), ((0, 1.5),), ((0, -0.1),), ((0, 1.0), (0, 0.5)), ((0, "a"),), ((0.5, 1.0),))],
])  # fmt: skip
def test_values_that_cannot_work(changes, message):
    assert sentence(C.check, changed(**changes)) == message


def test_unknown_and_missing_fields():
    """Of an experiment in Python, or of the config.json of another version."""
    config = default()
    config.sampler.slotz = 3
    assert sentence(C.check, config) == "sampler.slotz is no field of the config; did you mean sampler.slots?"
    config = default()
    del config.sampler.slots
    assert sentence(C.check, config) == "sampler.slots is missing from the config; set it, its default is 8."


def test_every_field_was_thought_of():
    """A field has a rule, can be anything of its type, or is checked where its names are known."""
    ruled = [name for _, _, names in C.RULES for name in names.split()]
    anything = {"branching.greedy", "pruning.refork", "learner.reference", "model.qk_norm", "model.qkv_bias", "model.tied"}
    anything |= {"text.chat", "text.chat_options", "text.system", "wandb"}
    elsewhere = {  # see `test_runs_that_can_never_start`, countdown_test and text_test
        "advantage.name", "advantage.options", "advantage.multipliers", "branching.rule", "branching.options", "learner.aggregation",
        "learner.forced", "learner.importance", "learner.kl_estimate", "learner.objective", "learner.proximal",
        "optimizer.ess", "optimizer.schedule", "pruning.backward", "pruning.backward_options", "pruning.rule",
        "pruning.options", "pruning.weights", "model.preset", "mesh.data", "mesh.fsdp", "mesh.tensor",
        "model.source", "text.source", "text.heldout", "text.options", "text.graders",
        "text.right", "environment.options",
    }  # fmt: skip
    known = {name for name, _ in C.fields(default()) if not name.startswith("task.")}
    assert len(ruled) == len(set(ruled))
    assert set(ruled) | anything | elsewhere == known
    C.check(default())
    for name in ruled:
        for bad in (-1, -1.0, float("nan"), "", (0,)):
            if type(bad) is type(dict(C.fields(default()))[name]) and (name, bad) not in (
                ("sampler.pool_dtype", ""),
                ("sampler.weight_dtype", ""),
            ):
                assert sentence(C.check, changed(**{name: bad})).startswith(f"{name}={bad!r} cannot work; set it to ")


# --- what is found before anything is written -----------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


def small(data, **changes):
    return changed(**dict(SIZES, data_dir=str(data)) | changes)


def survival(rule="balance", **changes):
    return {name if "__" in name else f"pruning__{name}": x for name, x in changes.items()} | dict(pruning__rule=rule)


@pytest.mark.parametrize("changes", [
    dict(branching__tau_abs=0.0, branching__tau_rel=2.0, pruning__tau_ed=0.0),  # all fork, none is pruned: what `launch.bench` times
    dict(branching__share=((0, 0.0),)), dict(branching__share=((0, 1.0), (5, 0.1))), dict(pruning__tau_ed=0.126, pruning__windows=(4, 8)),
    dict(sampler__slots=1, branching__rule="stochastic"), dict(pruning__tau_ed=0.01, branching__rule="stochastic"),
])  # fmt: skip
def test_growth_that_someone_may_want(changes, data):
    functions.check_growth(config := small(data, **changes))
    C.check(config)


@pytest.mark.parametrize("changes, shards, message", [
    (dict(sampler__slots=0), 1, "sampler.slots=0 cannot work; set it to 1 or more."),
    (dict(task__name="chess"), 1, f"task.name='chess' is unknown; known are {', '.join(tasks.NAMES)}."),
    (dict(task__numbers_min=0), 1, "task.numbers_min=0 cannot work; set it to 2 or more."),
    (dict(advantage__name="ppo"), 1,
     f"advantage.name='ppo' is unknown; known are {', '.join(sorted(ESTIMATORS))}."),
    (dict(advantage__options=C.ConfigDict(dict(clp=3.0))), 1,
     "advantage.options has no 'clp' for advantage.name=branch_depthwise; known are beta, clip, ddof, eps, fusion, "
     "per_token, pool, segment, std, virtual."),
    (dict(advantage__name="rloo", advantage__options=C.ConfigDict(dict(std=True))), 1,
     "advantage.options has no 'std' for advantage.name=rloo; known are none."),
    (dict(advantage__options=C.ConfigDict(dict(pool="tree"))), 1,
     "advantage.options.pool='tree' is unknown; known are depth, prompt, sibling."),
    (dict(advantage__name="hgpo", advantage__options=C.ConfigDict(dict(segment=0))), 1,
     "advantage.name=hgpo: segment=0 makes no steps; set it to 1 or more."),
    (dict(advantage__options=C.ConfigDict(dict(segment=-1))), 1,
     "advantage.options.segment=-1 cannot work; set it to 0 or more."),
    (dict(advantage__multipliers=C.ConfigDict(dict(zap={}))), 1,
     "advantage.multipliers='zap' is unknown; known are ace, ear, gdro, novelty."),
    (dict(advantage__multipliers=C.ConfigDict(dict(ear=3))), 1,
     "advantage.multipliers.ear=3 is no dict of options; set it to {} for the defaults."),
    (dict(advantage__multipliers=C.ConfigDict(dict(ear=dict(low=1.0)))), 1,
     "advantage.multipliers.ear has no 'low' for ear; known are floor."),
    (dict(advantage__multipliers=C.ConfigDict(dict(novelty={}))), 1,
     "advantage.name=branch_depthwise: novelty reads the credit of leaves, and this estimator gives credit to "
     f"cells; use one of {', '.join(leaf_estimators())}."),
    (dict(advantage__multipliers=C.ConfigDict(dict(ace={}))), 1,
     "advantage.multipliers: ace compares the policy with a reference policy and none is kept; set "
     "learner.reference=True, or learner.kl above 0."),
    (dict(learner__objective="gspo"), 1,
     "learner.objective=gspo has one ratio a rollout and needs the credit of leaves, and advantage.name=branch_depthwise "
     f"gives credit to cells; use one of {', '.join(leaf_estimators())}, or learner.objective=ppo or cispo."),
    (dict(learner__objective="gspo", learner__forced="mask", advantage__name="grpo"), 1,
     "learner.objective=gspo has one ratio a rollout, without weights of tokens; set learner.forced=policy and "
     "learner.importance=none, or learner.objective=ppo or cispo."),
    (dict(learner__importance="truncate", branching__greedy=True), 1,
     "learner.importance weighs tokens by the log-probs they were sampled with, and branching.greedy=True takes "
     "tokens without sampling; set branching.greedy=False, or weigh nothing."),
    (dict(optimizer__ess="sqrt", branching__greedy=True), 1,
     "optimizer.ess weighs tokens by the log-probs they were sampled with, and branching.greedy=True takes "
     "tokens without sampling; set branching.greedy=False, or weigh nothing."),
    (dict(pruning__backward="magic"), 1, "pruning.backward='magic' is unknown; known are coverage, depth, none, width."),
    (dict(pruning__backward="width", pruning__backward_options=C.ConfigDict(dict(mode="top"))), 1,
     "pruning.backward_options.mode='top' is unknown; known are extreme, parent_top1."),
    (dict(pruning__backward_options=C.ConfigDict(dict(ratio=0.5))), 1,
     "pruning.backward_options are given without a rule; set pruning.backward, or no options."),
    (dict(learner__objective="gspo", advantage__name="grpo", pruning__backward="depth"), 1,
     "learner.objective=gspo trains whole rollouts and pruning.backward=depth leaves out parts of them; set "
     "pruning.backward to none, width or coverage, or learner.objective=ppo or cispo."),
    (dict(learner__objective="cispo", learner__dual_clip=3.0), 1,
     "learner.dual_clip=3.0 is read by learner.objective=ppo alone, not cispo; set it to 0."),
    (dict(learner__forced="mask", branching__greedy=True), 1,
     "learner.forced=mask leaves out forced tokens, and with branching.greedy=True all tokens of a tree line are; "
     "set branching.greedy=False or learner.forced=policy."),
    (dict(learner__importance="truncate"), 1,
     "learner.importance compares the policy with the sampler, and with learner.proximal=sampler and sampler.top_p=1.0 "
     "they are the same; set learner.proximal=learner or sampler.top_p below 1, or weigh nothing."),
    (dict(optimizer__ess="sqrt"), 1,
     "optimizer.ess compares the policy with the sampler, and with learner.proximal=sampler and sampler.top_p=1.0 "
     "they are the same; set learner.proximal=learner or sampler.top_p below 1, or weigh nothing."),
    (dict(advantage__name="tree_grpo", advantage__options=C.ConfigDict(dict(inter=False, intra=False))), 1,
     "advantage.name=tree_grpo: inter=False and intra=False leave no credit; set one of them to True."),
    (dict(advantage__multipliers=C.ConfigDict(dict(gdro=dict(edges=(0.8, 0.2))))), 1,
     "advantage.name=branch_depthwise: gdro: edges=(0.8, 0.2) must be accuracies that ascend, such as (0.4, 0.75)."),
    (dict(pruning__backward="depth", pruning__backward_options=C.ConfigDict(dict(interval=0))), 1,
     "pruning.backward_options of pruning.backward=depth: interval=0 never moves the window; set it to 1 or more."),
    (dict(pruning__backward="coverage", pruning__backward_options=C.ConfigDict(dict(share_cost=1000.0))), 1,
     "pruning.backward_options of pruning.backward=coverage: keep and temperature must be above 0, share_cost and "
     "cover_gain from 0 to 100 together."),
    (dict(learner__overlong_buffer=17), 1,
     "learner.overlong_buffer=17 is longer than sampler.answer_length=16; shorten it."),
    (dict(optimizer__ess="cubic"), 1, "optimizer.ess='cubic' is unknown; known are linear, none, sqrt."),
    (dict(advantage__options=C.ConfigDict(dict(clip="x"))), 1,
     "advantage.options.clip='x' is no float; set one such as 5.0."),
    (dict(branching__rule="magic"), 1, f"branching.rule='magic' is unknown; known are {', '.join(sorted(branching.RULES))}."),
    (dict(pruning__rule="magic"), 1,
     f"pruning.rule='magic' is unknown; known are {', '.join(sorted(pruning.RULES | RULES))}."),
    (dict(branching__options=C.ConfigDict(dict(chance=0.1))), 1,
     "branching.options has no 'chance' for branching.rule=lookahead; known are none."),
    (dict(pruning__options=C.ConfigDict(dict(lam=1.0))), 1,
     "pruning.options has no 'lam' for pruning.rule=similarity; known are none."),
    (survival(detection=6), 1,
     "pruning.detection=6 puts the review after 16 iterations (branching.fill_after=6, whole segments of sampler.segment=4), "
     "when answers of sampler.answer_length=16 have ended; lower one of the first three."),
    (survival(detection=13, branching__rule="stochastic"), 1,
     "pruning.detection=13 puts the review after 16 iterations (whole segments of sampler.segment=4), when answers of "
     "sampler.answer_length=16 have ended; lower one of the first two."),
    (survival("arrol", options=C.ConfigDict(dict(p_min="0.2"))), 1,
     "pruning.options.p_min='0.2' is no float; set one such as 0.1."),
    (survival("arrol", options=C.ConfigDict(dict(lam=-1.0))), 1,
     "pruning.options: lam=-1.0 cannot work; set it to a number of 0 or more."),
    (survival("arrol_group", options=C.ConfigDict(dict(lam=float("nan")))), 1,
     "pruning.options: lam=nan cannot work; set it to a number of 0 or more."),
    (survival("arrol", weights="inverse", options=C.ConfigDict(dict(p_min=0.0))), 1,
     "pruning.weights=inverse divides by chances and p_min=0 of pruning.options allows none; raise p_min."),
    (survival("arrol", kappa=1.0), 1,
     "pruning.kappa=1.0 lies outside p_min=0.1 to p_max=0.9 of pruning.options, so no chances can have that mean; "
     "change either."),
    (survival("arrol_group", options=C.ConfigDict(dict(p_min=0.6, p_max=0.4))), 1,
     "pruning.options: p_min=0.6 and p_max=0.4 must be chances, p_min the lower; mend either."),
    (survival("arrol", options=C.ConfigDict(dict(p_max=1.4))), 1,
     "pruning.options: p_min=0.1 and p_max=1.4 must be chances, p_min the lower; mend either."),
    (survival("balance", options=C.ConfigDict(dict(lam=1.0))), 1,
     "pruning.options has no 'lam' for balance; known are least."),
    (survival("arrol", options=C.ConfigDict(dict(capacity=3))), 1,
     "pruning.options has no 'capacity' for arrol; known are lam, least, p_max, p_min."),
    (survival(columns=3), 1,
     "pruning.columns=3 must hold the survivors, pruning.kappa x sampler.slots = 4, and be at most sampler.slots=8; "
     "change it, or set 0 for as many as survive."),
    (survival(columns=9), 1,
     "pruning.columns=9 must hold the survivors, pruning.kappa x sampler.slots = 4, and be at most sampler.slots=8; "
     "change it, or set 0 for as many as survive."),
    (survival(options=C.ConfigDict(dict(least=5))), 1,
     "pruning.options: least=5 is more than the 4 lines that may run on; lower it, or raise pruning.columns."),
    (survival(weights="magic"), 1, "pruning.weights='magic' is unknown; known are inverse, none."),
    (survival(weights="inverse", advantage__name="grpo"), 1,
     "pruning.weights=inverse needs chances of surviving and pruning.rule=balance draws none; use another."),
    (survival("random", weights="inverse", refork=True, columns=6), 1,
     "pruning.weights=inverse weighs each survivor once and pruning.refork=True continues some of them several times; "
     "use one of the two."),
    (survival("random", weights="inverse"), 1,
     "pruning.weights=inverse needs an estimator that weighs leaves, and advantage.name=branch_depthwise does not; use "
     "one of dr_grpo, grpo, rloo, or pruning.weights=none."),
    (dict(pruning__columns=4), 1,
     "pruning.columns, refork and weights are read by survival rules, not by pruning.rule=similarity; set it to one "
     "of arrol, arrol_group, balance, random, or leave them at their defaults."),
    (dict(pruning__refork=True), 1,
     "pruning.columns, refork and weights are read by survival rules, not by pruning.rule=similarity; set it to one of "
     "arrol, arrol_group, balance, random, or leave them at their defaults."),
    (survival(rho=1.5), 1, "pruning.rho=1.5 cannot work; set it to a number from 0 to 1."),
    (survival(kappa=0.0), 1, "pruning.kappa=0.0 cannot work; set it to a number above 0, at most 1."),
    (dict(pruning__windows=(4, 60)), 1,
     "pruning.windows=(4, 60) must be lengths up to sampler.answer_length=16, one of them below it; "
     "shorten them, or set pruning.rule=none."),
    (dict(pruning__windows=(16,)), 1,
     "pruning.windows=(16,) must be lengths up to sampler.answer_length=16, one of them below it; shorten them, or set pruning.rule=none."),
    (dict(pruning__tau_ed=0.125, pruning__windows=(4, 8)), 1,
     "pruning.tau_ed=0.125 prunes nothing: a fork differs in its first token, 1 of at most 8 of pruning.windows; set it above 0.125, "
     "add a longer window, or set pruning.rule=none."),
    (dict(branching__share=((0, 0.1), (5, 0.15))), 1,
     "branching.share=0.15 of sampler.slots=8 is less than 2 lines, so that none has a slot to fork into; raise either, or set "
     "branching.rule=stochastic."),
    (dict(sampler__slots=1), 1,
     "branching.share=1.0 of sampler.slots=1 is less than 2 lines, so that none has a slot to fork into; raise either, or set "
     "branching.rule=stochastic."),
    (dict(branching__tau_abs=1.5), 1, "branching.tau_abs=1.5 cannot work; set it to a number from 0 to below 1."),
    (dict(branching__tau_rel=0.0), 1, "branching.tau_rel=0.0 cannot work; set it to a number above 0."),
    (dict(pruning__tau_ed=1.5), 1, "pruning.tau_ed=1.5 cannot work; set it to a number from 0 to 1."),
    (dict(learner__aggregation="magic"), 1, "learner.aggregation='magic' is unknown; known are constant, sequence, token."),
    (dict(learner__objective="magic"), 1, "learner.objective='magic' is unknown; known are cispo, gspo, ppo."),
    (dict(learner__kl_estimate="k4"), 1, "learner.kl_estimate='k4' is unknown; known are k1, k2, k3."),
    (dict(learner__proximal="magic"), 1, "learner.proximal='magic' is unknown; known are learner, sampler."),
    (dict(learner__forced="magic"), 1, "learner.forced='magic' is unknown; known are importance, mask, policy."),
    (dict(learner__importance="magic"), 1, "learner.importance='magic' is unknown; known are mask, none, truncate."),
    (dict(optimizer__schedule="magic"), 1, "optimizer.schedule='magic' is unknown; use 'constant' or 'cosine'."),
    (dict(learner__bin_tokens=20), 1,
     "learner.bin_tokens=20 is less than sampler.prompt_length + sampler.answer_length = 28; "
     "raise it so that any one path fits into a bin."),
    (dict(model__heads=3), 1, "model.heads=3 is not a multiple of model.kv_heads=2; make it one."),
    (dict(model__head_dim=7), 1, "model.head_dim=7 is odd; rotary positions need it even."),
    (dict(mesh__tensor=64), 1,
     f"mesh.data=-1, mesh.fsdp=1, mesh.tensor=64 does not fit the number of devices, {jax.device_count()}; "
     f"set sizes that multiply to {jax.device_count()}, or one of them to -1 for the rest."),
    (dict(mesh__data=0), 1,
     "mesh.data=0, mesh.fsdp=1, mesh.tensor=1 cannot work; set positive sizes, at most one of them -1 for the rest."),
    (dict(sampler__prompts=30), 8,
     "sampler.prompts=30 does not divide over mesh.data x mesh.fsdp = 8 shards; make it a multiple."),
    (dict(evaluation__batch=6), 8,
     "evaluation.batch=6 must divide over 8 shards and into the 8 held-out examples used; "
     "change evaluation.batch or evaluation.examples."),
    (dict(warm_start__batch=30, warm_start__steps=1), 8,
     "warm_start.batch=30 does not divide over mesh.data x mesh.fsdp = 8 shards; make it a multiple."),
    (dict(sampler__prompt_length=9), 1,
     "a prompt of 11 tokens is longer than sampler.prompt_length=9; raise sampler.prompt_length."),
    (dict(sampler__answer_length=6, warm_start__steps=1), 1,
     "a reference answer of 8 tokens is longer than sampler.answer_length=6; raise sampler.answer_length."),
])  # fmt: skip
def test_runs_that_can_never_start(changes, shards, message, data, tmp_path, monkeypatch):
    monkeypatch.setattr(sharding, "tree_shards", lambda mesh: shards)
    assert sentence(train.train, small(data, **changes), str(tmp_path / "run"), False) == message
    assert not list(tmp_path.iterdir())


CREDIT = "return the credit of leaves, [L], or of cells, [S, K], or a pair of such credit and the weight of leaves, [L]."
OF_A_TREE = "advantage.name=mine: of a tree with S=3 rows, K=2 slots and L=2 leaves it returns"
GIVEN = "beside tree and reward it can be given reference_logp, gradient_norm, importance, survival, before any *, and options, "


@pytest.mark.parametrize("estimator, message", [
    (lambda tree, reward: tree.entropy.T, f"{OF_A_TREE} (2, 3); {CREDIT}"),
    (lambda tree, reward: reward[:, None], f"{OF_A_TREE} (2, 1); {CREDIT}"),
    (lambda tree, reward: reward.sum(), f"{OF_A_TREE} (); {CREDIT}"),
    (lambda tree, reward: (reward, tree.entropy), f"{OF_A_TREE} (2,), (3, 2); {CREDIT}"),
    (lambda tree, reward: None, f"{OF_A_TREE} NoneType; {CREDIT}"),
    (lambda tree, reward, gradient_nrom: reward, f"advantage.name=mine: it asks for 'gradient_nrom'; {GIVEN}behind it, need a default."),
    (lambda tree, reward, *, importance: reward, f"advantage.name=mine: it asks for 'importance'; {GIVEN}behind it, need a default."),
])  # fmt: skip
def test_estimators_of_ones_own_that_cannot_work(estimator, message, monkeypatch):
    monkeypatch.setitem(ESTIMATORS, "mine", estimator)
    assert sentence(functools.partial(functions.make_advantage, changed(advantage__name="mine").advantage)) == message


def test_a_data_folder_that_is_a_file(tmp_path):
    (tmp_path / "data").write_text("mine")
    assert sentence(train.train, small(tmp_path / "data"), str(tmp_path / "run")) == (
        f"data_dir={tmp_path / 'data'} cannot be written (Not a directory); set data_dir to a folder that can, with room for the examples."
    )
    assert files(tmp_path) == {pathlib.Path("data"): b"mine"}


# --- a run whose steps and reports cost nothing: its loop, its files and Orbax are real -----------


class Quick(Experiment):
    before_step = staticmethod(lambda number: None)

    def __init__(self, config):
        super().__init__(config)
        self.train_step = self.count

    def count(self, state, prompts, knobs, check):
        self.before_step(int(state.step) + 1)
        values = dict(reward=0.5, sampled_tokens=100, skipped=0)
        return state.replace(step=state.step + 1, position=state.position + prompts.token.shape[0]), values

    def compile_step(self):
        return profiling.Memory(0, 0, None)

    def evaluate(self, state, seed=0, check=None):
        return {"pass@1": 0.5, "pass@2": 0.5}


@pytest.fixture
def quick(monkeypatch, data, tmp_path):
    """quick(**changes) trains in tmp_path/run."""
    monkeypatch.setattr(train, "Experiment", Quick)
    monkeypatch.setattr(train, "example_trees", lambda *_: [])
    monkeypatch.setattr(report, "write_report", lambda *_: None)
    return lambda **changes: train.train(small(data, **changes), str(tmp_path / "run"), progress=False)


@pytest.fixture
def disk():
    """disk("full"): no file may grow beyond 4 KiB, as close as an unprivileged process comes to it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def turn(how):
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]) if how == "full" else before)

    yield turn
    turn("empty")


def refused(workdir, words: str) -> str:
    return f"workdir={workdir} cannot be written ({words}); make room or allow it, and the same command goes on from the last checkpoint."


@pytest.mark.parametrize("last_good", [4, 6])  # noticed by the next save; by the final close
def test_a_disk_that_fills_up_during_a_checkpoint(last_good, quick, disk, tmp_path, monkeypatch):
    """Through Orbax's own background writes; with room again the same command ends the run."""
    workdir = tmp_path / "run"

    def fill(number):
        if number == last_good + 1:
            while not (workdir / "checkpoints" / str(last_good)).exists():
                time.sleep(0.01)
            disk("full")

    monkeypatch.setattr(Quick, "before_step", staticmethod(fill))
    assert sentence(quick) == refused(workdir, "File too large")
    with Checkpoints(workdir, read_only=True) as checkpoints:
        assert checkpoints.latest_step == last_good
    disk("empty")
    started = []
    monkeypatch.setattr(Quick, "before_step", staticmethod(started.append))
    assert quick()["steps"] == STEPS
    assert started == list(range(last_good + 1, STEPS + 1))
    assert [line["step"] for line in metrics.read(workdir / "metrics.jsonl")] == list(range(STEPS + 1))
    assert str(STEPS) in {p.name for p in (workdir / "checkpoints").iterdir()}


FULL = """
import resource, sys
sys.path.insert(0, "tests")
import input_test
from launch import entry, train as launched
from treerl import report, train
train.Experiment, train.example_trees, report.write_report = input_test.Quick, lambda *_: [], lambda *_: None
limit = lambda number: number == 7 and resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
input_test.Quick.before_step = staticmethod(limit)
entry.run(launched.main)
"""


@pytest.mark.slow
def test_a_full_disk_from_the_command_line(data, tmp_path):
    """Orbax logs tracebacks from its threads: the sentence is all that is left of them."""
    flags = [f"--config.{name}={value}" for name, value in dict(SIZES, data_dir=data).items()]
    command = [sys.executable, "-c", FULL, "--config=experiments/countdown.py", f"--workdir={tmp_path / 'run'}", *flags]
    run = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr.splitlines()[-1] == refused(tmp_path / "run", "File too large")
    assert "Traceback" not in run.stderr and "Error" not in run.stderr


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl"])
def test_a_disk_that_is_full_for_other_files(name, quick, tmp_path):
    """/dev/full answers every write as a full disk does."""
    workdir, patch = tmp_path / "run", pytest.MonkeyPatch()
    if name == "config.json":
        workdir.mkdir()
        (workdir / "config.json.tmp").symlink_to("/dev/full")
    else:

        def begin(self, path, resume_step):
            self._file, self.empty = open("/dev/full", "a"), True

        patch.setattr(metrics.MetricsFile, "__init__", begin)
    try:
        assert sentence(quick) == refused(workdir, "No space left on device")
    finally:
        patch.undo()
    assert not (workdir / "metrics.jsonl").exists()
    (workdir / "config.json.tmp").unlink(missing_ok=True)
    assert quick()["steps"] == STEPS


def test_a_workdir_that_cannot_be_made(quick, tmp_path):
    (tmp_path / "run").write_text("mine")
    assert sentence(quick) == f"workdir={tmp_path / 'run'} is a file; give a folder, or a name that is free."
    assert files(tmp_path) == {pathlib.Path("run"): b"mine"}


def test_only_what_the_system_refuses_is_a_sentence():
    memory = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
    for error in (ValueError("a bug"), KeyError("a bug"), memory):
        with pytest.raises(type(error)) as raised, writing("this", "mend it."):
            raise error
        assert raised.value is error
    with pytest.raises(UserError, match="this cannot be written .Disk quota exceeded.; mend it."):
        with writing("this", "mend it."):
            raise ValueError("RESOURCE_EXHAUSTED: Failed to write 8 bytes: Disk quota exceeded [os_error_code='122']")


# --- a workdir that holds something else, or is damaged -------------------------------------------


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """The workdir of a run of four steps, its best checkpoint at step 0."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "Experiment", Quick)
        patch.setattr(train, "example_trees", lambda *_: [])
        patch.setattr(report, "write_report", lambda *_: None)
        train.train(small(data, steps=4), str(workdir), progress=False)
    return workdir


def test_a_workdir_of_another_experiment(quick, finished, tmp_path):
    workdir = shutil.copytree(finished, tmp_path / "run")
    before = files(workdir)
    for changes, words in (
        (dict(steps=4, branching__tau_abs=0.5), "branching.tau_abs=0.05, not 0.5"),
        (dict(steps=4, advantage__options=C.ConfigDict(dict(clip=3.0))), "advantage.options={}, not {'clip': 3.0}"),
        (dict(steps=8), "steps=4, not 8, and optimizer.schedule=cosine ends with them (constant ones can be lengthened)"),
    ):
        assert sentence(functools.partial(quick, **changes)) == (
            f"workdir={workdir} belongs to a run with {words}; give another --workdir, or the same config."
        )
    assert files(workdir) == before


def test_wandb_is_asked_for_and_not_installed(quick, finished, tmp_path, monkeypatch):
    """Of a new run and of one that goes on: nothing is written."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = "wandb='mine' needs the package wandb; pip install wandb, or set wandb=''."
    assert sentence(functools.partial(quick, wandb="mine")) == message
    assert not (tmp_path / "run").exists()
    workdir = shutil.copytree(finished, tmp_path / "run")
    before = files(workdir)
    assert sentence(functools.partial(quick, steps=4, wandb="mine")) == message
    assert files(workdir) == before


def test_wandb_gets_the_lines_of_a_run(quick, tmp_path, monkeypatch):
    """Those before it was asked for, too; and what a run does again after a crash is not sent again."""
    monkeypatch.setitem(sys.modules, "wandb", wandb := Wandb())
    constant = dict(optimizer__schedule="constant")  # so that steps may change

    def crash(number):
        if number == 8:
            raise KeyboardInterrupt

    quick(steps=3, **constant)
    monkeypatch.setattr(Quick, "before_step", staticmethod(crash))
    with pytest.raises(KeyboardInterrupt):
        quick(wandb="mine", **constant)
    assert wandb.ended == [1] and [step for step, _ in wandb.sent] == [0, 1, 2, 3, 4, 5, 6, 7]
    started = []
    monkeypatch.setattr(Quick, "before_step", staticmethod(started.append))
    quick(wandb="mine", **constant)
    assert started[0] == 7 and wandb.ended == [1, 0]
    assert [step for step, _ in wandb.sent] == list(range(STEPS + 1))
    lines = metrics.read(tmp_path / "run" / "metrics.jsonl")
    alike = [(line["step"], {k: v for k, v in line.items() if k != "step"}) for line in lines if line["step"] != 7]
    assert [x for x in wandb.sent if x[0] != 7] == alike and {x for x in wandb.sent[-1][1]} >= {"reward", "tokens_per_second", "pass@1"}
    first, again = wandb.asked
    assert first == again and first["config"]["sampler"]["slots"] == 8 and first["name"] == "run"


def test_a_damaged_config(quick, finished, tmp_path):
    workdir = shutil.copytree(finished, tmp_path / "run")
    (workdir / "config.json").write_bytes((finished / "config.json").read_bytes()[:100])
    before = files(workdir)
    message = f"{workdir}/config.json is damaged; give another --workdir, or put the run's own config there."
    assert sentence(quick) == sentence(load, str(workdir)) == message
    assert files(workdir) == before


def test_a_damaged_metrics_file(quick, finished, tmp_path):
    workdir = shutil.copytree(finished, tmp_path / "run")
    with open(workdir / "metrics.jsonl", "r+") as file:
        file.write("{]")
    assert sentence(functools.partial(quick, steps=4)) == (
        f'{workdir}/metrics.jsonl line 1 is no JSON object with a "step"; remove that line or use a new workdir.'
    )


def test_a_workdir_of_no_run():
    assert sentence(load, "/nowhere/run") == ("workdir=/nowhere/run has no config.json; give the workdir of a run made by launch.train.")


def test_a_workdir_without_a_checkpoint(finished, tmp_path):
    workdir = shutil.copytree(finished, tmp_path / "run", ignore=lambda *_: ["checkpoints"])
    assert sentence(load, str(workdir)) == (f"workdir={workdir} has no checkpoint yet; wait for the first or train longer.")


@pytest.mark.slow
def test_a_run_trained_on_other_devices(finished, tmp_path):
    """What launch.evaluate does with a run of eight devices on a machine with one."""
    workdir = shutil.copytree(finished, tmp_path / "run")
    config = json.loads((workdir / "config.json").read_text())
    assert config["mesh"]["data"] == -1
    config["mesh"].update(data=8)
    (workdir / "config.json").write_text(json.dumps(config))
    run = launch("evaluate", f"--workdir={workdir}")
    assert run.returncode == 0, run.stderr
    assert run.stdout == launch("evaluate", f"--workdir={finished}").stdout
    assert json.loads(run.stdout)["step"] == 4
    assert json.loads((workdir / "config.json").read_text()) == config


def test_a_quality_head_with_a_checkpoint_that_has_none(finished, tmp_path):
    """What a run made before heads were, or another experiment's config, would ask for."""
    workdir = shutil.copytree(finished, tmp_path / "run")
    config = json.loads((workdir / "config.json").read_text())
    config["pruning"].update(rule="balance")
    (workdir / "config.json").write_text(json.dumps(config))
    assert sentence(load, str(workdir)) == (
        f"checkpoint {workdir}/checkpoints/4 has no 'quality/opt_state/0/count', which the state has; restore with "
        "the config the checkpoint was made with, or use a new workdir."
    )
    assert load(str(finished))[2] == 4


def largest(folder: pathlib.Path) -> pathlib.Path:
    """The file with the arrays."""
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


DAMAGES = {
    "arrays cut": lambda step: os.truncate(largest(step), 1000),
    "arrays gone": lambda step: largest(step).unlink(),
    "manifest gone": lambda step: (step / "state/manifest.ocdbt").unlink(),
    "metadata cut": lambda step: os.truncate(step / "state/_METADATA", 100),
    "record cut": lambda step: os.truncate(step / "record/metadata", 10),
    "record gone": lambda step: shutil.rmtree(step / "record"),
    "state gone": lambda step: shutil.rmtree(step / "state"),
    "all gone": lambda step: [shutil.rmtree(step), step.mkdir()],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint(damage, quick, finished, tmp_path):
    """The way out that the message names works, and so does a new start."""
    workdir = shutil.copytree(finished, tmp_path / "run")
    folder = workdir / "checkpoints"
    DAMAGES[damage](folder / "4")
    before = files(workdir)
    message = f"checkpoint {folder}/4 is damaged; delete it to go on from step 0."
    assert sentence(functools.partial(quick, steps=4)) == message
    assert sentence(load, str(workdir)) == message
    assert files(workdir) == before
    shutil.rmtree(folder / "4")
    assert load(str(workdir))[2] == 0
    if damage in ("arrays cut", "all gone"):
        assert quick(steps=4)["steps"] == 4


@pytest.mark.parametrize("damage", ["checkpoints.json", "checkpoints/0/state/_METADATA"])
def test_a_damaged_best_checkpoint(damage, finished, tmp_path):
    workdir = shutil.copytree(finished, tmp_path / "run")
    os.truncate(workdir / damage, 5)
    assert sentence(functools.partial(load, str(workdir), best=True)) == (
        f"checkpoint {workdir}/{damage.removesuffix('/state/_METADATA')} is damaged; delete it to go on without a best checkpoint."
    )


def test_a_damaged_checkpoint_from_the_command_line(finished, tmp_path):
    workdir = shutil.copytree(finished, tmp_path / "run")
    largest(workdir / "checkpoints/4").unlink()
    run = launch("evaluate", f"--workdir={workdir}")
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr == f"checkpoint {workdir}/checkpoints/4 is damaged; delete it to go on from step 0.\n"
