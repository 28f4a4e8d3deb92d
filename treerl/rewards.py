"""Grade the leaves of trees."""
from typing import Callable

import jax

from treerl import tree as T


def grade(tree: T.Tree, data, grader: Callable) -> jax.Array:
    """Grades every leaf on the device: float32 [B, L], 0 where there is no leaf.

    Args:
      tree: batched. data: pytree of [B, ...], the task's own.
      grader: grader(tokens [S] int32, length [] int32, data) -> [] float32, for one answer.
    """

    def one_tree(tree, data):
        tokens, length = T.along(tree, tree.token), T.leaf_length(tree)
        reward = jax.vmap(grader, in_axes=(0, 0, None))(tokens, length, data)
        return jax.numpy.where(T.leaf_valid(tree), reward, 0.0)

    return jax.vmap(one_tree)(tree, data)


def overlong(tree: T.Tree, buffer: int) -> jax.Array:
    """Soft punishment of length: 0 up to S - buffer tokens, then falling to -1 at S: float32 [L].

    DAPO, arXiv 2503.14476, eq. 13, with S rows as its longest answer. An answer cut off there has -1.

    Args:
      tree: one tree. buffer: tokens over which it falls, at least 1.
    """
    allowed = tree.token.shape[0] - buffer
    punished = -(T.leaf_length(tree) - allowed).astype(jax.numpy.float32) / buffer
    return jax.numpy.where(T.leaf_valid(tree), jax.numpy.clip(punished, -1.0, 0.0), 0.0)
