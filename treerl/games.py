"""Games of ordinary Python in processes of their own, each asked by the history of its episode.

A game is an object that `load(*arguments)` makes in such a process. It has

    reset(number) -> text                                  starts task `number`
    step(text) -> (text, reward, done, admissible)         plays one action
    goal(number) -> text                                   optional: what a task asks for
    key() -> str, bytes, or what has a repr                optional: what tells its states apart, else its last words
    script(rng: random.Random) -> text                     optional: what a script would do next; changes nothing
    close()                                                optional

and must do the same whenever it is given the same number and actions. The processes keep games by their history: asked
for an action after a history that is live, they play it there, else they first play the history again. So nobody has to
copy a game where an episode forks, and a process that ended costs only time. Imports no JAX, so that processes start
quickly.
"""

import collections
import contextlib
import hashlib
import numbers
import pickle
import random
import signal
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable
from multiprocessing import connection
from typing import Any, NamedTuple

from treerl.errors import UserError
from treerl.graders.workers import DIED, FAULTS, FINE, FLOAT32_MAX, HUNG, NOT_FINITE, RAISED, START, Worker, close_all, outlive

FAULTY = 4096  # questions whose fault is remembered
OUTCOMES = dict(
    play="a game {}; such an episode ends with reward 0.",
    script="the script of a game {}; it then says nothing.",
    goal="a game asked for its goal {}; such a goal is empty.",
)


class Job(NamedTuple):
    """A question to a game: `what` is "play", "script" or "goal"."""

    what: str
    number: int
    history: tuple[str | None, ...] = ()  # the actions so far; None is one that is no words
    seed: int = 0  # of a script's draws


class Turn(NamedTuple):
    """What "play" gives: what followed the last action of a history, or the start where there is none."""

    text: str = ""
    reward: float = 0.0
    done: bool = False
    admissible: bool = True
    id: bytes = bytes(8)  # of the game's state, not knowing the task


class Answer(NamedTuple):
    """A Turn, or the text of a script or goal; None with a fault, and what went wrong in words."""

    value: Any
    fault: int = FINE
    words: str = ""


# --- in the process of the games ------------------------------------------------------------------


class NotFinite(ValueError):
    """A reward that is no finite float32."""


class Live:
    """A game at some history. `tick` is called in front of all that the game does."""

    def __init__(self, game, number: int, tick: Callable):
        self.game, self._tick = game, tick
        self._tick()
        text = _text(game.reset(number), "reset")
        self.turn = Turn(text, id=self._id(text))

    def play(self, action: str | None) -> None:
        """Plays an action. One that is no words changes nothing and is answered by nothing."""
        if action is None:
            self.turn = self.turn._replace(text="", reward=0.0, admissible=False)
            return
        self._tick()
        text, reward, done, admissible = self.game.step(action)
        reward = reward.item() if hasattr(reward, "item") else reward  # of NumPy
        if not isinstance(reward, numbers.Real) or not abs(reward) <= FLOAT32_MAX:
            raise NotFinite(f"gave the reward {reward!r}")
        self.turn = Turn(_text(text, "step"), float(reward), bool(done), bool(admissible), self._id(text))

    def script(self, seed: int) -> str:
        self._tick()
        return _text(self.game.script(random.Random(seed)), "script")

    def close(self) -> None:
        with contextlib.suppress(Exception):
            getattr(self.game, "close", lambda: None)()

    def _id(self, text: str) -> bytes:
        key = self.game.key() if hasattr(self.game, "key") else text
        key = key if isinstance(key, bytes) else str(key).encode() if isinstance(key, str) else repr(key).encode()
        return hashlib.blake2b(key, digest_size=8).digest()


def _text(found, where: str) -> str:
    if not isinstance(found, str):
        raise TypeError(f"{where} gave a {type(found).__name__} for a text")
    return found


class Table:
    """The games of a process, at most `live` of them: those used last.

    Args:
      make: gives a new game. tick: called in front of all that a game does, whose time is limited.
    """

    def __init__(self, make: Callable[[], Any], live: int, tick: Callable = lambda: None):
        self._make, self._limit, self._tick = make, live, tick
        self._games: collections.OrderedDict[tuple, Live] = collections.OrderedDict()
        self._spare = make()  # what is wrong with making one is known at the start

    def answer(self, job: Job) -> Any:
        """The value of an `Answer`; raises what the game raises, which is then forgotten."""
        if job.what == "goal":
            self._tick()
            return _text(self._spare.goal(job.number), "goal") if hasattr(self._spare, "goal") else ""
        game = self._at(job.number, job.history)
        if job.what == "play":
            return game.turn
        try:
            return game.script(job.seed)
        except BaseException:
            self._games.pop((job.number, job.history)).close()
            raise

    def _at(self, number: int, history: tuple) -> Live:
        """The game at a history."""
        here = (number, history)
        game, left = self._games.pop(here, None), ()
        if game is None and history:
            game, left = self._games.pop((number, history[:-1]), None), history[-1:]
        if game is None:
            game, left = Live(self._make(), number, self._tick), history
        try:
            for action in left:
                game.play(action)
        except BaseException:
            game.close()
            raise
        self._games[here] = game
        while len(self._games) > self._limit:
            self._games.popitem(last=False)[1].close()
        return game


def serve() -> None:
    """What a process does: make a game, then answer jobs until the other end of its socket is gone.

    For each it sends None, again in front of all that a game does, so that the parent can keep its time; then the Answer.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ours = connection.Connection(int(sys.argv[1]))
    threading.Thread(target=outlive, args=(ours.fileno(),), daemon=True).start()

    def tick():
        # As for graders: the alarm is for when the parent is gone and a C function keeps `outlive` from running.
        signal.setitimer(signal.ITIMER_REAL, min(2 * seconds + 10, 1e8))
        ours.send(None)

    try:
        load, (arguments, live), seconds = ours.recv()
        try:
            table = Table(lambda: load(*arguments), live, tick)
        except UserError as error:
            return ours.send(str(error))
        except Exception as error:
            return ours.send(f"the environment's game cannot be made ({type(error).__name__}: {error}); mend what it names.")
        ours.send("")
        while True:
            job = Job(*ours.recv())
            tick()
            try:
                answer = Answer(table.answer(job))
            except NotFinite as error:
                answer = Answer(None, NOT_FINITE, str(error))
            except (Exception, SystemExit) as error:
                answer = Answer(None, RAISED, f"raised {type(error).__name__}: {error}"[:500])
            signal.setitimer(signal.ITIMER_REAL, 0)
            ours.send(answer)
    except (EOFError, OSError):
        pass


# --- in the process that asks ---------------------------------------------------------------------


class _Process(Worker):
    """A process for games. `begun` tells whether it has received the job under way."""

    begun = False


class Games:
    """Games in `count` processes, started when they are needed and again when they end or hang.

    Those of a task are all in one process. What a game that failed was asked is not asked again: the same fault is
    answered, so that answers depend on nothing but the question.

    Args:
      load, arguments: as above; `load` is a module's function. What the first call of each process raises is a UserError.
      seconds: that a game may take to be made, to start or to play one action.
      live: games that a process keeps, at most.
    """

    def __init__(self, load: Callable, arguments: tuple, *, count: int, seconds: float, live: int = 512):
        self._setup, self._seconds = (load, (arguments, live), seconds), seconds
        try:
            pickle.dumps(self._setup)
        except Exception as error:
            raise UserError(f"the environment's game cannot be sent to a process ({error}); load it by a function of a module.") from None
        self._slots: list[list[_Process]] = [[] for _ in range(count)]  # of none or one
        self._faulty: collections.OrderedDict[Job, Answer] = collections.OrderedDict()
        self._told: set[tuple[str, int]] = set()
        self._lock = threading.Lock()  # callbacks of several devices may come at once
        self.faults = dict.fromkeys(FAULTS[1:], 0)  # kind -> how many histories ended by it
        weakref.finalize(self, _close, self._slots)  # at exit at the latest

    def ask(self, jobs: list[Job]) -> list[Answer]:
        """Answers in the jobs' order; equal ones are asked once. The first fault of each kind is told as a warning."""
        with self._lock:
            answers: dict[Job, Answer | None] = {job: self._faulty.get(job) for job in jobs}
            queues = [collections.deque() for _ in self._slots]
            for job, answer in answers.items():
                if answer is None:
                    queues[job.number % len(queues)].append(job)
            fresh = {job for queue in queues for job in queue}
            try:
                while any(queues) or any(w.job is not None for slot in self._slots for w in slot):
                    for slot, queue in zip(self._slots, queues):
                        self._send(slot, queue)
                    self._listen(queues, answers)
            except BaseException:  # an interrupt too: answers under way would be taken for those of the next call
                _close(self._slots)
                raise
            told = self._count({job: answers[job] for job in answers if job in fresh})
        for words in told:
            warnings.warn(words, stacklevel=2)
        return [answers[job] for job in jobs]

    def close(self) -> None:
        """Ends the processes; a later `ask` starts others."""
        with self._lock:
            _close(self._slots)

    def _count(self, answers: dict[Job, Answer]) -> list[str]:
        """Counts and remembers faults; what to say of those whose kind is new."""
        told = []
        for job, answer in answers.items():
            if not answer.fault:
                continue
            self._faulty[job] = answer
            self.faults[FAULTS[answer.fault]] += job.what == "play"
            if (job.what, answer.fault) not in self._told:
                self._told.add((job.what, answer.fault))
                told.append(f"environment: {OUTCOMES[job.what].format(answer.words)}")
        while len(self._faulty) > FAULTY:
            self._faulty.popitem(last=False)
        return told

    def _send(self, slot: list[_Process], queue: collections.deque) -> None:
        if queue and not slot:
            slot.append(_Process(*self._setup, module=__name__))
        if not queue or not slot[0].ready or slot[0].job is not None:
            return
        try:
            slot[0].connection.send(tuple(queue[0]))
        except OSError:  # it died between two calls
            slot.pop().kill()
            return
        slot[0].job, slot[0].begun, slot[0].deadline = queue.popleft(), False, time.monotonic() + self._seconds

    def _listen(self, queues: list[collections.deque], answers: dict) -> None:
        """Waits for an answer or a deadline."""
        both = zip(self._slots, queues)
        active = {s[0].connection: (s, queue) for s, queue in both if s and (s[0].job is not None or not s[0].ready)}
        if not active:
            return
        left = min(slot[0].deadline for slot, _ in active.values()) - time.monotonic()
        heard = connection.wait(list(active), timeout=min(max(left, 0), 3600))
        for slot, queue in map(active.get, heard):
            worker = slot[0]
            try:
                message = worker.connection.recv()
            except (EOFError, OSError):
                status = slot.pop().kill()
                if not worker.ready:
                    raise UserError(
                        f"a process for the environment's games ended with exit status {status} before it was ready; "
                        "see what it printed, and the game's module."
                    ) from None
                if worker.begun:
                    answers[worker.job] = Answer(None, DIED, f"ended its process with exit status {status}")
                else:  # it died between two calls
                    queue.appendleft(worker.job)
                continue
            if not worker.ready:
                if message:
                    raise UserError(message)
                worker.ready = True
            elif message is None:
                worker.begun, worker.deadline = True, time.monotonic() + self._seconds
            else:
                answers[worker.job], worker.job = Answer(*message), None
        for slot in [s for c, (s, _) in active.items() if c not in heard and time.monotonic() > s[0].deadline]:
            worker = slot.pop()
            worker.kill()
            if not worker.ready:
                raise UserError(f"a process for the environment's games was not ready after {START:.0f} s; see the game's module.")
            answers[worker.job] = Answer(None, HUNG, f"took longer than {self._seconds:g} s")


def _close(slots: list[list[_Process]]) -> None:
    for slot in slots:
        close_all(slot)
