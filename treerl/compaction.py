"""Move the running lines of trees into fewer slots, where decoding costs less, and what they wrote back again.

In the small pool every line stands on its own slot alone, from the prompt to its head: keys and values are
gathered once (`Policy.gather`), and no line shares cells there. The tree keeps its own columns throughout.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from treerl.types import ACTIVE, FREE, Lines


class Moved(NamedTuple):
    """Where the lines of C slots came from."""

    slot: jax.Array  # [B, C] int32, slot of the tree; -1 for none
    path: jax.Array  # [B, C, S] int32, columns of the tree that its cells lie in; -1 from the cursor on


def take(x: jax.Array, slot: jax.Array) -> jax.Array:
    """Reads x [B, K, ...] at slot [B, N], clipped: [B, N, ...]."""
    slot = jnp.maximum(slot, 0)
    return jnp.take_along_axis(x, slot.reshape(slot.shape + (1,) * (x.ndim - 2)), axis=1)


def running(lines: Lines) -> jax.Array:
    """Number of lines of each tree that run: int32 [B]."""
    return jnp.sum(lines.status == ACTIVE, axis=1, dtype=jnp.int32)


def compact(lines: Lines, grid: dict, slots: int) -> tuple[Moved, Lines, dict]:
    """Puts the running lines of each tree, at most `slots` of them, into the first of C = `slots` slots, in order.

    Args:
      lines: of K slots. grid: name -> [B, S, K], with at least "token".

    Returns:
      (Moved, Lines of C slots, grid [B, S, C] with the tokens of the lines' paths and nothing else).
    """
    runs = lines.status == ACTIVE
    order = jnp.argsort(~runs, axis=1, stable=True)[:, :slots]
    there = take(runs, order)
    path = jnp.where(there[..., None], take(lines.path, order), -1)
    narrow = Lines(
        status=jnp.where(there, ACTIVE, FREE),
        cursor=jnp.where(there, take(lines.cursor, order), 0),
        path=jnp.where(path >= 0, jnp.arange(slots)[:, None], -1),
        birth=jnp.zeros_like(order),  # keys and values of all its cells are its own now, those of a newborn's head too
        parent=jnp.full_like(order, -1),
        may_fork=there & take(lines.may_fork, order),
        started=take(lines.started, order),
        key=take(lines.key, order),
    )
    column = path.swapaxes(1, 2)  # [B, S, C]
    token = jnp.where(column >= 0, jnp.take_along_axis(grid["token"], jnp.maximum(column, 0), axis=2), 0)
    blank = {name: jnp.zeros(token.shape, x.dtype) for name, x in grid.items()}
    return Moved(jnp.where(there, order, -1), path), narrow, dict(blank, token=token)


def _columns(moved: Moved, slots: int) -> tuple[jax.Array, jax.Array]:
    """Whether the line of each of K slots has moved [B, K], and to which of the C slots [B, K]."""
    match = moved.slot[:, None] == jnp.arange(slots)[:, None]  # [B, K, C]
    return jnp.any(match, axis=2), jnp.argmax(match, axis=2)


def back(moved: Moved, x: jax.Array, narrow: jax.Array) -> jax.Array:
    """What lines have, x [B, K, ...], with the news of those that moved, narrow [B, C, ...]."""
    there, column = _columns(moved, x.shape[1])
    return jnp.where(there.reshape(there.shape + (1,) * (x.ndim - 2)), take(narrow, column), x)


def restore(moved: Moved, lines: Lines, grid: dict, narrow: Lines, narrow_grid: dict) -> tuple[Lines, dict]:
    """Writes what C slots have grown since `compact` into the K slots that their lines came from.

    Args:
      lines, grid: as they were given to `compact`. narrow, narrow_grid: what became of what it returned.
    """
    slots, rows = lines.status.shape[1], lines.path.shape[2]
    slot, row = jnp.arange(slots), jnp.arange(rows)
    there, column = _columns(moved, slots)
    pick = lambda new, old: back(moved, old, new)
    cursor = pick(narrow.cursor, lines.cursor)
    new = (there & (cursor > lines.cursor))[..., None] & (row >= lines.cursor[..., None]) & (row < cursor[..., None])
    path = jnp.where(new, slot[:, None], lines.path)
    above = jnp.pad(path, ((0, 0), (0, 0), (1, 0)), constant_values=-1)[..., :-1]
    wide = jnp.broadcast_to(column[:, None], (column.shape[0], rows, slots))
    here = new.swapaxes(1, 2)
    grid = {k: jnp.where(here, jnp.take_along_axis(narrow_grid[k], wide, axis=2), x) for k, x in grid.items()}
    grid["parent"] = jnp.where(here, above.swapaxes(1, 2), grid["parent"])
    return lines.replace(status=pick(narrow.status, lines.status), cursor=cursor, path=path), grid
