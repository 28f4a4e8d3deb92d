"""Whether the mesh, or the number of processes, changes what an experiment does.

The default Countdown experiment in float32, after a short warm start on one device, takes some steps on one device and
on eight simulated ones in every shape of eight, and as two processes with four devices each; every run in processes
of its own. The trees of each step are compared with those of one device, see `bench.devices.compare`, and so are the
metrics. A draw on the border between two tokens can fall to either side where logits differ by rounding: the suite
says by how much they do (drift), and how far apart the two tokens' log-probs are (first_logit_gap). The model's two
key heads allow two devices along tensor; four and eight are tried with eight heads.
"""

import dataclasses
import functools
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile

import numpy as np

from treerl import tree as T
from treerl.bench import measure
from treerl.bench.devices import compare

ROOT = pathlib.Path(__file__).resolve().parents[2]
WIDE = ("model.heads=8", "model.kv_heads=8")  # for more devices along tensor
UNLIKE = ("seconds", "tokens_per_second", "bins")  # metrics that are a machine's, or a shard's


def defaults() -> dict:
    """Training steps, updates of the warm start, shapes of the mesh, and other fields of the default experiment."""
    return dict(
        steps=20, warm_start=100, changes=(),
        shapes=((8, 1, 1), (4, 2, 1), (2, 4, 1), (1, 8, 1), (4, 1, 2), (2, 2, 2), (1, 4, 2)),
        shapes_heads8=((2, 1, 4), (1, 2, 4), (1, 1, 8)),
        two_processes=((4, 2, 1),),
    )  # fmt: skip


def rows(**sizes):
    """Yields rows of the suite; `sizes` replace `defaults()`."""
    sizes = {**defaults(), **sizes}
    row = functools.partial(measure.row, "meshes", shapes=sizes)
    with tempfile.TemporaryDirectory() as folder:
        narrow, wide = ("", (), sizes["shapes"]), ("heads8.", WIDE, sizes["shapes_heads8"])
        for kind, changes, shapes in (narrow, wide) if wide[2] else (narrow,):
            started = os.path.join(folder, kind + "start")
            flags = [f"--config.{change}" for change in (*changes, *sizes["changes"])]
            warm = ["--config.steps=0", f"--config.warm_start.steps={sizes['warm_start']}", f"--workdir={started}"]
            _wait(_start(["-m", "launch.train", f"--config={ROOT}/experiments/countdown.py", *flags, *warm], 1))
            run = functools.partial(_run, folder, started, sizes["steps"])
            wanted = run((1, 1, 1), 1)
            cases = [(kind + "x".join(map(str, shape)), shape, 1) for shape in shapes]
            if not kind:
                cases += [("two_processes." + "x".join(map(str, shape)), shape, 2) for shape in sizes["two_processes"]]
            for name, shape, processes in cases:
                found = run(shape, processes)
                trees = [compare(a, b) for a, b in zip(wanted["trees"], found["trees"])]
                same = [bool(x["same"].all()) for x in trees]
                until = same.index(False) if False in same else len(same)
                yield row(f"{name}.first_step", trees[0]["same"].mean(), "of the trees, token for token")
                yield row(f"{name}.same_steps", until, "steps before a tree differs")
                yield row(f"{name}.metrics", _difference(wanted, found, until), "largest relative difference before that")
                yield row(f"{name}.all_metrics", _difference(wanted, found, len(same)), "largest relative difference of all steps")
                yield row(f"{name}.drift", max(x["drift"] for x in trees), "nats, largest difference of log-probs before that")
                gaps = [gap for x in trees for gap in x["gap"]]
                if gaps:
                    yield row(f"{name}.first_logit_gap", gaps[0], "nats, of the two tokens of the first difference")


def _difference(wanted: dict, found: dict, steps: int) -> float:
    """Largest relative difference of any metric in the first steps, of those that are not rounding themselves."""
    largest = 0.0
    for a, b in list(zip(wanted["metrics"], found["metrics"]))[:steps]:
        for name, value in a.items():
            if name not in UNLIKE and not name.startswith("logp_drift"):
                largest = max(largest, abs(value - b[name]) / max(abs(value), 1e-3))
    return largest


def _start(arguments: list[str], devices: int) -> subprocess.Popen:
    environment = os.environ | dict(
        JAX_PLATFORMS="cpu", XLA_FLAGS=f"--xla_force_host_platform_device_count={devices}", JAX_ENABLE_COMPILATION_CACHE="0",
        PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    )  # fmt: skip
    return subprocess.Popen([sys.executable, *arguments], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def _wait(run: subprocess.Popen) -> None:
    _, errors = run.communicate()
    if run.returncode:
        raise RuntimeError(f"meshes suite: a run ended with status {run.returncode}:\n{errors[-3000:]}")


def _run(folder: str, started: str, steps: int, shape, processes: int) -> dict:
    """What a run in processes of its own finds: metrics and trees of every step."""
    with socket.socket() as server:
        server.bind(("localhost", 0))
        port = server.getsockname()[1]
    out = os.path.join(folder, "found")
    what = dict(started=started, steps=steps, shape=shape, out=out, processes=processes, port=port)
    devices = int(np.prod(shape)) // processes
    runs = [_start(["-m", "treerl.bench.meshes", json.dumps(what | dict(number=i))], devices) for i in range(processes)]
    for run in runs:
        _wait(run)
    with open(out + ".json", encoding="utf-8") as file:
        metrics = json.load(file)
    arrays = np.load(out + ".npz")
    fields = [field.name for field in dataclasses.fields(T.Tree)]  # no turns: Countdown is text
    trees = [T.Tree(**{name: arrays.get(f"{i}/{name}") for name in fields}) for i in range(steps)]
    return dict(metrics=metrics, trees=trees)


def child(what: dict) -> None:
    """One process of a run: takes the steps; the first writes what they gave."""
    import jax
    from ml_collections import ConfigDict

    from treerl import metrics, processes
    from treerl.checkpoint import Checkpoints
    from treerl.experiment import Experiment
    from treerl.workdir import read_config

    if what["processes"] > 1:
        processes.start(f"localhost:{what['port']}", what["processes"], what["number"])
    config = ConfigDict(read_config(what["started"]))
    config.samples_every = 0
    config.mesh = dict(zip(("data", "fsdp", "tensor"), what["shape"]))
    experiment = Experiment(config)
    with Checkpoints(what["started"], read_only=True) as checkpoints:
        _, state, _ = checkpoints.restore_latest(experiment.state_shape())
    stream, numbers, arrays = experiment.stream(), [], {}
    for i in range(what["steps"]):
        prompts = experiment.prompts(*stream.examples(i * config.sampler.prompts, config.sampler.prompts))
        sampled = experiment._gather(experiment._sample_half(state, prompts, experiment.knobs).tree)
        arrays |= {f"{i}/{name}": x for name, x in jax.device_get(sampled).items() if x is not None}
        state, values = experiment.train_step(state, prompts, experiment.knobs)
        numbers.append(metrics.plain(jax.device_get(values)))
    if processes.is_first():
        np.savez(what["out"] + ".npz", **arrays)
        with open(what["out"] + ".json", "w", encoding="utf-8") as file:
            json.dump(numbers, file)


if __name__ == "__main__":
    child(json.loads(sys.argv[1]))
