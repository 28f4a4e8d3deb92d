"""Games that go right and wrong in every way, as a module of a user's; processes that play import it."""

import os
import pathlib
import subprocess
import sys
import time

WORDS = tuple("add double finish raise hang spin end nan huge garbage print child at <unk> >".split()) + tuple(map(str, range(100)))


class Counter:
    """Counts from the task's number modulo 10; "finish" at 20 or more is rewarded with 1.

    A line for each start and action goes into the file `log`, if one is named.
    """

    def __init__(self, log: str):
        self.log, self.total = log, None

    def reset(self, number):
        self._write(f"reset {number}")
        self.number, self.total, self.steps = number, number % 10, 0
        if number < 0:
            raise LookupError(f"no task {number}")
        return f"At {self.total}."

    def step(self, text):
        self._write(f"{self.number} {text}")
        misbehave(text, self.log)
        self.steps += 1
        if text == "nan":
            return "", float("nan"), False, True
        if text == "huge":
            return "", 1e300, False, True
        if text == "garbage":
            return "too little"
        if text == "finish":
            return "over", float(self.total >= 20), True, True
        if text not in ("add", "double"):
            return "nothing happens, unutterably", 0.0, False, False
        self.total = (self.total + 1 if text == "add" else 2 * self.total) % 100
        return f"at {self.total}", 0.0, False, True

    def key(self):
        return self.total

    def goal(self, number):
        return f"at {20 + number % 10}"

    def script(self, rng):
        misbehave({7: "raise"}.get(self.total, ""), self.log)
        return "finish" if self.total >= 20 else rng.choice(["add", "double"])

    def _write(self, line):
        if self.log:
            with open(self.log, "a") as file:
                file.write(f"{line}\n")


def misbehave(text, log):
    if text == "print":
        print("what a game prints goes nowhere near the results")
    if text == "raise":
        raise ValueError("no such luck")
    if text == "hang":
        time.sleep(600)
    if text == "spin":
        sum(range(10**15))  # holds the interpreter's lock
    if text == "end":
        os._exit(3)
    if text == "child":  # that would outlive it
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        pathlib.Path(log + ".pid").write_text(f"{os.getpid()} {child.pid}")
        time.sleep(600)


class Plain:
    """The least that a game has."""

    def reset(self, number):
        return "at"

    def step(self, text):
        return text, 0.0, False, "jax" not in sys.modules


def counter(log=""):
    return Counter(log)


def plain():
    return Plain()


def broken():
    raise OSError("no licence")


def ends():
    os._exit(3)
