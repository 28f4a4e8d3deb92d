"""Attention within bins of depth-first tokens, forward and backward: of the learner, and of prompts."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from treerl.kernels import LOWEST, call, exactly

_LOG2_E = 1.4426950408889634  # exponentials are of base two, the faster ones


def fits(size: int, head_dim: int) -> bool:
    """Whether `bin_attention` takes bins of `size` tokens and heads of `head_dim`."""
    return size % 16 == 0 and head_dim >= 16 and head_dim & (head_dim - 1) == 0


def live(stop, position, window, queries: int, keys: int) -> jax.Array:
    """Which blocks of keys some query of a block of queries sees.

    Without a window exactly those: the keys before a block's first query whose subtrees reach it, and the block's own.

    Args:
      stop, position: [N, C], see `packing.Bins`; position may be None without a window. window: [] int32, or None.
      queries, keys: sizes of blocks.

    Returns:
      bool [N, C / queries, C / keys].
    """
    cut = lambda x, size: x.reshape(x.shape[0], -1, size)
    index = jnp.arange(stop.shape[1])[None]
    first = cut(index, queries)[..., :1]  # of each block of queries
    reach = cut(jnp.maximum(stop, index + 1), keys).max(-1)[:, None]
    seen = (cut(index, keys)[:, None, :, 0] < first + queries) & (reach > first)
    if window is not None:
        seen &= cut(position, queries).min(-1)[..., None] - cut(position, keys).max(-1)[:, None] < window
    return seen


def _listed(seen):
    """Places of what is true along the last axis, first ones first, and how many there are: int32 [..., n], [...]."""
    return jnp.argsort(~seen, axis=-1, stable=True).astype(jnp.int32), jnp.sum(seen, axis=-1, dtype=jnp.int32)


def bin_attention(q, k, v, stop, position=None, window=None, *, queries: int = 64, keys: int = 64, warps: int = 4, stages: int = 3):
    """Attention within bins, in which a query sees itself and the keys in whose subtrees it lies: k <= q < stop[k].

    A program for every block of queries (for gradients of keys and values: of keys) goes through those blocks of the
    other kind that it has something to do with; subtrees of siblings are skipped. No scores reach memory: the backward
    pass computes them again from the forward pass's log-sum-exp (FlashAttention-2, Dao 2023, algorithms 1 and 2).

    Args:
      q: [N, C, H, d]. k, v: [N, C, G, d]. stop: [N, C] int32, see `packing.Bins`. See `fits` for C and d.
      window: [] int32, positions that a query sees, its own included, or None; position: [N, C], what it counts in.
      queries, keys: sizes of blocks, powers of two; smaller where C is no multiple of them. warps, stages: of Triton.

    Returns:
      [N, C, H, d] of q's dtype, to be differentiated by q, k and v.
    """
    queries, keys = (math.gcd(q.shape[1], block) for block in (queries, keys))
    spec = (queries, keys, warps, stages)
    seen = live(stop, position, window, queries, keys)
    reach = jnp.maximum(stop, jnp.arange(stop.shape[1]) + 1)  # padding sees itself: no empty row
    places = [reach] if window is None else [reach, position, jnp.broadcast_to(window, (1,))]
    return _attention(spec, q, k, v, tuple(places), (*_listed(seen), *_listed(seen.swapaxes(1, 2))))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(spec, q, k, v, places, lists):
    return _forward(spec, q, k, v, places, lists)[0]


def _blocks(shape, *places):
    """Block specs of a grid (bin, head, block): of heads [N, C, X, d] and numbers [N, X, C], cut or whole, and of others."""
    size, dim = shape
    bin_ = lambda array: pl.BlockSpec((None, *array.shape[1:]), lambda n, h, i: (n,) + (0,) * (array.ndim - 1))
    return dict(
        cut=lambda block, group=1: pl.BlockSpec((None, block, None, dim), lambda n, h, i: (n, i, h // group, 0)),
        every=lambda group=1: pl.BlockSpec((None, size, None, dim), lambda n, h, i: (n, 0, h // group, 0)),
        part=lambda block: pl.BlockSpec((None, None, block), lambda n, h, i: (n, h, i)),
        listed=lambda array: [
            pl.BlockSpec((None, None, array.shape[2]), lambda n, h, i: (n, i, 0)),
            pl.BlockSpec((None, None), lambda n, h, i: (n, i)),
        ],
        places=[pl.BlockSpec((1,), lambda n, h, i: (0,)) if x.ndim == 1 else bin_(x) for x in places],
    )


def _sight(place_refs, query, key):
    """Which keys [k] queries [q] see: [q, k]."""
    stop_ref, *window_refs = place_refs
    seen = (key[None] <= query[:, None]) & (query[:, None] < triton.load(stop_ref.at[key])[None])
    if window_refs:
        position_ref, window_ref = window_refs
        behind = triton.load(position_ref.at[query])[:, None] - triton.load(position_ref.at[key])[None]
        seen &= behind < window_ref[0]
    return seen


def _forward(spec, q, k, v, places, lists):
    (queries, keys, warps, stages), (bins, size, heads, dim) = spec, q.shape
    group, exact, order = heads // k.shape[2], exactly(q.dtype), lists[0]
    scale, own = dim**-0.5 * _LOG2_E, jnp.arange

    def program(q_ref, k_ref, v_ref, order_ref, count_ref, *refs):
        *place_refs, out_ref, log_ref = refs
        query, across = pl.program_id(2) * queries + own(queries), own(dim)
        q = q_ref[...]

        def add(i, carry):
            out, top, norm = carry
            key = order_ref[i] * keys + own(keys)
            load = lambda ref: triton.load(ref.at[key[:, None], across[None]])
            score = triton.dot(q, load(k_ref), trans_b=True, **exact) * scale
            score = jnp.where(_sight(place_refs, query, key), score, LOWEST)
            new = jnp.maximum(top, jnp.max(score, axis=1))
            # of a query that has seen nothing yet these are all 1; what they add fades to nothing with its first key
            weight, fade = jnp.exp2(score - new[:, None]), jnp.exp2(top - new)
            out = out * fade[:, None] + triton.dot(weight.astype(q.dtype), load(v_ref), **exact)
            return out, new, norm * fade + jnp.sum(weight, axis=1)

        start = jnp.zeros((queries, dim), jnp.float32), jnp.full((queries,), LOWEST), jnp.zeros((queries,), jnp.float32)
        out, top, norm = jax.lax.fori_loop(0, count_ref[...], add, start)
        out_ref[...] = (out / norm[:, None]).astype(out_ref.dtype)
        log_ref[...] = top + jnp.log2(norm)

    of = _blocks((size, dim), *places)
    out, log = call(
        program, "bin_attention", warps, stages, grid=(bins, heads, size // queries),
        in_specs=[of["cut"](queries), of["every"](group), of["every"](group), *of["listed"](order), *of["places"]],
        out_specs=[of["cut"](queries), of["part"](queries)],
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((bins, heads, size), jnp.float32)],
    )(q, k, v, *lists[:2], *places)  # fmt: skip
    return out, log


def _keep(spec, q, k, v, places, lists):
    out, log = _forward(spec, q, k, v, places, lists)
    return out, (q, k, v, places, lists, out, log)


def _backward(spec, kept, slope):
    (queries, keys, warps, stages), (q, k, v, places, lists, out, log) = spec, kept
    (bins, size, heads, dim), kv_heads, exact, own = q.shape, k.shape[2], exactly(q.dtype), jnp.arange
    group, scale = heads // kv_heads, dim**-0.5
    mean = jnp.einsum("nchd,nchd->nhc", slope, out, preferred_element_type=jnp.float32)  # of a query's slopes, weighted
    of = _blocks((size, dim), *places)

    def of_queries(q_ref, k_ref, v_ref, slope_ref, log_ref, mean_ref, order_ref, count_ref, *refs):
        *place_refs, out_ref = refs
        query, across = pl.program_id(2) * queries + own(queries), own(dim)
        q, slope, log, mean = q_ref[...], slope_ref[...], log_ref[...], mean_ref[...]

        def add(i, total):
            key = order_ref[i] * keys + own(keys)
            load = lambda ref: triton.load(ref.at[key[:, None], across[None]])
            k, v = load(k_ref), load(v_ref)
            score = triton.dot(q, k, trans_b=True, **exact) * (scale * _LOG2_E)
            weight = jnp.where(_sight(place_refs, query, key), jnp.exp2(score - log[:, None]), 0.0)
            pull = weight * (triton.dot(slope, v, trans_b=True, **exact) - mean[:, None])
            return total + triton.dot(pull.astype(q.dtype), k, **exact)

        total = jax.lax.fori_loop(0, count_ref[...], add, jnp.zeros((queries, dim), jnp.float32))
        out_ref[...] = (total * scale).astype(out_ref.dtype)

    of_q = call(
        of_queries, "bin_attention_queries", warps, stages, grid=(bins, heads, size // queries),
        in_specs=[of["cut"](queries), of["every"](group), of["every"](group), of["cut"](queries), of["part"](queries), of["part"](queries),
                  *of["listed"](lists[0]), *of["places"]],
        out_specs=of["cut"](queries), out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
    )(q, k, v, slope, log, mean, *lists[:2], *places)  # fmt: skip

    def of_keys(q_ref, k_ref, v_ref, slope_ref, log_ref, mean_ref, order_ref, count_ref, *refs):
        *place_refs, out_k_ref, out_v_ref = refs
        key, across = pl.program_id(2) * keys + own(keys), own(dim)
        k, v, count = k_ref[...], v_ref[...], count_ref[...]

        def add(i, totals):
            of_k, of_v = totals
            head, query = i // count, order_ref[i % count] * queries + own(queries)
            load = lambda ref: triton.load(ref.at[query[:, None], head, across[None]])
            number = lambda ref: triton.load(ref.at[head, query])[:, None]
            q, slope = load(q_ref), load(slope_ref)
            score = triton.dot(q, k, trans_b=True, **exact) * (scale * _LOG2_E)
            weight = jnp.where(_sight(place_refs, query, key), jnp.exp2(score - number(log_ref)), 0.0)
            pull = weight * (triton.dot(slope, v, trans_b=True, **exact) - number(mean_ref))
            turned = lambda x, y: triton.dot(x.astype(q.dtype), y, trans_a=True, **exact)
            return of_k + turned(pull, q), of_v + turned(weight, slope)

        zero = jnp.zeros((keys, dim), jnp.float32)
        of_k, of_v = jax.lax.fori_loop(0, count * group, add, (zero, zero))
        out_k_ref[...], out_v_ref[...] = (of_k * scale).astype(out_k_ref.dtype), of_v.astype(out_v_ref.dtype)

    shared = pl.BlockSpec((None, size, group, dim), lambda n, g, i: (n, 0, g, 0))
    number = pl.BlockSpec((None, group, size), lambda n, g, i: (n, g, 0))
    of_k, of_v = call(
        of_keys, "bin_attention_keys", warps, stages, grid=(bins, kv_heads, size // keys),
        in_specs=[shared, of["cut"](keys), of["cut"](keys), shared, number, number, *of["listed"](lists[2]), *of["places"]],
        out_specs=[of["cut"](keys), of["cut"](keys)],
        out_shape=[jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)],
    )(q, k, v, slope, log, mean, *lists[2:], *places)  # fmt: skip
    return of_q, of_k, of_v, None, None


_attention.defvjp(_keep, _backward)
