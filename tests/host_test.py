"""The step graded on the host: between its halves and from within it, on one device and on eight.

Run as a program it takes steps on simulated devices, see `test_devices_do_not_change_the_step`.
"""

import contextlib
import functools
import json
import os
import re
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import sample_graders
from draw_test import data_of
from ml_collections import ConfigDict
from sharding_test import compile_events, on_eight_devices, quick_compiles

from treerl import functions, rewards, step, tree as T
from treerl.config import default
from treerl.errors import UserError
from treerl.experiment import Experiment
from treerl.graders import FAULTS
from treerl.survival import Calibration

pytestmark = pytest.mark.filterwarnings("ignore:grader")
GRADERS = {"exact": 1.0, "sample_graders:lower": 0.5, "sample_graders:length": -0.01}
MESHES = {"split": dict(data=4, fsdp=2), "callback": dict(data=2, fsdp=2, tensor=2)}
STEPS = 3


def tiny(grading="split", graders=GRADERS, mesh=None, text=(), samples_every=1) -> ConfigDict:
    """Sums of one digit read and written as characters, by a model of random weights."""
    config = default()
    config.steps, config.samples_every = STEPS, samples_every
    config.task.update(name="addition", train_size=24, heldout_size=8)
    config.text.update(dict(dict(chat=False, grading=grading, options=ConfigDict(dict(digits=1)), workers=1), **dict(text)))
    config.text.graders = ConfigDict(graders)
    config.model.update(layers=1, width=16, heads=4, kv_heads=2, head_dim=4, hidden=16)
    config.sampler.update(prompts=8, slots=4, prompt_length=16, answer_length=8)
    config.branching.update(tau_abs=0.005, tau_rel=0.9, fill_after=3)  # forks in a random policy
    config.pruning.update(windows=(2, 4), tau_ed=0.6)
    config.learner.bin_tokens = 24
    config.warm_start.steps = 0
    config.evaluation.update(batch=8, samples=3)
    config.mesh.update(mesh or dict(data=1, fsdp=1, tensor=1))
    return config


@contextlib.contextmanager
def momentum():
    """An optimizer whose update is no sign of the gradient, which rounding could turn."""
    with mock.patch.object(functions, "make_optimizer", lambda *_: optax.sgd(0.1, momentum=0.9)):
        yield


def batches(experiment, count=STEPS):
    stream = experiment.stream()
    return [experiment.prompts(*stream.examples(8 * i, 8)) for i in range(count)]


def steps(experiment, compiled=False) -> list[tuple[dict, dict]]:
    """(state, metrics) after each step, on the host."""
    state, found = experiment.init(0), []
    for i, prompts in enumerate(batches(experiment)):
        if compiled and not i:
            experiment.compile_step()
        state, metrics = experiment.train_step(state, prompts, experiment.knobs)
        found.append(jax.device_get((state, metrics)))
    return found


@pytest.fixture(scope="module")
def runs():
    """Where answers are graded -> (experiment, state and metrics after each step)."""
    with quick_compiles(), momentum():
        made = {how: Experiment(tiny(how)) for how in ("split", "callback")}
        return {how: (experiment, steps(experiment, compiled=True)) for how, experiment in made.items()}


# --- the same numbers ----------------------------------------------------------------------------


@pytest.mark.slow
def test_the_steps_are_worth_comparing(runs):
    """Trees fork and are pruned, graders differ, parameters move."""
    found = runs["split"][1]
    for _, metrics in found:
        assert metrics["forks"] > 0 and metrics["grad_norm"] > 0 and metrics["reward"] != 0
        assert np.std(metrics["samples"]["reward"]) > 0 and metrics["reward/sample_graders:lower"] > 0
    assert sum(metrics["pruned"] for _, metrics in found) > 0
    moved = [np.any(a != b) for a, b in zip(*(jax.tree.leaves(found[i][0].params) for i in (0, -1)))]
    assert all(moved)


@pytest.mark.slow
def test_where_answers_are_graded_does_not_change_the_steps(runs):
    """Bit for bit, as states and metrics of both ways can take turns in a run."""
    for one, other in zip(runs["split"][1], runs["callback"][1], strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.slow
def test_a_step_that_was_not_compiled_before_is_the_same(runs):
    with quick_compiles(), momentum():
        found = steps(Experiment(tiny("split")))
    jax.tree.map(np.testing.assert_array_equal, found, runs["split"][1])


@pytest.mark.slow
def test_where_answers_are_graded_does_not_change_scores(runs):
    one, other = (runs[how][0].evaluate(runs[how][0].init(0)) for how in ("split", "callback"))
    names = {"pass@1", "pass@2", "pass@3", "majority@3", "heldout/reward"}
    assert one == other and set(one) == names | {f"heldout/{name}" for name in GRADERS}


@pytest.mark.slow
def test_devices_do_not_change_the_step(runs, tmp_path):
    run = on_eight_devices(__file__, tmp_path)
    assert run.returncode == 0, run.stderr[-4000:]
    wanted = flat(*runs["split"][1][0]), flat(*runs["split"][1][1])
    for how in MESHES:
        for i in range(2):
            found = np.load(tmp_path / f"{how}{i}.npz")
            assert set(found) == set(wanted[i])
            for name, want in wanted[i].items():
                if np.issubdtype(want.dtype, np.integer):
                    np.testing.assert_array_equal(found[name], want, err_msg=f"{how}: {name}")
                else:
                    near = 2e-5 * max(np.abs(want).max(), 0.01)
                    np.testing.assert_allclose(found[name], want, atol=near, rtol=0, err_msg=f"{how}: {name}")


def flat(state, metrics) -> dict[str, np.ndarray]:
    """Parameters, moments and metrics by name; how many bins a shard has is its own."""
    kept = {k: v for k, v in metrics.items() if k not in ("bins", "logp_drift", "logp_drift_max")}
    leaves = jax.tree_util.tree_leaves_with_path((state.params, state.opt_state, kept))
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves}


def main(folder: str):
    assert jax.device_count() == 8
    for how, sizes in MESHES.items():
        with momentum():
            experiment = Experiment(tiny(how, mesh=sizes))
            state = experiment.init(0)
            for i, prompts in enumerate(batches(experiment, 2)):
                state, metrics = experiment.train_step(state, prompts, experiment.knobs)
                np.savez(os.path.join(folder, f"{how}{i}.npz"), **flat(*jax.device_get((state, metrics))))


# --- metrics, samples, faults --------------------------------------------------------------------


@pytest.mark.slow
def test_metrics_name_the_graders(runs):
    for _, metrics in runs["split"][1]:
        parts = {name: metrics[f"reward/{name}"] for name in GRADERS}
        np.testing.assert_allclose(sum(GRADERS[name] * x for name, x in parts.items()), metrics["reward"], rtol=1e-5, atol=1e-6)
        assert {k for k in metrics if k.startswith("graders_")} == {f"graders_{name}" for name in FAULTS[1:]}
        assert not any(metrics[f"graders_{name}"] for name in FAULTS[1:])


@pytest.mark.slow
def test_samples_are_the_first_trees_as_text(runs):
    experiment, found = runs["split"]
    written = experiment.samples(found[0][1]["samples"])
    prompts = batches(experiment, 1)[0]
    sampled = experiment._sample_half(experiment.init(0), prompts, experiment.knobs)
    tokens, length = jax.device_get(rewards.answers(sampled.tree))
    assert len(written) == 2
    for b, line in enumerate(written):
        example = experiment.task.train[int(prompts.data["row"][b])]
        assert line["prompt"] == example["prompt"] + "\n"
        texts = [experiment.task.tokenizer.decode(t[:n]) for t, n in zip(tokens[b], length[b]) if n]
        assert [answer["text"] for answer in line["answers"]] == texts and len(texts) >= 2
        for answer in line["answers"]:
            want = {"exact": 0.0, "sample_graders:lower": sample_graders.lower(answer["text"], {})}
            want["sample_graders:length"] = len(answer["text"])
            assert answer["scores"] == pytest.approx(want)
            assert answer["reward"] == pytest.approx(sum(GRADERS[name] * x for name, x in want.items()))
            assert set(answer) == {"text", "reward", "scores"}


@pytest.mark.slow
def test_a_grader_that_fails_costs_the_answers_that_it_failed_on(runs):
    """Raises, hangs, returns nan, ends its process: such an answer lacks its score, and nothing else does."""
    graders = dict(GRADERS, **{"sample_graders:moody": 2.0})
    experiment = runs["split"][0]
    with quick_compiles(), momentum():
        failing = Experiment(tiny(graders=graders, text=dict(seconds=3.0)))
    prompts, state = batches(experiment, 1)[0], experiment.init(0)
    sampled = experiment._sample_half(state, prompts, experiment.knobs)
    tokens, length = jax.device_get(rewards.answers(sampled.tree))
    fine = experiment.grade(sampled.tree, prompts)
    graded = failing.grade(sampled.tree, prompts)
    np.testing.assert_array_equal(graded.parts[..., :3], fine.parts)
    np.testing.assert_array_equal(graded.key, fine.key)
    codes = {"": 0, "raise": 1, "sleep": 2, "nan": 3, "end": 4}
    for b, i in np.ndindex(*length.shape):
        mood = sample_graders.mood(experiment.task.tokenizer.decode(tokens[b, i, : length[b, i]])) if length[b, i] else ""
        good = bool(length[b, i]) and not mood
        assert (int(graded.fault[b, i]), float(graded.parts[b, i, 3])) == (codes[mood], float(good))
        assert float(graded.reward[b, i]) == pytest.approx(float(fine.reward[b, i]) + 2.0 * good, abs=1e-5)
    counts = {FAULTS[code]: int(np.sum(graded.fault == code)) for code in range(1, 5)}
    assert all(counts.values()) and sum(counts.values()) < np.sum(length > 0) / 2, counts
    _, metrics = failing._learn_half(state, sampled, graded, failing.knobs)
    assert {name: int(metrics[f"graders_{name}"]) for name in counts} == counts
    assert np.isfinite(metrics["loss"]) and not metrics["skipped"]
    lines = failing.samples(metrics["samples"])
    told = {answer["text"]: answer.get("fault") for line in lines for answer in line["answers"]}
    assert told == {text: FAULTS[codes[sample_graders.mood(text)]] or None for text in told} and any(told.values())


@pytest.mark.slow
def test_without_samples_nothing_is_handed_out(runs):
    experiment = runs["split"][0]
    with quick_compiles(), momentum():
        quiet = Experiment(tiny(samples_every=0))
        prompts = batches(experiment, 1)[0]
        state, metrics = quiet.train_step(quiet.init(0), prompts, quiet.knobs)
    assert "samples" in runs["split"][1][0][1] and "samples" not in metrics
    np.testing.assert_allclose(metrics["reward"], runs["split"][1][0][1]["reward"], rtol=1e-6)


def test_samples_of_rewards_that_are_not_finite(runs):
    """Such as of a score near the largest float32, doubled: a line of strict JSON all the same."""
    experiment, found = runs["split"]
    shown = dict(found[0][1]["samples"])
    shown["reward"] = np.full_like(shown["reward"], np.inf)
    shown["parts"] = np.full_like(shown["parts"], np.nan)
    answer = json.loads(json.dumps(experiment.samples(shown), allow_nan=False))[0]["answers"][0]
    assert answer["reward"] is None and answer["scores"] == dict.fromkeys(GRADERS)


# --- votes ---------------------------------------------------------------------------------------


def lines(tokenizer, texts: list[str], rows: int) -> T.Tree:
    """Independent answers as a tree, one a slot."""
    ids = [tokenizer.encode(text) + [tokenizer.eos_id] for text in texts]
    used = np.arange(rows)[:, None] < np.array([len(i) for i in ids])
    token = np.stack([np.pad(i, (0, rows - len(i))) for i in ids], axis=1)
    ends = np.array([[len(i) - 1, k] for k, i in enumerate(ids)])
    return jax.vmap(lambda token: T.from_parents(np.tile(np.arange(len(ids)), (rows, 1)), used, ends, token=token))(token[None])


# --- trees to look at ----------------------------------------------------------------------------


def test_other_numbers_grow_other_trees_and_compile_nothing(runs):
    experiment, _ = runs["split"]
    state, examples = experiment.init(0), [experiment.task.heldout[0]] * 4
    grow = lambda **knobs: experiment.grow(state, examples, step=0, knobs=knobs)
    same = grow()
    with compile_events() as events:
        none, again = grow(tau_abs=2), grow(tau_abs=0.005, tau_ed=0.6)  # an integer is no other type
    assert same.forks.min() > 0 and not none.forks.any() and events == [], events
    jax.tree.map(np.testing.assert_array_equal, again, same)
    with pytest.raises(UserError, match="^knobs has no 'tau'; known are .*tau_abs, "):
        grow(tau=1.0)


def test_a_page_shows_a_tree_and_what_was_read_before_it(runs):
    experiment, _ = runs["split"]
    grown = experiment.grow(experiment.init(0), [experiment.task.heldout[i] for i in (0, 1)], step=0)
    shown = data_of(experiment.tree_page(grown, 1, title="one", columns={"zero": np.zeros(grown.advantage.shape[1:])}))
    assert shown["prompt"] == experiment.read_text(grown, 1) != experiment.read_text(grown, 0)
    assert shown["title"] == "one" and set(shown["columns"]) == {"advantage", "entropy", "probability", "zero"}
    assert sum(end["leaf"] for end in shown["ends"]) == np.sum(grown.tree.leaf[1, :, 0] >= 0)


def test_a_page_says_what_the_numbers_decided_that_a_tree_was_grown_by(runs):
    """By the config's numbers and by others; of tempered probabilities nothing is known."""
    experiment, _ = runs["split"]
    state, examples = experiment.init(0), [experiment.task.heldout[i] for i in range(8)]
    ends, kinds = 0, set()
    for knobs in ({}, dict(tau_abs=0.02, tau_ed=0.8, share=(1.0,)), dict(share=(0.0,)), dict(temperature=0.5)):
        grown = experiment.grow(state, examples, step=0, knobs=knobs, candidates=True)
        for i in range(8):
            shown = data_of(experiment.tree_page(grown, i))
            said = {words for pairs in shown["candidates"].values() for *_, words in pairs if words}
            kinds |= said
            if "temperature" in knobs:
                assert not said
            elif "share" in knobs and not any(knobs["share"]):
                assert said <= {"lines here do not fork"}
            for _, p, _, words in sum(shown["candidates"].values(), []):
                assert p < knobs.get("tau_abs", 0.005) if "tau_abs" in words else True
            pruned = [fate for fate in shown["cells"]["fate"] if fate.startswith("pruned: similar")]
            said = [float(bar) for fate in pruned for bar in re.findall(r"below tau_ed x \d = (.*)", fate)]
            assert set(said) <= {round(n * knobs.get("tau_ed", 0.6), 6) for n in (2, 4)} and len(said) >= len(pruned) / 2
            ends += len(said)
    assert ends > 3 and {"below tau_abs=0.02", "no free slot", "lines here do not fork"} <= kinds


@pytest.mark.slow
def test_a_page_says_how_likely_a_line_was_to_end_right_that_a_review_dropped():
    config = tiny()
    config.pruning.update(rule="balance", detection=2, warmup_steps=0)
    config.branching.rule = "stochastic"
    with quick_compiles():
        experiment = Experiment(config)
        state, examples = experiment.init(0), [experiment.task.heldout[i] for i in range(8)]
        spread = jax.tree.map(lambda x: x + 0.3 * np.random.default_rng(0).normal(size=x.shape), state.quality["params"])
        table = Calibration(right=jnp.arange(128.0), wrong=jnp.arange(128.0)[::-1])
        state = state.replace(quality=dict(state.quality, params=spread, table=table))
        grown = experiment.grow(state, examples, step=0)
        prompts = experiment.prompts(examples, np.arange(8))
        sampled = jax.jit(functools.partial(step.rollout, experiment.fns))(
            state.params, prompts, jax.random.key(0), 0, experiment.knobs, quality=state.quality
        )
    record, said = sampled.seen.record, set()
    for i in range(8):
        cells = data_of(experiment.tree_page(grown, i))["cells"]
        ends = {k: fate for k, fate in zip(cells["column"], cells["fate"]) if fate.startswith("pruned: dropped")}
        gone = np.flatnonzero(record.due[i] & ~record.keep[i])
        assert ends == {k: f"pruned: dropped at detection, chance of a right answer {record.posterior[i, k]:.2f}" for k in gone}
        said |= set(ends.values())
    assert len(said) > 3


@pytest.mark.parametrize("how", ["split", "callback"])
def test_votes_count_what_is_said_not_how(how):
    """Of four ways to say it, three mean the right number; as tokens all differ, and the first is wrong."""
    with quick_compiles():
        config = tiny(how, graders={"number": 1.0}, text=dict(extract="number"))
        config.evaluation.update(examples=1, batch=1, samples=4)
        experiment = Experiment(config)
    answer = int(experiment.task.heldout[0]["answer"])
    tokenizer, valid = experiment.task.tokenizer, np.ones((1, 4), bool)
    for texts, right, elected in (
        ([str(answer + 1), f"it: {answer}", f"{answer}.0", f"{answer}"], 3, 1.0),
        ([f"{answer}", f"= {answer + 1}", f"{answer + 1}", "no"], 1, 0.0),
        ([str(answer), str(answer + 1), "-", "?"], 1, 0.0),  # no number, twice
    ):
        tree = jax.device_put(lines(tokenizer, texts, 8), experiment.trees)
        experiment._evaluate = lambda *_: (tree, dict(valid=jnp.asarray(valid)))
        scores = experiment.evaluate(experiment.init(0))
        assert scores["pass@1"] == right / 4 and scores["majority@4"] == elected, texts


def test_the_named_grader_says_what_is_right_and_all_are_reported():
    """A style that is worth more than the answer makes no wrong answer right."""
    graders = {"number": 0.4, "sample_graders:lower": 1.0}

    def made(right):
        config = tiny(graders=graders, text=dict(extract="number", right=right))
        config.evaluation.update(examples=1, batch=1, samples=3)
        with quick_compiles():
            return Experiment(config)

    experiment, other = made("number"), made("")
    answer = experiment.task.heldout[0]["answer"]
    tree = jax.device_put(lines(experiment.task.tokenizer, [answer, "wrong", f"{answer}.0"], 8), experiment.trees)
    for one, right in ((experiment, 2), (other, 1)):
        one._evaluate = lambda *_: (tree, dict(valid=jnp.ones((1, 3), bool)))
        scores = one.evaluate(one.init(0))
        assert scores["pass@1"] == pytest.approx(right / 3)
        small = sum(sample_graders.lower(x, None) for x in (answer, "wrong", f"{answer}.0")) / 3
        assert scores["heldout/number"] == pytest.approx(2 / 3) and scores["heldout/sample_graders:lower"] == pytest.approx(small)
        assert scores["heldout/reward"] == pytest.approx(0.4 * 2 / 3 + small)
    with pytest.raises(UserError, match="text.right='exact' is none of text.graders; name one of them, or set it to ''."):
        made("exact")


if __name__ == "__main__":
    main(sys.argv[1])
