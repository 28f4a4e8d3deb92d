"""Masked sum, mean and standard deviation: the only place where that arithmetic is written."""

import jax
import jax.numpy as jnp


def total(x: jax.Array, mask: jax.Array, axis=None) -> jax.Array:
    """Sums x where mask holds; masked values may be anything, NaN included."""
    return jnp.sum(jnp.where(mask, x, 0), axis=axis)


def mean(x: jax.Array, mask: jax.Array, axis=None, weight=1.0) -> jax.Array:
    """Weighted mean of x where mask holds; 0 where nothing does."""
    norm = total(jnp.broadcast_to(weight, x.shape), mask, axis)
    return total(x * weight, mask, axis) / jnp.where(norm > 0, norm, 1)


def std(x: jax.Array, mask: jax.Array, axis=None, *, weight=1.0, ddof: int = 0) -> jax.Array:
    """Weighted standard deviation, two passes; 0 where at most ddof of weight is left.

    With weights that count entries (w copies of a value), the sum of weights stands for n.
    """
    norm = total(jnp.broadcast_to(weight, x.shape), mask, axis)
    centre = mean(x, mask, axis, weight)
    centre = centre if axis is None else jnp.expand_dims(centre, axis)
    square = total(weight * jnp.square(jnp.where(mask, x, 0) - centre), mask, axis)
    return jnp.sqrt(jnp.where(norm > ddof, square / jnp.where(norm > ddof, norm - ddof, 1), 0))
