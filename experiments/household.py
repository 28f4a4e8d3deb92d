"""Household chores: a small model learns to act for up to 30 turns; GRPO, GiGPO and HGPO on the same kind of rollouts.

    python -m launch.seeds --config=experiments/household.py:hgpo --workdir=runs/hgpo --count=8
    python -m launch.train --config=experiments/household.py:cpu --workdir=runs/household    # one seed, sized for two CPU cores

0.8M parameters, 64 tasks x 8 episodes a step. Success in percent on 256 held-out tasks x 4 episodes, mean and 95% interval
(Student's t) of seeds 0 to 3, which went on from one warm start (`--shared_warm_start --count=4`), one H100; "novel" asks
for pairs of thing and place that no training task asks for:

                       before     60 steps       100 steps      140 steps     novel: 100 steps    140 steps
    gigpo               16.2     37.2 +- 1.4    46.7 +- 2.0    53.9 +- 1.5     47.3 +- 3.9    52.1 +- 1.3
    grpo                16.3     28.1 +- 8.5    42.0 +- 4.9    46.9 +- 5.4     40.4 +- 4.1    45.7 +- 1.9
    hgpo                16.2     25.9 +- 4.2    40.8 +- 1.5                    40.5 +- 3.5

All three center returns without dividing by their deviation. GiGPO is ahead of GRPO; HGPO, as the paper has it without an
episode term, is not. 0.7 to 1.2 s a step of four seeds, 2 to 3 minutes more for the warm start and compilation.
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
    config.seed, config.steps = given["seed"], 200
    config.task.update(name="household", train_size=16384, heldout_size=256)
    config.environment.update(anchor="observation", invalid_penalty=0.02)
    config.environment.options.update(mistakes=0.25)
    config.sampler.update(prompts=64, slots=8, prompt_length=6, answer_length=256, segment=8)
    config.branching.rule, config.pruning.rule = "stochastic", "none"
    config.advantage.name = given["variant"]
    config.advantage.options.update(std=False)  # with it, the penalty of groups that never succeed would be as loud as success
    if given["variant"] != "grpo":
        config.advantage.options.update(gamma=0.95)
    if given["variant"] == "hgpo":
        config.advantage.options.update(base="sum")  # without, turns in states that no other episode saw teach nothing
    config.model.update(layers=4, width=128, heads=4, kv_heads=2, head_dim=32, hidden=384)
    config.learner.update(bin_tokens=512, bins_per_step=32)
    config.optimizer.update(learning_rate=3e-4, schedule="constant")
    config.warm_start.update(examples=16384, steps=2000, batch=64, learning_rate=2e-3, eval_every=100)
    config.evaluation.update(every=20, examples=256, samples=4, batch=256)
    config.checkpoint_every = 50
    config.samples_every = 0
    if given["cpu"]:
        config.steps = 60
        config.sampler.update(prompts=8, answer_length=192)
        config.environment.horizon = 20
        config.model.update(layers=2, width=96, heads=4, kv_heads=2, head_dim=24, hidden=256)
        config.learner.update(bin_tokens=256, bins_per_step=8)
        config.evaluation.update(every=30, examples=64, samples=4, batch=64)
    return config
