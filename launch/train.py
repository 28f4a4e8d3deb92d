"""Trains an experiment.

python -m launch.train --config=experiments/countdown.py[:arg] --workdir=DIR
    [--config.section.field=value ...]

Prints one JSON line on standard output at the end; goes on from the last checkpoint in DIR.
"""
import json
import sys

from absl import flags
from ml_collections import config_flags

from launch import entry

_CONFIG = config_flags.DEFINE_config_file("config", None, "Experiment, a file with get_config(arg).")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: metrics, checkpoints, report.")
flags.mark_flags_as_required(["config", "workdir"])


def main():
    from treerl.train import train  # after the flags: a wrong one must not cost the import of jax

    print(json.dumps(train(_CONFIG.value, _WORKDIR.value)))
    print(f"report: {_WORKDIR.value}/report.html", file=sys.stderr)


if __name__ == "__main__":
    entry.run(main)
