"""Tasks of environments: an answer is an episode, and the reference answer one of the scripted player."""

import functools

import jax
import numpy as np
from ml_collections import ConfigDict

from treerl import environments
from treerl.environments import Environment
from treerl.errors import UserError
from treerl.tasks import Encoded, Task
from treerl.tasks.sources import View, plain

CHUNK = 256  # goals and demonstrations made at a time; of games on the host, which take a second, one


def make(task: ConfigDict, config: ConfigDict) -> Task:
    """The environment `task.name` as a task: tasks of its splits are the examples.

    Args:
      task: train_size, heldout_size, seed. config: the section `environment`: horizon, options.

    Raises:
      UserError: a field cannot work.
    """
    environment = environments.make(
        task.name, horizon=config.horizon, seed=task.seed, train_size=task.train_size, heldout_size=task.heldout_size,
        options=plain(config.options),
    )  # fmt: skip
    room = _Room(environment, task.seed)
    return Task(
        tokenizer=environment.tokenizer,
        train=room.view("train"),
        heldout=room.view("heldout"),
        novel=room.view("novel") if "novel" in environment.tasks else None,
        encode=room.encode,
        grade=None,
        environment=environment,
        right=0.999,  # the highest reward there is
        few=16 if environment.on_host else None,
        demonstrate=room.demonstrate,
    )


class _Room:
    """What encoding shares; goals and demonstrations are made when they are first asked for."""

    def __init__(self, environment: Environment, seed: int):
        self._environment, self._seed, self._played, self._asked = environment, seed, {}, {}
        self._size = 1 if environment.on_host else CHUNK
        self._ask = jax.jit(jax.vmap(environment.goal))

    def _tasks(self, split: str, start: int):
        """The tasks of a chunk, the last repeated: one shape, compiled once."""
        tasks = self._environment.tasks[split]
        rows = np.minimum(np.arange(start, start + self._size), environments.count(tasks) - 1)
        return jax.tree.map(lambda x: x[rows], tasks)

    def _goal(self, split: str, row: int) -> list[int]:
        start = row // self._size * self._size
        if (split, start) not in self._asked:
            self._asked[split, start] = np.asarray(self._ask(self._tasks(split, start)))
        return [int(token) for token in self._asked[split, start][row - start] if token]

    def view(self, split: str) -> View:
        """The examples of a split: its name and a task's row in it."""
        return View(environments.count(self._environment.tasks[split]), lambda i: dict(split=split, row=i))

    def encode(self, example: dict) -> Encoded:
        """The goal as prompt and the task as data; no answer."""
        split, row = example["split"], example["row"]
        return Encoded(self._goal(split, row), [], jax.tree.map(lambda x: x[row], self._environment.tasks[split]))

    def demonstrate(self, example: dict) -> tuple[np.ndarray, np.ndarray]:
        """See `Task`."""
        start = example["row"] // self._size * self._size
        token, own = self._chunk(example["split"], start)
        token, own = token[example["row"] - start], own[example["row"] - start]
        length = int(np.sum(token != 0))
        return token[:length], own[:length]

    def _chunk(self, split: str, start: int) -> tuple[np.ndarray, np.ndarray]:
        if (split, start) not in self._played:
            keys = jax.random.split(jax.random.fold_in(jax.random.key(self._seed), start), self._size)
            token, own, _ = self._play(keys, self._tasks(split, start))
            self._played[split, start] = np.asarray(token), np.asarray(own)
        return self._played[split, start]

    @functools.cached_property
    def _play(self):
        if self._environment.player is None:
            raise UserError("this environment has no scripted player to learn from; set warm_start.steps=0.")
        return jax.jit(jax.vmap(environments.demonstration(self._environment)))
