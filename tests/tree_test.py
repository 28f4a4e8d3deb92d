"""The tree and its two sweeps against walks of parents one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from treerl import tree as T

TREES = 150
ALGEBRA = jax.jit(lambda t: dict(kept=T.kept(t), count=T.leaf_count(t), depth=T.depth(t), heads=T.node_heads(t), forks=T.forks(t)))


@pytest.fixture(scope="module")
def trees():
    rng = np.random.default_rng(0)
    made = [oracles.random_tree(rng) for _ in range(TREES)]
    assert {int(T.leaf_valid(t).sum()) for t in made} >= {1, 2, 3, 4, 5}, "the generator lost variety"
    return made


def test_random_trees_pass_the_check(trees):
    for tree in trees:
        T.check(tree)


def test_up_and_down_are_adjoint(trees):
    rng = np.random.default_rng(1)
    both = jax.jit(lambda t, x, y: (jnp.vdot(T.up(t, x), y), jnp.vdot(x, T.down(t, y))))
    for tree in trees:
        x, y = rng.normal(size=5), rng.normal(size=(7, 5))
        left, right = both(tree, x, y)
        np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-5)


def test_up_sums_over_leaves_below(trees):
    rng = np.random.default_rng(2)
    up = jax.jit(T.up)
    for tree in trees[:50]:
        x = rng.normal(size=(5, 2))
        want = np.zeros((7, 5, 2))
        for leaf, cells in oracles.leaf_cells(tree).items():
            for cell in cells:
                want[cell] += x[leaf]
        np.testing.assert_allclose(up(tree, x), want, atol=1e-5)


def test_mean_below_averages_over_leaves_below(trees):
    rng = np.random.default_rng(3)
    mean_below = jax.jit(T.mean_below)
    for tree in trees[:50]:
        x, below = rng.normal(size=(5, 7)).astype(np.float32), {}
        for leaf, cells in oracles.leaf_cells(tree).items():
            for row, cell in enumerate(cells):
                below.setdefault(cell, []).append(x[leaf, row])
        want = np.zeros((7, 5))
        for cell, values in below.items():
            want[cell] = np.mean(values)
        x[np.asarray(tree.leaf_path) < 0] = np.nan  # off the paths
        np.testing.assert_allclose(mean_below(tree, x), want, atol=1e-5)


@pytest.mark.slow
def test_depth_kept_forks_and_nodes(trees):
    for tree in trees:
        got = ALGEBRA(tree)
        children, depth = oracles.children_of(tree), oracles.depths(tree)
        for cell in np.ndindex(7, 5):
            assert bool(got["kept"][cell]) == (cell in depth)
            assert int(got["depth"][0][cell]) == depth.get(cell, 0)
            assert bool(got["forks"][1][cell]) == (len(children.get(cell, ())) >= 2)
        assert bool(got["forks"][0]) == (len(children[None]) >= 2)
        heads = {chain[0] for chain in oracles.nodes(tree)}
        assert {tuple(c) for c in np.argwhere(got["heads"]).tolist()} == heads
        for leaf, cells in oracles.leaf_cells(tree).items():
            assert int(got["depth"][1][leaf]) == depth[cells[-1]]


def test_a_fork_whose_child_was_pruned_does_not_count():
    # slot 1 forks from slot 0 at row 1 and leaves no leaf; slot 2 forks at row 2 and does
    parent = [[-1, -1, -1], [0, 0, -1], [0, 1, 0], [0, -1, 2]]
    used = np.array([[1, 0, 0], [1, 1, 0], [1, 1, 1], [1, 0, 1]], bool)
    tree = T.from_parents(parent, used, [[3, 0], [-1, -1], [3, 2]])
    cell, leaf = T.depth(tree)
    np.testing.assert_array_equal(cell, [[0, 0, 0], [0, 0, 0], [1, 0, 1], [1, 0, 1]])
    np.testing.assert_array_equal(leaf, [1, 0, 1])


def test_spread_of_leaf_credit_is_the_clipped_objective_of_every_row(trees):
    """Sum over leaves of w min(r A, clip(r) A) equals the two-weight form, token by token."""
    rng = np.random.default_rng(3)
    spread = jax.jit(lambda t, c, w: T.spread(t, leaf_credit=c, leaf_weight=w))
    for tree in trees[:60]:
        credit, weight, ratio = rng.normal(size=5), rng.random(5), np.exp(rng.normal(size=(7, 5)))
        positive, negative, total = spread(tree, credit, weight)
        got = positive * np.minimum(ratio, 1.2) + negative * np.maximum(ratio, 0.8)
        want, count = np.zeros((7, 5)), np.zeros((7, 5))
        for leaf, cells in oracles.leaf_cells(tree).items():
            for cell in cells:
                a, r = credit[leaf], ratio[cell]
                want[cell] += weight[leaf] * min(r * a, np.clip(r, 0.8, 1.2) * a)
                count[cell] += weight[leaf]
        np.testing.assert_allclose(got, want, atol=1e-5)
        np.testing.assert_allclose(total, count, atol=1e-5)


def test_spread_of_cell_credit_counts_each_cell_once(trees):
    rng = np.random.default_rng(4)
    spread = jax.jit(lambda t, c: T.spread(t, cell_credit=c))
    for tree in trees[:30]:
        credit = jnp.asarray(rng.normal(size=(7, 5)))
        positive, negative, weight = spread(tree, credit)
        kept = np.asarray(ALGEBRA(tree)["kept"])
        np.testing.assert_allclose(positive + negative, np.where(kept, credit, 0), atol=1e-6)
        np.testing.assert_array_equal(weight, kept)
    with pytest.raises(ValueError, match="give leaf_credit or cell_credit, and not both"):
        T.spread(tree)


@pytest.mark.parametrize(
    "field, cell, value, message",
    [
        ("parent", (2, 0), 1, "leaf_path does not follow the parents"),
        ("parent", (0, 0), 0, "a cell of row 0 has a parent other than the prompt"),
        ("parent", (1, 0), 9, "a parent column is out of range"),
        ("source", (1, 0), 7, "unknown source"),
        ("end", (2, 0), T.CUT, "a leaf is neither FINISHED nor TRUNCATED"),
        ("end", (1, 0), T.FINISHED, "a line goes on below its end"),
        ("used", (1, 0), False, "a path to a leaf crosses an unused cell"),
        ("logp_policy", (1, 0), np.nan, "logp_policy is not a log-prob"),
        ("logp_behavior", (0, 0), 0.5, "logp_behavior is not a log-prob"),
    ],
)
def test_check_names_what_is_broken(field, cell, value, message):
    tree = T.from_parents([[-1, -1], [0, -1], [0, 0]], [[1, 0], [1, 0], [1, 1]], [[2, 0], [2, 1]])
    T.check(tree)
    broken = tree.replace(**{field: getattr(tree, field).at[cell].set(value)})
    with pytest.raises(ValueError, match=message):
        T.check(broken)


def test_token_count():
    tree = T.from_parents([[-1, -1], [0, -1], [0, 0]], [[1, 0], [1, 0], [1, 1]], [[2, 0], [2, 1]])
    assert [int(x) for x in T.token_count(tree)] == [4, 6]


def small():
    return T.from_parents([[-1, -1, -1], [0, 0, 2]], [[1, 0, 1], [1, 1, 1]], [[1, 0], [1, 1], [1, 2]])


@pytest.mark.parametrize(
    "use, message",
    [
        (lambda t: T.up(t, jnp.ones(1)), r"Tree: the leaf value has shape \(1,\), not \(3,\)"),
        (lambda t: T.up(t, jnp.float32(1)), r"the leaf value has shape \(\), not \(3,\)"),
        (lambda t: T.up(t, jnp.ones((2, 3))), r"the leaf value has shape \(2, 3\), not \(3, 3\)"),
        (lambda t: T.down(t, jnp.ones((2, 1))), r"the cell value has shape \(2, 1\), not \(2, 3\)"),
        (lambda t: T.down(t, jnp.ones((1, 2, 3))), r"the cell value has shape \(1, 2, 3\), not \(2, 3\)"),
        (lambda t: T.spread(t, leaf_credit=jnp.ones(1)), r"leaf_credit has shape \(1,\), not \(3,\)"),
        (lambda t: T.spread(t, cell_credit=jnp.ones(3)), r"cell_credit has shape \(3,\), not \(2, 3\)"),
        (lambda t: T.spread(t, leaf_credit=jnp.ones(3), leaf_weight=jnp.float32(1)), r"leaf_weight has shape \(\), not \(3,\)"),
        (lambda t: T.check(t.replace(used=t.used[:1])), r"used has shape \(1, 3\), not \(2, 3\)"),
        (lambda t: T.check(t.replace(leaf_path=t.leaf_path[:2])), r"leaf_path has shape \(2, 2\), not \(3, 2\)"),
    ],
)
def test_values_of_a_wrong_shape_are_refused(use, message):
    with pytest.raises(ValueError, match=message):
        use(small())


@pytest.mark.parametrize(
    "use",
    [
        lambda t: T.up(t, jnp.ones((1, 3))),
        lambda t: T.down(t, jnp.ones((1, 2, 3))),
        lambda t: T.spread(t, leaf_credit=jnp.ones((1, 3))),
        lambda t: T.depth(t),
        lambda t: T.check(t),
    ],
)
def test_a_batch_is_refused_and_vmap_takes_its_trees_one_by_one(use):
    batch = jax.tree.map(lambda x: x[None], small())
    with pytest.raises(ValueError, match=r"token has shape \(1, 2, 3\), where one tree has \[S, K\]; use jax.vmap"):
        use(batch)
    got = jax.vmap(lambda t, x: T.spread(t, leaf_credit=x))(batch, jnp.ones((1, 3)))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[0], b), got, T.spread(small(), leaf_credit=jnp.ones(3)))


def test_a_tree_without_leaf_entries_has_no_depth_and_passes_the_check():
    tree = T.from_parents([[-1, -1], [0, 0]], [[1, 1], [1, 1]], [])
    T.check(tree)
    cell, leaf = T.depth(tree)
    assert not np.any(cell) and cell.shape == (2, 2) and leaf.shape == (0,)
    assert not np.any(T.up(tree, jnp.ones(0))) and T.down(tree, jnp.ones((2, 2))).shape == (0,)
