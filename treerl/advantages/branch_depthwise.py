"""BranchGRPO's depth-wise advantages, carried from denoising steps to trees of text."""

from typing import Literal

import chex
import jax
import jax.numpy as jnp

from treerl import masked, tree as T
from treerl.advantages import levels as N


def branch_depthwise(
    tree: T.Tree,
    reward: jax.Array,
    *,
    fusion: Literal["leaf", "child"] = "leaf",
    beta: float = 0.0,
    per_token: bool = False,
    segment: int = 0,
    pool: Literal["prompt", "depth", "sibling"] = "prompt",
    virtual: bool = True,
    std: bool = True,
    ddof: int = 1,
    eps: float = 1e-6,
    clip: float = 5.0,
) -> jax.Array:
    """Fuses leaf rewards into nodes, then normalises among the nodes of one depth.

    BranchGRPO, arXiv 2509.06040, eq. 3 and 4:
        value(n) = sum over leaves l below n of w_l r_l,   w_l = softmax of beta * log p(l | n),
        A(n) = clip((value(n) - mean_d) / (std_d + eps), -clip, clip)   over nodes of depth d.
    A node counts once and its cells share its A.

    What differs from flat GRPO: credit belongs to cells, each counted once however many leaves
    share it; and it is compared among nodes of equal depth. A tree that forks only at the prompt
    is flat GRPO, unless `clip` binds (it cannot for fewer than 27 leaves). eps is GRPO's 1e-6; the released code has 1e-8.

    Where paper and released code disagree, or are silent for text, the default is:
      - beta = 0, the mean over all leaves below (the code's default). Leaves that are samples make it
        unbiased (children of a lookahead fork start with a forced token and are not); beta = 1 (the paper's better setting for images) counts the policy twice, and
        sums of token log-probs make it an argmax: set `per_token`;
      - fusion = leaf is eq. 3. child is the released code's: a softmax of beta * log p(child | n)
        among the children of each node, from the leaves upwards. They agree for one level of forks;
      - depth = forks survived (segment = 0), a denoising step having no counterpart in text.
        segment = M: prefixes of d * M tokens; 1: every token is a depth (the code's steps);
      - a leaf that ended above depth d counts there as a `virtual` node without gradient, so
        late depths do not compare survivors only (False: the released code's semantics);
      - pool = prompt: all nodes of the depth. depth: those grown from the same first token's
        cell, the trees of the paper where a prompt has several (each child of the prompt is the root of one).
        sibling: children of one node (the paper's appendix B.3 reasons about these);
      - sample standard deviation (ddof 1); a pool of one node, or with std < 1e-6, gets zero
        (both as the code). A pool of two is therefore a pure sign, +-0.707;
      - leaves of pruned lines are in no statistic: they were neither finished nor graded;
      - a fork has no noise scale, and the loss divides by kept cells (tokens), not by edges.

    Args:
      tree: one tree. reward: [L] float32.
      per_token: divide log p by its number of tokens. std: divide by the standard deviation.

    Returns:
      Cell credit, float32 [S, K], 0 outside kept cells.
    """
    chex.assert_equal_shape([reward, tree.leaf[:, 0]])
    nodes = N.levels(tree, segment)
    value = fuse(tree, nodes, reward, fusion, beta, per_token)

    valid, near = T.leaf_valid(tree), nodes.shared > 0

    def moments(same, first, value, real, above):
        member = first & (real | virtual)  # of the nodes that count
        if pool == "prompt":
            values = jnp.where(valid, value, 0)
            spread = jnp.broadcast_to(masked.std(values, member, ddof=ddof), value.shape)
            return jnp.broadcast_to(masked.mean(values, member), value.shape), spread
        mask = member & (near if pool == "depth" else N.on_one_node(nodes, above))
        values = jnp.broadcast_to(value, mask.shape)
        return masked.mean(values, mask, axis=1), masked.std(values, mask, axis=1, ddof=ddof)

    centre, spread = N.each(moments, nodes, value, nodes.real, N.above(nodes.last))
    advantage = value - centre
    if std:
        advantage = advantage / (spread + eps)
    useful = nodes.real & (spread >= 1e-6)
    return N.to_cells(tree, nodes, jnp.where(useful, jnp.clip(advantage, -clip, clip), 0.0))


def fuse(tree: T.Tree, nodes: N.Levels, reward, fusion: str, beta, per_token: bool) -> jax.Array:
    """Values of nodes from rewards of leaves, see `branch_depthwise`: [L] -> [L, D]."""
    uniform = isinstance(beta, (int, float)) and beta == 0
    total = None if uniform else N.path_logp(tree, nodes.last)  # [L, D], of the prefix that ends with the node
    if fusion == "child":
        if uniform:
            return N.child_values(nodes, reward)[0]
        edge = total - N.above(total)
        tokens = nodes.last - N.above(nodes.last)
        return N.child_values(nodes, reward, beta * edge / (jnp.maximum(tokens, 1) if per_token else 1))[0]
    if uniform:
        return N.leaf_values(nodes, reward)
    length = T.leaf_length(tree)
    if not per_token:  # log p(n) is the same for all leaves below n and cancels
        whole = jnp.broadcast_to(N.path_logp(tree, length[:, None] - 1), total.shape)
        return N.leaf_values(nodes, reward, beta * whole)
    below = (N.path_logp(tree, length[:, None] - 1) - total) / jnp.maximum(length[:, None] - 1 - nodes.last, 1)
    return N.leaf_values(nodes, reward, beta * below)
