"""Compares kinds of runs, several seeds each: curves as an SVG, and where they end as JSON lines.

python -m launch.compare --run=GRPO:runs/g0 --run=GRPO:runs/g1 --run=LATR:runs/l0 --run=LATR:runs/l1 --out=curves.svg
    [--metric=pass@1 --metric=novel/pass@1]

A row of curves for every metric, left at equal steps, right at equal sampled tokens. Means and 95% intervals (Student's t
over the seeds) at the last step, and the last number of tokens, that every run reaches.
"""

import itertools
import json
import os

from absl import flags
from etils import epath

from launch import entry

_RUN = flags.DEFINE_multi_string("run", None, "NAME:WORKDIR of a run made by launch.train; runs of one name are seeds.")
_OUT = flags.DEFINE_string("out", None, "SVG file to write.")
_METRIC = flags.DEFINE_multi_string("metric", ["pass@1"], "Metrics of metrics.jsonl.")
flags.mark_flags_as_required(["run", "out"])


def main():
    from treerl import metrics, report
    from treerl.errors import UserError, writing

    runs = {}
    for run in _RUN.value:
        name, _, folder = run.partition(":")
        path = os.path.join(folder, "metrics.jsonl")
        if not folder or not epath.Path(path).exists():
            raise UserError(f"--run={run!r} names no run; write NAME:WORKDIR, with the workdir of launch.train.")
        runs.setdefault(name, []).append(metrics.read(path))
    with writing(f"--out={_OUT.value}", "name a file in a folder that can."):
        found = report.compare(_OUT.value, runs, tuple(_METRIC.value))
    for metric, name in itertools.product(found, runs):
        for unit, (x, mean, half) in zip(("steps", "tokens"), found[metric][name]):
            print(json.dumps({"run": name, unit: int(x), metric: round(mean, 4), "half_width": None if half != half else round(half, 4)}))


if __name__ == "__main__":
    entry.run(main)
