"""Runs a benchmark suite on this machine's devices, at sizes that suit them.

python -m launch.bench --suite=sampler|learner|step|growth|estimators|pruning|devices|scaling|checkpoint|meshes|environments
    [--shape=A,B,C,D] [--nopeers] [--out=FILE]

Prints one JSON object a line on standard output as each result comes, and writes them to FILE.
"""

import contextlib
import json
import sys

from absl import flags

from launch import entry
from treerl.errors import UserError, writing

_SUITE = flags.DEFINE_string(
    "suite",
    None,
    "Suite to run: sampler, learner, step, growth, estimators, pruning, devices, scaling, checkpoint, meshes or environments.",
)
_SHAPE = flags.DEFINE_list(
    "shape", [], "Shapes that sampler, learner and step measure, see treerl/bench/shapes.py; A on an accelerator if none is given."
)
_PEERS = flags.DEFINE_bool(
    "peers", True, "Measure what others offer, too, where their packages are installed: google-tunix, and transformers on torch."
)
_OUT = flags.DEFINE_string("out", None, "File that also gets the lines.")
flags.mark_flag_as_required("suite")


def main():
    import jax

    from treerl import bench

    if _SUITE.value not in bench.SUITES:
        raise UserError(f"--suite={_SUITE.value} is unknown; the suites are {', '.join(bench.SUITES)}.")
    if unknown := [name for name in _SHAPE.value if name not in bench.SHAPES]:
        raise UserError(f"--shape={unknown[0]} is unknown; the shapes are {', '.join(bench.SHAPES)}.")
    if _SHAPE.value and _SUITE.value not in bench.SHAPED:
        raise UserError(f"--suite={_SUITE.value} has no shapes; leave out --shape, or choose one of {', '.join(bench.SHAPED)}.")
    jax.config.update("jax_enable_compilation_cache", False)  # compile times are measured
    with contextlib.ExitStack() as stack:
        files = [sys.stdout]
        if _OUT.value:
            stack.enter_context(writing(f"--out={_OUT.value}", "give a file that can, with room for the lines."))
            files.append(stack.enter_context(open(_OUT.value, "w", encoding="utf-8")))
        for row in bench.run(_SUITE.value, _SHAPE.value, beside=_PEERS.value):
            for file in files:
                print(json.dumps(row), file=file, flush=True)


if __name__ == "__main__":
    entry.run(main)
