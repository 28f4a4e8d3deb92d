"""Attention over a prompt, over a pool of tree cells (sampler) and over packed trees (learner).

Each maker returns `attend(q, k, v, cache, window=None) -> (out, cache)` for one layer, with q
[B, T, H, d], k and v [B, T, G, d] and out [B, T, H, d]; kernels can take their place behind this
signature. A window (int32 scalar, may be traced: layers of one program differ in it) leaves a query
those keys that lie fewer positions before it; None leaves all.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from absl import logging
from einops import rearrange
from jax.sharding import Mesh, PartitionSpec

from treerl.kernels.bins import bin_attention, fits
from treerl.kernels.pool import pool_attention
from treerl.sharding import TREES

Attend = Callable


def _kernel(how: str | None, mesh: Mesh | None, q: jax.Array) -> bool:
    """Whether attention of q [N, C, H, d] within bins goes through `bin_attention`: half precision on GPUs, unless `how` says."""
    half = platform(mesh) == "gpu" and q.dtype in (jnp.bfloat16, jnp.float16) and fits(q.shape[1], q.shape[3])
    return half if how is None else how == "kernel"


def _in_kernel(mesh: Mesh | None, qkv, given):
    """`bin_attention` on each device's own bins and heads; the partitioner cannot cut it itself."""
    run = lambda qkv, given: bin_attention(*qkv, *given)
    if mesh is not None and mesh.size > 1:
        tokens = PartitionSpec(*TREES, None, "tensor")
        specs = (tokens,) * 3, tuple(x if x is None else TREES if x.ndim else PartitionSpec() for x in given)
        run = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=tokens, check_vma=False)
    return run(qkv, given)


def causal(length: jax.Array, *, mesh: Mesh | None = None, how: str | None = None) -> Attend:
    """Attention within right-padded rows [B, T]; the cache returned is (k, v) of every position.

    Args: mesh, how: see `packed`; a row is a bin of one chain.
    """

    def attend(q, k, v, cache, window=None):
        del cache
        index = jnp.arange(q.shape[1])
        seen = index[None] < length[:, None]
        if _kernel(how, mesh, q):
            stop = jnp.where(seen, length[:, None], 0)
            return _in_kernel(mesh, (q, k, v), (stop, jnp.broadcast_to(index, stop.shape), window)), (k, v)
        mask = jnp.tril(jnp.ones((q.shape[1],) * 2, bool))[None, None] & seen[:, None, None]
        if window is not None:
            mask &= index[:, None] - index < window
        return jax.nn.dot_product_attention(q, k, v, mask=mask), (k, v)

    return attend


def packed(
    stop: jax.Array, position: jax.Array | None = None, *, mesh: Mesh | None = None, block: int = 64, how: str | None = None
) -> Attend:  # fmt: skip
    """Attention within bins of depth-first tokens: q sees k iff k <= q < stop[k].

    stop [N, C] is the index one past the last token of each token's subtree, so the test admits
    exactly a token's ancestors and itself (a whole tree's cells and its prompt included), and
    never a sibling's tokens or another tree's. position [N, C] is what a window counts in: between
    a token and its ancestor in a bin may lie siblings.

    On GPUs half-precision heads of powers of two go through a kernel that reads the keys in sight alone, see
    `bin_attention`. In XLA queries go in static blocks, each against the keys up to its own end, so most of the upper
    half of the scores is never computed; at most 4 blocks, since each is compiled for itself.

    Args:
      how: "xla" or "kernel"; None chooses (static).
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
        if _kernel(how, mesh, q):
            return _in_kernel(mesh, (q, k, v), (stop, position, window)), cache
        out = []
        for start in range(0, size, block):
            end = min(start + block, size)
            own = q[:, start:end], k[:, :end], v[:, :end]
            out.append(jax.nn.dot_product_attention(*own, mask=mask(start, end, window)))
        return jnp.concatenate(out, axis=1), cache

    return attend


def _cell(row, write, depth):
    """Row at which each slot's head is written, `depth` for none: out of range, dropped."""
    return jnp.where(write, row, depth)


def dense(prompt_length: jax.Array, path: jax.Array, row: jax.Array, write: jax.Array, rows: int) -> Attend:
    """Attention of each slot's head over its prompt and its ancestors in the pool, in XLA.

    The cache of a layer is (prompt k, prompt v [B, G, P, d], pool k, pool v [B, G, K, S, d]).
    The head's own keys and values are written first, at (slot, row), where `write` holds.
    Branching copies rows of `path`, never keys and values. Every slot scores every cell of the
    first `rows` rows under an ancestor mask; prompt and pool are merged by a shared softmax.

    Args:
      prompt_length: [B]. path: [B, K, S], column of each ancestor, the head included, -1
      elsewhere. row: [B, K], row of the head. write: [B, K] bool. rows: bounds every row in use
      (static).
    """
    slots = path.shape[1]
    own, target = jnp.arange(slots), _cell(row, write, path.shape[2])
    cells = lambda x: x.reshape(*x.shape[:2], -1, *x.shape[4:])  # of all slots, in one axis: CPUs take short ones badly
    ancestor = cells(path[:, :, None, :rows] == own[:, None])  # [B, K, K * rows]
    # 0 or -inf, by a logarithm: what costs less XLA computes again in every use, at several times the cost of the use
    shut = lambda seen: jnp.log(seen.astype(jnp.float32))
    of_tree, f32 = shut(ancestor), dict(preferred_element_type=jnp.float32)

    def attend(q, k, v, cache, window=None):
        prompt_k, prompt_v, pool_k, pool_v = cache
        # a tree at a time, so that the partitioner sees that trees are independent
        put = jax.vmap(lambda pool, new, row: pool.at[:, own, row].set(new.swapaxes(0, 1), mode="drop"))
        pool_k = put(pool_k, k.astype(pool_k.dtype), target)
        pool_v = put(pool_v, v.astype(pool_v.dtype), target)
        q = rearrange(q, "b k (g r) d -> b g k r d", g=k.shape[2]) * q.shape[-1] ** -0.5
        on_prompt = jnp.einsum("bgkrd,bgpd->bgkrp", q, prompt_k, **f32)
        real = (jnp.arange(prompt_k.shape[2]) < prompt_length[:, None])[:, None]  # [B, 1 or K, P]
        hidden = of_tree
        if window is not None:
            place = (prompt_length[:, None] + row)[..., None]  # of each head, from the prompt's first token
            real &= place - jnp.arange(prompt_k.shape[2]) < window
            hidden = shut(ancestor & jnp.tile(row[..., None] - jnp.arange(rows) < window, slots))
        on_prompt += shut(real)[:, None, :, None]
        on_pool = jnp.einsum("bgkrd,bgjd->bgkrj", q, cells(pool_k[:, :, :, :rows]), **f32) + hidden[:, None, :, None]
        top = jnp.maximum(on_prompt.max(-1), on_pool.max(-1))
        on_prompt, on_pool = (jnp.exp(x - top[..., None]) for x in (on_prompt, on_pool))
        norm = on_prompt.sum(-1) + on_pool.sum(-1)
        out = jnp.einsum("bgkrp,bgpd->bgkrd", on_prompt.astype(q.dtype), prompt_v, **f32)
        out += jnp.einsum("bgkrj,bgjd->bgkrd", on_pool.astype(q.dtype), cells(pool_v[:, :, :, :rows]), **f32)
        out = (out / norm[..., None]).astype(v.dtype)
        return rearrange(out, "b g k r d -> b k (g r) d"), (prompt_k, prompt_v, pool_k, pool_v)

    return attend


def fused(prompt_length: jax.Array, path: jax.Array, row: jax.Array, write: jax.Array, rows: int, **options) -> Attend:
    """The same as `dense` in a kernel for GPUs, which reads the cells in use alone, see `pool_attention`.

    `rows` bounds nothing, and there are no windows. head_dim must be a power of two, at least 16.
    """
    del rows
    target = _cell(row, write, path.shape[2])

    def attend(q, k, v, cache, window=None):
        assert window is None, "the kernel knows which cells are ancestors, not how far away they are"
        stored = cache[2].dtype
        q, k, v = rearrange(q, "b k (g r) d -> b k g r d", g=k.shape[2]), k[..., None, :], v[..., None, :]
        if stored != q.dtype:  # the head's own keys and values are seen as they are stored
            k, v = k.astype(stored).astype(q.dtype), v.astype(stored).astype(q.dtype)
        qkv = jnp.concatenate([q, k, v], axis=-2)
        out, cache = pool_attention(qkv, cache, prompt_length, path, target, **options)
        return rearrange(out.astype(v.dtype), "b k g r d -> b k (g r) d"), cache

    return attend


def platform(mesh: Mesh | None) -> str:
    """cpu, gpu or tpu: of a mesh, or of the default device."""
    return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform


def kernel(head_dim: int, mesh: Mesh | None = None) -> Callable:
    """`fused` where the devices are GPUs and the heads fit it, else `dense`.

    Args:
      mesh: trees over data and fsdp, heads over tensor; None is the default device.
    """
    if platform(mesh) != "gpu":
        return dense
    if head_dim < 16 or head_dim & (head_dim - 1):
        misfit = "head_dim=%d is no power of two from 16 on: attention of the sampler in XLA, without a kernel."
        logging.log_first_n(logging.INFO, misfit, 1, head_dim)
        return dense
    return fused if mesh is None or mesh.size == 1 else sharded(fused, mesh)


def sharded(form: Callable, mesh: Mesh) -> Callable:
    """Runs a form on each device's own trees and heads; the partitioner cannot cut it itself."""
    heads, trees = PartitionSpec(*TREES, "tensor"), TREES
    tokens = PartitionSpec(*TREES, None, "tensor")

    def make(prompt_length, path, row, write, rows):
        def attend(q, k, v, cache, window=None):
            own = lambda tree, *arrays: form(*tree, rows)(*arrays, window)
            specs = ((trees,) * 4, tokens, tokens, tokens, (heads,) * 4)
            run = jax.shard_map(own, mesh=mesh, in_specs=specs, out_specs=(tokens, (heads,) * 4), check_vma=False)
            return run((prompt_length, path, row, write), q, k, v, cache)

        return attend

    return make
