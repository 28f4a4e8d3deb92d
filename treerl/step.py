"""One functional training step: from prompts to updated parameters.

    train_step(fns, state, prompts, knobs) -> state, metrics

    1. sample    grow a tree for every prompt, prune on the way     `rollout`
    2. grade     a reward for every leaf                            `grade`, or the host between
    3. estimate  credit from rewards and the shape of the tree      `estimate`
    4. weigh     what a token counts: aggregation, forced tokens, importance    `weigh`, `thin`
    5. learn     pack the trees, each token once, and update        `learn`, `learn_quality`

All of it is one program that XLA compiles and shards; where the host grades text it is two, `sample_half` and
`learn_half`, or one that calls the host. `fns` are the functions that a config
chose (`treerl.functions`); `knobs` are its numbers, traced, so that changing one compiles nothing.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from treerl import branching, episodes, masked, packing, pruning, reprompt, rewards, sampler, sharding, survival, tree as T
from treerl.functions import Fns, Sizes, make_fns, make_knobs
from treerl.graders import FAULTS
from treerl.learner import (
    cell_logps,
    gradient,
    gradient_norms,
    pack,
    policy_objective,
    supervised_objective,
)  # fmt: skip
from treerl.metrics import describe
from treerl.models.policy import make_policy
from treerl.types import Cells, Prompts, TrainState

__all__ = ["Fns", "Sizes", "make_fns", "make_knobs"]

WORLD = 0x7FFFFFFF  # folded into a step's key for the starts of episodes; no example has this index

# --- the state -----------------------------------------------------------------------------


def init_state(fns: Fns, seed: int, loaded=None) -> TrainState:
    """The start of training; traceable, see `state_shardings`.

    Args:
      loaded: parameters of a published model; None draws them at random.
    """
    key = jax.random.key(seed)
    own = jax.random.fold_in(key, 0)
    params = fns.model.init(own) if loaded is None else fns.model.adapt(loaded, own)
    trained, _ = fns.model.split(params)
    return TrainState(
        params=params,
        opt_state=fns.optimizer.init(trained),
        reference=jax.tree.map(jnp.copy, trained) if fns.reference else None,
        memory=fns.advantage.memory,
        quality=start_quality(fns, jax.random.fold_in(key, 2)),
        step=jnp.int32(0),
        key=jax.random.key_data(jax.random.fold_in(key, 1)),
        position=jnp.int32(0),
        skipped=jnp.int32(0),
    )


def start_quality(fns: Fns, key) -> dict | None:
    """The quality head before it has seen anything; None without one."""
    if fns.quality is None:
        return None
    params = fns.quality.head.init(key)
    table = survival.start_calibration(fns.quality.bins)
    return dict(params=params, opt_state=fns.quality.optimizer.init(params), table=table)


def restart(fns: Fns, state: TrainState) -> TrainState:
    """A fresh optimizer, and the policy as it is for reference: the start of a new phase."""
    trained, _ = fns.model.split(state.params)
    return state.replace(
        opt_state=fns.optimizer.init(trained),
        reference=jax.tree.map(jnp.copy, trained) if fns.reference else None,
        skipped=jnp.int32(0),
    )


def state_shardings(fns: Fns):
    """Shardings of a TrainState: parameters by their logical axes, moments like parameters."""
    params = sharding.parameter_shardings(fns.mesh, fns.model.axes(), fns.model.shapes())
    everywhere = sharding.replicated(fns.mesh)
    trained, _ = fns.model.split(params)
    abstract = jax.eval_shape(fns.optimizer.init, fns.model.split(fns.model.shapes())[0])
    return TrainState(
        params=params,
        opt_state=optax.tree_map_params(fns.optimizer, lambda _, s: s, abstract, trained, transform_non_params=lambda _: everywhere),
        reference=trained if fns.reference else None,
        memory=jax.tree.map(lambda _: everywhere, fns.advantage.memory),
        quality=jax.tree.map(lambda _: everywhere, jax.eval_shape(lambda: start_quality(fns, jax.random.key(0)))),
        step=everywhere,
        key=everywhere,
        position=everywhere,
        skipped=everywhere,
    )


# --- sample and grade ----------------------------------------------------------------------


class Sampled(NamedTuple):
    """What the first half of a step hands to the second."""

    tree: T.Tree
    stats: sampler.Stats
    seen: sampler.Seen
    prompts: Prompts  # as the policy read them: in an environment, with the first observation
    contexts: reprompt.Contexts | None = None  # of agents with a short memory: what they read before each turn


def rollout(fns: Fns, params, prompts: Prompts, key, step, knobs, *, quality=None, slots=None) -> Sampled:
    """Grows a tree for every prompt; `slots` independent samples instead, if given.

    Devices along data and fsdp each run a sampler of their own over their own trees, which end when these do, and in which
    kernels need not be cut. Where heads are cut over tensor, or the pruning rule compares the trees of a batch, it is one
    program that the partitioner cuts.

    Args:
      quality: state of the quality head, if the config has one.
    """
    params, mesh = gathered(fns, params), fns.mesh
    grow = lambda fns: functools.partial(_grow, fns, slots=slots)
    inputs = params, prompts, jax.random.fold_in(key, step), step, knobs, quality
    if mesh.size == 1 or mesh.shape["tensor"] > 1 or (slots is None and fns.quality is not None and fns.quality.across):
        return grow(fns)(*inputs)
    own = fns._replace(model=fns.model.anywhere, mesh=sharding.lone(mesh))
    specs = PartitionSpec(), sharding.TREES, *[PartitionSpec()] * 4
    return jax.shard_map(grow(own), mesh=mesh, in_specs=specs, out_specs=sharding.TREES, check_vma=False)(*inputs)


def _grow(fns: Fns, params, prompts: Prompts, key, step, knobs, quality, *, slots) -> Sampled:
    """`rollout` from gathered parameters and the step's own key."""
    worlds = None
    if fns.window is not None:
        return short_memory(fns, params, prompts, key, knobs, slots=slots or fns.sizes.slots)
    if fns.environment is not None:
        worlds, prompts = episodes.begin(fns.environment, jax.random.fold_in(key, WORLD), prompts, fns.anchor)
    model, size = fns.model, fns.sizes
    plain = slots is not None
    slots = slots if plain else size.slots
    tree, stats, seen = sampler.sample(
        make_policy(model, params, slots=slots, rows=size.rows, mesh=fns.mesh, pool_dtype=size.pool_dtype, weight_dtype=size.weight_dtype),
        branching.stochastic() if plain else fns.branching(knobs, step),
        pruning.none() if plain else fns.pruning(knobs, step, quality),
        prompts,
        key,
        slots=slots,
        rows=size.rows,
        budget=size.rows if plain else size.budget,
        segment=size.segment,
        lengths=size.lengths,
        temperature=knobs["temperature"],
        top_p=knobs["top_p"],
        eos=knobs["eos"],
        review_at=size.review_at,
        columns=None if plain else size.columns,
        hidden=fns.quality is not None,
        environment=fns.environment,
        worlds=worlds,
        anchor=fns.anchor,
        fork_at=fns.fork_at,
        penalty=knobs["invalid_penalty"],
    )
    return Sampled(tree, stats, seen, prompts)


def gathered(fns: Fns, params):
    """Parameters in the dtype of activations and whole on every shard of trees: once, before a loop that decodes."""
    model = fns.model  # adapters as they are: folded into bfloat16 weights, small changes would be rounded away
    cut, whole = (sharding.parameter_shardings(fns.mesh, model.axes(), model.shapes(), gathered=g) for g in (False, True))
    rounded = jax.tree.map(lambda p: p.astype(model.config.dtype), params)
    return jax.lax.with_sharding_constraint(jax.lax.with_sharding_constraint(rounded, cut), whole)  # not gathered, then rounded


def short_memory(fns: Fns, params, prompts: Prompts, key, knobs, *, slots: int) -> Sampled:
    """Episodes in which every turn reads a fresh prompt, see `treerl.reprompt`."""
    rows = fns.environment.action
    dtypes = dict(pool_dtype=fns.sizes.pool_dtype, weight_dtype=fns.sizes.weight_dtype)
    policy = make_policy(fns.model, params, slots=1, rows=rows, mesh=fns.mesh, **dtypes)

    def act(prompts, key):
        return sampler.sample(
            policy, branching.stochastic(), pruning.none(), prompts, key, slots=1, rows=rows, budget=rows, segment=rows,
            lengths=(rows,), temperature=knobs["temperature"], top_p=knobs["top_p"], eos=knobs["eos"],
        )[0]  # fmt: skip

    tree, stats, contexts = reprompt.grow(
        fns.environment, act, prompts, key, slots=slots, window=fns.window, anchor=fns.anchor, end=knobs["eos"],
        penalty=knobs["invalid_penalty"],
    )  # fmt: skip
    return Sampled(tree, stats, sampler.Seen((), ()), prompts, contexts)


def grade(fns: Fns, tree: T.Tree, prompts: Prompts) -> rewards.Graded:
    """Rewards of all leaves, by the task's grader on the device or, called from the program, on the host."""
    if tree.turns is not None:
        return rewards.of_turns(tree)
    if fns.host is not None:
        return rewards.by_callback(fns.host, tree, prompts.data, fns.mesh)
    return rewards.on_device(tree, prompts.data, fns.grader)


def shape_reward(fns: Fns, tree: T.Tree, reward: jax.Array) -> jax.Array:
    """What is trained on: rewards as graded, length and invalid actions punished if the config says so: float32 [B, L]."""
    if tree.turns is not None:
        reward = reward - jnp.sum(tree.turns.penalty, axis=-1)
    return reward + jax.vmap(lambda t: rewards.overlong(t, fns.overlong))(tree) if fns.overlong else reward


def evaluate_sample(fns: Fns, params, quality, prompts: Prompts, key, knobs, *, samples: int) -> tuple[T.Tree, dict]:
    """Independent samples of each prompt, and what is known before they are graded.

    Returns:
      (trees, dict of [B, samples]: valid, bool, the sample ended; score, float32, of the quality head at its
      end, only with one).
    """
    tree, _, seen, *_ = rollout(fns, params, prompts, key, 0, knobs, slots=samples)
    found = dict(valid=jax.vmap(T.leaf_valid)(tree))
    return tree, found if fns.quality is None else dict(found, score=fns.quality.head.score(quality["params"], seen.hidden))


# --- credit --------------------------------------------------------------------------------


def estimate(
    fns: Fns, state: TrainState, tree: T.Tree, prompts: Prompts, reward: jax.Array, knobs, *, graded=None, chance=None,
    contexts=None,
):  # fmt: skip
    """Credit of batched trees, and what the estimator and the losses read beside them.

    Args:
      reward: [B, L], as trained on. graded: [B, L], before length was punished; what is right and wrong is read there.
      chance: [B, L] of each leaf's line to survive pruning; None if survivors count alike. contexts: see `Sampled`.

    Returns:
      (credit [B, L] or [B, S, K], leaf_weight [B, L], memory, extras: name -> [B, ...]).
    """
    needs, temperature = set(fns.advantage.needs), knobs["temperature"]
    extras = {}
    if fns.kl is not None or "reference_logp" in needs:
        reference = fns.model.join(state.reference, fns.model.split(state.params)[1])
        extras["reference_logp"] = logps(fns, reference, tree, prompts, contexts, temperature)
    if "gradient_norm" in needs:
        extras["gradient_norm"] = gradient_norms(fns, state.params, tree, prompts, temperature)
    extras["importance"] = jax.vmap(leaf_importance)(tree)
    valid = jax.vmap(T.leaf_valid)(tree)
    extras["survival"] = valid.astype(jnp.float32) if chance is None else survival.inverse_weights(chance, valid)
    credit, leaf_weight, memory = fns.advantage.credit(tree, reward, extras, state.memory, graded)
    leaf_weight = leaf_weight * extras["survival"]
    return credit, leaf_weight, memory, extras


def logps(fns: Fns, params, tree: T.Tree, prompts: Prompts, contexts, temperature) -> jax.Array:
    """Log-probs of kept cells by the learner, [B, S, K], each after what the policy read in front of it."""
    if contexts is None:
        return cell_logps(fns, params, tree, prompts, temperature)
    lines, prompts, _ = reprompt.flatten(tree, contexts)
    found = cell_logps(fns, params, lines, prompts, temperature)
    return reprompt.unflatten(found, contexts, jnp.zeros(tree.token.shape, found.dtype))


def survival_chance(fns: Fns, seen: sampler.Seen) -> jax.Array | None:
    """Chance [B, L] of each leaf's line to have survived, 1 for lines that were not tested; None if they count alike."""
    if fns.quality is None or not fns.quality.inverse:
        return None
    return jnp.where(seen.record.due, seen.record.chance, 1.0)


def behavior(tree: T.Tree) -> jax.Array:
    """Log-prob of each token by what the sampler did; one that was not drawn counts as drawn from the policy: [S, K]."""
    return jnp.where(tree.source == T.SAMPLED, tree.logp_behavior, tree.logp_policy)


def leaf_importance(tree: T.Tree) -> jax.Array:
    """Probability of each leaf's tokens by the policy over the sampler's: float32 [L]."""
    change = T.down(tree, jnp.where(T.kept(tree), tree.logp_policy - behavior(tree), 0))
    return jnp.exp(jnp.clip(change, -20, 20))


def weigh(fns: Fns, tree: T.Tree, credit, leaf_weight, knobs) -> tuple[Cells, jax.Array]:
    """What each cell of one tree contributes, and what the batch's loss is divided by.

    Aggregation over tokens (see `learner.aggregation` of the config), with n_l tokens on leaf l:
      token: every token counts alike, divided by their number (DAPO's and verl's token-mean);
      sequence: 1 / n_l a token, divided by the number of leaves (GRPO's; a shared cell with
        credit of its own weighs the sum over its leaves);
      constant: every token counts alike, divided by leaves x S (Dr. GRPO, arXiv 2503.20783).
    With leaf credit a cell counts once for each leaf below it, with cell credit once.

    Observations of an environment have no weight.

    A forced token (`learner.forced`) is trained like a drawn one (policy, as the papers do), not at
    all (mask, nor counted in n_l or the number of tokens), or with the truncated weight min(p, cap), p its
    probability (importance: the rule chose it with probability 1). `learner.importance` gives
    all other tokens the weight w = p(policy) / p(sampler), truncated at the cap, or 0 above it (mask). Weights multiply
    credit, not the denominator (verl, trl, AReaL). They are data, without gradient.

    Args:
      credit: [L] or [S, K]. leaf_weight: [L], 0 for leaves left out.

    Returns:
      (Cells of [S, K], denominator []).
    """
    kept, forced = T.kept(tree) & T.spoken(tree), tree.source == T.FORCED
    counted = kept & ~forced if fns.forced == "mask" else kept
    length = T.down(tree, counted.astype(jnp.float32))
    leaf_weight = leaf_weight * (length > 0)
    each = leaf_weight / jnp.maximum(length, 1) if fns.aggregation == "sequence" else leaf_weight
    if credit.ndim == 1:
        cells = T.spread(tree, leaf_credit=credit, leaf_weight=each)
    else:
        cells = T.spread(tree, cell_credit=credit, leaf_weight=each if fns.aggregation == "sequence" else None)
    positive, negative, weight = (jnp.where(counted, x, 0) for x in cells)
    denominator = dict(token=jnp.sum(weight), sequence=jnp.sum(leaf_weight), constant=jnp.sum(leaf_weight) * tree.token.shape[0])[
        fns.aggregation
    ]

    cap, p = knobs["importance_cap"], jnp.exp(jnp.clip(tree.logp_policy - tree.logp_behavior, -20, 20))
    drawn = dict(none=jnp.ones_like(p), truncate=jnp.minimum(p, cap), mask=jnp.where(p <= cap, p, 0))[fns.importance]
    factor = jnp.where(forced, jnp.minimum(p, cap) if fns.forced == "importance" else 1.0, drawn)
    return Cells(positive * factor, negative * factor, weight), denominator


def thin(fns: Fns, tree: T.Tree, reward: jax.Array, credit, cells: Cells, step) -> Cells:
    """Drops the credit of cells of one tree that the backward pass skips; the denominator stays that of the whole tree."""
    if fns.thinning is None:
        return cells
    trained = fns.thinning(tree, reward, credit, step)
    return cells._replace(positive=jnp.where(trained, cells.positive, 0), negative=jnp.where(trained, cells.negative, 0))


# --- learn ---------------------------------------------------------------------------------


def update(fns: Fns, state: TrainState, grads, loss, ess=1.0) -> tuple[TrainState, dict]:
    """One Optax update; parameters and optimizer stay as they are if loss or gradient is not finite.

    Args:
      ess: [] effective sample size of the batch's rollouts over their number, for optimizers that read it.
    """

    trained, frozen = fns.model.split(state.params)

    def apply(params, opt_state):
        updates, opt_state = fns.optimizer.update(grads, opt_state, params, ess=ess)
        return optax.apply_updates(params, updates), opt_state

    norm = optax.tree.norm(grads)
    good = jnp.isfinite(norm) & jnp.isfinite(loss)
    # A branch works in place; a `where` over the whole state costs one more copy of the parameters.
    trained, opt_state = jax.lax.cond(good, apply, lambda *same: same, trained, state.opt_state)
    state = state.replace(params=fns.model.join(trained, frozen), opt_state=opt_state, skipped=jnp.where(good, 0, state.skipped + 1))
    return state, dict(loss=loss, grad_norm=norm, skipped=1 - good.astype(jnp.int32))


def learn(
    fns: Fns, state: TrainState, tree: T.Tree, prompts: Prompts, cells: Cells, denominator, knobs,
    *, reference=None, ess=1.0, contexts=None,
) -> tuple[TrainState, dict]:  # fmt: skip
    """`epochs` updates on the same trees, each over all of them.

    Args:
      cells: of [B, S, K]. denominator: [] what the loss is divided by.
      reference: [B, S, K] log-probs of the reference policy, for the KL. ess: see `update`. contexts: see `Sampled`.
    """
    if contexts is not None:  # every turn is a tree of its own
        tree, prompts, move = reprompt.flatten(tree, contexts)
        cells, reference = Cells(*map(move, cells)), None if reference is None else move(reference)
    credited = (cells.positive != 0) | (cells.negative != 0)
    include = jnp.any(credited, axis=(1, 2)) | (fns.kl is not None)  # a tree without credit has nothing but its KL
    if fns.trims:
        tree = jax.vmap(packing.trim)(tree, credited)
    bins = pack(fns, tree, prompts, cells, include, reference)
    objective = policy_objective(fns, knobs)

    def epoch(state, _):
        grads, (loss, sums, top) = gradient(fns, objective, state.params, bins, denominator)
        state, metrics = update(fns, state, grads, loss, ess)
        seen = jnp.maximum(sums.pop("weight"), 1e-9)  # share of the weight that was trained on
        metrics = dict(metrics, logp_drift_max=top, **{k: v / seen for k, v in sums.items()})
        return state, metrics

    state, metrics = jax.lax.scan(epoch, state, None, length=fns.sizes.epochs)
    first, last = (jax.tree.map(lambda x: x[i], metrics) for i in (0, -1))
    kept = dict(last, logp_drift=first["drift"], logp_drift_max=first["logp_drift_max"])
    kept = dict(kept, skipped=jnp.sum(metrics["skipped"]))
    kept.pop("drift")
    return state, dict(kept, bins=jnp.max(bins.count), trees_trained=jnp.mean(include.astype(jnp.float32)))


def learn_quality(fns: Fns, quality: dict, seen: sampler.Seen, tree: T.Tree, reward: jax.Array, knobs) -> tuple[dict, dict]:
    """Trains the quality head on the answers at hand and counts their scores.

    Labels are whether the final answer is right, of survivors alone: what was dropped has none. The head learns
    from the hidden states of the detection and of the end of each answer (votes read it there; the paper trains
    on the first); the table counts the scores that decided, by the head of that moment.

    Returns:
      (state of the head, metrics).
    """
    found, size = seen.record, fns.quality
    valid = jax.vmap(T.leaf_valid)(tree)
    right, told = reward > 0.5, found.keep & valid
    both = lambda a, b: jnp.concatenate([a, b], axis=1)
    data = both(found.hidden, seen.hidden), both(right, right), both(told, valid)

    def epoch(carry, _):
        params, opt_state = carry
        loss, grads = jax.value_and_grad(size.head.loss)(params, *data)
        updates, after = size.optimizer.update(grads, opt_state, params)
        good = jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(grads))
        new = optax.apply_updates(params, updates), after
        return jax.tree.map(lambda new, old: jnp.where(good, new, old), new, carry), loss

    (params, opt_state), losses = jax.lax.scan(epoch, (quality["params"], quality["opt_state"]), None, length=size.epochs)
    table = survival.observe(quality["table"], found.score, right, told, decay=knobs["decay"])
    metrics = dict(
        quality_loss=losses[0],
        quality_accuracy=masked.mean(right == (found.posterior > 0.5), told),
        survivors=jnp.where(jnp.any(found.due), jnp.sum(found.keep) / jnp.maximum(jnp.sum(found.due), 1), 1.0),
    )
    return dict(params=params, opt_state=opt_state, table=table), metrics


def effective_share(weight: jax.Array, valid: jax.Array) -> jax.Array:
    """Effective sample size over the number of samples: (sum w)^2 / (n sum w^2), from 1 / n to 1; 1 for none."""
    weight = jnp.where(valid, weight, 0)
    count, square = jnp.sum(valid), jnp.sum(jnp.square(weight))
    return jnp.where(square > 0, jnp.square(jnp.sum(weight)) / jnp.maximum(count * square, 1e-30), 1.0)


def sample_half(fns: Fns, state: TrainState, prompts: Prompts, knobs: dict) -> Sampled:
    """Grows the trees of a step."""
    key = jax.random.wrap_key_data(state.key)
    found = rollout(fns, state.params, prompts, key, state.step, knobs, quality=state.quality)  # 1
    return jax.lax.with_sharding_constraint(found, sharding.trees(fns.mesh))


def learn_half(fns: Fns, state: TrainState, sampled: Sampled, graded: rewards.Graded, knobs: dict) -> tuple[TrainState, dict]:
    """From graded trees to updated parameters; see `train_step`."""
    (tree, stats, seen, prompts, contexts), reward = sampled, graded.reward
    drawn, shaped = tree, shape_reward(fns, tree, reward)
    if fns.proximal == "learner":  # decoupled PPO: ratios start from the learner's own log-probs
        tree = tree.replace(logp_policy=logps(fns, state.params, tree, prompts, contexts, knobs["temperature"]))
    credit, leaf_weight, memory, extras = estimate(
        fns, state, tree, prompts, shaped, knobs, graded=reward, chance=survival_chance(fns, seen), contexts=contexts
    )  # 3
    cells, denominators = jax.vmap(lambda *tree: weigh(fns, *tree, knobs))(tree, credit, leaf_weight)  # 4
    cells = jax.vmap(lambda *tree: thin(fns, *tree, state.step))(tree, shaped, credit, cells)
    ess = effective_share(extras["importance"], jax.vmap(T.leaf_valid)(tree))
    reference = extras.get("reference_logp")
    state, metrics = learn(
        fns, state, tree, prompts, cells, jnp.sum(denominators), knobs, reference=reference, ess=ess, contexts=contexts
    )  # 5
    if fns.quality:
        quality, more = learn_quality(fns, state.quality, seen, tree, reward, knobs)
        state, metrics = state.replace(quality=quality), metrics | more
    state = state.replace(step=state.step + 1, position=state.position + prompts.token.shape[0], memory=memory)
    metrics |= dict(ess=ess, **describe(tree, reward, stats, fns.right), **describe_host(fns, tree, graded))
    if fns.sizes.shown:
        metrics["samples"] = show(drawn, prompts, graded, fns.sizes.shown)
    return state, metrics


def describe_host(fns: Fns, tree: T.Tree, graded: rewards.Graded) -> dict:
    """Mean score of each grader of the host, and how many answers each kind of fault cost; {} without any."""
    if fns.host is None:
        return {}
    valid = jax.vmap(T.leaf_valid)(tree)
    scores = {f"reward/{name}": masked.mean(graded.parts[..., i], valid) for i, name in enumerate(fns.host.names)}
    return scores | {f"graders_{name}": jnp.sum(graded.fault == i) for i, name in enumerate(FAULTS) if i}


def show(tree: T.Tree, prompts: Prompts, graded: rewards.Graded, count: int) -> dict:
    """Prompts and answers of the first trees, to be written: arrays with `count` in front."""
    first = jax.tree.map(lambda x: x[:count], (tree, prompts, graded))
    tokens, length = rewards.answers(first[0])
    return dict(
        prompt=first[1].token, prompt_length=first[1].length, answer=tokens, length=length, reward=first[2].reward,
        parts=first[2].parts, fault=first[2].fault,
    )  # fmt: skip


def train_step(fns: Fns, state: TrainState, prompts: Prompts, knobs: dict) -> tuple[TrainState, dict]:
    """The step: prompts [B, ...] to updated parameters; numbered as in the module's docstring.

    Metrics are scalars, but for `samples`, some of the answers (see `show`), with `Sizes.shown`.
    """
    sampled = sample_half(fns, state, prompts, knobs)
    return learn_half(fns, state, sampled, grade(fns, sampled.tree, prompts), knobs)


def supervised_step(fns: Fns, state: TrainState, prompts: Prompts, answer, length, own) -> tuple[TrainState, dict]:
    """One update on reference answers [B, S] of `length` [B] tokens, of which those to learn are `own` [B, S]: trees of one line."""
    parent = jnp.zeros((answer.shape[1], 1), jnp.int32)

    def line(token, length):
        used = jnp.arange(token.shape[0])[:, None] < length
        return T.from_parents(parent, used, jnp.array([[length - 1, 0]]), token=token[:, None])

    tree = jax.vmap(line)(answer, length)
    weight = (tree.used & own[..., None]).astype(jnp.float32)
    bins = pack(fns, tree, prompts, Cells(weight, weight, weight), jnp.ones(length.shape, bool))
    objective = supervised_objective(fns)
    grads, (loss, _, _) = gradient(fns, objective, state.params, bins, jnp.sum(weight))
    return update(fns, state, grads, loss)
