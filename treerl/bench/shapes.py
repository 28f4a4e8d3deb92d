"""The shapes of work that sampler, learner and step are measured at, by letter; `defaults` of each suite adds the rest."""

SHAPES = {
    "A": dict(preset="qwen2.5-1.5b", prompts=16, slots=8, prompt=256, rows=512),
    "B": dict(preset="qwen2.5-1.5b", prompts=8, slots=16, prompt=2048, rows=512),  # a long prompt
    "C": dict(preset="qwen2.5-0.5b", prompts=64, slots=8, prompt=256, rows=512),  # many rows through a small model
    "D": dict(preset="qwen3-8b", prompts=8, slots=8, prompt=512, rows=256),
}
# Adam's state of all weights of this one does not fit beside them: adapters are trained, over weights that stay in bfloat16
LORA = {"D": dict(lora_rank=32, param_dtype="bfloat16")}


def sizes(name: str, **others) -> dict:
    """A shape's sizes on an accelerator, its letter and dtype included; others go in between, so that a shape's own win."""
    return dict(shape=name, dtype="bfloat16") | others | SHAPES[name]
