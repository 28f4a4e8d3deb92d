"""Numbers of a batch of trees, and of a run as metrics.jsonl: one strict JSON object a line."""

import json
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from treerl import masked, tree as T
from treerl.errors import UserError
from treerl.files import Growing


class LinesFile:
    """Appends lines that belong to steps, and on opening drops those that will be done again.

    A run resumed from the checkpoint of step n repeats the steps after n: their
    lines go, as does a last line that an interruption cut short, so the file
    always tells one story. With several processes, open it in the first alone.

    Args:
      path: the JSONL file; it and its folder are created if missing.
      resume_step: lines of later steps are dropped; -1 starts anew.

    Raises:
      ValueError: a line before the last is no JSON object with a "step".
    """

    def __init__(self, path, resume_step: int):
        self._stored = Growing(path)
        path = self._stored.path
        kept = [line for line in read(path) if line["step"] <= resume_step] if os.path.exists(path) else []
        self.empty = not kept  # no line of an earlier process
        temporary = path + ".tmp"
        with open(temporary, "w", encoding="utf-8") as file:
            file.writelines(_dump(line) for line in kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        self._file = open(path, "a", encoding="utf-8")

    def append(self, line: dict) -> None:
        """Writes one line, JSON with a "step", and flushes it."""
        self._file.write(_dump(line))
        self._file.flush()

    def upload(self) -> None:
        """Brings an object store up to date, before a checkpoint from which later lines are written again."""
        self._stored.upload()

    def close(self) -> None:
        self._file.close()
        self.upload()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class MetricsFile(LinesFile):
    """The lines of metrics.jsonl, numbers alone."""

    def write(self, step: int | np.integer, values: dict) -> None:
        """Writes one line and flushes it.

        Args:
          step: the step that the numbers belong to.
          values: name -> Python, numpy or jax scalar. Floats keep every bit (the
            shortest text that reads back as the same number); nan and infinities,
            which JSON lacks, become null.

        Raises:
          ValueError: a value is no scalar, or is named "step".
        """
        if "step" in values:
            raise ValueError('metric "step" is the line\'s own number; rename the metric.')
        self.append({"step": int(step)} | plain(values))


def plain(values: dict) -> dict:
    """Scalars of any kind as `MetricsFile.write` writes them: Python numbers, None where not finite."""
    return {name: _scalar(name, value) for name, value in values.items()}


def read(path) -> list[dict]:
    """Reads metrics.jsonl, or another file of such lines; a last one cut short by an interruption is left out.

    Returns:
      One dict a line, with "step"; nan and infinities read as None.

    Raises:
      UserError: a line before the last is no JSON, or any is no object with a "step".
    """
    return read_whole(path)[0]


def read_whole(path) -> tuple[list[dict], bool]:
    """The same, and whether the last line was cut short."""
    text = epath.Path(path).read_bytes().decode("utf-8", errors="replace")
    lines = text.rstrip().split("\n")
    parsed, cut = [], False
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError:
            if cut := number == len(lines):
                break
            value = None
        if not isinstance(value, dict) or "step" not in value:
            raise UserError(f'{path} line {number} is no JSON object with a "step"; remove that line or use a new workdir.')
        parsed.append(value)
    return parsed, cut


def best(lines: list[dict]) -> dict | None:
    """The line of the highest pass@1, first of equals; None without any."""
    return max((line for line in lines if line.get("pass@1") is not None), key=lambda line: line["pass@1"], default=None)


def _dump(line: dict) -> str:
    return json.dumps(line, allow_nan=False, ensure_ascii=False) + "\n"


def _scalar(name: str, value):
    """numpy, jax or Python scalar -> bool, int, finite float or None."""
    if value is None:
        return None
    array = np.asarray(value)
    if array.ndim or not (array.dtype == bool or np.issubdtype(array.dtype, np.integer) or _is_float(array.dtype)):
        raise ValueError(f'metric "{name}" is {array.dtype}{list(array.shape)}; reduce it to one number.')
    if array.dtype == bool:
        return bool(array)
    if np.issubdtype(array.dtype, np.integer):
        return int(array)
    return float(array) if math.isfinite(float(array)) else None


def _is_float(dtype) -> bool:
    """True of numpy's floats and of bfloat16 and its kin, which numpy does not count as such."""
    return np.issubdtype(dtype, np.floating) or dtype.name.startswith(("bfloat", "float"))


def describe(tree: T.Tree, reward: jax.Array, stats, right: float) -> dict:
    """Numbers of a batch of graded trees, means over trees or leaves; traceable.

    Args:
      tree: batched. reward: [B, L]. stats: `sampler.Stats`. right: rewards above it count as right.
    """
    valid = jax.vmap(T.leaf_valid)(tree)
    kept = jax.vmap(T.kept)(tree)
    unique, flat = jax.vmap(T.token_count)(tree)
    own, more = kept & T.spoken(tree), {}
    if tree.turns is not None:
        carried = tree.turns.valid & valid[..., None]
        more = dict(
            turns=masked.mean(jnp.sum(carried, axis=-1), valid),
            invalid=masked.mean(tree.turns.invalid, carried),
        )
    return dict(
        reward=masked.mean(reward, valid),
        solved=jnp.mean(jnp.any(valid & (reward > right), axis=1)),
        leaves=jnp.mean(jnp.sum(valid, axis=1)),
        length=masked.mean(jax.vmap(T.leaf_length)(tree), valid),
        truncated=jnp.sum(tree.end == T.TRUNCATED) / jnp.maximum(jnp.sum(valid), 1),
        entropy=masked.mean(tree.entropy, own),
        depth=masked.mean(jax.vmap(lambda t: T.depth(t)[1])(tree), valid),
        unique_tokens=jnp.sum(unique) / jnp.maximum(jnp.sum(flat), 1),
        forced_tokens=masked.mean(tree.source == T.FORCED, own),
        forks=jnp.mean(stats.forks),
        restarts=jnp.mean(stats.restarts),
        pruned=jnp.mean(stats.pruned),
        sampled_tokens=jnp.sum(stats.sampled),
        **more,
    )
