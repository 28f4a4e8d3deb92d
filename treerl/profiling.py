"""What steps cost: the memory that they will take, and traces of what the device did when."""

import contextlib
import math
import re
from typing import NamedTuple

import jax
import numpy as np
from absl import logging

from treerl.errors import UserError


def parse_span(text: str | None, steps: int) -> tuple[int, int] | None:
    """Parses --profile, "FIRST:LAST", as (first, last), both included; None stays None.

    Raises:
      UserError: it is no span of steps, or ends after `steps`, the run's last.
    """
    if text is None:
        return None
    match = re.fullmatch(r"([0-9]{1,9}):([0-9]{1,9})", text)
    first, last = map(int, match.groups()) if match else (0, 0)
    if not 1 <= first <= last:
        raise UserError(f"--profile={text!r} is no span of steps; write the first and the last of them, such as --profile=3:5.")
    if last > steps:
        raise UserError(f"--profile={text!r} ends after the run's last step; choose steps from 1 to {steps}.")
    return first, last


class Trace:
    """Traces the steps of a span with jax.profiler; without a span it does nothing.

    Args:
      folder: where the trace goes, as plugins/profile/TIME/ in it.
      span: (first, last) step, both included, or None.
      start: last step that is done already; a span that lies before is only warned about, so that
        a run can be started again with the same flags.
    """

    def __init__(self, folder: str, span: tuple[int, int] | None, start: int):
        self._folder, self._span, self._running = folder, span or (0, 0), False
        if span and span[1] <= start:
            logging.warning("--profile=%d:%d lies before step %d, where this run goes on: nothing is traced.", *span, start + 1)

    @contextlib.contextmanager
    def step(self, number: int):
        """Around all that belongs to one step, the wait for its results included."""
        first, last = self._span
        if first <= number <= last and not self._running:
            jax.profiler.start_trace(self._folder)
            self._running = True
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield
        if number >= last:
            self.close()

    def close(self) -> None:
        """Writes what was traced."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


TPU_BYTES = {"TPU v4": 32 * 2**30, "TPU v5 lite": 16 * 2**30, "TPU v5": 95 * 2**30, "TPU v6 lite": 32 * 2**30}  # of a chip


class Memory(NamedTuple):
    """Bytes on each device."""

    total: int  # arguments, results and temporaries, donated arguments once
    temporary: int
    limit: int | None  # what the device lets JAX have; None where it does not say

    def __str__(self):
        there = f" of {self.limit / 1e9:.1f}" if self.limit else ""
        return f"{self.total / 1e9:.2f}{there} GB on each device, {self.temporary / 1e9:.2f} GB of it temporaries"


def total_bytes(plan) -> int:
    """Of a program's `memory_analysis`: arguments, results and temporaries, donated arguments once."""
    return plan.argument_size_in_bytes + plan.output_size_in_bytes + plan.temp_size_in_bytes - plan.alias_size_in_bytes


def memory(*programs) -> Memory:
    """What the greediest of some compiled programs (`jax.stages.Compiled`) takes, by the compiler's own plan."""
    plans = [program.memory_analysis() for program in programs]
    found = [(total_bytes(plan), plan.temp_size_in_bytes) for plan in plans]
    device = next(iter(jax.tree.leaves(programs[0].input_shardings)[0].device_set))
    if device.platform == "tpu" and device not in jax.devices():  # a described one
        return Memory(*max(found), TPU_BYTES.get(device.device_kind))
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    return Memory(*max(found), limit)


SAVE_MEMORY = (
    "lower learner.bins_per_step, learner.vocab_chunk, sampler.prompts or sampler.slots, set learner.remat=layers, "
    "model.dtype=bfloat16 or model.lora_rank=16, spread over more devices with mesh.fsdp, or, on a GPU that nothing else "
    "uses, set XLA_PYTHON_CLIENT_MEM_FRACTION=0.95."
)


def check_memory(plan: Memory) -> None:
    """Raises UserError if a step will not fit."""
    if plan.limit and plan.total > plan.limit:
        raise UserError(f"a step needs {plan}, which does not fit; {SAVE_MEMORY}")


@contextlib.contextmanager
def out_of_memory(fix: str = SAVE_MEMORY):
    """Turns a device's lack of memory into a UserError."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        told = str(error).partition("RESOURCE_EXHAUSTED")[2].strip(": ").partition("\n")[0].rstrip(".")[:200]
        counted = f" ({told})" if re.search(r"\d", told) else ""
        raise UserError(f"a device ran out of memory{counted}; {fix}") from error


class Collective(NamedTuple):
    """One communication between devices in a compiled program."""

    kind: str  # all-gather, all-reduce, reduce-scatter, all-to-all, collective-permute
    shape: str  # of the result on each device, as XLA writes it: f32[8,128]; of several results the largest
    bytes: int  # of all results on each device
    axes: str  # mesh axes that it goes over, such as data x fsdp; "" where they cannot be told
    name: str  # where in the source it comes from
    depth: int  # loops around it


_KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
_SIZES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}


def collectives(program, mesh=None) -> list[Collective]:
    """The collectives in the text of a compiled program (`jax.stages.Compiled`), the largest first."""
    found = []
    for line in program.as_text().splitlines():
        match = re.search(rf"= (.*?) ({_KINDS})(?:-start)?\(", line)
        if not match:
            continue
        results = []
        for dtype, sizes in re.findall(r"(\w+)\[([\d,]*)\]", match[1]):
            count = math.prod(int(size) for size in sizes.split(",") if size)
            results.append((count * _SIZES.get(dtype, 1), f"{dtype}[{sizes}]"))
        if "-start(" in line and len(results) > 1:  # the operands stand beside the results
            results = results[len(results) // 2 :]
        name = re.search(r'op_name="([^"]*)"', line)
        name = name[1] if name else ""
        groups = _groups(line)
        axes = _axes(groups, mesh) if mesh is not None and groups else ""
        found.append(Collective(match[2], max(results)[1], sum(x for x, _ in results), axes, name, name.count("while/body")))
    return sorted(found, key=lambda c: -c.bytes)


def _groups(line: str) -> list[list[int]] | None:
    """Devices that talk to each other, numbered as in the program; XLA has three ways to write them."""
    numbers = lambda text: [int(x) for x in re.findall(r"\d+", text)]
    if match := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}", line):
        return [numbers(group) for group in re.findall(r"\{([\d,]+)\}", match[1])]
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        return _counted(numbers(match[2]), match[3] and numbers(match[3])).reshape(numbers(match[1])).tolist()
    if match := re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^:]*?)\}", line):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match[1])}
        shape, named = list(sizes.values()), re.findall(r"'(\w+)'", match[4])
        devices = _counted(numbers(match[2] or str(math.prod(shape))), match[3] and numbers(match[3])).reshape(shape)
        axes = [list(sizes).index(name) for name in named]
        return np.moveaxis(devices, axes, range(-len(axes), 0)).reshape(-1, math.prod(shape[a] for a in axes)).tolist()
    return None


def _counted(shape: list[int], order: list[int] | None) -> np.ndarray:
    """0, 1, 2, ... in a shape, its axes in another order."""
    return np.arange(math.prod(shape)).reshape(shape).transpose(order or range(len(shape)))


def _axes(groups: list[list[int]], mesh) -> str:
    """Names of the mesh axes along which the devices of a group differ."""
    places = np.argwhere(np.ones(mesh.devices.shape))[groups[0]]
    return " x ".join(name for i, name in enumerate(mesh.axis_names) if len(set(places[:, i].tolist())) > 1)
