"""Tasks: where examples come from, what the model reads, and what an answer is worth."""

import dataclasses
import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from treerl import environments
from treerl.environments import Environment
from treerl.errors import UserError
from treerl.tokenizers import CharTokenizer, TextTokenizer, WordTokenizer

DEVICE = ("countdown",)  # modules here with make(config, data_dir) -> Task, graded on the device
TEXT = ("addition", "reasoning_gym", "jsonl", "tfds")
NAMES = (*DEVICE, *TEXT, *environments.NAMES)


class Encoded(NamedTuple):
    """One example as the model and the grader see it."""

    prompt: list[int]
    answer: list[int]  # a reference answer, EOS included
    data: dict[str, np.ndarray | np.generic]  # what the grader needs, or the environment's task; the same shapes for every example


class HostGraders(NamedTuple):
    """Graders that run on the host; a reward is the weighted sum of their scores.

    grade(tokens [n, S] int32, length [n], data: dict of [n, ...]) -> (scores [n, G] float32, fault [n] int8): numpy
      throughout, `data` as `Task.encode` gives it. A fault (see `treerl.graders.FAULTS`) is 0 where all went well.
    key(tokens [S], length) -> what an answer says, as text: answers with equal keys vote together.
    """

    names: tuple[str, ...]
    weights: tuple[float, ...]
    grade: Callable[[np.ndarray, np.ndarray, dict[str, np.ndarray]], tuple[np.ndarray, np.ndarray]]
    key: Callable[[np.ndarray, int], str]


@dataclasses.dataclass(frozen=True)
class Task:
    """Examples, prompt and grader of one task.

    `grade(tokens [S] int32, length [], data) -> float32 []` grades one answer and is traced by
    JAX; callers vmap it. `length` counts the answer's tokens, EOS included: a correct answer
    has its EOS at `tokens[length - 1]`, and what follows is not read.

    A text task has `host` instead of `grade`: graders that run on the host, see `HostGraders`. A task of an environment
    has neither: its answers are episodes, which the environment rewards.

    `parse(text)` makes an example, without a reference answer, of a prompt that a user wrote as the
    model reads it; it raises ValueError, naming --prompt and the fix.
    """

    tokenizer: CharTokenizer | WordTokenizer | TextTokenizer
    train: Sequence[dict[str, Any]]  # random access: len(train), train[i]
    heldout: Sequence[dict[str, Any]]  # shares no example with train
    encode: Callable[[dict[str, Any]], Encoded]
    grade: Callable[[jax.Array, jax.Array, dict[str, jax.Array]], jax.Array] | None
    host: HostGraders | None = None
    parse: Callable[[str], dict[str, Any]] | None = None  # None: the task takes no prompts of users
    environment: Environment | None = None  # in which answers are episodes; `encode` then gives no reference answer
    demonstrate: Callable[[dict], tuple[np.ndarray, np.ndarray]] | None = None  # an episode to learn from: its tokens
    #             [n], observations included, and which of them are the agent's
    novel: Sequence[dict[str, Any]] | None = None  # held-out examples of another distribution
    right: float = 0.5  # rewards above it count as right: pass@k, metric `solved`, pictures
    few: int | None = None  # examples that a new run's check reads, where they are made when asked for; None: all it will use


def make(
    config: ConfigDict, data_dir: epath.PathLike, text: ConfigDict | None = None, tokenizer: CharTokenizer | TextTokenizer | None = None,
    environment: ConfigDict | None = None,
) -> Task:  # fmt: skip
    """Builds the task `config.name`, preparing its examples under data_dir once.

    Args:
      text: the section `text` of the config, which text tasks read. tokenizer: theirs, that of the model; None for one
        token a character. environment: the section of that name, for tasks that are environments.

    Raises ValueError where the name is unknown or a field of the config cannot work.
    """
    # Each task imports Task from here, hence the late imports.
    if config.name in DEVICE:
        return importlib.import_module(f"treerl.tasks.{config.name}").make(config, data_dir)
    if config.name in environments.NAMES:
        from treerl.tasks import agents

        if tokenizer is not None:
            raise UserError(f"task.name={config.name!r} has words of its own, and model.source={tokenizer.folder!r} others; set it to ''.")
        return agents.make(config, environment)
    if config.name in TEXT:
        from treerl.tasks import text as texts

        if text is None:
            raise UserError(f"task.name={config.name!r} reads the section text of the config, and none was given; pass it on.")
        return texts.make(config, text, data_dir, tokenizer)
    raise UserError(f"task.name={config.name!r} is unknown; known are {', '.join(NAMES)}.")
