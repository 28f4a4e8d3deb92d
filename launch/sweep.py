"""Trains an experiment once for every point of a grid over its fields.

python -m launch.sweep --config=experiments/countdown.py --workdir=DIR
    --grid=optimizer.learning_rate=1e-4,3e-4 --grid=seed=0,1,2
    [--parallel=N | --submit='sbatch launch/gpu.sh'] [--dry_run] [--config.section.field=value ...]

Runs lie in DIR/NAME, named by their values. One after another on this machine, or N at a time, each with a GPU of its
own where there are GPUs; or each is handed to the command of --submit, its flags added. What fails does not stop the
others, and the same command again does what is missing. A table of the results comes last, as JSON lines; for curves
see launch.compare.

Exit status: 0; 1 if a run failed; 75 if none failed and some were stopped by a signal.
"""

import json
import sys

from absl import flags
from ml_collections import config_flags

from launch import entry

config_flags.DEFINE_config_file("config", None, "Experiment, a file with get_config(arg).")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the runs' folders.")
_GRID = flags.DEFINE_multi_string("grid", None, "FIELD=VALUE,VALUE,...; of several flags every combination.")
_PARALLEL = flags.DEFINE_integer("parallel", 1, "Runs at a time.", lower_bound=1)
_SUBMIT = flags.DEFINE_string("submit", None, "Command that takes the flags of launch.train, such as 'sbatch launch/gpu.sh'.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the commands and stop.")
flags.mark_flags_as_required(["config", "workdir", "grid"])


def main():
    from treerl import sweep  # after the flags: a wrong one must not cost the import of jax

    shared = [argument for argument in sys.argv[1:] if argument.lstrip("-").startswith(("config=", "config.", "noconfig."))]
    runs = sweep.runs(_GRID.value, shared, _WORKDIR.value)
    if _DRY_RUN.value:
        print(*(sweep.command_line(run, _SUBMIT.value) for run in runs), sep="\n")
        return
    if _SUBMIT.value:
        sys.exit(sweep.submit(runs, _SUBMIT.value))
    results = sweep.train(runs, _WORKDIR.value, _PARALLEL.value)
    for run, result in zip(runs, results):
        print(json.dumps(run.values | result))
    stopped = {result.get("status") for result in results} - {None}
    sys.exit(1 if stopped - {sweep.AGAIN} else sweep.AGAIN if stopped else 0)


if __name__ == "__main__":
    entry.run(main)
