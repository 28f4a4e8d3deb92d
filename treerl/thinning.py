"""Which part of a finished, graded tree is kept: cells that are trained on, leaves that share a cache.

A thinning rule is a pure function of one tree; callers vmap:

    rule(tree, reward [L], credit [S, K] or [L], *, ...) -> trained [S, K] bool, True for kept cells only

It says what the backward pass skips. Rollouts, rewards and advantages are what they were: statistics
are taken before thinning, and credit is not renormalised after it. Whoever applies a rule zeroes
positive and negative credit elsewhere. Leaving the weights as they are keeps the denominator of the
whole tree, so that the gradient is a part of the whole one; zeroing them too divides by what is
trained on, as BranchGRPO's released code does.
"""

from typing import Literal

import chex
import jax
import jax.numpy as jnp

from treerl import tree as T

UNIT = 1 << 24  # `coverage` adds whole numbers of 1 / UNIT: exact in any order, so ties are ties


def width(
    tree: T.Tree,
    reward: jax.Array,
    credit: jax.Array,
    *,
    mode: Literal["parent_top1", "extreme"] = "parent_top1",
    ratio: float = 0.5,
) -> jax.Array:
    """Trains on the paths of some leaves only.

    BranchGRPO, arXiv 2509.06040, width pruning; a leaf's value is its reward:
      - parent_top1: where all children of a node are leaves (they fork no more), the best of them
        stays. A leaf with a sibling that forks again stays too;
      - extreme: of n leaves the best b and the worst b of the whole tree stay,
            b = max(1, floor(ratio * n / 2)).
    A cell is trained on if a leaf that stays is at or below it. Ties: the first leaf is the better one.

    What differs from the paper: its trees fork everywhere at the same depths, so "the last fork" is
    one depth; here every line has its own. Its ratio keeps an even number of leaves: with an odd n a
    ratio of 1 drops the median leaf, and 2 keeps all.

    What differs from the released code, which thins edges below the last fork by their advantage:
      - its mode 1, called best per branch, groups those edges by the child of the last fork. A group is
        one chain of equal advantages, of which the first half stays: all leaves are trained on, to
        half their length, and no sibling is compared. This is the paper's rule instead;
      - its mode 2 pools edges, keeps max(2, floor(ratio * n)) of them and one more of the worst if that
        is odd. Edges of a chain tie, so its cut may fall inside one. Here leaves are counted;
      - edges at or above the last fork are always trained on. Here `extreme` also drops those that lead
        to no leaf that stays.

    Args:
      tree: one tree. reward: [L] float32. credit: [S, K] or [L], not read.
      mode: static. ratio: [], share of leaves that stay; read by extreme.

    Returns:
      Cells trained on, bool [S, K].

    Raises:
      ValueError: unknown mode.
    """
    _require(tree, reward, credit)
    if mode not in ("parent_top1", "extreme"):
        raise ValueError(f'width: mode is {mode!r}; use "parent_top1" or "extreme".')
    valid = T.leaf_valid(tree)
    rank = _rank(reward, valid)
    if mode == "extreme":
        n = jnp.sum(valid)
        # a product that is a whole number falls below it in float32: 0.53 * 200 / 2
        b = jnp.maximum(1, jnp.floor(ratio * n / 2 + 1e-4).astype(jnp.int32))
        return below(tree, valid & ((rank < b) | (rank >= n - b)))

    shared = T.shared_rows(tree)
    alone = jnp.eye(shared.shape[0], dtype=bool)
    fork = jnp.max(jnp.where(alone, 0, shared), axis=1, initial=0)  # rows above the leaf's last fork
    family = valid[:, None] & valid & (shared >= fork[:, None])  # all leaves below that fork
    cherry = jnp.all(~family | (fork == fork[:, None]), axis=1)  # none of them forks again
    best = jnp.min(jnp.where(family, rank, rank.size), axis=1, initial=rank.size)
    return below(tree, valid & (~cherry | (rank == best)))


def depth(tree: T.Tree, reward: jax.Array, credit: jax.Array, *, first: jax.Array, length: jax.Array) -> jax.Array:
    """Leaves out the cells whose depth, the number of forks survived (`tree.depth`), is in [first, first + length).

    BranchGRPO, arXiv 2509.06040, depth pruning; `window` slides `first` along.

    What differs from the paper and its code: a depth is a number of forks, not a denoising step, and so
    a node of any number of tokens; the code also takes a list of depths with gaps.

    Args:
      tree: one tree. reward: [L]. credit: [S, K] or [L]. Neither is read.
      first, length: [] int32, may be traced; depths that no cell has leave out nothing.

    Returns:
      Cells trained on, bool [S, K].
    """
    _require(tree, reward, credit)
    at, _ = T.depth(tree)
    return T.kept(tree) & ~((at >= first) & (at < first + length))


def window(step: jax.Array, *, start: int, length: int, interval: int, stop: int, direction: Literal["up", "down"]):
    """First depth of a window that moves by one depth every `interval` steps, until its leading edge is at `stop`.

    BranchGRPO, arXiv 2509.06040, sliding window of depth pruning:
        up, towards the prompt:     start - min(step // interval, max(0, start - stop))
        down, towards the leaves:   start + min(step // interval, max(0, stop - (start + length - 1)))

    Up is what the released code does, from late depths to earlier ones. Of the paper it is told that the window
    starts at the last fork and moves down; that one stops in mirror image, with its last depth at `stop`.
    A window that starts beyond `stop` stays. The code ends pruning after a share of the run: the
    caller's, as length 0.

    Args:
      step: [] int32, training step, may be traced.
      start: first depth of the window at step 0. length: its number of depths.
      interval: steps between two moves. stop: the depth that the leading edge does not pass.
      direction: static.

    Returns:
      [] int32, `first` of `depth`.

    Raises:
      ValueError: unknown direction.
    """
    if direction not in ("up", "down"):
        raise ValueError(f'window: direction is {direction!r}; use "up" or "down".')
    if isinstance(interval, int) and interval < 1:
        raise ValueError(f"interval={interval} never moves the window; set it to 1 or more.")
    way = start - stop if direction == "up" else stop - (start + length - 1)
    moves = jnp.minimum(jnp.asarray(step) // interval, jnp.maximum(0, way))
    return jnp.int32(start - moves if direction == "up" else start + moves)


def sliding_depth(
    tree: T.Tree, reward: jax.Array, credit: jax.Array, step: jax.Array,
    *, start: int = 2, length: int = 1, interval: int = 30, stop: int = 0, direction: Literal["up", "down"] = "up",
) -> jax.Array:  # fmt: skip
    """Leaves out the depths of a sliding window: `depth` with `window` at a training step [] int32."""
    first = window(step, start=start, length=length, interval=interval, stop=stop, direction=direction)
    return depth(tree, reward, credit, first=first, length=length)


def covering(
    tree: T.Tree, reward: jax.Array, credit: jax.Array,
    *, keep: float = 0.5, share_cost: float = 1.0, cover_gain: float = 1.5, temperature: float = 0.2, level: int = 1,
) -> jax.Array:  # fmt: skip
    """Trains on the paths of the leaves that `coverage` chooses by their rewards."""
    _require(tree, reward, credit)
    if not (keep > 0 and temperature > 0 and min(share_cost, cover_gain) >= 0 and share_cost + cover_gain <= 100):
        raise ValueError("keep and temperature must be above 0, share_cost and cover_gain from 0 to 100 together.")
    options = dict(keep=keep, share_cost=share_cost, cover_gain=cover_gain, temperature=temperature, level=level)
    return below(tree, coverage(tree, reward, **options))


RULES = {"width": width, "depth": sliding_depth, "coverage": covering}


def coverage(
    tree: T.Tree,
    score: jax.Array,
    *,
    keep: int | float | jax.Array,
    share_cost: jax.Array = 1.0,
    cover_gain: jax.Array = 1.5,
    temperature: jax.Array = 0.2,
    level: int = 1,
    row: int | None = None,
) -> jax.Array:
    """Chooses leaves with high scores that share their cache and differ in content; the choice is optimal.

    ETS, arXiv 2502.13575. Of all sets X of 1 to `keep` leaves, the one with the greatest
        sum over l in X of o_l - share_cost * cells(X) / N + cover_gain * clusters(X) / C,
      o          softmax(score / temperature) over the leaves;
      cells(X)   cells at or above a leaf of X, each counted once: tokens in the cache below the prompt;
      N          cells at or above any leaf;
      clusters(X), C    clusters with a leaf in X, and with any leaf.
    Leaves are in one cluster if they stand on the same node of `level`, or on the same cell of `row`; one that
    ended above is a cluster of its own.

    The paper solves an integer program. Clusters that are nodes need none: with the leaves of X in depth-first
    order, leaf j shares most with the one before it, i, so it adds length_j - shared_ij cells, and a cluster
    unless i is in it. The objective is a sum over neighbours, so the best set is a longest path: O(L^3), and
    optimal but for rounding. On one CPU core: 0.8 ms for 64 leaves, 34 ms for 256.

    What differs from the paper's program and its released code:
      - a cell (token) costs, not a node (a reasoning step of any length), and the prompt costs nothing;
      - clusters are nodes of the tree; there, steps grouped by the cosine of their embeddings, which may
        join distant nodes;
      - o is the softmax itself; there, rounded up to whole shares of the next level's width and
        normalised again. Kept leaves get no shares here: it ends with the choice;
      - `keep` bounds the number of leaves; there, only the objective does: keep = 1.0;
      - share_cost = 0 costs nothing; the code turns it into a bonus of 1e-4. A leaf that changes nothing stays;
      - at depth d the paper judges live lines; here, the leaves of a tree.
    Terms are rounded to 2^-24 and sums are exact, so no choice depends on an order of addition. Ties: the
    greatest sum of ranks by score (more and better leaves), equal scores ranking by the first leaf; then the
    path found first.

    Args:
      tree: one tree. score: [L] float32.
      keep: [], most leaves to keep; a float is a share of the tree's leaves, rounded down, but never none. 1 is one
        leaf, 1.0 all of them. May be traced.
      share_cost, cover_gain: [], lambda_c and lambda_s; not negative, at most 100 in all. The paper: 1, and 1.4 to 1.5.
      temperature: [], of the softmax; the paper: 0.2.
      level: forks survived (`tree.depth`) by the nodes that are clusters; 0 puts all leaves into one.
      row: static; None: by level.

    Returns:
      Leaves that stay, bool [L]; `below` turns them into cells.
    """
    chex.assert_shape(score, tree.leaf.shape[:1])
    valid, length = T.leaf_valid(tree), T.leaf_length(tree)
    if score.size <= 1:
        return valid
    count, better = jnp.sum(valid), jnp.sum(valid) - _rank(score, valid)  # 1 for the worst leaf
    if jnp.issubdtype(jnp.result_type(keep), jnp.floating):
        keep = jnp.floor(keep * count + 1e-4)
    share = jnp.where(valid, jax.nn.softmax(jnp.where(valid, score / temperature, -jnp.inf)), 0)

    order, _ = T.leaf_order(tree)  # from here on, leaves are in depth-first order
    shared = T.shared_rows(tree)[order][:, order]
    valid, length, share, better = valid[order], length[order], share[order], better[order]
    together = shared > _cluster_end(tree, level, row)[order][:, None]
    clusters = jnp.sum(valid & ~jnp.any(jnp.triu(together, 1), axis=0))
    cell, cluster = share_cost / jnp.maximum(jnp.sum(T.kept(tree)), 1), cover_gain / jnp.maximum(clusters, 1)

    units = lambda x: jnp.round(x * UNIT).astype(jnp.int32)
    start = units(share - cell * length + cluster)
    step = units(share - cell * (length - shared) + cluster * ~together)  # [i, j], for j right after i
    chosen = _heaviest(start, step, better, valid, jnp.clip(keep, 1, score.size))
    return jnp.zeros_like(valid).at[order].set(chosen)


def _heaviest(start: jax.Array, step: jax.Array, better: jax.Array, valid: jax.Array, keep: jax.Array) -> jax.Array:
    """Set of 1 to `keep` leaves with the greatest start[first] + sum of step[leaf, next leaf], then sum of `better`.

    Args:
      start: [L] int32. step: [L, L] int32, read above the diagonal. better: [L] int32. valid: [L] bool.

    Returns:
      bool [L], no leaf if none is valid.
    """
    leaves = start.size
    ahead = valid[:, None] & valid & ~jnp.tri(leaves, dtype=bool)

    def longer(best, _):
        """From the best sets of m leaves that end with each leaf to those of m + 1."""
        value, ranks, real = best
        can = ahead & real[:, None]
        value, before = _best(value[:, None] + step, ranks[:, None], can)
        best = value, ranks[before] + better, jnp.any(can, axis=0)
        return best, (best, before)

    first = start, better, valid
    _, (more, before) = jax.lax.scan(longer, first, None, length=leaves - 1)
    value, ranks, real = jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), first, more)  # [m - 1, last leaf]
    allowed = real & (jnp.arange(leaves)[:, None] < keep)
    _, (winner,) = _best(value.reshape(-1, 1), ranks.reshape(-1, 1), allowed.reshape(-1, 1))
    size, last = winner // leaves, winner % leaves

    def back(leaf, m):
        on = m <= size  # before[m - 1] of m = 0 wraps, and is not read
        return jnp.where(on, before[m - 1, leaf], leaf), jnp.where(on, leaf, leaves)

    _, path = jax.lax.scan(back, last, jnp.arange(leaves), reverse=True)
    return jnp.zeros_like(valid).at[path].set(True, mode="drop") & valid


def below(tree: T.Tree, stay: jax.Array) -> jax.Array:
    """Cells with a leaf that stays at or below them: stay [L] bool -> [S, K] bool."""
    return T.up(tree, (stay & T.leaf_valid(tree)).astype(jnp.int32)) > 0


def _require(tree: T.Tree, reward: jax.Array, credit: jax.Array):
    """Refuses rewards and credit of another tree."""
    chex.assert_shape(reward, tree.leaf.shape[:1])
    chex.assert_shape(credit, reward.shape if credit.ndim == 1 else tree.token.shape)


def _rank(x: jax.Array, valid: jax.Array) -> jax.Array:
    """Place of each leaf from the highest x (0) down, the first of equals first, missing ones last: int32 [L]."""
    return jnp.argsort(jnp.lexsort((-x, ~valid)))


def _cluster_end(tree: T.Tree, level: int, row: int | None) -> jax.Array:
    """Last row that leaves of one cluster share: int32 [L]."""
    if row is not None:
        return jnp.minimum(row, T.leaf_length(tree) - 1)
    at, _ = T.depth(tree)
    return jnp.sum((T.along(tree, at) <= level) & (tree.leaf_path >= 0), axis=1) - 1


def _best(value: jax.Array, ranks: jax.Array, can: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Greatest value of each column and its row, by the greater rank among equals: [i, j] -> ([j], [j])."""
    top = jnp.max(jnp.where(can, value, jnp.iinfo(jnp.int32).min), axis=0)
    which = jnp.argmax(jnp.where(can & (value == top), ranks, -1), axis=0)
    return top, which
