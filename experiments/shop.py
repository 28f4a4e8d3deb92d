"""A web shop: a small model searches, compares, chooses options and buys, in up to 15 turns.

    python -m launch.seeds --config=experiments/shop.py:hgpo --workdir=runs/shop_hgpo --count=8
    python -m launch.train --config=experiments/shop.py:cpu --workdir=runs/shop    # one seed, sized for two CPU cores

0.8M parameters, 64 tasks x 8 episodes a step. Success (everything that was asked for, reward 1) in percent on 256 held-out tasks
x 4 episodes, and on as many in a shop of other products ("novel"); mean and 95% interval (Student's t) of seeds 0 to 3, which went
on from one warm start (39.4, novel 16.4), one H100, compiled with XLA_FLAGS=--xla_gpu_autotune_level=0:

             20 steps       40 steps       60 steps       100 steps      novel: 20 steps    100 steps
    hgpo     84.2 +- 1.4    95.4 +- 1.5    97.5 +- 0.4    98.4 +- 0.4    29.2 +- 2.2        31.8 +- 2.4
    gigpo    84.6 +- 1.0    95.1 +- 0.8    97.5 +- 0.5    98.4 +- 0.4    29.3 +- 1.5        32.3 +- 0.8
    grpo     80.3 +- 1.2    93.1 +- 0.9    96.3 +- 0.2    97.9 +- 0.9    29.5 +- 1.3        31.5 +- 3.2

Credit of turns learns faster than that of episodes; which of hgpo and gigpo makes no difference here. In the shop of other products
all stop gaining after some 20 steps; perhaps because 256 products can be known by heart, which does not carry over (not tested).
All three runs side by side on one device took 400 s.
"""

from treerl.config import default, parse_arg
from treerl.errors import UserError

VARIANTS = ("hgpo", "gigpo", "grpo")


def get_config(arg: str | None = None):
    """arg: `seed=N`, `variant=` one of VARIANTS, or just its name, and `cpu` for a size that two cores can train."""
    given = parse_arg(arg, seed=0, variant=VARIANTS[0], cpu=False)
    if given["variant"] not in VARIANTS:
        raise UserError(f"variant={given['variant']!r} is unknown; known are {', '.join(VARIANTS)}.")
    config = default()
    config.seed, config.steps = given["seed"], 100
    config.task.update(name="shop", train_size=3584, heldout_size=256)
    config.environment.update(anchor="observation", invalid_penalty=0.02)
    config.sampler.update(prompts=64, slots=8, prompt_length=9, answer_length=192, segment=8)
    config.branching.rule, config.pruning.rule = "stochastic", "none"
    config.advantage.name = given["variant"]
    config.advantage.options.update(std=False)  # as in household
    if given["variant"] != "grpo":
        config.advantage.options.update(gamma=0.95)
    if given["variant"] == "hgpo":
        config.advantage.options.update(base="sum")  # as in household
    config.model.update(layers=4, width=128, heads=4, kv_heads=2, head_dim=32, hidden=384)
    config.learner.update(bin_tokens=512, bins_per_step=32)
    config.optimizer.update(learning_rate=3e-4, schedule="constant")
    config.warm_start.update(examples=3584, steps=600, batch=64, learning_rate=2e-3, eval_every=100)
    config.evaluation.update(every=20, examples=256, samples=4, batch=256)
    config.samples_every = 0
    if given["cpu"]:
        config.steps = 60
        config.sampler.update(prompts=8)
        config.model.update(layers=2, width=96, heads=4, kv_heads=2, head_dim=24, hidden=256)
        config.learner.update(bin_tokens=256, bins_per_step=8)
        config.evaluation.update(every=30, examples=64, samples=4, batch=64)
    return config
