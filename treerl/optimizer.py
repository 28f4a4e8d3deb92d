"""Config to Optax chain and schedule."""
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
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(schedule, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay),
    )
