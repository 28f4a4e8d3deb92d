"""Several processes of one run on this machine: they give the numbers of one, agree, and say what is wrong."""

import json
import os
import pathlib
import shutil
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

pytestmark = pytest.mark.slow
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
    "text.graders": "{'exact': 1.0, 'sample_graders:lower': 0.5}",
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
    "branching.tau_abs": 0.005,
    "branching.tau_rel": 0.9,
    "optimizer.warmup_steps": 0,
    "optimizer.schedule": "constant",
    "warm_start.examples": 24,
    "warm_start.steps": 10,
    "warm_start.batch": 8,
    "warm_start.eval_every": 5,
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


def start(folder: pathlib.Path, workdir: str, count: int, devices: int, only=None, own=(), cwd=None, flags=(), entry="train", **changes):
    """Starts a run in `count` processes of `devices` simulated devices; `own` flags, a tuple for each of them."""
    port, runs = free_port(), []
    environment = dict(
        os.environ, JAX_PLATFORMS="cpu", XLA_FLAGS=f"--xla_force_host_platform_device_count={devices}",
        JAX_COMPILATION_CACHE_DIR=str(folder / f"programs{count}x{devices}"), JAX_DISABLE_MOST_OPTIMIZATIONS="1",
        PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]),
    )  # fmt: skip
    for i in range(count):
        command = [sys.executable, "-m", f"launch.{entry}", f"--workdir={workdir}", *flags]
        if entry == "train":
            command += [f"--config={ROOT}/experiments/countdown.py"]
            command += [f"--config.{name}={value}" for name, value in (SIZES | changes).items()]
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


def test_a_command_of_one_process(tmp_path):
    runs, _ = start(tmp_path, "run", 2, 1, only=1, entry="export", flags=["--folder=out"])
    assert end(runs) == ([1], [""])
    assert (tmp_path / "run.1.log").read_text() == (
        "this command runs in one process; leave out --coordinator_address, --num_processes and --process_id.\n"
    )


def test_processes_started_with_different_configs(tmp_path):
    runs, _ = start(tmp_path, "run", 2, 1, own=[("--config.seed=1",), ("--config.seed=2",)])
    assert end(runs)[0] == [1, 1]
    for i in range(2):
        assert last_line(tmp_path, f"run.{i}.log") == (
            "process 1 was started with seed=2, process 0 with seed=1; start all of them with the same command and files."
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
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


# --- the same numbers -----------------------------------------------------------------------------


def story(workdir: pathlib.Path, name="metrics.jsonl") -> list[dict]:
    return [
        {k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")}
        for line in metrics.read(workdir / name)
        if line["step"]
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(folder, summary, exit statuses, workdir) of a run of one process with four devices."""
    folder = tmp_path_factory.mktemp("processes")
    runs, _ = start(folder, "one", 1, 4)
    status, output = end(runs)
    assert status == [0], (folder / "one.0.log").read_text()[-3000:]
    return folder, json.loads(output[0].splitlines()[-1])


def assert_close(actual: list[dict], wanted: list[dict]):
    assert len(actual) == len(wanted)
    for mine, theirs in zip(actual, wanted):
        assert set(mine) == set(theirs)
        for name, value in theirs.items():
            assert mine[name] == pytest.approx(value, rel=1e-3, abs=1e-6), (name, mine["step"])


@pytest.mark.slow
def test_the_run_is_worth_comparing(whole):
    lines = story(whole[0] / "one")
    assert len(lines) == SIZES["steps"] and any(line["forks"] > 0 for line in lines)
    assert sum(line["grad_norm"] > 0 for line in lines) >= 3 and len({line["length"] for line in lines}) > 3


@pytest.mark.slow
def test_two_processes_tell_the_story_of_one(whole):
    """Trained, graded, evaluated and saved by two processes, stopped by a signal to one of them, ended by one alone."""
    folder, summary = whole
    runs, _ = start(folder, "two", 2, 2)
    while len(story(folder / "two")) < 2 if (folder / "two/metrics.jsonl").exists() else runs[0].poll() is None:
        assert runs[0].poll() is None, (folder / "two.0.log").read_text()[-3000:]
        time.sleep(0.01)
    runs[1].send_signal(signal.SIGTERM)
    status, output = end(runs)
    assert status == [75, 75], (folder / "two.0.log").read_text()[-3000:]
    done = len(story(folder / "two"))
    assert 2 <= done < SIZES["steps"] and "{" not in "".join(output)
    for i in range(2):
        assert last_line(folder, f"two.{i}.log").startswith(f"SIGTERM: stopped after step {done} of 6; two/checkpoints holds")
    runs, _ = start(folder, "two", 1, 4)
    status, output = end(runs)
    assert status == [0] and json.loads(output[0].splitlines()[-1]) | {"wall_seconds": 0} == summary | {"wall_seconds": 0}
    assert_close(story(folder / "two"), story(folder / "one"))
    assert story(folder / "two", "samples.jsonl") == story(folder / "one", "samples.jsonl")


@pytest.mark.slow
def test_two_processes_write_the_files_of_one(whole):
    """To the end, continuing a run of one process; only the first prints and writes."""
    folder, summary = whole
    shutil.copytree(folder / "one", folder / "end")
    shutil.rmtree(folder / "end/checkpoints/6")  # step 3, the best, is left
    runs, _ = start(folder, "end", 2, 2)
    status, output = end(runs)
    assert status == [0, 0], (folder / "end.0.log").read_text()[-3000:]
    assert json.loads(output[0].splitlines()[-1]) | {"wall_seconds": 0} == summary | {"wall_seconds": 0}
    assert "{" not in output[1] and (folder / "end.1.log").read_text() == ""
    assert_close(story(folder / "end"), story(folder / "one"))
    assert story(folder / "end", "samples.jsonl") == story(folder / "one", "samples.jsonl")
    where = lambda name: [(tree["step"], tree["index"]) for tree in metrics.read(folder / name / "trees.jsonl")]
    assert where("end") == where("one") and [line["processes"] for line in metrics.read(folder / "end/starts.jsonl")] == [1, 2]
    for name in ("report.html", "tensorboard"):
        assert (folder / "end" / name).stat().st_mtime > (folder / "one" / name).stat().st_mtime
    assert len(list((folder / "end/tensorboard").glob("events*"))) == 2


def test_two_processes_evaluate_what_one_trained(whole):
    folder, summary = whole
    runs, _ = start(folder, "one", 2, 2, entry="evaluate")
    status, output = end(runs)
    assert status == [0, 0] and "{" not in output[1]
    scores = json.loads(output[0].splitlines()[-1])
    last = story(folder / "one")[-1]
    assert scores == {name: last[name] for name in scores if name != "step"} | dict(step=6)


def test_rows_of_each_process():
    """Each process reads what its devices hold; together they make the whole."""
    mesh = sharding.make_mesh(data=1)
    where = sharding.trees(mesh)
    assert sharding.own_rows(where, 6).tolist() == list(range(6))

    class Half:
        def __init__(self, cuts):
            self.cuts = cuts

        def addressable_devices_indices_map(self, shape):
            return dict(enumerate((cut,) for cut in self.cuts))

    assert sharding.own_rows(Half([slice(4, 6), slice(0, 2), slice(4, 6)]), 8).tolist() == [0, 1, 4, 5]
    placed = sharding.place(np.arange(12).reshape(6, 2), where, np.arange(6), 6)
    np.testing.assert_array_equal(placed, np.arange(12).reshape(6, 2))
    assert placed.sharding == where and jax.process_count() == 1
