"""A step of an 8B model in the shapes of reasoning tasks, to see what it takes before there is hardware for it.

    python -m launch.train --config=experiments/scale.py --compile_only --topology=v5e:8x8
    python -m launch.train --config=experiments/scale.py:preset=qwen3-4b --compile_only --topology=v5e:4x4

Random weights in the sizes of Qwen3-8B, or of the preset named; 64 trees of 8 leaves a step, prompts of 512 tokens, answers of 1,024;
activations in bfloat16, parameters and Adam's moments in float32. Heads lie over mesh.tensor, up to 8, weights over mesh.fsdp, the rest
of the devices: on 64 chips of a v5e that takes 5.8 of 17.2 GB, where mesh.fsdp=64 alone does not fit. The examples are Countdown's: the
task plays no part in what a step takes.
"""

from treerl.config import default, parse_arg
from treerl.models.presets import PRESETS


def get_config(arg: str | None = None):
    """One large step. arg: `seed=N`, and `preset=` one of treerl.models.presets."""
    given = parse_arg(arg, seed=0, preset="qwen3-8b")
    config = default()
    config.seed = given["seed"]
    config.model.update(preset=given["preset"], dtype="bfloat16")
    config.sampler.update(prompts=64, slots=8, prompt_length=512, answer_length=1024, segment=32)
    config.branching.update(fill_after=64)
    config.pruning.update(windows=(20, 30, 50))
    config.learner.update(bin_tokens=2048, bins_per_step=1, vocab_chunk=512, remat="layers")
    config.warm_start.steps = 0
    config.evaluation.update(batch=64)
    config.mesh.update(data=1, fsdp=-1, tensor=min(8, PRESETS.get(given["preset"], {}).get("kv_heads", 1)))
    return config
