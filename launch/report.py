"""Writes what there is of a run, finished or not, as one HTML page; of several, beside each other.

python -m launch.report --workdir=runs/a                                  # runs/a/report.html again
python -m launch.report --workdir=runs/a0 --workdir=runs/a1 --workdir=runs/b --out=compared.html

Runs that differ in nothing but their seeds are shown as their mean and its 95% interval (Student's t), and so are the seeds in a
workdir of launch.seeds. Reads files alone: no model is loaded, and a run may still be going.
"""

import os
import sys

from absl import flags

from launch import entry

_WORKDIR = flags.DEFINE_multi_string("workdir", None, "Folder of a run; name several to compare them.")
_OUT = flags.DEFINE_string("out", None, "HTML file to write; report.html in the workdir if there is one.")
flags.mark_flag_as_required("workdir")


def main():
    from treerl import report
    from treerl.errors import UserError, writing

    folders = [run for workdir in _WORKDIR.value for run in report.find(workdir)]
    if twice := [x for x in folders if folders.count(x) > 1]:
        raise UserError(f"--workdir={twice[0]} is named twice; name each run once.")
    if not _OUT.value and len(folders) > 1:
        raise UserError("--out is missing: name the HTML file in which several runs are compared.")
    out = _OUT.value or os.path.join(folders[0], "report.html")
    runs = [report.read_run(folder) for folder in folders]
    with writing(f"--out={out}", "name a file in a folder that can."):
        report.write_report(out, runs)
    for run in runs:
        for note in run.notes:
            print(f"{run.name}: {note}", file=sys.stderr)
    print(f"report: {out}", file=sys.stderr)


if __name__ == "__main__":
    entry.run(main)
