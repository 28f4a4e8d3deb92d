"""One training step over more and more devices, each with as many trees as before (weak scaling).

Trees are spread over data and fsdp. Along tensor every device works on all trees, with its part of the heads and of
the hidden width: there the trees are as many, and the share of a device shrinks by the sizes that are cut.

On an accelerator steps are timed, on one device and on all. Everywhere the compiler says how much a device computes
and how many bytes it moves (what a loop repeats is counted once).
"""

import functools

import jax
import numpy as np

from treerl import profiling, sharding
from treerl.bench import measure
from treerl.bench.step import build, defaults as step_defaults, make_config
from treerl.models.presets import PRESETS


def defaults() -> dict:
    """Sizes for this machine; prompts are those of one device."""
    return step_defaults() | dict(axes=("data", "fsdp", "tensor"))


def timed(program, carry: tuple, repeats: int) -> float:
    """Median seconds of a step from (state, prompts, knobs); the first does not count."""

    def run():
        nonlocal carry
        state, metrics = program(*carry)
        carry = state, *carry[1:]
        return metrics

    return measure.alternate(dict(step=run), repeats)["step"].median


def rows(**sizes):
    """Yields rows of the suite; `sizes` replace `defaults()`."""
    sizes = {**defaults(), **sizes}
    row = functools.partial(measure.row, "scaling", shapes=sizes)
    every, model = jax.devices(), PRESETS[sizes["preset"]]
    counts = [1, len(every)] if measure.on_accelerator() else [n for n in (1, 2, 4, 8) if n <= len(every)]
    meshes = {"one": dict(data=1)}
    for axis in sizes["axes"]:
        for n in counts[1:]:
            if axis != "tensor" or model["kv_heads"] % n == 0:
                meshes[f"{axis}{n}"] = dict(dict(data=1), **{axis: n})
    first = None
    for name, shape in meshes.items():
        n = int(np.prod(list(shape.values())))
        mesh = sharding.make_mesh(**shape, devices=every[:n])
        built = build(make_config(sizes | dict(prompts=sizes["prompts"] * n)), model["vocab"], mesh)
        program = built.step.lower(*built.shapes).compile()
        cost = program.cost_analysis()
        found = dict(flops=cost["flops"], bytes=cost["bytes accessed"])
        if measure.on_accelerator():
            found["seconds"] = timed(program, built.arguments(), sizes["repeats"])
            found["peak"] = profiling.memory(program).total
        first = first or found
        for what, unit in dict(flops="FLOP a device", bytes="bytes a device", seconds="s a step", peak="bytes").items():
            if what in found:
                yield row(f"{name}.{what}", found[what], unit, versus=f"one.{what}", ratio=found[what] / first[what])
        if "seconds" in found:
            ratio = n * first["seconds"] / found["seconds"]
            yield row(f"{name}.throughput", n * sizes["prompts"] / found["seconds"], "trees/s", versus="one.throughput", ratio=ratio)
