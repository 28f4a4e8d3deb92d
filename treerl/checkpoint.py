"""Checkpoints of the whole train state with Orbax: the latest one and the best one.

    workdir/checkpoints/latest/<step>   to go on from after an interruption
    workdir/checkpoints/best/<step>     the highest metric so far

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

from treerl.errors import UserError

FORGET = "delete it to go on without a best checkpoint"


class Checkpoints:
    """Saves train states under `workdir` and restores them, onto any mesh.

    Writing happens in the background: `save` returns once the arrays are copied,
    so the state may be donated at once. Call `wait` or `close`, or use the object
    as a context manager, before the process ends. With several processes all of
    them call every method, with equal steps and metrics.

    Args:
      workdir: folder of the run; created if missing, unless read_only.
      read_only: look at the checkpoints of a run that may still be going: leaves
        its temporary folders alone, and `save` raises.
    """

    def __init__(self, workdir, *, read_only: bool = False):
        root = str(workdir)
        if "://" not in root:
            root = os.path.abspath(root)
        self._read_only = read_only
        self._latest = _manager(f"{root}/checkpoints/latest", read_only)
        with _undamaged(f"{root}/checkpoints/best", FORGET):
            self._best = _manager(f"{root}/checkpoints/best", read_only, best_fn=lambda metrics: metrics["metric"])
        self._best_metric = _best_metric(self._best)

    @property
    def latest_step(self) -> int | None:
        """Step of the newest checkpoint; None without one."""
        return self._latest.latest_step()

    @property
    def best_metric(self) -> float | None:
        """Metric of the best checkpoint; None without one."""
        return self._best_metric

    def save(self, step: int, state, *, extra: dict, metric: float | None = None) -> None:
        """Saves `state` as the latest checkpoint, and as the best if `metric` is a new high.

        A step names one state: a second save of the latest step writes nothing to
        `latest` (it may still become the best, when its metric came later).

        Args:
          step: number of finished steps, at least the latest saved one.
          state: pytree of arrays.
          extra: anything JSON can hold, such as the data position.
          metric: higher is better; ties keep the older one; None or nan is no candidate.

        Raises:
          ValueError: the step lies before the latest, or the object is read_only.
          TypeError: a leaf is no array, or extra does not fit into JSON.
        """
        if self._read_only:
            raise ValueError(
                "these checkpoints were opened with read_only=True; open them without it to save."
            )
        step, latest = int(step), self.latest_step
        if latest is not None and step < latest:
            raise ValueError(
                f"step {step} lies before the latest checkpoint, {latest}, in "
                f"{self._latest.directory}; continue from that one or use a new workdir."
            )
        arrays = _flatten(state)
        record = {
            "extra": _as_json(extra),
            "metric": None if metric is None else float(metric),
            "leaves": {path: _describe(x) for path, x in arrays.items()},
        }
        # Orbax refuses arrays without elements; the record is enough to make them anew.
        arrays = {path: x for path, x in arrays.items() if x.size}
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(arrays), record=ocp.args.JsonSave(record)
        )
        if step != latest:
            self._latest.save(step, args=args)
        metric = math.nan if metric is None else float(metric)
        if metric > (-math.inf if self._best_metric is None else self._best_metric):
            if step in self._best.all_steps():  # The same step again with a better number.
                self._best.wait_until_finished()
                self._best.delete(step)
            # force: after an interruption the best may be ahead of the latest.
            self._best.save(step, args=args, metrics={"metric": metric}, force=True)
            self._best_metric = metric

    def restore_latest(self, abstract_state):
        """Restores the newest checkpoint; saves it as the best too, if a kill cut that short.

        Args:
          abstract_state: pytree of jax.ShapeDtypeStruct with the shardings to restore
            to (without one: the first device), or of arrays.

        Returns:
          (step, state, extra), or None when nothing was saved.

        Raises:
          UserError: the checkpoint is damaged, or does not fit; names the first path that differs.
        """
        best, fix = self._best.best_step(), "delete it to start anew"
        if best is not None:
            fix += f", and copy {self._best.directory}/{best} into {self._latest.directory} too to go on from there"
        restored = _restore(self._latest, self._latest.latest_step(), abstract_state, fix)
        if restored and not self._read_only:
            step, state, record = restored
            self.save(step, state, extra=record["extra"], metric=record.get("metric"))
        return restored and (*restored[:2], restored[2]["extra"])

    def restore_best(self, abstract_state):
        """Restores the checkpoint with the highest metric; see `restore_latest`."""
        restored = _restore(self._best, self._best.best_step(), abstract_state, FORGET)
        return restored and (*restored[:2], restored[2]["extra"])

    def wait(self) -> None:
        """Blocks until everything saved is on disk; raises what a background write raised."""
        self._latest.wait_until_finished()
        self._best.wait_until_finished()

    def close(self) -> None:
        """Waits and gives back Orbax's threads, also where a write failed, which it raises."""
        with contextlib.ExitStack() as stack:
            stack.callback(self._best.close)
            stack.callback(self._latest.close)
            self.wait()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


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
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings
    )


def _manager(folder: str, read_only: bool, best_fn=None):
    return ocp.CheckpointManager(
        folder,
        item_names=("state", "record"),
        options=ocp.CheckpointManagerOptions(
            max_to_keep=1,
            best_fn=best_fn,
            keep_checkpoints_without_metrics=False,
            read_only=read_only,
            create=not read_only,
            cleanup_tmp_directories=not read_only,
        ),
    )


def _best_metric(manager) -> float | None:
    step = manager.best_step()
    return None if step is None else manager.metrics(step)["metric"]


@contextlib.contextmanager
def _undamaged(folder: str, fix: str):
    """Turns what Orbax raises over cut or missing files, errors of many types, into a UserError."""
    try:
        yield
    except (UserError, PermissionError, jax.errors.JaxRuntimeError):  # the last: out of memory
        raise
    except Exception as error:
        raise UserError(f"checkpoint {folder} is damaged; {fix}.") from error


def _restore(manager, step, abstract_state, fix: str):
    manager.wait_until_finished()
    if step is None:
        return None
    wanted, folder = _flatten(abstract(abstract_state)), f"{manager.directory}/{step}"
    stored = {path: x for path, x in wanted.items() if x.size}
    with _undamaged(folder, fix):
        record = manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore())).record
        _compare(folder, record["leaves"], wanted)
        arrays = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(stored))).state
    for path, x in wanted.items():
        if not x.size:
            arrays[path] = jax.device_put(jnp.zeros(x.shape, x.dtype), x.sharding)
    treedef = jax.tree.structure(abstract_state)
    return step, treedef.unflatten([arrays[path] for path in wanted]), record


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
                f"checkpoint {folder} has {dtype}{list(shape)} at '{path}' where the state has "
                f"{x.dtype}{list(x.shape)}; {advice}"
            )
    for path in stored:
        if path not in wanted:
            raise UserError(f"checkpoint {folder} has '{path}', which the state has not; {advice}")


def _as_json(extra: dict) -> dict:
    """A copy of `extra` that later changes by the caller cannot reach."""
    try:
        return json.loads(json.dumps(extra))
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"extra does not fit into JSON ({error}); use plain Python numbers, "
            "strings, lists and dicts."
        ) from None


def _first_device():
    return jax.sharding.SingleDeviceSharding(jax.devices()[0])
