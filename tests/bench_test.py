import dataclasses
import functools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treerl import sharding, tree as T
from treerl.bench import SHAPED, SHAPES, SUITES, devices, estimators, growth, learner, measure, pruning, sampler, step, synthetic
from treerl.models.presets import PRESETS
from treerl.models.transformer import Model

TINY = dict(PRESETS["tiny"], layers=1, width=16, heads=2, kv_heads=1, head_dim=8, hidden=16)
GROUP = dict(preset="toy", dtype="float32", prompts=2, slots=4, prompt=5, rows=8, repeats=2)
LEARNER = dict(GROUP, shared=0.5, bin_tokens=(16, 32), step_tokens=32, vocab_chunk=16, remat="none")
TOY = {
    "sampler": dict(GROUP, segment=2, lengths=(), windows=(2, 3), detection=4, read_bytes=2**20),
    "learner": LEARNER,
    "step": dict(
        GROUP, segment=2, lengths=(), windows=(2,), bin_tokens=32, bins_per_step=1, vocab_chunk=16, remat="none"
    ),
    "growth": dict(
        preset="toy", dtype="float32", lines=4, prompt=5, slots=(1, 4), rows_then=8, rows=(4, 8), slots_then=4, segment=2,
        repeats=1, read_bytes=2**20,
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


@pytest.mark.slow
def test_two_devices_grow_the_trees_of_one():
    found = {name: row["value"] for name, row in named("meshes").items()}
    assert found["2x1x1.first_step"] == 1 and found["2x1x1.same_steps"] == 2
    assert 0 < found["2x1x1.metrics"] < 1e-3  # rounding shows, and nothing else does


def named(suite):
    return {row["name"]: row for row in run(suite)}


@pytest.mark.slow
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


@pytest.mark.slow
def test_lookahead_is_timed_at_equal_live_slots():
    rows = named("sampler")
    assert rows["stochastic.live_slots"]["value"] == 4
    assert rows["lookahead.live_slots"]["value"] == 4 - 1 / 8  # the first step writes three tokens of four
    assert 0 < rows["stochastic.logp_difference"]["value"] < 1e-5  # nothing is rounded here


@pytest.mark.slow
def test_the_two_losses_and_gradients_of_the_learner_are_the_same():
    rows = named("learner")
    for size in (16, 32):
        assert rows[f"packed_{size}.gradient_difference"]["value"] < 1e-4
    assert rows["shared_prefix"]["value"] >= 0.5
    assert rows["unique_tokens"]["ratio"] < 1


@pytest.mark.slow
def test_random_trees_of_the_estimators_suite_are_trees():
    trees = estimators.random_trees(20, rows=16, slots=8)
    forks = 0
    for i in range(20):
        tree = jax.tree.map(lambda x: x[i], trees)
        tree.end[tuple(tree.leaf[tree.leaf[:, 0] >= 0].T)] = T.FINISHED
        T.check(tree)
        forks += int(np.sum(T.forks(tree)[1]))
    assert forks > 20


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


def test_work_of_a_step_by_hand():
    """Three rows; column 1 is born in row 1 from column 0, and in the second tree ends there; column 2 of the first runs alone."""
    config = measure.model_config("toy")  # one layer, width 16, 2 heads of 8, one of keys, hidden 16, vocabulary 21
    used = np.array([[[1, 0, 1], [1, 1, 1], [1, 1, 1]], [[1, 0, 0], [1, 1, 0], [1, 0, 0]]], bool)
    parent = np.where(used, np.array([[-1, -1, -1], [0, 0, 2], [0, 1, 2]]), -1)
    work = sampler.work_per_step(config, dict(a=np.zeros((5,), np.float32)), Grown(used, parent), prompt=6)
    # the cell in row 0 is read before rows 1 and 2, once for both lines; one in row 1 before row 2; one in row 2 never
    cells = ((2 + 2) + (1 + 1 + 1) + 2 + 1) / 3  # of the second tree's last two, one line stopped and is not read again
    assert work.bytes == pytest.approx(20 + 2 * 1 * 8 * 4 * (2 * 6 + cells))
    products = 16 * (2 + 2) * 8 + 16 * 2 * 8 + 3 * 16 * 16 + 21 * 16
    lines, keys = (8 + 4) / 3, (3 * 6 + 5 * 7 + 4 * 8) / 3
    assert work.flops == pytest.approx(2 * products * lines + 4 * 2 * 8 * keys)
    untied = dict(embedding=np.zeros((2,), np.float32), b=np.zeros((3,), np.float32))
    alone = sampler.work_per_step(dataclasses.replace(config, tied=False), untied, Grown(used, parent), prompt=6)
    assert work.bytes - alone.bytes == 8  # the table is looked into, not read


class Grown:
    def __init__(self, used, parent):
        self.used, self.parent = used, parent


def test_all_lines_of_whole_trees_read_what_is_above_their_heads():
    used = np.ones((2, 3, 4), bool)
    parent = np.where(np.arange(3)[:, None] > 0, np.arange(4), -1) * np.ones((2, 1, 1), int)
    work = sampler.work_per_step(measure.model_config("toy"), {}, Grown(used, parent), prompt=6)
    assert work.bytes == 2 * 1 * 8 * 4 * (2 * 6 + (0 + 8 + 16) / 3)


def test_the_limit_is_the_larger_of_two():
    work = sampler.Work(bytes=60.0, flops=100.0)
    assert work.limit(10.0, 50.0) == (6.0, "bytes") and work.limit(60.0, 50.0) == (2.0, "arithmetic")


@pytest.mark.parametrize("preset", ["toy", *sorted({shape["preset"] for shape in SHAPES.values()})])
def test_parameters_of_products_are_those_of_the_model(preset):
    """All but norms, biases and, where the output has a table of its own, the embedding."""
    config = measure.model_config(preset, lora_rank=3)
    model = Model(config)
    adapters, rest = model.split(model.shapes())
    sizes = {jax.tree_util.keystr(path): x.size for path, x in jax.tree_util.tree_leaves_with_path(rest)}
    products = sum(n for name, n in sizes.items() if not any(word in name for word in ("norm", "bias", "'embedding'")))
    products += sizes["['embedding']"] if config.tied else 0
    assert measure.product_parameters(config) == products
    assert measure.adapter_parameters(config) == sum(x.size for x in jax.tree.leaves(adapters))
    assert measure.learning_flops(config, 10) == 10 * (4 * products + 6 * measure.adapter_parameters(config))
    assert measure.learning_flops(dataclasses.replace(config, lora_rank=0), 10) == 60 * products


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_fit_together(name):
    found = {suite.__name__.rpartition(".")[2]: suite.defaults(name) for suite in (sampler, learner, step)}
    assert set(found) == set(SHAPED)
    for suite, sizes in found.items():
        assert sizes.items() >= dict(SHAPES[name], shape=name, dtype="bfloat16").items(), suite
        assert set(sizes) - {"shape", "lora_rank", "param_dtype"} == set(TOY[suite])
    grow, learn, whole = found["sampler"], found["learner"], found["step"]
    assert max(grow["windows"]) <= grow["rows"] and grow["detection"] % grow["segment"] == 0 == grow["rows"] % grow["segment"]
    width = learn["prompt"] + learn["rows"]
    assert all(width <= size <= learn["step_tokens"] and size % 64 == 0 for size in learn["bin_tokens"])
    assert width <= whole["bin_tokens"] and whole["bin_tokens"] % 64 == 0
    parameters = measure.product_parameters(measure.model_config(learn["preset"]))
    assert 16 * parameters < 60e9 or learn["lora_rank"] == whole["lora_rank"] > 0  # float32: weights, gradient, two moments


@pytest.mark.slow
def test_pruned_samples_drop_half_of_their_lines_at_the_detection():
    rows = named("sampler")
    assert rows["pruned.live_slots"]["value"] == (4 * 4 + 2 * 4) / 8
    assert rows["pruned.limit"]["value"] < rows["stochastic.limit"]["value"]


@pytest.mark.parametrize("rule, iterations, pruned", [("stochastic", 7, 0), ("stochastic", 8, 1), ("pruned", 8, 0)])
def test_a_rule_that_did_something_else_raises(rule, iterations, pruned):
    class Stats:
        pass

    stats = Stats()
    stats.iterations, stats.pruned = np.array([iterations] * 2), np.array([pruned] * 2)
    with pytest.raises(ValueError, match=f"sampler suite: {rule} took"):
        sampler.check_ran(rule, stats, TOY["sampler"])


@pytest.mark.slow
def test_adapters_are_trained_at_fewer_operations():
    sizes = dict(TOY["learner"], bin_tokens=(32,), lora_rank=2, param_dtype="float32")
    rows = {row["name"]: row["value"] for row in learner.rows(**sizes)}
    config = measure.model_config("toy", lora_rank=2)
    flops = rows["unique_tokens"] * (4 * measure.product_parameters(config) + 6 * measure.adapter_parameters(config))
    assert rows["packed_32.utilisation"] * rows["packed_32"] * rows["matrix_peak"] * 1e12 == pytest.approx(flops)
    assert rows["packed_32.gradient_difference"] < 1e-4


@pytest.mark.slow
def test_the_halves_of_a_step_make_the_step():
    """Sampling and learner as they are timed alone, one after the other, update the state as the whole step does."""
    config, mesh = step.make_config(TOY["step"]), sharding.make_mesh()
    config.optimizer.update(learning_rate=0.01, warmup_steps=0)
    built = step.build(config, TINY["vocab"], mesh)
    sampling, credit, learn = step.make_halves(built, mesh)
    state, prompts, knobs = built.arguments()
    tree = sampling(state, prompts, knobs)
    _, cells, denominator, tokens = credit(state, tree, prompts, knobs)
    assert tokens == jnp.sum(jax.vmap(T.token_count)(tree)[0]) + prompts.token.size
    mine, _ = learn(state, tree, prompts, cells, denominator, knobs)
    whole, _ = built.step(*built.arguments())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), mine.params, whole.params)
    start = built.arguments()[0].params
    assert any(np.abs(a - b).max() > 5e-3 for a, b in zip(jax.tree.leaves(mine.params), jax.tree.leaves(start)))


@pytest.mark.slow
def test_sampling_and_learner_of_a_step_are_added():
    rows = named("step")
    assert rows["sampling_and_learner"]["versus"] == "step"
    both = sum(rows[name]["value"] for name in ("sampling", "learner"))
    assert rows["sampling_and_learner"]["value"] == pytest.approx(both)  # of two turns the median is the mean


@pytest.mark.slow
def test_growth_is_drawn(tmp_path):
    rows = named("growth")
    assert rows["slots_4.step"]["value"] == rows["rows_8.step"]["value"]  # the same trees, measured once
    assert rows["rows_4.limit"]["value"] < rows["rows_8.limit"]["value"]
    growth.draw(tmp_path / "growth.svg", run("growth"))
    text = (tmp_path / "growth.svg").read_text()
    assert text.startswith("<?xml") and all(word in text for word in ("slots of a tree, K", "rows, S", "limit"))


def test_turns_run_backwards_every_second_time():
    order = []
    programs = {name: lambda name=name: order.append(name) or jnp.zeros(()) for name in "abc"}
    times = measure.alternate(programs, repeats=2, warmup=1)
    assert "".join(order) == "abccbaabc"
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
    assert (
        result.stderr.strip()
        == "--suite=nothing is unknown; the suites are sampler, learner, step, growth, estimators, pruning, devices, scaling, checkpoint, meshes, environments."
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags, sentence",
    [
        (("sampler", "A,E"), "--shape=E is unknown; the shapes are A, B, C, D."),
        (("growth", "A"), "--suite=growth has no shapes; leave out --shape, or choose one of sampler, learner, step."),
    ],
)
def test_a_wrong_shape_is_one_sentence(flags, sentence):
    result = launch("bench", f"--suite={flags[0]}", f"--shape={flags[1]}")
    assert (result.returncode, result.stdout, result.stderr.strip()) == (1, "", sentence)


def test_evaluating_no_run_is_one_sentence(tmp_path):
    result = launch("evaluate", f"--workdir={tmp_path}")
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.strip() == (f"workdir={tmp_path} has no config.json; give the workdir of a run made by launch.train.")


@pytest.mark.slow
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
