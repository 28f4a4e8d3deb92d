"""What the learner computes over bins of tokens: log-probs, objectives and gradients.

Functions take `fns` (see `functions.Fns`) for the model, the mesh and static sizes. Bins are
[shards, N, C]: each shard of the mesh packs its own trees.
"""

import functools

import jax
import jax.numpy as jnp
import optax

from treerl import losses, packing, sharding, tree as T
from treerl.models.policy import likeliest_tokens, packed_hidden, token_logps
from treerl.types import Prompts


def pack(fns, tree: T.Tree, prompts: Prompts, credit, include, reference=None) -> packing.Bins:
    """Packs each shard's trees into its own bins: leaves [shards, N, C], count [shards]."""
    shards, size = sharding.tree_shards(fns.mesh), fns.sizes
    batch = tree.token.shape[0] // shards
    rows, leaves = tree.token.shape[1], tree.leaf.shape[1]
    bound = packing.bin_bound(batch, leaves, prompts.token.shape[1] + rows, size.bin_tokens)
    bound = -(-bound // size.bins_per_step) * size.bins_per_step
    split = lambda x: x.reshape(shards, batch, *x.shape[1:])
    reference = jnp.zeros(tree.token.shape) if reference is None else reference
    one = lambda *args: packing.pack(*args[:-1], reference=args[-1], size=size.bin_tokens, bins=bound)
    bins = jax.vmap(one)(*jax.tree.map(split, (tree, prompts, credit, include, reference)))
    return jax.lax.with_sharding_constraint(bins, sharding.trees(fns.mesh))


def bin_logps(fns, params, bins: packing.Bins, temperature) -> jax.Array:
    """Log-prob [N, C] of every token of an answer, given its parent; 0 for prompts and padding."""
    module, hidden, own = _before(fns, params, bins)
    logp = token_logps(module, hidden, own(bins.token), temperature, chunk=fns.sizes.vocab_chunk)
    return jnp.where(bins.cell >= 0, logp.reshape(bins.cell.shape), 0)


def _before(fns, params, bins: packing.Bins):
    """(module, hidden states that predict the tokens of bins, [tokens, D] of each shard, a function that lays out [N, C, ...] so)."""
    module, hidden = packed_hidden(fns.model, params, bins.token, bins.position, bins.stop, remat=fns.sizes.remat)
    hidden = jnp.take_along_axis(hidden, bins.parent[..., None], axis=1)
    shards = (sharding.tree_shards(fns.model.mesh),) if fns.model.mesh is not None and fns.model.mesh.size > 1 else ()
    own = lambda x: x.reshape(*shards, -1, *x.shape[2:])
    return module, own(hidden), own


def microbatch(fns, bins: packing.Bins, i) -> packing.Bins:
    """The i-th bins of every shard: [shards, N, C] -> [shards * bins_per_step, C]."""
    step, shards = fns.sizes.bins_per_step, bins.token.shape[0]
    take = lambda x: jax.lax.dynamic_slice_in_dim(x, i * step, step, axis=1).reshape(shards * step, -1)
    arrays = {k: v for k, v in bins.items() if k != "count"}
    return packing.Bins(count=bins.count, **jax.tree.map(take, arrays))


def cell_logps(fns, params, tree: T.Tree, prompts: Prompts, temperature) -> jax.Array:
    """Log-probs of the tokens of kept cells by the learner's own forward pass: [B, S, K], no gradient."""
    return _of_cells(fns, tree, prompts, lambda bins: bin_logps(fns, params, bins, temperature))


def cell_candidates(fns, params, tree: T.Tree, prompts: Prompts, temperature, *, count: int) -> tuple[jax.Array, jax.Array]:
    """What the policy was likeliest to draw in each kept cell: (tokens int32, probabilities) [B, S, K, count]; 0 elsewhere."""

    def of_bins(bins):
        module, hidden, _ = _before(fns, params, bins)
        found = likeliest_tokens(module, hidden, temperature, count=count, chunk=fns.sizes.vocab_chunk)
        return jax.tree.map(lambda x: x.reshape(*bins.cell.shape, count), found)

    return _of_cells(fns, tree, prompts, of_bins)


def _of_cells(fns, tree: T.Tree, prompts: Prompts, of_bins):
    """of_bins(bins) -> arrays [N, C, ...], in the kept cells of trees: [B, S, K, ...], 0 elsewhere; no gradient."""
    ones = jax.vmap(T.kept)(tree).astype(jnp.float32)
    bins = pack(fns, tree, prompts, (ones, ones, ones), jnp.ones(ones.shape[:1], bool))
    step, shards = fns.sizes.bins_per_step, bins.token.shape[0]

    def body(carry):
        i, found = carry
        put = lambda all, new: jax.lax.dynamic_update_slice_in_dim(all, new.reshape(shards, step, *new.shape[1:]), i * step, axis=1)
        return i + 1, jax.tree.map(put, found, of_bins(microbatch(fns, bins, i)))

    like = jax.eval_shape(lambda: of_bins(microbatch(fns, bins, 0)))
    start = jax.tree.map(lambda x: jnp.zeros((*bins.token.shape[:2], *x.shape[1:]), x.dtype), like)
    _, found = jax.lax.while_loop(lambda carry: carry[0] * step < jnp.max(bins.count), body, (jnp.int32(0), start))
    each = ones.reshape(shards, -1, *ones.shape[1:])

    def back(values):
        many = jax.vmap(packing.unpack, in_axes=(-1, None, None), out_axes=-1)  # of several numbers a token
        cells = jax.vmap(many if values.ndim > 3 else packing.unpack)(values, bins, each)
        return cells.reshape(*ones.shape, *values.shape[3:])

    return jax.lax.stop_gradient(jax.tree.map(back, found))


def gradient_norms(fns, params, tree: T.Tree, prompts: Prompts, temperature) -> jax.Array:
    """Squared norm of the gradient of each leaf's log-prob: float32 [B, L].

    One backward pass a rollout, prefixes repeated, as the estimator that asks for it is defined: about as
    much work as training on the flattened rollouts, one row at a time.
    """
    shards, (_, leaves, rows) = sharding.tree_shards(fns.mesh), tree.leaf_path.shape
    fns = fns._replace(model=fns.model.anywhere)  # one row at a time
    size = prompts.token.shape[1] + rows

    def line(token, length):
        used = jnp.arange(rows)[:, None] < length
        return T.from_parents(jnp.zeros((rows, 1)), used, jnp.stack([length - 1, jnp.zeros_like(length)])[None], token=token[:, None])

    trained, frozen = fns.model.split(params)

    def logp(trained, token, length, own, prompt):
        params = fns.model.join(trained, frozen)
        one = jax.tree.map(lambda x: x[None], (line(token, length), prompt))
        weight = (one[0].used & own[None, :, None]).astype(jnp.float32)
        return jnp.sum(bin_logps(fns, params, packing.pack(*one, (weight,) * 3, size=size, bins=1), temperature))

    def norm(leaf):
        token, length, own, prompt = leaf
        grads = jax.grad(logp)(trained, token, length, own, prompt)
        return jnp.where(length > 0, jnp.square(optax.tree.norm(grads)), 0)

    token = jax.vmap(lambda t: T.along(t, t.token))(tree)
    length = jax.vmap(T.leaf_length)(tree)
    own = jax.vmap(lambda t: T.along(t, T.spoken(t)))(tree)
    repeat = lambda x: jnp.repeat(x, leaves, axis=0)
    every = (token.reshape(-1, rows), length.reshape(-1), own.reshape(-1, rows), jax.tree.map(repeat, prompts))
    turns = jax.tree.map(lambda x: x.reshape(shards, -1, *x.shape[1:]).swapaxes(0, 1), every)
    return jax.lax.map(jax.vmap(norm), turns).swapaxes(0, 1).reshape(length.shape)


def policy_objective(fns, knobs):
    """The chosen objective, with the KL to the reference policy if there is one."""

    def objective(params, bins: packing.Bins):
        logp = bin_logps(fns, params, bins, knobs["temperature"])
        loss = fns.objective(knobs)(logp, bins)
        drift = jnp.where(bins.weight > 0, jnp.abs(logp - bins.logp), 0)
        sums = dict(clipped=loss.clipped, drift=jnp.sum(drift * bins.weight), weight=loss.weight)
        total = loss.sum
        if fns.kl is not None:
            sums["kl"], _ = losses.divergence(logp, bins, fns.kl)
            total = total + knobs["kl"] * sums["kl"]
        return total, (sums, jnp.max(drift))

    return objective


def supervised_objective(fns):
    """The likelihood of reference answers."""

    def objective(params, bins: packing.Bins):
        return losses.likelihood(bin_logps(fns, params, bins, jnp.float32(1)), bins).sum, ({}, jnp.float32(0))

    return objective


def gradient(fns, objective, params, bins: packing.Bins, weight):
    """Gradient of (sum over all bins) / weight, microbatch by microbatch.

    The number of microbatches is data: as many as the fullest shard needs. Sums are divided
    once, so neither it nor the number of bins or shards changes the gradient.

    Args:
      objective: (params, Bins of [n, C]) -> (loss sum, (dict of sums, a maximum)).
      bins: [shards, N, C]. weight: [] float32, of the whole batch.

    Returns:
      (gradient of what is trained, float32, (loss, sums / weight, maximum)).
    """
    model, step = fns.model, fns.sizes.bins_per_step
    where = sharding.parameter_shardings(fns.mesh, model.axes(), model.shapes())
    rounded = jax.tree.map(lambda x: x.astype(model.config.dtype), params)
    trained, frozen = model.split(jax.lax.with_sharding_constraint(rounded, where))  # what every microbatch would round again
    cut = lambda grads: jax.lax.with_sharding_constraint(grads, model.split(where)[0])  # a device sums its own part
    part = jax.jit(lambda trained, bins: objective(model.join(trained, frozen), bins))
    value = jax.value_and_grad(part, has_aux=True)  # traced once, for its shapes too
    shapes = jax.eval_shape(value, trained, jax.eval_shape(lambda: microbatch(fns, bins, 0)))
    sums, grads = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)  # whatever the parameters are
    zero = sums, cut(grads)

    def body(carry):
        i, ((loss, (sums, top)), grads) = carry
        (new_loss, (new_sums, new_top)), new_grads = value(trained, microbatch(fns, bins, i))
        add = functools.partial(jax.tree.map, jnp.add)
        total = (loss + new_loss, (add(sums, new_sums), jnp.maximum(top, new_top))), add(grads, cut(new_grads))
        return i + 1, total

    _, ((loss, (sums, top)), grads) = jax.lax.while_loop(lambda carry: carry[0] * step < jnp.max(bins.count), body, (jnp.int32(0), zero))
    norm = jnp.maximum(weight, 1e-9)
    grads, sums = jax.tree.map(lambda x: x / norm, (grads, sums))
    return grads, (loss / norm, sums, top)
