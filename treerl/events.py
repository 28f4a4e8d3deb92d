"""The numbers of metrics.jsonl again, where people look at them: TensorBoard's event files, Weights & Biases."""

import contextlib
import errno
import importlib.util
import json
import os
import secrets
import socket
import struct
import sys
import time

import numpy as np
from etils import epath
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c
from tqdm import tqdm

from treerl.errors import UserError
from treerl.files import Growing, remote, write_text


def _warn(text: str) -> None:
    tqdm.write(text, file=sys.stderr)  # not into a bar


class EventFile:
    """Writes scalars to a new event file; a file that cannot be written never stops a run.

    TensorBoard hides the events of earlier files in the folder from the first new step on, so a
    resumed run replaces the steps that it repeats. Each step is on disk when `write` returns:
    what a checkpoint will keep is complete here. (tensorboardX's SummaryWriter queues behind a
    thread; on a full disk the thread dies and the next calls wait for ever.)

    Args:
      folder: where the files of all processes of a run lie; created if missing.
      resume_step: later steps of earlier files are hidden; -1 hides all.
    """

    def __init__(self, folder, resume_step: int):
        self._folder, self._file = os.fspath(folder), None
        try:
            there = epath.Path(self._folder)
            there.mkdir(parents=True, exist_ok=True)
            earlier = len(list(there.iterdir())) if there.exists() else 0  # in an object store it is there with its first file
            # TensorBoard reads a folder's files in the order of their names.
            name = f"events.out.tfevents.{time.time():010.0f}.{earlier:04}.{socket.gethostname()}"
            self._stored = Growing(os.path.join(self._folder, name))
            self._file = open(self._stored.path, "xb", buffering=0)
        except OSError as error:
            self._give_up(error)
        self._append(Event(file_version="brain.Event:2"))
        self._append(Event(step=resume_step + 1, session_log=SessionLog(status=SessionLog.START)))

    def write(self, step: int, values: dict) -> None:
        """Writes one step's numbers: tag -> Python, numpy or jax scalar; None is left out."""
        summary = [Summary.Value(tag=tag, simple_value=float(np.asarray(value))) for tag, value in values.items() if value is not None]
        self._append(Event(step=int(step), summary=Summary(value=summary)))

    def _append(self, event: Event) -> None:
        """Writes one record: length, its checksum, the event, its checksum."""
        if self._file is None:
            return
        event.wall_time = time.time()
        data = event.SerializeToString()
        length = struct.pack("<Q", len(data))
        checksum = lambda part: struct.pack("<I", masked_crc32c(part))
        record = length + checksum(length) + data + checksum(data)
        try:
            if self._file.write(record) < len(record):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        _warn(
            f"{self._folder} cannot be written ({error.strerror or error}): the run goes on without event files; metrics.jsonl "
            "has its numbers."
        )
        self.close()

    def upload(self) -> None:
        """Brings an object store up to date."""
        if self._file is not None:
            self._stored.upload()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._stored.upload()
        self._file = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def grouped(values: dict) -> dict:
    """Tags for TensorBoard's sections: what held-out examples measure is eval/, the rest train/."""
    return {f"{'eval' if '@' in name else 'train'}/{name}": x for name, x in values.items()}


def check_wandb(project: str) -> None:
    """Raises UserError where W&B is asked for and is not installed, or has nobody logged in."""
    if not project:
        return
    found = importlib.util.find_spec("wandb")
    if found is None or found.origin is None:  # a folder named wandb, as W&B makes them, is no package
        raise UserError(f"wandb={project!r} needs the package wandb; pip install wandb, or set wandb=''.")
    # What a run of hours wants, unless the environment says otherwise: no copy of a terminal with a bar, and an end without network.
    os.environ.setdefault("WANDB_CONSOLE", "off")
    os.environ.setdefault("WANDB_FINISH_TIMEOUT", "60")
    import wandb

    if os.environ.get("WANDB_MODE", "online") == "online":
        try:
            wandb.login(verify=False)  # without the network
        except Exception as error:
            raise UserError(
                f"wandb={project!r} has no account to write to ({_first_line(error)}); log in, or set WANDB_MODE=offline in the "
                "environment to keep the numbers on disk for wandb sync."
            ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class WandbRun:
    """The run of Weights & Biases that belongs to a workdir; what goes wrong with it never stops the training.

    The same names and steps as in metrics.jsonl. W&B's steps only go forward: a step that it has already is not sent again.
    workdir/wandb/run.json keeps the run's id and the last step sent; W&B's own files lie beside it, or in ./wandb if the
    workdir is in an object store. Without a network they are kept for `wandb sync`, but for what W&B had not written yet when a
    process was killed, 15 s by its default.

    Args:
      project: of W&B. config: nested dict. history: lines of metrics.jsonl; those that W&B lacks are sent.
    """

    def __init__(self, project: str, workdir: str, config: dict, history: list[dict]):
        self._run, self._file = None, epath.Path(workdir) / "wandb" / "run.json"
        with self._or_go_on():
            import wandb

            known = json.loads(self._file.read_text()) if self._file.exists() else dict(id=secrets.token_hex(4), step=-1)
            self._id = known["id"]
            own = dict(dir=None if remote(workdir) else workdir, name=os.path.basename(os.path.abspath(workdir)), config=config)
            start = lambda **more: wandb.init(project=project, id=self._id, resume="allow", **own, **more)
            try:
                self._run = start()
            except Exception as error:
                _warn(f"W&B cannot be reached ({_first_line(error)}): its files are kept for wandb sync.")
                wandb.teardown()  # it holds the id
                self._run = start(mode="offline")
            self._sent = self._run.starting_step - 1 if self._run.resumed else known["step"]
            for line in history:
                self.write(line["step"], {name: x for name, x in line.items() if name != "step"})
            self._note()

    def write(self, step: int, values: dict) -> None:
        """Sends one step's numbers: name -> Python scalar; None is left out."""
        with self._or_go_on():
            if self._run is not None and step > self._sent:
                self._run.log({name: x for name, x in values.items() if x is not None}, step=step)
                self._sent = step
                if not remote(self._file):
                    self._note()

    def _note(self) -> None:
        write_text(self._file, json.dumps(dict(id=self._id, step=self._sent)))

    @contextlib.contextmanager
    def _or_go_on(self):
        try:
            yield
        except Exception as error:
            _warn(f"W&B takes nothing more ({_first_line(error)}): the run goes on without it; metrics.jsonl has its numbers.")
            self._run = None

    def upload(self) -> None:
        """Brings an object store up to date."""
        with self._or_go_on():
            if self._run is not None:
                self._note()

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        with self._or_go_on():
            if self._run is not None:
                self._note()
                self._run.finish(exit_code=int(kind is not None))
