"""Estimators against slow recursions, golden values and reductions."""

import functools
import inspect
import pathlib

import advantages_oracle as slow
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from treerl import advantages as A, tree as T
from treerl.advantages import branch_depthwise, gdro, grpo

GRPO, DEPTHWISE = jax.jit(grpo), jax.jit(branch_depthwise)
COUNT = 1000


@pytest.fixture(scope="module")
def forest():
    """(trees, the same stacked, rewards [COUNT, L]): binary, real and constant rewards, one-leaf and empty trees."""
    rng = np.random.default_rng(0)
    trees = [oracles.random_tree(rng) for _ in range(COUNT - 2)]
    trees += [oracles.random_tree(rng, roots=1, fork=0.0, prune=0.0), oracles.random_tree(rng, roots=1, fork=0.0, prune=1.0)]
    reward = rng.integers(0, 2, (COUNT, 5)).astype(np.float32)
    reward[::3] = np.round(8 * rng.normal(size=reward[::3].shape)) / 8  # nearly equal rewards would only test rounding
    reward[::10] = reward[::10, :1]
    trees = [jax.tree.map(np.asarray, tree) for tree in trees]
    counts = [int((tree.leaf[:, 0] >= 0).sum()) for tree in trees]
    assert counts.count(0) >= 1 and counts.count(1) >= 5 and counts.count(5) >= 50
    return trees, jax.tree.map(lambda *x: jnp.stack(x), *trees), reward


def compare(forest, name, options, extras=()):
    """The compiled estimator of all trees at once against the recursion; returns what was compared."""
    trees, stacked, reward = forest
    fast = jax.jit(jax.vmap(functools.partial(getattr(A, name), **options)))(stacked, reward, *extras)
    want = [getattr(slow, name)(t, r, *(x[i] for x in extras), **options) for i, (t, r) in enumerate(zip(trees, reward))]
    for got, expected in zip(*((fast, zip(*want)) if isinstance(fast, tuple) else ([fast], [want]))):
        expected = np.stack(expected)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
        assert np.any(expected != 0, axis=tuple(range(1, expected.ndim))).mean() > 0.25
    return fast


CASES = [
    ("grpo", {}), ("grpo", dict(std=False)), ("dr_grpo", {}), ("rloo", {}), ("opo", {}),
    ("mc_grpo", {}), ("mc_grpo", dict(floor=0.0)), ("mc_grpo", dict(rescale=True)),
    ("reinforce_pp", {}), ("reinforce_pp", dict(baseline=True)),
    ("branch_depthwise", {}), ("branch_depthwise", dict(std=False)), ("branch_depthwise", dict(virtual=False)),
    ("branch_depthwise", dict(clip=0.5)), ("branch_depthwise", dict(beta=1.0)),
    ("branch_depthwise", dict(beta=1.0, per_token=True)), ("branch_depthwise", dict(fusion="child")),
    ("branch_depthwise", dict(fusion="child", beta=1.0)),
    ("branch_depthwise", dict(fusion="child", beta=1.0, per_token=True, segment=2)),
    ("branch_depthwise", dict(segment=1)), ("branch_depthwise", dict(segment=3)),
    ("branch_depthwise", dict(segment=2, beta=0.5, virtual=False)), ("branch_depthwise", dict(pool="depth")),
    ("branch_depthwise", dict(pool="sibling")), ("branch_depthwise", dict(pool="sibling", segment=2)),
    ("branch_depthwise", dict(pool="depth", segment=2, ddof=0)),
    ("eptree", {}), ("eptree", dict(scale="code")), ("eptree", dict(scale="none", segment=2)),
    ("spo_tree", {}), ("spo_tree", dict(std=True)), ("spo_tree", dict(segment=3)),
    ("treepo", {}), ("treepo", dict(weight="size")), ("treepo", dict(skip_equal=True)), ("treepo", dict(segment=2)),
    ("tree_grpo", {}), ("tree_grpo", dict(inter=False)), ("tree_grpo", dict(intra=False, std=False)),
]  # fmt: skip


@pytest.mark.parametrize("name, options", CASES, ids=lambda x: x if isinstance(x, str) else "-".join(f"{k}={v}" for k, v in x.items()))
def test_estimator_equals_recursion_on_random_trees(forest, name, options):
    compare(forest, name, options)


def test_minimum_variance_equals_its_formula(forest):
    rng = np.random.default_rng(1)
    norm, importance = rng.random((2, COUNT, 5)).astype(np.float32)
    norm[::7] = 0
    compare(forest, "minimum_variance", {}, (norm, importance))


def has_own_test(name):
    return pathlib.Path(__file__).with_name(f"{name}_test.py").exists()


def test_every_estimator_is_compared_with_a_recursion():
    """Here, or in a file of its own."""
    here = {name for name, _ in CASES} | {"minimum_variance", "gigpo"}  # gigpo with hgpo
    assert {name for name in A.ESTIMATORS if not has_own_test(name)} == here


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(A.WHITENED))
def test_whitening_equals_every_token_spelled_out(forest, name):
    trees, stacked, reward = forest
    for start in range(0, 60, 12):
        part = jax.tree.map(lambda x: x[start : start + 12], stacked)
        credit = jax.vmap(A.ESTIMATORS[name])(part, jnp.asarray(reward[start : start + 12]))
        got = A.WHITENED[name](part, credit)
        np.testing.assert_allclose(got, slow.whiten(trees[start : start + 12], np.asarray(credit)), atol=2e-5)
        length = np.asarray(jax.vmap(T.leaf_length)(part)) * np.asarray(jax.vmap(T.leaf_valid)(part))
        assert abs(np.sum(got * length)) / length.sum() < 1e-5
        assert np.sum(np.square(got) * length) / (length.sum() - 1) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("name, options", [
    ("ear", {}), ("ear", dict(floor=0.8)), ("novelty", {}), ("novelty", dict(strength=1.0, cap=5.0)), ("ace", {}),
    ("ace", dict(alpha=0.5, per_token=True)), ("ace", dict(limit=0.3)),
])  # fmt: skip
def test_multiplier_equals_its_formula(forest, name, options):
    trees, stacked, reward = forest
    rng = np.random.default_rng(2)
    credit = rng.normal(size=reward.shape).astype(np.float32)
    extras = [-rng.random((COUNT, 7, 5)).astype(np.float32)] if name == "ace" else []
    fast = jax.jit(jax.vmap(functools.partial(A.MULTIPLIERS[name], **options)))(stacked, reward, credit, *extras)
    for i, tree in enumerate(trees):
        want = getattr(slow, name)(tree, reward[i], credit[i], *(x[i] for x in extras), **options)
        np.testing.assert_allclose(fast[i], want, rtol=2e-5, atol=1e-5)
    assert np.mean(np.asarray(fast) != 1) > 0.05


# --- invariants of multipliers --------------------------------------------------------------------


def test_ear_is_one_on_average_at_most_two_and_identity_for_equal_entropies(forest):
    _, stacked, reward = forest
    factor = np.asarray(jax.vmap(functools.partial(A.ear, floor=-9.0))(stacked, reward, reward))
    valid = np.asarray(jax.vmap(T.leaf_valid)(stacked))
    some = valid.any(1)
    np.testing.assert_allclose(np.sum(factor * valid, 1)[some] / valid.sum(1)[some], 1, atol=1e-5)
    assert factor.max() <= 2
    for constant in (0.0, 0.7):
        flat = stacked.replace(entropy=jnp.full_like(stacked.entropy, constant))
        np.testing.assert_allclose(jax.vmap(A.ear)(flat, reward, reward), 1, atol=1e-6)
    steep = star(3).replace(entropy=jnp.array([[0.1, 0.1, 9.0]] * 2))
    assert A.ear(steep, jnp.ones(3), jnp.ones(3))[2] == 0  # the paper's would be negative


def test_novelty_leaves_what_is_wrong_or_likely_and_never_passes_its_cap():
    tree = star(4).replace(logp_policy=jnp.array([[-0.1, -3.0, -3.0, -0.1]] * 2))
    reward, credit = jnp.array([1.0, 1, 0, 0]), jnp.array([0.5, 0.5, -0.5, -0.5])
    np.testing.assert_allclose(A.novelty(tree, reward, credit), [1, 1.5, 1, 1])
    assert A.novelty(tree, reward, credit, strength=0.1, cap=9.0)[1] < 1.25


def test_ace_at_its_limits():
    tree, reward, credit = star(2), jnp.array([1.0, 0]), jnp.array([1.0, -1])
    at = lambda c, **options: A.ace(tree, reward, credit, tree.logp_policy - c / 2, **options)  # two tokens
    np.testing.assert_allclose(at(5.0, alpha=0.0), 1)
    np.testing.assert_allclose(at(0.0)[1], 1 + np.log(2), rtol=1e-6)
    np.testing.assert_allclose(at(-30.0, limit=40.0)[1], 1, atol=1e-6)
    np.testing.assert_allclose(at(30.0, alpha=0.5, limit=40.0)[1], 16, rtol=1e-5)
    assert at(1.0)[0] == 1 and at(1.0)[1] < at(2.0)[1]


def test_gdro_scores_bins_and_weighs_hard_prompts_more():
    trees = jax.tree.map(lambda *x: jnp.stack(x), *[star(4)] * 3)
    reward = jnp.array([[1.0, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0]])
    weight, memory = gdro(trees, reward, A._gdro.start())
    np.testing.assert_allclose(memory["score"], [1, 0.5, 0])
    np.testing.assert_allclose(weight, np.exp(0.65 * np.array([0, 0.5, 1])), rtol=1e-6)
    _, moved = gdro(trees, reward.at[1, 0].set(0.5), memory, correct=0.4)  # the middle bin's loss is now 0.625
    np.testing.assert_allclose(moved["score"], [1, 0.88 * 0.5 + 0.12 * 0.625, 0], rtol=1e-6)
    for _ in range(60):  # a fixed point of the moving average; a bin that is not seen stays
        weight, memory = gdro(trees.replace(leaf=trees.leaf.at[2].set(-1)), reward[:, ::-1] * 0.5, memory, correct=0.4)
    np.testing.assert_allclose(memory["score"], [1, 0.75, 0.5], atol=1e-3)
    share, _ = gdro(trees, reward, A._gdro.start(), mixture=True, mix=1.0)
    np.testing.assert_allclose(share, 1 / 3, rtol=1e-6)
    share, _ = gdro(trees, reward, A._gdro.start(), mixture=True, mix=0.3)
    assert share.sum() == pytest.approx(1) and share.min() >= 0.1
    weight, _ = gdro(trees, reward, A._gdro.start(), limit=1.2)
    assert weight.max() == pytest.approx(1.2)


# --- golden values and reductions -----------------------------------------------------------------


def star(count):
    """A tree that never forks below the prompt: `count` independent samples of two tokens."""
    parent = np.stack([np.full(count, -1), np.arange(count)])
    return T.from_parents(parent, np.ones((2, count), bool), [[1, k] for k in range(count)])


def binary(deep):
    """A full binary tree whose line k forks from line k - 2^j; leaves in slot order of forks."""
    slots = 2**deep
    parent, used = np.full((deep, slots), -1), np.zeros((deep, slots), bool)
    for row in range(deep):
        width = slots >> (row + 1)  # leaves below a node of this row
        for k in range(0, slots, width):
            used[row, k] = True
            parent[row, k] = (k // (2 * width)) * (2 * width) if row else -1
    return T.from_parents(parent, used, [[deep - 1, k] for k in range(slots)])


@pytest.mark.slow
def test_a_tree_that_never_forks_is_grpo():
    rng = np.random.default_rng(2)
    for count in (2, 3, 8):
        tree, reward = star(count), jnp.asarray(rng.normal(size=count), jnp.float32)
        leaf = GRPO(tree, reward)
        for options in ({}, dict(fusion="child"), dict(beta=1.0), dict(segment=1), dict(segment=2), dict(pool="sibling")):
            cell = branch_depthwise(tree, reward, **options)
            np.testing.assert_allclose(cell, jnp.broadcast_to(leaf, cell.shape), rtol=1e-5)
        for got, want in zip(T.spread(tree, cell_credit=cell), T.spread(tree, leaf_credit=leaf)):
            np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.slow
def test_star_reductions_of_the_others():
    reward = jnp.array([1.0, 0.0, 0.0, 1.0])
    mean = reward - 0.5
    np.testing.assert_allclose(A.rloo(star(4), reward), 4 / 3 * A.dr_grpo(star(4), reward), rtol=1e-6)
    np.testing.assert_allclose(A.opo(star(4), reward), mean, rtol=1e-6)  # equal lengths
    np.testing.assert_allclose(A.treepo(star(4), reward), mean, rtol=1e-6)  # one level: the prompt's
    np.testing.assert_allclose(A.tree_grpo(star(4), reward), A.grpo(star(4), reward), rtol=1e-6)  # trees of one leaf
    np.testing.assert_allclose(A.spo_tree(star(4), reward)[0], mean, rtol=1e-6)
    np.testing.assert_allclose(A.eptree(star(4), reward)[0], 2 * A.rloo(star(4), reward), rtol=1e-6)
    one, norm = jnp.ones(4), jnp.full(4, 3.0)
    np.testing.assert_allclose(A.minimum_variance(star(4), reward, norm, one), mean, rtol=1e-6)


def test_a_prompt_with_one_tree_gets_grpo_twice():
    tree, reward = T.from_parents([[-1, -1, -1], [0, 0, 0]], [[1, 0, 0], [1, 1, 1]], [[1, 0], [1, 1], [1, 2]]), jnp.array([1.0, 0, 0])
    np.testing.assert_allclose(A.tree_grpo(tree, reward), 2 * A.grpo(tree, reward), rtol=1e-5)


@pytest.mark.slow
def test_spo_telescopes_and_eptree_sums_to_zero(forest):
    trees, stacked, reward = forest
    spo = jax.jit(jax.vmap(A.spo_tree))(stacked, reward)
    heads = jax.vmap(T.node_heads)(stacked)
    along = np.asarray(jax.vmap(T.down)(stacked, jnp.where(heads, spo, 0)))
    for i, tree in enumerate(trees[:200]):
        root = slow.grow(tree)
        if root.leaves:
            value = slow.values(tree, root, reward[i], "child")[id(root)]
            np.testing.assert_allclose(along[i][root.leaves], reward[i][root.leaves] - value, atol=1e-5)
    valid = np.asarray(jax.vmap(T.leaf_valid)(stacked))
    np.testing.assert_allclose(np.sum(np.asarray(jax.vmap(A.rloo)(stacked, reward)) * valid, 1), 0, atol=1e-5)


def test_minimum_variance_is_the_minimum():
    rng = np.random.default_rng(5)
    norm, weight, reward = rng.random(4) + 0.1, rng.random(4) + 0.5, rng.normal(size=4)
    credit = np.asarray(A.minimum_variance(star(4), *(jnp.asarray(x, jnp.float32) for x in (reward, norm, weight))))
    b = (reward - credit).mean()
    variance = lambda b: np.sum(weight**2 * norm * (reward - b) ** 2)
    assert variance(b) < min(variance(b - 0.01), variance(b + 0.01)) and reward.min() <= b <= reward.max()


def test_median_of_binary_rewards_has_no_deviation():
    reward = jnp.array([1.0, 0, 0])
    credit, weight = A.mc_grpo(star(3), reward, floor=0.0)
    np.testing.assert_allclose(credit, [1000, 0, 0], rtol=1e-5)
    np.testing.assert_array_equal(weight, [1, 0, 1])
    scaled, _ = A.mc_grpo(star(3), reward, floor=0.0, rescale=True)
    np.testing.assert_allclose(scaled, [3000, 0, 0], rtol=1e-5)
    credit, _ = A.mc_grpo(star(3), reward)
    assert credit[0] == pytest.approx(4, rel=1e-2)  # the floor keeps it in bounds
    shifted, _ = A.mc_grpo(star(5), jnp.array([0.0, 1, 2, 3, 100]) + 7)
    np.testing.assert_allclose(shifted, np.array([-2, -1, 0, 1, 98]) / 1.001, rtol=1e-5)


@pytest.mark.slow
def test_fusions_agree_where_they_must():
    reward = jnp.array([1.0, 0.0, 0.5, 0.2])
    deep, flat = binary(2), star(4)
    logp = lambda tree: tree.replace(logp_policy=-jnp.arange(1.0 * tree.token.size).reshape(tree.token.shape) / 5)
    agree = lambda tree, **options: np.allclose(
        branch_depthwise(tree, reward, **options), branch_depthwise(tree, reward, fusion="child", **options), atol=1e-5
    )
    assert agree(logp(deep)) and agree(logp(flat), beta=1.0)  # balanced and uniform; one level of forks
    rng = np.random.default_rng(8)
    uneven = binary(3).replace(logp_policy=-jnp.asarray(rng.random((3, 8)), jnp.float32))
    values = lambda fusion: branch_depthwise(uneven, jnp.arange(8.0) % 3, fusion=fusion, beta=1.0, std=False)
    assert not np.allclose(values("leaf"), values("child"), atol=1e-3)  # two levels below a node
    base = branch_depthwise(logp(deep), reward, beta=1.0)
    moved = logp(deep).replace(logp_policy=logp(deep).logp_policy.at[0].add(-3.0))  # the same for all leaves below
    np.testing.assert_allclose(branch_depthwise(moved, reward, beta=1.0), base, atol=1e-5)


def test_golden_star():
    np.testing.assert_allclose(grpo(star(4), jnp.array([1.0, 0, 0, 1])), [0.866025, -0.866025, -0.866025, 0.866025], atol=1e-5)


@pytest.mark.parametrize("options", [{}, dict(segment=1), dict(fusion="child"), dict(eps=1e-8)])
def test_golden_binary_tree(options):
    got = branch_depthwise(binary(3), jnp.array([1.0, 1, 1, 0, 0, 1, 0, 0]), **options)
    np.testing.assert_allclose(got[0, [0, 4]], [0.707107, -0.707107], atol=1e-5)
    np.testing.assert_allclose(got[1, [0, 2, 4, 6]], [1.224745, 0, 0, -1.224745], atol=1e-5)
    a = 0.935414
    np.testing.assert_allclose(got[2], [a, a, a, -a, -a, a, -a, -a], atol=1e-5)


@pytest.mark.slow
def test_depths_have_mean_zero_and_deviation_one():
    rng = np.random.default_rng(7)
    got = np.asarray(branch_depthwise(binary(4), jnp.asarray(rng.normal(size=16), jnp.float32)))
    for row in range(4):
        nodes = got[row, :: 16 >> (row + 1)]
        assert nodes.mean() == pytest.approx(0, abs=1e-5) and nodes.std(ddof=1) == pytest.approx(1, abs=1e-4)


def test_one_fork_beside_independent_samples_gets_credit_through_virtual_leaves():
    """Without virtual nodes the two tails are only compared with each other at their depth."""
    parent = [[-1] * 8, [0, 1, 2, 3, 4, 5, 6, 0]]
    used = np.ones((2, 8), bool)
    used[0, 7] = False
    tree = T.from_parents(parent, used, [[1, k] for k in range(8)])
    reward = jnp.array([1.0, 0, 0, 0, 0, 0, 0, 1])
    assert branch_depthwise(tree, reward)[1, 0] == pytest.approx(1.62, abs=0.01)
    assert grpo(tree, reward)[0] == pytest.approx(1.62, abs=0.01)
    assert branch_depthwise(tree, reward, virtual=False)[1, 0] == 0


def first(result):
    """The credit alone, of estimators that also give weights."""
    return result[0] if isinstance(result, tuple) else result


def given(name, leaves):
    return [jnp.ones(leaves)] * len(A.extras(A.ESTIMATORS[name]))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(A.ESTIMATORS) - {"reinforce_pp"}))
def test_degenerate_groups_get_exactly_zero(name):
    estimator = lambda tree, reward: first(A.ESTIMATORS[name](tree, reward, *given(name, reward.size)))
    chain = T.from_parents([[-1], [0]], [[1], [1]], [[1, 0]])
    assert not np.any(estimator(chain, jnp.array([1.0])))
    empty = T.from_parents([[-1, -1]], [[0, 0]], [[-1, -1], [-1, -1]])
    assert not np.any(estimator(empty, jnp.array([1.0, 0.0])))
    for constant in (0.0, 1.0, 0.1):
        assert not np.any(estimator(star(7), jnp.full(7, constant)))
        assert not np.any(estimator(binary(3), jnp.full(8, constant)))
    assert not np.any(estimator(star(2), jnp.array([0.5, 0.5 + 1e-7])))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(A.ESTIMATORS) - {"reinforce_pp", "mc_grpo"}))
def test_shift_and_scale_of_rewards(name):
    """Credit grows with the differences of rewards, or does not depend on their scale."""
    rng = np.random.default_rng(3)
    estimator = jax.jit(lambda tree, reward: first(A.ESTIMATORS[name](tree, reward, *given(name, 5))))
    found = []
    for _ in range(30):
        tree, reward = oracles.random_tree(rng), jnp.asarray(rng.normal(size=5), jnp.float32)
        found.append([estimator(tree, r) for r in (reward, 3 * reward + 2, -reward)])
    want, scaled, negative = (np.stack(x) for x in zip(*found))
    assert min(np.abs(scaled - factor * want).max() for factor in (1, 3)) < 1e-3 < np.abs(want).max()
    np.testing.assert_allclose(negative, -want, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(A.ESTIMATORS))
def test_slots_can_change_places(name):
    """Columns permuted, leaves with them: credit moves along."""
    rng = np.random.default_rng(4)
    estimator = jax.jit(lambda tree, reward: first(A.ESTIMATORS[name](tree, reward, *given(name, 5))))
    for _ in range(20):
        tree = oracles.random_tree(rng)
        reward = rng.normal(size=5).astype(np.float32)  # all different: the median has one owner
        order = rng.permutation(5)  # new column k was column order[k]
        where = np.argsort(order)
        move = lambda x: np.where(np.asarray(x) >= 0, where[np.asarray(x)], -1)
        leaf = np.asarray(tree.leaf)[order]
        cells = {k: v[:, order] for k, v in tree.items() if k not in ("leaf", "leaf_path", "parent", "turns")}
        other = T.from_parents(move(tree.parent)[:, order], cells.pop("used"), np.stack([leaf[:, 0], move(leaf[:, 1])], 1), **cells)
        want = np.asarray(estimator(tree, reward))[..., order]
        np.testing.assert_allclose(estimator(other, reward[order]), want, atol=1e-5)


def test_two_node_depth_is_a_sign():
    for gap in (1e-3, 1.0, 100.0):
        got = branch_depthwise(star(2), jnp.array([gap, 0.0]), eps=1e-8)
        np.testing.assert_allclose(got[0], [0.707107, -0.707107], atol=1e-3)


# --- composition ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_multipliers_apply_in_order_and_to_cells_as_means():
    tree = binary(2).replace(entropy=jnp.arange(8.0).reshape(2, 4), logp_policy=-jnp.arange(8.0).reshape(2, 4))
    batch, reward = jax.tree.map(lambda x: x[None], tree), jnp.array([[1.0, 0, 1, 0]])
    names = dict(ear=A.ear, novelty=A.novelty)
    got, weight, memory = A.compose(grpo, None, names).credit(batch, reward, {}, {})
    base = grpo(tree, reward[0])
    sharp = base * A.novelty(tree, reward[0], base)
    np.testing.assert_allclose(got[0], sharp * A.ear(tree, reward[0], sharp), rtol=1e-6)
    np.testing.assert_array_equal(weight, 1)
    cells, _, _ = A.compose(branch_depthwise, None, dict(ear=A.ear)).credit(batch, reward, {}, {})
    factor = A.ear(tree, reward[0], base)
    mean = T.up(tree, factor) / jnp.maximum(T.leaf_count(tree), 1)
    np.testing.assert_allclose(cells[0], branch_depthwise(tree, reward[0]) * mean, rtol=1e-5)
    with pytest.raises(ValueError, match="novelty"):
        A.compose(branch_depthwise, None, names)


@pytest.mark.slow
@pytest.mark.parametrize("name, options", [("ace", {}), ("novelty", {}), ("gdro", {})])
def test_multipliers_read_rewards_as_graded(name, options):
    """A right answer whose length was punished is right."""
    tree = star(3).replace(logp_policy=-jnp.array([[1.0, 1, 3]] * 2))
    batch, graded, shaped = jax.tree.map(lambda x: x[None], tree), jnp.array([[1.0, 0, 1]]), jnp.array([[0.6, 0, 0.45]])
    made = A.compose(A.dr_grpo, None, {name: functools.partial(A.MULTIPLIERS[name], **options)})
    given = dict(reference_logp=batch.logp_policy - 0.5)
    base = jax.vmap(A.dr_grpo)(batch, shaped)
    factor = np.asarray(made.credit(batch, shaped, given, made.memory, graded)[0] / base)[0]
    other = np.asarray(made.credit(batch, shaped, given, made.memory)[0] / base)[0]
    if name == "ace":
        assert factor[2] == 1 and other[2] > 1
    if name == "novelty":
        assert factor[2] > 1.1 and other[2] == 1  # unlikely and right
    if name == "gdro":
        np.testing.assert_allclose(factor, np.exp(0.65 / 3), rtol=1e-5)
        assert np.all(other > factor)


def test_composition_says_what_it_needs():
    made = A.compose(A.minimum_variance, None, dict(ace=A.ace, gdro=A.gdro))
    assert made.needs == ("gradient_norm", "importance", "reference_logp") and made.leaf
    assert set(made.memory) == {"gdro"} and not A.compose(branch_depthwise).leaf
    assert A.compose(A.ESTIMATORS["mc_grpo"]).leaf
    wide = A.compose(grpo, None, dict(gdro=functools.partial(gdro, edges=(0.1, 0.2, 0.9))))
    assert wide.memory["gdro"]["score"].shape == (4,)


@pytest.mark.slow
def test_every_function_says_its_paper_and_its_difference():
    for name, function in A.ESTIMATORS.items():
        text = " ".join(inspect.getdoc(function).split())
        if "arXiv" not in text and has_own_test(name):
            continue  # of no paper
        assert "arXiv" in text and ("iffers from GRPO" in text or "iffers from flat GRPO" in text or name == "grpo"), name
