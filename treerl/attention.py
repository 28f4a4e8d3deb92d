"""Attention over a prompt, over a pool of tree cells (sampler) and over packed trees (learner).

Each maker returns `attend(q, k, v, cache) -> (out, cache)` for one layer, with q [B, T, H, d],
k and v [B, T, G, d] and out [B, T, H, d]; kernels can take their place behind this signature.
"""
from typing import Callable

import jax
import jax.numpy as jnp
from einops import rearrange

Attend = Callable


def causal(length: jax.Array) -> Attend:
    """Attention within right-padded rows [B, T]; the cache returned is (k, v) of every position."""

    def attend(q, k, v, cache):
        del cache
        seen = jnp.arange(q.shape[1])[None] < length[:, None]
        mask = jnp.tril(jnp.ones((q.shape[1],) * 2, bool))[None, None] & seen[:, None, None]
        return jax.nn.dot_product_attention(q, k, v, mask=mask), (k, v)

    return attend


def packed(stop: jax.Array, block: int = 64) -> Attend:
    """Attention within bins of depth-first tokens: q sees k iff k <= q < stop[k].

    stop [N, C] is the index one past the last token of each token's subtree, so the test admits
    exactly a token's ancestors and itself (a whole tree's cells and its prompt included), and
    never a sibling's tokens or another tree's. Queries go in static blocks, each against the
    keys up to its own end, so the upper half of the scores is never computed; at most 16 blocks.
    """
    size = stop.shape[1]
    block = max(block, -(-size // 16))

    def attend(q, k, v, cache):
        out = []
        for start in range(0, size, block):
            end = min(start + block, size)
            query, key = jnp.arange(start, end)[:, None], jnp.arange(end)
            mask = (key <= query) & (query < stop[:, None, :end])
            mask |= key == query  # padding sees itself: no empty row
            out.append(
                jax.nn.dot_product_attention(q[:, start:end], k[:, :end], v[:, :end], mask=mask[:, None])
            )
        return jnp.concatenate(out, axis=1), cache

    return attend


def pool(prompt_length: jax.Array, row: jax.Array, path: jax.Array, write: jax.Array, rows: int) -> Attend:
    """Attention of each slot's head over its prompt and its ancestors in the pool.

    The cache of a layer is (prompt k, prompt v [B, P, G, d], pool k, pool v [B, G, K, S, d]).
    The head's own keys and values are written first, at (slot, row), where `write` holds. Every
    slot scores every cell of the first `rows` (static) rows under an ancestor mask: branching
    copies rows of `path`, never keys and values. Prompt and pool are merged by a shared softmax.

    Args:
      prompt_length: [B]. row: [B, K], row of the head. path: [B, K, S], column of each ancestor,
      the head included, -1 elsewhere. write: [B, K] bool.
    """
    batch, slots, depth = path.shape
    own = jnp.arange(slots)
    ancestor = path[:, :, None, :rows] == own[:, None]  # [B, K, K, rows]
    ancestor &= jnp.arange(rows) <= row[:, :, None, None]
    target = jnp.where(write, row, depth)  # out of range: dropped

    def attend(q, k, v, cache):
        prompt_k, prompt_v, pool_k, pool_v = cache
        # a tree at a time, so that the partitioner sees that trees are independent
        put = jax.vmap(lambda pool, new, row: pool.at[:, own, row].set(new.swapaxes(0, 1), mode="drop"))
        pool_k = put(pool_k, k.astype(pool_k.dtype), target)
        pool_v = put(pool_v, v.astype(pool_v.dtype), target)
        q = rearrange(q * q.shape[-1] ** -0.5, "b k (g r) d -> b k g r d", g=k.shape[2])
        lowest = jnp.finfo(jnp.float32).min
        f32 = dict(preferred_element_type=jnp.float32)
        on_prompt = jnp.einsum("bkgrd,bpgd->bgkrp", q, prompt_k, **f32)
        real = jnp.arange(prompt_k.shape[1]) < prompt_length[:, None]
        on_prompt = jnp.where(real[:, None, None, None], on_prompt, lowest)
        on_pool = jnp.einsum("bkgrd,bgjsd->bgkrjs", q, pool_k[:, :, :, :rows], **f32)
        on_pool = jnp.where(ancestor[:, None, :, None], on_pool, lowest)
        top = jnp.maximum(on_prompt.max(-1), on_pool.max((-1, -2)))
        on_prompt = jnp.exp(on_prompt - top[..., None])
        on_pool = jnp.exp(on_pool - top[..., None, None])
        norm = on_prompt.sum(-1) + on_pool.sum((-1, -2))
        out = jnp.einsum("bgkrp,bpgd->bkgrd", on_prompt.astype(v.dtype), prompt_v, **f32)
        out += jnp.einsum("bgkrjs,bgjsd->bkgrd", on_pool.astype(v.dtype), pool_v[:, :, :, :rows], **f32)
        out = out / rearrange(norm, "b g k r -> b k g r 1")
        out = rearrange(out.astype(v.dtype), "b k g r d -> b k (g r) d")
        return out, (prompt_k, prompt_v, pool_k, pool_v)

    return attend
