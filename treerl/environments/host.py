"""Environments that are ordinary Python: games in worker processes, see `treerl.games`, behind the protocol of JAX.

To add one, write a class of games and a function that makes one, in a module that imports no JAX, and

    make(*, seed, train_size, heldout_size, horizon=30, ...) -> adapt(load, arguments, tokenizer=..., tasks=numbered(...), ...)

The state of an episode is its history, so that JAX copies it where a line forks, and every call is a function of its
arguments. Text is read word by word, in small letters and without the words that the tokenizer lacks, or with its word
<unk> for them; "." is none of them, as it ends what an agent says. Every observation ends with ">": the agent's turn.
"""

import functools
import hashlib
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from treerl.environments import Environment
from treerl.errors import UserError
from treerl.games import Games, Job, Turn
from treerl.tokenizers import WordTokenizer

TURN, UNKNOWN = ">", "<unk>"
FIRST = 2  # the first word's id, behind padding and end
WORD = re.compile(r"[^\W_]+(?:['-][^\W_]+)*|[^\w\s]")


def words(text: str) -> list[str]:
    """The words of a text, in small letters; punctuation marks are words, but for those within one as in "don't"."""
    return WORD.findall(text.lower())


def numbered(sizes: dict[str, int], apart: int = 2**24) -> dict[str, dict]:
    """Tasks that are numbers: split -> dict(number=[N]).

    The first of each split are `apart`, so that a split of another size leaves the others' tasks as they are.
    """
    for name, size in sizes.items():
        if not 0 < size <= apart:
            raise UserError(f"{size} tasks of the split {name} cannot work; set task.train_size and heldout_size from 1 to {apart}.")
    first = {name: i * apart for i, name in enumerate(sizes)}
    return {name: dict(number=np.arange(first[name], first[name] + size, dtype=np.int32)) for name, size in sizes.items()}


def adapt(
    load: Callable, arguments: tuple = (), *, tokenizer: WordTokenizer, tasks: dict[str, dict], goal: int, observation: int,
    action: int, horizon: int, seconds: float = 5.0, workers: int = 2, live: int = 512, player: bool = False,
) -> Environment:  # fmt: skip
    """An environment of games.

    Where a game raises, exceeds its time, rewards with no finite number or ends its process, that episode ends with
    reward 0. The first of each kind is told as a warning; `Environment.faults` counts them.

    Args:
      load, arguments: load(*arguments) makes a game, see `treerl.games`; `load` is a module's function.
      tokenizer: knows ">"; words of actions are those that it knows.
      tasks: split -> dict with `number` int32 [N], which no other task has, and what else the caller keeps with a task.
      goal: G, tokens of a goal at most, with ">".
      observation, action, horizon: O, A, T.
      seconds: that a game may take to be made, to start, or to play an action.
      workers: processes; the games of a task are all in one.
      live: games that a process keeps, at most; should be no fewer than a process has episodes under way.
      player: games have a script.

    Raises:
      UserError: a number cannot work, or the tokenizer lacks ">".
    """
    given = dict(goal=goal, observation=observation, action=action, horizon=horizon, workers=workers, live=live)
    for name, value in given.items():
        if value < (least := 2 if name == "action" else 1):  # a word and its end
            raise UserError(f"environment.options.{name}={value!r} cannot work; set it to {least} or more.")
    if not seconds > 0:
        raise UserError(f"environment.options.seconds={seconds!r} cannot work; set it above 0.")
    if TURN not in tokenizer.words:
        raise UserError(f"the environment's tokenizer lacks the word {TURN!r}, which ends observations; add it.")
    games = Games(load, tuple(arguments), count=workers, seconds=seconds, live=live)
    host = _Host(games, tokenizer, goal, observation, action, horizon)
    shape = jax.ShapeDtypeStruct
    callback = functools.partial(jax.pure_callback, vmap_method="broadcast_all")
    flag = shape((), jnp.bool_)
    followed = shape((observation,), jnp.int32), shape((), jnp.float32), flag, flag, shape((2,), jnp.uint32)

    def reset(key, task):
        """Starts an episode; nothing is drawn from the key."""
        del key
        actions = jnp.zeros((horizon, action), jnp.int32)
        said, _, done, _, id = callback(host.play, followed, task["number"], actions, jnp.int32(0), jnp.bool_(True))
        return dict(task=task, actions=actions, turn=jnp.int32(0), over=done, invalid=jnp.bool_(False), id=id), said

    def step(state, action):
        """See `Environment`."""
        acts = ~state["over"] & jnp.any(action != 0)
        turn = state["turn"] + acts
        actions = jnp.where(acts & (jnp.arange(horizon)[:, None] == state["turn"]), action, state["actions"])
        said, reward, done, admissible, id = callback(host.play, followed, state["task"]["number"], actions, turn, acts)
        invalid, id = jnp.where(acts, ~admissible, state["invalid"]), jnp.where(acts, id, state["id"])
        new = dict(state, actions=actions, turn=turn, over=state["over"] | done, invalid=invalid, id=id)
        return new, said, reward, new["over"]

    def asked(task):
        return callback(host.goal, shape((goal,), jnp.int32), task["number"])

    def script(key, state):
        seed = jax.random.bits(key, (), jnp.uint32)
        made = shape((action,), jnp.int32)
        return callback(host.script, made, seed, state["task"]["number"], state["actions"], state["turn"], ~state["over"])

    return Environment(
        tokenizer=tokenizer, observation=observation, action=action, horizon=horizon, tasks=tasks, goal=asked,
        reset=reset, step=step, state_id=lambda state: state["id"],
        player=script if player else None, on_host=True, faults=lambda: dict(games.faults), close=games.close,
    )  # fmt: skip


def read(tokenizer: WordTokenizer, action: bytes) -> str | None:
    """The text of an action [A], int32 in bytes; None for one that is not words, an end, and nothing else."""
    tokens = np.trim_zeros(np.frombuffer(action, np.int32), "b")
    known = (tokens[:-1] >= FIRST) & (tokens[:-1] < tokenizer.vocab_size)
    return tokenizer.decode(tokens[:-1]) if len(tokens) > 1 and tokens[-1] == tokenizer.eos_id and np.all(known) else None


class _Host:
    """The callbacks: numpy in, numpy out, with any leading axes."""

    def __init__(self, games: Games, tokenizer: WordTokenizer, goal: int, observation: int, action: int, horizon: int):
        self._games, self._horizon, self._end = games, horizon, tokenizer.eos_id
        self._goal, self._observation, self._action = goal, observation, action
        self._ids = {word: i for i, word in enumerate(tokenizer.words, FIRST)}
        self._read = functools.lru_cache(100_000)(functools.partial(read, tokenizer))

    def play(self, number, actions, turn, wanted):
        """(observation, reward, done, admissible, id), zeros where not wanted.

        Args:
          number, turn: [...] int32. actions: [..., T, A], those before `turn` played. wanted: [...] bool.
        """
        shape = np.shape(number)
        rows, jobs = self._jobs("play", number, actions, turn, wanted)
        said, reward = np.zeros((*wanted.shape, self._observation), np.int32), np.zeros(shape, np.float32)
        done, admissible, id = np.zeros(shape, bool), np.zeros(shape, bool), np.zeros((*shape, 2), np.uint32)
        for row, job, answer in zip(rows, jobs, self._games.ask(jobs)):
            found = Turn(done=True, id=b"failed") if answer.fault else answer.value
            done[row] = found.done or len(job.history) >= self._horizon
            said[row], reward[row] = self.write(found.text, self._observation), found.reward
            admissible[row], id[row] = found.admissible, self._id(job, found, bool(done[row]))
        return said, reward, done, admissible, id

    def script(self, seed, number, actions, turn, wanted):
        """What the script does next: int32 [..., A], zeros where not wanted."""
        rows, jobs = self._jobs("script", number, actions, turn, wanted, seed)
        found = np.zeros((*np.shape(number), self._action), np.int32)
        for row, answer in zip(rows, self._games.ask(jobs)):
            found[row] = self._act("" if answer.fault else answer.value)
        return found

    def goal(self, number):
        """What is asked for: int32 [..., G]."""
        number = np.asarray(number)
        jobs = [Job("goal", int(i)) for i in number.ravel()]
        texts = [answer.value or "" for answer in self._games.ask(jobs)]
        return np.reshape([self.write(text, self._goal) for text in texts], (*number.shape, self._goal)).astype(np.int32)

    def write(self, text: str, width: int) -> np.ndarray:
        """The tokens of a text, cut to `width` with the ">" at its end: int32 [width]."""
        ids = [self._ids.get(word, self._ids.get(UNKNOWN)) for word in words(text) if word not in (TURN, ".")]
        ids = [i for i in ids if i is not None][: width - 1] + [self._ids[TURN]]
        return np.array(ids + [0] * (width - len(ids)), np.int32)

    def _act(self, text: str) -> np.ndarray:
        """The tokens of a script's action; of none, its end alone."""
        said = words(text)
        if wrong := [word for word in said if word not in self._ids] or said[self._action - 1 :]:
            raise UserError(
                f"the game's script says {text!r}, but {wrong[0]!r} is no word of the tokenizer, or is beyond the "
                f"{self._action} tokens of an action; mend the script or its environment."
            )
        ids = [self._ids[word] for word in said] + [self._end]
        return np.array(ids + [0] * (self._action - len(ids)), np.int32)

    def _jobs(self, what: str, number, actions, turn, wanted, seed=None) -> tuple[list[tuple], list[Job]]:
        """The rows that are wanted, as indices of the leading axes, and their jobs."""
        number, actions, turn, wanted = (np.asarray(x) for x in (number, actions, turn, wanted))
        seed = np.zeros_like(number) if seed is None else np.asarray(seed)
        rows = list(zip(*np.nonzero(wanted))) if wanted.ndim else [()] * bool(wanted)
        history = lambda row: tuple(self._read(action.tobytes()) for action in actions[row][: turn[row]])
        return rows, [Job(what, int(number[row]), history(row), int(seed[row])) for row in rows]

    @staticmethod
    def _id(job: Job, turn: Turn, done: bool) -> np.ndarray:
        """Of a state, its task and whether the episode is over: uint32 [2]."""
        whole = turn.id + bytes([done]) + job.number.to_bytes(8, "little", signed=True)
        return np.frombuffer(hashlib.blake2b(whole, digest_size=8).digest(), np.uint32)
