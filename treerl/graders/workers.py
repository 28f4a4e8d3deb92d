"""Processes that call functions with a time limit a call, which holds whatever the function does.

They are plain child processes that speak pickle over a socket, not those of `multiprocessing` or a pool on top of it:
those run the main script again in every child, which starts a script without a __main__ guard anew, and their workers
share one queue, so that one killed at a bad moment can block the others. Here each has a socket of its own and can be
killed at any time. Imports only the standard library, so that a process starts quickly.
"""

import collections
import contextlib
import numbers
import os
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from multiprocessing import connection
from typing import Any, NamedTuple

from treerl.errors import UserError

FAULTS = ("", "raised", "hung", "not_finite", "died")
FINE, RAISED, HUNG, NOT_FINITE, DIED = range(5)
START = 300.0  # seconds that a process may take to import and load
FLOAT32_MAX = 3.4028234e38


class Result(NamedTuple):
    """What a call gave: a score, 0 with a fault, and what went wrong in words."""

    score: float
    fault: int
    words: str = ""


def call(function: Callable, *arguments) -> Result:
    """Calls a function that returns a score."""
    try:
        score = function(*arguments)
        if hasattr(score, "item"):  # of NumPy, JAX, PyTorch
            score = score.item()
        if not isinstance(score, numbers.Real):
            return Result(0.0, NOT_FINITE, f"returned a {type(score).__name__}, not a number")
        if not abs(score) <= FLOAT32_MAX:
            return Result(0.0, NOT_FINITE, f"returned {float(score) if isinstance(score, float) else 'a number too large'}")
        return Result(float(score), FINE)
    except (Exception, SystemExit) as error:
        return Result(0.0, RAISED, f"raised {type(error).__name__}: {error}"[:500])


class Worker:
    """One process. `job` is the number of the call under way; None while it starts, and between calls.

    Args:
      load, arguments, seconds: what it is sent first.
      module: whose function `serve` it runs.
    """

    def __init__(self, load: Callable, arguments: tuple, seconds: float, module: str = __name__):
        self.connection, theirs = connection.Pipe()
        path = os.pathsep.join(os.path.abspath(folder) for folder in sys.path)  # of notebooks too, who change it
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", f"from {module} import serve; serve()", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=2,  # a function that prints must not spoil the output of this process
                pass_fds=[theirs.fileno()],
                process_group=0,  # Ctrl-C is for this process alone; and what it starts is killed with it
                env=dict(os.environ, PYTHONPATH=path, JAX_PLATFORMS="cpu"),
            )
        self.ready, self.job = False, None
        self.deadline = time.monotonic() + START
        with contextlib.suppress(OSError):  # it died already: its end is read below
            self.connection.send((load, arguments, seconds))

    def kill(self) -> int:
        """Ends the process and all that it started; returns its exit status."""
        with contextlib.suppress(OSError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.connection.close()
        return self.process.wait()


class Workers:
    """Up to `count` processes, started when they are needed and again when they end or hang.

    Args:
      load, arguments: load(*arguments) gives each process its functions, a list, outside the time limit. `load` is a
        module's function; what it raises is a UserError in `run`.
      seconds: that a call may take.
    """

    def __init__(self, load: Callable, arguments: tuple, *, count: int, seconds: float):
        self._setup, self._count, self._seconds = (load, arguments, seconds), count, seconds
        self._workers: list[Worker] = []
        weakref.finalize(self, close_all, self._workers)  # at exit at the latest

    def run(self, jobs: list[tuple[int, Any]]) -> list[Result]:
        """Calls function number i with its arguments for every job (i, arguments); in the jobs' order."""
        results: list[Result | None] = [None] * len(jobs)
        waiting = collections.deque(range(len(jobs)))
        try:
            while waiting or any(w.job is not None for w in self._workers):
                self._start(len(waiting))
                for worker in [w for w in self._workers if w.ready and w.job is None][: len(waiting)]:
                    self._send(worker, jobs, waiting)
                self._listen(results)
        except BaseException:  # an interrupt too: answers to calls under way would be taken for those of the next run
            close_all(self._workers)
            raise
        return results

    def close(self) -> None:
        """Ends the processes."""
        close_all(self._workers)

    def _start(self, waiting: int) -> None:
        idle = sum(w.job is None for w in self._workers)
        for _ in range(min(waiting - idle, self._count - len(self._workers))):
            self._workers.append(Worker(*self._setup))

    def _send(self, worker: Worker, jobs, waiting) -> None:
        try:
            worker.connection.send(jobs[waiting[0]])
        except OSError:  # it died between two calls
            return self._drop(worker)
        worker.job, worker.deadline = waiting.popleft(), time.monotonic() + self._seconds

    def _drop(self, worker: Worker) -> int:
        self._workers.remove(worker)
        return worker.kill()

    def _listen(self, results: list) -> None:
        """Waits for an answer or a deadline."""
        active = {w.connection: w for w in self._workers if w.job is not None or not w.ready}
        if not active:
            return
        left = min(w.deadline for w in active.values()) - time.monotonic()
        heard = connection.wait(list(active), timeout=min(max(left, 0), 3600))
        for worker in map(active.get, heard):
            try:
                message = worker.connection.recv()
            except (EOFError, OSError):
                status = self._drop(worker)
                if not worker.ready:
                    raise UserError(
                        f"a process that grades ended with exit status {status} before it was ready; see what it printed, "
                        "and the modules named in text.graders."
                    ) from None
                results[worker.job] = Result(0.0, DIED, f"ended its process with exit status {status}")
                continue
            if worker.ready:
                results[worker.job], worker.job = Result(*message), None
            elif message:
                raise UserError(message)
            else:
                worker.ready = True
        for worker in [w for c, w in active.items() if c not in heard and time.monotonic() > w.deadline]:
            self._drop(worker)
            if not worker.ready:
                raise UserError(
                    f"a process that grades was not ready after {START:.0f} s; see the imports of the modules named in text.graders."
                )
            results[worker.job] = Result(0.0, HUNG, f"took longer than {self._seconds:g} s")


def close_all(workers: list[Worker]) -> None:
    while workers:
        workers.pop().kill()


def outlive(socket: int) -> None:
    """Ends this process and what it started when the other end of its socket is gone, however that ended."""
    poll = select.poll()
    poll.register(socket, 0)  # hang-ups alone
    poll.poll()
    os.killpg(0, signal.SIGKILL)


def serve() -> None:
    """What a process does: load, then answer calls until the other end of its socket is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ours = connection.Connection(int(sys.argv[1]))
    threading.Thread(target=outlive, args=(ours.fileno(),), daemon=True).start()
    try:
        load, arguments, seconds = ours.recv()
        try:
            functions = load(*arguments)
        except UserError as error:
            return ours.send(str(error))
        except Exception as error:
            return ours.send(f"text.graders cannot be loaded ({type(error).__name__}: {error}); mend what it names.")
        ours.send("")
        while True:
            number, given = ours.recv()
            # The parent keeps the time. This is for when it is gone and a C function keeps `outlive` from running.
            signal.setitimer(signal.ITIMER_REAL, min(2 * seconds + 10, 1e8))
            result = call(functions[number], *given)
            signal.setitimer(signal.ITIMER_REAL, 0)
            ours.send(tuple(result))
    except (EOFError, OSError):
        pass
