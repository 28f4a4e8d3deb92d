"""Where the examples of text tasks come from: questions with reference answers, made or read.

Each function returns (train, heldout), sequences of dicts with "prompt", "answer" (text that graders compare with, or
None), "completion" (a worked answer that ends in it, or None), and what else a grader may want.
"""

import dataclasses
import difflib
import functools
import json
import math
import numbers
import os
import random
from collections.abc import Callable, Sequence
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from treerl.errors import UserError


class View(Sequence):
    """A sequence of `length` examples, made one at a time by get(i)."""

    def __init__(self, length: int, get: Callable[[int], dict[str, Any]]):
        self._length, self._get = length, get

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, i: int) -> dict[str, Any]:
        if not 0 <= i < self._length:
            raise IndexError(i)
        return self._get(i)


def _sizes(task: ConfigDict, fields: tuple[str, ...]) -> None:
    for field in fields:
        if task[field] < 1:
            raise UserError(f"task.{field}={task[field]} cannot work; set it to 1 or more.")


def addition(task: ConfigDict, text: ConfigDict, data_dir: epath.PathLike):
    """Sums of two numbers of as many digits each; a pair is in one split, in one of its two orders.

    text.options: digits, 1 to 9; of one digit, 1 to 9 without the 0.
    """
    _sizes(task, ("train_size", "heldout_size"))
    options = dict({"digits": 2}, **text.options)
    digits = options.pop("digits")
    if options:
        raise UserError(f"text.options has no {min(options)!r} for task.name=addition; known is digits.")
    if type(digits) is not int or not 1 <= digits <= 9:
        raise UserError(f"text.options: digits={digits!r} cannot work; set it to 1 to 9.")
    low, count = 10 ** (digits - 1), 9 * 10 ** (digits - 1)
    pairs, size = count * (count + 1) // 2, task.train_size + task.heldout_size
    if size > pairs:
        raise UserError(
            f"task.train_size={task.train_size} + task.heldout_size={task.heldout_size} asks for {size} different sums and "
            f"{pairs} have text.options digits={digits}; lower the sizes or raise digits."
        )
    rng, made = random.Random(task.seed), []
    for i in rng.sample(range(pairs), size):
        larger = (math.isqrt(8 * i + 1) - 1) // 2  # pair i of (0, 0), (0, 1), (1, 1), (0, 2), ...
        pair = [low + i - larger * (larger + 1) // 2, low + larger]
        a, b = rng.sample(pair, 2)
        made.append(dict(prompt=f"What is {a} + {b}?", answer=str(a + b), completion=f"{a} + {b} = {a + b}"))
    return made[: task.train_size], made[task.train_size :]


def reasoning_gym(task: ConfigDict, text: ConfigDict, data_dir: epath.PathLike):
    """A task of reasoning-gym: held-out questions first, then training ones, of which those held out are replaced.

    Questions are made as they are asked for: some take 50 ms. The example's "entry" is what the dataset's own scorer
    wants, and "metadata" a part of it.
    """
    _sizes(task, ("train_size", "heldout_size"))
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ModuleNotFoundError as error:
        raise UserError("task.name=reasoning_gym needs a package that is missing; pip install reasoning-gym.") from error
    name, options = text.source, plain(text.options)
    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, n=3, cutoff=0.4)
        advice = f"did you mean {' or '.join(near)}?" if near else "see reasoning_gym.factory.DATASETS."
        raise UserError(f"text.source={name!r} is no task of reasoning-gym; {advice}")
    known = [field.name for field in dataclasses.fields(DATASETS[name][1]) if field.name not in ("seed", "size")]
    for option in options:
        if option in ("seed", "size"):
            field = {"seed": "seed", "size": "train_size"}[option]
            raise UserError(f"text.options.{option} is given by the section task; set task.{field}.")
        if option not in known:
            names = ", ".join(sorted(known)) or "none"
            raise UserError(f"text.options has no {option!r} for text.source={name}; known are {names}.")

    def trouble(error: Exception) -> UserError:
        words = " ".join(str(error).split()) or type(error).__name__
        return UserError(f"text.source={name} cannot work with text.options={options} ({words}); change text.options or the task's sizes.")

    try:
        made = reasoning_gym.create_dataset(name, seed=task.seed, size=task.train_size + task.heldout_size, **options)
    except Exception as error:
        raise trouble(error) from error

    @functools.cache
    def example(i: int) -> dict:
        try:
            entry = made[i]
        except Exception as error:
            raise trouble(error) from error
        return dict(prompt=entry["question"], answer=entry["answer"], completion=None, entry=entry, metadata=entry["metadata"])

    heldout = [example(i) for i in range(task.heldout_size)]
    taken = {one["prompt"] for one in heldout}

    def train(i: int) -> dict:
        for step in range(task.train_size):
            one = example(task.heldout_size + (i + step) % task.train_size)
            if one["prompt"] not in taken:
                return one
        raise UserError(
            f"text.source={name} makes no training question that is not held out; lower task.heldout_size={task.heldout_size}, "
            "raise task.train_size, or let text.options make more different questions."
        )

    train(0)  # there is one
    return View(task.train_size, train), heldout


def plain(value):
    """A ConfigDict as a dict, and those within."""
    return {k: plain(v) for k, v in value.items()} if hasattr(value, "items") else value


def _as_text(value) -> str | None:
    """A cell of a table as text, None where it is neither text nor a finite number."""
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        return None
    return str(int(value)) if isinstance(value, numbers.Integral) else repr(float(value))


def _example(row: dict, text: ConfigDict, where: str) -> dict:
    """The example in a row of a table; `where` names the row in errors."""
    cells = {}
    for field in ("prompt", "answer"):
        column = text[field]
        if column not in row:
            columns = ", ".join(map(repr, row)) or "its columns"
            raise UserError(f"{where} has no {column!r}; set text.{field} to one of {columns}.")
        cells[field] = _as_text(row[column])
        if cells[field] is None or not cells[field].strip():
            raise UserError(f"{where}: {column!r} is empty, or neither text nor a number; mend it, or set text.{field} to another column.")
    before, marks, behind = cells["answer"].rpartition("####")
    others = {column: value for column, value in row.items() if column not in (text.prompt, text.answer)}
    return dict(
        prompt=cells["prompt"],
        answer=behind.strip() if marks else cells["answer"],
        completion=cells["answer"] if marks else None,
        metadata=others,
    )


def _lines(path: str, text: ConfigDict, field: str) -> list[dict]:
    try:
        with open(os.path.expanduser(path), "rb") as file:
            lines = file.read().split(b"\n")
    except OSError as error:
        raise UserError(f"text.{field}={path!r} cannot be read ({error.strerror}); set it to a file of JSON lines.") from error
    made = []
    for i, line in enumerate(lines[:-1] if lines[-1] == b"" else lines, start=1):
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            what = "is no JSON" if line.strip() else "is empty"
            raise UserError(f"{path}:{i} {what}; mend or remove that line.") from error
        if not isinstance(row, dict):
            raise UserError(f'{path}:{i} is no JSON object; write it as {{"{text.prompt}": ..., "{text.answer}": ...}}.')
        made.append(_example(row, text, f"{path}:{i}"))
    return made


def jsonl(task: ConfigDict, text: ConfigDict, data_dir: epath.PathLike):
    """The lines of a file; training lines whose question is also held out are left out."""
    examples = _lines(text.source, text, "source")
    if text.heldout:
        train, heldout = examples, _lines(text.heldout, text, "heldout")
    else:
        cut = _cut(len(examples), task, f"text.source={text.source!r}")
        train, heldout = examples[:cut], examples[cut:]
    taken = {example["prompt"] for example in heldout}
    train = [example for example in train if example["prompt"] not in taken]
    if not heldout:
        raise UserError(f"text.heldout={text.heldout!r} is empty; add lines, or set it to '' to hold out those of text.source.")
    if not train:
        raise UserError(f"text.source={text.source!r} has no question that is not held out; add some, or change text.heldout.")
    return train, heldout


def _cut(length: int, task: ConfigDict, what: str) -> int:
    """Where the last task.heldout_size of so many examples start."""
    _sizes(task, ("heldout_size",))
    if length <= task.heldout_size:
        raise UserError(
            f"{what} has {length} examples and task.heldout_size={task.heldout_size} holds out as many; lower it, or set text.heldout."
        )
    return length - task.heldout_size


def tfds(task: ConfigDict, text: ConfigDict, data_dir: epath.PathLike):
    """Splits of a dataset that TensorFlow Datasets has prepared under data_dir as array_record files."""
    import tensorflow_datasets

    try:
        builder = tensorflow_datasets.core.read_only_builder.builder_from_files(text.source, data_dir=data_dir)
    except Exception as error:
        raise UserError(
            f"text.source={text.source!r} is no dataset prepared under data_dir={data_dir}; prepare it there, and write a "
            "config behind a slash, as in 'name/config'."
        ) from error

    def split(name: str, field: str):
        try:
            return builder.as_data_source(split=name)
        except NotImplementedError as error:
            raise UserError(
                f"text.source={text.source!r} is not prepared for random access; prepare it with file_format='array_record'."
            ) from error
        except Exception as error:
            known = ", ".join(builder.info.splits)
            raise UserError(f"text.{field}={name!r} is no split of text.source={text.source!r}; known are {known}.") from error

    def examples(source, name: str, start: int, stop: int) -> View:
        return View(stop - start, lambda i: _example(source[start + i], text, f"{text.source} {name}[{start + i}]"))

    train = split(text.split, "split")
    if text.heldout:
        cut, heldout = len(train), split(text.heldout, "heldout")
        made = examples(train, text.split, 0, cut), examples(heldout, text.heldout, 0, len(heldout))
    else:
        cut = _cut(len(train), task, f"text.split={text.split!r} of text.source={text.source!r}")
        made = examples(train, text.split, 0, cut), examples(train, text.split, cut, len(train))
    for one, name in zip(made, (text.split, text.heldout)):
        if not len(one):
            raise UserError(f"split {name!r} of text.source={text.source!r} is empty; name another.")
        one[0]  # its columns are there
    return made


SOURCES = {"addition": addition, "reasoning_gym": reasoning_gym, "jsonl": jsonl, "tfds": tfds}
