"""Forward and backward pass over packed trees, against the same rollouts as separate rows.

Both programs start from the same trees and credit, lay them out (packing, or one row a leaf of
prompt and answer), and return the gradient of the same sum over the same tokens:
  - packed: `learner.gradient` over `packing.Bins`, attention within subtrees, every token once;
  - flattened: `learner.gradient` over rows, `jax.nn.dot_product_attention` (on a GPU cuDNN's, without a mask), a
    shared token as often as leaves stand on it. Log-probs are computed in the same chunks, the clipped objective is summed
    per leaf, and a microbatch holds as many tokens. No row is padded, which favours the baseline.
Trees double their lines at evenly spaced rows until half of a rollout, prompt included, is
shared by two leaves or more (`shared`). The two losses must agree, else the suite raises. The
sizes of bins are ones that these trees fill when split and whole: what is left empty is paid for, too.

Model FLOPs utilisation: 6 x parameters of the products x tokens (unique ones of packed trees, all of flattened rows)
over the time and the speed of a large matrix product in the same run; attention and what is computed again are not
counted. With adapters (shape D) it is 4 x for the frozen weights, whose gradient nobody computes.

The peer, `transformers_update`, goes through all rollouts as rows in a process of its own (see `bench.peers`); its
ratio is to the fastest bins.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from treerl import learner, losses, packing, sharding, step as S, tree as T
from treerl.bench import measure, peers, shapes, synthetic
from treerl.models.policy import token_logps
from treerl.models.presets import PRESETS

KNOBS = dict(temperature=1.0, clip_low=0.2, clip_high=0.2, dual_clip=jnp.inf, kl=0.0)
TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2}  # of the two losses, in units of the mean absolute credit


LAYOUT = {  # of each shape: bins that its trees fill when split into two and whole; tokens at a time
    "A": dict(bin_tokens=(2048, 3648)),
    "B": dict(bin_tokens=(6144, 10240)),
    "C": dict(bin_tokens=(2048, 3648)),
    "D": dict(bin_tokens=(1536, 2560), step_tokens=5120, **shapes.LORA["D"]),
}


def defaults(shape: str | None = None) -> dict:
    """Sizes of a shape (see `shapes`); without one, A on an accelerator and a small one on a CPU."""
    if shape is not None or measure.on_accelerator():
        shape = shape or "A"
        others = dict(shared=0.5, step_tokens=16384, vocab_chunk=1024, remat="products", repeats=5)
        return shapes.sizes(shape, **others) | LAYOUT[shape]
    return dict(
        preset="tiny", dtype="float32", prompts=32, slots=8, prompt=20, rows=64, shared=0.5,
        bin_tokens=(128, 224, 416), step_tokens=1024, vocab_chunk=1024, remat="none", repeats=5,
    )  # fmt: skip


def make_fns(sizes: dict, bin_tokens: int) -> S.Fns:
    """The training step's functions at these sizes; only the learner's are used."""
    config = synthetic.config(sizes)
    config.learner.update(bin_tokens=bin_tokens, bins_per_step=max(1, sizes["step_tokens"] // bin_tokens))
    mesh = sharding.make_mesh(**config.mesh)
    return S.make_fns(config, synthetic.task(PRESETS[sizes["preset"]]["vocab"]), mesh)


def spread(tree: T.Tree, leaf_credit):
    """Credit of leaves [B, L] as three numbers a cell."""
    return jax.vmap(lambda t, c: T.spread(t, leaf_credit=c))(tree, leaf_credit)


def packed(fns: S.Fns, params, tree, prompts, leaf_credit):
    """Gradient and loss over bins: (gradient, loss, number of bins)."""
    credit = spread(tree, leaf_credit)
    bins = learner.pack(fns, tree, prompts, credit, jnp.ones(leaf_credit.shape[:1], bool))
    objective = learner.policy_objective(fns, KNOBS)
    grads, (loss, _, _) = learner.gradient(fns, objective, params, bins, jnp.sum(credit[2]))
    return grads, loss, jnp.sum(bins.count)


def flattened(fns: S.Fns, params, tree, prompts, leaf_credit):
    """Gradient and loss over one row a leaf: (gradient, loss, number of rows)."""
    rows, length = flatten(tree, prompts, leaf_credit)
    shards = sharding.tree_shards(fns.mesh)
    each = rows.token.shape[0] // shards
    step = max(1, min(each, fns.sizes.bin_tokens * fns.sizes.bins_per_step // rows.token.shape[1]))
    step = max(n for n in range(1, step + 1) if each % n == 0)
    arrays = {k: v.reshape(shards, each, -1) for k, v in rows.items() if k != "count"}
    rows = packing.Bins(count=jnp.full((shards,), each), **arrays)
    rows = jax.lax.with_sharding_constraint(rows, sharding.trees(fns.mesh))
    fns = fns._replace(sizes=fns.sizes._replace(bins_per_step=step))
    grads, (loss, _, _) = learner.gradient(fns, flat_objective(fns), params, rows, length)
    return grads, loss, jnp.int32(each * shards)


def flatten(tree: T.Tree, prompts, leaf_credit) -> tuple[packing.Bins, jax.Array]:
    """Rollouts as rows [B * L, P + S], and their answer tokens in all; prompts fill their width.

    `stop` is a row's length; the other fields mean what they mean in a bin.
    """
    batch, leaves, rows = tree.leaf_path.shape
    width = prompts.token.shape[1]
    along = jax.vmap(T.along)
    answer = tree.leaf_path >= 0
    spell = lambda x: jnp.broadcast_to(x[:, None], (batch, leaves, width))
    join = lambda a, b: jnp.concatenate([a, b], axis=-1).reshape(batch * leaves, width + rows)
    blank = jnp.zeros((batch, leaves, width))
    value = lambda x: join(blank, jnp.where(answer, x, 0))
    credit = leaf_credit[..., None]
    index = jnp.broadcast_to(jnp.arange(width + rows), (batch * leaves, width + rows))
    length = (width + jnp.sum(answer, axis=-1)).reshape(-1, 1)
    return packing.Bins(
        token=join(spell(prompts.token), along(tree, tree.token)),
        position=index,
        stop=jnp.where(index < length, length, 0),
        parent=jnp.maximum(index - 1, 0),
        positive=value(jnp.maximum(credit, 0)),
        negative=value(jnp.minimum(credit, 0)),
        weight=value(jnp.ones_like(credit)),
        logp=value(along(tree, tree.logp_policy)),
        reference=value(jnp.zeros_like(credit)),
        cell=jnp.where(index < width, -1, index),
        count=jnp.int32(batch * leaves),
    ), jnp.sum(answer)


def plain(q, k, v, cache, window=None):
    """Causal attention within rows that are padded on the right, if at all; by cuDNN where that can."""
    del window
    fast = jax.default_backend() == "gpu" and q.dtype == jnp.bfloat16
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn" if fast else None), cache


def flat_objective(fns: S.Fns):
    """The clipped objective summed over rows, by plain causal attention."""

    def objective(params, rows: packing.Bins):
        module, size = fns.model.merge(params), fns.sizes
        hidden, _ = module(rows.token, rows.position, plain, remat=size.remat)
        hidden = jnp.roll(hidden, 1, axis=1).reshape(-1, hidden.shape[-1])  # a prompt's first token weighs 0
        logp = token_logps(module, hidden, rows.token.reshape(-1), KNOBS["temperature"], chunk=size.vocab_chunk)
        logp = jnp.where(rows.weight > 0, logp.reshape(rows.token.shape), 0)
        clip = {k: KNOBS[k] for k in ("clip_low", "clip_high")}
        loss, _ = losses.clipped(logp, rows.logp, rows.positive, rows.negative, **clip)
        return jnp.sum(loss), ({}, jnp.float32(0))

    return objective


def check_agreement(name: str, packed_loss: float, flat_loss: float, credit: float, tolerance: float) -> float:
    """The difference of the two losses; raises ValueError where it is above tolerance.

    In units of the mean absolute credit of a token, which is what a loss is made of: gains and
    losses of a random policy nearly cancel, so a loss itself is no measure of its rounding.
    """
    difference = abs(packed_loss - flat_loss) / credit
    if not difference <= tolerance:
        raise ValueError(
            f"learner suite: {name} has loss {packed_loss:.6g} and the flattened rows {flat_loss:.6g}, "
            f"{difference:.2g} mean absolute credits apart, above {tolerance:g}; they must be the same objective."
        )
    return difference


def shared_share(tree: T.Tree, width: int) -> float:
    """Share of the flattened tokens, prompts included, that two leaves or more stand on."""
    count = np.asarray(jax.vmap(T.leaf_count)(tree))
    leaves = np.asarray(jax.vmap(T.leaf_valid)(tree)).sum(1)
    shared = np.where(count >= 2, count, 0).sum() + width * leaves[leaves >= 2].sum()
    return shared / (count.sum() + width * leaves.sum())


def rows(*, shape=None, beside=False, outside=None, **sizes):
    """Yields rows of the suite; `sizes` replace `defaults(shape)`, `outside` is what `peers.outside` found."""
    del beside  # the peer has a process of its own
    sizes = {**defaults(shape), **sizes}
    vocab, width = PRESETS[sizes["preset"]]["vocab"], sizes["prompt"]
    batch, slots = sizes["prompts"], sizes["slots"]
    all_fns = {size: make_fns(sizes, size) for size in sizes["bin_tokens"]}
    fns = next(iter(all_fns.values()))
    params = jax.jit(fns.model.init, out_shardings=S.state_shardings(fns).params)(jax.random.key(0))
    last_fork = max(0, int(np.ceil(sizes["shared"] * (width + sizes["rows"]))) - width)
    tree = synthetic.trees(vocab, batch, slots, sizes["rows"], last_fork)
    prompts = synthetic.prompts(vocab, batch, width)
    credit = jnp.broadcast_to(jnp.linspace(-1.0, 2.0, slots), (batch, slots))  # a sum far from zero
    inputs = jax.device_put((tree, prompts, credit), sharding.trees(fns.mesh))
    row = functools.partial(measure.row, "learner", shapes=sizes)

    unique, flat = (int(jnp.sum(x)) + batch * width * n for x, n in zip(jax.vmap(T.token_count)(tree), (1, slots)))
    yield row("shared_prefix", shared_share(tree, width), "of flattened tokens")
    yield row("flattened_tokens", flat, "tokens")
    yield row("unique_tokens", unique, "tokens", versus="flattened_tokens", ratio=unique / flat)

    runs = {f"packed_{size}": functools.partial(packed, all_fns[size]) for size in sizes["bin_tokens"]}
    programs = {}
    for name, function in {"flattened": functools.partial(flattened, fns), **runs}.items():
        programs[name] = measure.compiled(function, params, *inputs)
        yield row(f"{name}.compile", programs[name].compile_seconds, "s")
        yield row(f"{name}.peak_memory", programs[name].peak_bytes, "bytes")
    flat_grads, flat_loss, _ = programs["flattened"].run(params, *inputs)
    distance = jax.jit(lambda a, b: optax.tree.norm(jax.tree.map(jnp.subtract, a, b)) / optax.tree.norm(b))
    for name, size in zip(runs, sizes["bin_tokens"]):
        grads, loss, count = programs[name].run(params, *inputs)
        apart = check_agreement(name, float(loss), float(flat_loss), float(jnp.mean(jnp.abs(credit))), TOLERANCE[sizes["dtype"]])
        yield row(f"{name}.loss_difference", apart, "mean absolute credits")
        yield row(f"{name}.gradient_difference", distance(grads, flat_grads), "relative")
        yield row(f"{name}.bins", count, "bins")
        yield row(f"{name}.filled", unique / (float(count) * size), "tokens of a bin")
        del grads
    del flat_grads
    turns = {name: functools.partial(program.run, params, *inputs) for name, program in programs.items()}
    times = measure.alternate(turns, sizes["repeats"])
    peak, flops = measure.matrix_peak(sizes["dtype"]), functools.partial(measure.learning_flops, fns.model.config)
    yield row("matrix_peak", peak / 1e12, "TFLOP/s")
    fastest = min(runs, key=lambda name: times[name].median)
    others = peers.matching(outside, sizes)
    for name, time in (times | {name: other.times for name, other in others.items()}).items():
        against = dict(versus="flattened", ratio=time.over(times["flattened"])) if name in runs else {}
        if name in others:
            against = dict(versus=fastest, ratio=time.median / times[fastest].median)
            yield row(f"{name}.first_call", others[name].first_seconds, "s")
            if others[name].peak_bytes:
                yield row(f"{name}.peak_memory", others[name].peak_bytes, "bytes")
        yield row(name, time.median, "s", **against)
        yield row(f"{name}.tokens", flat / time.median, "rollout tokens/s")
        done = flops(unique if name in runs else flat)
        yield row(f"{name}.utilisation", done / time.median / peak, "model FLOPs over the matrix peak")
