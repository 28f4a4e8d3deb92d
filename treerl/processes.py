"""Several processes, one program: how they find each other, and what they have to agree on.

Every process runs the same host loop over the same global arrays, one a machine as a rule, so a decision that not all
take alike (to stop, to save, whether a run is new) leaves some waiting for the others for ever. Such
decisions go through `first_decides` and `gather`; files are written by the first process alone.
"""

import importlib.util
import json
import os
import re
import sys
import threading
import time

import jax
import numpy as np
from jax.experimental import multihost_utils

from treerl.errors import UserError

HEARTBEAT_SECONDS = 60  # without a sign of life, then a process counts as dead and the others end


def start(address: str | None = None, count: int | None = None, own: int | None = None, *, seconds: int = 300) -> None:
    """Joins the processes of a run; to be called before anything else asks JAX for devices.

    Without arguments Slurm, Open MPI and TPU VMs say themselves who belongs together; anywhere else, and where
    there is one process, nothing happens.

    Args:
      address: HOST:PORT of the first process. count: of all processes. own: this one's number, from 0.
      seconds: to wait for all of them; then this process ends with status 1 and a sentence that names the address.

    Raises:
      UserError: a part of the three is missing or cannot be.
    """
    given = {"coordinator_address": address, "num_processes": count, "process_id": own}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == 3:
        options = _surroundings()
        if options is None:
            return
        where = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("TPU_WORKER_HOSTNAMES") or "the first host"
    elif missing:
        raise UserError(f"--{missing[0]} is missing; give --coordinator_address, --num_processes and --process_id, or none.")
    elif not re.fullmatch(r".+:\d{1,5}", address):
        raise UserError(f"--coordinator_address={address} has no port; write HOST:PORT of the first process.")
    elif not 0 <= own < count:
        raise UserError(f"--process_id={own} is not in 0 .. {count - 1}; give each of the --num_processes={count} its own.")
    else:
        options, where = given, address
    # JAX aborts the process with a stack of C++ frames; this ends it with a sentence before.
    timer = threading.Timer(seconds, _nobody_there, (where, seconds))
    timer.daemon = True
    timer.start()
    limits = dict(initialization_timeout=seconds + 60, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    try:
        jax.distributed.initialize(**options, **limits)
    except ValueError:
        if not missing:  # on a TPU VM that knows of no others
            raise
    finally:
        timer.cancel()


def _surroundings() -> dict | None:
    """Arguments of `jax.distributed.initialize` where it finds the processes itself, None where there is but one."""
    environment = os.environ
    if int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        if not re.fullmatch(r"1(\(x\d+\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", "")):
            return {}  # a process a GPU, which JAX takes for granted
        visible = environment.get("CUDA_VISIBLE_DEVICES", "")
        gpus = len(visible.split(",")) if visible else int(environment.get("SLURM_GPUS_ON_NODE", 1))
        return dict(local_device_ids=list(range(gpus)))
    if int(environment.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return {}
    chip = os.path.exists("/dev/accel0") or os.path.exists("/dev/vfio/0")
    return {} if chip and importlib.util.find_spec("libtpu") else None


def _nobody_there(where: str, seconds: int) -> None:
    text = (
        f"the coordinator at {where} did not gather all processes within {seconds} s; check that each of them was "
        "started and reaches that address, or raise --coordinator_timeout.\n"
    )
    os.write(2, text.encode())
    os._exit(1)


def several() -> bool:
    """Whether this process was started with others."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def stop_hard(status: int) -> None:
    """Ends this process without the goodbyes of a normal exit, in which it waits for the others."""
    sys.stdout.flush()
    sys.stderr.flush()
    if is_first():
        time.sleep(1)  # JAX ends the others with it; those that met the same error say so first
    os._exit(status)


def number() -> int:
    """Of this process, from 0."""
    return jax.process_index()


def is_first() -> bool:
    """Whether this process writes the files and speaks for all."""
    return number() == 0


def gather(value: int | float) -> list:
    """A number of every process, in their order, known to all."""
    if jax.process_count() == 1:
        return [value]
    return multihost_utils.process_allgather(np.asarray(value)).tolist()


def first_decides(value: bool) -> bool:
    """What the first process found; all of them ask together."""
    return bool(gather(bool(value))[0])


def wait_for_all(what: str) -> None:
    """Returns once all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def check_same(values: dict) -> None:
    """Compares what the processes were started with.

    Args:
      values: name -> anything JSON can hold.

    Raises:
      UserError: in every process, if any two differ; names the process and the first value that does.
    """
    if jax.process_count() == 1:
        return
    text = json.dumps(values, sort_keys=True).encode()
    padded = np.zeros(max(gather(len(text))), np.uint8)
    padded[: len(text)] = np.frombuffer(text, np.uint8)
    first, *others = (json.loads(bytes(x).rstrip(b"\0")) for x in multihost_utils.process_allgather(padded))
    for i, other in enumerate(others, 1):
        for name in sorted(first | other):
            if first.get(name) != other.get(name):
                raise UserError(
                    f"process {i} was started with {name}={other.get(name)!r}, process 0 with "
                    f"{name}={first.get(name)!r}; start all of them with the same command and files."
                )
