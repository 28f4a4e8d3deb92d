"""The tree as a grid, and the two sweeps from which all of its algebra is made.

Rows are depth below the prompt, columns are slots; the parent of a cell lies in the row above.
All functions take ONE tree (no batch axis); callers vmap. Derived quantities are functions,
not fields, so there is nothing to keep in step.
"""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np

from treerl import masked

NONE = -1  # no parent, no leaf, no cell

# source of a token
SAMPLED, FORCED, ENVIRONMENT = 0, 1, 2
# end of a line; those above PRUNED say why it was pruned
RUNNING, FINISHED, TRUNCATED, CUT, PRUNED, SIMILAR, DROPPED = 0, 1, 2, 3, 4, 5, 6

HASHES = (0x9E3779B9, 0x01000193), (0x85EBCA6B, 0x2C1B3C6D)  # (seed, odd base) of either word of a text's id


@chex.dataclass(frozen=True)
class Turns:
    """The turns of the episodes that a tree's leaves are; batched trees have B in front of every field."""

    turn: jax.Array  # [S, K] int32, that a cell belongs to; an observation belongs to the turn of the action it answers
    reward: jax.Array  # [L, T] float32, that the environment gave
    penalty: jax.Array  # [L, T] float32, what an invalid action costs
    state_id: jax.Array  # [L, T, 2] uint32, of what the agent acted in, equal where that was the same
    valid: jax.Array  # [L, T] bool, the action was carried out: a prefix of each leaf's turns
    invalid: jax.Array  # [L, T] bool, malformed or not to be done


@chex.dataclass(frozen=True)
class Tree:
    """A tree of continuations of one prompt; batched trees have B in front of every field."""

    token: jax.Array  # [S, K] int32
    parent: jax.Array  # [S, K] int32, column in the row above; -1 in row 0 (the prompt)
    used: jax.Array  # [S, K] bool, a token was written
    source: jax.Array  # [S, K] int8, SAMPLED, FORCED (by a branching rule) or ENVIRONMENT (an observation)
    end: jax.Array  # [S, K] int8, RUNNING (no end here), FINISHED, TRUNCATED, CUT, or why pruned
    entropy: jax.Array  # [S, K] float32, nats, of the tempered policy the token was drawn from
    logp_behavior: jax.Array  # [S, K] float32, under the distribution sampled from; 0 if forced
    logp_policy: jax.Array  # [S, K] float32, under the tempered, untruncated policy
    leaf: jax.Array  # [L, 2] int32, (row, column) of each graded end; -1 where missing
    leaf_path: jax.Array  # [L, S] int32, column of each ancestor of the leaf; -1 below it
    turns: Turns | None = None  # of episodes in an environment; None for text


def leaf_valid(tree: Tree) -> jax.Array:
    """Which entries of the leaf table hold a leaf: bool [L]."""
    return tree.leaf[:, 0] >= 0


def leaf_length(tree: Tree) -> jax.Array:
    """Number of tokens from the prompt to each leaf, the leaf included: int32 [L]."""
    return tree.leaf[:, 0] + 1


def spoken(tree: Tree) -> jax.Array:
    """Cells whose token is not an observation of an environment: bool, as `source`."""
    return tree.source != ENVIRONMENT


def text_id(token: jax.Array) -> jax.Array:
    """Two 32-bit polynomial hashes (modulo 2^32) of mixed tokens: [..., n] -> uint32 [..., 2].

    Texts that differ in one token never collide; among n distinct texts not chosen against the hash some pair collides
    with probability about n^2 / 2^65.
    """
    powers = [[pow(base, n, 2**32) for n in range(token.shape[-1])] for _, base in HASHES]
    x = token.astype(jnp.uint32)[..., None, :] ^ jnp.array([[seed] for seed, _ in HASHES], jnp.uint32)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):  # a bijection that mixes the bits
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return jnp.sum(x * jnp.array(powers, jnp.uint32), axis=-1)


def _require(ok, what: str):
    if not np.all(ok):
        raise ValueError(f"Tree: {what}.")


def _sizes(tree: Tree) -> tuple[tuple[int], tuple[int, int]]:
    """(L,) and (S, K) of one tree. Refuses a batch, whose axes would broadcast into wrong numbers."""
    batched = "token has shape {}, where one tree has [S, K]; use jax.vmap for a batch"
    _require(jnp.ndim(tree.token) == 2, batched.format(jnp.shape(tree.token)))
    return jnp.shape(tree.leaf)[:1], jnp.shape(tree.token)


def _require_shape(name: str, x, shape: tuple):
    _require(jnp.shape(x) == shape, f"{name} has shape {jnp.shape(x)}, not {shape}")


def shared_rows(tree: Tree) -> jax.Array:
    """Rows that the paths of two leaves have in common, their lengths on the diagonal: int32 [L, L], 0 for missing ones.

    By bisection: paths that meet in a row meet in all rows above it.
    """
    _sizes(tree)
    length = jnp.where(leaf_valid(tree), leaf_length(tree), 0)
    low, high = jnp.zeros((length.size,) * 2, jnp.int32), jnp.minimum(length[:, None], length)

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high + 1) // 2
        column = jnp.take_along_axis(tree.leaf_path, jnp.maximum(middle - 1, 0), axis=1)
        meet = (column == column.T) | (middle == 0)
        return jnp.where(meet, middle, low), jnp.where(meet, high, middle - 1)

    return jax.lax.fori_loop(0, tree.token.shape[0].bit_length(), halve, (low, high))[0]


def leaf_order(tree: Tree) -> tuple[jax.Array, jax.Array]:
    """Leaves in depth-first order and what each shares with the one before it.

    Returns:
      order: int32 [L], leaf indices, missing leaves last.
      shared: int32 [L], rows that the n-th leaf in that order has in common with the (n-1)-th.
    """
    path, valid, common = tree.leaf_path, leaf_valid(tree), shared_rows(tree)
    mine = jnp.take_along_axis(path, jnp.minimum(common, path.shape[1] - 1), axis=1)  # column where two paths part
    first = jnp.where(valid[:, None] & valid, mine.T < mine, valid[None] & ~valid[:, None])
    order = jnp.argsort(jnp.sum(first, axis=1), stable=True)
    shared = common[order[1:], order[:-1]]
    return order, jnp.concatenate([jnp.zeros((min(1, order.size),), shared.dtype), shared])


def _by_cell(tree: Tree, x: jax.Array, combine) -> jax.Array:
    """Folds what leaves say of the cells of their paths: x [L, S, ...] -> [S, K, ...], 0 where no leaf stands.

    The leaves below a cell are neighbours in depth-first order, so one scan over leaves folds all
    cells, from the last leaf to the first of each: O(S K) work and memory, and a fixed order of
    addition. The first leaf of a cell writes its result.

    Args:
      combine: (value of a leaf, total of the later leaves on the same cell), each [S, ...] -> [S, ...].
    """
    leaves, (rows, slots) = _sizes(tree)
    if not leaves[0]:
        return jnp.zeros((rows, slots) + x.shape[2:], x.dtype)
    order, shared = leaf_order(tree)
    row = jnp.arange(rows)
    wide = lambda mask: mask.reshape(mask.shape + (1,) * (x.ndim - 2))

    def fold(later, leaf):
        x, next_shared = leaf
        total = jnp.where(wide(row < next_shared), combine(x, later), x)
        return total, total

    after = jnp.concatenate([shared[1:], jnp.zeros((1,), shared.dtype)])
    _, total = jax.lax.scan(fold, jnp.zeros_like(x[0]), (x[order], after), reverse=True)
    path = tree.leaf_path[order]
    column = jnp.where((path >= 0) & (row >= shared[:, None]), path, slots)  # of the first leaf on each cell
    blank = jnp.zeros((rows, slots) + x.shape[2:], x.dtype)
    return blank.at[jnp.broadcast_to(row, path.shape), column].set(total, mode="drop")


def up(tree: Tree, x: jax.Array) -> jax.Array:
    """Sums a leaf value into every cell at or above the leaf: x [L, ...] -> [S, K, ...]. Adjoint to `down`."""
    leaves, (rows, _) = _sizes(tree)
    _require_shape("the leaf value", x, leaves + jnp.shape(x)[1:])
    return _by_cell(tree, jnp.broadcast_to(x[:, None], (x.shape[0], rows) + x.shape[1:]), jnp.add)


def down(tree: Tree, y: jax.Array) -> jax.Array:
    """Sums cell values along the path of every leaf: y [S, K] -> [L]."""
    return jnp.sum(along(tree, y), axis=1)


def along(tree: Tree, y: jax.Array) -> jax.Array:
    """Reads cell values along the path of every leaf: y [S, K] -> [L, S], 0 below the leaf."""
    _, cells = _sizes(tree)
    _require_shape("the cell value", y, cells)
    rows = jnp.arange(y.shape[0])
    values = y[rows[None], jnp.maximum(tree.leaf_path, 0)]
    return jnp.where(tree.leaf_path >= 0, values, 0)


def leaf_count(tree: Tree) -> jax.Array:
    """Number of leaves at or below each cell: int32 [S, K]."""
    return up(tree, leaf_valid(tree).astype(jnp.int32))


def mean_below(tree: Tree, x: jax.Array) -> jax.Array:
    """Averages over the leaves at or below each cell what they say of its row.

    Args:
      x: [L, S], a value for every row of every leaf's path; off the paths it may be anything.

    Returns:
      [S, K], 0 where no leaf is at or below.
    """
    leaves, (rows, _) = _sizes(tree)
    _require_shape("the value of leaves' rows", x, leaves + (rows,))
    return _by_cell(tree, x, jnp.add) / jnp.maximum(leaf_count(tree), 1)


def kept(tree: Tree) -> jax.Array:
    """Cells with a leaf at or below them, the only ones that are trained on: bool [S, K]."""
    return leaf_count(tree) > 0


def children(tree: Tree) -> tuple[jax.Array, jax.Array]:
    """Number of kept children: of the prompt, int32 [], and of each cell, int32 [S, K]."""
    if not tree.leaf.shape[0]:
        return jnp.int32(0), jnp.zeros(tree.token.shape, jnp.int32)
    order, shared = leaf_order(tree)
    row = jnp.arange(tree.token.shape[0])
    new = (row >= shared[:, None]) & (tree.leaf_path[order] >= 0)  # the leaf is the first on its cell of the row
    new = jnp.zeros_like(new).at[order].set(new).astype(jnp.int32)
    below = jnp.concatenate([new[:, 1:], jnp.zeros_like(new[:, :1])], axis=1)
    return jnp.sum(new[:, 0]), _by_cell(tree, below, jnp.add)


def forks(tree: Tree) -> tuple[jax.Array, jax.Array]:
    """Whether the prompt, bool [], and each cell, bool [S, K], has two or more kept children."""
    root, count = children(tree)
    return root >= 2, count >= 2


def depth(tree: Tree) -> tuple[jax.Array, jax.Array]:
    """Forks survived: of every kept cell, int32 [S, K] (0 elsewhere), and every leaf, int32 [L].

    The depth of a cell is the number of its strict ancestors, the prompt included, that have
    two or more kept children: after a fork both lines are one deeper, and a fork of which one
    line was pruned does not count.
    """
    root, fork = forks(tree)
    forked = along(tree, fork.astype(jnp.int32))  # [L, S]
    above = root.astype(jnp.int32) + jnp.cumsum(forked, axis=1) - forked  # strict ancestors
    cell = _by_cell(tree, above, lambda own, later: own)
    last = jnp.maximum(tree.leaf[:, 0], 0)
    leaf = jnp.take_along_axis(above, last[:, None], axis=1)[:, 0]
    return cell, jnp.where(leaf_valid(tree), leaf, 0)


def node_heads(tree: Tree) -> jax.Array:
    """The first cell of every node, a node being a chain of kept cells between forks: bool [S, K]."""
    root, fork = forks(tree)
    above = jnp.take_along_axis(fork[:-1], jnp.maximum(tree.parent[1:], 0), axis=1)
    start = jnp.concatenate([jnp.ones_like(fork[:1]), above])
    return kept(tree) & start


def spread(
    tree: Tree,
    *,
    leaf_credit: jax.Array | None = None,
    cell_credit: jax.Array | None = None,
    leaf_weight: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Turns credit into the three numbers per cell that packing and losses read.

    The clipped objective of a token shared by leaves with credits A_k is exactly
        sum_k w_k min(r A_k, clip(r) A_k) = A+ min(r, 1 + eps) + A- max(r, 1 - eps),
    so a cell needs the weighted sums of positive and of negative credit, and its weight.

    Args:
      leaf_credit: [L], counted once for every leaf at or below a cell, or
      cell_credit: [S, K], counted once a cell.
      leaf_weight: [L], weight of each token of a leaf (1 by default: every token of every
        rollout counts alike; 1 / length gives every rollout the same). With cell credit, a
        cell weighs 1 whatever the number of leaves below, or up(leaf_weight) when given.

    Returns:
      (positive, negative, weight), each float32 [S, K], zero outside `kept`.
    """
    if (leaf_credit is None) == (cell_credit is None):
        raise ValueError("spread: give leaf_credit or cell_credit, and not both.")
    leaves, cells = _sizes(tree)
    if leaf_weight is not None:
        _require_shape("leaf_weight", leaf_weight, leaves)
    if cell_credit is not None:
        _require_shape("cell_credit", cell_credit, cells)
        weight = kept(tree).astype(jnp.float32) if leaf_weight is None else up(tree, leaf_weight)
        weight = jnp.where(kept(tree), weight, 0)
        credit = jnp.where(kept(tree), cell_credit, 0)
        return weight * jnp.maximum(credit, 0), weight * jnp.minimum(credit, 0), weight
    _require_shape("leaf_credit", leaf_credit, leaves)
    weight = jnp.ones(leaves) if leaf_weight is None else leaf_weight
    weight = jnp.where(leaf_valid(tree), weight, 0)
    credit = jnp.where(leaf_valid(tree), leaf_credit, 0)
    each = jnp.stack([weight * jnp.maximum(credit, 0), weight * jnp.minimum(credit, 0), weight], axis=-1)
    return tuple(jnp.moveaxis(up(tree, each), -1, 0))


@jax.jit
def paths(parent: jax.Array, leaf: jax.Array) -> jax.Array:
    """Follows parents upwards from each leaf: parent [S, K], leaf [L, 2] -> leaf_path [L, S]."""

    def step(column, row):
        column = jnp.where(leaf[:, 0] == row, leaf[:, 1], column)
        above = jnp.where(column >= 0, parent[row, jnp.maximum(column, 0)], NONE)
        return above, column

    rows = jnp.arange(parent.shape[0])
    _, path = jax.lax.scan(step, jnp.full(leaf.shape[:1], NONE, leaf.dtype), rows, reverse=True)
    return path.T


def from_parents(parent, used, leaves, **fields) -> Tree:
    """Builds one tree by hand.

    Args:
      parent: [S, K] int, column of the parent in the row above; ignored in row 0.
      used: [S, K] bool.
      leaves: [L, 2] int, (row, column) of each end, -1 where missing.
      **fields: any other field of Tree; tokens default to 0, ends of leaves to FINISHED.
    """
    parent = jnp.asarray(parent, jnp.int32).at[0].set(NONE)
    used = jnp.asarray(used, bool)
    leaf = jnp.asarray(leaves, jnp.int32).reshape(-1, 2)
    chex.assert_equal_shape([parent, used])
    zero = jnp.zeros(parent.shape, jnp.float32)
    rows = jnp.where(leaf[:, 0] >= 0, leaf[:, 0], parent.shape[0])  # out of range: dropped
    ends = jnp.zeros(parent.shape, jnp.int8).at[rows, leaf[:, 1]].set(FINISHED, mode="drop")
    default = dict(
        token=zero.astype(jnp.int32), parent=jnp.where(used, parent, NONE), used=used,
        source=zero.astype(jnp.int8), end=ends, entropy=zero, logp_behavior=zero,
        logp_policy=zero, leaf=leaf, leaf_path=paths(parent, leaf),
    )  # fmt: skip
    return Tree(**{**default, **fields})


def check(tree: Tree) -> None:
    """Asserts the invariants of one tree, on the host; raises ValueError naming the first broken.

    Every field has the shape of one tree; a used cell below row 0 of a kept path has a used parent;
    every leaf is FINISHED or TRUNCATED, in range, and no two leaves share a cell or lie on each
    other's path; leaf_path follows the parents; log-probs of kept cells are finite and not
    positive; sources and ends are known; turns number the cells of each path from 0, no two steps apart, and those
    carried out come first.
    """
    t = jax.tree.map(np.asarray, tree)
    (leaves,), (rows, slots) = _sizes(tree)
    shapes = dict(leaf=(leaves, 2), leaf_path=(leaves, rows))
    for field in dataclasses.fields(Tree):
        if field.name == "turns":
            continue
        _require_shape(field.name, getattr(t, field.name), shapes.get(field.name, (rows, slots)))

    _require((t.parent >= NONE) & (t.parent < slots), "a parent column is out of range")
    _require(t.parent[0] == NONE, "a cell of row 0 has a parent other than the prompt")
    _require(np.isin(t.source, (SAMPLED, FORCED, ENVIRONMENT)), "unknown source")
    valid = t.leaf[:, 0] >= 0
    _require((t.leaf[valid] >= 0) & (t.leaf[valid] < (rows, slots)), "a leaf is out of range")
    ends = t.end[t.leaf[valid, 0], t.leaf[valid, 1]]
    _require(np.isin(ends, (FINISHED, TRUNCATED)), "a leaf is neither FINISHED nor TRUNCATED")
    _require(len({tuple(x) for x in t.leaf[valid]}) == valid.sum(), "two leaves share a cell")
    want = np.asarray(paths(jnp.asarray(t.parent), jnp.asarray(t.leaf)))
    _require(t.leaf_path == want, "leaf_path does not follow the parents")
    seen = np.zeros((rows, slots), bool)
    for (row, _), path in zip(t.leaf[valid], t.leaf_path[valid]):
        on = np.arange(row + 1), path[: row + 1]
        _require(path[: row + 1] >= 0, "a path to a leaf is broken")
        _require(t.used[on], "a path to a leaf crosses an unused cell")
        _require(t.end[on][:-1] == RUNNING, "a line goes on below its end")
        seen[on] = True
    _require(np.isfinite(t.logp_behavior[seen]) & (t.logp_behavior[seen] <= 1e-5), "logp_behavior is not a log-prob")
    _require(np.isfinite(t.logp_policy[seen]) & (t.logp_policy[seen] <= 1e-5), "logp_policy is not a log-prob")
    forced = seen & (t.source != SAMPLED)
    _require(t.logp_behavior[forced] == 0, "a forced token has a behaviour log-prob other than 0")
    if t.turns is not None:
        _require_shape("turns.turn", t.turns.turn, (rows, slots))
        for path, carried in zip(t.leaf_path[valid], t.turns.valid[valid]):
            line = t.turns.turn[np.arange(rows), path][path >= 0]
            _require(line[0] == 0 and np.isin(np.diff(line), (0, 1)).all(), "turns do not count up along a path")
            _require(~np.diff(carried.astype(int)).clip(0).any(), "a turn was carried out after one that was not")
            _require(carried.sum() in (line[-1], line[-1] + 1), "the turns carried out are not those of the path")


def token_count(tree: Tree) -> tuple[jax.Array, jax.Array]:
    """(unique tokens on paths to leaves, tokens of the flattened rollouts), each int32 []."""
    lengths = masked.total(leaf_length(tree), leaf_valid(tree))
    return jnp.sum(kept(tree)), lengths
