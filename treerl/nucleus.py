"""Draw tokens from a tempered distribution cut to its nucleus, without sorting the vocabulary."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from treerl.kernels import vocabulary


class Drawn(NamedTuple):
    """A token for every head, and what its distribution said. All [..., ] of the heads' shape."""

    token: jax.Array  # int32
    logp: jax.Array  # float32, of the token under the distribution drawn from
    top: jax.Array  # float32, the largest logit
    norm: jax.Array  # float32, log of sum of exp((logit - top) / temperature)
    entropy: jax.Array  # float32, nats, of the tempered distribution, untruncated


def nucleus(logits: jax.Array, temperature: jax.Array, top_p: jax.Array) -> jax.Array:
    """Lowest logit in the smallest set of probability top_p: [..., V] -> [..., 1].

    Finds the cut by bisection on the probability, behind a cond, so top_p = 1 costs nothing and
    the vocabulary is never sorted. Ties at the cut are kept.
    """

    def cut(logits):
        top = logits.max(-1, keepdims=True)
        weight = jnp.exp((logits - top) / temperature)
        total = weight.sum(-1, keepdims=True)

        def halve(_, bounds):
            low, high = bounds  # the mass at or above low is at least top_p
            middle = (low + high) / 2
            enough = jnp.sum(jnp.where(weight >= middle, weight, 0), -1, keepdims=True) >= top_p * total
            return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

        low, _ = jax.lax.fori_loop(0, 30, halve, (jnp.zeros_like(top), jnp.ones_like(top)))
        return jnp.min(jnp.where((weight >= low) | (logits == top), logits, jnp.inf), -1, keepdims=True)

    all_kept = lambda logits: jnp.full((*logits.shape[:-1], 1), -jnp.inf, logits.dtype)
    return jax.lax.cond(top_p < 1, cut, all_kept, logits)


def draw(logits: jax.Array, temperature: jax.Array, top_p: jax.Array, uniform: jax.Array) -> Drawn:
    """Draws a token from the tempered, truncated distribution by inverting its sum.

    Two levels of about sqrt(V) sums: one uniform number a draw, two passes over the logits, and no
    array of the vocabulary's size; never a token outside the nucleus.

    Args:
      logits: [..., V] float32. temperature, top_p: [] float32. uniform: [...] in [0, 1).
    """
    size = logits.shape[-1]
    near = range(max(1, round(size**0.5 / 8)), round(size**0.5) + 1)
    width = max((w for w in near if size % w == 0), default=near[-1])  # a divisor needs no padding
    lowest, top = nucleus(logits, temperature, top_p), logits.max(-1)
    pad = [(0, 0)] * (logits.ndim - 1) + [(0, -size % width)]
    block = jnp.pad(logits, pad, constant_values=-jnp.inf).reshape(*logits.shape[:-1], -1, width)

    shift = (block - top[..., None, None]) / temperature
    weight = jnp.exp(shift)
    mass = jnp.sum(jnp.where(block >= lowest[..., None], weight, 0), -1)
    norm = jnp.sum(jnp.sum(weight, -1), -1)
    mean = jnp.sum(jnp.sum(jnp.where(weight > 0, weight * shift, 0), -1), -1) / norm

    def invert(weight, target):
        total = jnp.cumsum(weight, axis=-1)
        target = jnp.clip(target, 0, total[..., -1] * (1 - 2e-7))
        index = jnp.sum(total <= target[..., None], axis=-1)
        at = lambda x: jnp.take_along_axis(x, index[..., None], axis=-1)[..., 0]
        return index, target - (at(total) - at(weight))

    outer, rest = invert(mass, uniform * mass.sum(-1))
    inside = jnp.take_along_axis(block, outer[..., None, None], axis=-2)[..., 0, :]
    shift = (inside - top[..., None]) / temperature
    inner, _ = invert(jnp.where(inside >= lowest, jnp.exp(shift), 0), rest)
    logp = jnp.take_along_axis(shift, inner[..., None], axis=-1)[..., 0] - jnp.log(mass.sum(-1))
    token = jnp.minimum(outer * width + inner, size - 1).astype(jnp.int32)
    return Drawn(token, logp, top, jnp.log(norm), jnp.log(norm) - mean)


def likeliest(logits: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The most probable tokens, in descending order, and their log-probs: [..., V] -> twice [..., count].

    One pass over the logits for each, so the vocabulary is never sorted. Where fewer than `count`
    tokens are possible, the rest have log-prob -inf and mean nothing.

    Args:
      logits: [..., V] float32, one of them finite. count: static.
    """
    token, left = [], logits
    for _ in range(count):
        token.append(jnp.argmax(left, -1))
        left = jnp.where(jnp.arange(logits.shape[-1]) == token[-1][..., None], -jnp.inf, left)
    token = jnp.stack(token, -1)
    # the argmax of a vocabulary that is used up repeats token 0; reading scores from `left` would show it too, but
    # would keep another array of the vocabulary's size in memory
    again = jnp.any((token[..., None] == token[..., None, :]) & jnp.tri(count, k=-1, dtype=bool), -1)
    score = jnp.where(again, -jnp.inf, jnp.take_along_axis(logits, token, axis=-1))
    top = score[..., :1]
    return token, score - (top + jnp.log(jnp.sum(jnp.exp(logits - top), -1, keepdims=True)))


def survey(logits, temperature, top_p, uniform, candidates: int = 0, *, fused: bool = False) -> tuple[Drawn, jax.Array, jax.Array]:
    """Draws a token, and names the likeliest ones.

    Args:
      logits: [B, K, V] float32. temperature, top_p: [] float32. uniform: [B, K] in [0, 1). candidates: static.
      fused: read the logits once, in kernels for GPUs (static). They must lie on one device.

    Returns:
      (Drawn, best [B, K, candidates] int32, their log-probs at temperature 1 [B, K, candidates]), see `likeliest`.
    """
    if fused:
        lowest = nucleus(logits, temperature, top_p)[..., 0]
        flat = lambda x: x.reshape(-1, *x.shape[2:])
        found = vocabulary.survey(flat(logits), temperature, flat(lowest), flat(uniform), candidates)
        *drawn, best, score = (x.reshape(*uniform.shape, *x.shape[1:]) for x in found)
        return Drawn(*drawn), best, score
    none = jnp.zeros((*uniform.shape, 0))
    named = likeliest(logits, candidates) if candidates else (none.astype(jnp.int32), none)
    return draw(logits, temperature, top_p, uniform), *named
