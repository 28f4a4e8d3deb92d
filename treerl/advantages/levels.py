"""A tree as levels of nodes: what every tree estimator reads, with leaves as the only axis.

Level 0 is the prompt. Every leaf stands on one node a level; a node is the set of leaves that
stand on it, its first leaf counts it. A leaf that ended above a level is a node of its own there
(`real` is False): statistics may include it, gradients do not.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from treerl import masked, tree as T


class Levels(NamedTuple):
    """Nodes of one tree; D levels. Two leaves stand on the same node if they share its last row."""

    at: jax.Array  # [L, S] int32, level of each cell of a leaf's path; -1 below the leaf
    last: jax.Array  # [L, D] int32, row of the node's last cell, -1 if it has none
    real: jax.Array  # [L, D] bool, whether the leaf's path has a cell of the level
    shared: jax.Array  # [L, L] int32, see `tree.shared_rows`; -1 for missing leaves


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
        rise = jnp.where(tree.leaf_path >= 0, at, count)  # ascends along the path
        last = jax.vmap(lambda a: jnp.searchsorted(a, jnp.arange(count), side="right"))(rise) - 1
    at = jnp.where(tree.leaf_path >= 0, at, -1)
    before = jnp.concatenate([jnp.full((leaves, 1), -1), last[:, :-1]], axis=1)
    shared = jnp.where(valid[:, None] & valid, T.shared_rows(tree), -1)
    return Levels(at=at, last=last, real=valid[:, None] & (last > before), shared=shared)


def each(function, nodes: Levels, *numbers: jax.Array):
    """Runs a function level by level, so that no [D, L, L] array exists.

    Args:
      function: (same [L, L] bool, whether two leaves stand on the same node; first [L] bool,
        whether the leaf is its node's first; numbers of the level, each [L]) -> pytree of [L].
      numbers: [L, D].

    Returns:
      Pytree of [L, D].
    """

    def level(last, *numbers):
        same = on_one_node(nodes, last)
        return function(same, is_first(same), *numbers)

    result = jax.lax.map(lambda columns: level(*columns), tuple(x.T for x in (nodes.last, *numbers)))
    return jax.tree.map(lambda x: x.T, result)


def on_one_node(nodes: Levels, last: jax.Array) -> jax.Array:
    """Whether two leaves stand on the same node, whose last row is given [L]: bool [L, L], False for missing leaves."""
    return nodes.shared > jnp.maximum(last, -1)[:, None]


def is_first(same: jax.Array) -> jax.Array:
    """Whether a leaf is the first of its node: same [L, L] -> bool [L]."""
    return jnp.argmax(same, axis=1) == jnp.where(jnp.any(same, axis=1), jnp.arange(same.shape[0]), -1)


def path_logp(tree: T.Tree, last: jax.Array) -> jax.Array:
    """Log-prob of each leaf's path down to a row, by the tempered policy: last [L, D] -> [L, D]."""
    total = jnp.cumsum(T.along(tree, tree.logp_policy), axis=1)
    return jnp.where(last >= 0, jnp.take_along_axis(total, jnp.maximum(last, 0), axis=1), 0.0)


def softmax_mean(x: jax.Array, mask: jax.Array, weight: jax.Array) -> jax.Array:
    """Mean of x [L] over each row of mask [L, L], by a softmax of log-weights [L] in the row: [L], 0 for empty rows."""
    top = jnp.max(jnp.where(mask, weight, -jnp.inf), axis=1, keepdims=True)
    share = jnp.exp(jnp.where(mask, weight, -jnp.inf) - jnp.where(jnp.isfinite(top), top, 0))
    return masked.mean(jnp.broadcast_to(x, mask.shape), mask, axis=1, weight=share)


def leaf_values(nodes: Levels, reward: jax.Array, weight: jax.Array | None = None) -> jax.Array:
    """Mean reward of the leaves on each node: [L, D].

    Args:
      reward: [L]. weight: [L, D] log-weights, normalised among the leaves of each node; None: uniform.
    """
    if weight is None:
        return each(lambda same, _: masked.mean(jnp.broadcast_to(reward, same.shape), same, axis=1), nodes)
    return each(lambda same, _, weight: softmax_mean(reward, same, weight), nodes, weight)


def child_values(nodes: Levels, reward: jax.Array, weight: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Values from the leaves upwards, a node's being the mean of its children's, and their deviation.

    Args:
      reward: [L]. weight: [L, D] log-weights of nodes, normalised among siblings; None: uniform.

    Returns:
      (value [L, D], population standard deviation of the children's values [L, D]).
    """
    weight = jnp.zeros(nodes.last.shape) if weight is None else weight
    bottom = jnp.where(jnp.diagonal(nodes.shared) > 0, reward, 0.0)  # at the last level every leaf is alone

    def up(value, level):
        last, below, weight = level
        mask = on_one_node(nodes, last) & is_first(on_one_node(nodes, below))  # [L, L], the children of each leaf's node
        values = jnp.broadcast_to(value, mask.shape)
        mean = softmax_mean(value, mask, weight)
        return mean, (mean, masked.std(values, mask, axis=1))

    levels = nodes.last.T[:-1], nodes.last.T[1:], weight.T[1:]
    _, (value, spread) = jax.lax.scan(up, bottom, levels, reverse=True)
    none = jnp.zeros_like(bottom)[None]
    return jnp.concatenate([value, bottom[None]]).T, jnp.concatenate([spread, none]).T


def above(x: jax.Array) -> jax.Array:
    """A node's number, read by its children: [L, D] -> [L, D]; the prompt reads its own."""
    return jnp.concatenate([x[:, :1], x[:, :-1]], axis=1)


def to_cells(tree: T.Tree, nodes: Levels, x: jax.Array) -> jax.Array:
    """Numbers of nodes [L, D] as numbers of their cells [S, K], 0 outside kept cells."""
    return T.mean_below(tree, jnp.take_along_axis(x, jnp.maximum(nodes.at, 0), axis=1))
