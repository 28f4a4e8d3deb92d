"""How long saving a train state keeps the training thread: asynchronously, against a save that is waited for.

The state is that of a model with Adam's float32 moments, random, laid out as training lays it out. TMPDIR says where
it is written; a state at a time, and the last one restored and compared, byte for byte.
"""

import functools
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

from treerl import sharding, step as S
from treerl.bench import measure
from treerl.bench.step import build, defaults as step_defaults, make_config
from treerl.checkpoint import Checkpoints
from treerl.models.presets import PRESETS


def defaults() -> dict:
    """Sizes for this machine: 18.5 GB on an accelerator, 0.2 GB on a CPU."""
    if measure.on_accelerator():
        return dict(preset="qwen2.5-1.5b", layers=28, repeats=3)
    return dict(preset="smollm2-135m", layers=2, repeats=3)


def rows(**sizes):
    """Yields rows of the suite; `sizes` replace `defaults()`."""
    sizes = {**defaults(), **sizes}
    config = make_config(step_defaults() | sizes)
    config.model.layers = sizes["layers"]
    mesh = sharding.make_mesh(data=1, fsdp=-1)
    config.sampler.prompts = mesh.size
    built = build(config, PRESETS[sizes["preset"]]["vocab"], mesh)
    state, shardings = built.arguments()[0], S.state_shardings(built.fns)
    noise = lambda x: x if x.ndim == 0 else x + jax.random.normal(jax.random.key(x.size), x.shape).astype(x.dtype)
    state = state.replace(opt_state=jax.jit(lambda t: jax.tree.map(noise, t), out_shardings=shardings.opt_state)(state.opt_state))
    row = functools.partial(measure.row, "checkpoint", shapes=sizes)
    size = measure.bytes_of(state)
    yield row("state", size, "bytes")
    fresh = jax.jit(functools.partial(jax.tree.map, jnp.copy), out_shardings=shardings)

    def copy():
        new = jax.block_until_ready(fresh(state))  # an array that was copied keeps its copy
        begin = time.perf_counter()
        jax.device_get(new)
        return time.perf_counter() - begin

    spent = {name: [] for name in ("copy", "whole", "blocked")}
    with tempfile.TemporaryDirectory() as folder, Checkpoints(folder) as checkpoints:
        for turn in range(1 + sizes["repeats"]):  # the first, which opens files and starts threads, does not count
            spent["copy"].append(copy())
            for number, kind in ((2 * turn + 1, "whole"), (2 * turn + 2, "blocked")):
                new = jax.block_until_ready(fresh(state))
                begin = time.perf_counter()
                checkpoints.save(number, new, extra={})
                called = time.perf_counter() - begin
                del new
                checkpoints.wait()
                spent[kind].append(called if kind == "blocked" else time.perf_counter() - begin)
        median = {name: statistics.median(times[1:]) for name, times in spent.items()}
        yield row("copy", median["copy"], "s, device to host")
        yield row("synchronous", median["whole"], "s, save and wait")
        yield row(
            "asynchronous", median["blocked"], "s until the thread goes on", versus="synchronous", ratio=median["blocked"] / median["whole"]
        )
        yield row("asynchronous_over_copy", median["blocked"], "s", versus="copy", ratio=median["blocked"] / median["copy"])
        yield row("speed", size / median["whole"] / 1e9, "GB/s to disk")
        begin = time.perf_counter()
        _, restored, _ = checkpoints.restore_latest(built.shapes[0])
        yield row("restore", time.perf_counter() - begin, "s")
        same = [np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(restored))]
        yield row("restored_equal", float(all(same)) * size, "bytes that are the same")
