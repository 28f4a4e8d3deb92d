"""Runs a benchmark suite on this machine's devices, at sizes that suit them.

python -m launch.bench --suite=sampler|learner|step|estimators|pruning|devices|scaling|checkpoint|meshes|environments [--out=FILE]

Prints one JSON object a line on standard output as each result comes, and writes them to FILE.
"""
import contextlib
import json
import sys

from absl import flags

from launch import entry
from treerl.errors import UserError, writing

_SUITE = flags.DEFINE_string("suite", None, "Suite to run: sampler, learner, step, estimators, pruning, devices, scaling, checkpoint, meshes or environments.")
_OUT = flags.DEFINE_string("out", None, "File that also gets the lines.")
flags.mark_flag_as_required("suite")


def main():
    import jax

    from treerl.bench import SUITES

    if _SUITE.value not in SUITES:
        raise UserError(f"--suite={_SUITE.value} is unknown; the suites are {', '.join(SUITES)}.")
    jax.config.update("jax_enable_compilation_cache", False)  # compile times are measured
    with contextlib.ExitStack() as stack:
        files = [sys.stdout]
        if _OUT.value:
            stack.enter_context(writing(f"--out={_OUT.value}", "give a file that can, with room for the lines."))
            files.append(stack.enter_context(open(_OUT.value, "w", encoding="utf-8")))
        for row in SUITES[_SUITE.value]():
            for file in files:
                print(json.dumps(row), file=file, flush=True)


if __name__ == "__main__":
    entry.run(main)
