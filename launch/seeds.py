"""Trains several seeds of an experiment in one program, on one device.

python -m launch.seeds --config=experiments/household.py:hgpo --workdir=DIR --count=8
    [--shared_warm_start] [--config.section.field=value ...]

The seeds are config.seed, config.seed + 1, ... Prints one JSON line at the end: name -> [mean, half width of the 95%
interval over the seeds]. DIR/seedN are runs for launch.compare. The same command goes on from the last checkpoint.
"""

import json

from absl import flags
from ml_collections import config_flags

from launch import entry

_CONFIG = config_flags.DEFINE_config_file("config", None, "Experiment, a file with get_config(arg).")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the runs: seedN/metrics.jsonl, checkpoints.")
_COUNT = flags.DEFINE_integer("count", 8, "How many seeds.")
_SHARED = flags.DEFINE_bool("shared_warm_start", False, "All seeds go on from the warm start of the first.")
flags.mark_flags_as_required(["config", "workdir"])


def main():
    from treerl import seeds
    from treerl.config import check

    check(_CONFIG.value)
    print(json.dumps({"seeds": _COUNT.value} | seeds.train(_CONFIG.value, _WORKDIR.value, _COUNT.value, shared=_SHARED.value)))


if __name__ == "__main__":
    entry.run(main)
