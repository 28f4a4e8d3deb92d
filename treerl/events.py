"""TensorBoard event files: the numbers of metrics.jsonl again, for `tensorboard --logdir`."""

import errno
import os
import socket
import struct
import time

import numpy as np
from absl import logging
from etils import epath
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c

from treerl.files import Growing


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
        summary = [
            Summary.Value(tag=tag, simple_value=float(np.asarray(value)))
            for tag, value in values.items()
            if value is not None
        ]
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
        logging.warning(
            "%s cannot be written (%s): the run goes on without event files; metrics.jsonl has its numbers.",
            self._folder, error.strerror or error,
        )  # fmt: skip
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
