"""Every field of an experiment, with its default. Only `step.make_fns` and `train` read it."""
from ml_collections import ConfigDict


def default() -> ConfigDict:
    """The default experiment's fields; `experiments/*.py` override them."""
    config = ConfigDict()
    config.seed = 0  # of everything: parameters, order of examples, sampling
    config.steps = 400  # updates of the policy by reinforcement learning
    config.data_dir = "~/.cache/treerl"  # prepared datasets

    config.task = ConfigDict(
        dict(
            name="countdown",  # a file of treerl.tasks
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
    config.model = ConfigDict(
        dict(
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
            param_dtype="float32",  # of stored weights
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
            segment=4,  # iterations between two tests for the end
            lengths=(),  # static row bounds before answer_length; each compiles the loop once more
        )
    )
    config.branching = ConfigDict(
        dict(
            rule="lookahead",  # stochastic, lookahead
            tau_abs=0.05,  # a candidate is likelier than this ...
            tau_rel=0.8,  # ... and at most this less likely than the likeliest
            max_children=3,  # a fork starts at most so many lines
            share=((0, 1.0),),  # (from step, share of the slots that grow by forks) ...
            fill_after=6,  # iterations, then empty slots start from the prompt
            greedy=False,  # tree lines take the likeliest token instead of sampling
        )
    )
    config.pruning = ConfigDict(
        dict(
            rule="similarity",  # none, similarity
            windows=(4, 6),  # compare a child with its parent after so many tokens
            tau_ed=0.3,  # prune below this edit distance a token
        )
    )
    config.advantage = ConfigDict(
        dict(
            name="branch_depthwise",  # see treerl.advantages
            options=ConfigDict(),  # keyword arguments of the estimator
        ),
        convert_dict=False,
    )
    config.learner = ConfigDict(
        dict(
            bin_tokens=64,  # C: tokens that attend together
            bins_per_step=8,  # microbatch: bins of one forward and backward pass, per shard
            epochs=1,  # updates on the same trees
            clip_low=0.2,  # no gain below the ratio 1 - clip_low ...
            clip_high=0.2,  # ... and above 1 + clip_high
            kl=0.0,  # weight of the KL to the policy after the warm start; 0 keeps no reference
            weighting="token",  # token: every token counts alike; sequence: every rollout does
            #                     (a shared cell with credit of its own then weighs the sum of its leaves)
            vocab_chunk=1024,  # tokens whose logits exist at a time
            remat=False,  # recompute layers in the backward pass
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
            weight_decay=0.0,  # decoupled, a multiple of the learning rate
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
    config.mesh = ConfigDict(dict(data=-1, fsdp=1, tensor=1))  # devices along each axis, -1: the rest
    return config


def parse_arg(arg: str | None, **known) -> dict:
    """Parses an experiment's argument 'name,key=value,flag' against its known keys and defaults.

    A bare word sets the key named like it to True, or is the value of `variant` if that is
    known. Values take the type of their default.

    Raises:
      ValueError: for an unknown key or a value that does not parse, naming the known ones.
    """
    result = dict(known)
    for part in filter(None, (arg or "").split(",")):
        key, equals, value = part.partition("=")
        if not equals and "variant" in known and key not in known:
            key, value = "variant", part
        if key not in known:
            raise ValueError(f"config argument {key!r} is unknown; known are {', '.join(known)}.")
        kind = type(known[key])
        try:
            result[key] = {"true": True, "false": False, "": True}[value.lower()] if kind is bool else kind(value)
        except (KeyError, ValueError):
            raise ValueError(f"config argument {key}={value!r} is no {kind.__name__}.") from None
    return result
