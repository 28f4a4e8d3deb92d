"""Grows one tree for a prompt with a trained policy and prints it.

python -m launch.generate --workdir=DIR --prompt='3 5 2 7=17' [--best] [--seed=N]

The tree grows by the run's own rules (branching, pruning, temperature) and is graded and credited
by its own grader and estimator. Prints the forks, then a line for every leaf.
"""

from absl import flags

from launch import entry

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a run made by launch.train.")
_PROMPT = flags.DEFINE_string("prompt", None, "Prompt as the model reads it, such as '3 5 2 7=17' for Countdown.")
_BEST = flags.DEFINE_bool("best", False, "The checkpoint with the best held-out pass@1, not the latest.")
_SEED = flags.DEFINE_integer("seed", 0, "Another seed grows another tree.", lower_bound=0, upper_bound=2**31 - 1)
flags.mark_flags_as_required(["workdir", "prompt"])


def main():
    from treerl.draw import TEXT_LEGEND
    from treerl.experiment import load  # after the flags: a wrong one must not cost the import of jax

    experiment, state, step = load(_WORKDIR.value, best=_BEST.value)
    example = experiment.parse(_PROMPT.value)
    grown = experiment.grow(state, [example], step=step, seed=_SEED.value)
    print(experiment.read_text(grown, 0))
    print(experiment.tree_text(grown, 0), TEXT_LEGEND, sep="\n\n")


if __name__ == "__main__":
    entry.run(main)
