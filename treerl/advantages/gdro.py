"""Weights of prompts by how hard their group is: distributionally robust optimisation over bins of accuracy."""

import jax
import jax.numpy as jnp

from treerl import masked, tree as T


def start(edges: tuple[float, ...] = (0.4, 0.75)) -> dict:
    """Memory of `gdro`: a score a bin, and whether it was ever seen."""
    if not all(isinstance(e, (int, float)) for e in edges) or any(a >= b for a, b in zip(edges, edges[1:])):
        raise ValueError(f"gdro: edges={edges!r} must be accuracies that ascend, such as (0.4, 0.75).")
    bins = len(edges) + 1
    return dict(score=jnp.zeros((bins,), jnp.float32), seen=jnp.zeros((bins,), bool))


def gdro(
    tree: T.Tree, reward: jax.Array, memory: dict, *,
    edges: tuple[float, ...] = (0.4, 0.75), decay: float = 0.12, rate: float = 0.65, mix: float = 0.01,
    clip: float = 5.0, limit: float = 15.0, mixture: bool = False, correct: float = 0.5,
) -> tuple[jax.Array, dict]:  # fmt: skip
    """Weighs each tree by the running loss of the bin of prompts it belongs to.

    Prompt-GDRO, arXiv 2601.19280, section 4.2: score_b <- (1 - decay) score_b + decay mean loss of bin b (its first
    loss when first seen), w_b = exp(rate clip(score_b, -clip, clip)), and credit is multiplied by min(w_b, limit) (eq. 16).

    What differs from the paper:
      - the bin is the accuracy of the tree's own leaves (the paper: of the prompt's last visits, with
        hysteresis), so nothing is remembered per prompt;
      - the loss is 1 - mean reward: the paper's clipped objective is zero at ratio 1 for centred credit. For rewards
        from 0 to 1 a weight is then at most exp(rate), and neither `clip` nor `limit` binds at its default.
    The released code multiplies by the mixture q_b = (1 - mix) w_b / sum of w + mix / bins over the bins of the
    batch, which sums to 1: `limit` never binds and the step shrinks with the number of bins (`mixture=True`).

    Args:
      tree: B trees. reward: [B, L]. memory: see `start`. edges: ascending accuracies between bins (static).
      correct: rewards above it are right answers.

    Returns:
      (weight [B], memory).
    """
    valid = jax.vmap(T.leaf_valid)(tree)
    there = jnp.any(valid, axis=1)
    accuracy = masked.mean((reward > correct).astype(jnp.float32), valid, axis=1)
    which = jnp.sum(accuracy[:, None] >= jnp.asarray(edges), axis=1)  # [B]
    member = (which[:, None] == jnp.arange(len(edges) + 1)) & there[:, None]  # [B, bins]
    loss = jnp.broadcast_to((1 - masked.mean(reward, valid, axis=1))[:, None], member.shape)
    present = jnp.any(member, axis=0)
    mean = masked.mean(loss, member, axis=0)
    moved = jnp.where(memory["seen"], (1 - decay) * memory["score"] + decay * mean, mean)
    score = jnp.where(present, moved, memory["score"])
    weight = jnp.exp(rate * jnp.clip(score, -clip, clip))
    if mixture:
        share = jnp.where(present, weight, 0)
        weight = (1 - mix) * share / jnp.maximum(jnp.sum(share), 1e-9) + mix / jnp.maximum(jnp.sum(present), 1)
    return jnp.minimum(weight, limit)[which], dict(score=score, seen=memory["seen"] | present)
