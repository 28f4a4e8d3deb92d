"""The runs of a sweep: which there are, and how they are started."""

import concurrent.futures
import itertools
import json
import os
import queue
import shlex
import subprocess
import sys
from typing import NamedTuple

from treerl.config import default, fields, unknown
from treerl.errors import UserError, writing
from treerl.supervision import AGAIN

TRAIN = (sys.executable, "-m", "launch.train")


class Run(NamedTuple):
    """A point of the grid."""

    name: str
    values: dict[str, str]  # field -> value
    flags: list[str]  # of launch.train


def runs(grid: list[str], shared: list[str], workdir: str) -> list[Run]:
    """Every combination of "FIELD=VALUE,VALUE,...", the last field changing fastest.

    Args:
      shared: flags that all runs get.

    Raises:
      UserError: no such field, no values, or a field twice.
    """
    known, axes = dict(fields(default())), {}
    for text in grid:
        field, _, values = text.partition("=")
        if field not in known:
            raise unknown(field, known)
        if not all(values.split(",")):
            raise UserError(f"--grid={text} has an empty value; write FIELD=VALUE,VALUE,... without spaces.")
        if field in axes:
            raise UserError(f"--grid={text} names {field} a second time; put all its values into one flag.")
        axes[field] = values.split(",")
    short = [field.rpartition(".")[2] for field in axes]
    names = [s if short.count(s) == 1 else field for s, field in zip(short, axes)]
    found = []
    for values in itertools.product(*axes.values()):
        name = ",".join(f"{n}={v}" for n, v in zip(names, values)).replace("/", "_")
        own = [f"--config.{field}={value}" for field, value in zip(axes, values)]
        found.append(Run(name, dict(zip(axes, values)), [*shared, *own, f"--workdir={os.path.join(workdir, name)}"]))
    return found


def command_line(run: Run, submit: str | None) -> str:
    """The command of a run as a shell reads it."""
    return shlex.join([*(shlex.split(submit) if submit else ("python", *TRAIN[1:])), *run.flags])


def submit(runs: list[Run], command: str) -> int:
    """Hands every run to a command; the first status that is not 0, and the runs that were refused on standard error."""
    status = 0
    for run in runs:
        try:
            code = subprocess.run([*shlex.split(command), *run.flags]).returncode
        except OSError as error:
            raise UserError(f"--submit={command!r} cannot be run ({error.strerror}); give a command of this machine.") from error
        if code:
            print(f"{run.name} was not taken: status {code}.", file=sys.stderr)
        status = status or code
    return status


def train(runs: list[Run], workdir: str, parallel: int) -> list[dict]:
    """Trains runs, `parallel` at a time.

    Returns:
      For each run its summary, or status, the exit status of one that did not end well.
    """
    logs, gpus = os.path.join(workdir, "logs"), visible_gpus()
    with writing(f"workdir={workdir}", "give a folder that can."):
        os.makedirs(logs, exist_ok=True)
    free = queue.SimpleQueue()
    for i in range(parallel):
        free.put(i)

    def one(run: Run) -> dict:
        done = os.path.join(logs, f"{run.name}.json")
        if os.path.exists(done):
            with open(done, encoding="utf-8") as file:
                return json.load(file)
        place = free.get()
        own = dict(CUDA_VISIBLE_DEVICES=gpus[place % len(gpus)]) if gpus and parallel > 1 else {}
        print(f"{run.name} starts; see {logs}/{run.name}.log", file=sys.stderr, flush=True)
        try:
            with open(os.path.join(logs, f"{run.name}.log"), "a", encoding="utf-8") as log:
                ended = subprocess.run([*TRAIN, *run.flags], stdout=subprocess.PIPE, stderr=log, text=True, env=os.environ | own)
        finally:
            free.put(place)
        if ended.returncode:
            why = "was stopped; the same command goes on" if ended.returncode == AGAIN else f"failed with status {ended.returncode}"
            with open(os.path.join(logs, f"{run.name}.log"), encoding="utf-8", errors="replace") as log:
                last = log.read().rstrip().rpartition("\n")[2]  # the sentence of a mistake
            print(f"{run.name} {why}; see {logs}/{run.name}.log\n  {last}", file=sys.stderr, flush=True)
            return dict(status=ended.returncode)
        summary = json.loads(ended.stdout.splitlines()[-1])
        with open(done + ".tmp", "w", encoding="utf-8") as file:
            json.dump(summary, file)
        os.replace(done + ".tmp", done)
        return summary

    with concurrent.futures.ThreadPoolExecutor(parallel) as pool:
        return list(pool.map(one, runs))


def visible_gpus() -> list[str]:
    """The GPUs of this machine that processes may use, as CUDA_VISIBLE_DEVICES names them."""
    if (named := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in named.split(",") if name]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    except OSError:
        return []
    return [str(i) for i, line in enumerate(filter(None, listed.stdout.splitlines()))] if listed.returncode == 0 else []
