"""Grow a tree of continuations for every prompt, in one compiled loop.

The sampler takes a policy and two rules as functions and never sees a model. Each iteration
decodes the head of every slot, draws, lets the branching rule override and start lines, writes,
and lets the pruning rule stop lines. Trees do not depend on each other, on their place in the
batch or on the number of devices: every draw folds (key, example, line identity, row).
"""
from typing import NamedTuple

import jax
import jax.numpy as jnp

from treerl import tree as T
from treerl.types import ACTIVE, DONE, FREE, Births, Branching, Frontier, Lines, Policy, Prompts, Pruning, empty_lines

_GRID = ("token", "parent", "used", "source", "end", "entropy", "logp_behavior", "logp_policy")


class Stats(NamedTuple):
    """What happened while a tree grew; a pruned line leaves no other trace. All int32 [B]."""

    sampled: jax.Array  # tokens written, those of pruned lines included
    forks: jax.Array  # lines born on a running line
    restarts: jax.Array  # lines born at the prompt or an older cell after the start
    pruned: jax.Array  # lines stopped by the pruning rule
    iterations: jax.Array  # of the loop, the same for every tree of the program


class _Carry(NamedTuple):
    lines: Lines
    grid: dict  # the fields of Tree named in _GRID, each [B, S, K]
    cache: object
    memory: object  # of the pruning rule
    stats: Stats
    active: jax.Array  # [B] bool, whether anything of the tree runs or may still be born
    iteration: jax.Array  # [] int32


class Drawn(NamedTuple):
    """A token for every head, and what its distribution said. All [..., ] of the heads' shape."""

    token: jax.Array  # int32
    logp: jax.Array  # float32, of the token under the distribution drawn from
    top: jax.Array  # float32, the largest logit
    norm: jax.Array  # float32, log of sum of exp((logit - top) / temperature)
    entropy: jax.Array  # float32, nats, of the tempered distribution, untruncated


def nucleus(logits: jax.Array, temperature: jax.Array, top_p: jax.Array) -> jax.Array:
    """Lowest logit in the smallest set of probability top_p: [..., V] -> [..., 1].

    Finds the cut by bisection on the probability, behind a cond, so top_p = 1 costs nothing and
    the vocabulary is never sorted. Ties at the cut are kept.
    """
    top = logits.max(-1, keepdims=True)

    def cut(logits, top):
        weight = jnp.exp((logits - top) / temperature)
        total = weight.sum(-1, keepdims=True)

        def halve(_, bounds):
            low, high = bounds  # the mass at or above low is at least top_p
            middle = (low + high) / 2
            enough = jnp.sum(jnp.where(weight >= middle, weight, 0), -1, keepdims=True) >= top_p * total
            return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

        low, _ = jax.lax.fori_loop(0, 30, halve, (jnp.zeros_like(top), jnp.ones_like(top)))
        return jnp.min(jnp.where((weight >= low) | (logits == top), logits, jnp.inf), -1, keepdims=True)

    return jax.lax.cond(top_p < 1, cut, lambda logits, top: jnp.full_like(top, -jnp.inf), logits, top)


def draw(logits: jax.Array, temperature: jax.Array, top_p: jax.Array, uniform: jax.Array) -> Drawn:
    """Draws a token from the tempered, truncated distribution by inverting its sum.

    Two levels of about sqrt(V) sums: one uniform number a draw, two passes over the logits, and no
    array of the vocabulary's size; never a token outside the nucleus.

    Args:
      logits: [..., V] float32. temperature, top_p: [] float32. uniform: [...] in [0, 1).
    """
    size = logits.shape[-1]
    near = range(max(1, round(size**0.5 / 8)), round(size**0.5) + 1)
    width = max((w for w in near if size % w == 0), default=near[-1])  # a divisor needs no padding
    lowest, top = nucleus(logits, temperature, top_p), logits.max(-1)
    pad = [(0, 0)] * (logits.ndim - 1) + [(0, -size % width)]
    block = jnp.pad(logits, pad, constant_values=-jnp.inf).reshape(*logits.shape[:-1], -1, width)

    shift = (block - top[..., None, None]) / temperature
    weight = jnp.exp(shift)
    mass = jnp.sum(jnp.where(block >= lowest[..., None], weight, 0), -1)
    norm = jnp.sum(jnp.sum(weight, -1), -1)
    mean = jnp.sum(jnp.sum(jnp.where(weight > 0, weight * shift, 0), -1), -1) / norm

    def invert(weight, target):
        total = jnp.cumsum(weight, axis=-1)
        target = jnp.clip(target, 0, total[..., -1] * (1 - 2e-7))
        index = jnp.sum(total <= target[..., None], axis=-1)
        at = lambda x: jnp.take_along_axis(x, index[..., None], axis=-1)[..., 0]
        return index, target - (at(total) - at(weight))

    outer, rest = invert(mass, uniform * mass.sum(-1))
    inside = jnp.take_along_axis(block, outer[..., None, None], axis=-2)[..., 0, :]
    shift = (inside - top[..., None]) / temperature
    inner, _ = invert(jnp.where(inside >= lowest, jnp.exp(shift), 0), rest)
    logp = jnp.take_along_axis(shift, inner[..., None], axis=-1)[..., 0] - jnp.log(mass.sum(-1))
    token = jnp.minimum(outer * width + inner, size - 1).astype(jnp.int32)
    return Drawn(token, logp, top, jnp.log(norm), jnp.log(norm) - mean)


def _fold(key, *values):
    """Folds integers [B, K] into raw keys [B, K, 2]."""

    def one(key, *values):
        key = jax.random.wrap_key_data(key)
        for value in values:
            key = jax.random.fold_in(key, value)
        return jax.random.key_data(key)

    return jax.vmap(jax.vmap(one))(key, *values)


def _start_key(tree_key, slot, started, row):
    """Identity of a line that starts by a draw: (tree, slot, how often it started, row)."""
    shape = slot.shape
    return _fold(jnp.broadcast_to(tree_key[:, None], shape + (2,)), slot, started, row + 1)


def _free_from(lines: Lines) -> jax.Array:
    """First row at which each slot's column holds nothing that a live line stands on: [B, K]."""
    _, slots, rows = lines.path.shape
    live = lines.status != FREE
    stands = (lines.path[..., None] == jnp.arange(slots)) & live[..., None, None]  # [B, j, S, K]
    below = jnp.where(jnp.any(stands, axis=1), jnp.arange(rows)[:, None] + 1, 0).max(1)
    return jnp.where(lines.status == FREE, below, rows + 1)


def _head_row(cursor):
    """Row of a line's head, clipped to the grid."""
    return jnp.maximum(cursor - 1, 0)


def _last_cell(lines: Lines) -> jax.Array:
    """Each line's own last cell, in its column: bool [B, S, K]; none of a newborn that has drawn nothing.

    The cell above such a newborn belongs to another line, even where it lies in the same column.
    """
    row = jnp.arange(lines.path.shape[-1])[:, None]
    return (row == lines.cursor[:, None] - 1) & (lines.cursor > lines.birth)[:, None]


def _take(x, slot):
    """Reads x [B, K, ...] at slot [B, K], clipped."""
    slot = jnp.maximum(slot, 0)
    return jnp.take_along_axis(x, slot.reshape(slot.shape + (1,) * (x.ndim - 2)), axis=1)


def sample(
    policy: Policy,
    branching: Branching,
    pruning: Pruning,
    prompts: Prompts,
    key: jax.Array,
    *,
    slots: int,
    rows: int,
    budget: int,
    segment: int,
    lengths: tuple[int, ...],
    temperature: jax.Array,
    top_p: jax.Array,
    eos: jax.Array,
) -> tuple[T.Tree, Stats]:
    """Grows one tree a prompt.

    Each iteration decodes every slot once, a newborn that draws from the next one on: a line that
    starts at the prompt at iteration i needs a budget of i + 1 + rows to reach the last row. One
    that starts too late for that can be CUT, which favours short answers among late starts.

    A line ends FINISHED at an end-of-sequence token (which is part of it), TRUNCATED at the last
    row, PRUNED by the rule, or CUT when the loop budget is spent; the first two are leaves and
    keep their slot, so there are as many leaf entries as slots.

    Args:
      key: typed random key, the same for all trees; each folds its example's index.
      slots, rows: K and S (static).
      budget: iterations at most (static), rounded up to whole segments.
      segment: iterations between two tests for the end (static).
      lengths: static row bounds, ascending, the last equal to rows; the loop's body is compiled
        once for each, and attention reads the rows of the smallest that fits.
      temperature: [] float32 > 0. top_p: [] float32 in (0, 1]. eos: [E] int32, -1 for none. Traced.

    Returns:
      (Tree with B in front, Stats).
    """
    if tuple(sorted(set(lengths))) != tuple(lengths) or lengths[-1] != rows:
        raise ValueError(f"sampler.lengths={lengths} must ascend and end with the rows, {rows}.")
    batch = prompts.token.shape[0]
    slot = jnp.broadcast_to(jnp.arange(slots), (batch, slots))
    tree_key = jax.vmap(lambda i: jax.random.key_data(jax.random.fold_in(key, i)))(prompts.index)
    cache = policy.prefill(prompts.token, prompts.length)

    def decide(carry: _Carry, logits):
        """Draws for every line and asks the branching rule."""
        lines = carry.lines
        noise = _fold(lines.key, lines.cursor)
        uniform = jax.vmap(jax.vmap(lambda k: jax.random.uniform(jax.random.wrap_key_data(k))))(noise)
        drawn = draw(logits, temperature, top_p, uniform)
        free = _free_from(lines)
        token, births = branching.step(Frontier(lines, logits, drawn.token, drawn.entropy, free, carry.iteration))
        allowed = (births.line >= 0) & (free <= births.row + 1)
        status, head = _take(lines.status, births.line), _take(lines.cursor, births.line) - 1
        # above the end of a line that runs or is finished, a forced token at a head, whose logits its log-prob is of
        held = (status != FREE) & (births.row <= head - (status == DONE))
        held &= (births.token < 0) | (births.row == head)
        allowed &= held | ((births.row < 0) & (births.token < 0))  # the prompt is nobody's
        allowed &= carry.active[:, None]  # a tree that is over is only stepped because others are not
        return drawn, token, births._replace(line=jnp.where(allowed, births.line, -1))

    def newborn(lines: Lines, births: Births):
        """Lines with those just born in their slots, cursor at their first own row."""
        born = births.line >= 0
        forced = born & (births.token >= 0)
        row = births.row + 1
        path = jnp.where(jnp.arange(rows) < row[..., None], _take(lines.path, births.line), T.NONE)
        complement = jnp.uint32(0xFFFFFFFF) - row.astype(jnp.uint32)  # never the key of a draw
        child = _fold(_take(lines.key, births.line), complement, births.token)
        fresh = _start_key(tree_key, slot, lines.started, births.row)
        pick = lambda new, old: jnp.where(born.reshape(born.shape + (1,) * (old.ndim - 2)), new, old)
        return Lines(
            status=pick(ACTIVE, lines.status),
            cursor=pick(row, lines.cursor),
            path=pick(path, lines.path),
            birth=pick(row, lines.birth),
            parent=pick(jnp.where((births.row >= 0) | forced, births.line, -1), lines.parent),
            may_fork=pick(births.may_fork, lines.may_fork),
            started=lines.started + (born & ~forced),
            key=pick(jnp.where(forced[..., None], child, fresh), lines.key),
        )

    def step(rows_in_use, carry: _Carry) -> _Carry:
        lines, grid = carry.lines, carry.grid
        row = _head_row(lines.cursor)
        column = jnp.maximum(jnp.take_along_axis(lines.path, row[..., None], axis=-1)[..., 0], 0)
        head = jax.vmap(lambda token, row, column: token[row, column])(grid["token"], row, column)
        was_active = lines.status == ACTIVE
        write = was_active & (lines.cursor > lines.birth)  # another line's cell has been written by its own
        logits, cache = policy.decode(carry.cache, head, lines.cursor - 1, lines.path, write, rows_in_use)
        drawn, ruled, births = decide(carry, logits)

        born = births.line >= 0
        forked = born & (births.token >= 0)
        lines = newborn(lines, births)
        writes = was_active | forked
        source = jnp.where(forked, births.line, slot)  # whose logits the token comes from
        token = jnp.where(forked, births.token, jnp.where(ruled >= 0, ruled, drawn.token))
        forced = forked | (ruled >= 0)
        at_token = jax.vmap(lambda logits, source, token: logits[source, token])(logits, source, token)
        ended = jnp.any(token[..., None] == eos, axis=-1)
        end = jnp.where(ended, T.FINISHED, jnp.where(lines.cursor == rows - 1, T.TRUNCATED, T.RUNNING))
        above = jnp.take_along_axis(lines.path, _head_row(lines.cursor)[..., None], axis=-1)[..., 0]
        cell = dict(
            token=token,
            parent=jnp.where(lines.cursor > 0, above, T.NONE),
            used=writes,
            source=jnp.where(forced, T.FORCED, T.SAMPLED),
            end=end,
            entropy=_take(drawn.entropy, source),
            logp_behavior=jnp.where(forced, 0.0, drawn.logp),
            logp_policy=(at_token - _take(drawn.top, source)) / temperature - _take(drawn.norm, source),
        )
        below = jnp.arange(rows)[:, None] >= lines.cursor[:, None]  # [B, S, K]
        here = (jnp.arange(rows)[:, None] == lines.cursor[:, None]) & writes[:, None]
        clear = below & born[:, None]
        grid = dict(grid, used=grid["used"] & ~clear, end=jnp.where(clear, T.RUNNING, grid["end"]))
        grid = {k: jnp.where(here, cell[k][:, None].astype(v.dtype), v) for k, v in grid.items()}
        here = here.swapaxes(1, 2)
        lines = lines.replace(
            path=jnp.where(here, slot[..., None], lines.path),
            cursor=lines.cursor + writes,
            status=jnp.where(writes & (end != T.RUNNING), DONE, lines.status),
        )

        reason, memory = pruning.step(carry.memory, lines, grid["token"])
        stopped = (reason > 0) & (lines.status != FREE) & carry.active[:, None]
        grid["end"] = jnp.where(_last_cell(lines) & stopped[:, None], reason[:, None], grid["end"])
        lines = lines.replace(status=jnp.where(stopped, FREE, lines.status))
        count = lambda mask: jnp.sum(mask, axis=1, dtype=jnp.int32)
        stats = Stats(
            sampled=carry.stats.sampled + count(writes),
            forks=carry.stats.forks + count(forked),
            restarts=carry.stats.restarts + count(born & ~forked),
            pruned=carry.stats.pruned + count(stopped),
            iterations=carry.stats.iterations + 1,
        )
        # an empty slot may still be filled at the next iteration, when the rule sees nothing runs
        idle = jnp.any(was_active, axis=1) & jnp.any(lines.status == FREE, axis=1)
        active = jnp.any(lines.status == ACTIVE, axis=1) | idle
        return _Carry(lines, grid, cache, memory, stats, active, carry.iteration + 1)

    begins, may_fork = branching.start(batch, slots)
    none = jnp.full((batch, slots), -1, jnp.int32)
    births = Births(line=jnp.where(begins, slot, -1), row=none, token=none, may_fork=may_fork)
    lines = newborn(empty_lines(batch, slots, rows), births)
    blank = jnp.zeros((batch, rows, slots))
    types = dict(token=jnp.int32, parent=jnp.int32, used=bool, source=jnp.int8, end=jnp.int8)
    grid = {name: blank.astype(types.get(name, jnp.float32)) for name in _GRID}
    nothing = jnp.zeros((batch,), jnp.int32)
    carry = _Carry(
        lines, grid, cache, pruning.start(batch, slots), Stats(*[nothing] * 5), jnp.ones((batch,), bool), jnp.int32(0)
    )

    def need(carry):
        """Rows that the next segment may touch; a line may be born on any that runs or is finished."""
        held = jnp.where(carry.lines.status != FREE, carry.lines.cursor, 0)
        return jnp.max(held) + segment

    def goes_on(carry):
        return jnp.any(carry.active) & (carry.iteration < budget)  # the only test over all trees

    def run(carry):
        for shorter, length in zip((0,) + tuple(lengths), lengths):
            fits = lambda c: (need(c) > shorter) & ((need(c) <= length) | (length == rows))
            carry = jax.lax.while_loop(
                lambda c: goes_on(c) & fits(c),
                lambda c: jax.lax.fori_loop(0, segment, lambda _, c: step(length, c), c),
                carry,
            )
        return carry

    carry = jax.lax.while_loop(goes_on, run, carry)
    return _finish(carry, slot)


def _finish(carry: _Carry, slot) -> tuple[T.Tree, Stats]:
    """The tree of what the loop left: lines still running are CUT, lines that ended are leaves."""
    lines, grid = carry.lines, carry.grid
    cut = _last_cell(lines) & (lines.status == ACTIVE)[:, None]
    done = (lines.status == DONE)[..., None]
    leaf = jnp.stack([lines.cursor - 1, slot], axis=-1)
    tree = T.Tree(
        **dict(grid, end=jnp.where(cut, T.CUT, grid["end"]), parent=jnp.where(grid["used"], grid["parent"], T.NONE)),
        leaf=jnp.where(done, leaf, T.NONE),
        leaf_path=jnp.where(done, lines.path, T.NONE),
    )
    return tree, carry.stats
