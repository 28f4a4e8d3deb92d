"""Examples to prompts: a deterministic stream that resumes at any position."""

from collections.abc import Sequence

import jax
import numpy as np

from treerl import environments
from treerl.errors import UserError
from treerl.tasks import Task
from treerl.types import Prompts


def _pad(rows: list, width: int, what: str, field: str) -> tuple[np.ndarray, np.ndarray]:
    length = np.array([len(row) for row in rows], np.int32)
    if length.max() > width:
        raise UserError(f"{what} of {length.max()} tokens is longer than {field}={width}; raise {field}.")
    table = np.zeros((len(rows), width), np.int32)
    for line, row in zip(table, rows):
        line[: len(row)] = row
    return table, length


def encode(task: Task, examples: list, index: np.ndarray, width: int) -> Prompts:
    """Encodes examples as Prompts of `width` tokens with numpy leaves; index is int [B]."""
    encoded = [task.encode(example) for example in examples]
    token, length = _pad([e.prompt for e in encoded], width, "a prompt", "sampler.prompt_length")
    data = jax.tree.map(lambda *x: np.stack(x), *[e.data for e in encoded])
    return Prompts(token=token, length=length, index=np.asarray(index, np.int32), data=data)


def encode_answers(task: Task, examples: list[dict], width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Reference answers, the end included: (tokens [B, width], length [B], bool, which are to be learnt [B, width]).

    A demonstration in an environment, which has tokens that are not the agent's, is cut off at the width.
    """
    if task.environment is None:
        token, length = _pad([task.encode(e).answer for e in examples], width, "a reference answer", "sampler.answer_length")
        return token, length, np.arange(width) < length[:, None]
    played = [task.demonstrate(example) for example in examples]
    token, length = _pad([token[:width] for token, _ in played], width, "a demonstration", "sampler.answer_length")
    own, _ = _pad([own[:width] for _, own in played], width, "a demonstration", "sampler.answer_length")
    return token, length, own.astype(bool)


def encode_lessons(task: Task, examples: list[dict], index: np.ndarray, sizes, window: int | None):
    """Prompts and what is to be said after each: (Prompts, token [B, S], length [B], own [B, S]), see `encode_answers`.

    Of agents with a short memory, one turn of each demonstration, chosen by the index: (context, action).

    Args:
      sizes: prompt_length and answer_length. window: see `treerl.reprompt`; None: the whole answer.
    """
    prompts = encode(task, examples, index, sizes.prompt_length)
    if window is None:
        return prompts, *encode_answers(task, examples, sizes.answer_length)
    taken = []
    for example, goal, number in zip(examples, prompts.token, index):
        token, own = task.demonstrate(example)
        turns = int(np.sum(own & ~np.append(False, own[:-1])))
        goal = [int(t) for t in goal if t]
        if not turns:  # of a game on the host that could not start: nothing to learn
            taken.append((goal, []))
            continue
        turn = int(np.random.default_rng(number).integers(turns))
        taken.append(environments.lesson(goal, token, own, turn, window))
    environment = task.environment
    wide = environments.context_width(environment, sizes.prompt_length, window)
    context, length = _pad([context for context, _ in taken], wide, "a context", "environment.window")
    token, said = _pad([action for _, action in taken], environment.action, "an action", "the environment's own")
    own = np.arange(environment.action) < said[:, None]
    return prompts.replace(token=context, length=length), token, said, own


def check(task: Task, stream: "Stream", count: int, sizes) -> None:
    """Raises UserError if one of the first `count` prompts of a stream does not fit, as far as `Task.few` lets it look.

    Such a prompt would end the run when its turn comes, and the run's folder keeps sampler.prompt_length.
    """
    count = min(count, len(task.train), task.few or count)
    for start in range(0, count, sizes.prompts):
        examples, index = stream.examples(start, min(sizes.prompts, count - start))
        encode(task, examples, index, sizes.prompt_length)


class Stream:
    """Endless batches of examples; batch n depends on (seed, position) alone.

    Each pass over the data is a new permutation. A batch may span two passes.
    """

    def __init__(self, data, seed: int):
        self._data, self._seed = data, seed
        self._pass, self._order = None, None

    def examples(self, position: int, count: int) -> tuple[Sequence[dict], np.ndarray]:
        """Examples position .. position + count of the stream, each read when it is asked for, and those positions."""
        positions = np.arange(position, position + count)
        return Examples(self, positions), positions

    def example(self, position: int) -> dict:
        """The example at a position of the stream."""
        number, offset = divmod(position, len(self._data))
        if number != self._pass:
            self._pass = number
            self._order = np.random.default_rng([self._seed, number]).permutation(len(self._data))
        return self._data[int(self._order[offset])]


class Examples(Sequence):
    """Some examples of a stream."""

    def __init__(self, stream, positions: np.ndarray):
        self._stream, self._positions = stream, positions

    def __len__(self):
        return len(self._positions)

    def __getitem__(self, i: int) -> dict:
        return self._stream.example(int(self._positions[i]))
