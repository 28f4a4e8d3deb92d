"""Pallas kernels for GPUs (Triton); elsewhere than on a GPU they are interpreted, for tests.

Each has a form in XLA that means the same: `attention.dense` and `attention.packed`, `nucleus.survey` and
`transformer.Block` without kernels. What all of them need is here.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

LOWEST = -1e30  # finite: the difference of two of them is 0, not nan


def call(program, name: str, warps: int, stages: int = 1, **spec):
    """A Pallas call for Triton."""
    options = triton.CompilerParams(num_warps=warps, num_stages=stages)
    return pl.pallas_call(program, name=name, compiler_params=options, interpret=jax.default_backend() != "gpu", **spec)


def barrier():
    """Stores of a program before it are seen by its loads after it; the interpreter goes line by line anyway."""
    if jax.default_backend() == "gpu":
        triton.debug_barrier()


def whole(*shape):
    """All of an array in every program."""
    return pl.BlockSpec(shape, lambda *_: (0,) * len(shape))


def exactly(dtype) -> dict:
    """How `triton.dot` multiplies a dtype: float32 in float32."""
    return dict(precision=jax.lax.Precision.HIGHEST) if dtype == jnp.float32 else {}
