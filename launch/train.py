"""Trains an experiment.

python -m launch.train --config=experiments/countdown.py[:arg] --workdir=DIR
    [--profile=FIRST:LAST] [--config.section.field=value ...]

Prints one JSON line on standard output at the end; goes on from the last checkpoint in DIR.
"""
import json
import sys

from absl import app, flags, logging
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file("config", None, "Experiment, a file with get_config(arg).")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: metrics, checkpoints, report.")
_PROFILE = flags.DEFINE_string(
    "profile",
    None,
    "Steps to trace with jax.profiler into WORKDIR/profile, FIRST:LAST, both included, such as 3:5: the first step of "
    "a process compiles, and a trace grows by megabytes a step. To look: tensorboard --logdir=WORKDIR with the "
    "plugin xprof, or open its trace.json.gz in ui.perfetto.dev.",
)
flags.mark_flags_as_required(["config", "workdir"])


def main(_):
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax tells every step of a checkpoint
    from treerl.profiling import parse_span  # after the flags: a wrong one must not cost the import of jax

    try:
        profile = parse_span(_PROFILE.value, _CONFIG.value.steps)
    except ValueError as error:
        sys.exit(str(error))  # to standard error, exit status 1
    from treerl.train import train

    print(json.dumps(train(_CONFIG.value, _WORKDIR.value, profile=profile)))
    print(f"report: {_WORKDIR.value}/report.html", file=sys.stderr)


if __name__ == "__main__":
    app.run(main)
