"""Time, memory and bandwidth of compiled programs, and the rows that report them."""

import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.compilation_cache import compilation_cache

from treerl import profiling
from treerl.models.presets import PRESETS
from treerl.models.transformer import TransformerConfig


class Program(NamedTuple):
    """A compiled program and what compiling it told."""

    run: Callable  # the arguments it was compiled for -> results on the device
    compile_seconds: float  # tracing included
    peak_bytes: int  # arguments, results and temporaries, donated arguments once


class Times(NamedTuple):
    """Seconds of the repeats of one program, in the order they ran."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def over(self, other: "Times", *, less: float = 0.0) -> float:
        """Median over turns of this time over the other's, `less` seconds taken off both."""
        return statistics.median((a - less) / (b - less) for a, b in zip(self.seconds, other.seconds))


def compiled(function, *args) -> Program:
    """Compiles a function (jitted, if it wants shardings or donation) for these arguments."""
    function = function if hasattr(function, "lower") else jax.jit(function)
    begin = time.perf_counter()
    program = function.lower(*args).compile()
    seconds = time.perf_counter() - begin
    return Program(program, seconds, profiling.memory(program).total)


@contextlib.contextmanager
def persistent_cache():
    """An empty persistent compilation cache, for the time of the context."""
    names = "jax_enable_compilation_cache", "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
    before = {name: getattr(jax.config, name) for name in names}
    with tempfile.TemporaryDirectory() as folder:
        try:
            for name, value in zip(names, (True, folder, 0.0)):
                jax.config.update(name, value)
            compilation_cache.reset_cache()
            yield
        finally:
            for name, value in before.items():
                jax.config.update(name, value)
            compilation_cache.reset_cache()


def alternate(programs: dict[str, Callable], repeats: int, warmup: int = 1) -> dict[str, Times]:
    """Times programs in turns, so that whatever else the machine does slows all of them alike.

    Every second turn goes through them backwards: none is always the one after the same other.

    Args:
      programs: functions without arguments that return arrays; each is waited for.
      repeats: turns that count, after `warmup` that do not.
    """
    seconds = {name: [] for name in programs}
    for turn in range(warmup + repeats):
        for name, run in list(programs.items())[:: -1 if turn % 2 else 1]:
            begin = time.perf_counter()
            result = jax.block_until_ready(run())
            spent = time.perf_counter() - begin
            del result  # free before the next program needs the memory
            if turn >= warmup:
                seconds[name].append(spent)
    return {name: Times(s) for name, s in seconds.items()}


def bandwidth_programs(size: int) -> tuple[dict[str, Callable], int]:
    """Two programs that read a large array, and the bytes that each reads.

    A matrix-vector product and a row-wise maximum: which is faster depends on the device.

    Args:
      size: bytes of the array, far more than any cache holds.
    """
    sweeps, width = 4, 1024
    x = jnp.ones((size // 4 // width, width), jnp.float32)
    multiply = lambda x, c: jnp.max(x @ jnp.full((width,), c))
    maximum = lambda x, c: jnp.max(jnp.max(x.reshape(256, -1) + c, axis=1))

    def program(read):  # each sweep depends on the one before: none can be left out
        sweep = lambda x: jax.lax.fori_loop(0, sweeps, lambda _, c: read(x, c) * 1e-3, jnp.float32(1))
        run = compiled(sweep, x).run
        return lambda: run(x)

    return dict(multiply=program(multiply), maximum=program(maximum)), sweeps * x.nbytes


def matrix_peak(dtype: str) -> float:
    """Floating-point operations a second of a large square matrix product, at JAX's default precision for the dtype."""
    size, times = (8192, 16) if on_accelerator() else (1024, 4)
    x = jax.random.normal(jax.random.key(0), (size, size), dtype) * size**-0.5
    run = compiled(lambda x: jax.lax.fori_loop(0, times, lambda _, y: x @ y, x), x).run
    return times * 2 * size**3 / min(alternate(dict(product=lambda: run(x)), 3)["product"].seconds)


def product_parameters(config: TransformerConfig) -> int:
    """Parameters of the matrix products that a token goes through: blocks and output table; a lookup is no product."""
    heads = 2 * config.heads + 2 * config.kv_heads  # queries and output, keys and values
    return config.layers * config.width * (heads * config.head_dim + 3 * config.hidden) + config.vocab * config.width


def adapter_parameters(config: TransformerConfig) -> int:
    """Parameters of the adapters of `model.lora_rank`, 0 without."""
    c, inner = config, config.heads * config.head_dim
    ends = c.width + inner + 2 * c.kv_heads * c.head_dim, inner + c.width, c.width + 2 * c.hidden, c.hidden + c.width
    return c.layers * c.lora_rank * sum(ends)


def learning_flops(config: TransformerConfig, tokens: int) -> float:
    """Operations of a forward and a backward pass: 6 a token and parameter of the products, 4 where it is frozen.

    Attention and what is computed again are not counted. A frozen weight has no gradient: that third is not done.
    """
    adapters = adapter_parameters(config)
    return tokens * ((4 if adapters else 6) * product_parameters(config) + 6 * adapters)


def bytes_of(tree) -> int:
    """Bytes of all arrays of a pytree."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def on_accelerator() -> bool:
    """Whether JAX's default device is something faster than the CPU."""
    return jax.default_backend() != "cpu"


def device_name() -> str:
    """Kind and number of devices; of a CPU the number of cores."""
    if on_accelerator():
        return f"{jax.devices()[0].device_kind} x{jax.device_count()}"
    return f"cpu, {os.cpu_count()} cores"


def model_config(preset: str, **overrides) -> TransformerConfig:
    """The config of a preset with some fields replaced."""
    if preset not in PRESETS:
        raise ValueError(f"model preset {preset!r} is unknown; known are {', '.join(PRESETS)}.")
    return TransformerConfig(**{**PRESETS[preset], **overrides})


def row(suite: str, name: str, value, unit: str, shapes: dict, **compared) -> dict:
    """One result, ready for JSON: what was measured, in which unit, at which sizes and where.

    Args:
      compared: `versus`, name of what it is compared with in the same run, and `ratio`, this
        value over that one's; of times the median over turns, see `Times.over`.
    """
    return dict(suite=suite, name=name, value=float(value), unit=unit, shapes=shapes, device=device_name(), **compared)
