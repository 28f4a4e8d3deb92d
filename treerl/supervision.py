"""What ends a run early or should be told: signals, updates that are not finite, steps that do not end."""

import contextlib
import os
import signal
import statistics
import sys
import threading
import time

from treerl import processes
from treerl.errors import UserError

AGAIN = 75  # EX_TEMPFAIL, exit status of a run that a signal ended: the same command goes on


class Interrupted(KeyboardInterrupt):
    """A signal ended a run between two steps; the text says what was saved and how to go on."""


class Stopped(Exception):
    """Raised by `Signals.check` within a step: what it had was not changed."""


class Diverged(UserError):
    """Too many updates in a row were skipped; the text says which field and what to look at."""


def stop_if_diverged(state, limit: int, moment: str, advice: str, whole: int | None = None) -> None:
    """Raises Diverged if more updates of a state were skipped in a row than `limit`, learner.max_skipped, or all `whole` of a run."""
    skipped = int(state.skipped)
    if skipped > limit or skipped == whole:
        than = f"more than learner.max_skipped={limit}" if skipped > limit else "all of the run's"
        raise Diverged(f"{moment}: loss or gradient was not finite in {skipped} updates in a row, {than}; {advice}")


class Signals:
    """Notes the first SIGINT or SIGTERM that any process of the run gets; a second one acts as it did before.

    A context manager. Outside the main thread, which alone may set handlers, nothing is noted.
    """

    def __init__(self):
        self._own, self._agreed, self._before, self._idle = 0, 0, {}, ""

    def asked(self) -> str | None:
        """Name of the signal that some process got; None so far. All processes ask together."""
        if not self._agreed:
            self._agreed = max(processes.gather(self._own))
        return signal.Signals(self._agreed).name if self._agreed else None

    def check(self) -> None:
        """Raises Stopped if some process got a signal; all of them ask together."""
        if self.asked():
            raise Stopped

    @contextlib.contextmanager
    def nothing_to_lose(self, text: str):
        """Within this a signal ends the process at once, with status AGAIN and a sentence, also while XLA compiles.

        Args:
          text: what follows the signal's name.
        """
        self._idle = text
        try:
            yield
        finally:
            self._idle = ""

    def _note(self, number, _):
        self._restore()
        self._own = number
        if not self._idle:  # else `_listen` is about to end the process
            os.write(2, f"\n{signal.Signals(number).name}: finishing what is under way; a second one ends at once.\n".encode())

    def _listen(self, pipe: int) -> None:
        """Reads the numbers of signals, which arrive also while the main thread is in a library."""
        while number := os.read(pipe, 1):
            if self._idle and number[0] in self._numbers:
                os.write(2, f"\n{signal.Signals(number[0]).name}: {self._idle}\n".encode())
                os._exit(AGAIN)
        os.close(pipe)

    def _restore(self):
        while self._before:
            signal.signal(*self._before.popitem())

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) not in (signal.SIG_IGN, None):  # as nohup and the like wish
                    self._before[number] = signal.signal(number, self._note)
            self._numbers, (pipe, self._pipe) = set(self._before), os.pipe()
            os.set_blocking(self._pipe, False)
            self._woken = signal.set_wakeup_fd(self._pipe, warn_on_full_buffer=False)
            threading.Thread(target=self._listen, args=(pipe,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self._restore()
        if threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(self._woken)
            os.close(self._pipe)


class Watchdog:
    """Says which step takes much longer than steps do, while it does.

    Args:
      factor: how many times the median of the steps so far.
      least: seconds below which nothing is said.
    """

    def __init__(self, factor: float = 10.0, least: float = 1.0):
        self._factor, self._least, self._seconds = factor, least, []

    @contextlib.contextmanager
    def step(self, number: int):
        """Around all of a step; the first compiles and does not count, and three are needed to compare with."""
        timer, begin = None, time.monotonic()
        if len(self._seconds) > 3:
            median = statistics.median(self._seconds[1:])
            limit = max(self._factor * median, self._least)
            timer = threading.Timer(limit, self._bark, (number, limit, median))
            timer.daemon = True
            timer.start()
        try:
            yield
        finally:
            if timer:
                timer.cancel()
            self._seconds.append(time.monotonic() - begin)

    def _bark(self, number: int, seconds: float, median: float) -> None:
        own = f" of process {processes.number()}" if processes.number() else ""
        print(
            f"\nstep {number}{own} has taken {seconds:.1f} s and is not done; the median is {median:.2g} s. A device, a "
            "grader or the network may hang.", file=sys.stderr, flush=True,
        )  # fmt: skip
