"""Config to Optax chain and schedule."""

import jax
import jax.numpy as jnp
import optax

from treerl.errors import UserError


def make_optimizer(config, steps: int) -> optax.GradientTransformation:
    """Adam with clipping by global norm, warm-up and a constant or cosine schedule.

    Args:
      config: the `optimizer` section of the config (see `treerl.config`).
      steps: updates in all, the end of the schedule.
    """
    warmup = min(config.warmup_steps, steps)
    if config.schedule == "cosine":
        schedule = optax.warmup_cosine_decay_schedule(
            0.0 if warmup else config.learning_rate, config.learning_rate, warmup, max(steps, warmup + 1)
        )
    elif config.schedule == "constant":
        schedule = optax.linear_schedule(0.0 if warmup else config.learning_rate, config.learning_rate, warmup)
    else:
        raise UserError(f"optimizer.schedule={config.schedule!r} is unknown; use 'constant' or 'cosine'.")
    if config.ess not in ESS:
        raise UserError(f"optimizer.ess={config.ess!r} is unknown; known are {', '.join(sorted(ESS))}.")
    scale = [] if config.ess == "none" else [scale_by_ess(config.ess_base, rule=config.ess)]
    adam = optax.adamw(schedule, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay, mu_dtype=config.moment_dtype)
    return in_float32(optax.chain(optax.clip_by_global_norm(config.clip_norm), adam, *scale))


def in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Runs an optimizer on float32 copies, whatever the parameters are stored in.

    Optax's Adam keeps its mean of squares in the parameters' dtype, and bfloat16 cannot hold a mean with b2 = 0.99:
    steps below 1/256 of a number are lost. Updates are float32; `optax.apply_updates` adds before it rounds.
    """
    inner, cast = optax.with_extra_args_support(inner), lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    def update(updates, state, params=None, **extra):
        return inner.update(cast(updates), state, None if params is None else cast(params), **extra)

    return optax.GradientTransformationExtraArgs(lambda params: inner.init(cast(params)), update)


ESS = {"none": None, "sqrt": jnp.sqrt, "linear": lambda x: x}


def scale_by_ess(base: float = 1.0, *, rule: str = "sqrt") -> optax.GradientTransformationExtraArgs:
    """Scales updates by how many of the rollouts count: update * f(min(1, ess / base)).

    VCPO, arXiv 2602.17616: ess = (sum w)^2 / (n sum w^2) in [1 / n, 1] of the rollouts' importance weights, f the
    square root with Adam (`linear` for SGD). Placed after Adam it scales the learning rate. The
    update function takes `ess` as an extra argument, 1 where it is not given.

    Args:
      base: ess from which updates have their full size.
    """

    def update(updates, state, params=None, *, ess=1.0, **_):
        factor = ESS[rule](jnp.minimum(1.0, jnp.asarray(ess, jnp.float32) / base))
        return jax.tree.map(lambda u: u * factor.astype(u.dtype), updates), state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)
