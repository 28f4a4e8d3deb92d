"""BranchGRPO's depth-wise advantages, carried from denoising steps to trees of text."""
import chex
import jax
import jax.numpy as jnp

from treerl import masked
from treerl import tree as T


def branch_depthwise(
    tree: T.Tree,
    reward: jax.Array,
    *,
    virtual: bool = True,
    std: bool = True,
    eps: float = 1e-6,
    clip: float = 5.0,
) -> jax.Array:
    """Fuses leaf rewards into nodes, then normalises among the nodes of one depth.

    BranchGRPO, arXiv 2509.06040, eq. 3 with beta = 0 and eq. 4:
        value(n) = mean reward of the leaves below n,
        A(n) = clip((value(n) - mean_d) / (std_d + eps), -clip, clip)   over nodes of depth d.
    A node is a chain of cells between forks and counts once; the cells of a node share its A.

    What differs from flat GRPO: credit belongs to cells, each counted once however many leaves
    share it; and it is compared among nodes that survived equally many forks. A tree that forks
    only at the prompt is flat GRPO.

    What the paper leaves open for text, and the choice here:
      - depth = forks survived (a denoising step has no counterpart in text);
      - a leaf that ended above depth d counts there as a `virtual` node without gradient, so
        late depths do not compare survivors only (False: the released code's semantics);
      - value = mean over all leaves below (released code), not mean of the children's means;
      - the pool is the whole depth of one tree (eq. 4), not siblings: A has no local term;
      - sample standard deviation (ddof 1); a depth with one node, or with std < 1e-6, gets zero
        (both as the released code). A depth of two nodes is therefore a pure sign, +-0.707;
      - leaves of pruned lines are in no statistic: they were neither finished nor graded;
      - a forced token is credited like a drawn one, with the ratio of the tempered policy, as LATR
        does; a fork has no noise scale;
      - the loss divides by the kept cells (tokens), not by edges: ratios are per token.

    Args:
      tree: one tree. reward: [L] float32.
      std: divide by the standard deviation of the depth.

    Returns:
      Cell credit, float32 [S, K], 0 outside kept cells.
    """
    chex.assert_equal_shape([reward, tree.leaf[:, 0]])
    valid = T.leaf_valid(tree)
    depths = jnp.arange(reward.shape[0])  # every fork adds a leaf, so depth < L
    cell_depth, leaf_depth = T.depth(tree)
    below = T.leaf_count(tree)
    value = T.up(tree, jnp.where(valid, reward, 0)) / jnp.maximum(below, 1)

    node = T.node_heads(tree).reshape(-1)
    member = node[None] & (cell_depth.reshape(-1)[None] == depths[:, None])  # [depths, S * K]
    ended = (valid & (leaf_depth < depths[:, None])) if virtual else jnp.zeros((depths.size,) * 2, bool)
    values = jnp.concatenate([value.reshape(-1), reward])
    pool = jnp.concatenate([member, ended], axis=1)
    values = jnp.broadcast_to(values, pool.shape)
    centre = masked.mean(values, pool, axis=1)
    spread = masked.std(values, pool, axis=1, ddof=1)

    advantage = value - centre[cell_depth]
    if std:
        advantage = advantage / (spread[cell_depth] + eps)
    useful = T.kept(tree) & (spread[cell_depth] >= 1e-6)
    return jnp.where(useful, jnp.clip(advantage, -clip, clip), 0.0)
