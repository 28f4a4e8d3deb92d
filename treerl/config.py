"""Every field of an experiment, with its default. Only `functions` and the host loop read the whole of it."""

import ast
import difflib
import inspect
import io
import textwrap
import tokenize

from ml_collections import ConfigDict

from treerl.errors import UserError
from treerl.options import fits

VERSION = 1  # of config.json: raised, and ADDED emptied, when a field goes, changes its name or what it means
ADDED = ("wandb", "branching.options")  # fields since then, whose default means what was before: a config.json without them is complete


def default() -> ConfigDict:
    """The default experiment's fields; `experiments/*.py` override them."""
    config = ConfigDict()
    config.seed = 0  # of everything: parameters, order of examples, sampling
    config.steps = 400  # updates of the policy by reinforcement learning
    config.data_dir = "~/.cache/treerl"  # prepared datasets
    config.wandb = ""  # a project of Weights & Biases that metrics go to as well (pip install wandb); "": none

    config.task = ConfigDict(
        dict(
            name="countdown",  # countdown, a text task (addition, reasoning_gym, jsonl, tfds), or an environment (household,
            #                    shop, textworld)
            numbers_min=4,  # how many numbers a puzzle gives
            numbers_max=4,  # at most; numbers_min at least
            largest=9,  # numbers are 1 .. largest
            operators="+-",  # a subset of + - * /
            target_max=100,  # targets are 1 .. target_max
            train_size=2048,  # puzzles
            orders=8,  # training examples a puzzle, its numbers shown in another order
            heldout_size=512,  # puzzles, disjoint from train
            seed=0,  # of the puzzles: the same for every seed of an experiment
        )
    )
    config.text = ConfigDict(  # what text tasks read, beside task.train_size, heldout_size and seed where they make examples
        dict(
            source="",  # jsonl: a file; tfds: a prepared dataset, name or name/config; reasoning_gym: name of its task
            heldout="",  # jsonl: a file, tfds: a split, of held-out examples; "": the last task.heldout_size of the others
            split="train",  # tfds: the split of training examples
            prompt="prompt",  # jsonl, tfds: column of the question
            answer="answer",  # jsonl, tfds: column of the reference answer; of one with "####" (GSM8K), what follows
            options=ConfigDict(),  # arguments of the task: "{'digits': 2}" of addition, those of reasoning_gym's task
            chat=True,  # render prompts by the model's own chat template
            chat_options=ConfigDict(),  # what else the chat template is given: "{'enable_thinking': False}" (Qwen3)
            system="",  # text of the system message; "": none, and the template's own default
            shots=(),  # worked examples before the question: ((question, answer), ...); () with addition: none either
            template="{prompt}",  # what the user says
            extract="text",  # the answer in a completion: text (all of it), number (the last), boxed, tag (<answer>)
            graders=ConfigDict(dict(exact=1.0)),  # name -> weight in the reward: exact, number, math, reasoning_gym, or
            #                                       module:function of your own (of a package, package/module:function),
            #                                       (completion, example) -> number; see treerl.graders
            right="",  # the grader whose score above 0.5 makes an answer right in pass@k; "": the reward itself
            threshold=0.0,  # above 0: scores of graders count 1 from it and 0 below; 0: as they are
            seconds=5.0,  # a grader may take for one answer, which is worth 0 beyond
            workers=2,  # processes that grade
            grading="split",  # graders run between the step's two halves (split) or within it (callback)
        ),
        convert_dict=False,
    )
    config.environment = ConfigDict(  # what tasks that are environments read, beside task.train_size, heldout_size and seed
        dict(
            horizon=0,  # turns of an episode at most; 0: the environment's own default
            options=ConfigDict(),  # further arguments of the environment: "{'mistakes': 0.5}" of its scripted player
            anchor="state",  # what turns are compared by in gigpo and hgpo: the environment's state, or the observation
            memory="full",  # what the policy reads: the whole episode, or a fresh prompt each turn (reprompt) with the goal ...
            window=2,  # ... and so many turns before
            invalid_penalty=0.0,  # that an invalid action costs, of the episode's reward and of its own turn's return, undiscounted
        ),
        convert_dict=False,
    )
    config.model = ConfigDict(
        dict(
            source="",  # a published model: folder, .gguf file, organisation/name or smollm2-135m-instruct; then sizes and
            #             switches below, but for dtypes and lora, come from its config.json. "": random weights
            preset="",  # random weights in the sizes of a known model, such as qwen3-8b, see treerl.models.presets; what
            #             follows is then as with source
            layers=3,  # blocks of attention and MLP
            width=96,  # D: of the residual stream
            heads=4,  # H: query heads
            kv_heads=2,  # G: key and value heads, a divisor of heads
            head_dim=24,  # of each head, even
            hidden=256,  # of the gated MLP
            rope_theta=10_000.0,  # base of the rotary positions' wavelengths
            qk_norm=True,  # normalise queries and keys (Qwen3)
            qkv_bias=False,  # add biases to queries, keys and values (Qwen2)
            tied=True,  # output projection is the embedding
            dtype="float32",  # of activations
            param_dtype="float32",  # of stored weights; bfloat16 rounds updates below 1/256 of a weight away
            lora_rank=0,  # train a change of this rank of every product in the blocks, and nothing else; 0: all weights
            lora_alpha=32.0,  # the change is lora_alpha / lora_rank times the product of its factors
        )
    )
    config.sampler = ConfigDict(
        dict(
            prompts=32,  # B: trees a step
            slots=8,  # K: leaves of a tree
            prompt_length=12,  # P: tokens, at most
            answer_length=16,  # S: rows of the tree, tokens of an answer with its end, at most
            temperature=1.0,  # divides the logits, in the sampler and in the learner
            top_p=1.0,  # share of the probability that may be drawn from; 1: all
            segment=4,  # iterations between two tests for the end, and before the review of survival rules
            pool_dtype="",  # of stored keys and values; "": that of activations
            weight_dtype="",  # int8: the largest weights are read in 8 bits, on a GPU; "": that of activations
            lengths=(),  # static row bounds before answer_length; each compiles the loop once more
        )
    )
    config.branching = ConfigDict(
        dict(
            rule="lookahead",  # stochastic, lookahead: see treerl.branching
            tau_abs=0.05,  # a candidate is likelier than this ...
            tau_rel=0.8,  # ... and less than this less likely than the likeliest; above 1: however unlikely
            max_children=3,  # a fork starts at most so many lines
            share=((0, 1.0),),  # (from step, share of the slots that grow by forks) ...
            fill_after=6,  # iterations, then empty slots start from the prompt
            greedy=False,  # tree lines take the likeliest token instead of sampling
            at="token",  # in environments lines fork at any token of an action, or where an action begins (turn)
            options=ConfigDict(),  # keyword arguments of a rule of your own
        ),
        convert_dict=False,
    )
    config.pruning = ConfigDict(
        dict(
            rule="similarity",  # none, similarity, or survival at the detection length: arrol, arrol_group, balance, random
            windows=(4, 6),  # similarity: compare a child with its parent after so many tokens
            tau_ed=0.3,  # similarity: prune below this edit distance a token; 0: nothing
            detection=4,  # survival rules: tokens that a line must have to be scored; the review of all lines comes when
            #               the latest starts (branching.fill_after) can have them, at the end of a sampler.segment
            kappa=0.5,  # share of the lines of that length that survive; 1: all
            rho=0.5,  # share of right answers wanted among survivors
            options=ConfigDict(),  # keyword arguments of a survival rule, or one of your own: "{'lam': 1.0, 'p_min': 0.2, 'least': 1}"
            columns=0,  # lines of a tree that run on at most, in a smaller pool; 0: kappa x slots, rounded up. Rules that
            #             draw (arrol, arrol_group) cut what exceeds it and so keep less than kappa unless it is larger
            refork=False,  # fill the room that survivors leave of it with new lines that continue them
            warmup_steps=20,  # steps in which the quality head learns and nothing is pruned
            weights="none",  # of survivors: none (they count alike), inverse (to their chance of surviving)
            backward="none",  # give credit to a part of the graded tree: none, width, depth, coverage; see treerl.thinning
            backward_options=ConfigDict(),  # keyword arguments of that rule: "{'mode': 'extreme', 'ratio': 0.5}"
        ),
        convert_dict=False,
    )
    config.quality = ConfigDict(  # the head that survival rules read; see treerl.models.quality, treerl.survival
        dict(
            inner=64,  # units of its hidden layer
            learning_rate=1e-3,  # of its own Adam
            epochs=4,  # updates a step
            bins=128,  # of the table from scores to the chance of a right answer
            smoothing=1.0,  # counts added to each bin
            decay=0.95,  # of the counts, each step
        )
    )
    config.advantage = ConfigDict(
        dict(
            name="branch_depthwise",  # see treerl.advantages
            options=ConfigDict(),  # keyword arguments of the estimator: --config.advantage.options="{'std': False}"
            multipliers=ConfigDict(),  # novelty, ear, ace, gdro and their options: "{'ear': {}, 'ace': {'alpha': 0.5}}"
        ),
        convert_dict=False,
    )
    config.learner = ConfigDict(
        dict(
            bin_tokens=72,  # C: tokens that attend together
            bins_per_step=4,  # microbatch: bins of one forward and backward pass, per shard
            epochs=1,  # updates on the same trees
            objective="ppo",  # ppo, cispo, gspo: see treerl.losses
            clip_low=0.2,  # no gain below the ratio 1 - clip_low ...
            clip_high=0.2,  # ... and above 1 + clip_high
            dual_clip=0.0,  # ppo: bound above 1 on ratios of negative credit, such as 3; 0: none
            aggregation="token",  # token: every token counts alike; sequence: every rollout does; constant: every
            #                       token, divided by rollouts x answer_length
            proximal="sampler",  # whose log-probs ratios start from: the sampler's, or the learner's own, computed once more
            importance="none",  # weight of policy over sampler a token: none, truncate (at the cap), mask (0 above the cap)
            importance_cap=2.0,  # of that weight
            forced="policy",  # tokens that a rule forced: policy (like drawn ones), mask (left out), importance (their
            #                   probability, truncated)
            kl=0.0,  # weight of the KL to the reference policy, that of the end of the warm start; above 0 keeps one
            kl_estimate="k3",  # k1, k2, k3: see treerl.losses
            reference=False,  # keep the reference policy for advantage.multipliers=ace even without a KL
            overlong_buffer=0,  # tokens before answer_length in which the reward falls by up to 1; 0: none
            vocab_chunk=1024,  # tokens whose logits exist at a time
            remat="none",  # what the backward pass computes again to save memory: none, products: all but these, layers: whole layers
            max_skipped=10,  # updates skipped in a row for a loss or gradient that is not finite; one more ends the run
        )
    )
    config.optimizer = ConfigDict(
        dict(
            learning_rate=6e-4,  # of Adam, its highest
            schedule="cosine",  # constant, cosine
            warmup_steps=10,  # updates during which it rises from 0
            clip_norm=1.0,  # of the whole gradient, at most
            b1=0.9,  # decay of the mean of gradients
            b2=0.99,  # decay of the mean of their squares
            moment_dtype="float32",  # of the mean of gradients; that of squares needs float32
            weight_decay=0.0,  # decoupled, a multiple of the learning rate
            ess="none",  # none, sqrt, linear: scale updates by the effective sample size of the rollouts (VCPO)
            ess_base=1.0,  # share of effective rollouts from which an update has its full size
        )
    )
    config.warm_start = ConfigDict(
        dict(
            examples=2048,  # training examples whose reference answers are used
            steps=600,  # supervised updates at most; 0: start from random weights
            batch=64,  # answers an update
            learning_rate=1e-3,  # of Adam, constant after optimizer.warmup_steps
            patience=3,  # stop when held-out pass@1 has not risen in so many evaluations
            eval_every=50,  # updates
        )
    )
    config.evaluation = ConfigDict(
        dict(
            every=50,  # steps
            examples=512,  # held-out examples, at most
            samples=8,  # n: answers sampled for each
            batch=128,  # examples at a time
        )
    )
    config.checkpoint_every = 50  # steps
    config.checkpoint_keep = 1  # of the newest; the one with the best held-out pass@1 stays besides
    config.checkpoint_keep_every = 0  # checkpoints of steps divisible by it stay for ever; 0: none do
    config.samples_every = 50  # steps between those whose first answers are written to samples.jsonl; 0: none
    config.mesh = ConfigDict(dict(data=-1, fsdp=1, tensor=1))  # devices along each axis, -1: the rest
    return config


OPTIONS = (
    "environment.options",
    "text.options",
    "text.chat_options",
    "text.graders",
    "advantage.options",
    "advantage.multipliers",
    "branching.options",
    "pruning.options",
    "pruning.backward_options",
)  # checked where the functions that take them are known


def fields(config, prefix: str = ""):
    """(dotted name, value) of every field of a config or nested dict; each dict of options is one field."""
    for name, value in config.items():
        if isinstance(value, (dict, ConfigDict)) and prefix + name not in OPTIONS:
            yield from fields(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def misfit(name: str, text: str) -> UserError:
    """What is said of a text that is no value of a field, or of a section."""
    known = dict(fields(default()))
    if name not in known:
        inside = [field for field in known if field.startswith(f"{name}.")]
        first = next((field for field in inside if field.rpartition(".")[2] in ("name", "rule")), inside[0])
        return UserError(f"{name}={text} sets a whole section; set a field of it, such as --config.{first}=VALUE.")
    like = known[name]
    if isinstance(like, ConfigDict):
        return UserError(f"{name}={text} is no dictionary; write it as --config.{name}=\"{{'NAME': VALUE}}\".")
    return UserError(f"{name}={text} is no {type(like).__name__}; set one such as {like!r}.")


def _are_lengths(values) -> bool:
    return all(type(x) is int and x > 0 for x in values)


def _are_shares(pairs) -> bool:
    if not all(isinstance(p, (tuple, list)) and len(p) == 2 and fits(p[0], 0) and fits(p[1], 0.0) for p in pairs):
        return False
    steps = [step for step, _ in pairs]
    return steps[:1] == [0] and steps == sorted(set(steps)) and all(0 <= share <= 1 for _, share in pairs)


def _are_shots(pairs) -> bool:
    return all(isinstance(p, (tuple, list)) and len(p) == 2 and all(isinstance(x, str) for x in p) for p in pairs)


# What a field must be, whatever the others are, and which fields. Fields that are missing here can
# be anything of their type, or are checked where their names are known: in the task, `make_mesh`
# and `make_fns`.
RULES = (
    ("1 or more", lambda x: x >= 1, """
        checkpoint_every checkpoint_keep model.layers model.width model.heads model.kv_heads model.head_dim model.hidden
        sampler.prompts sampler.slots sampler.prompt_length sampler.answer_length sampler.segment
        branching.max_children learner.bin_tokens learner.bins_per_step learner.epochs learner.vocab_chunk
        warm_start.examples warm_start.batch warm_start.patience warm_start.eval_every
        evaluation.every evaluation.examples evaluation.samples evaluation.batch
        pruning.detection quality.inner quality.epochs quality.bins text.workers"""),
    ("0 or more", lambda x: x >= 0, """
        seed steps branching.fill_after pruning.columns pruning.warmup_steps quality.learning_rate quality.smoothing
        samples_every checkpoint_keep_every model.lora_rank learner.clip_low learner.clip_high learner.kl learner.max_skipped learner.overlong_buffer
        optimizer.learning_rate optimizer.warmup_steps optimizer.weight_decay
        warm_start.steps warm_start.learning_rate text.threshold environment.horizon environment.window
        environment.invalid_penalty"""),
    ("a number above 0", lambda x: x > 0, """
        model.rope_theta model.lora_alpha sampler.temperature branching.tau_rel optimizer.clip_norm learner.importance_cap text.seconds"""),
    ("a number above 0, at most 1", lambda x: 0 < x <= 1, "sampler.top_p optimizer.ess_base pruning.kappa quality.decay"),
    ("a number from 0 to 1", lambda x: 0 <= x <= 1, "pruning.rho pruning.tau_ed"),
    ("0, or a number above 1", lambda x: x == 0 or x > 1, "learner.dual_clip"),
    ("a number from 0 to below 1", lambda x: 0 <= x < 1, "branching.tau_abs optimizer.b1 optimizer.b2"),
    ("float32, bfloat16 or float16", ("float32", "bfloat16", "float16").__contains__, "model.dtype model.param_dtype optimizer.moment_dtype"),
    ("float32, bfloat16, float16 or ''", ("float32", "bfloat16", "float16", "").__contains__, "sampler.pool_dtype"),
    ("int8 or ''", ("int8", "").__contains__, "sampler.weight_dtype"),
    ("lengths of 1 or more, such as (4, 6)", _are_lengths, "sampler.lengths pruning.windows"),
    ("(step, share) pairs that ascend from step 0, shares from 0 to 1, such as ((0, 0.5), (100, 1.0))", _are_shares,
     "branching.share"),
    ("a folder", bool, "data_dir"),
    ("the name of a column", bool, "text.prompt text.answer"),
    ("the name of a split", bool, "text.split"),
    ("text with {prompt} where the question belongs", lambda x: "{prompt}" in x, "text.template"),
    ("text, number, boxed or tag", ("text", "number", "boxed", "tag").__contains__, "text.extract"),
    ("state or observation", ("state", "observation").__contains__, "environment.anchor"),
    ("full or reprompt", ("full", "reprompt").__contains__, "environment.memory"),
    ("token or turn", ("token", "turn").__contains__, "branching.at"),
    ("none, products or layers", ("none", "products", "layers").__contains__, "learner.remat"),
    ("split or callback", ("split", "callback").__contains__, "text.grading"),
    ('(question, answer) pairs of text, such as (("1 + 1?", "2"),)', _are_shots, "text.shots"),
)  # fmt: skip


def comments() -> dict[str, str]:
    """What `default` says of each field and section, by name: the comment beside it and below, up to the next."""
    source = inspect.getsource(default)
    said = [
        (t.start[0], t.string.lstrip("# ")) for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type == tokenize.COMMENT
    ]
    places = []  # (line, name), in order
    for node in ast.parse(source).body[0].body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute):
            section = node.targets[0].attr
            places.append((node.lineno, section))
            made = node.value
            while isinstance(made, ast.Call) and made.args:  # ConfigDict(dict(field=value, ...))
                made = made.args[0]
            places += [(field.value.lineno, f"{section}.{field.arg}") for field in getattr(made, "keywords", ())]
    until = lambda line: min([other for other, _ in places if other > line], default=len(source))  # fields of one line share it
    return {name: " ".join(text for at, text in said if line <= at < until(line)) for line, name in places}


def explain(config: ConfigDict) -> str:
    """Every field with its value and its comment; its default, where that is another. Text of --help_config."""
    said, plain, lines, last = comments(), dict(fields(default())), [], ""
    place = list(said).index
    for name, value in sorted(fields(config), key=lambda field: place(field[0]) if field[0] in said else len(said)):
        section = name.rpartition(".")[0]
        if section != last:
            lines.append(f"\n{section}" + (f": {note}" if (note := said.get(section)) else ""))
        last, shown = section, lambda x: repr(x.to_dict() if isinstance(x, ConfigDict) else x)
        other = f" (default {shown(plain[name])})" if name in plain and shown(plain[name]) != shown(value) else ""
        text = f"{name} = {shown(value)}{other}  {said.get(name, '')}"
        lines.append("  " * bool(section) + textwrap.fill(text, 118, subsequent_indent=" " * 8, break_long_words=False))
    return "\n".join(lines)


def unknown(name: str, known) -> UserError:
    """The error for a field that is none, with the fields that may have been meant."""
    section, _, word = name.rpartition(".")
    last = lambda field: field.rpartition(".")[2]
    namesakes = [field for field in known if last(field) == word]
    if section:  # in another section: the one of the nearest name
        namesakes = difflib.get_close_matches(name, namesakes, n=1, cutoff=0)
    beside = [field for field in known if field.rpartition(".")[0] == section] if section else list(known)
    initials = lambda field: "".join(part[:1] for part in last(field).split("_"))
    alike = [field for field in beside if len(word) > 1 and (word in last(field) or initials(field) == word)]
    close = difflib.get_close_matches(word, map(last, beside), n=1)
    near = namesakes or alike or [field for field in beside if last(field) in close]
    advice = f"did you mean {' or '.join(near[:3])}?" if near else "--help_config lists them."
    return UserError(f"{name} is no field of the config; {advice}")


def check(config: ConfigDict) -> None:
    """Raises UserError at the first field that is unknown, missing, of another type or cannot work."""
    given, known = dict(fields(config)), dict(fields(default()))
    for name in given:
        if name not in known:
            raise unknown(name, known)
    for name, like in known.items():
        if name not in given:
            raise UserError(f"{name} is missing from the config; set it, its default is {like!r}.")
        if not fits(given[name], like):
            raise UserError(f"{name}={given[name]!r} is no {type(like).__name__}; set one such as {like!r}.")
    for must, works, names in RULES:
        for name in names.split():
            if not works(given[name]):
                raise UserError(f"{name}={given[name]!r} cannot work; set it to {must}.")
    lengths, rows = given["sampler.lengths"], given["sampler.answer_length"]
    if any(a >= b for a, b in zip(lengths, [*lengths[1:], rows])):
        raise UserError(f"sampler.lengths={lengths!r} must ascend and stay below sampler.answer_length={rows}; mend either.")


def parse_arg(arg: str | None, **known) -> dict:
    """Parses an experiment's argument 'name,key=value,flag' against its known keys and defaults.

    A bare word sets the key named like it to True, or is the value of `variant` if that is
    known. Values take the type of their default.

    Raises:
      UserError: for an unknown key or a value that does not parse, naming the known ones.
    """
    result = dict(known)
    for part in filter(None, (arg or "").split(",")):
        key, equals, value = part.partition("=")
        if not equals and "variant" in known and key not in known:
            key, value = "variant", part
        if key not in known:
            raise UserError(f"config argument {key!r} is unknown; known are {', '.join(known)}.")
        kind = type(known[key])
        try:
            result[key] = {"true": True, "false": False, "": True}[value.lower()] if kind is bool else kind(value)
        except (KeyError, ValueError):
            raise UserError(f"config argument {key}={value!r} is no {kind.__name__}.") from None
    return result
