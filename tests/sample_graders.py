"""Graders that go wrong in every way, as a module of a user's; processes that grade import it."""

import os
import pathlib
import subprocess
import sys
import time

import numpy as np

NOT_CALLABLE = 3


def length(completion, example):
    return len(completion)


def half(completion, example):
    return 0.5


def counted(completion, example):
    """Writes a line for each call into the file that the example names."""
    with open(example["file"], "a") as file:
        file.write(completion + "\n")
    return 1.0


def told(completion, example):
    """Does what the completion says."""
    print("what a grader prints goes nowhere near the results")
    if completion == "sleep":
        time.sleep(600)
    if completion == "spin":
        sum(range(10**15))  # holds the interpreter's lock
    if completion == "raise":
        raise ValueError("no answer")
    if completion == "leave":
        raise SystemExit(0)
    if completion == "end":
        os._exit(0)
    if completion == "kill":
        os.kill(os.getpid(), 9)
    if completion == "child":  # that would outlive it
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        pathlib.Path(example["file"]).write_text(str(child.pid))
        time.sleep(600)
    special = dict(
        nan=float("nan"), inf=float("-inf"), none=None, text="1.0", complex=1j, huge=10**400, big=1e39, list=[1.0],
        bool=True, numpy=np.float64(0.25), array=np.array(0.5), integer=np.int32(2), truth=np.bool_(True),
    )  # fmt: skip
    return special.get(completion, 1.0)


def pid(completion, example):
    return os.getpid()


def lower(completion, example):
    """Share of small letters."""
    return sum(c.islower() for c in completion) / max(len(completion), 1)


def moody(completion, example):
    """1, or what `mood` says of the completion."""
    return told(mood(completion), example)


def mood(completion):
    """What `moody` does, by the characters; for most completions nothing."""
    return {0: "raise", 1: "nan", 2: "sleep", 3: "end"}.get(sum(map(ord, completion)) % 12, "")
