"""Tasks: where examples come from, what the model reads, and what an answer is worth."""
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from treerl.errors import UserError
from treerl.tokenizers import CharTokenizer

NAMES = ("countdown",)


class Encoded(NamedTuple):
    """One example as the model and the grader see it."""

    prompt: list[int]
    answer: list[int]  # a reference answer, EOS included
    data: dict[str, np.ndarray]  # what the grader needs; the same shapes for every example


@dataclasses.dataclass(frozen=True)
class Task:
    """Examples, prompt and grader of one task.

    `grade(tokens [S] int32, length [], data) -> float32 []` grades one answer and is traced by
    JAX; callers vmap it. `length` counts the answer's tokens, EOS included: a correct answer
    has its EOS at `tokens[length - 1]`, and what follows is not read.

    `parse(text)` makes an example, without a reference answer, of a prompt that a user wrote as the
    model reads it; it raises ValueError, naming --prompt and the fix.
    """

    tokenizer: CharTokenizer
    train: Sequence[dict[str, Any]]  # random access: len(train), train[i]
    heldout: Sequence[dict[str, Any]]  # shares no example with train
    encode: Callable[[dict[str, Any]], Encoded]
    grade: Callable[[jax.Array, jax.Array, dict[str, jax.Array]], jax.Array]
    parse: Callable[[str], dict[str, Any]] | None = None  # None: the task takes no prompts of users


def make(config: ConfigDict, data_dir: str) -> Task:
    """Builds the task `config.name`, preparing its examples under data_dir once.

    Raises ValueError where the name is unknown or a field of the config cannot work.
    """
    # Each task imports Task from here, hence the late imports.
    if config.name == "countdown":
        from treerl.tasks import countdown

        return countdown.make(config, data_dir)
    raise UserError(f"task.name={config.name!r} is unknown; known are {', '.join(NAMES)}.")
