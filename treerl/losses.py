"""Objectives: sums over the tokens of bins, never means; the step divides once, globally.

Each takes the learner's log-probs [N, C] and the bins they belong to (`packing.Bins`), and gives
`Loss(sum, weight, clipped)`. Credit, importance weights and aggregation are data in the bins: they
were decided before and outside, and carry no gradient.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Loss(NamedTuple):
    """Sums over the tokens of a microbatch, each float32 []."""

    sum: jax.Array  # of the loss
    weight: jax.Array  # of the tokens
    clipped: jax.Array  # weight of the tokens whose ratio is out of bounds, in ppo and gspo on the side of their credit


def clipped(logp, old, positive, negative, *, clip_low, clip_high, dual_clip=jnp.inf) -> tuple[jax.Array, jax.Array]:
    """PPO's clipped objective on tokens shared by several leaves, exactly.

    Sum over leaves k of min(r A_k, clip(r) A_k) = A+ min(r, 1 + high) + A- max(r, 1 - low), with
    r = exp(logp - old) (arXiv 1707.06347, eq. 7; separate bounds: DAPO, arXiv 2503.14476, eq. 10).
    With `dual_clip` c > 1 a negative credit never gains more than c A-, however large r has become:
    A- min(max(r, 1 - low), c) (arXiv 1912.09729, eq. 5).

    Args:
      logp, old: [...] log-probs of the learner and of the policy it started from. positive, negative: [...].

    Returns:
      (loss [...], to be summed and divided by the batch's weight; clipped [...] bool).
    """
    ratio = jnp.exp(jnp.clip(logp - old, -20, 20))
    # `where`, for the gradient at a ratio of exactly the bound: min and max would halve it there
    punished = jnp.where(ratio < 1 - clip_low, 1 - clip_low, jnp.where(ratio > dual_clip, dual_clip, ratio))
    gain = positive * jnp.where(ratio > 1 + clip_high, 1 + clip_high, ratio) + negative * punished
    above, below = (positive > 0) & (ratio > 1 + clip_high), (negative < 0) & (ratio < 1 - clip_low)
    return -gain, above | below | ((negative < 0) & (ratio > dual_clip))


def ppo(logp, bins, *, clip_low, clip_high, dual_clip=jnp.inf) -> Loss:
    """The clipped objective of tokens: see `clipped`. Packed and flattened trees have the same loss and gradient."""
    loss, out = clipped(logp, bins.logp, bins.positive, bins.negative, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)
    return Loss(jnp.sum(loss), jnp.sum(bins.weight), jnp.sum(out * bins.weight))


def cispo(logp, bins, *, clip_low, clip_high) -> Loss:
    """Clips the importance weight instead of the objective: -sg(clip(r, 1 - low, 1 + high)) A logp.

    CISPO, MiniMax-M1, arXiv 2506.13585, eq. 4, as in verl (trl bounds r from above only, by the absolute
    `epsilon_high`: set clip_low to 1 and clip_high to that minus 1). A clipped token keeps a gradient, unlike PPO's. The
    weight does not depend on the leaf, so A is the sum over the leaves below and packed equals flattened.
    """
    ratio = jnp.exp(jnp.clip(logp - bins.logp, -20, 20))
    weight = jax.lax.stop_gradient(jnp.clip(ratio, 1 - clip_low, 1 + clip_high))
    out = (ratio < 1 - clip_low) | (ratio > 1 + clip_high)
    loss = -weight * (bins.positive + bins.negative) * logp
    return Loss(jnp.sum(loss), jnp.sum(bins.weight), jnp.sum(out * bins.weight))


def gspo(logp, bins, *, clip_low, clip_high) -> Loss:
    """Clips one ratio a rollout, the geometric mean of its tokens': s = exp(mean of (logp - old)).

    GSPO, arXiv 2507.18071, eq. 5: sum over leaves of min(s A, clip(s) A), each with the weight of its tokens. A
    shared token's gradient is the sum over the leaves below it, each with its own s and its own
    clipping: this does not factor into A+ and A- per token, so the sums run along the path of each leaf (a
    whole path lies in one bin). Packed equals flattened. Credit must belong to leaves. The paper's
    bounds are 3e-4 and 4e-4.
    """
    size = bins.token.shape[-1]
    answer = bins.cell >= 0
    length = path_sum(answer.astype(jnp.float32), bins.stop)
    change = path_sum(jnp.where(answer, logp - bins.logp, 0), bins.stop) / jnp.maximum(length, 1)
    end = (bins.stop == jnp.arange(size) + 1) & (bins.weight > 0)  # nothing below: a leaf, in the bin that owns it
    positive, negative, weight = (jnp.where(end, x * length, 0) for x in (bins.positive, bins.negative, bins.weight))
    loss, out = clipped(change, 0.0, positive, negative, clip_low=clip_low, clip_high=clip_high)
    return Loss(jnp.sum(loss), jnp.sum(weight), jnp.sum(out * weight))


OBJECTIVES = {"ppo": ppo, "cispo": cispo, "gspo": gspo}


def path_sum(x, stop) -> jax.Array:
    """Sums over each token and its ancestors in the bin: x, stop [N, C] -> [N, C].

    A comparison of all pairs of a bin, fused into the sum: nothing cancels, and the order is fixed.
    """
    index = jnp.arange(x.shape[-1])
    on = (index[None, :] <= index[:, None]) & (index[:, None] < stop[:, None, :])  # [N, token, ancestor]
    return jnp.sum(jnp.where(on, x[:, None, :], 0), axis=-1)


def kl_k1(logp, reference) -> jax.Array:
    """Log-ratio d = logp - reference: unbiased value of KL(policy || reference), but no gradient of it."""
    return logp - reference


def kl_k2(logp, reference) -> jax.Array:
    """d^2 / 2: biased value, whose gradient on the policy's own samples is the gradient of the KL."""
    return jnp.square(logp - reference) / 2


def kl_k3(logp, reference) -> jax.Array:
    """exp(-d) - 1 + d: unbiased, never negative, of less variance than d; its gradient is the reverse KL's (GRPO).

    |d| counts as 20 at most (as in verl, which also bounds the value), so that one token cannot make a loss infinite.
    """
    d = jnp.clip(reference - logp, -20, 20)
    return jnp.exp(d) - d - 1


KL = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}  # Schulman's estimates of KL(policy || reference), one a token


def divergence(logp, bins, estimate) -> tuple[jax.Array, jax.Array]:
    """KL to the reference policy over the tokens of bins: (sum, weight). estimate: a function of KL."""
    kl = jnp.where(bins.weight > 0, estimate(logp, bins.reference), 0) * bins.weight
    return jnp.sum(kl), jnp.sum(bins.weight)


def likelihood(logp, bins) -> Loss:
    """Negative log-likelihood of the tokens, for supervised learning."""
    return Loss(-jnp.sum(bins.weight * logp), jnp.sum(bins.weight), jnp.float32(0))
