"""One pass over logits for all that a draw reads of them."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from treerl.kernels import LOWEST, call, whole


def survey(logits, temperature, lowest, uniform, candidates: int, *, block: int = 2048):
    """One pass over logits for all that is read of them, see `nucleus.survey`, and a second kernel that joins its blocks.

    Args:
      logits: [N, V] float32. temperature: [] float32. lowest: [N] float32, logits below are not drawn. uniform: [N] in
        [0, 1). candidates: how many of the likeliest tokens to name (static).

    Returns:
      (token int32, logp, top, norm, entropy [N], best int32, score [N, candidates]).
    """
    count, size = logits.shape
    blocks = -(-size // block)
    width, low = pl.next_power_of_2(blocks), float("-inf")
    shape = lambda *dims, dtype=jnp.float32: jax.ShapeDtypeStruct(dims, dtype)
    chosen = lambda x, index, at: jnp.sum(jnp.where(at == index, x, jnp.zeros_like(x)))

    def look(logits_ref, temperature_ref, lowest_ref, top_ref, norm_ref, mass_ref, moment_ref, plain_ref):
        row, part = pl.program_id(0), pl.program_id(1)
        at = part * block + jnp.arange(block)
        x = triton.load(logits_ref.at[row, at], mask=at < size, other=low)
        top = jnp.maximum(jnp.max(x), LOWEST)
        shift = (x - top) / temperature_ref[()]
        weight = jnp.exp(shift)
        top_ref[row, part], norm_ref[row, part] = top, jnp.sum(weight)
        mass_ref[row, part] = jnp.sum(jnp.where(x >= lowest_ref[row], weight, 0.0))
        moment_ref[row, part] = jnp.sum(jnp.where(weight > 0, weight * shift, 0.0))
        if candidates:
            plain_ref[row, part] = jnp.sum(jnp.exp(x - top))

    some = max(1, candidates)
    outs = [shape(count, blocks)] * 5
    found = call(
        look, "survey", 4, grid=(count, blocks), in_specs=[whole(count, size), whole(), whole(count)],
        out_specs=[whole(*x.shape) for x in outs], out_shape=outs,
    )(logits, temperature, lowest)  # fmt: skip

    def invert(weight, at, target):
        """(first index at which the running sum exceeds the target, what is left of the target there)."""
        total = jnp.cumsum(weight)
        whole = jnp.max(total)
        target = jnp.clip(target, 0.0, whole * (1 - 2e-7))
        index = jnp.sum(jnp.where(total <= target, 1, 0))
        return index, target - (chosen(total, index, at) - chosen(weight, index, at))

    def join(logits_ref, temperature_ref, lowest_ref, uniform_ref, top_ref, norm_ref, mass_ref, moment_ref, plain_ref,
             token_ref, logp_ref, highest_ref, log_ref, entropy_ref, best_ref, score_ref):  # fmt: skip
        row, part = pl.program_id(0), jnp.arange(width)
        temperature = temperature_ref[()]
        load = lambda ref, other=0.0: triton.load(ref.at[row, part], mask=part < blocks, other=other)
        tops = load(top_ref, LOWEST)
        top = jnp.max(tops)
        shift = (tops - top) / temperature
        scale = jnp.exp(shift)
        norms = load(norm_ref) * scale
        norm, mass = jnp.sum(norms), load(mass_ref) * scale
        mean = jnp.sum(load(moment_ref) * scale + jnp.where(norms > 0, norms * shift, 0.0)) / norm
        whole = jnp.sum(mass)
        outer, rest = invert(mass, part, uniform_ref[row] * whole)
        inside = jnp.arange(block)
        at = outer * block + inside
        x = triton.load(logits_ref.at[row, at], mask=at < size, other=low)
        shift = (x - top) / temperature
        kept = (at < size) & (x >= lowest_ref[row])
        inner, _ = invert(jnp.where(kept, jnp.exp(shift), 0.0), inside, rest)
        token_ref[row] = jnp.minimum(outer * block + inner, size - 1).astype(jnp.int32)
        logp_ref[row] = chosen(jnp.where(inside == inner, shift, 0.0), inner, inside) - jnp.log(whole)
        highest_ref[row], log_ref[row], entropy_ref[row] = top, jnp.log(norm), jnp.log(norm) - mean
        if candidates:
            plain = top + jnp.log(jnp.sum(load(plain_ref) * jnp.exp(tops - top)))
        taken = []
        for i in range(candidates):  # the best block again, without what was taken
            value = jnp.max(tops)
            outer = jnp.min(jnp.where(tops == value, part, blocks - 1))
            at = outer * block + inside
            x = triton.load(logits_ref.at[row, at], mask=at < size, other=low)
            for token in taken:
                x = jnp.where(at == token, low, x)
            best = jnp.min(jnp.where(x == value, at, size))
            taken.append(best)
            possible = value > LOWEST
            best_ref[i, row], score_ref[i, row] = jnp.where(possible, best, 0), jnp.where(possible, value - plain, low)
            tops = jnp.where(part == outer, jnp.max(jnp.where(at == best, low, x)), tops)

    f32, i32 = shape(count), shape(count, dtype=jnp.int32)
    ends = [i32, f32, f32, f32, f32, shape(some, count, dtype=jnp.int32), shape(some, count)]
    *drawn, best, score = call(
        join, "join", 4, grid=(count,),
        in_specs=[whole(count, size), whole(), whole(count), whole(count), *(whole(*x.shape) for x in outs)],
        out_specs=[whole(*x.shape) for x in ends], out_shape=ends,
    )(logits, temperature, lowest, uniform, *found)  # fmt: skip
    return *drawn, best[:candidates].T, score[:candidates].T
