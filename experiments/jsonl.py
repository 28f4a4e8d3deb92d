"""A user's own questions and model: JSON lines with a prompt and an answer, graded by what the answer says.

    python -m launch.train --config=experiments/jsonl.py:data=train.jsonl,model=FOLDER --workdir=runs/mine
    python -m launch.train --config=experiments/jsonl.py:data=gsm8k.jsonl,model=Qwen/Qwen2.5-1.5B-Instruct,lora \
        --workdir=runs/gsm8k --config.text.prompt=question --config.text.extract=boxed
    python -m launch.train --config=experiments/jsonl.py:data=train.jsonl,model=FOLDER --workdir=runs/own \
        --config.text.graders="{'my_graders:score': 1.0, 'math': 0.5}"

A line is {"prompt": "What is 2 + 3?", "answer": "5"}; of an answer with "####" (GSM8K) what follows counts. The model is a
folder in Hugging Face's format, a .gguf file, or a name of the hub. `lora` trains adapters over weights in bfloat16,
which takes a third of the memory. Not measured here: it depends on your data; sizes are those that a 1.5B model
trains with on one 80 GB GPU.
"""

from ml_collections import ConfigDict

from treerl.config import default, parse_arg


def get_config(arg: str | None = None):
    """arg: `data=FILE`, `model=FOLDER or name`, `seed=N`, `lora`."""
    given = parse_arg(arg, data="train.jsonl", model="smollm2-135m-instruct", seed=0, lora=False)
    config = default()
    config.seed, config.steps = given["seed"], 200
    config.task.update(name="jsonl", heldout_size=128)
    config.text.source = given["data"]
    config.text.graders = ConfigDict(dict(math=1.0))
    config.model.update(source=given["model"], dtype="bfloat16")
    if given["lora"]:
        config.model.update(lora_rank=16, param_dtype="bfloat16")
    config.sampler.update(prompts=16, slots=8, prompt_length=256, answer_length=512, segment=32)
    config.branching.update(tau_abs=0.1, fill_after=64)
    config.pruning.update(windows=(20, 30, 50))
    config.learner.update(bin_tokens=2048, bins_per_step=2, remat="layers")
    config.optimizer.update(learning_rate=1e-4 if given["lora"] else 1e-6, schedule="constant")
    config.warm_start.steps = 0
    config.evaluation.update(every=25, examples=128, samples=4, batch=64)
    config.samples_every = 10
    return config
