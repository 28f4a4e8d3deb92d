"""The quality head, and what pruning by its scores does to the training step."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sharding_test import CHANGES, Tiny, compile_events, numbers, one_device, quick_compiles, with_trees

from treerl import pruning, step as S, survival, tree as T
from treerl.experiment import credit as credit_of_cells, grow
from treerl.models.policy import packed_hidden
from treerl.models.quality import QualityHead
from treerl.sampler import Seen

STOCHASTIC = dict(rule="stochastic")
BALANCE = dict(rule="balance", detection=4, warmup_steps=0)


def tiny(**pruning):
    return Tiny(one_device(), pruning=dict(BALANCE, **pruning), branching=STOCHASTIC)


@pytest.fixture(scope="module")
def pruned():
    """(the tiny step with the rule, its state after a step, metrics with trees)."""
    with quick_compiles(), with_trees():
        t = tiny()
        state, metrics = t.step(t.state(), t.prompts(), t.knobs)
        yield t, state, metrics


# --- the head -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_loss_of_the_head_has_no_gradient_for_the_policy():
    """Exactly zero, through the policy's own forward pass; the head's own gradient is not."""
    t = tiny()
    head, state = t.fns.quality.head, t.state()
    params = jax.tree.map(lambda x: x + 0.1, state.quality["params"])  # its last layer starts at zero
    bins = jnp.ones((2, 12), jnp.int32)

    def loss(policy, params):
        position = jnp.broadcast_to(jnp.arange(12), bins.shape)
        _, hidden = packed_hidden(t.fns.model, policy, bins, position, jnp.full(bins.shape, 12))
        return head.loss(params, hidden, jnp.arange(24).reshape(bins.shape) % 3 == 0, bins > 0)

    policy_grads, head_grads = jax.grad(loss, (0, 1))(state.params, params)
    assert all(np.all(np.asarray(x) == 0) for x in jax.tree.leaves(policy_grads))
    assert optax.tree.norm(head_grads) > 0.01


@pytest.mark.slow
def test_the_head_learns_and_reads_only_what_counts():
    head, rng = QualityHead(6, 8), np.random.default_rng(0)
    hidden, counts = rng.normal(size=(200, 6)).astype(np.float32), rng.random(200) < 0.7
    right = hidden[:, 0] - hidden[:, 3] > 0
    hidden[~counts] = np.nan
    params, optimizer = head.init(jax.random.key(0)), optax.adam(0.02)
    assert np.all(head.score(params, jnp.ones((3, 6))) == 0)
    np.testing.assert_allclose(head.loss(params, hidden, right, counts), np.log(2), rtol=1e-6)
    state = optimizer.init(params)
    for _ in range(150):
        updates, state = optimizer.update(jax.grad(head.loss)(params, hidden, right, counts), state)
        params = optax.apply_updates(params, updates)
    score = np.asarray(head.score(params, hidden[counts]))
    assert np.mean((score > 0) == right[counts]) > 0.95
    want = np.mean(np.logaddexp(0, np.where(right[counts], -score, score)))
    np.testing.assert_allclose(head.loss(params, hidden, right, counts), want, rtol=1e-5)
    assert head.loss(params, hidden, right, np.zeros(200, bool)) == 0


@pytest.mark.slow
def test_labels_and_counts_are_those_of_survivors(pruned):
    """Hidden states of dropped and unfinished lines may be anything; the table counts the scores that decided."""
    t, state, _ = pruned
    rng, shape = np.random.default_rng(1), (8, 4)
    due, keep, ended = (rng.random(shape) < share for share in (0.8, 0.6, 0.8))
    leaf = np.where(ended[..., None], np.stack([np.full(shape, 5), np.broadcast_to(np.arange(4), shape)], -1), -1)
    tree = T.Tree(**{f: jnp.zeros(shape) for f in T.Tree.__dataclass_fields__}).replace(leaf=jnp.asarray(leaf))
    told, reward = due & keep & ended, np.float32(rng.random(shape) < 0.4)
    score = np.where(told, rng.normal(size=shape), np.nan).astype(np.float32)
    hidden, last = (np.where(mask[..., None], rng.normal(size=(*shape, 16)), np.nan) for mask in (told, ended))
    record = pruning.Detected(*map(jnp.asarray, (np.float32(hidden), score, score * 0 + 0.7, due, due & keep, np.ones(shape))))
    learn = jax.jit(functools.partial(S.learn_quality, t.fns))
    quality, metrics = learn(state.quality, Seen(jnp.float32(last), record), tree, reward, t.knobs)
    chex.assert_tree_all_finite(quality["params"])
    assert np.any(quality["params"]["inner"]["kernel"] != state.quality["params"]["inner"]["kernel"])
    want = survival.observe(state.quality["table"], score, reward > 0.5, told, decay=0.95)
    chex.assert_trees_all_close(quality["table"], want, rtol=1e-6)
    assert float(want.right.sum()) == pytest.approx(0.95 * float(state.quality["table"].right.sum()) + (reward[told] > 0).sum())
    assert float(metrics["quality_accuracy"]) == pytest.approx(np.mean(reward[told] > 0.5))
    assert float(metrics["survivors"]) == pytest.approx((due & keep).sum() / due.sum())


# --- the step -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_step_prunes_and_trains_on_survivors(pruned):
    t, state, metrics = pruned
    tree = metrics["tree"]
    leaves = np.sum(np.asarray(tree.leaf[..., 0]) >= 0, axis=1)
    assert metrics["pruned"] > 0.5 and np.any(np.asarray(tree.end) == T.DROPPED)
    assert leaves.min() >= 2 and metrics["survivors"] < 0.7 and metrics["quality_loss"] > 0
    assert float(state.quality["table"].right.sum() + state.quality["table"].wrong.sum()) > 8


@pytest.mark.slow
def test_tokens_of_dropped_lines_have_no_gradient(pruned):
    """Other tokens and log-probs in dropped cells change no number of the update."""
    t, _, metrics = pruned
    tree, reward = metrics["tree"], metrics["graded"]
    kept = jax.vmap(T.kept)(tree)

    @jax.jit
    def learn(state, tree):
        credit, weight, *_ = S.estimate(t.fns, state, tree, t.prompts(), reward, t.knobs)
        cells, denominators = jax.vmap(lambda *one: S.weigh(t.fns, *one, t.knobs))(tree, credit, weight)
        return S.learn(t.fns, state, tree, t.prompts(), cells, jnp.sum(denominators), t.knobs)

    assert np.any(np.asarray(tree.used & ~kept))
    other = tree.replace(token=jnp.where(kept, tree.token, 5), logp_policy=jnp.where(kept, tree.logp_policy, -9.0))
    chex.assert_trees_all_equal(learn(t.state(), tree), learn(t.state(), other))


@pytest.mark.slow
def test_keeping_all_is_bit_identical_to_no_pruning():
    """Trees, gradient, parameters and metrics of the whole step, of a real model; only the head is more."""
    with quick_compiles(), with_trees():
        results = []
        for changes in (dict(rule="none"), dict(BALANCE, kappa=1.0), dict(BALANCE, warmup_steps=1, columns=4)):
            t = Tiny(one_device(), pruning=changes, branching=STOCHASTIC)
            state, metrics = t.step(t.state(), t.prompts(), t.knobs)
            results.append((numbers(state, metrics), {k: v for k, v in metrics.items() if k not in ("tree", "graded")}))
    for found, metrics in results[1:]:
        chex.assert_trees_all_equal(found, results[0][0])
        chex.assert_trees_all_equal({k: metrics[k] for k in results[0][1]}, results[0][1])


@pytest.mark.slow
def test_pruning_begins_after_the_warm_up(pruned):
    t, _, _ = pruned
    knobs = dict(t.knobs, pruning_from=jnp.int32(1))
    state, metrics = t.step(t.state(), t.prompts(), knobs)
    assert metrics["pruned"] == 0 and metrics["survivors"] == 1
    _, metrics = t.step(state, t.prompts(), knobs)
    assert metrics["pruned"] > 0.5


def test_changing_a_number_of_the_rule_or_the_head_compiles_nothing(pruned):
    t, state, _ = pruned
    changes = {k: CHANGES[k] for k in ("detection", "kappa", "rho", "pruning_from", "smoothing", "decay")}
    with compile_events() as events:
        _, metrics = t.step(t.state(), t.prompts(), jax.device_put(dict(t.knobs, **changes), t.whole))
    assert events == [] and metrics["survivors"] == 1  # not before step 7


@pytest.mark.slow
@pytest.mark.parametrize("refork", [False, True])
def test_log_probs_after_compaction_are_those_of_a_full_forward_pass(refork):
    """The learner's forward pass over the packed tree against what the sampler's smaller pool gave."""
    with quick_compiles():
        t = tiny(kappa=0.5 - 0.25 * refork, columns=2 + refork, refork=refork, options={"least": 1})
        compared = forks = 0
        for seed in range(2):
            state = t.state(seed)
            tree, stats, *_ = jax.jit(functools.partial(S.rollout, t.fns))(
                state.params, t.prompts(), jax.random.key(seed), 0, t.knobs, quality=state.quality
            )
            logp = S.cell_logps(t.fns, state.params, tree, t.prompts(), jnp.float32(1))
            kept = np.asarray(jax.vmap(T.kept)(tree))
            np.testing.assert_allclose(np.asarray(logp)[kept], np.asarray(tree.logp_policy)[kept], atol=2e-5)
            compared, forks = compared + kept[:, 4:].sum(), forks + stats.forks.sum()
        assert compared > 60 and (forks > 5) == refork


@pytest.mark.slow
@pytest.mark.parametrize("survivors", [0, 1])
def test_groups_with_none_or_one_survivor_have_zero_credit_and_no_nan(survivors):
    with quick_compiles(), with_trees():
        t = tiny(kappa=0.1, options={"least": survivors})
        state, metrics = t.step(t.state(), t.prompts(), t.knobs)
    leaves = np.sum(np.asarray(metrics["tree"].leaf[..., 0]) >= 0, axis=1)
    assert np.any(leaves == survivors)  # others ended before the detection
    found = numbers(state, metrics)
    assert all(np.all(np.isfinite(x)) for x in [*found.values(), metrics["loss"], metrics["quality_loss"]])
    credit, weight, *_ = S.estimate(t.fns, t.state(), metrics["tree"], t.prompts(), metrics["graded"], t.knobs)
    assert np.all(np.asarray(credit)[leaves <= 1] == 0)


@pytest.mark.slow
def test_inverse_weights_enter_means_and_token_weights():
    """grpo, dr_grpo and rloo on survivors of unequal chances, against numpy."""
    chance = jnp.array([[0.5, 0.25, 1.0, 0.5]])
    tree = T.from_parents(np.zeros((3, 4), int) + np.arange(4), np.ones((3, 4)), [[2, 0], [2, 1], [1, 2], [-1, -1]])
    tree = jax.tree.map(lambda x: x[None], tree)
    reward, valid = np.array([[1.0, 0.0, 1.0, 0.0]], np.float32), np.array([1, 1, 1, 0], bool)
    weight = np.where(valid, 1 / np.asarray(chance[0]), 0)
    weight *= 3 / weight.sum()
    mean = (weight * reward[0]).sum() / 3
    std = np.sqrt((weight * (reward[0] - mean) ** 2).sum() / 2)
    rest = [(weight * reward[0]).sum() - w * r for w, r in zip(weight, reward[0])] / np.where(valid, 3 - weight, 1)
    want = dict(grpo=(reward[0] - mean) / (std + 1e-6), dr_grpo=reward[0] - mean, rloo=reward[0] - rest)
    for name, credit in want.items():
        t = Tiny(one_device(), pruning=dict(BALANCE, rule="random", weights="inverse"), branching=STOCHASTIC, advantage=name)
        found, leaf_weight, *_ = S.estimate(t.fns, t.state(), tree, None, reward, t.knobs, chance=chance)
        np.testing.assert_allclose(found[0], np.where(valid, credit, 0), rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(leaf_weight[0], weight, rtol=1e-6)
        plain, ones, *_ = S.estimate(t.fns, t.state(), tree, None, reward, t.knobs)
        np.testing.assert_array_equal(ones[0], valid)
        assert np.abs(plain - found).max() > 0.05


@pytest.mark.slow
def test_the_step_weighs_survivors_by_their_chance():
    with quick_compiles(), with_trees():
        t = Tiny(
            one_device(), pruning=dict(BALANCE, rule="arrol", weights="inverse", columns=4), branching=STOCHASTIC,
            advantage="grpo",
        )  # fmt: skip
        plain = t.fns._replace(quality=t.fns.quality._replace(inverse=False))
        state = t.state()
        table = survival.Calibration(right=jnp.arange(128.0), wrong=jnp.arange(128.0)[::-1])
        state = state.replace(quality=dict(state.quality, table=table))
        grown = jax.tree.map(lambda x: x + 0.3, state.quality["params"])
        state = state.replace(quality=dict(state.quality, params=grown))
        found = [numbers(*jax.jit(functools.partial(S.train_step, f))(state, t.prompts(), t.knobs)) for f in (t.fns, plain)]
    np.testing.assert_array_equal(found[0]["tree.token"], found[1]["tree.token"])
    for name in [name for name in found[0] if name.startswith("grad[")]:
        one, other = found[0][name], found[1][name]
        assert np.all(np.isfinite(one)) and np.abs(one - other).max() > 1e-2 * np.abs(other).max()


@pytest.mark.slow
def test_answers_that_end_before_the_review_are_untested_and_weigh_alike():
    """The review never happens: no division by a chance of 0, and nothing counts as dropped."""
    with quick_compiles(), with_trees():
        t = Tiny(one_device(), pruning=dict(BALANCE, rule="random", weights="inverse"), branching=STOCHASTIC, advantage="grpo")
        knobs = dict(t.knobs, eos=jax.device_put(np.arange(12, dtype=np.int32), t.whole))  # the first token ends
        state, metrics = jax.jit(functools.partial(S.train_step, t.fns))(t.state(), t.prompts(), knobs)
    assert np.all(np.asarray(metrics["tree"].leaf[..., 0]) == 0)
    found = numbers(state, metrics)
    assert all(np.all(np.isfinite(x)) for x in found.values()) and np.isfinite(metrics["loss"])
    assert metrics["skipped"] == 0 and metrics["survivors"] == 1 and metrics["pruned"] == 0
    assert any(np.any(x != 0) for name, x in found.items() if name.startswith("grad["))


@pytest.mark.slow
def test_grown_trees_show_the_advantages_that_are_trained_on():
    with quick_compiles():
        t = Tiny(
            one_device(), pruning=dict(BALANCE, rule="arrol", weights="inverse", columns=4), branching=STOCHASTIC,
            advantage="dr_grpo",
        )  # fmt: skip
        state, key = t.state(), jax.random.key(0)
        table = survival.Calibration(right=jnp.arange(128.0), wrong=jnp.arange(128.0)[::-1])
        head = jax.tree.map(lambda x: x + 0.3, state.quality["params"])
        state = state.replace(quality=dict(state.quality, table=table, params=head))
        sampled = jax.jit(functools.partial(grow, t.fns))(state, t.prompts(), key, 0, t.knobs)
        graded = S.grade(t.fns, sampled.tree, t.prompts())
        tree, _, seen, *_ = S.rollout(t.fns, state.params, t.prompts(), key, 0, t.knobs, quality=state.quality)
        chance = jnp.where(seen.record.due, seen.record.chance, 1.0)
        assert float(chance.min()) < 0.6 < float(chance.max())
        credit, *_ = S.estimate(t.fns, state, tree, t.prompts(), graded.reward, t.knobs, chance=chance)
        plain, *_ = S.estimate(t.fns, state, tree, t.prompts(), graded.reward, t.knobs)
    shown = np.asarray(credit_of_cells(t.fns, state, sampled, graded, t.knobs))
    want, other = (np.asarray(jax.vmap(lambda t, c: T.up(t, c) / jnp.maximum(T.leaf_count(t), 1))(tree, c)) for c in (credit, plain))
    np.testing.assert_allclose(shown, want, atol=1e-5)
    assert np.abs(shown - other).max() > 1e-3


# --- votes ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_samples_vote_by_their_answer_and_by_the_score_of_their_end(pruned):
    t, state, _ = pruned
    params = jax.tree.map(lambda x: x + 0.1, state.quality["params"])
    quality = dict(state.quality, params=params)
    run = jax.jit(functools.partial(S.evaluate_sample, t.fns, samples=4))
    drawn, found = jax.device_get(run(state.params, quality, t.prompts(), jax.random.key(3), t.knobs))
    answer = np.asarray(S.grade(t.fns, drawn, t.prompts()).key)
    tree, _, seen, *_ = jax.jit(functools.partial(S.rollout, t.fns, slots=4))(state.params, t.prompts(), jax.random.key(3), 0, t.knobs)
    assert not np.any(np.asarray(tree.end) == T.DROPPED) and found["valid"].all()
    np.testing.assert_allclose(found["score"], t.fns.quality.head.score(params, seen.hidden), rtol=1e-5)
    assert found["score"].std() > 0
    for b in range(8):
        tokens = np.asarray(T.along(jax.tree.map(lambda x: x[b], tree), tree.token[b]))
        text = [tuple(tokens[k, : tree.leaf[b, k, 0] + 1]) for k in range(4)]
        assert answer[b].tolist() == [text.index(x) for x in text]
