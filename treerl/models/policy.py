"""A transformer as the sampler and the learner use it."""
import jax
import jax.numpy as jnp
from einops import rearrange
from jax.sharding import Mesh

from treerl import attention, sharding
from treerl.models.transformer import Model
from treerl.types import Params, Policy


def make_policy(model: Model, params: Params, *, slots: int, rows: int, mesh: Mesh | None = None, pool_dtype: str | None = None) -> Policy:
    """The sampler's view: weights are cast and unstacked once, before its loop.

    Args:
      slots, rows: K and S, the size of the pool of keys and values of a tree.
      mesh: of the parameters; None is one device.
      pool_dtype: of the keys and values of answers and prompts; None is that of the activations.

    Local layers whose window is shorter than a prompt and its answer use the `dense` form: the
    fused kernel knows which cells are ancestors, not how far away they are.
    """
    module = model.merge(params)
    apply, layers = module.layers()
    config = model.config
    local = config.local or (False,) * config.layers

    def prefill(token, length):
        batch, width = token.shape
        position = jnp.broadcast_to(jnp.arange(width), token.shape)
        # without a gradient nothing is stored of a layer: a scan, which compiles faster
        hidden, (k, v) = module(token, position, attention.causal(length), remat="layers")
        last = jnp.take_along_axis(hidden, (length - 1)[:, None, None], axis=1)
        stored = pool_dtype or config.dtype
        place = lambda x: sharding.constrain(x, mesh, "trees", "kv_heads", *[None] * (x.ndim - 2))
        pool = place(jnp.zeros((batch, config.kv_heads, slots, rows, config.head_dim), stored))
        k, v = ([place(rearrange(x, "b p g d -> b g p d").astype(stored)) for x in each] for each in (k, v))
        heads = jnp.broadcast_to(last, (batch, slots, config.width))
        return length, last, heads, [(k[i], v[i], pool, pool) for i in range(config.layers)]

    def decode(cache, token, row, path, write, rows):
        length, last, _, caches = cache
        views = module.views(length[:, None] + row, caches[0][0].shape[2] + path.shape[2])
        hides = views[0][1] is not None
        form = attention.dense if hides else attention.kernel(config.head_dim, mesh)
        attend = attention.pool(length, path, row, write, rows, form)
        # traced once: what differs between layers comes in as data
        block = jax.jit(lambda weights, x, cache, view: apply(weights, x, view[0], attend, cache, view[1]))
        x, new = module.embed(token), []
        for weights, cache, is_local in zip(layers, caches, local):
            x, cache = block(weights, x, cache, views[is_local])
            new.append(cache)
        hidden = jnp.where(row[..., None] < 0, last, module.final_norm(x))
        return module.logits(hidden), (length, last, hidden, new)

    def gather(cache, path):
        length, last, _, caches = cache
        column, depth = jnp.maximum(path, 0), jnp.arange(path.shape[2])
        move = jax.vmap(lambda pool, column: pool[:, column, depth])  # a tree at a time, see `attention.pool`
        moved = [(k, v, move(pool_k, column), move(pool_v, column)) for k, v, pool_k, pool_v in caches]
        return length, last, jnp.zeros((*path.shape[:2], config.width), config.dtype), moved

    return Policy(prefill=prefill, decode=decode, hidden=lambda cache: cache[2], gather=gather)


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

    *shards, count = target.shape
    table = module.table(*shards)

    @jax.checkpoint
    def one(args):
        hidden, target = args
        logits = module.logits(hidden, table) / temperature
        picked = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
        return picked - jax.nn.logsumexp(logits, axis=-1)

    chunk, front = min(chunk, count), len(shards)
    cut = lambda x: jnp.moveaxis(x.reshape(*shards, -1, chunk, *x.shape[front + 1 :]), front, 0)
    pad = lambda x: jnp.pad(x, [(0, -count % chunk if axis == front else 0) for axis in range(x.ndim)])
    found = jax.lax.map(one, (cut(pad(hidden)), cut(pad(target))))
    return jnp.moveaxis(found, 0, front).reshape(*shards, -1)[..., :count]
