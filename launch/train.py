"""Trains an experiment.

python -m launch.train --config=experiments/countdown.py[:arg] --workdir=DIR
    [--profile=FIRST:LAST] [--config.section.field=value ...]
python -m launch.train --config=... --compile_only [--topology=v5e:8x8], or --help_config

Prints one JSON line on standard output at the end; goes on from the last checkpoint in DIR. Exit status: 0 at the end; 75 after Ctrl-C or
SIGTERM, with the step under way finished and saved, so that the same command goes on (a second Ctrl-C ends at once); 1 with a sentence.
"""

import json
import signal
import sys

from absl import flags
from ml_collections import config_flags

from launch import entry
from treerl.config import explain

_CONFIG = config_flags.DEFINE_config_file("config", None, "Experiment, a file with get_config(arg).")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: metrics, checkpoints, report.")
_PROFILE = flags.DEFINE_string(
    "profile", None,
    "Steps to trace with jax.profiler into WORKDIR/profile, FIRST:LAST, both included, such as 3:5: the first step of a process "
    "compiles. To look: tensorboard --logdir=WORKDIR with the plugin xprof, or its trace.json.gz in ui.perfetto.dev.",
)  # fmt: skip
_COMPILE_ONLY = flags.DEFINE_bool("compile_only", False, "Compile a step, print the memory, work and communication it takes, and stop.")
_TOPOLOGY = flags.DEFINE_string("topology", None, "TPUs that need not be there, such as v5e:8x8: compile a step for them, and stop.")
_HELP_CONFIG = flags.DEFINE_bool("help_config", False, "List every field of the experiment with its value and what it is for, and stop.")
flags.mark_flag_as_required("config")
_ANY = ["workdir", "compile_only", "topology", "help_config"]
flags.register_multi_flags_validator(_ANY, lambda f: any(f.values()), "flag --workdir=None: missing")


def main():
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # where train() does not catch it: end at once, no traceback
    if _HELP_CONFIG.value:
        return print(explain(_CONFIG.value))
    from treerl import plan, processes  # after the flags: a wrong one must not cost the import of jax
    from treerl.profiling import parse_span
    from treerl.supervision import AGAIN, Interrupted
    from treerl.train import train

    if _COMPILE_ONLY.value or _TOPOLOGY.value:
        return plan.tell(_CONFIG.value, _TOPOLOGY.value)
    profile = parse_span(_PROFILE.value, _CONFIG.value.steps)
    try:
        summary = train(_CONFIG.value, _WORKDIR.value, profile=profile)
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        sys.exit(AGAIN)
    if processes.is_first():
        print(json.dumps(summary))
        print(f"report: {_WORKDIR.value}/report.html", file=sys.stderr)


if __name__ == "__main__":
    entry.run(main, together=True)
