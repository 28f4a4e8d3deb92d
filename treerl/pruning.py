"""What to stop while generating: pruning rules, pairs of pure functions around a memory, or one look at all lines.

Keyword-only arguments of a rule of RULES are numbers of the section `pruning` (those of `similarity`), or options of its
own, with the type of their default. Rules of `treerl.survival` are given to `survival`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from treerl.tree import DROPPED, SIMILAR
from treerl.types import ACTIVE, FREE, Lines, Pruning, Review

REVIEW = 0x7EE  # folded into a tree's key for the draws of its review; lines fold their slots, which are fewer


def none() -> Pruning:
    """Prunes nothing."""
    return Pruning(
        start=lambda batch, slots: (),
        step=lambda memory, lines, cells: (jnp.zeros(lines.status.shape, jnp.int8), memory),
    )


def extend_distance(row, column, a, b, n):
    """Extends an edit-distance table by one token on both sides.

    Args:
      row: [R + 1] int32, D[n - 1, 0 .. n - 1]. column: [R + 1] int32, D[0 .. n - 1, n - 1].
      a, b: [R] int32, the two windows, their first n tokens known.
      n: [] int32, 1 .. R.

    Returns:
      row D[n, 0 .. n] and column D[0 .. n, n]; entries past n mean nothing. D is Levenshtein's
      distance of prefixes. The recurrence along a row is a running minimum, D[n, j] - j =
      min over i <= j of (x_i - i), so nothing is serial.
    """
    index = jnp.arange(row.shape[0])
    last = n - 1

    def line(previous, new, other):
        differs = jnp.concatenate([jnp.ones((1,), bool), other != new])
        shifted = jnp.concatenate([previous[:1], previous[:-1]])
        x = jnp.minimum(previous + 1, shifted + differs)
        x = jnp.where(index == 0, n, x)
        return jax.lax.cummin(x - index) + index

    new_row, new_column = line(row, a[last], b), line(column, b[last], a)
    corner = jnp.minimum(new_row[last], new_column[last]) + 1
    corner = jnp.minimum(corner, row[last] + (a[last] != b[last]))
    return jnp.where(index == n, corner, new_row), jnp.where(index == n, corner, new_column)


def similarity(*, windows: tuple[int, ...], tau_ed) -> Pruning:
    """Stops children that say what their parent says (LATR, arXiv 2510.24302, eq. 7 and 8).

    After each window of r tokens of its own, the diverging token included, a child is compared
    with the same rows of its parent line; if edit distance / r < tau_ed the child and all its
    descendants (finished ones too) go. A child is kept if either line ended inside the window.
    The parent stays. As in the released code there may be several windows; its exemption of
    mathematical symbols, suffix and ROUGE tests are not here.

    Args:
      windows: lengths r, static. tau_ed: [] float32; 0 prunes nothing, above 1 every child.
    """
    longest = max(windows)

    def start(batch, slots):
        size = (batch, slots, longest)
        table = jnp.zeros((batch, slots, longest + 1), jnp.int32)
        return jnp.zeros(size, jnp.int32), jnp.zeros(size, jnp.int32), table, table

    def step(memory, lines: Lines, cells):
        slots = lines.status.shape[1]
        age = lines.cursor - lines.birth  # own tokens so far
        last = jnp.maximum(lines.cursor - 1, 0)
        parent = jnp.maximum(lines.parent, 0)
        own = jnp.broadcast_to(jnp.arange(slots), parent.shape)
        read = jax.vmap(lambda table, row, column: table[row, column])
        # along the parent's path: above its birth, where a child may be reborn, its column is not its own
        theirs = jnp.maximum(read(lines.path, parent, last), 0)
        newest = read(cells["token"], last, own), read(cells["token"], last, theirs)
        n = jnp.clip(age, 1, longest)

        def one(mine, theirs, row, column, new, n):
            at = jnp.arange(longest) == n - 1
            mine, theirs = jnp.where(at, new[0], mine), jnp.where(at, new[1], theirs)
            row, column = jnp.where(n == 1, 0, row), jnp.where(n == 1, 0, column)  # a newborn
            return mine, theirs, *extend_distance(row, column, mine, theirs, n)

        memory = jax.vmap(jax.vmap(one))(*memory, newest, n)
        distance = jnp.take_along_axis(memory[2], n[..., None], axis=-1)[..., 0]
        status, cursor = (jnp.take_along_axis(x, parent, -1) for x in (lines.status, lines.cursor))
        parent_ended = (status != ACTIVE) & (cursor <= lines.cursor)
        due = jnp.any(age[..., None] == jnp.asarray(windows), axis=-1)
        due &= (lines.status == ACTIVE) & (lines.parent >= 0) & ~parent_ended
        stop = due & (distance < tau_ed * n)
        at_birth = jnp.take_along_axis(lines.path, lines.birth[:, None, :], axis=-1)  # [B, line, child]
        below = at_birth == jnp.arange(slots)
        gone = jnp.any(below & stop[:, None, :], axis=-1) & (lines.status != FREE)
        return jnp.where(gone, SIMILAR, 0).astype(jnp.int8), memory

    return Pruning(start=start, step=step)


class Detected(NamedTuple):
    """What the review of `survival` saw of each slot's line, and decided. [B, K] but for hidden."""

    hidden: jax.Array  # [B, K, D], what was scored
    score: jax.Array  # float32, logit of the quality head
    posterior: jax.Array  # float32, chance of a right answer by the calibration
    due: jax.Array  # bool, ran and had the detection length; the other fields mean something here alone
    keep: jax.Array  # bool, due and goes on
    chance: jax.Array  # float32, of being kept, 1 where not due


def survival(judge: Callable, choose: Callable, *, detection, columns: int, rho, warm, refork: bool = False) -> Pruning:
    """Scores all lines once, at the detection length, and lets a part of each group go on.

    ARRoL, arXiv 2603.24840, algorithm 1. Differs from the paper: it tests each rollout when it reaches the
    detection length, alone; here all lines of a group are compared at one moment, so that a fixed number can
    survive and the rest of the loop runs in a smaller pool. Lines that ended before are not tested and stay; nor
    are running lines that are shorter then, which take room from the others.

    Args:
      judge: hidden [B, K, D] -> (score [B, K], posterior [B, K]).
      choose: a rule of `treerl.survival` without its numbers bound: (keys [B], posterior, due, capacity=[B]) -> (keep, p).
      detection: [] int32, tokens from the prompt that a line must have to be scored.
      columns: lines of a tree that run on, at most (static).
      rho: [] float32, see `treerl.survival`. warm: [] bool, score and record, but stop nothing.
      refork: fill the room up to `columns` with lines that continue survivors by draws of their own, those
        whose posterior is nearest to rho first, one each before a second (static).
    """

    def review(lines: Lines, hidden, key):
        runs = lines.status == ACTIVE
        due = runs & (lines.cursor >= detection)
        score, posterior = judge(hidden)
        others = jnp.sum(runs & ~due, axis=1)
        keep, chance = choose(jax.vmap(lambda k: jax.random.fold_in(k, REVIEW))(key), posterior, due, capacity=columns - others)
        keep, chance = keep | warm, jnp.where(warm, 1.0, chance)  # the draws happen all the same
        fork = jnp.full(due.shape, -1)
        if refork:
            able = due & keep
            order = jnp.argsort(jnp.where(able, jnp.abs(posterior - rho), jnp.inf), axis=1, stable=True)
            empty = (lines.status == FREE) | (due & ~keep)
            rank = jnp.cumsum(empty, axis=1) - 1
            count, room = (jnp.sum(x, axis=1, keepdims=True) for x in (able, runs & (keep | ~due)))
            parent = jnp.take_along_axis(order, rank % jnp.maximum(count, 1), axis=1)
            born = empty & (rank < columns - room) & (count > 0) & ~warm
            fork = jnp.where(born, parent, -1)
        reason = jnp.where(due & ~keep, DROPPED, 0).astype(jnp.int8)
        return Review(reason, fork, Detected(hidden, score, posterior, due, due & keep, chance))

    return none()._replace(review=review)


RULES = {"none": none, "similarity": similarity}
