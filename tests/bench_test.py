import functools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treerl import tree as T
from treerl.bench import SUITES, devices, estimators, learner, measure, pruning, sampler, synthetic
from treerl.models.presets import PRESETS

TINY = dict(PRESETS["tiny"], layers=1, width=16, heads=2, kv_heads=1, head_dim=8, hidden=16)
GROUP = dict(preset="toy", dtype="float32", prompts=2, slots=4, prompt=5, rows=8, repeats=2)
LEARNER = dict(GROUP, shared=0.5, bin_tokens=(16, 32), step_tokens=32, vocab_chunk=16, remat="none")
TOY = {
    "sampler": dict(GROUP, segment=2, lengths=(), windows=(2, 3), read_bytes=2**20),
    "learner": LEARNER,
    "step": dict(
        GROUP, segment=2, lengths=(), windows=(2,), bin_tokens=32, bins_per_step=1, vocab_chunk=16, remat="none"
    ),
    "estimators": dict(
        trees=8, slots=8, rows=16, part=2, chunk=4, groups=2, trajectories=4, steps=6, states=3, repeats=1
    ),
    "pruning": dict(
        GROUP, groups=2000, slots=16, kappa=0.5, rho=0.5, concentration=6.0, seed=0, repeats=1, detection=3, segment=2,
        bin_tokens=32, bins_per_step=1, vocab_chunk=16, remat="none", turns=1,
    ),
    "devices": dict(steps=1, prompts=4, slots=4),
    "environments": dict(
        batch=8, prompts=2, slots=2, rows=32, horizon=3, repeats=1,
        model=dict(layers=1, width=16, heads=2, kv_heads=1, head_dim=8, hidden=16),
    ),
    "scaling": dict(
        GROUP, segment=2, lengths=(), windows=(2,), bin_tokens=32, bins_per_step=1, vocab_chunk=16, remat="none",
        axes=("data",),
    ),
    "checkpoint": dict(preset="toy", layers=1, repeats=1),
    "meshes": dict(
        steps=2, warm_start=10, shapes=((2, 1, 1),), shapes_heads8=(), two_processes=(),
        changes=(
            "task.train_size=32", "task.heldout_size=8", "model.layers=1", "model.width=16", "model.hidden=16", "sampler.prompts=4",
            "sampler.slots=4", "warm_start.batch=8", "evaluation.batch=8", "evaluation.samples=2",
        ),
    ),
}  # fmt: skip
FIELDS = {"suite", "name", "value", "unit", "shapes", "device"}


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setitem(PRESETS, "toy", TINY)


@functools.cache
def run(suite):
    one = dict(devices=jax.devices()[:1] * 2) if suite == "devices" else {}
    return list(SUITES[suite](**one, **TOY[suite]))


def test_two_devices_grow_the_trees_of_one():
    found = {name: row["value"] for name, row in named("meshes").items()}
    assert found["2x1x1.first_step"] == 1 and found["2x1x1.same_steps"] == 2
    assert 0 < found["2x1x1.metrics"] < 1e-3  # rounding shows, and nothing else does


def named(suite):
    return {row["name"]: row for row in run(suite)}


@pytest.mark.parametrize("suite", SUITES)
def test_rows_are_well_formed(suite):
    rows = run(suite)
    assert len({row["name"] for row in rows}) == len(rows)
    for row in rows:
        assert FIELDS <= set(row) and set(row) - FIELDS in (set(), {"versus", "ratio"})
        assert row["suite"] == suite and row["shapes"] == TOY[suite]
        assert np.isfinite(row["value"])
        assert "versus" not in row or row["versus"] in {n for other in rows for n in (other["name"], other["name"].split(".")[0])}
        json.dumps(row)


def test_lookahead_is_timed_at_equal_live_slots():
    rows = named("sampler")
    assert rows["stochastic.live_slots"]["value"] == 4
    assert rows["lookahead.live_slots"]["value"] == 4 - 1 / 8  # the first step writes three tokens of four


def test_the_two_losses_and_gradients_of_the_learner_are_the_same():
    rows = named("learner")
    for size in (16, 32):
        assert rows[f"packed_{size}.gradient_difference"]["value"] < 1e-4
    assert rows["shared_prefix"]["value"] >= 0.5
    assert rows["unique_tokens"]["ratio"] < 1


def test_random_trees_of_the_estimators_suite_are_trees():
    trees = estimators.random_trees(20, rows=16, slots=8)
    forks = 0
    for i in range(20):
        tree = jax.tree.map(lambda x: x[i], trees)
        tree.end[tuple(tree.leaf[tree.leaf[:, 0] >= 0].T)] = T.FINISHED
        T.check(tree)
        forks += int(np.sum(T.forks(tree)[1]))
    assert forks > 20


def test_rules_that_follow_the_group_leave_more_contrast_than_chance_on_every_mix():
    """And the paper's formula as transcribed does not: it stops the right answers of hard prompts."""
    rows = named("pruning")
    of = lambda mix, rule, what="": rows[f"{mix}_{rule}{what}"]["value"]
    for mix in pruning.MIXES:
        for rule in ("arrol_group", "balance"):
            assert of(mix, rule) > of(mix, "random") + 0.005  # four standard errors of a mean of 2,000
            assert of(mix, rule, ".dead") < of(mix, "random", ".dead") - 0.01
        assert of(mix, "all", ".kept") == 1 and of(mix, "random", ".kept") == of(mix, "balance", ".kept") == 0.5
        assert all(abs(of(mix, rule, ".kept") - 0.5) < 0.02 for rule in pruning.RULES)
    assert of("hard", "arrol_lam_2") < of("hard", "arrol") < of("hard", "random") - 0.005
    assert of("balanced", "all") == pytest.approx(15 / 96, abs=0.006)  # 15 / 16 of E[x (1 - x)], x uniform


def test_dropped_lines_are_neither_sampled_further_nor_packed():
    """Two trees of 16 lines of 8 tokens; half of each is dropped after 4, the segment's end."""
    rows = named("pruning")
    sampled, bins = ({kind: rows[f"{kind}.{what}"]["value"] for kind in pruning.PRUNING} for what in ("sampled_tokens", "bins"))
    assert sampled == dict(none=256, keep_1=256, keep_half=2 * (16 * 4 + 8 * 4))
    assert bins["none"] == bins["keep_1"] > 1.5 * bins["keep_half"]


def test_contrast_counts_groups_of_one_kind():
    right = np.array([[1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1], [1, 1, 1, 1]], bool)
    keep = np.array([[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0]], bool)
    assert pruning.contrast(right, keep) == dict(variance=(1 / 4 + 3 / 16) / 4, dead=1 / 2, kept=10 / 16)


def test_an_estimator_unlike_its_plain_implementation_raises(monkeypatch):
    monkeypatch.setitem(estimators.PLAIN, "branch_depthwise", lambda tree, reward: 1 + estimators.plain_spo(tree, reward))
    with pytest.raises(ValueError, match="estimators suite: branch_depthwise is .* away from its plain implementation, above 0.001"):
        list(SUITES["estimators"](**TOY["estimators"]))


def test_a_perturbed_objective_raises(monkeypatch):
    right = learner.flat_objective

    def wrong(fns):
        def objective(params, rows):
            loss, aux = right(fns)(params, rows)
            return 1.01 * loss, aux

        return objective

    monkeypatch.setattr(learner, "flat_objective", wrong)
    with pytest.raises(ValueError, match="packed_16 has loss .* must be the same objective"):
        list(learner.rows(**dict(TOY["learner"], bin_tokens=(16,))))


def test_agreement_tells_nan_and_small_differences():
    assert learner.check_agreement("packed", 1.0, 1.0005, 0.5, 2e-3) == pytest.approx(1e-3, rel=1e-2)
    with pytest.raises(ValueError):
        learner.check_agreement("packed", float("nan"), 1.0, 1.0, 1e-3)


@pytest.mark.parametrize("slots", [1, 3, 8])
@pytest.mark.parametrize("last_fork", [0, 2, 9])
def test_forked_trees_are_trees(slots, last_fork):
    tree = synthetic.trees(11, 1, slots, 12, last_fork)
    one = jax.tree.map(lambda x: x[0], tree)
    T.check(one)
    assert int(jnp.sum(T.leaf_valid(one))) == slots
    unique = (T.leaf_count(one) == 1).sum(axis=1)
    assert np.all(np.asarray(unique[last_fork:]) == slots)
    if slots > 1:
        assert np.all(np.asarray(T.leaf_count(one))[:last_fork].max(axis=1) >= 2)


def test_bytes_of_a_step_count_what_is_above_the_head():
    config = measure.model_config("toy")
    used = np.ones((2, 3, 4), bool)
    token = 2 * 1 * 1 * 8 * 4  # keys and values, layers, heads, size, bytes
    cells = (0 + 8 + 16) / 3  # before the first, the second and the third token
    params = dict(a=np.zeros((5,), np.float32))
    assert sampler.bytes_per_step(config, params, used, prompt=6) == 20 + token * (2 * 6 + cells)


def test_turns_run_backwards_every_second_time():
    order = []
    programs = {name: lambda name=name: order.append(name) or jnp.zeros(()) for name in "abc"}
    times = measure.alternate(programs, repeats=2, warmup=1)
    assert "".join(order) == "abc" "cba" "abc"
    assert all(len(t.seconds) == 2 for t in times.values())


def test_ratio_is_taken_within_a_turn():
    slow, fast = measure.Times([2.0, 40.0, 6.0]), measure.Times([1.0, 20.0, 3.0])
    assert slow.over(fast) == 2.0 and slow.median == 6.0
    assert measure.Times([5.0]).over(measure.Times([3.0]), less=1.0) == 2.0


def test_unknown_preset():
    with pytest.raises(ValueError, match="'huge' is unknown; known are tiny, smollm2-135m"):
        measure.model_config("huge")


def launch(module, *flags):
    return subprocess.run([sys.executable, "-m", f"launch.{module}", *flags], capture_output=True, text=True)


def test_unknown_suite_is_one_sentence():
    result = launch("bench", "--suite=nothing")
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.strip() == "--suite=nothing is unknown; the suites are sampler, learner, step, estimators, pruning, devices, scaling, checkpoint, meshes, environments."


def test_evaluating_no_run_is_one_sentence(tmp_path):
    result = launch("evaluate", f"--workdir={tmp_path}")
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.strip() == (
        f"workdir={tmp_path} has no config.json; give the workdir of a run made by launch.train."
    )


def test_a_device_grows_the_trees_of_itself():
    rows = named("devices")
    assert rows["same_trees"]["value"] == 1 and rows["logp_difference"]["value"] == 0
    assert rows["same_tokens"]["value"] > 0 and "first_logit_gap" not in rows


def test_trees_are_compared_up_to_their_first_difference():
    parent, used = [[-1, -1], [0, 0], [0, 1], [0, 1]], np.ones((4, 2), bool)
    used[0, 1] = False
    one = T.from_parents(parent, used, [[3, 0], [3, 1]], token=jnp.arange(8).reshape(4, 2), logp_policy=-jnp.ones((4, 2)))
    a = jax.tree.map(lambda x: np.stack([x] * 3), one)
    other = a.replace(token=a.token.copy(), logp_policy=a.logp_policy.copy())
    other.token[1, 2, 1] = 9  # the second tree draws another token in row 2
    other.logp_policy[1, 2, 1] = -1.25
    other.logp_policy[1, 3, 0] = -5  # what follows is another tree
    other.logp_policy[2, 1, 0] = -1.5  # the third has the same tokens
    got = devices.compare(a, other)
    assert got["same"].tolist() == [True, False, True]
    assert got["cells"] == 7 + 3 + 7 and got["drift"] == 0.5 and got["gap"] == [0.25]


def test_without_an_accelerator_there_is_nothing_to_compare_with():
    with pytest.raises(ValueError) as error:
        list(SUITES["devices"]())
    want = "devices suite: compares an accelerator with the CPU and finds none; run it where one is."
    assert str(error.value) == want
