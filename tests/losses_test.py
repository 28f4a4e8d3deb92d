"""Objectives: by hand, and packed trees against every rollout as a row of its own."""

import functools

import jax
import jax.numpy as jnp
import learner_test as base
import numpy as np
import optax
import oracles
import pytest
from learner_test import MODEL, ROWS, SLOTS, TREES, WIDTH, assert_close, fns, params  # noqa: F401 (fixtures)

from treerl import learner, losses, packing, rewards, step, tree as T
from treerl.advantages import compose, dr_grpo
from treerl.optimizer import scale_by_ess

KNOBS = dict(temperature=jnp.float32(1), clip_low=0.2, clip_high=0.28, dual_clip=jnp.inf, importance_cap=jnp.float32(0.9), kl=0.5)


def row_loss(params, data, *, objective, aggregation, forced, importance, kl=None, reference=None, dual=np.inf):
    """What the docstrings say, spelled out for rows: one number."""
    tokens, old, behavior, is_forced, real, length, credit, left_out = data
    logp = base.row_logps(params, tokens, length)
    old, behavior, is_forced, real = (x[:, 1:] for x in (old, behavior, is_forced > 0, real > 0))
    counted = real & ~is_forced if forced == "mask" else real
    n = jnp.sum(counted, 1)
    a = credit[:, None]
    low, high, cap = KNOBS["clip_low"], KNOBS["clip_high"], KNOBS["importance_cap"]
    w = jnp.exp(old - behavior)
    drawn = dict(none=1.0, truncate=jnp.minimum(w, cap), mask=jnp.where(w <= cap, w, 0))[importance]
    w = jnp.where(is_forced, jnp.minimum(w, cap) if forced == "importance" else 1.0, drawn)
    ratio = jnp.exp(logp - old)
    if objective == "ppo":
        gain = jnp.minimum(ratio * a, jnp.clip(ratio, 1 - low, 1 + high) * a)
        gain = jnp.where(a < 0, jnp.maximum(gain, dual * a), gain)
    elif objective == "cispo":
        gain = jax.lax.stop_gradient(jnp.clip(ratio, 1 - low, 1 + high)) * a * logp
    else:
        s = jnp.exp(jnp.sum(jnp.where(real, logp - old, 0), 1) / jnp.sum(real, 1))[:, None]
        gain = jnp.minimum(s * a, jnp.clip(s, 1 - low, 1 + high) * a)
    token = -jnp.where(counted, w * gain, 0)
    if kl is not None:
        before = base.row_logps(reference, tokens, length)
        token = token + KNOBS["kl"] * jnp.where(counted, kl(logp, before), 0)
    use = (n > 0) & ~left_out
    token = token * ~left_out[:, None]
    if aggregation == "token":
        return jnp.sum(token) / jnp.sum(n * ~left_out)
    if aggregation == "sequence":
        return jnp.sum(jnp.sum(token, 1) / jnp.maximum(n, 1)) / jnp.sum(use)
    return jnp.sum(token) / (jnp.sum(use) * ROWS)


def packed(params, tree, prompts, credit, leaf_weight, f, reference=None, knobs=KNOBS):
    """The same through weigh, pack and the step's microbatches."""

    @jax.jit
    def run(params, tree, credit, leaf_weight):
        cells, denominators = jax.vmap(lambda *one: step.weigh(f, *one, knobs))(tree, credit, leaf_weight)
        logp = None if reference is None else learner.cell_logps(f, reference, tree, prompts, jnp.float32(1))
        bins = learner.pack(f, tree, prompts, cells, jnp.ones(TREES, bool), logp)
        grads, (loss, _, _) = learner.gradient(f, learner.policy_objective(f, knobs), params, bins, jnp.sum(denominators))
        return loss, grads

    return run(params, tree, credit, leaf_weight)


def chosen(objective, **fields):
    """The step's functions with an objective; bins hold one path or several."""
    bounds = ("clip_low", "clip_high") + (("dual_clip",) if objective == "ppo" else ())
    make = lambda knobs: functools.partial(losses.OBJECTIVES[objective], **{k: knobs[k] for k in bounds})
    return fns(bin_tokens=fields.pop("bin_tokens", ROWS + WIDTH))._replace(objective=make, **fields)


def data_of(tree, prompts, credit, leaf_weight):
    tokens, old, behavior, forced, real, length, which, leaf = base.rollout_rows(tree, prompts)
    return tokens, old, behavior, forced, real, length, credit[which, leaf], leaf_weight[which, leaf] == 0


CASES = [
    ("ppo", "token", "policy", "none"), ("ppo", "sequence", "mask", "none"), ("ppo", "constant", "importance", "truncate"),
    ("ppo", "token", "mask", "mask"), ("ppo", "sequence", "importance", "none"), ("cispo", "constant", "policy", "truncate"),
    ("cispo", "token", "importance", "mask"), ("gspo", "token", "policy", "none"), ("gspo", "sequence", "policy", "none"),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("objective, aggregation, forced, importance", CASES)
def test_packed_objective_equals_flattened_rollouts(params, objective, aggregation, forced, importance):
    """Loss and gradient, with ratios far from 1, forced tokens, log-probs of a truncated sampler and a leaf left out."""
    tree, prompts, credit, _ = base.batch(3, fork=0.6)
    drift = jax.random.uniform(jax.random.key(1), tree.token.shape, minval=-0.4, maxval=0.4)
    tree = tree.replace(logp_behavior=jnp.where(tree.source == T.FORCED, 0, tree.logp_policy + drift))
    leaf_weight = jnp.ones((TREES, SLOTS)).at[:, 1].set(0) * jax.vmap(T.leaf_valid)(tree)
    how = dict(objective=objective, aggregation=aggregation, forced=forced, importance=importance)
    data = data_of(tree, prompts, credit, leaf_weight)
    want = jax.value_and_grad(lambda p: row_loss(p, data, **how))(params)
    sizes = (ROWS + WIDTH, 64) if objective == "gspo" else (ROWS + WIDTH,)  # trees split over bins, and whole ones
    for size in sizes:
        assert_close(packed(params, tree, prompts, credit, leaf_weight, chosen(**how, bin_tokens=size)), want)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(losses.KL))
def test_packed_kl_equals_flattened_rollouts(params, name):
    tree, prompts, credit, _ = base.batch(4)
    reference = jax.tree.map(lambda p: p + 0.1, params)
    weight = jax.vmap(T.leaf_valid)(tree).astype(jnp.float32)
    how = dict(objective="ppo", aggregation="sequence", forced="policy", importance="none", kl=losses.KL[name])
    want = jax.value_and_grad(lambda p: row_loss(p, data_of(tree, prompts, credit, weight), **how, reference=reference))(params)
    assert_close(packed(params, tree, prompts, credit, weight, chosen(**how), reference), want)


@pytest.mark.slow
def test_packed_dual_clip_equals_flattened_rollouts(params):
    tree, prompts, credit, _ = base.batch(5)
    tree = tree.replace(logp_policy=tree.logp_policy - 2)  # ratios far above 1
    weight = jax.vmap(T.leaf_valid)(tree).astype(jnp.float32)
    how = dict(objective="ppo", aggregation="token", forced="policy", importance="none")
    data, knobs = data_of(tree, prompts, credit, weight), dict(KNOBS, dual_clip=3.0)
    want = jax.value_and_grad(lambda p: row_loss(p, data, **how, dual=3.0))(params)
    assert_close(packed(params, tree, prompts, credit, weight, chosen(**how), knobs=knobs), want)
    free = packed(params, tree, prompts, credit, weight, chosen(**how))
    assert abs(float(free[0] - want[0])) > 1e-2


@pytest.mark.slow
def test_at_ratio_one_all_objectives_have_the_gradient_of_the_log_likelihood(params):
    """REINFORCE's, for GSPO with the weights of sequences."""
    tree, prompts, credit, _ = base.batch(6)
    f = chosen("ppo")
    logp = jax.jit(lambda p: learner.cell_logps(f, p, tree, prompts, jnp.float32(1)))(params)
    tree, weight = tree.replace(logp_policy=logp), jax.vmap(T.leaf_valid)(tree).astype(jnp.float32)
    for aggregation in ("token", "sequence"):
        found = {
            name: packed(params, tree, prompts, credit, weight, chosen(name, aggregation=aggregation))[1]
            for name in (losses.OBJECTIVES if aggregation == "sequence" else ("ppo", "cispo"))
        }
        for name in found:
            assert_close(found[name], found["ppo"], rtol=1e-4)
        assert max(float(jnp.max(jnp.abs(g))) for g in jax.tree.leaves(found["ppo"])) > 1e-3


@pytest.mark.slow
def test_log_probs_come_back_to_their_cells(params):
    tree, prompts, _, _ = base.batch(7, fork=0.8)
    for size in (ROWS + WIDTH, 64):
        f = fns(bin_tokens=size)
        got = jax.jit(lambda t: learner.cell_logps(f, params, t, prompts, jnp.float32(1)))(tree)
        tokens, _, _, _, real, length, which, leaf = base.rollout_rows(tree, prompts)
        logp = base.row_logps(params, tokens, length)
        for row in range(tokens.shape[0]):
            b = int(which[row])
            cells = oracles.leaf_cells(jax.tree.map(lambda x: np.asarray(x[b]), tree))[int(leaf[row])]
            want = np.asarray(logp[row])[np.asarray(real[row, 1:]) > 0]
            np.testing.assert_allclose([got[b][c] for c in cells], want, atol=1e-5)
        assert not np.any(np.asarray(got)[~np.asarray(jax.vmap(T.kept)(tree))])


@pytest.mark.slow
def test_what_else_could_have_been_drawn(params):
    """Of every kept cell, likeliest first; the drawn token's probability is that of its log-prob, siblings had the same choice."""
    tree, prompts, _, _ = base.batch(7, fork=0.8)
    f, one = fns(bin_tokens=64), jnp.float32(1.3)
    run = jax.jit(lambda t: (learner.cell_candidates(f, params, t, prompts, one, count=7), learner.cell_logps(f, params, t, prompts, one)))
    (token, chance), logp = jax.tree.map(np.asarray, run(tree))
    kept, parent, drawn = (np.asarray(x) for x in (jax.vmap(T.kept)(tree), tree.parent, tree.token))
    assert not chance[~kept].any() and (np.diff(chance[kept]) <= 0).all() and (chance[kept].sum(-1) <= 1 + 1e-5).all()
    among = (token == drawn[..., None]) & kept[..., None]
    assert 0 < among.any(-1).sum() < kept.sum()  # some drew what was unlikely
    np.testing.assert_allclose(chance[among], np.exp(logp)[among.any(-1)], rtol=1e-4)
    assert (np.exp(logp)[kept & ~among.any(-1)] <= chance[..., -1][kept & ~among.any(-1)] + 1e-6).all()
    for b, s, k in zip(*np.nonzero(kept)):
        twin = int(np.nonzero(kept[b, s] & (parent[b, s] == parent[b, s, k]))[0][0])
        np.testing.assert_allclose(chance[b, s, k], chance[b, s, twin], rtol=1e-4)


def test_repeated_context_writes_no_cell(params):
    tree, prompts, _, _ = base.batch(7, fork=0.8)
    ones = jax.vmap(T.kept)(tree).astype(jnp.float32)
    bins = jax.tree.map(lambda x: x[0], base.lay_out(tree, prompts, (ones, ones, ones)))
    repeated = (bins.cell >= 0) & (bins.weight == 0)
    assert int(jnp.sum(repeated)) > 5
    np.testing.assert_array_equal(packing.unpack(jnp.where(repeated, 99.0, 1.0), bins, ones), ones)


def test_gradient_norms_are_those_of_each_rollout(params):
    tree, prompts, _, _ = base.batch(8)
    got = jax.jit(lambda t: learner.gradient_norms(fns(), params, t, prompts, jnp.float32(1)))(tree)
    tokens, _, _, _, real, length, which, leaf = base.rollout_rows(tree, prompts)
    score = lambda p, token, n, real: jnp.sum(jnp.where(real[1:] > 0, base.row_logps(p, token[None], n[None])[0], 0))
    grads = jax.jit(jax.grad(score))
    for i in range(0, tokens.shape[0], 3):
        want = optax.tree.norm(grads(params, tokens[i], length[i], real[i])) ** 2
        np.testing.assert_allclose(got[which[i], leaf[i]], want, rtol=1e-4)
    assert not np.any(np.asarray(got)[~np.asarray(jax.vmap(T.leaf_valid)(tree))])


# --- by hand --------------------------------------------------------------------------------------


def test_clipped_objective_by_hand_and_its_zero_gradients():
    logp, old = jnp.log(jnp.array([1.5, 1.5, 0.5, 0.5, 1.0])), jnp.zeros(5)
    positive, negative = jnp.array([1.0, 0, 1, 0, 2]), jnp.array([0.0, -1, 0, -1, -3])
    loss, is_clipped = losses.clipped(logp, old, positive, negative, clip_low=0.2, clip_high=0.2)
    np.testing.assert_allclose(loss, [-1.2, 1.5, -0.5, 0.8, 1.0], rtol=1e-6)
    np.testing.assert_array_equal(is_clipped, [True, False, False, True, False])
    total = lambda x: jnp.sum(losses.clipped(x, old, positive, negative, clip_low=0.2, clip_high=0.2)[0])
    np.testing.assert_allclose(jax.grad(total)(logp), [0, 1.5, -0.5, 0, 1.0], rtol=1e-6)


def test_dual_clip_acts_on_negative_credit_and_large_ratios_alone():
    logp = jnp.log(jnp.array([5.0, 5.0, 2.0, 0.5]))
    positive, negative = jnp.array([1.0, 0, 0, 0]), jnp.array([0.0, -1, -1, -1])
    total = lambda x: jnp.sum(losses.clipped(x, 0.0, positive, negative, clip_low=0.2, clip_high=0.2, dual_clip=3.0)[0])
    np.testing.assert_allclose(total(logp), -1.2 + 3 + 2 + 0.8, rtol=1e-6)
    np.testing.assert_allclose(jax.grad(total)(logp), [0, 0, 2, 0], rtol=1e-6)


def test_log_ratios_out_of_range_stay_finite():
    big = jnp.array([1000.0, -1000.0, 100.0])
    loss, _ = losses.clipped(big, 0.0, jnp.zeros(3), jnp.zeros(3), clip_low=0.2, clip_high=0.2)
    np.testing.assert_array_equal(loss, 0)


def test_values_and_gradients_of_the_kl_estimates():
    """k1 and k3 are unbiased, k2's gradient is the KL's, all vanish for equal policies."""
    p, q = jax.nn.log_softmax(jnp.array([0.3, -1.0, 0.5])), jax.nn.log_softmax(jnp.array([-0.2, 0.1, 0.4]))
    kl = lambda p: jnp.sum(jnp.exp(p) * (p - q))
    for name in ("k1", "k3"):
        np.testing.assert_allclose(jnp.sum(jnp.exp(p) * losses.KL[name](p, q)), kl(p), rtol=1e-5)
    assert np.all(losses.kl_k3(p, q) >= 0)
    logits = jnp.array([0.3, -1.0, 0.5])
    on_policy = lambda x: jnp.sum(jnp.exp(p) * losses.kl_k2(jax.nn.log_softmax(x), q))  # samples are data
    np.testing.assert_allclose(jax.grad(on_policy)(logits), jax.grad(lambda x: kl(jax.nn.log_softmax(x)))(logits), rtol=1e-5)
    for estimate in losses.KL.values():
        np.testing.assert_array_equal(estimate(p, p), 0)


def test_a_bound_of_zero_keeps_the_gradient_at_ratio_one():
    for credit in (1.0, -1.0):
        parts = jnp.maximum(credit, 0), jnp.minimum(credit, 0)
        slope = jax.grad(lambda x: losses.clipped(x, 0.0, *parts, clip_low=0.0, clip_high=0.0)[0])(0.0)
        assert slope == -credit


def test_k3_of_a_far_reference_stays_finite():
    for logp in (-100.0, 0.0):
        value, slope = jax.value_and_grad(losses.kl_k3)(logp, -100.0 - logp)
        assert np.isfinite(value) and np.isfinite(slope) and value >= 19


def test_overlong_answers_are_punished_softly():
    """A longest answer of 100 and a buffer of 20: 90 tokens cost a half."""
    parent = np.where(np.arange(100)[:, None] > 0, np.arange(4), -1)
    lengths = np.array([80, 90, 100])
    used = np.arange(100)[:, None] < np.append(lengths, 0)
    tree = T.from_parents(parent, used, [*[[n - 1, k] for k, n in enumerate(lengths)], [-1, -1]])
    np.testing.assert_allclose(rewards.overlong(tree, 20), [0, -0.5, -1, 0])


def test_effective_share_of_rollouts():
    valid = jnp.array([True] * 4 + [False])
    assert step.effective_share(jnp.array([2.0, 2, 2, 2, 99]), valid) == 1
    assert step.effective_share(jnp.array([1e6, 1, 1, 1, 1]), valid) == pytest.approx(0.25, rel=1e-4)
    assert step.effective_share(jnp.zeros(5), valid) == 1
    a = jnp.array([0.3, 1.1, 2.0, 0.7, 0])
    assert step.effective_share(a, valid) == pytest.approx(float(step.effective_share(5 * a, valid)))


def test_updates_shrink_with_the_effective_sample_size():
    updates = {"a": jnp.array([1.0, -2.0])}
    for rule, ess, base_, factor in (
        ("sqrt", 0.25, 1.0, 0.5),
        ("linear", 0.25, 1.0, 0.25),
        ("sqrt", 0.5, 0.25, 1.0),
        ("sqrt", 0.125, 0.5, 0.5),
    ):
        transform = scale_by_ess(base_, rule=rule)
        got, _ = transform.update(updates, transform.init(updates), ess=jnp.float32(ess))
        np.testing.assert_allclose(got["a"], factor * updates["a"], rtol=1e-6)
    chain = optax.chain(optax.scale(1.0), scale_by_ess())
    assert chain.update(updates, chain.init(updates))[0]["a"][0] == 1  # no ess given, as in the warm start


@pytest.mark.slow
def test_credit_carries_no_gradient(params):
    """Multipliers read log-probs that a gradient could flow through; none does."""
    tree, _, _, _ = base.batch(9)
    reward = jax.random.uniform(jax.random.key(0), (TREES, SLOTS))
    from treerl import advantages as A

    made = compose(dr_grpo, None, dict(ace=A.ace, ear=A.ear, novelty=A.novelty))

    def total(logp, entropy, reference):
        changed = tree.replace(logp_policy=logp, entropy=entropy)
        return jnp.sum(jnp.square(made.credit(changed, reward, dict(reference_logp=reference), {})[0]))

    grads = jax.grad(total, argnums=(0, 1, 2))(tree.logp_policy, tree.entropy, tree.logp_policy - 1)
    assert total(tree.logp_policy, tree.entropy, tree.logp_policy - 1) > 0.1
    assert all(not np.any(g) for g in grads)
