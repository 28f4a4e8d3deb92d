"""A transformer as the sampler and the learner use it."""

import jax
import jax.numpy as jnp
from absl import logging
from einops import rearrange
from jax.sharding import Mesh

from treerl import attention, sharding
from treerl.kernels import products
from treerl.models.transformer import Model
from treerl.types import Params, Policy

PART = 64  # heads that a CPU decodes at a time


def in_parts(block, x, angles, attend, cache, window, running):
    """A block for the heads that run, some at a time: a CPU's time goes with their number. What comes out for others is void.

    Args: see `transformer.Block`; running: [B, K] bool.
    """
    running, flat = running.reshape(-1), lambda y: y.reshape(-1, *y.shape[2:])
    count = jnp.sum(running)
    place = jnp.where(running, jnp.cumsum(running) - 1, count + jnp.cumsum(~running) - 1)  # those that run come first
    order = jnp.zeros_like(place).at[place].set(jnp.arange(place.size), unique_indices=True)
    sort, back = lambda y: flat(y)[order], lambda y: y[place].reshape(*x.shape[:2], *y.shape[1:])

    def apply(function, *arrays):
        """function([1, PART, ...], ...) -> [1, PART, ...] of as many parts as hold heads that run."""
        run = lambda *each: jax.tree.map(lambda y: y[0], function(*(y[None] for y in each)))

        def one(i, out):
            start = jnp.minimum(i * PART, place.size - PART)  # the last part overlaps the one before
            cut = lambda y: jax.lax.dynamic_slice_in_dim(y, start, PART)
            put = lambda y, new: jax.lax.dynamic_update_slice_in_dim(y, new, start, 0)
            return jax.tree.map(put, out, run(*map(cut, arrays)))

        shapes = jax.eval_shape(run, *(y[:PART] for y in arrays))
        start = jax.tree.map(lambda y: jnp.zeros((place.size, *y.shape[1:]), y.dtype), shapes)
        return jax.lax.fori_loop(0, (count + PART - 1) // PART, one, start)

    x_sorted = sort(x)
    qkv = apply(lambda x, *angles: block.before(x, angles), x_sorted, *map(sort, angles))
    with block.config.products():
        attended, cache = attend(*map(back, qkv), cache, window)
    return back(apply(block.after, x_sorted, sort(attended))), cache


def make_policy(
    model: Model,
    params: Params,
    *,
    slots: int,
    rows: int,
    mesh: Mesh | None = None,
    pool_dtype: str | None = None,
    weight_dtype: str | None = None,
) -> Policy:
    """The sampler's view: weights are cast and unstacked once, before its loop.

    Args:
      slots, rows: K and S, the size of the pool of keys and values of a tree.
      mesh: of the parameters; None is one device, the default one.
      pool_dtype: of the keys and values of answers and prompts; None is that of the activations.
      weight_dtype: int8 reads the two largest weights, those of the MLP's gates and of the output, and their inputs,
        rounded to 8 bits, with one scale a row; on GPUs, where the sizes fit, see `products.narrow_product`.
        None is the dtype of the activations.

    Local layers whose window is shorter than a prompt and its answer use the `dense` form: the
    fused kernel knows which cells are ancestors, not how far away they are.
    """
    module = model.merge(params)
    block_of, layers = module.layers()
    config = model.config
    local = config.local or (False,) * config.layers
    lone = mesh is None or mesh.size == 1  # the partitioner cannot cut kernels
    kernel = attention.kernel(config.head_dim, mesh)
    in_kernels = lone and not config.lora_rank and kernel is not attention.dense
    fits = lambda heads: all(products.narrow_fits(heads, config.width, outer) for outer in (config.hidden, config.vocab))
    narrow = weight_dtype is not None and in_kernels and fits(128)
    if narrow:
        gates = [products.quantize(jnp.moveaxis(block_of(w).weight("gate_up"), 0, 2)) for w in layers]
        table = products.quantize(module.table()[None])
    elif weight_dtype is not None:
        stay = "weight_dtype=%s needs GPUs, mesh.tensor=1 and sizes that its kernel takes; weights stay %s."
        logging.log_first_n(logging.INFO, stay, 1, weight_dtype, config.dtype)

    def prefill(token, length):
        batch, width = token.shape
        position = jnp.broadcast_to(jnp.arange(width), token.shape)
        # without a gradient nothing is stored of a layer: a scan, which compiles faster
        hidden, (k, v) = module(token, position, attention.causal(length, mesh=mesh), remat="layers")
        last = jnp.take_along_axis(hidden, (length - 1)[:, None, None], axis=1)
        stored = pool_dtype or config.dtype
        place = lambda x: sharding.constrain(x, model.mesh, "trees", "kv_heads", *[None] * (x.ndim - 2))
        pool = place(jnp.zeros((batch, config.kv_heads, slots, rows, config.head_dim), stored))
        k, v = ([place(rearrange(x, "b p g d -> b g p d").astype(stored)) for x in each] for each in (k, v))
        heads = jnp.broadcast_to(last, (batch, slots, config.width))
        return length, last, heads, [(k[i], v[i], pool, pool) for i in range(config.layers)]

    def decode(cache, token, row, path, write, rows):
        length, last, _, caches = cache
        path = jnp.where(row[..., None] < 0, -1, path)  # what is not read costs nothing
        views = module.views(length[:, None] + row, caches[0][0].shape[2] + path.shape[2])
        hides = views[0][1] is not None
        form = attention.dense if hides else kernel
        attend = form(length, path, row, write, rows)
        parts = lone and attention.platform(mesh) == "cpu" and token.size > PART
        # traced once: what differs between layers comes in as data
        fused = in_kernels and form is not attention.dense
        rounded = narrow and fused and fits(token.size)
        if fused:
            block = jax.jit(lambda weights, x, cache, view, gate_up: block_of(weights).decode(x, view[0], attend, cache, gate_up))
        elif parts:
            block = jax.jit(lambda weights, x, cache, view, _: in_parts(block_of(weights), x, view[0], attend, cache, view[1], row >= 0))
        else:
            block = jax.jit(lambda weights, x, cache, view, _: block_of(weights)(x, view[0], attend, cache, view[1]))
        x, new = module.embed(token), []
        x = (x, jnp.zeros_like(x)[None]) if fused else x
        for weights, cache, is_local, gate_up in zip(layers, caches, local, gates if rounded else [None] * config.layers):
            x, cache = block(weights, x, cache, views[is_local], gate_up)
            new.append(cache)
        x = x[0] + sum(x[1]).astype(config.dtype) if fused else x
        hidden = module.final_norm(x)
        hidden = jnp.where(row[..., None] < 0, last, hidden)
        if rounded:
            flat = products.quantize(hidden.reshape(-1, config.width))
            logits = products.narrow_product(flat, table, jnp.float32).reshape(*token.shape, -1)
        else:
            logits = module.logits(hidden)
        return logits, (length, last, hidden, new)

    def gather(cache, path):
        length, last, _, caches = cache
        column, depth = jnp.maximum(path, 0), jnp.arange(path.shape[2])
        move = jax.vmap(lambda pool, column: pool[:, column, depth])  # a tree at a time, see `attention.dense`
        moved = [(k, v, move(pool_k, column), move(pool_v, column)) for k, v, pool_k, pool_v in caches]
        return length, last, jnp.zeros((*path.shape[:2], config.width), config.dtype), moved

    return Policy(
        prefill=prefill, decode=decode, hidden=lambda cache: cache[2], gather=gather, kernels=lone and attention.platform(mesh) == "gpu"
    )


def packed_hidden(model: Model, params: Params, token, position, stop, *, remat: str = "none"):
    """The learner's view: (module, hidden [N, C, D]) of bins of depth-first tokens.

    Args:
      token, position, stop: [N, C] int32, see `packing.Bins`.
    """
    module = model.merge(params)
    hidden, _ = module(token, position, attention.packed(stop, position, mesh=model.mesh), remat=remat)
    return module, hidden


def token_logps(module, hidden, target, temperature, *, chunk: int):
    """Log-probs of targets, the vocabulary seen `chunk` tokens at a time.

    Each chunk's logits are recomputed in the backward pass, so no [tokens, V] array outlives it.

    Args:
      hidden: [..., T, D]; axes in front are shards, each of which has its own chunks. target: [..., T] int32.
      temperature: [] float32, divides the logits.
      chunk: tokens at a time (static).

    Returns:
      float32 [..., T].
    """

    def one(logits, target):
        picked = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
        return picked - jax.nn.logsumexp(logits, axis=-1)

    return _of_logits(one, module, hidden, target, temperature, chunk)


def likeliest_tokens(module, hidden, temperature, *, count: int, chunk: int):
    """The `count` likeliest tokens after each hidden state, as `token_logps` sees them: (int32, float32 probability) [..., T, count]."""

    def one(logits, _):
        top, token = jax.lax.top_k(logits, count)
        return token, jnp.exp(top - jax.nn.logsumexp(logits, axis=-1, keepdims=True))

    return _of_logits(one, module, hidden, jnp.zeros(hidden.shape[:-1], jnp.int32), temperature, chunk)


def _of_logits(function, module, hidden, target, temperature, chunk: int):
    """function(logits [..., chunk, V], target [..., chunk]) -> arrays [..., chunk, ...], over all chunks: [..., T, ...]."""
    *shards, count = target.shape
    table = module.table(*shards)
    one = jax.checkpoint(lambda args: function(module.logits(args[0], table) / temperature, args[1]))
    chunk, front = min(chunk, count), len(shards)
    cut = lambda x: jnp.moveaxis(x.reshape(*shards, -1, chunk, *x.shape[front + 1 :]), front, 0)
    pad = lambda x: jnp.pad(x, [(0, -count % chunk if axis == front else 0) for axis in range(x.ndim)])
    found = jax.lax.map(one, (cut(pad(hidden)), cut(pad(target))))

    def join(x):
        x = jnp.moveaxis(x, 0, front)
        return jax.lax.slice_in_dim(x.reshape(*shards, -1, *x.shape[front + 2 :]), 0, count, axis=front)

    return jax.tree.map(join, found)
