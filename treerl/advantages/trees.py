"""Estimators of other tree trainers, on any tree: a node is a chain of cells between forks, or a segment."""

from typing import Literal

import chex
import jax
import jax.numpy as jnp

from treerl import masked, tree as T
from treerl.advantages import levels as N
from treerl.advantages.flat import ROUNDING, rloo


def eptree(tree: T.Tree, reward: jax.Array, *, segment: int = 0, scale: Literal["paper", "code", "none"] = "paper") -> jax.Array:
    """Adds what a node is worth to what it gained over its parent: A(n) = (GA + LA) / sqrt(leaves below n).

    TreeRL, arXiv 2506.11902, section 3.3: V(n) = mean over the leaves below of r_l - mean of the others
    (RLOO over all leaves), GA = V(n) - V(root), LA = V(n) - V(parent).

    What differs from flat GRPO: credit belongs to cells, no standard deviation, and a local term:
    a node under a good parent that lowered the value gets less. Paper and released code: the code
    divides V by sqrt(leaves) before the differences (`scale=code`), so that LA mixes two scales,
    and counts only the leaves it selected for training, which here are all; where |LA| < 1e-8
    it repeats the LA of the node before, which is not done here; its optional token-weighted
    centring (off in its script) is left out.

    Args:
      tree: one tree. reward: [L] float32. segment: see `levels`.

    Returns:
      Cell credit, float32 [S, K], 0 outside kept cells.
    """
    nodes = N.levels(tree, segment)
    value = N.leaf_values(nodes, rloo(tree, reward))
    size = N.each(lambda same, _: jnp.sum(same, axis=1), nodes)
    shrink = jnp.sqrt(jnp.maximum(size, 1).astype(jnp.float32))
    if scale == "code":
        value = value / shrink
    advantage = (value - value[:, :1]) + (value - N.above(value))
    if scale == "paper":
        advantage = advantage / shrink
    return N.to_cells(tree, nodes, jnp.where(nodes.real, advantage, 0.0))


def spo_tree(tree: T.Tree, reward: jax.Array, *, segment: int = 0, std: bool = False, eps: float = 1e-8) -> jax.Array:
    """Gives a node what it gained over its parent: A(n) = V(n) - V(parent), V the mean of the children's values.

    SPO-tree, arXiv 2505.23564, section 4.2. The credit along a path sums to r_leaf - V(root), that of
    siblings to zero. What differs from flat GRPO: credit belongs to cells, each counted once, and is purely local.
    The paper cuts segments of M tokens and forks at every cut: set `segment` = M for its depths;
    by default a node is a chain between forks. The released code also drops edges whose advantage
    is zero, which have no gradient here either.

    Args:
      tree: one tree. reward: [L] float32. segment: see `levels`.
      std: divide by the population standard deviation of the parent's children + eps (the code's "grpo" option).

    Returns:
      Cell credit, float32 [S, K], 0 outside kept cells.
    """
    chex.assert_equal_shape([reward, tree.leaf[:, 0]])
    nodes = N.levels(tree, segment)
    value, spread = N.child_values(nodes, reward)
    advantage, spread = value - N.above(value), N.above(spread)
    if std:
        advantage = advantage / (spread + eps)
    return N.to_cells(tree, nodes, jnp.where(nodes.real & (spread >= ROUNDING), advantage, 0.0))


def treepo(
    tree: T.Tree, reward: jax.Array, *, segment: int = 0, weight: Literal["average", "size"] = "average", skip_equal: bool = False
) -> jax.Array:
    """Averages a leaf's advantage over the groups it belongs to: A_l = mean over levels d of r_l - mean(group_d).

    TreePO, arXiv 2508.17445: group 0 is the prompt's, group d the leaves that share the leaf's prefix of d
    levels; a group of one is skipped, except the prompt's. `whiten` then normalises over all tokens of the batch.

    What differs from flat GRPO: leaves close in the tree are compared more often; no group's
    standard deviation. The paper's levels are segments of 512 tokens, each a fork: set `segment` for those.

    Args:
      tree: one tree. reward: [L] float32. segment: see `levels`.
      weight: "average", the script's and the paper's better; "size" weighs a group by its leaves (the code's default).
      skip_equal: leave out groups whose rewards are all the same (an option of the code).

    Returns:
      Leaf credit, float32 [L], 0 where there is no leaf.
    """
    chex.assert_equal_shape([reward, tree.leaf[:, 0]])
    nodes = N.levels(tree, segment)

    def group(same, _):
        r = jnp.broadcast_to(reward, same.shape)
        return jnp.sum(same, axis=1), masked.mean(r, same, axis=1), masked.std(r, same, axis=1, ddof=1)

    size, mean, spread = N.each(group, nodes)  # [L, D]
    use = T.leaf_valid(tree)[:, None] & ((size >= 2) | (jnp.arange(size.shape[1]) == 0))
    if skip_equal:
        use &= spread >= ROUNDING
    advantage = reward[:, None] - mean
    advantage = masked.mean(advantage, use, axis=1, weight=size if weight == "size" else 1.0)
    contrast = masked.std(reward, T.leaf_valid(tree), ddof=1) >= ROUNDING
    return jnp.where(contrast, advantage, 0.0)


def tree_grpo(tree: T.Tree, reward: jax.Array, *, inter: bool = True, intra: bool = True, std: bool = True, eps: float = 1e-6) -> jax.Array:
    """Adds GRPO among the leaves of the prompt and GRPO among the leaves of the same tree.

    Tree-GRPO, arXiv 2509.21240, section 3.3: A = A_inter + A_intra. A prompt's trees are the leaves that
    share the first token's cell, so a grid that starts one line has one tree, and A = 2 GRPO.

    What differs from flat GRPO: the second term. A tree of one leaf gets A_intra = 0 (the released
    code gives it the raw reward). Its variants are `inter=False` (tree_inner) and, with both, the sum.

    Args:
      tree: one tree. reward: [L] float32. std: divide by the standard deviation of the group.

    Returns:
      Leaf credit, float32 [L], 0 where there is no leaf.
    """
    chex.assert_equal_shape([reward, tree.leaf[:, 0]])
    if not (inter or intra):
        raise ValueError("inter=False and intra=False leave no credit; set one of them to True.")
    valid = T.leaf_valid(tree)
    everyone = valid[:, None] & valid
    total = jnp.zeros_like(reward)
    for use, group in ((inter, everyone), (intra, everyone & (T.shared_rows(tree) > 0))):
        values = jnp.broadcast_to(reward, group.shape)
        spread = masked.std(values, group, axis=-1, ddof=1)
        advantage = (reward - masked.mean(values, group, axis=-1)) / ((spread + eps) if std else 1.0)
        total = total + use * jnp.where(valid & (spread >= ROUNDING), advantage, 0.0)
    return total
