"""One functional training step: sample, grade, estimate, pack, update.

    train_step(state, prompts, knobs) -> state, metrics

Everything between the prompts and the updated parameters is one program that XLA compiles and
shards. `make_fns` is the only function here that reads the config: it chooses the functions;
`knobs` holds the numbers, traced, so that changing one compiles nothing.
"""
import functools
import inspect
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from treerl import branching, losses, packing, pruning, rewards, sampler, sharding
from treerl import tree as T
from treerl.advantages import ESTIMATORS
from treerl.config import fits
from treerl.errors import UserError
from treerl.metrics import describe
from treerl.models.policy import make_policy, packed_hidden, token_logps
from treerl.models.transformer import Model, TransformerConfig
from treerl.optimizer import make_optimizer
from treerl.tasks import Task
from treerl.types import Prompts, TrainState


class Sizes(NamedTuple):
    """Static sizes; see `treerl.config` for their meaning."""

    prompts: int
    slots: int
    prompt: int
    rows: int
    budget: int
    segment: int
    lengths: tuple[int, ...]
    bin_tokens: int
    bins_per_step: int
    epochs: int
    vocab_chunk: int
    remat: bool


class Fns(NamedTuple):
    """The functions that a config chooses; a training step is their composition."""

    sizes: Sizes
    model: Model
    optimizer: optax.GradientTransformation
    mesh: Mesh
    branching: Callable  # (knobs, step) -> Branching
    pruning: Callable  # (knobs) -> Pruning
    grader: Callable  # (tokens [S], length [], data) -> [] float32
    estimator: Callable  # (tree, reward [L]) -> leaf credit [L] or cell credit [S, K]
    leaf_weight: Callable  # (tree) -> [L] float32, weight of each token of a leaf, or None
    needs_reference: bool


def _known(name: str, table: dict, field: str):
    if name not in table:
        raise UserError(f"{field}={name!r} is unknown; known are {', '.join(sorted(table))}.")
    return table[name]


def _estimator(name: str, options) -> Callable:
    """The estimator of a name with its options, keyword arguments that take the types of their defaults."""
    estimator = _known(name, ESTIMATORS, "advantage.name")
    known = {k: p.default for k, p in inspect.signature(estimator).parameters.items() if p.kind is p.KEYWORD_ONLY}
    for option, value in options.items():
        if option not in known:
            names = ", ".join(sorted(known))
            raise UserError(f"advantage.options has no {option!r} for advantage.name={name}; known are {names}.")
        like = known[option]
        if not fits(value, like):
            kind = type(like).__name__
            raise UserError(f"advantage.options.{option}={value!r} is no {kind}; set one such as {like!r}.")
    return functools.partial(estimator, **options)


def make_fns(config, task: Task, mesh: Mesh, *, optimizer=None) -> Fns:
    """Chooses the functions of a config. `optimizer` replaces the config's own."""
    s, l, b, p = config.sampler, config.learner, config.branching, config.pruning

    def lookahead(knobs, step):
        share = knobs["share"][jnp.sum(knobs["share_from"] <= step) - 1]
        return branching.lookahead(
            tau_abs=knobs["tau_abs"], tau_rel=knobs["tau_rel"], share=share, greedy=knobs["greedy"],
            fill_after=knobs["fill_after"], max_children=b.max_children,
        )  # fmt: skip

    branchings = {"stochastic": lambda knobs, step: branching.stochastic(), "lookahead": lookahead}
    windows = tuple(p.windows)
    if p.rule == "similarity" and (not windows or not 1 <= min(windows) <= max(windows) <= s.answer_length):
        raise UserError(
            f"pruning.windows={windows} must be lengths from 1 to sampler.answer_length={s.answer_length}; "
            "shorten them, or set pruning.rule=none."
        )
    prunings = {
        "none": lambda knobs: pruning.none(),
        "similarity": lambda knobs: pruning.similarity(windows=windows, tau_ed=knobs["tau_ed"]),
    }
    weightings = {
        "token": lambda tree: None,
        "sequence": lambda tree: 1 / jnp.maximum(T.leaf_length(tree), 1).astype(jnp.float32),
    }
    forks = b.rule != "stochastic"
    if s.prompts % sharding.tree_shards(mesh):
        shards = sharding.tree_shards(mesh)
        raise UserError(
            f"sampler.prompts={s.prompts} does not divide over mesh.data x mesh.fsdp = {shards} shards; "
            "make it a multiple."
        )
    packing.bin_bound(s.prompts, s.slots, s.prompt_length + s.answer_length, l.bin_tokens)
    return Fns(
        sizes=Sizes(
            prompts=s.prompts, slots=s.slots, prompt=s.prompt_length, rows=s.answer_length,
            budget=s.answer_length + (b.fill_after + 1 if forks else 0), segment=s.segment,
            lengths=tuple(s.lengths) + (s.answer_length,), bin_tokens=l.bin_tokens,
            bins_per_step=l.bins_per_step, epochs=l.epochs, vocab_chunk=l.vocab_chunk, remat=l.remat,
        ),
        model=Model(TransformerConfig(vocab=task.tokenizer.vocab_size, **config.model)),
        optimizer=optimizer or make_optimizer(config.optimizer, config.steps * l.epochs),
        mesh=mesh,
        branching=_known(b.rule, branchings, "branching.rule"),
        pruning=_known(p.rule, prunings, "pruning.rule"),
        grader=task.grade,
        estimator=_estimator(config.advantage.name, config.advantage.options),
        leaf_weight=_known(l.weighting, weightings, "learner.weighting"),
        needs_reference=l.kl > 0,
    )  # fmt: skip


def make_knobs(config, task: Task) -> dict:
    """The traced numbers of a config."""
    b, f32 = config.branching, jnp.float32
    return dict(
        temperature=f32(config.sampler.temperature),
        top_p=f32(config.sampler.top_p),
        eos=jnp.atleast_1d(jnp.int32(task.tokenizer.eos_id)),
        tau_abs=f32(b.tau_abs),
        tau_rel=f32(b.tau_rel),
        share_from=jnp.array([step for step, _ in b.share], jnp.int32),
        share=jnp.array([share for _, share in b.share], f32),
        fill_after=jnp.int32(b.fill_after),
        greedy=jnp.bool_(b.greedy),
        tau_ed=f32(config.pruning.tau_ed),
        clip_low=f32(config.learner.clip_low),
        clip_high=f32(config.learner.clip_high),
        kl=f32(config.learner.kl),
    )


# --- the state -----------------------------------------------------------------------------


def init_state(fns: Fns, seed: int) -> TrainState:
    """Random parameters and everything else at zero; traceable, see `state_shardings`."""
    key = jax.random.key(seed)
    params = fns.model.init(jax.random.fold_in(key, 0))
    return TrainState(
        params=params,
        opt_state=fns.optimizer.init(params),
        reference=jax.tree.map(jnp.copy, params) if fns.needs_reference else None,
        step=jnp.int32(0),
        key=jax.random.key_data(jax.random.fold_in(key, 1)),
        position=jnp.int32(0),
        skipped=jnp.int32(0),
    )


def restart(fns: Fns, state: TrainState) -> TrainState:
    """A fresh optimizer, and the policy as it is for reference: the start of a new phase."""
    return state.replace(
        opt_state=fns.optimizer.init(state.params),
        reference=jax.tree.map(jnp.copy, state.params) if fns.needs_reference else None,
        skipped=jnp.int32(0),
    )


def state_shardings(fns: Fns):
    """Shardings of a TrainState: parameters by their logical axes, moments like parameters."""
    params = sharding.parameter_shardings(fns.mesh, fns.model.axes(), fns.model.shapes())
    everywhere = sharding.replicated(fns.mesh)
    abstract = jax.eval_shape(fns.optimizer.init, fns.model.shapes())
    return TrainState(
        params=params,
        opt_state=optax.tree_map_params(
            fns.optimizer, lambda _, s: s, abstract, params, transform_non_params=lambda _: everywhere
        ),
        reference=params if fns.needs_reference else None,
        step=everywhere,
        key=everywhere,
        position=everywhere,
        skipped=everywhere,
    )


# --- sample and grade ----------------------------------------------------------------------


def rollout(fns: Fns, params, prompts: Prompts, key, step, knobs, *, slots=None) -> tuple[T.Tree, sampler.Stats]:
    """Grows a tree for every prompt; `slots` independent samples instead, if given."""
    axes, shapes = fns.model.axes(), fns.model.shapes()
    gathered = sharding.parameter_shardings(fns.mesh, axes, shapes, gathered=True)
    params = jax.tree.map(lambda p: p.astype(fns.model.config.dtype), params)
    params = jax.lax.with_sharding_constraint(params, gathered)  # once, before the loop
    size = fns.sizes
    plain = slots is not None
    slots = slots if plain else size.slots
    return sampler.sample(
        make_policy(fns.model, params, slots=slots, rows=size.rows, mesh=fns.mesh),
        branching.stochastic() if plain else fns.branching(knobs, step),
        pruning.none() if plain else fns.pruning(knobs),
        prompts,
        jax.random.fold_in(key, step),
        slots=slots,
        rows=size.rows,
        budget=size.rows if plain else size.budget,
        segment=size.segment,
        lengths=size.lengths,
        temperature=knobs["temperature"],
        top_p=knobs["top_p"],
        eos=knobs["eos"],
    )


def evaluate_step(fns: Fns, params, prompts: Prompts, key, knobs, *, samples: int):
    """Rewards of independent samples: float32 [B, samples]."""
    tree, _ = rollout(fns, params, prompts, key, 0, knobs, slots=samples)
    return rewards.grade(tree, prompts.data, fns.grader)


# --- learn ---------------------------------------------------------------------------------


def estimate(fns: Fns, tree: T.Tree, reward: jax.Array):
    """Credit of batched trees: (as estimated, (positive, negative, weight) each [B, S, K])."""

    def one(tree, reward):
        credit = fns.estimator(tree, reward)
        kind = "leaf_credit" if credit.ndim == 1 else "cell_credit"
        return credit, T.spread(tree, leaf_weight=fns.leaf_weight(tree), **{kind: credit})

    return jax.vmap(one)(tree, reward)


def pack(fns: Fns, tree: T.Tree, prompts: Prompts, credit, include) -> packing.Bins:
    """Packs each shard's trees into its own bins: leaves [shards, N, C], count [shards]."""
    shards = sharding.tree_shards(fns.mesh)
    batch = tree.token.shape[0] // shards
    size = fns.sizes
    rows, leaves = tree.token.shape[1], tree.leaf.shape[1]
    bound = packing.bin_bound(batch, leaves, prompts.token.shape[1] + rows, size.bin_tokens)
    bound = -(-bound // size.bins_per_step) * size.bins_per_step
    split = lambda x: x.reshape(shards, batch, *x.shape[1:])
    one = functools.partial(packing.pack, size=size.bin_tokens, bins=bound)
    bins = jax.vmap(one)(*jax.tree.map(split, (tree, prompts, credit, include)))
    return jax.lax.with_sharding_constraint(bins, sharding.trees(fns.mesh))


def policy_objective(fns: Fns, reference, knobs):
    """The clipped objective, with KL to a reference if there is one."""

    def objective(params, bins: packing.Bins):
        logp, _ = bin_logps(fns, params, bins, knobs["temperature"])
        loss, is_clipped = losses.clipped(
            logp, bins.logp, bins.positive, bins.negative, clip_low=knobs["clip_low"], clip_high=knobs["clip_high"]
        )
        drift = jnp.where(bins.weight > 0, jnp.abs(logp - bins.logp), 0)
        sums = dict(
            clipped=jnp.sum(is_clipped * bins.weight), drift=jnp.sum(drift * bins.weight), weight=jnp.sum(bins.weight)
        )
        if reference is not None:
            before, _ = bin_logps(fns, reference, bins, knobs["temperature"])
            kl = jnp.where(bins.weight > 0, losses.kl_k3(logp, before), 0) * bins.weight
            loss = loss + knobs["kl"] * kl
            sums["kl"] = jnp.sum(kl)
        return jnp.sum(loss), (sums, jnp.max(drift))

    return objective


def supervised_objective(fns: Fns):
    """The likelihood of reference answers."""

    def objective(params, bins: packing.Bins):
        logp, _ = bin_logps(fns, params, bins, jnp.float32(1))
        return jnp.sum(losses.likelihood(logp, bins.weight)), ({}, jnp.float32(0))

    return objective


def bin_logps(fns: Fns, params, bins: packing.Bins, temperature):
    """Log-prob and entropy [N, C] of every token of a bin, given its parent; 0 where padded."""
    size = fns.sizes
    module, hidden = packed_hidden(fns.model, params, bins.token, bins.position, bins.stop, remat=size.remat)
    hidden = jnp.take_along_axis(hidden, bins.parent[..., None], axis=1)
    flat = hidden.reshape(-1, hidden.shape[-1])
    logp, entropy = token_logps(module, flat, bins.token.reshape(-1), temperature, chunk=size.vocab_chunk)
    real = bins.weight > 0
    shape = lambda x: jnp.where(real, x.reshape(real.shape), 0)
    return shape(logp), shape(entropy)


def gradient(fns: Fns, objective, params, bins: packing.Bins, weight):
    """Gradient of (sum over all bins) / weight, microbatch by microbatch.

    The number of microbatches is data: as many as the fullest shard needs. Sums are divided
    once, so neither it nor the number of bins or shards changes the gradient.

    Args:
      objective: (params, Bins of [n, C]) -> (loss sum, (dict of sums, a maximum)).
      bins: [shards, N, C]. weight: [] float32, of the whole batch.

    Returns:
      (gradient, (loss, sums / weight, maximum)).
    """
    step, shards = fns.sizes.bins_per_step, bins.token.shape[0]
    arrays = {k: v for k, v in bins.items() if k != "count"}

    def micro(i):
        take = lambda x: jax.lax.dynamic_slice_in_dim(x, i * step, step, axis=1).reshape(shards * step, -1)
        return packing.Bins(count=bins.count, **jax.tree.map(take, arrays))

    value = jax.value_and_grad(jax.jit(objective), has_aux=True)  # traced once, for its shapes too
    shapes = jax.eval_shape(value, params, jax.eval_shape(micro, 0))
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)  # whatever the parameters are

    def body(carry):
        i, ((loss, (sums, top)), grads) = carry
        (new_loss, (new_sums, new_top)), new_grads = value(params, micro(i))
        add = functools.partial(jax.tree.map, jnp.add)
        total = (loss + new_loss, (add(sums, new_sums), jnp.maximum(top, new_top))), add(grads, new_grads)
        return i + 1, total

    _, ((loss, (sums, top)), grads) = jax.lax.while_loop(
        lambda carry: carry[0] * step < jnp.max(bins.count), body, (jnp.int32(0), zero)
    )
    norm = jnp.maximum(weight, 1e-9)
    grads, sums = jax.tree.map(lambda x: x / norm, (grads, sums))
    grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params)
    return grads, (loss / norm, sums, top)


def update(fns: Fns, state: TrainState, grads, loss) -> tuple[TrainState, dict]:
    """One Optax update; parameters and optimizer stay as they are if loss or gradient is not finite."""

    def apply(params, opt_state):
        updates, opt_state = fns.optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    norm = optax.tree.norm(grads)
    good = jnp.isfinite(norm) & jnp.isfinite(loss)
    # A branch works in place; a `where` over the whole state costs one more copy of the parameters.
    params, opt_state = jax.lax.cond(good, apply, lambda *same: same, state.params, state.opt_state)
    state = state.replace(params=params, opt_state=opt_state, skipped=jnp.where(good, 0, state.skipped + 1))
    return state, dict(loss=loss, grad_norm=norm, skipped=1 - good.astype(jnp.int32))


def learn(fns: Fns, state: TrainState, tree: T.Tree, prompts: Prompts, credit, knobs) -> tuple[TrainState, dict]:
    """`epochs` updates on the same trees, each over all of them."""
    positive, negative, weight = credit
    has_gradient = jnp.any((positive != 0) | (negative != 0), axis=(1, 2))
    include = has_gradient | fns.needs_reference  # a tree without credit has nothing but its KL
    bins = pack(fns, tree, prompts, credit, include)
    total = jnp.sum(weight)
    objective = policy_objective(fns, state.reference, knobs)

    def epoch(state, _):
        grads, (loss, sums, top) = gradient(fns, objective, state.params, bins, total)
        state, metrics = update(fns, state, grads, loss)
        seen = jnp.maximum(sums.pop("weight"), 1e-9)  # share of the weight that was trained on
        metrics = dict(metrics, logp_drift_max=top, **{k: v / seen for k, v in sums.items()})
        return state, metrics

    state, metrics = jax.lax.scan(epoch, state, None, length=fns.sizes.epochs)
    first, last = (jax.tree.map(lambda x: x[i], metrics) for i in (0, -1))
    kept = dict(last, logp_drift=first["drift"], logp_drift_max=first["logp_drift_max"])
    kept = dict(kept, skipped=jnp.sum(metrics["skipped"]))
    kept.pop("drift")
    return state, dict(kept, bins=jnp.max(bins.count), trees_trained=jnp.mean(include.astype(jnp.float32)))


def train_step(fns: Fns, state: TrainState, prompts: Prompts, knobs: dict) -> tuple[TrainState, dict]:
    """The step: prompts [B, ...] to updated parameters.

    1. sample: grow a tree for every prompt
    2. grade: a reward for every leaf
    3. estimate: credit from rewards and the shape of the tree
    4. learn: pack the trees, each token once, and update
    """
    key = jax.random.wrap_key_data(state.key)
    tree, stats = rollout(fns, state.params, prompts, key, state.step, knobs)
    tree, stats = jax.lax.with_sharding_constraint((tree, stats), sharding.trees(fns.mesh))
    reward = rewards.grade(tree, prompts.data, fns.grader)
    _, credit = estimate(fns, tree, reward)
    state, metrics = learn(fns, state, tree, prompts, credit, knobs)
    state = state.replace(step=state.step + 1, position=state.position + prompts.token.shape[0])
    return state, dict(metrics, **describe(tree, reward, stats))


def supervised_step(fns: Fns, state: TrainState, prompts: Prompts, answer, length) -> tuple[TrainState, dict]:
    """One update on reference answers [B, S] of `length` [B] tokens: trees of a single line."""
    parent = jnp.zeros((answer.shape[1], 1), jnp.int32)

    def line(token, length):
        used = jnp.arange(token.shape[0])[:, None] < length
        return T.from_parents(parent, used, jnp.array([[length - 1, 0]]), token=token[:, None])

    tree = jax.vmap(line)(answer, length)
    weight = tree.used.astype(jnp.float32)
    bins = pack(fns, tree, prompts, (weight, weight, weight), jnp.ones(length.shape, bool))
    objective = supervised_objective(fns)
    grads, (loss, _, _) = gradient(fns, objective, state.params, bins, jnp.sum(weight))
    return update(fns, state, grads, loss)
