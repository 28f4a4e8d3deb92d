"""Graders of text that run on the host: (completion, example) -> score, as weighted parts of a reward.

An example is a dict with "prompt", "answer" (the reference as text, or None), and what its task adds. Built-in graders,
and how an answer is found in a completion: `answers`. Those that are not cheap run in processes of their own with a time
limit, see `workers`. Imports no JAX, so that these start quickly.
"""

import math
import pickle
import threading
import warnings
from collections.abc import Mapping

import numpy as np

from treerl.errors import UserError
from treerl.graders.answers import BUILT_IN, CHEAP, EXTRACTS, check, extract, last_number, load, normal
from treerl.graders.workers import FAULTS, FINE, Result, Workers, call

__all__ = ["BUILT_IN", "EXTRACTS", "FAULTS", "Graders", "extract", "last_number", "normal"]


class Graders:
    """Graders with their weights in the reward.

    An answer that a grader fails on (it raises, takes too long, returns no finite number, ends its process) has 0 of
    that grader, and the fault's code; other answers and graders are not affected. The first fault of each kind is told
    as a warning.

    Args:
      weights: name -> weight. Names are those of `BUILT_IN`, or "module:function".
      extract: where the answer is in a completion, one of `EXTRACTS`, for built-in graders; your own get all of it.
      threshold: above 0, scores count 1 from it and 0 below.
      seconds: that a grader may take for one answer.
      workers: processes, at most; they start with the first answers that need them and end with this object.
      source: name and arguments of the dataset, for `reasoning_gym`.

    Raises:
      UserError: a grader is not to be found, or a weight cannot work.
    """

    def __init__(self, weights: Mapping[str, float], *, extract: str = "text", threshold: float = 0.0, seconds: float = 5.0,
                 workers: int = 2, source: tuple[str, dict] | None = None):  # fmt: skip
        for name, weight in weights.items():
            if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
                raise UserError(f"text.graders: the weight {weight!r} of {name} is no number; set one such as 1.0.")
            check(name, source)
        if not any(weights.values()):
            raise UserError(f"text.graders={dict(weights)} gives no weight to any grader; set one such as {{'exact': 1.0}}.")
        if extract not in EXTRACTS:
            raise UserError(f"text.extract={extract!r} is unknown; known are {', '.join(EXTRACTS)}.")
        self.names = tuple(weights)
        self.weights = tuple(float(weight) for weight in weights.values())
        self._threshold = threshold
        here = [name for name in self.names if name in CHEAP]
        self._here = dict(zip(here, load(tuple(here), extract, source)))
        self._there = tuple(name for name in self.names if name not in CHEAP)
        self._workers = Workers(_load, (self._there, extract, source), count=workers, seconds=seconds)
        self._lock = threading.Lock()  # callbacks of several devices may come at once
        self._told: set[tuple[str, int]] = set()

    def grade(self, completions: list[str], examples: list[dict]) -> tuple[np.ndarray, np.ndarray]:
        """Grades each completion, equal pairs once.

        Returns:
          (scores float32 [n, G], fault int8 [n]: of an answer's first grader that failed, an index of `FAULTS`).
        """
        # One pickle an example, not one an answer: it tells equal examples and is what goes to a process.
        pickles = {id(example): example for example in examples}
        pickles = {key: pickle.dumps(example) for key, example in pickles.items()}
        pairs = [(completion, pickles[id(example)]) for completion, example in zip(completions, examples, strict=True)]
        unique = {pair: example for pair, example in zip(pairs, examples)}
        graded = {
            name: {pair: call(self._here[name], pair[0], example) for pair, example in unique.items()} for name in self._here
        } | self._grade_there(list(unique))
        self._tell(graded)
        n = len(pairs)
        scores, fault = np.zeros((n, len(self.names)), np.float32), np.zeros(n, np.int8)
        for j, name in enumerate(self.names):
            results = [graded[name][pair] for pair in pairs]
            scores[:, j] = [result.score for result in results]
            fault = np.where(fault == FINE, np.array([result.fault for result in results], np.int8), fault)
        if self._threshold > 0:
            scores = (scores >= np.float32(self._threshold)).astype(np.float32)
        return scores, fault

    def _grade_there(self, pairs: list) -> dict[str, dict]:
        jobs = [(i, pair) for i in range(len(self._there)) for pair in pairs]
        with self._lock:
            results = self._workers.run(jobs)
        count = len(pairs)
        return {name: dict(zip(pairs, results[i * count : (i + 1) * count])) for i, name in enumerate(self._there)}

    def _tell(self, graded: dict[str, dict[tuple, Result]]) -> None:
        for name, results in graded.items():
            for result in results.values():
                if result.fault and (name, result.fault) not in self._told:
                    self._told.add((name, result.fault))
                    warnings.warn(f"grader {name!r} {result.words}; such answers are worth 0.", stacklevel=3)

    def close(self) -> None:
        """Ends the processes; a later `grade` starts others."""
        self._workers.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def _load(names: tuple[str, ...], extract: str, source) -> list:
    """The graders as a process calls them, with the example still pickled."""
    return [_Unpickled(grader) for grader in load(names, extract, source)]


class _Unpickled:
    def __init__(self, grader):
        self._grader = grader

    def __call__(self, completion: str, example: bytes):
        return self._grader(completion, pickle.loads(example))
