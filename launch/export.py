"""Writes the policy of a checkpoint as a folder in Hugging Face's format, which transformers and vLLM load.

python -m launch.export --workdir=DIR --folder=NEW [--best] [--dtype=bfloat16]

LoRA's changes are merged into the weights. Tokenizer, chat template and generation config are those of the
published model that the run started from; a run with random weights has none of them.
"""

from absl import flags

from launch import entry

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a run made by launch.train.")
_FOLDER = flags.DEFINE_string("folder", None, "New folder for the model.")
_BEST = flags.DEFINE_bool("best", False, "The checkpoint with the best held-out pass@1, not the latest.")
_DTYPE = flags.DEFINE_enum("dtype", None, ["float32", "bfloat16", "float16"], "Of the weights; the default is the published model's.")
flags.mark_flags_as_required(["workdir", "folder"])


def main():
    from treerl.experiment import load  # after the flags: a wrong one must not cost the import of jax

    experiment, state, step = load(_WORKDIR.value, best=_BEST.value)
    experiment.export(state, _FOLDER.value, dtype=_DTYPE.value)
    print(f"step {step} of {_WORKDIR.value} is in {_FOLDER.value}")


if __name__ == "__main__":
    entry.run(main)
