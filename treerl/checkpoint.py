"""Checkpoints of the whole train state with Orbax, written in the background.

    workdir/checkpoints/<step>     the newest, the best so far, and others on request
    workdir/checkpoints.json       the metric of each

A state is stored as a flat {path: array}, so what is on disk does not depend on
the Python classes that held it, and beside it a small JSON record of every
path's shape and dtype, which is compared before anything is restored. Orbax
writes into a temporary folder and renames it when all is written: a run killed
half way leaves a folder that is never read and that the next run removes.
"""

import contextlib
import json
import math
import os

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from treerl import processes
from treerl.errors import UserError
from treerl.files import remote, write_text

FORGET = "delete it to go on without a best checkpoint"
VERSION = 2  # of what lies in a checkpoint; 1 had folders latest and best


class Checkpoints:
    """Saves train states under `workdir` and restores them, onto any mesh.

    `save` returns once the arrays are copied, so the state may be donated at once; the rest happens in the
    background. Call `wait` or `close`, or use the object as a context manager, before the process ends. With several
    processes all of them call every method, with equal steps and metrics.

    Args:
      workdir: folder of the run, also gs://; created if missing, unless read_only.
      read_only: look at the checkpoints of a run that may still be going: leaves
        its temporary folders alone, and `save` raises.
      keep: how many of the newest stay. The best stays besides.
      keep_every: steps divisible by it stay for ever; 0: none do.
    """

    def __init__(self, workdir, *, read_only: bool = False, keep: int = 1, keep_every: int = 0):
        root = str(workdir)
        if not remote(root):
            root = os.path.abspath(root)
        self._read_only, self._keep, self._keep_every = read_only, keep, keep_every
        folder, self._known = epath.Path(f"{root}/checkpoints"), epath.Path(f"{root}/checkpoints.json")
        if (folder / "latest").exists():
            raise UserError(f"{folder} was written by an older treerl (format 1 of {VERSION}); go on with that one, or use a new workdir.")
        self._metrics = self._read_metrics()
        self._manager = ocp.CheckpointManager(
            folder,
            item_names=("state", "record"),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=self,
                read_only=read_only,
                create=not read_only,
                cleanup_tmp_directories=not read_only,
            ),
        )

    @property
    def latest_step(self) -> int | None:
        """Step of the newest checkpoint; None without one."""
        return self._manager.latest_step()

    @property
    def best_step(self) -> int | None:
        """Step of the checkpoint with the highest metric, the older of equals; None without one."""
        return self._best(self._manager.all_steps())

    @property
    def best_metric(self) -> float | None:
        """Metric of the best checkpoint; None without one."""
        return self._metrics.get(self.best_step)

    def save(self, step: int, state, *, extra: dict, metric: float | None = None) -> None:
        """Saves `state`, in the background.

        A step names one state: a second save of the latest step writes its metric alone, if that came later.

        Args:
          step: number of finished steps, at least the latest saved one.
          state: pytree of arrays.
          extra: anything JSON can hold, such as the data position.
          metric: higher is better; ties keep the older one; None or nan is no candidate for the best.

        Raises:
          ValueError: the step lies before the latest, or the object is read_only.
          TypeError: a leaf is no array, or extra does not fit into JSON.
        """
        if self._read_only:
            raise ValueError("these checkpoints were opened with read_only=True; open them without it to save.")
        step, latest = int(step), self.latest_step
        if latest is not None and step < latest:
            raise ValueError(
                f"step {step} lies before the latest checkpoint, {latest}, in "
                f"{self._manager.directory}; continue from that one or use a new workdir."
            )
        arrays = _flatten(state)
        record = {
            "version": VERSION,
            "extra": _as_json(extra),
            "leaves": {path: _describe(x) for path, x in arrays.items()},
        }
        if metric is not None and not math.isnan(metric):
            self._write_metric(step, float(metric))
        if step == latest:
            return
        # Orbax refuses arrays without elements; the record is enough to make them anew.
        arrays = {path: x for path, x in arrays.items() if x.size}
        self._manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(arrays), record=ocp.args.JsonSave(record)))

    def restore_latest(self, abstract_state):
        """Restores the newest checkpoint.

        Args:
          abstract_state: pytree of jax.ShapeDtypeStruct with the shardings to restore
            to (without one: the first device), or of arrays.

        Returns:
          (step, state, extra), or None when nothing was saved.

        Raises:
          UserError: the checkpoint is damaged, or does not fit; names the first path that differs.
        """
        step = self.latest_step
        others = [s for s in self._manager.all_steps() if s != step]
        return self._restore(step, abstract_state, f"delete it to go on from step {max(others)}" if others else "delete it to start anew")

    def restore_best(self, abstract_state):
        """Restores the checkpoint with the highest metric; see `restore_latest`."""
        return self._restore(self.best_step, abstract_state, FORGET)

    def wait(self) -> None:
        """Blocks until everything saved is on disk; raises what a background write raised."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and gives back Orbax's threads, also where a write failed, which it raises."""
        with contextlib.ExitStack() as stack:
            stack.callback(self._manager.close)
            self.wait()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        """Orbax asks which of the checkpoints, oldest first, stay once the last of them is written."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        stays = {*steps[-self._keep :], self._best(steps)}
        stays |= {step for step in steps if self._keep_every and step % self._keep_every == 0}
        return [step in stays for step in steps]

    def _best(self, steps) -> int | None:
        """Of some steps the one with the highest metric, the oldest of equals; None where no metric is known."""
        return max((s for s in sorted(steps) if s in self._metrics), key=self._metrics.get, default=None)

    def _read_metrics(self) -> dict[int, float]:
        with _undamaged(str(self._known), FORGET):
            text = self._known.read_text() if self._known.exists() else "{}"
            return {int(step): float(metric) for step, metric in json.loads(text).items()}

    def _write_metric(self, step: int, metric: float) -> None:
        """Before the checkpoint itself, which after a kill would be there without it."""
        self._metrics = {s: x for s, x in self._metrics.items() if s < step} | {step: metric}
        if processes.is_first():
            write_text(self._known, json.dumps(self._metrics))

    def _restore(self, step, abstract_state, fix: str):
        self.wait()
        if step is None:
            return None
        wanted, folder = _flatten(abstract(abstract_state)), f"{self._manager.directory}/{step}"
        stored = {path: x for path, x in wanted.items() if x.size}
        with _undamaged(folder, fix):
            record = self._manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore())).record
            if record["version"] > VERSION:
                raise UserError(
                    f"checkpoint {folder} has format {record['version']} and this treerl reads up to {VERSION}; update "
                    "treerl, or use a new workdir."
                )
            _compare(folder, record["leaves"], wanted)
            arrays = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(stored))).state
        for path, x in wanted.items():
            if not x.size:
                arrays[path] = jax.make_array_from_callback(x.shape, x.sharding, lambda index: jnp.zeros(x.shape, x.dtype)[index])
        treedef = jax.tree.structure(abstract_state)
        return step, treedef.unflatten([arrays[path] for path in wanted]), record["extra"]


def abstract(state, shardings=None):
    """Makes the `abstract_state` of a state.

    Args:
      state: pytree of arrays or jax.ShapeDtypeStruct (as of jax.eval_shape).
      shardings: pytree of shardings like `state`; None keeps those the leaves have.

    Returns:
      Pytree of jax.ShapeDtypeStruct with shardings.
    """
    if shardings is None:
        shardings = jax.tree.map(lambda x: getattr(x, "sharding", None) or _first_device(), state)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)


@contextlib.contextmanager
def _undamaged(folder: str, fix: str):
    """Turns what Orbax raises over cut or missing files, errors of many types, into a UserError."""
    try:
        yield
    except (UserError, PermissionError, jax.errors.JaxRuntimeError):  # the last: out of memory
        raise
    except Exception as error:
        raise UserError(f"checkpoint {folder} is damaged; {fix}.") from error


def _flatten(state) -> dict:
    """Pytree -> {path: leaf} in the order of the leaves, such as 'params/block_0/kernel'."""
    flat = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(state):
        path = jax.tree_util.keystr(keys, simple=True, separator="/") or "state"
        if path in flat:
            raise ValueError(f"two leaves of the state share the path '{path}'; rename one.")
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise TypeError(f"state leaf '{path}' is a {type(leaf).__name__}; make it a jax array.")
        flat[path] = leaf
    return flat


def _describe(x) -> list:
    return [list(x.shape), str(x.dtype)]


def _compare(folder: str, stored: dict, wanted: dict) -> None:
    """Raises UserError at the first path at which a checkpoint and a state differ."""
    advice = "restore with the config the checkpoint was made with, or use a new workdir."
    for path, x in wanted.items():
        if path not in stored:
            raise UserError(f"checkpoint {folder} has no '{path}', which the state has; {advice}")
        shape, dtype = tuple(stored[path][0]), stored[path][1]
        if (shape, dtype) != (tuple(x.shape), str(x.dtype)):
            raise UserError(
                f"checkpoint {folder} has {dtype}{list(shape)} at '{path}' where the state has {x.dtype}{list(x.shape)}; {advice}"
            )
    for path in stored:
        if path not in wanted:
            raise UserError(f"checkpoint {folder} has '{path}', which the state has not; {advice}")


def _as_json(extra: dict) -> dict:
    """A copy of `extra` that later changes by the caller cannot reach."""
    try:
        return json.loads(json.dumps(extra))
    except (TypeError, ValueError) as error:
        raise TypeError(f"extra does not fit into JSON ({error}); use plain Python numbers, strings, lists and dicts.") from None


def _first_device():
    return jax.sharding.SingleDeviceSharding(jax.devices()[0])
