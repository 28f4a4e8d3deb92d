"""What a decode step computes beside attention: sums with norms, products, and products in 8 bits."""

import jax
import jax.numpy as jnp
from absl import logging
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from treerl.kernels import call, whole

_ROWS = (16, 32, 64, 128)  # that the kernels of products take


def quantize(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x [..., K] as int8 [..., K] times a float32 scale [...], of each row its largest absolute entry / 127."""
    x = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.max(jnp.abs(x), axis=-1), 1e-20) / 127
    return jnp.round(x / scale[..., None]).astype(jnp.int8), scale


def add_norm(x: jax.Array, parts: jax.Array, scale: jax.Array, eps: float, offset: bool, *, narrow: bool = False):
    """x + sum(parts), and its root-mean-square norm times `scale`, or 1 + `scale` with an offset.

    Rounded where `transformer.RMSNorm` after a sum rounds.

    Args:
      x: [..., D]. parts: [n, ..., D], n summands in float32 or one in any dtype. scale: [D].

    Returns:
      (sum, norm), both [..., D] in x's dtype; with `narrow` the norm quantized, see `quantize`.
    """
    shape, (size,), count = x.shape, scale.shape, parts.shape[0]
    width = pl.next_power_of_2(size)

    def program(x_ref, parts_ref, scale_ref, sum_ref, out_ref, step_ref=None):
        row, at = pl.program_id(0), jnp.arange(width)
        real = at < size
        load = lambda ref, *place: triton.load(ref.at[*place, at], mask=real, other=0.0).astype(jnp.float32)
        h = sum((load(parts_ref, i, row) for i in range(1, count)), load(parts_ref, 0, row))
        total = (load(x_ref, row) + h.astype(x.dtype).astype(jnp.float32)).astype(x.dtype)
        y, factor = total.astype(jnp.float32), load(scale_ref)
        y = y * jax.lax.rsqrt(jnp.sum(y * y) / size + eps) * (1 + factor if offset else factor)
        y = y.astype(x.dtype)
        if narrow:
            y = y.astype(jnp.float32)
            step_ref[row] = step = jnp.maximum(jnp.max(jnp.abs(y)), 1e-20) / 127
            y = y / step
            y = jnp.where(y < 0, y - 0.5, y + 0.5).astype(jnp.int32).astype(jnp.int8)  # to the nearest
        triton.store(sum_ref.at[row, at], total, mask=real)
        triton.store(out_ref.at[row, at], y, mask=real)

    x, parts = x.reshape(-1, size), parts.reshape(count, -1, size)
    outs = [jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct(x.shape, jnp.int8 if narrow else x.dtype)]
    outs += [jax.ShapeDtypeStruct(x.shape[:1], jnp.float32)] * narrow
    total, *norm = call(
        program, "add_norm", 8, grid=x.shape[:1], in_specs=[whole(*x.shape), whole(*parts.shape), whole(size)],
        out_specs=[whole(*y.shape) for y in outs], out_shape=outs,
    )(x, parts, scale)  # fmt: skip
    return total.reshape(shape), tuple(norm) if narrow else norm[0].reshape(shape)


def roomy() -> bool:
    """Whether the GPU's processors have room for the tiles of products, 147 kB of shared memory: A100, H100, B200 and their like."""
    capability = getattr(jax.devices()[0], "compute_capability", "9.0")
    if capability not in ("8.0", "9.0", "10.0", "10.3"):
        lacks = "A GPU of compute capability %s lacks room for the kernels of products: the sampler's are XLA's."
        logging.log_first_n(logging.INFO, lacks, 1, capability)
        return False
    return True


def fits(x: jax.Array, outer: int) -> bool:
    """Whether `gated` takes x [M, K] and w [K, 2, outer]."""
    rows, inner = x.shape
    return x.dtype.itemsize == 2 and rows in _ROWS and inner % 32 == 0 and outer % 128 == 0 and roomy()


def product_plan(x: jax.Array, outer: int) -> tuple[int, int] | None:
    """How `product` cuts x [M, K] @ w [K, outer]: (columns of a program, splits of the sum), None where it is left to XLA.

    As many splits as give a GPU one program each for most of its processors; more sums would have to be read again.
    """
    (rows, inner), width, depth = x.shape, 64, 64
    if x.dtype.itemsize != 2 or rows not in _ROWS or outer % width or not roomy():
        return None
    programs = {outer // width * splits: splits for splits in (1, 2, 3, 4, 5) if inner % (splits * depth) == 0}
    some = [count for count in programs if 64 <= count <= 132] or [count for count in programs if count > 132][:1]
    return (width, programs[max(some)]) if some else None


def product(x: jax.Array, w: jax.Array, plan: tuple[int, int]) -> jax.Array:
    """Parts of x [M, K] @ w [K, N]: float32 [splits, M, N], to be summed by whoever reads them."""
    (rows, inner), outer, (width, splits), depth = x.shape, w.shape[1], plan, 64
    each = inner // splits

    def program(x_ref, w_ref, out_ref):
        part = pl.program_id(1)
        row, column = jnp.arange(rows), pl.program_id(0) * width + jnp.arange(width)

        def add(i, total):
            at = part * each + i * depth + jnp.arange(depth)
            here = triton.load(x_ref.at[row[:, None], at[None]])
            return total + triton.dot(here, triton.load(w_ref.at[at[:, None], column[None]]))

        total = jax.lax.fori_loop(0, each // depth, add, jnp.zeros((rows, width), jnp.float32))
        triton.store(out_ref.at[part, row[:, None], column[None]], total)

    return call(
        program, "product", 4, 6, grid=(outer // width, splits), in_specs=[whole(*x.shape), whole(*w.shape)],
        out_specs=whole(splits, rows, outer), out_shape=jax.ShapeDtypeStruct((splits, rows, outer), jnp.float32),
    )(x, w)  # fmt: skip


def gated(x: jax.Array, w: jax.Array, activation) -> jax.Array:
    """activation(x @ gate) * (x @ up), both rounded to x's dtype before: x [M, K], w [K, 2, N] gate and up -> [M, N]."""
    (rows, inner), outer, width, depth = x.shape, w.shape[2], 128, 32

    def program(x_ref, w_ref, out_ref):
        row, column = jnp.arange(rows), pl.program_id(0) * width + jnp.arange(width)

        def add(i, totals):
            at = i * depth + jnp.arange(depth)
            here = triton.load(x_ref.at[row[:, None], at[None]])
            return tuple(t + triton.dot(here, triton.load(w_ref.at[at[:, None], j, column[None]])) for j, t in enumerate(totals))

        zero = jnp.zeros((rows, width), jnp.float32)
        gate, up = (t.astype(x.dtype).astype(jnp.float32) for t in jax.lax.fori_loop(0, inner // depth, add, (zero, zero)))
        out = activation(gate).astype(x.dtype).astype(jnp.float32) * up
        triton.store(out_ref.at[row[:, None], column[None]], out.astype(x.dtype))

    return call(
        program, "gated", 8, 6, grid=(outer // width,), in_specs=[whole(*x.shape), whole(*w.shape)],
        out_specs=whole(rows, outer), out_shape=jax.ShapeDtypeStruct((rows, outer), x.dtype),
    )(x, w)  # fmt: skip


def narrow_fits(rows: int, inner: int, outer: int) -> bool:
    """Whether `narrow_product` takes [rows, inner] x [inner, outer]."""
    return rows in _ROWS and inner % 128 == 0 and outer % 64 == 0 and roomy()


def narrow_product(x, w, dtype, join=lambda y: y) -> jax.Array:
    """join(x @ w[0].T, ..., x @ w[n - 1].T) of int8 with scales: [M, N] of a dtype.

    Args:
      x: `quantize` of [M, K]. w: of [n, N, K]. join: of n arrays in float32, element by element.
    """
    (x, step), (w, steps) = x, w
    (rows, inner), (count, outer, _), width, depth = x.shape, w.shape, 64, 128

    def program(x_ref, step_ref, w_ref, steps_ref, out_ref):
        row, column = jnp.arange(rows), pl.program_id(0) * width + jnp.arange(width)

        def add(i, totals):
            at = i * depth + jnp.arange(depth)
            here = triton.load(x_ref.at[row[:, None], at[None]])
            return tuple(
                t + triton.dot(here, triton.load(w_ref.at[j, column[:, None], at[None]]), trans_b=True) for j, t in enumerate(totals)
            )

        totals = jax.lax.fori_loop(0, inner // depth, add, (jnp.zeros((rows, width), jnp.int32),) * count)
        step = triton.load(step_ref.at[row])[:, None]
        wide = [t.astype(jnp.float32) * step * triton.load(steps_ref.at[j, column])[None] for j, t in enumerate(totals)]
        triton.store(out_ref.at[row[:, None], column[None]], join(*wide).astype(dtype))

    return call(
        program, "narrow_product", 4, 3, grid=(outer // width,), in_specs=[whole(*y.shape) for y in (x, step, w, steps)],
        out_specs=whole(rows, outer), out_shape=jax.ShapeDtypeStruct((rows, outer), dtype),
    )(x, step, w, steps)  # fmt: skip
