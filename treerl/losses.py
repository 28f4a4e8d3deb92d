"""Objectives: per-token sums over a bin, never means; the step divides once, globally."""
import jax
import jax.numpy as jnp


def clipped(logp, old, positive, negative, *, clip_low, clip_high) -> tuple[jax.Array, jax.Array]:
    """PPO's clipped objective on tokens shared by several leaves, exactly.

    Sum over leaves k of min(r A_k, clip(r) A_k) = A+ min(r, 1 + high) + A- max(r, 1 - low), with
    r = exp(logp - old) (arXiv 1707.06347, eq. 7; separate bounds: DAPO, arXiv 2503.14476, eq. 10).

    Args:
      logp, old: [...] log-probs of the learner and of the sampler. positive, negative: [...].

    Returns:
      (loss [...], to be summed and divided by the batch's weight; clipped [...] bool).
    """
    ratio = jnp.exp(logp - old)
    gain = positive * jnp.minimum(ratio, 1 + clip_high) + negative * jnp.maximum(ratio, 1 - clip_low)
    is_clipped = ((positive > 0) & (ratio > 1 + clip_high)) | ((negative < 0) & (ratio < 1 - clip_low))
    return -gain, is_clipped


def kl_k3(logp, reference) -> jax.Array:
    """Schulman's k3 estimate of KL(policy || reference) a token: exp(d) - d - 1, d = reference - logp."""
    d = reference - logp
    return jnp.exp(d) - d - 1


def likelihood(logp, weight) -> jax.Array:
    """Negative log-likelihood of the tokens, for supervised learning."""
    return -weight * logp
