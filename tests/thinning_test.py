"""Thinning against recursion over nodes and against all subsets of leaves, on random trees."""

import math

import advantages_oracle
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from treerl import thinning, tree as T

TREES, ROWS, SLOTS = 1000, 7, 8


@pytest.fixture(scope="module")
def batch():
    """(trees, the same stacked, rewards [B, L] with many ties, cell credit)."""
    rng = np.random.default_rng(0)
    made = [jax.tree.map(np.asarray, oracles.random_tree(rng, ROWS, SLOTS, fork=0.5)) for _ in range(TREES)]
    assert {int(T.leaf_valid(t).sum()) for t in made} == set(range(SLOTS + 1)), "the generator lost variety"
    reward = rng.integers(0, 4, (TREES, SLOTS)).astype(np.float32) / 2
    return made, jax.tree.map(lambda *x: np.stack(x), *made), reward, np.zeros((TREES, ROWS, SLOTS), np.float32)


def run(rule, batch, **options):
    """A rule on all trees, compiled and batched; options are traced but for texts."""
    static = {k: v for k, v in options.items() if isinstance(v, str)}
    traced = {k: v for k, v in options.items() if k not in static}
    call = jax.jit(lambda tree, reward, credit, o: jax.vmap(lambda *x: rule(*x, **o, **static))(tree, reward, credit))
    return np.asarray(call(*batch[1:], traced))


def cells_of(tree, leaves) -> np.ndarray:
    """Cells on the paths of some leaves."""
    mask = np.zeros((ROWS, SLOTS), bool)
    for leaf, cells in oracles.leaf_cells(tree).items():
        for cell in cells if leaf in leaves else []:
            mask[cell] = True
    return mask


def parent_top1(tree, reward) -> set:
    """Leaves that stay, by walking nodes."""
    stay = set(oracles.leaf_cells(tree))
    for node in advantages_oracle.grow(tree).walk():
        if node.children and not any(child.children for child in node.children):
            best = max(reward[leaf] for leaf in node.leaves)
            stay -= set(node.leaves) - {min(leaf for leaf in node.leaves if reward[leaf] == best)}
    return stay


def extreme(tree, reward, ratio) -> set:
    leaves = sorted(oracles.leaf_cells(tree), key=lambda leaf: (-reward[leaf], leaf))
    b = max(1, math.floor(ratio * len(leaves) / 2))
    return set(leaves[:b]) | set(leaves[-b:])


# --- width ---------------------------------------------------------------------------------


def test_parent_top1_keeps_the_best_of_every_last_fork(batch):
    got, dropped = run(thinning.width, batch, mode="parent_top1"), 0
    for tree, reward, mask in zip(batch[0], batch[2], got):
        stay = parent_top1(tree, reward)
        np.testing.assert_array_equal(mask, cells_of(tree, stay))
        dropped += len(oracles.leaf_cells(tree)) - len(stay)
    assert dropped > TREES  # the test has something to see


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.75, 1.0])
def test_extreme_keeps_the_best_and_the_worst_leaves(batch, ratio):
    got = run(thinning.width, batch, mode="extreme", ratio=ratio)
    for tree, reward, mask in zip(batch[0], batch[2], got):
        np.testing.assert_array_equal(mask, cells_of(tree, extreme(tree, reward, ratio)))
        n = int(T.leaf_valid(tree).sum())
        ends = [mask[cell] for cell in map(tuple, tree.leaf) if cell[0] >= 0]
        assert sum(ends) == min(n, 2 * max(1, math.floor(ratio * n / 2)))


@pytest.mark.slow
def test_shares_lose_no_leaf_to_rounding():
    """Products that are whole, and are less in float32."""
    rule = jax.jit(lambda tree, x, ratio: thinning.width(tree, x, x, mode="extreme", ratio=ratio))
    choose = jax.jit(lambda tree, x, keep: thinning.coverage(tree, x, keep=keep, share_cost=0.0, cover_gain=0.0))
    for ratio, n in ((0.53, 200), (0.84, 150)):
        for function, leaves in ((rule, n), (choose, n // 2)):
            tree = T.from_parents(np.zeros((1, leaves)), np.ones((1, leaves)), [[0, k] for k in range(leaves)])
            want = round(ratio * n / 2) * (2 if function is rule else 1)
            assert function(tree, jnp.arange(leaves) * 1.0, ratio).sum() == want


@pytest.mark.slow
def test_thinning_nothing_keeps_every_kept_cell(batch):
    kept = np.asarray(jax.jit(jax.vmap(T.kept))(batch[1]))
    np.testing.assert_array_equal(run(thinning.width, batch, mode="extreme", ratio=2.0), kept)
    np.testing.assert_array_equal(run(thinning.depth, batch, first=0, length=0), kept)
    np.testing.assert_array_equal(run(thinning.depth, batch, first=SLOTS, length=9), kept)


def test_one_tree_gets_what_it_gets_in_a_batch_and_credit_may_be_of_leaves(batch):
    one = jax.jit(lambda tree, reward: thinning.width(tree, reward, reward, mode="parent_top1"))
    want = run(thinning.width, batch, mode="parent_top1")
    for index in range(0, TREES, 100):
        np.testing.assert_array_equal(one(batch[0][index], batch[2][index]), want[index])


@pytest.mark.slow
def test_a_leaf_beside_a_node_that_forks_again_stays():
    # the prompt forks into leaf 0 (reward 0) and a node that forks into leaves 1 and 2
    tree = T.from_parents([[0, 0, 0], [0, 1, 1]], [[1, 1, 0], [1, 1, 1]], [[1, 0], [1, 1], [1, 2]])
    mask = thinning.width(tree, jnp.array([0.0, 1.0, 2.0]), jnp.zeros(3), mode="parent_top1")
    np.testing.assert_array_equal(mask, [[1, 1, 0], [1, 0, 1]])


def test_wrong_arguments_are_errors(batch):
    tree, reward = batch[0][0], jnp.zeros(SLOTS)
    with pytest.raises(ValueError, match="mode is 'top'"):
        thinning.width(tree, reward, reward, mode="top")
    with pytest.raises(ValueError, match="direction is 'left'"):
        thinning.window(0, start=3, length=1, interval=2, stop=1, direction="left")
    with pytest.raises(AssertionError):
        thinning.depth(tree, reward[1:], jnp.zeros((ROWS, SLOTS)), first=0, length=1)
    with pytest.raises(AssertionError):
        thinning.coverage(tree, reward[1:], keep=1)
    with pytest.raises(AssertionError):
        thinning.depth(tree, reward, jnp.zeros((SLOTS, ROWS)), first=0, length=1)


# --- depth ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("first, length", [(0, 1), (1, 1), (2, 1), (1, 2), (2, 5)])
def test_depth_leaves_out_exactly_the_cells_of_its_depths(batch, first, length):
    got, removed = run(thinning.depth, batch, first=first, length=length), 0
    for tree, mask in zip(batch[0], got):
        depths = oracles.depths(tree)
        stay = {cell for cell, depth in depths.items() if not first <= depth < first + length}
        assert {tuple(cell) for cell in np.argwhere(mask).tolist()} == stay
        removed += len(depths) - len(stay)
    assert removed


@pytest.mark.parametrize("direction", ["up", "down"])
@pytest.mark.parametrize("start, length, interval, stop", [(15, 4, 30, 9), (2, 3, 1, 9), (5, 2, 7, 5), (3, 1, 2, 3)])
def test_the_window_slides_and_stops(direction, start, length, interval, stop):
    call = jax.jit(lambda step: thinning.window(
        step, start=start, length=length, interval=interval, stop=stop, direction=direction
    ))  # fmt: skip
    first, steps = start, range(20 * interval)
    for step in steps:
        leading = first if direction == "up" else first + length - 1
        if step and step % interval == 0 and (leading > stop if direction == "up" else leading < stop):
            first += -1 if direction == "up" else 1
        assert int(call(step)) == first
    assert call(0).dtype == jnp.int32


def test_the_window_of_the_released_script():
    """Depths 15 to 18, every 30 steps, to 9 to 12."""
    first = lambda step: int(thinning.window(step, start=15, length=4, interval=30, stop=9, direction="up"))
    assert [first(s) for s in (0, 29, 30, 179, 180, 10_000)] == [15, 15, 14, 10, 9, 9]


# --- coverage ------------------------------------------------------------------------------


def objective(tree, score, share_cost, cover_gain, level, row):
    """(leaves, member [2^n, n], objective [2^n]) of every set of leaves, in float64 and from cells alone."""
    paths, depths = oracles.leaf_cells(tree), oracles.depths(tree)
    leaves = sorted(paths)
    cells = sorted({cell for path in paths.values() for cell in path})

    def cluster(leaf):
        if row is not None:
            return paths[leaf][row] if row < len(paths[leaf]) else leaf
        node = [cell for cell in paths[leaf] if depths[cell] == level]
        if node or all(depths[cell] > level for cell in paths[leaf]):
            return node[0] if node else None
        return leaf  # ended above

    clusters = sorted({str(cluster(leaf)) for leaf in leaves})
    on = np.array([[cell in paths[leaf] for cell in cells] for leaf in leaves])
    covers = np.array([[str(cluster(leaf)) == c for c in clusters] for leaf in leaves])
    member = (np.arange(2 ** len(leaves))[:, None] >> np.arange(len(leaves))) & 1
    share = np.exp((score[leaves] - score[leaves].max()).astype(np.float64) / 0.2)
    value = member @ (share / share.sum())
    value = value - share_cost / len(cells) * (member @ on > 0).sum(1)
    return leaves, member, value + cover_gain / len(clusters) * (member @ covers > 0).sum(1)


@pytest.mark.parametrize(
    "keep, share_cost, cover_gain, level, row",
    [
        (1.0, 1.0, 1.5, 1, None), (3, 1.0, 1.5, 2, None), (0.5, 1.0, 0.3, 1, None), (2, 0.5, 1.5, 0, None),
        (4, 1.0, 1.5, 1, 3), (1.0, 2.0, 0.0, 1, None), (1, 1.0, 1.0, 1, 0), (5, 0.0, 2.0, 3, None),
    ],
)  # fmt: skip
def test_coverage_is_the_best_of_all_sets(batch, keep, share_cost, cover_gain, level, row):
    score = np.random.default_rng(5).normal(size=(TREES, SLOTS)).astype(np.float32) / 5
    call = lambda tree, score, keep, a, b: thinning.coverage(tree, score, keep=keep, share_cost=a, cover_gain=b, level=level, row=row)
    got = jax.jit(jax.vmap(call, (0, 0, None, None, None)))(batch[1], score, keep, share_cost, cover_gain)
    sizes = set()
    for tree, score, stay in zip(batch[0][:250], score, np.asarray(got)):
        if not (tree.leaf[:, 0] >= 0).any():
            assert not stay.any()
            continue
        leaves, member, value = objective(tree, score, share_cost, cover_gain, level, row)
        most = keep if isinstance(keep, int) else max(1, math.floor(keep * len(leaves)))
        size = member.sum(1)
        best = value[(size >= 1) & (size <= most)].max()
        assert 1 <= stay.sum() <= most and set(np.flatnonzero(stay)) <= set(leaves)
        mine = value[np.all(member == stay[leaves], axis=1)].item()
        assert mine >= best - 2e-6
        sizes.add(int(stay.sum()))
    assert len(sizes) > 1 or keep == 1


def test_without_costs_and_gains_the_highest_scores_stay(batch):
    """Also among scores whose shares all vanish beside the best one, and among equals."""
    score = np.random.default_rng(6).integers(0, 6, (TREES, SLOTS)).astype(np.float32) * 50
    call = lambda tree, score, keep: thinning.coverage(tree, score, keep=keep, share_cost=0.0, cover_gain=0.0)
    call = jax.jit(jax.vmap(call, (0, 0, None)))
    for keep in (1, 2, 5, 99):
        for tree, row, stay in zip(batch[0], score, np.asarray(call(batch[1], score, keep))):
            leaves = np.flatnonzero(tree.leaf[:, 0] >= 0)
            want = sorted(leaves, key=lambda leaf: (-row[leaf], leaf))[:keep]
            np.testing.assert_array_equal(np.flatnonzero(stay), np.sort(want))


def test_coverage_weighs_sharing_against_difference():
    # leaves 0 and 1 share three of their four rows; leaf 2 shares none
    parent = [[0] * 3, [0, 0, 2], [0, 0, 2], [0, 0, 2]]
    tree = T.from_parents(parent, [[1, 0, 1]] * 3 + [[1, 1, 1]], [[3, 0], [3, 1], [3, 2]])
    score = jnp.array([0.5, 0.4, 0.45])
    call = jax.jit(lambda o: thinning.coverage(tree, score, keep=2, **o))
    choose = lambda **o: np.flatnonzero(call(o)).tolist()
    assert choose(share_cost=0.0, cover_gain=0.0) == [0, 2]
    assert choose(share_cost=1.0, cover_gain=0.0) == [0, 1]
    assert choose(share_cost=1.0, cover_gain=1.5) == [0, 2]
    assert choose(share_cost=5.0, cover_gain=0.0) == [0]


@pytest.mark.slow
def test_coverage_is_the_same_alone_and_in_any_order(batch):
    """Neither batch neighbours, nor compilation, nor the order of the leaf table changes a choice."""
    rng, (made, trees, *_) = np.random.default_rng(7), batch
    score = rng.normal(size=(TREES, SLOTS)).astype(np.float32)
    one = lambda tree, score: thinning.coverage(tree, score, keep=0.5)
    call = jax.jit(jax.vmap(one))
    want, order = np.asarray(call(trees, score)), rng.permutation(SLOTS)
    moved = trees.replace(leaf=trees.leaf[:, order], leaf_path=trees.leaf_path[:, order])
    np.testing.assert_array_equal(call(moved, score[:, order]), want[:, order])
    for index in (0, 500):
        np.testing.assert_array_equal(one(made[index], score[index]), want[index])  # not compiled


def test_coverage_of_trees_with_one_leaf_or_no_room_for_any():
    one = T.from_parents([[0]], [[1]], [[0, 0]])
    assert thinning.coverage(one, jnp.array([-3.0]), keep=1, share_cost=9.0).tolist() == [True]
    none = T.from_parents([[0]], [[1]], np.zeros((0, 2)))
    assert thinning.coverage(none, jnp.zeros(0), keep=1).shape == (0,)
    assert not thinning.width(none, jnp.zeros(0), jnp.zeros(0), mode="parent_top1").any()
