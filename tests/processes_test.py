"""Several processes of one run on this machine: they give the numbers of one, agree, and say what is wrong."""
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from treerl import metrics, processes, sharding
from treerl.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parent.parent
SIZES = {  # sums of one digit as characters, graded on the host
    "steps": 6,
    "checkpoint_every": 2,
    "samples_every": 3,
    "task.name": "addition",
    "task.train_size": 24,
    "task.heldout_size": 8,
    "text.chat": False,
    "text.options": "{'digits': 1}",
    "text.workers": 1,
    "model.layers": 1,
    "model.width": 16,
    "model.heads": 2,
    "model.kv_heads": 1,
    "model.head_dim": 8,
    "model.hidden": 32,
    "sampler.prompts": 8,
    "sampler.slots": 4,
    "sampler.prompt_length": 16,
    "sampler.answer_length": 12,
    "learner.bin_tokens": 32,
    "optimizer.warmup_steps": 0,
    "optimizer.schedule": "constant",
    "warm_start.examples": 24,
    "warm_start.steps": 40,
    "warm_start.batch": 8,
    "warm_start.eval_every": 20,
    "warm_start.learning_rate": 0.01,
    "evaluation.every": 3,
    "evaluation.examples": 8,
    "evaluation.batch": 8,
    "evaluation.samples": 3,
}


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


def start(folder: pathlib.Path, workdir: str, count: int, devices: int, only=None, own=(), cwd=None, flags=(), **changes):
    """Starts a run in `count` processes of `devices` simulated devices; `own` flags, a tuple for each of them."""
    port, runs = free_port(), []
    environment = dict(
        os.environ, JAX_PLATFORMS="cpu", XLA_FLAGS=f"--xla_force_host_platform_device_count={devices}",
        JAX_COMPILATION_CACHE_DIR=str(folder / f"programs{count}x{devices}"), JAX_DISABLE_MOST_OPTIMIZATIONS="1",
        PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    )  # fmt: skip
    for i in range(count):
        command = [sys.executable, "-m", "launch.train", f"--config={ROOT}/experiments/countdown.py", f"--workdir={workdir}"]
        command += [f"--config.{name}={value}" for name, value in (SIZES | changes).items()] + list(flags)
        if count > 1:
            command += [f"--coordinator_address=localhost:{port}", f"--num_processes={count}", f"--process_id={i}"]
        command += own[i] if own else ()
        if only is None or i == only:
            where = dict(cwd=cwd[i] if cwd else folder, env=environment, text=True)
            with open(folder / f"{pathlib.Path(workdir).name}.{i}.log", "a") as log:
                runs.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, **where))
    return runs, port


def end(runs) -> tuple[list[int], list[str]]:
    """Exit statuses and what was printed on standard output."""
    output = [run.communicate(timeout=300)[0] for run in runs]
    return [run.returncode for run in runs], output


def last_line(folder: pathlib.Path, name: str) -> str:
    lines = (folder / name).read_text().splitlines()
    return next(line for line in reversed(lines) if line.strip() and "Gloo" not in line)


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, 1])
def test_a_coordinator_that_does_not_gather_all(tmp_path, number):
    """Nobody listens, or nobody else comes: a sentence with the address, and no stack of frames."""
    runs, port = start(tmp_path, "run", 2, 1, only=number, flags=["--coordinator_timeout=3"])
    status, output = end(runs)
    assert (status, output) == ([1], [""])
    assert (tmp_path / f"run.{number}.log").read_text() == (
        f"the coordinator at localhost:{port} did not gather all processes within 3 s; check that each of them was "
        "started and reaches that address, or raise --coordinator_timeout.\n"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "given, sentence",
    [
        (("a:1", 2, None), "--process_id is missing; give --coordinator_address, --num_processes and --process_id, or none."),
        (("a", 2, 0), "--coordinator_address=a has no port; write HOST:PORT of the first process."),
        (("a:1", 2, 2), "--process_id=2 is not in 0 .. 1; give each of the --num_processes=2 its own."),
    ],
)
def test_flags_that_cannot_be(given, sentence):
    with pytest.raises(UserError) as error:
        processes.start(*given)
    assert str(error.value) == sentence


def test_processes_started_with_different_configs(tmp_path):
    runs, _ = start(tmp_path, "run", 2, 1, own=[("--config.seed=1",), ("--config.seed=2",)])
    assert end(runs)[0] == [1, 1]
    for i in range(2):
        assert last_line(tmp_path, f"run.{i}.log") == (
            "process 1 was started with seed=2, process 0 with seed=1; start all of them with the same command and files."
        )
    assert not (tmp_path / "run").exists()


def test_a_workdir_that_is_not_shared(tmp_path):
    places = [tmp_path / "one", tmp_path / "other"]
    for place in places:
        place.mkdir()
    runs, _ = start(tmp_path, "run", 2, 1, cwd=places)
    assert end(runs)[0] == [1, 1]
    for i in range(2):
        assert last_line(tmp_path, f"run.{i}.log") == (
            "workdir=run is not the same folder everywhere: process 1 finds no config.json of process 0 there; give a "
            "--workdir on a file system that all hosts share, or a gs:// path."
        )


# --- who belongs together ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "variables, options",
    [
        ({}, None),
        (dict(SLURM_STEP_NUM_TASKS="1", SLURM_STEP_TASKS_PER_NODE="1"), None),
        (dict(SLURM_STEP_NUM_TASKS="2", SLURM_STEP_TASKS_PER_NODE="1(x2)", SLURM_GPUS_ON_NODE="4"), dict(local_device_ids=[0, 1, 2, 3])),
        (dict(SLURM_STEP_NUM_TASKS="2", SLURM_STEP_TASKS_PER_NODE="1(x2)", CUDA_VISIBLE_DEVICES="2,5"), dict(local_device_ids=[0, 1])),
        (dict(SLURM_STEP_NUM_TASKS="8", SLURM_STEP_TASKS_PER_NODE="4(x2)", SLURM_GPUS_ON_NODE="4"), {}),
        (dict(OMPI_COMM_WORLD_SIZE="2"), {}),
    ],
)
def test_what_is_left_to_jax(variables, options, monkeypatch):
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(processes.os.path, "exists", lambda path: False)
    assert processes._surroundings() == options


def test_a_tpu_vm_is_left_to_jax(monkeypatch):
    monkeypatch.setattr(processes.os.path, "exists", lambda path: path == "/dev/accel0")
    for installed in (True, False):
        monkeypatch.setattr(processes.importlib.util, "find_spec", lambda name: installed or None)
        assert processes._surroundings() == ({} if installed else None)
