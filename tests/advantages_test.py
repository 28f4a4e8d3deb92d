"""Estimators against slow recursions, golden values and reductions."""
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from treerl import tree as T
from treerl.advantages import branch_depthwise, grpo


GRPO, DEPTHWISE = jax.jit(grpo), jax.jit(branch_depthwise)


def star(count):
    """A tree that never forks below the prompt: `count` independent samples of two tokens."""
    parent = np.stack([np.full(count, -1), np.arange(count)])
    return T.from_parents(parent, np.ones((2, count), bool), [[1, k] for k in range(count)])


def binary(levels):
    """A full binary tree whose line k forks from line k - 2^j; leaves in slot order of forks."""
    slots = 2**levels
    parent, used = np.full((levels, slots), -1), np.zeros((levels, slots), bool)
    for row in range(levels):
        width = slots >> (row + 1)  # leaves below a node of this row
        for k in range(0, slots, width):
            used[row, k] = True
            parent[row, k] = (k // (2 * width)) * (2 * width) if row else -1
    return T.from_parents(parent, used, [[levels - 1, k] for k in range(slots)])


@pytest.mark.parametrize("options", [{}, {"std": False}, {"virtual": False}, {"clip": 0.5}])
def test_branch_depthwise_equals_recursion_on_random_trees(options):
    rng = np.random.default_rng(0)
    fast = jax.jit(lambda t, r: branch_depthwise(t, r, **options))
    nonzero = 0
    for number in range(300):
        tree = oracles.random_tree(rng)
        reward = rng.integers(0, 2, 5).astype(np.float32) if number % 2 else rng.normal(size=5).astype(np.float32)
        want = oracles.branch_depthwise(tree, reward, **options)
        np.testing.assert_allclose(fast(tree, reward), want, rtol=1e-4, atol=2e-5)
        nonzero += np.any(want != 0)
    assert nonzero > 100


@pytest.mark.parametrize("std", [True, False])
def test_grpo_equals_recursion_on_random_trees(std):
    rng = np.random.default_rng(1)
    fast = jax.jit(lambda t, r: grpo(t, r, std=std))
    for _ in range(200):
        tree, reward = oracles.random_tree(rng), rng.integers(0, 3, 5).astype(np.float32)
        np.testing.assert_allclose(fast(tree, reward), oracles.grpo(tree, reward, std=std), rtol=1e-4, atol=1e-5)


def test_a_tree_that_never_forks_is_grpo():
    rng = np.random.default_rng(2)
    for count in (2, 3, 8):
        tree, reward = star(count), jnp.asarray(rng.normal(size=count), jnp.float32)
        leaf, cell = GRPO(tree, reward), DEPTHWISE(tree, reward)
        np.testing.assert_allclose(cell, jnp.broadcast_to(leaf, cell.shape), rtol=1e-5)
        for got, want in zip(T.spread(tree, cell_credit=cell), T.spread(tree, leaf_credit=leaf)):
            np.testing.assert_allclose(got, want, rtol=1e-5)


def test_golden_star():
    np.testing.assert_allclose(grpo(star(4), jnp.array([1.0, 0, 0, 1])), [0.866025, -0.866025, -0.866025, 0.866025], atol=1e-5)


def test_golden_binary_tree():
    got = branch_depthwise(binary(3), jnp.array([1.0, 1, 1, 0, 0, 1, 0, 0]))
    np.testing.assert_allclose(got[0, [0, 4]], [0.707107, -0.707107], atol=1e-5)
    np.testing.assert_allclose(got[1, [0, 2, 4, 6]], [1.224745, 0, 0, -1.224745], atol=1e-5)
    a = 0.935414
    np.testing.assert_allclose(got[2], [a, a, a, -a, -a, a, -a, -a], atol=1e-5)


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


@pytest.mark.parametrize("estimator", [GRPO, DEPTHWISE])
def test_degenerate_groups_get_exactly_zero(estimator):
    chain = T.from_parents([[-1], [0]], [[1], [1]], [[1, 0]])
    assert not np.any(estimator(chain, jnp.array([1.0])))
    empty = T.from_parents([[-1, -1]], [[0, 0]], [[-1, -1], [-1, -1]])
    assert not np.any(estimator(empty, jnp.array([1.0, 0.0])))
    for constant in (0.0, 1.0, 0.1):
        assert not np.any(estimator(star(7), jnp.full(7, constant)))
    assert not np.any(estimator(star(2), jnp.array([0.5, 0.5 + 1e-7])))


@pytest.mark.parametrize("estimator", [grpo, branch_depthwise])
def test_shift_and_scale_of_rewards(estimator):
    rng = np.random.default_rng(3)
    estimator = jax.jit(estimator)
    for _ in range(30):
        tree, reward = oracles.random_tree(rng), jnp.asarray(rng.normal(size=5), jnp.float32)
        want = estimator(tree, reward)
        np.testing.assert_allclose(estimator(tree, 3 * reward + 2), want, atol=1e-3)
        np.testing.assert_allclose(estimator(tree, -reward), -want, atol=1e-3)


def test_two_node_depth_is_a_sign():
    for gap in (1e-3, 1.0, 100.0):
        got = branch_depthwise(star(2), jnp.array([gap, 0.0]), eps=1e-8)
        np.testing.assert_allclose(got[0], [0.707107, -0.707107], atol=1e-3)
