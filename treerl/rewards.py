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
