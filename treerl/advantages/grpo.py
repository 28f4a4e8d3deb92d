"""Group-relative policy optimisation: the baseline of every other estimator."""
import chex
import jax
import jax.numpy as jnp

from treerl import masked
from treerl import tree as T


def grpo(tree: T.Tree, reward: jax.Array, *, std: bool = True, eps: float = 1e-6) -> jax.Array:
    """Normalises rewards within the group: A_l = (r_l - mean) / (std + eps).

    GRPO, arXiv 2402.03300, eq. 10 (outcome supervision), with the sample standard deviation
    (ddof 1) of the released trainers. A group with at most one leaf, or whose rewards differ by
    less than rounding (std < 1e-6), gets exactly zero.

    Args:
      tree: one tree; only its leaf table is read. reward: [L] float32.
      std: divide by the standard deviation (False gives Dr. GRPO's advantage).

    Returns:
      Leaf credit, float32 [L], 0 where there is no leaf.
    """
    chex.assert_equal_shape([reward, tree.leaf[:, 0]])
    valid = T.leaf_valid(tree)
    spread = masked.std(reward, valid, ddof=1)
    advantage = reward - masked.mean(reward, valid)
    if std:
        advantage = advantage / (spread + eps)
    return jnp.where(valid & (spread >= 1e-6), advantage, 0.0)
