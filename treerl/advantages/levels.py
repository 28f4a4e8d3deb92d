"""A tree as levels of nodes: what every tree estimator reads, with leaves as the only axis.

Level 0 is the prompt. Every leaf stands on one node a level; a node is the set of leaves that
stand on it, its first leaf counts it. A leaf that ended above a level is a node of its own there
(`real` is False): statistics may include it, gradients do not.
"""
from typing import NamedTuple

import jax
import jax.numpy as jnp

from treerl import tree as T


class Levels(NamedTuple):
    """Nodes of one tree; D levels."""

    at: jax.Array  # [L, S] int32, level of each cell of a leaf's path; -1 below the leaf
    last: jax.Array  # [L, D] int32, row of the node's last cell, -1 if it has none
    real: jax.Array  # [L, D] bool, whether the leaf's path has a cell of the level
    same: jax.Array  # [D, L, L] bool, whether two leaves stand on the same node; False for missing leaves
    first: jax.Array  # [L, D] bool, whether the leaf is its node's first


def shared_rows(tree: T.Tree) -> jax.Array:
    """Rows that the paths of two leaves have in common, their own lengths on the diagonal: int32 [L, L]."""
    path = tree.leaf_path
    return jnp.sum((path[:, None] == path[None]) & (path >= 0)[:, None], axis=-1)


def levels(tree: T.Tree, segment: int = 0) -> Levels:
    """Levels by forks, or by segments of a fixed number of tokens.

    Args:
      segment: 0: a level is a number of forks survived (`tree.depth`), and a node a chain of
        cells between forks; D = L. Otherwise (static) cells of rows (d - 1) * segment .. d * segment - 1
        are level d and a node is a distinct prefix of d segments; D = 1 + ceil(S / segment). A
        cell above a fork inside its segment belongs to several nodes and gets their mean.
    """
    valid, length = T.leaf_valid(tree), T.leaf_length(tree)
    leaves, rows = tree.leaf_path.shape
    if segment:
        count = 1 + -(-rows // segment)
        at = jnp.broadcast_to(1 + jnp.arange(rows) // segment, (leaves, rows))
        last = jnp.minimum(jnp.arange(count) * segment, length[:, None]) - 1
    else:
        count = leaves
        root, fork = T.forks(tree)
        forked = T.along(tree, fork.astype(jnp.int32))
        at = root.astype(jnp.int32) + jnp.cumsum(forked, axis=1) - forked
        on_path = (tree.leaf_path >= 0)[:, None]
        last = jnp.sum(on_path & (at[:, None] <= jnp.arange(count)[:, None]), axis=-1) - 1
    at = jnp.where(tree.leaf_path >= 0, at, -1)
    before = jnp.concatenate([jnp.full((leaves, 1), -1), last[:, :-1]], axis=1)
    same = (shared_rows(tree) > last.T[..., None]) & valid[:, None] & valid
    first = jnp.argmax(same, axis=-1).T == jnp.arange(leaves)[:, None]
    return Levels(at=at, last=last, real=valid[:, None] & (last > before), same=same, first=first & valid[:, None])


def path_logp(tree: T.Tree, last: jax.Array) -> jax.Array:
    """Log-prob of each leaf's path down to a row, by the tempered policy: last [L, D] -> [L, D]."""
    total = jnp.cumsum(T.along(tree, tree.logp_policy), axis=1)
    return jnp.where(last >= 0, jnp.take_along_axis(total, jnp.maximum(last, 0), axis=1), 0.0)


def leaf_values(nodes: Levels, reward: jax.Array, weight: jax.Array | None = None) -> jax.Array:
    """Mean reward of the leaves on each node: [L, D].

    Args:
      reward: [L]. weight: [L] log-weights, normalised among the leaves of each node; None: uniform.
    """
    if weight is None:
        count = jnp.sum(nodes.same, axis=-1)
        return (jnp.sum(jnp.where(nodes.same, reward, 0), axis=-1) / jnp.maximum(count, 1)).T
    top = jnp.max(jnp.where(nodes.same, weight, -jnp.inf), axis=-1, keepdims=True)
    share = jnp.where(nodes.same, jnp.exp(weight - jnp.where(jnp.isfinite(top), top, 0)), 0)
    total = jnp.sum(share, axis=-1)
    return (jnp.sum(share * jnp.where(nodes.same, reward, 0), axis=-1) / jnp.where(total > 0, total, 1)).T


def child_values(nodes: Levels, reward: jax.Array, weight: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Values from the leaves upwards, a node's being the mean of its children's, and their deviation.

    Args:
      reward: [L]. weight: [L, D] log-weights of nodes, normalised among siblings; None: uniform.

    Returns:
      (value [L, D], population standard deviation of the children's values [L, D]).
    """
    weight = jnp.zeros(nodes.first.shape) if weight is None else weight

    def up(value, level):
        same, child, weight = level
        mask = same & child  # [L, L], the children below each leaf's node
        top = jnp.max(jnp.where(mask, weight, -jnp.inf), axis=-1, keepdims=True)
        share = jnp.where(mask, jnp.exp(weight - jnp.where(jnp.isfinite(top), top, 0)), 0)
        share = share / jnp.maximum(jnp.sum(share, axis=-1, keepdims=True), 1e-30)
        mean = jnp.sum(share * value, axis=-1)
        count = jnp.maximum(jnp.sum(mask, axis=-1), 1)
        centre = jnp.sum(jnp.where(mask, value, 0), axis=-1, keepdims=True) / count[:, None]
        spread = jnp.sqrt(jnp.sum(jnp.where(mask, jnp.square(value - centre), 0), axis=-1) / count)
        return mean, (mean, spread)

    bottom = jnp.where(nodes.same[-1].any(-1), reward, 0)  # at the last level every leaf is alone
    inner = nodes.same[:-1], nodes.first.T[1:], weight.T[1:]
    _, (value, spread) = jax.lax.scan(up, bottom, inner, reverse=True)
    none = jnp.zeros_like(bottom)[None]
    return jnp.concatenate([value, bottom[None]]).T, jnp.concatenate([spread, none]).T


def above(x: jax.Array) -> jax.Array:
    """A node's number, read by its children: [L, D] -> [L, D]; the prompt reads its own."""
    return jnp.concatenate([x[:, :1], x[:, :-1]], axis=1)


def to_cells(tree: T.Tree, nodes: Levels, x: jax.Array) -> jax.Array:
    """Numbers of nodes [L, D] as numbers of their cells [S, K], 0 outside kept cells."""
    return T.mean_below(tree, jnp.take_along_axis(x, jnp.maximum(nodes.at, 0), axis=1))
