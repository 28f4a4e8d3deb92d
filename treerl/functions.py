"""The functions that a config chooses, and the numbers it gives them.

`make_fns` and `make_knobs` are the only readers of the whole config besides the host loop: stages
take plain arguments. What a name may choose stands in one table here or where its functions live.
"""

import functools
import inspect
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from treerl import branching, losses, packing, pruning, sharding, survival, thinning, tree as T
from treerl.advantages import ESTIMATORS, MULTIPLIERS, WHITENED, Advantage, compose, extras, leaf_estimators
from treerl.environments import Environment, context_width
from treerl.errors import UserError
from treerl.models import families
from treerl.models.presets import PRESETS
from treerl.models.quality import QualityHead
from treerl.models.transformer import Model, TransformerConfig
from treerl.optimizer import make_optimizer
from treerl.options import bind, known
from treerl.tasks import HostGraders, Task
from treerl.tokenizers import check_vocabulary

AGGREGATIONS = ("token", "sequence", "constant")
FORCED = ("policy", "mask", "importance")
IMPORTANCE = ("none", "truncate", "mask")
PROXIMAL = ("sampler", "learner")
WEIGHTS = ("none", "inverse")
SHOWN = 2  # trees a step whose answers can be written


class Sizes(NamedTuple):
    """Static sizes; see `treerl.config` for their meaning."""

    slots: int
    rows: int
    budget: int
    segment: int
    lengths: tuple[int, ...]
    bin_tokens: int
    bins_per_step: int
    epochs: int
    vocab_chunk: int
    remat: str  # of `transformer.REMAT`
    review_at: int = 0  # iterations before the pruning rule's review
    columns: int | None = None  # lines of a tree that run on after it
    pool_dtype: str | None = None  # of the pool of keys and values; None: that of the activations
    weight_dtype: str | None = None  # of the largest weights in rollouts; None: that of the activations
    shown: int = 0  # trees whose answers a step hands out


class Quality(NamedTuple):
    """The head that survival rules read, and how it learns."""

    choose: Callable  # rule of `survival` that reads its scores, with its options
    head: QualityHead
    optimizer: optax.GradientTransformation
    epochs: int
    bins: int
    inverse: bool  # survivors weigh the inverse of their chance
    across: bool  # the rule compares the trees of a batch


class Fns(NamedTuple):
    """The functions that a config chooses; a training step is their composition."""

    sizes: Sizes
    model: Model
    optimizer: optax.GradientTransformationExtraArgs
    mesh: Mesh
    branching: Callable  # (knobs, step) -> Branching
    pruning: Callable  # (knobs, step, state of the quality head) -> Pruning
    quality: Quality | None
    grader: Callable | None  # (tokens [S], length [], data) -> [] float32, on the device
    advantage: Advantage  # estimator, whitening and multipliers
    thinning: Callable | None  # (tree, reward [L], credit, step) -> cells trained on [S, K]
    objective: Callable  # (knobs) -> function of `losses`
    trims: bool  # cells without credit need not be packed
    kl: Callable | None  # a function of losses.KL
    reference: bool  # the state keeps a reference policy
    overlong: int  # tokens before the last row in which length is punished
    proximal: str  # one of PROXIMAL, see the config
    forced: str  # one of FORCED
    importance: str  # one of IMPORTANCE
    aggregation: str  # one of AGGREGATIONS
    environment: Environment | None = None  # in which lines are episodes; see `sampler.sample` for the next two
    anchor: str = "state"
    fork_at: str = "token"
    window: int | None = None  # turns that an agent with a short memory reads, see `treerl.reprompt`; None: all
    host: HostGraders | None = None  # graders of text, which run on the host, instead of `grader`
    right: float = 0.5  # rewards above it count as right


def make_advantage(config) -> Advantage:
    """The estimator of `config.advantage` with its whitening and multipliers."""
    name, chosen = config.name, dict(config.multipliers)
    estimator = bind(known(name, ESTIMATORS, "advantage.name"), config.options, "advantage.options", f"advantage.name={name}")
    multipliers = {}
    for key, options in chosen.items():
        field = f"advantage.multipliers.{key}"
        if not hasattr(options, "items"):
            raise UserError(f"{field}={options!r} is no dict of options; set it to {{}} for the defaults.")
        multipliers[key] = bind(known(key, MULTIPLIERS, "advantage.multipliers"), options, field, key)
    try:
        return compose(estimator, WHITENED.get(name), multipliers)
    except ValueError as error:
        raise UserError(f"advantage.name={name}: {error}") from error


def check_combinations(config, advantage: Advantage) -> None:
    """Raises UserError for choices that do not go together."""
    l, name = config.learner, config.advantage.name
    if l.objective == "gspo" and not advantage.leaf:
        raise UserError(
            f"learner.objective=gspo has one ratio a rollout and needs the credit of leaves, and advantage.name={name} "
            f"gives credit to cells; use one of {', '.join(leaf_estimators())}, or learner.objective=ppo or cispo."
        )
    if l.objective == "gspo" and (l.forced != "policy" or l.importance != "none"):
        raise UserError(
            "learner.objective=gspo has one ratio a rollout, without weights of tokens; set learner.forced=policy and "
            "learner.importance=none, or learner.objective=ppo or cispo."
        )
    if l.objective == "gspo" and config.pruning.backward == "depth":
        raise UserError(
            "learner.objective=gspo trains whole rollouts and pruning.backward=depth leaves out parts of them; set "
            "pruning.backward to none, width or coverage, or learner.objective=ppo or cispo."
        )
    if l.dual_clip and l.objective != "ppo":
        raise UserError(f"learner.dual_clip={l.dual_clip!r} is read by learner.objective=ppo alone, not {l.objective}; set it to 0.")
    if "reference_logp" in advantage.needs and not (l.reference or l.kl > 0):
        raise UserError(
            "advantage.multipliers: ace compares the policy with a reference policy and none is kept; set "
            "learner.reference=True, or learner.kl above 0."
        )
    wants = (l.importance != "none", l.forced == "importance", "importance" in advantage.needs, config.optimizer.ess != "none")
    names = ("learner.importance", "learner.forced", f"advantage.name={name}", "optimizer.ess")
    if config.branching.greedy and config.branching.rule != "stochastic" and any(wants):
        raise UserError(
            f"{names[wants.index(True)]} weighs tokens by the log-probs they were sampled with, and "
            "branching.greedy=True takes tokens without sampling; set branching.greedy=False, or weigh nothing."
        )
    if config.branching.greedy and config.branching.rule != "stochastic" and l.forced == "mask":
        raise UserError(
            "learner.forced=mask leaves out forced tokens, and with branching.greedy=True all tokens of a tree line are; "
            "set branching.greedy=False or learner.forced=policy."
        )
    if config.pruning.weights == "inverse" and "survival" not in advantage.needs:
        takers = ", ".join(sorted(name for name, estimator in ESTIMATORS.items() if "survival" in extras(estimator)))
        raise UserError(
            f"pruning.weights=inverse needs an estimator that weighs leaves, and advantage.name={name} does not; use one of "
            f"{takers}, or pruning.weights=none."
        )
    used = [name for name, is_used in zip(names, wants) if is_used and name in ("learner.importance", "optimizer.ess")]
    if used and l.proximal == "sampler" and config.sampler.top_p == 1:
        raise UserError(
            f"{used[0]} compares the policy with the sampler, and with learner.proximal=sampler and sampler.top_p=1.0 they "
            "are the same; set learner.proximal=learner or sampler.top_p below 1, or weigh nothing."
        )


def check_growth(config) -> None:
    """Raises UserError for numbers by which no line could ever fork, or none be pruned for its similarity."""
    b, p, s = config.branching, config.pruning, config.sampler
    windows, similar, looks = tuple(p.windows), p.rule == "similarity", b.rule == "lookahead"
    if similar and (not windows or min(windows) == s.answer_length or max(windows) > s.answer_length):  # a line that long has ended
        raise UserError(
            f"pruning.windows={windows} must be lengths up to sampler.answer_length={s.answer_length}, one of them below it; "
            "shorten them, or set pruning.rule=none."
        )
    if looks and similar and 0 < p.tau_ed * max(windows) <= 1:
        raise UserError(
            f"pruning.tau_ed={p.tau_ed!r} prunes nothing: a fork differs in its first token, 1 of at most {max(windows)} of "
            f"pruning.windows; set it above {1 / max(windows):.3g}, add a longer window, or set pruning.rule=none."
        )
    share = max(share for _, share in b.share)
    frees = p.rule not in {"none", "similarity", *survival.RULES}  # a rule of one's own may, before the last fork
    if looks and not frees and share and round(share * s.slots) < 2:
        raise UserError(
            f"branching.share={share!r} of sampler.slots={s.slots} is less than 2 lines, so that none has a slot to fork into; "
            "raise either, or set branching.rule=stochastic."
        )


def make_window(config, environment: Environment | None) -> int | None:
    """Turns that an agent with a short memory reads; None for the whole history. Raises UserError for what needs a shared prefix."""
    e, b, p = config.environment, config.branching, config.pruning
    if environment is not None and config.learner.objective == "gspo":
        raise UserError(
            "learner.objective=gspo counts every token of a rollout, and in an environment observations are not the policy's; "
            "use learner.objective=ppo or cispo."
        )
    if environment is None or e.memory == "full":
        return None
    if b.rule != "stochastic" or p.rule != "none":
        raise UserError(
            "environment.memory=reprompt gives every turn a prompt of its own, so that nothing is shared or forks; set "
            "branching.rule=stochastic and pruning.rule=none, or environment.memory=full."
        )
    if config.advantage.name == "minimum_variance":
        raise UserError(
            "advantage.name=minimum_variance takes gradients of whole rollouts, and with environment.memory=reprompt every "
            "turn is one; use another, or environment.memory=full."
        )
    return e.window


def make_rule(rule: Callable, options, section: str, name: str, numbers: tuple[str, ...]) -> Callable:
    """A branching or pruning rule with its own options, as a function of a dict that has the config's `numbers`."""
    bound = bind(rule, options, f"{section}.options", f"{section}.rule={name}", numbers)
    takes = [number for number in numbers if number in inspect.signature(rule).parameters]
    return lambda given: bound(**{number: given[number] for number in takes})


def make_quality(config, late: int, width: int) -> tuple[Quality | None, int, int | None]:
    """The quality head, iterations before the review and columns after it; (None, 0, None) without a survival rule.

    Args:
      late: iterations by which a line may start after the first. width: D of the policy.
    """
    p, s, q = config.pruning, config.sampler, config.quality
    known(p.weights, WEIGHTS, "pruning.weights")
    if p.rule not in survival.RULES:
        if p.refork or p.columns or p.weights != "none":
            raise UserError(
                f"pruning.columns, refork and weights are read by survival rules, not by pruning.rule={p.rule}; "
                f"set it to one of {', '.join(survival.RULES)}, or leave them at their defaults."
            )
        return None, 0, None
    choose = bind(survival.RULES[p.rule], p.options, "pruning.options", p.rule, ("kappa", "rho", "capacity"))
    bounds = {name: x.default for name, x in inspect.signature(choose).parameters.items()}
    review_at = p.detection + late
    rounded = -(-review_at // s.segment) * s.segment
    if rounded >= s.answer_length:
        wait = f"branching.fill_after={config.branching.fill_after}, " if late else ""
        raise UserError(
            f"pruning.detection={p.detection} puts the review after {rounded} iterations ({wait}whole segments of "
            f"sampler.segment={s.segment}), when answers of sampler.answer_length={s.answer_length} have ended; lower "
            f"one of the first {'three' if late else 'two'}."
        )
    if "p_min" in bounds:
        low, high, lam = bounds["p_min"], bounds["p_max"], bounds["lam"]
        if not 0 <= lam < math.inf:
            raise UserError(f"pruning.options: lam={lam!r} cannot work; set it to a number of 0 or more.")
        if not 0 <= low <= high <= 1:
            raise UserError(f"pruning.options: p_min={low!r} and p_max={high!r} must be chances, p_min the lower; mend either.")
        if not low <= p.kappa <= high:
            raise UserError(
                f"pruning.kappa={p.kappa!r} lies outside p_min={low!r} to p_max={high!r} of pruning.options, so no "
                "chances can have that mean; change either."
            )
    asked = math.ceil(p.kappa * s.slots - 1e-6)
    columns = p.columns or asked
    if not asked <= columns <= s.slots:
        raise UserError(
            f"pruning.columns={p.columns} must hold the survivors, pruning.kappa x sampler.slots = {asked}, and be at "
            f"most sampler.slots={s.slots}; change it, or set 0 for as many as survive."
        )
    if bounds["least"] > columns:
        raise UserError(
            f"pruning.options: least={bounds['least']} is more than the {columns} lines that may run on; lower it, or raise "
            "pruning.columns."
        )
    if p.weights == "inverse" and p.rule == "balance":
        raise UserError("pruning.weights=inverse needs chances of surviving and pruning.rule=balance draws none; use another.")
    if p.weights == "inverse" and bounds.get("p_min") == 0:
        raise UserError("pruning.weights=inverse divides by chances and p_min=0 of pruning.options allows none; raise p_min.")
    if p.weights == "inverse" and p.refork:
        raise UserError(
            "pruning.weights=inverse weighs each survivor once and pruning.refork=True continues some of them several times; "
            "use one of the two."
        )
    head, optimizer = QualityHead(width, q.inner), optax.adam(q.learning_rate)
    return Quality(choose, head, optimizer, q.epochs, q.bins, p.weights == "inverse", p.rule in survival.ACROSS), review_at, columns


def make_model(config, task: Task, folder: str | None, mesh: Mesh | None = None) -> Model:
    """The model of the `model` section, or of a folder with a published one, whose config.json gives its sizes.

    Raises:
      UserError: the folder's model is not supported, or its vocabulary lacks tokens of the tokenizer.
    """
    others = {name: config[name] for name in ("dtype", "param_dtype", "lora_rank", "lora_alpha")}
    if folder is not None:
        if config.preset:
            raise UserError(f"model.source={config.source!r} and model.preset={config.preset!r} both give sizes; set one to ''.")
        model = Model(families.from_folder(folder, **others), mesh)
        check_vocabulary(task.tokenizer, model.config.vocab, folder)
        return model
    if config.preset:
        if config.preset not in PRESETS:
            raise UserError(f"model.preset={config.preset!r} is unknown; known are {', '.join(PRESETS)}.")
        preset = TransformerConfig(**PRESETS[config.preset], **others)
        if task.tokenizer.vocab_size > preset.vocab:
            raise UserError(
                f"model.preset={config.preset!r} has {preset.vocab} tokens and the task's tokenizer {task.tokenizer.vocab_size}; "
                "choose a larger preset."
            )
        return Model(preset, mesh)
    sizes = {name: value for name, value in config.items() if name not in ("source", "preset")}
    return Model(TransformerConfig(vocab=task.tokenizer.vocab_size, **sizes), mesh)


def make_fns(config, task: Task, mesh: Mesh, *, optimizer=None, folder: str | None = None) -> Fns:
    """Chooses the functions of a config.

    Args:
      optimizer: replaces the config's own. folder: of the published model that `model.source` names.
    """
    s, l, b, p = config.sampler, config.learner, config.branching, config.pruning
    windows = tuple(p.windows)
    check_growth(config)
    forks = b.rule != "stochastic"
    budget = s.answer_length + (b.fill_after + 1 if forks else 0)
    model = make_model(config.model, task, folder, mesh)
    quality, review_at, columns = make_quality(config, budget - s.answer_length, model.config.width)

    def forking(knobs, step):
        share = knobs["share"][jnp.sum(knobs["share_from"] <= step) - 1]
        return dict(knobs, share=share, max_children=b.max_children)

    numbers = ("tau_abs", "tau_rel", "share", "fill_after", "greedy", "max_children")
    branch = make_rule(known(b.rule, branching.RULES, "branching.rule"), b.options, "branching", b.rule, numbers)
    prune = known(p.rule, pruning.RULES | survival.RULES, "pruning.rule")
    prune = None if quality else make_rule(prune, p.options, "pruning", p.rule, ("tau_ed", "windows"))

    def survive(knobs, step, quality_state):
        def judge(hidden):
            score = quality.head.score(quality_state["params"], hidden)
            return score, survival.posterior(quality_state["table"], score, smoothing=knobs["smoothing"])

        return pruning.survival(
            judge, functools.partial(quality.choose, kappa=knobs["kappa"], rho=knobs["rho"]), detection=knobs["detection"],
            columns=columns, rho=knobs["rho"], warm=step < knobs["pruning_from"], refork=p.refork,
        )  # fmt: skip

    if s.prompts % sharding.tree_shards(mesh):
        shards = sharding.tree_shards(mesh)
        raise UserError(f"sampler.prompts={s.prompts} does not divide over mesh.data x mesh.fsdp = {shards} shards; make it a multiple.")
    if l.overlong_buffer > s.answer_length:
        raise UserError(f"learner.overlong_buffer={l.overlong_buffer} is longer than sampler.answer_length={s.answer_length}; shorten it.")
    heard = 0 if task.environment is None else task.environment.observation  # the first observation joins the prompt
    window = make_window(config, task.environment)
    longest = s.prompt_length + heard + s.answer_length
    if window is not None:
        longest = context_width(task.environment, s.prompt_length, window) + task.environment.action
    if heard and longest > l.bin_tokens:
        raise UserError(
            f"learner.bin_tokens={l.bin_tokens} is less than the {longest} tokens that an episode may have, with its goal and "
            "the first observation; raise it."
        )
    packing.bin_bound(s.prompts, s.slots, longest, l.bin_tokens)
    advantage = make_advantage(config.advantage)
    objective = known(l.objective, losses.OBJECTIVES, "learner.objective")
    bounds = ("clip_low", "clip_high") + (("dual_clip",) if l.objective == "ppo" else ())
    kl = known(l.kl_estimate, losses.KL, "learner.kl_estimate")
    backward = None
    if p.backward != "none":
        rule = known(p.backward, dict(thinning.RULES, none=None), "pruning.backward")
        rule = bind(rule, p.backward_options, "pruning.backward_options", f"pruning.backward={p.backward}")
        sliding = p.backward == "depth"
        example = T.from_parents([[-1, -1], [0, 1]], [[1, 1], [1, 1]], [[1, 0], [1, 1]])
        try:
            jax.eval_shape(lambda: rule(example, jnp.ones(2), jnp.ones(2), *([jnp.int32(0)] if sliding else [])))
        except ValueError as error:
            raise UserError(f"pruning.backward_options of pruning.backward={p.backward}: {error}") from error
        backward = lambda tree, reward, credit, step: rule(tree, reward, credit, *([step] if sliding else []))
    elif len(p.backward_options):
        raise UserError("pruning.backward_options are given without a rule; set pruning.backward, or no options.")
    fns = Fns(
        sizes=Sizes(
            slots=s.slots, rows=s.answer_length, budget=budget, review_at=review_at, columns=columns,
            segment=s.segment, lengths=tuple(s.lengths) + (s.answer_length,), bin_tokens=l.bin_tokens,
            bins_per_step=l.bins_per_step, epochs=l.epochs, vocab_chunk=l.vocab_chunk, remat=l.remat,
            pool_dtype=s.pool_dtype or None, weight_dtype=s.weight_dtype or None,
            shown=min(SHOWN, s.prompts) if config.samples_every else 0,
        ),
        model=model,
        optimizer=optax.with_extra_args_support(optimizer or make_optimizer(config.optimizer, config.steps * l.epochs)),
        mesh=mesh,
        branching=lambda knobs, step: branch(forking(knobs, step)),
        pruning=survive if quality else lambda knobs, *_: prune(dict(knobs, windows=windows)),
        quality=quality,
        grader=task.grade,
        host=task.host,
        right=task.right,
        environment=task.environment,
        anchor=config.environment.anchor,
        fork_at=b.at,
        window=window,
        advantage=advantage,
        thinning=backward,
        trims=l.objective != "gspo" and not l.kl > 0,
        objective=lambda knobs: functools.partial(objective, **{k: knobs[k] for k in bounds}),
        kl=kl if l.kl > 0 else None,
        reference=l.reference or l.kl > 0,
        overlong=l.overlong_buffer,
        proximal=known(l.proximal, PROXIMAL, "learner.proximal"),
        forced=known(l.forced, FORCED, "learner.forced"),
        importance=known(l.importance, IMPORTANCE, "learner.importance"),
        aggregation=known(l.aggregation, AGGREGATIONS, "learner.aggregation"),
    )  # fmt: skip
    check_combinations(config, advantage)
    return fns


def make_knobs(config, task: Task) -> dict:
    """The traced numbers of a config."""
    b, l, f32 = config.branching, config.learner, jnp.float32
    return dict(
        temperature=f32(config.sampler.temperature),
        top_p=f32(config.sampler.top_p),
        eos=jnp.array(task.tokenizer.eos_ids, jnp.int32),
        tau_abs=f32(b.tau_abs),
        tau_rel=f32(b.tau_rel),
        share_from=jnp.array([step for step, _ in b.share], jnp.int32),
        share=jnp.array([share for _, share in b.share], f32),
        fill_after=jnp.int32(b.fill_after),
        greedy=jnp.bool_(b.greedy),
        tau_ed=f32(config.pruning.tau_ed),
        detection=jnp.int32(config.pruning.detection),
        kappa=f32(config.pruning.kappa),
        rho=f32(config.pruning.rho),
        pruning_from=jnp.int32(config.pruning.warmup_steps),
        smoothing=f32(config.quality.smoothing),
        decay=f32(config.quality.decay),
        clip_low=f32(l.clip_low),
        clip_high=f32(l.clip_high),
        dual_clip=f32(l.dual_clip or jnp.inf),
        importance_cap=f32(l.importance_cap),
        kl=f32(l.kl),
        invalid_penalty=f32(config.environment.invalid_penalty),
    )
