"""One training step over more and more devices, each with as many trees as before (weak scaling).

Trees are spread over data and fsdp. Along tensor every device works on all trees, with its part of the heads and of the hidden
width. On an accelerator the whole step and its sampler are timed, and what the step takes beside the sampler is called the
learner's (grading and credit are a thousandth of it); the meshes of all devices come first. Efficiency is the tokens a second of
a device over those of one alone; a model that one device cannot hold has none. The compiler says everywhere what memory a
device needs, how much it computes and how many bytes it moves (what a loop repeats is counted once), and which are the largest
results that devices send each other.

`same_trees`: a small model in float32 grows the trees on every mesh that it grows on one device.
"""

import functools
from collections.abc import Callable

import jax
from jax.sharding import Mesh

from treerl import profiling, sharding
from treerl.bench import measure, peers, shapes
from treerl.bench.devices import compare
from treerl.bench.step import SMALL, build, defaults as step_defaults, make_config, make_halves
from treerl.models.presets import PRESETS

COUNTS = (8, 4, 2)  # of devices, beside one and all


def defaults() -> dict:
    """Sizes for this machine; prompts are those of one device. large: of a model that needs several; None: without."""
    large = shapes.sizes("D", remat="layers", bin_tokens=2560, bins_per_step=1, moment_dtype="bfloat16") | dict(prompts=4)
    return step_defaults() | dict(axes=("data", "fsdp", "tensor"), large=large if measure.on_accelerator() else None, small=SMALL)


def along(axis: str, count: int) -> Mesh:
    """A mesh of the first `count` devices along one axis."""
    return sharding.make_mesh(**{"data": 1, axis: count}, devices=jax.devices()[:count])


def meshes(axes: tuple[str, ...], preset: str) -> dict[str, Mesh]:
    """Name -> mesh of several devices along one axis, those of all devices first."""
    every, kv_heads = jax.device_count(), PRESETS[preset]["kv_heads"]
    counts = sorted({n for n in COUNTS if n <= every} | {every} - {1}, reverse=True)
    return {f"{axis}{n}": along(axis, n) for n in counts for axis in axes if axis != "tensor" or kv_heads % n == 0}


def timed(program: Callable, carry: tuple, repeats: int) -> tuple[float, dict, tuple]:
    """Median seconds of a step from (state, prompts, knobs), the first left out; its last metrics; and what goes on."""

    def run():
        nonlocal carry, metrics
        state, metrics = program(*carry)
        carry = state, *carry[1:]
        return metrics

    metrics = {}
    return measure.alternate(dict(step=run), repeats)["step"].median, metrics, carry


def measured(sizes: dict, mesh) -> dict:
    """What a step on a mesh takes: name -> value, by the units of UNITS, and `sent`, the largest `profiling.Collective`s."""
    config = make_config(sizes | dict(prompts=sizes["prompts"] * mesh.size))
    built = build(config, PRESETS[sizes["preset"]]["vocab"], mesh)
    compiled = lambda jitted: jitted.lower(*built.shapes).compile()
    program = compiled(built.step)
    cost = program.cost_analysis()
    found = dict(
        flops=cost["flops"], bytes=cost["bytes accessed"], memory=profiling.memory(program).total,
        sent=profiling.collectives(program, mesh)[:3],
    )  # fmt: skip
    if not measure.on_accelerator():
        return found
    seconds, metrics, carry = timed(program, built.arguments(), sizes["repeats"])
    del program
    sampling = compiled(make_halves(built, mesh)[0])
    sampler = measure.alternate(dict(sampler=lambda: sampling(*carry)), sizes["repeats"])["sampler"].median
    tokens = float(metrics["sampled_tokens"])
    return found | dict(step=seconds, tokens=tokens / seconds, sampler=tokens / sampler, learner=tokens / (seconds - sampler))


UNITS = dict(
    flops="FLOP a device", bytes="bytes a device", memory="bytes a device", step="s", tokens="tokens/s",
    sampler="tokens/s, of the sampler's time", learner="tokens/s, of the rest of the step",
)  # fmt: skip


def grown(sizes: dict, mesh):
    """Trees of a config's first step, NumPy, the same prompts and parameters on every mesh."""
    built = build(make_config(sizes), PRESETS[sizes["preset"]]["vocab"], mesh)
    return jax.device_get(make_halves(built, mesh)[0](*built.arguments()))


def rows(**sizes):
    """Yields rows of the suite; `sizes` replace `defaults()`."""
    sizes = {**defaults(), **sizes}
    own = {k: v for k, v in sizes.items() if k not in ("large", "small")}
    large = sizes["large"] and own | dict(sizes["large"], axes=[axis for axis in sizes["axes"] if axis != "data"])
    one, small = {"one": along("data", 1)}, functools.partial(measure.row, "scaling", shapes=sizes["small"])
    wanted = grown(sizes["small"], one["one"])
    for name, mesh in meshes(own["axes"], sizes["small"]["preset"]).items():
        same = compare(wanted, grown(sizes["small"], mesh))["same"]
        yield small(f"{name}.same_trees", same.mean(), "of the trees, token for token")
    for prefix, part in {"": own, "large.": large}.items():
        if part is None:
            continue
        row, first = functools.partial(measure.row, "scaling", shapes=part), {}
        for name, mesh in (({} if prefix else one) | meshes(part["axes"], part["preset"])).items():
            try:
                found = measured(part, mesh)
            except jax.errors.JaxRuntimeError as error:
                peers.left_out(f"{prefix}{name}", error)
                continue
            first = found if name == "one" else first
            for what, unit in UNITS.items():
                if what in found:
                    against = dict(versus=f"one.{what}", ratio=found[what] / first[what]) if what in first else {}
                    yield row(f"{prefix}{name}.{what}", found[what], unit, **against)
            if "tokens" in first:
                yield row(f"{prefix}{name}.efficiency", found["tokens"] / mesh.size / first["tokens"], "of one device's tokens a second")
            for number, c in enumerate(found["sent"], 1):
                what = f"bytes a device, {c.kind} of {c.shape} over {c.axes or 'none'}, {c.depth} loops deep: {c.name[-120:]}"
                yield row(f"{prefix}{name}.sent_{number}", c.bytes, what)
