"""The host loop as a user starts it: killed and started again, it tells the same story."""

import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from events_oracle import scalars
from profiling_test import traced_steps
from readme_test import rows_of
from report_test import drawn, told

from treerl import metrics
from treerl.draw import TEXT_LEGEND
from treerl.experiment import Experiment, load
from treerl.workdir import claim, read_config, write_config

pytestmark = pytest.mark.slow
ROOT = pathlib.Path(__file__).resolve().parent.parent
KILLS = int(os.environ.get("TREERL_KILLS", 4))  # how often the run is killed; 20 take about 5 minutes
STEPS = max(12, 2 * KILLS)
SIZES = {  # sums of two numbers, which a model this small half learns at once
    "steps": STEPS,
    "checkpoint_every": 1,
    "task.train_size": 32,
    "task.heldout_size": 8,
    "task.numbers_min": 2,
    "task.numbers_max": 2,
    "task.operators": "+",
    "model.layers": 1,
    "model.width": 32,
    "model.heads": 2,
    "model.kv_heads": 1,
    "model.head_dim": 16,
    "model.hidden": 64,
    "sampler.prompts": 8,
    "sampler.slots": 4,
    "sampler.prompt_length": 8,
    "sampler.answer_length": 6,
    "sampler.temperature": 1.5,  # so that rewards of a group differ
    "learner.bin_tokens": 32,
    "optimizer.warmup_steps": 0,
    "warm_start.examples": 32,
    "warm_start.steps": 80,
    "warm_start.batch": 16,
    "warm_start.eval_every": 40,
    "warm_start.learning_rate": 0.01,
    "evaluation.every": 3,
    "evaluation.examples": 8,
    "evaluation.batch": 8,
    "evaluation.samples": 3,
}


def environment(folder: pathlib.Path) -> dict[str, str]:
    """Of a process on one CPU device that shares compiled programs with the others of the folder."""
    changes = dict(
        JAX_PLATFORMS="cpu",
        JAX_COMPILATION_CACHE_DIR=str(folder / "programs"),
        JAX_DISABLE_MOST_OPTIMIZATIONS="1",  # compiles in half the time
    )
    return {name: value for name, value in (os.environ | changes).items() if name != "XLA_FLAGS"}


def start(folder: pathlib.Path, workdir: str, *flags: str, main=("-m", "launch.train"), **changes) -> subprocess.Popen:
    """Starts the training of SIZES in folder/workdir; runs of one folder share data and programs."""
    command = [sys.executable, *main, "--config=experiments/countdown.py"]
    command += [f"--workdir={folder / workdir}", f"--config.data_dir={folder / 'data'}"]
    command += [*flags, *(f"--config.{name}={value}" for name, value in (SIZES | changes).items())]
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # by a shell's &; children would inherit it
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    with open(folder / f"{workdir}.log", "a") as log:
        return subprocess.Popen(command, cwd=ROOT, env=environment(folder), stdout=subprocess.PIPE, stderr=log, text=True)


def finish(run: subprocess.Popen, log: pathlib.Path) -> dict:
    """Waits for a run; the JSON of the last line of its standard output."""
    output, _ = run.communicate()
    assert run.returncode == 0, log.read_text()[-4000:]
    return json.loads(output.splitlines()[-1])


def steps_written(path: pathlib.Path) -> int:
    """Lines of metrics.jsonl but for line 0."""
    return max(0, path.read_bytes().count(b"\n") - 1) if path.exists() else 0


def half_written(workdir: pathlib.Path) -> list[str]:
    """Orbax's temporary folders: checkpoints that are being written, or were when the run was killed."""
    return sorted(path.name for path in workdir.glob("checkpoints/*tmp*"))


def wait_until(run: subprocess.Popen, happened) -> None:
    while run.poll() is None and not happened():
        time.sleep(0.001)


def opened_again(lines: pathlib.Path):
    """A function that tells whether metrics.jsonl was replaced since now, as it is before the first step."""
    inode = lambda: lines.exists() and lines.stat().st_ino
    before = inode()
    return lambda: inode() != before


def kill(run: subprocess.Popen) -> None:
    """Ends a run without a chance to clean up."""
    run.send_signal(signal.SIGKILL)
    run.communicate()
    assert run.returncode == -signal.SIGKILL, f"the run ended by itself: {run.returncode}"


def kill_at_random(run: subprocess.Popen, workdir: pathlib.Path, moment: str, rng: random.Random) -> dict:
    """Kills a run at a random moment of a kind; says what was on disk then.

    start: while it imports, prepares data, restores or compiles. step: after some steps. write:
    while a checkpoint's temporary folder is there. report: after the last step.
    """
    lines = workdir / "metrics.jsonl"
    if moment == "report":
        wait_until(run, lambda: steps_written(lines) >= STEPS)
        time.sleep(0.5 * rng.random())
    elif moment == "start":
        time.sleep(1 + 5 * rng.random())
    else:
        wait_until(run, opened_again(lines))
        target = min(steps_written(lines) + rng.randint(1, 3), STEPS - 1)
        wait_until(run, lambda: steps_written(lines) >= target)
        if moment == "write":
            wait_until(run, lambda: half_written(workdir))
        time.sleep(0.03 * rng.random())
    kill(run)
    saved = [int(path.name) for path in workdir.glob("checkpoints/*") if path.name.isdigit()]
    return dict(moment=moment, steps=steps_written(lines), half_written=half_written(workdir), saved=max(saved, default=0))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One run killed at random moments and started again each time, and one left alone."""
    folder, rng = tmp_path_factory.mktemp("train"), random.Random(0)
    killed = folder / "killed"
    whole = finish(start(folder, "whole", f"--profile={STEPS - 1}:{STEPS}"), folder / "whole.log")
    moments = ["start", *(["write", "step", "write", "start"] * KILLS)[: KILLS - 2], "report"]
    kills = [kill_at_random(start(folder, "killed"), killed, moment, rng) for moment in moments]
    print(*kills, sep="\n")
    summary = finish(start(folder, "killed"), folder / "killed.log")
    return dict(folder=folder, kills=kills, summary=summary, whole=whole)


def story(workdir: pathlib.Path) -> list[dict]:
    """The lines of metrics.jsonl but for line 0, without their times."""
    lines = metrics.read(workdir / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")} for line in lines if line["step"]]


@pytest.mark.slow
def test_the_run_was_killed_at_all_kinds_of_moments(runs):
    kills = runs["kills"]
    assert len(kills) == KILLS
    assert kills[-1]["steps"] == STEPS
    assert any(0 < kill["steps"] < STEPS for kill in kills)
    inside = [kill for kill in kills if kill["half_written"] and kill["moment"] != "start"]  # a start finds old ones
    assert len(inside) >= KILLS // 4


def test_a_kill_costs_at_most_the_checkpoint_that_was_being_written(runs):
    """With a checkpoint every step: that one, and the step under way."""
    assert [kill for kill in runs["kills"] if kill["steps"] - kill["saved"] > 2] == []
    assert any(kill["saved"] for kill in runs["kills"])


def test_a_killed_run_repeats_the_same_numbers(runs):
    """Bit for bit: metrics keep every bit of a float."""
    killed, whole = story(runs["folder"] / "killed"), story(runs["folder"] / "whole")
    assert [line["step"] for line in killed] == list(range(1, STEPS + 1))
    [first] = [line for line in metrics.read(runs["folder"] / "killed/metrics.jsonl") if line["step"] == 0]
    assert first == {"step": 0} | {name.removesuffix("_before"): x for name, x in runs["whole"].items() if name.endswith("before")} | first
    assert first == metrics.read(runs["folder"] / "whole/metrics.jsonl")[0] and "reward" not in first
    for mine, wanted in zip(killed, whole, strict=True):
        assert mine == wanted


@pytest.mark.parametrize("best", [False, True])
def test_a_killed_run_ends_with_the_same_state(runs, best):
    """Parameters, optimizer and counts of the last and of the best checkpoint, bit for bit."""
    _, killed, step = load(str(runs["folder"] / "killed"), best=best)
    _, whole, wanted = load(str(runs["folder"] / "whole"), best=best)
    assert step == wanted and (best or step == STEPS)
    jax.tree.map(np.testing.assert_array_equal, killed, whole)
    assert runs["summary"] | {"wall_seconds": 0} == runs["whole"] | {"wall_seconds": 0}


def test_the_numbers_are_worth_comparing(runs):
    """After the kill the policy learns, and pass@k is measured: no line is a line of zeros."""
    later = [line for line in story(runs["folder"] / "whole") if line["step"] > 6]
    assert sum(line["grad_norm"] > 0 for line in later) >= 4
    assert all(0 < line["reward"] < 1 for line in later)
    assert all(line["skipped"] == 0 for line in later)
    assert {9, 12} <= {line["step"] for line in later if "pass@1" in line}


def test_event_files_tell_the_same_story(runs):
    """After a kill and a resume too: TensorBoard sees each step once."""
    for name in ("killed", "whole"):
        workdir = runs["folder"] / name
        tag = lambda key: ("eval/" if "@" in key else "train/") + key
        lines = metrics.read(workdir / "metrics.jsonl")
        wanted = {line.pop("step"): {tag(key): np.float32(x) for key, x in line.items()} for line in lines}
        found = scalars(workdir / "tensorboard")
        if name == "whole" and len(found) < STEPS:  # killed between the two writes of its last step
            wanted.pop(STEPS)
        assert found == wanted
        curve = scalars(workdir / "tensorboard" / "warm_start")
        assert list(curve) == [40, 80]
        for line in curve.values():
            assert set(line) == {f"warm_start/{name}" for name in ("loss", "pass@1", "pass@2", "pass@3", "majority@3")}


def test_the_profile_holds_the_steps_asked_for(runs):
    assert traced_steps(runs["folder"] / "whole" / "profile") == [STEPS - 1, STEPS]


def generate(runs, *flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "launch.generate", f"--workdir={runs['folder'] / 'killed'}", *flags]
    return subprocess.run(command, cwd=ROOT, env=environment(runs["folder"]), capture_output=True, text=True)


def test_generate_prints_a_graded_tree(runs):
    run = generate(runs, "--prompt= 3 5 = 8", "--best", "--seed=1")
    assert run.returncode == 0, run.stderr[-4000:]
    lines = run.stdout.splitlines()
    assert lines[:2] == ["3 5=8:", "prompt"]
    leaves = lines[lines.index("") + 2 : -2]
    assert lines[-2:] == ["", TEXT_LEGEND]
    assert len(leaves) == SIZES["sampler.slots"]
    for line in leaves:
        mark, reward, advantage, end, text = line.split(None, 4)
        right = end == "finished" and json.loads(text) in ("3+5", "5+3")
        assert (mark, reward) == (("✓", "1.0") if right else ("✗", "0.0")) and end in ("finished", "truncated")
        assert float(advantage) == 0 or (float(advantage) > 0) == right  # branch_depthwise: signs are those of GRPO


def test_generate_exits_with_one_sentence(runs):
    run = generate(runs, "--prompt=3 5")
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr == "--prompt='3 5' has no target; write one behind an equals sign, as in --prompt='1 2=3'.\n"


def test_a_prompt_too_long_for_the_run(runs):
    from types import SimpleNamespace

    from ml_collections import ConfigDict

    from treerl import tasks

    config = ConfigDict(read_config(str(runs["folder"] / "whole")))
    config.sampler.prompt_length = 6
    experiment = SimpleNamespace(config=config, task=tasks.make(config.task, config.data_dir))
    assert Experiment.parse(experiment, "3 5=8")["target"] == 8
    with pytest.raises(ValueError) as error:
        Experiment.parse(experiment, "3 5=12")
    assert str(error.value) == "--prompt='3 5=12' has 7 tokens and this run reads at most 6; give a shorter --prompt."


def test_summary(runs):
    """The last line on standard output, after a run that took two processes."""
    summary, last = runs["summary"], story(runs["folder"] / "killed")[-1]
    assert set(summary) == {
        "steps", "wall_seconds", "pass@1_before", "pass@1_after", "pass@3_before", "pass@3_after",
    }  # fmt: skip
    assert summary["steps"] == STEPS and summary["wall_seconds"] > 0
    assert (summary["pass@1_after"], summary["pass@3_after"]) == (last["pass@1"], last["pass@3"])
    assert 0 <= summary["pass@1_before"] <= summary["pass@3_before"] <= 1


def test_report(runs):
    page = (runs["folder"] / "killed" / "report.html").read_text()
    assert page.count("<iframe srcdoc=") == 8 and page.count("leaves right; forks: ") == page.count("; fresh starts: ") == 8
    trees = metrics.read(runs["folder"] / "killed/trees.jsonl")
    assert [(tree["step"], tree["index"]) for tree in trees[4:]] == [(STEPS, tree["index"]) for tree in trees[:4]]
    assert {tree["step"] for tree in trees[:4]} == {0} and len({tree["index"] for tree in trees}) == 4
    assert trees == metrics.read(runs["folder"] / "whole/trees.jsonl")
    assert "Before and after" in page and "<th>before</th><th>after</th>" in page
    for name in ("pass@1", "pass@3"):
        before, after = (f"<td>{runs['summary'][f'{name}_{moment}']:.4g}</td>" for moment in ("before", "after"))
        assert f"<td>{name}</td>{before}{after}" in page
    training, warm = drawn(page)
    names = {name for line in story(runs["folder"] / "killed") for name in line}
    assert all(len(rows_of(name)) == 1 for name in names - {"step"})  # of the README's table
    every = [name for _, panel in training for name in panel] + told(page)
    assert sorted(every) == sorted(names - {"step"} | {"seconds", "tokens_per_second"})
    assert sorted(name for _, panel in warm for name in panel) == ["loss", "majority@3", "pass@1", "pass@2", "pass@3"]


def test_only_what_the_design_names_is_written(runs):
    names = {p.name for p in (runs["folder"] / "killed").iterdir()}
    assert names == {
        "config.json", "metrics.jsonl", "samples.jsonl", "tensorboard", "checkpoints", "checkpoints.json", "report.html",
        "warm_start.jsonl", "trees.jsonl", "starts.jsonl",
    }  # fmt: skip
    assert not list((runs["folder"] / "killed").rglob("*tmp*"))


def test_a_workdir_of_another_experiment_is_refused(runs, tmp_path):
    from ml_collections import ConfigDict

    config = ConfigDict(read_config(str(runs["folder"] / "whole")))
    workdir = tmp_path / "run"
    claim(str(workdir), config)
    assert not workdir.exists()  # it only looks
    write_config(str(workdir), config)
    written = (workdir / "config.json").read_text()
    config.mesh.data, config.environment.options = 1, ConfigDict({"workers": 7})
    claim(str(workdir), config)  # other devices, and more processes that play games, are the same experiment
    config.branching.tau_abs = 0.5
    with pytest.raises(ValueError) as error:
        claim(str(workdir), config)
    old = json.loads(written)["branching"]["tau_abs"]
    assert str(error.value) == (
        f"workdir={workdir} belongs to a run with branching.tau_abs={old!r}, not 0.5; give another --workdir, or the same config."
    )
    assert json.loads((workdir / "config.json").read_text())["branching"]["tau_abs"] == old


@pytest.mark.slow
def test_a_signal_saves_the_step_under_way(runs):
    """Between two steps; and in a run that goes on from there, while its first step compiles."""
    folder, workdir = runs["folder"], runs["folder"] / "signals"
    lines, before = workdir / "metrics.jsonl", 4  # not a multiple of evaluation.every
    for number in (signal.SIGINT, signal.SIGTERM):
        again = opened_again(lines)
        run = start(folder, "signals", checkpoint_every=100)
        wait_until(run, lambda: again() and steps_written(lines) >= before)
        run.send_signal(number)
        output, _ = run.communicate()
        done = steps_written(lines)
        log = (folder / "signals.log").read_text()
        assert (run.returncode, output) == (75, ""), log
        assert before <= done < STEPS and "Traceback" not in log
        saved = f"stopped after step {done} of {STEPS}; {workdir}/checkpoints holds step {done}, and the same command goes on from there."
        compiling = f"stopped before step {done + 1} of {STEPS}, nothing is lost; the same command goes on from there."
        assert log.splitlines()[-1] in (f"{number.name}: {saved}", f"{number.name}: {compiling}" if done == before else "")
        assert str(done) in {p.name for p in (workdir / "checkpoints").iterdir()}
        assert story(workdir) == story(folder / "whole")[:done]
        before = done


@pytest.mark.slow
def test_a_signal_cuts_an_evaluation_short(runs):
    """The step before it is saved, and the next process evaluates it: its line is the same and is there once."""
    folder, workdir = runs["folder"], runs["folder"] / "short"
    output, _ = start(folder, "short", main=("-c", SIGNAL_IN_EVALUATION), checkpoint_every=100).communicate()
    log = (folder / "short.log").read_text()
    assert output == "" and log.splitlines()[-1] == (
        f"SIGTERM: stopped after step 6 of {STEPS}; {workdir}/checkpoints holds step 6, and the same command goes on from there."
    )
    assert [line["step"] for line in story(workdir)] == [1, 2, 3, 4, 5]
    finish(start(folder, "short", checkpoint_every=100), folder / "short.log")
    assert story(workdir) == story(folder / "whole")


SIGNAL_IN_EVALUATION = """
import os, signal
from treerl.experiment import Experiment
evaluate = Experiment.evaluate
def interrupted(self, state, **more):
    if int(state.step) == 6:
        os.kill(os.getpid(), signal.SIGTERM)
    return evaluate(self, state, **more)
Experiment.evaluate = interrupted
from launch import entry, train
entry.run(train.main)
"""


@pytest.mark.slow
def test_a_warm_start_goes_on_after_a_signal(runs):
    """With the same numbers as one that was left alone."""
    folder, log = runs["folder"], runs["folder"] / "early.log"
    reached = (lambda: "warm start:" in log.read_text(), lambda: list((folder / "early").glob("warm_start/**/40*")))
    for happened, number in zip(reached, (signal.SIGINT, signal.SIGTERM)):
        run = start(folder, "early")
        wait_until(run, happened)
        run.send_signal(number)
        output, _ = run.communicate()
        assert (run.returncode, output) == (75, ""), log.read_text()
        assert "Traceback" not in log.read_text() and not steps_written(folder / "early/metrics.jsonl")
        assert re.fullmatch(
            f"{number.name}: stopped in the warm start after update [0-9]+, which is saved; the same command goes on from "
            "there.", log.read_text().splitlines()[-1],
        )  # fmt: skip
    assert finish(start(folder, "early"), log) | {"wall_seconds": 0} == runs["whole"] | {"wall_seconds": 0}
    assert story(folder / "early") == story(folder / "whole")
    assert not (folder / "early" / "warm_start").exists()


@pytest.mark.slow
def test_a_second_signal_ends_at_once(runs):
    folder = runs["folder"]
    run = start(folder, "twice")
    wait_until(run, lambda: "warm start:" in (folder / "twice.log").read_text())
    run.send_signal(signal.SIGINT)
    wait_until(run, lambda: "a second one ends at once" in (folder / "twice.log").read_text())
    run.send_signal(signal.SIGINT)
    run.communicate()
    assert run.returncode == -signal.SIGINT
    assert "Traceback" not in (folder / "twice.log").read_text()


def test_a_finished_run_writes_its_report_again(runs):
    """Also when it was asked to stop meanwhile: nothing is left to save."""
    folder, killed = runs["folder"], runs["folder"] / "killed"
    (killed / "report.html").unlink()
    lines, told = (killed / "metrics.jsonl").read_bytes(), lambda: (folder / "killed.log").read_text().count(f"train: {STEPS}/{STEPS} [")
    before, run = told(), start(folder, "killed")
    wait_until(run, lambda: told() > before)
    run.send_signal(signal.SIGTERM)
    assert finish(run, folder / "killed.log") == runs["summary"]
    assert (killed / "report.html").exists() and (killed / "metrics.jsonl").read_bytes() == lines


NAN = """
import jax.numpy as jnp
from treerl import step
learn = step.learn
def broken(fns, state, tree, prompts, cells, denominator, knobs, **more):
    bad = jnp.isin(state.step, jnp.array([2, 3, 5, 6, 7, 8]))
    temperature = jnp.where(bad, jnp.nan, knobs["temperature"])
    return learn(fns, state, tree, prompts, cells, denominator, dict(knobs, temperature=temperature), **more)
step.learn = broken
from launch import entry, train
entry.run(train.main)
"""


@pytest.mark.slow
def test_updates_that_are_not_finite_are_skipped_and_then_end_the_run(runs):
    """nan in steps 3 and 4, and again from step 6 on."""
    folder, workdir = runs["folder"], runs["folder"] / "nan"
    run = start(folder, "nan", main=("-c", NAN), **{"learner.max_skipped": 2, "evaluation.every": 100})
    output, _ = run.communicate()
    log = (folder / "nan.log").read_text()
    assert (run.returncode, output) == (1, ""), log
    assert log.splitlines()[-1] == (
        "step 8: loss or gradient was not finite in 3 updates in a row, more than learner.max_skipped=2; look at "
        f"loss and grad_norm in {workdir}/metrics.jsonl (null: not finite), then lower optimizer.learning_rate in "
        "another --workdir, or raise learner.max_skipped to go on from step 5, saved before them in checkpoints; "
        "an estimator of your own may give a nan."
    )
    assert "Traceback" not in log
    assert re.findall(r"step (\d+): loss or gradient is not finite, the update is skipped\.", log) == ["3", "6"]
    lines = story(workdir)
    assert [line["skipped"] for line in lines] == [0, 0, 1, 1, 0, 1, 1, 1]
    assert [line["loss"] is None for line in lines] == [False, False, True, True, False, True, True, True]
    assert len({line["reward"] for line in lines[2:4]}) == 2  # other prompts are tried
    _, state, step = load(str(workdir))
    assert step == 5 and all(np.all(np.isfinite(x)) for x in jax.tree.leaves(state.params))
