"""Attention over a prompt, over a pool of tree cells (sampler) and over packed trees (learner).

Each maker returns `attend(q, k, v, cache, window=None) -> (out, cache)` for one layer, with q
[B, T, H, d], k and v [B, T, G, d] and out [B, T, H, d]; kernels can take their place behind this
signature. A window (int32 scalar, may be traced: layers of one program differ in it) leaves a query
those keys that lie fewer positions before it; None leaves all.
"""
from typing import Callable

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.sharding import Mesh, PartitionSpec

from treerl.sharding import TREES

Attend = Callable


def causal(length: jax.Array) -> Attend:
    """Attention within right-padded rows [B, T]; the cache returned is (k, v) of every position."""

    def attend(q, k, v, cache, window=None):
        del cache
        seen, index = jnp.arange(q.shape[1])[None] < length[:, None], jnp.arange(q.shape[1])
        mask = jnp.tril(jnp.ones((q.shape[1],) * 2, bool))[None, None] & seen[:, None, None]
        if window is not None:
            mask &= index[:, None] - index < window
        return jax.nn.dot_product_attention(q, k, v, mask=mask), (k, v)

    return attend


def packed(stop: jax.Array, position: jax.Array | None = None, *, mesh: Mesh | None = None, block: int = 64) -> Attend:
    """Attention within bins of depth-first tokens: q sees k iff k <= q < stop[k].

    stop [N, C] is the index one past the last token of each token's subtree, so the test admits
    exactly a token's ancestors and itself (a whole tree's cells and its prompt included), and
    never a sibling's tokens or another tree's. position [N, C] is what a window counts in: between
    a token and its ancestor in a bin may lie siblings.

    Queries go in static blocks, each against the keys up to its own end, so most of the upper half of
    the scores is never computed; at most 4 blocks, since each is compiled for itself. On a GPU,
    half-precision heads go through cuDNN's flash attention: scores never reach memory, masks do.
    """
    size = stop.shape[1]
    block = max(block, -(-size // 4 // 64) * 64)

    def mask(start, end, window):
        query, key = jnp.arange(start, end)[:, None], jnp.arange(end)
        seen = (key <= query) & (query < stop[:, None, :end])
        if window is not None:
            seen &= position[:, start:end, None] - position[:, None, :end] < window
        return (seen | (key == query))[:, None]  # padding sees itself: no empty row

    def attend(q, k, v, cache, window=None):
        half = q.dtype in (jnp.bfloat16, jnp.float16)
        flash = platform(mesh) == "gpu" and half and size % 64 == 0 and q.shape[-1] in (64, 128)
        how, out = "cudnn" if flash else None, []
        for start in range(0, size, block):
            end = min(start + block, size)
            seen = mask(start, end, window)
            own = q[:, start:end], k[:, :end], v[:, :end]
            out.append(jax.nn.dot_product_attention(*own, mask=seen, implementation=how))
        return jnp.concatenate(out, axis=1), cache

    return attend


def pool(
    prompt_length: jax.Array, path: jax.Array, row: jax.Array, write: jax.Array, rows: int, form: Callable
) -> Attend:
    """Attention of each slot's head over its prompt and its ancestors in the pool.

    The cache of a layer is (prompt k, prompt v [B, G, P, d], pool k, pool v [B, G, K, S, d]).
    The head's own keys and values are written first, at (slot, row), where `write` holds.
    Branching copies rows of `path`, never keys and values.

    Args:
      prompt_length: [B]. path: [B, K, S], column of each ancestor, the head included, -1
      elsewhere. row: [B, K], row of the head. write: [B, K] bool. rows: bounds every row in use
      (static). form: `dense` or `fused`, see `kernel`; with windows `dense`.
    """
    _, slots, depth = path.shape
    own = jnp.arange(slots)
    target = jnp.where(write, row, depth)  # out of range: dropped

    def attend(q, k, v, cache, window=None):
        prompt_k, prompt_v, pool_k, pool_v = cache
        # a tree at a time, so that the partitioner sees that trees are independent
        put = jax.vmap(lambda pool, new, row: pool.at[:, own, row].set(new.swapaxes(0, 1), mode="drop"))
        pool_k = put(pool_k, k.astype(pool_k.dtype), target)
        pool_v = put(pool_v, v.astype(pool_v.dtype), target)
        q = rearrange(q, "b k (g r) d -> b g k r d", g=k.shape[2])
        cache = prompt_k, prompt_v, pool_k, pool_v
        near = () if window is None else (row, window)
        out = form(q, cache, prompt_length, path, rows, *near)
        return rearrange(out.astype(v.dtype), "b g k r d -> b k (g r) d"), cache

    return attend


def dense(q, cache, prompt_length, path, rows, row=None, window=None):
    """Every slot scores every cell of the first `rows` rows under an ancestor mask, in XLA.

    Prompt and pool are merged by a shared softmax.

    Args:
      q: [B, G, K, R, d], R query heads to a key head. window: of the layer, counted from each
        head's row; None: everything is near. The rest: see `pool`.

    Returns:
      float32 [B, G, K, R, d].
    """
    prompt_k, prompt_v, pool_k, pool_v = cache
    ancestor = path[:, :, None, :rows] == jnp.arange(path.shape[1])[:, None]  # [B, K, K, rows]
    q = q * q.shape[-1] ** -0.5
    lowest = jnp.finfo(jnp.float32).min
    f32 = dict(preferred_element_type=jnp.float32)
    on_prompt = jnp.einsum("bgkrd,bgpd->bgkrp", q, prompt_k, **f32)
    real = (jnp.arange(prompt_k.shape[2]) < prompt_length[:, None])[:, None]  # [B, 1 or K, P]
    if window is not None:
        place = (prompt_length[:, None] + row)[..., None]  # of each head, from the prompt's first token
        real &= place - jnp.arange(prompt_k.shape[2]) < window
        ancestor &= (row[..., None] - jnp.arange(rows) < window)[:, :, None]
    on_prompt = jnp.where(real[:, None, :, None], on_prompt, lowest)
    on_pool = jnp.einsum("bgkrd,bgjsd->bgkrjs", q, pool_k[:, :, :, :rows], **f32)
    on_pool = jnp.where(ancestor[:, None, :, None], on_pool, lowest)
    top = jnp.maximum(on_prompt.max(-1), on_pool.max((-1, -2)))
    on_prompt = jnp.exp(on_prompt - top[..., None])
    on_pool = jnp.exp(on_pool - top[..., None, None])
    norm = on_prompt.sum(-1) + on_pool.sum((-1, -2))
    out = jnp.einsum("bgkrp,bgpd->bgkrd", on_prompt.astype(q.dtype), prompt_v, **f32)
    out += jnp.einsum("bgkrjs,bgjsd->bgkrd", on_pool.astype(q.dtype), pool_v[:, :, :, :rows], **f32)
    return out / norm[..., None]


def platform(mesh: Mesh | None) -> str:
    """cpu, gpu or tpu: of a mesh, or of the default device."""
    return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform


def kernel(head_dim: int, mesh: Mesh | None = None) -> Callable:
    """`fused` where the devices are GPUs and the heads fit it, else `dense`.

    Args:
      mesh: trees over data and fsdp, heads over tensor; None is the default device.
    """
    if platform(mesh) != "gpu" or head_dim < 16 or head_dim & (head_dim - 1):
        return dense
    return fused if mesh is None or mesh.size == 1 else sharded(fused, mesh)


def sharded(form: Callable, mesh: Mesh) -> Callable:
    """Runs a form on each device's own trees and heads; the partitioner cannot cut it itself."""
    heads, trees = PartitionSpec(*TREES, "tensor"), TREES

    def run(q, cache, prompt_length, path, rows):
        own = lambda *arrays: form(*arrays, rows)
        specs = (heads, (heads,) * 4, trees, trees)
        return jax.shard_map(own, mesh=mesh, in_specs=specs, out_specs=heads, check_vma=False)(
            q, cache, prompt_length, path
        )

    return run


def fused(q, cache, prompt_length, path, rows, *, block: int = 32, interpret: bool = False):
    """The same as `dense` in one Pallas kernel for GPUs, which reads the cells in use alone.

    A program for every (tree, key head, slot) scores all queries of the tree on that slot's
    column, down to the last row that any of them stands on, and on its share of the prompt. No
    scores reach memory, and `rows` bounds nothing. The slots' partial softmaxes are merged by
    log-sum-exp. head_dim must be a power of two, at least 16.
    """
    del rows
    prompt_k, prompt_v, pool_k, pool_v = cache
    batch, heads, slots, group, size = q.shape
    depth, width, queries = path.shape[2], prompt_k.shape[2], slots * group
    tile = max(16, pl.next_power_of_2(queries))
    share = -(-width // slots)
    chunk = max(16, pl.next_power_of_2(share))
    exact = dict(precision=jax.lax.Precision.HIGHEST) if q.dtype == jnp.float32 else {}
    last = path[:, :, None] == jnp.arange(slots)[:, None]  # [B, K, K, S]
    last = jnp.max(jnp.where(last, jnp.arange(1, depth + 1), 0), axis=(1, 3))  # [B, K]

    def program(q_ref, pk_ref, pv_ref, k_ref, v_ref, length_ref, path_ref, last_ref, out_ref, top_ref, norm_ref):
        column = pl.program_id(2)
        query = jnp.arange(tile)
        real = query < queries
        line = jnp.minimum(query // group, slots - 1)
        whole = query[:, None], jnp.arange(size)[None]
        q = triton.load(q_ref.at[whole], mask=real[:, None], other=0.0)

        def add(carry, k_ref, v_ref, start, count, end, see):
            out, top, norm = carry
            at = start + jnp.arange(count)
            index, inside = (at[:, None], jnp.arange(size)[None]), (at < end)[:, None]
            load = lambda ref: triton.load(ref.at[index], mask=inside, other=0.0).astype(q.dtype)
            seen = see(at) & real[:, None]
            score = triton.dot(q, load(k_ref), trans_b=True, **exact) * size**-0.5
            score = jnp.where(seen, score, -1e30)
            new = jnp.maximum(top, jnp.max(score, axis=1))
            weight = jnp.where(seen, jnp.exp(score - new[:, None]), 0.0)
            fade = jnp.exp(top - new)
            values = load(v_ref)
            out = out * fade[:, None] + triton.dot(weight.astype(values.dtype), values, **exact)
            return out, new, norm * fade + jnp.sum(weight, axis=1)

        def on_pool(i, carry):
            def see(at):
                inside = (at < depth)[None]
                return triton.load(path_ref.at[line[:, None], at[None]], mask=inside, other=-1) == column

            return add(carry, k_ref, v_ref, i * block, block, depth, see)

        carry = jnp.zeros((tile, size), jnp.float32), jnp.full((tile,), -1e30), jnp.zeros((tile,), jnp.float32)
        end = jnp.minimum(length_ref[()], jnp.minimum((column + 1) * share, width))
        carry = add(carry, pk_ref, pv_ref, column * share, chunk, end, lambda at: (at < end)[None])
        blocks = (last_ref[column] + block - 1) // block
        out, top, norm = jax.lax.fori_loop(0, blocks, on_pool, carry)
        triton.store(out_ref.at[whole], out, mask=real[:, None])
        triton.store(top_ref.at[query], top, mask=real)
        triton.store(norm_ref.at[query], norm, mask=real)

    head = lambda *shape: pl.BlockSpec((None, None, *shape), lambda b, g, j: (b, g) + (0,) * len(shape))
    tree = lambda *shape: pl.BlockSpec((None, *shape), lambda b, g, j: (b,) + (0,) * len(shape))
    slot = lambda *shape: pl.BlockSpec((None, None, None, *shape), lambda b, g, j: (b, g, j) + (0,) * len(shape))
    part = lambda *shape: jax.ShapeDtypeStruct((batch, heads, slots, *shape), jnp.float32)
    out, top, norm = pl.pallas_call(
        program,
        grid=(batch, heads, slots),
        in_specs=[
            head(queries, size), head(width, size), head(width, size), slot(depth, size), slot(depth, size),
            tree(), tree(slots, depth), tree(slots),
        ],
        out_specs=[slot(queries, size), slot(queries), slot(queries)],
        out_shape=[part(queries, size), part(queries), part(queries)],
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
    )(q.reshape(batch, heads, queries, size), prompt_k, prompt_v, pool_k, pool_v, prompt_length, path, last)  # fmt: skip
    weight = jnp.exp(top - jnp.max(top, axis=2, keepdims=True))
    out = jnp.sum(out * weight[..., None], axis=2) / jnp.sum(norm * weight, axis=2)[..., None]
    return out.reshape(q.shape)
