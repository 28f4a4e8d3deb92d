"""Evaluates a checkpoint on the held-out split.

python -m launch.evaluate --workdir=DIR [--best]

Prints one JSON line on standard output: the checkpoint's step and unbiased pass@k for k = 1, 2,
4, ... up to the samples drawn for each example (evaluation.samples of the run's config). Examples
are spread over the devices at hand, which need not be those of the run; also over several processes, as in launch.train.
"""

import json

from absl import flags

from launch import entry

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a run made by launch.train.")
_BEST = flags.DEFINE_bool("best", False, "The checkpoint with the best held-out pass@1, not the latest.")
flags.mark_flag_as_required("workdir")


def main():
    from treerl import processes  # after the flags: a wrong one must not cost the import of jax
    from treerl.experiment import load

    experiment, state, step = load(_WORKDIR.value, best=_BEST.value)
    scores = experiment.evaluate(state)
    if processes.is_first():
        print(json.dumps(dict(step=step, **scores)))


if __name__ == "__main__":
    entry.run(main, together=True)
