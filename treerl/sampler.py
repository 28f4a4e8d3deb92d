"""Grow a tree of continuations for every prompt, in one compiled loop.

The sampler takes a policy and two rules as functions and never sees a model. Each iteration
decodes the head of every slot, draws, lets the branching rule override and start lines, writes,
and lets the pruning rule stop lines. Trees do not depend on each other, on their place in the
batch or on the number of devices: every draw folds (key, example, line identity, row).

(The review of `survival.arrol` alone compares the trees of a batch.)

In an environment (`treerl.episodes`) a line is an episode: tokens of observations are the environment's and are fed
through the slot's cursor like drawn ones, and a line ends with its episode.

A rule may review all lines once. When few enough of each tree run after that, they go on in a smaller pool
(`treerl.compaction`); what a line draws does not depend on the pool.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from treerl import compaction, episodes, tree as T
from treerl.compaction import take
from treerl.environments import Environment
from treerl.nucleus import survey
from treerl.types import ACTIVE, DONE, FREE, Births, Branching, Frontier, Lines, Policy, Prompts, Pruning, empty_lines

_GRID = ("token", "parent", "used", "source", "end", "entropy", "logp_behavior", "logp_policy")


class Stats(NamedTuple):
    """What happened while a tree grew; a pruned line leaves no other trace. All int32 [B]."""

    sampled: jax.Array  # tokens of the policy written, those of pruned lines included
    forks: jax.Array  # lines born on a running line
    restarts: jax.Array  # lines born at the prompt or an older cell after the start
    pruned: jax.Array  # lines stopped by the pruning rule
    iterations: jax.Array  # of the loop, the same for all trees that it grows


class _Carry(NamedTuple):
    lines: Lines
    grid: dict  # the fields of Tree named in _GRID, each [B, S, K]
    cache: object
    memory: object  # of the pruning rule
    stats: Stats
    active: jax.Array  # [B] bool, whether anything of the tree runs or may still be born
    iteration: jax.Array  # [] int32
    hidden: object  # [B, K, D] that each line's newest token was drawn from, () if nobody reads it
    reviewed: jax.Array  # [] bool
    record: object  # of the review, zeros before it
    worlds: object  # episodes.Worlds, () without an environment


class Seen(NamedTuple):
    """What the sampler saw of a model beside the tree."""

    hidden: object  # [B, K, D] that the last token of each slot's line was drawn from, () if not asked for
    record: object  # of the pruning rule's review, () without one


def _fold(key, *values):
    """Folds integers [B, K] into raw keys [B, K, 2]."""

    def one(key, *values):
        key = jax.random.wrap_key_data(key)
        for value in values:
            key = jax.random.fold_in(key, value)
        return jax.random.key_data(key)

    return jax.vmap(jax.vmap(one))(key, *values)


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


def count(mask: jax.Array) -> jax.Array:
    """How many of each tree's slots [B, K]: int32 [B]."""
    return jnp.sum(mask, axis=1, dtype=jnp.int32)


def stop(lines: Lines, end: jax.Array, reason: jax.Array, active: jax.Array) -> tuple[Lines, jax.Array, jax.Array]:
    """Stops lines for a reason [B, K] above 0, in trees that are active [B].

    Returns:
      (lines, end [B, S, K] with the reason at their last cells, which lines stopped [B, K]).
    """
    stopped = (reason > 0) & (lines.status != FREE) & active[:, None]
    end = jnp.where(_last_cell(lines) & stopped[:, None], reason[:, None].astype(end.dtype), end)
    return lines.replace(status=jnp.where(stopped, FREE, lines.status)), end, stopped


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
    review_at: int = 0,
    columns: int | None = None,
    hidden: bool = False,
    environment: Environment | None = None,
    worlds: episodes.Worlds | None = None,
    anchor: str = "state",
    fork_at: str = "token",
    penalty: jax.Array | float = 0.0,
) -> tuple[T.Tree, Stats, Seen]:
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
      review_at: iterations (static), rounded up to whole segments, after which the rule's review happens.
      columns: slots (static, K or fewer) of the pool that lines move to when at most so many run in every tree after
        the review. A tree with more keeps all of them in the large pool: slower, nothing is lost.
      hidden: keep hidden states for the caller (static); a rule with a review always has them.
      environment: whose episodes the lines are (static), and worlds, their start, see `episodes.begin`. Lines are born at
        the prompt or at a running line's head; those that listen fork nowhere. eos are the ends of actions. Without: text.
      anchor: see `episodes.begin` (static). fork_at: token, or turn: only where an action begins (static).
      penalty: [] float32, what an invalid action costs.

    Returns:
      (Tree with B in front, Stats, Seen).
    """
    keeps, reviews = hidden or pruning.review is not None, pruning.review is not None
    if keeps and policy.hidden is None or reviews and policy.gather is None:
        raise ValueError("the policy gives no hidden states, or cannot move lines; a review needs Policy.hidden and gather.")
    columns = slots if columns is None else columns
    if not 1 <= columns <= slots:
        raise ValueError(f"columns={columns} must be 1 to slots={slots}.")
    if tuple(sorted(set(lengths))) != tuple(lengths) or lengths[-1] != rows:
        raise ValueError(f"sampler.lengths={lengths} must ascend and end with the rows, {rows}.")
    batch = prompts.token.shape[0]
    first = jnp.broadcast_to(jnp.arange(slots), (batch, slots))
    tree_key = jax.vmap(lambda i: jax.random.key_data(jax.random.fold_in(key, i)))(prompts.index)
    slot_key = _fold(jnp.broadcast_to(tree_key[:, None], first.shape + (2,)), first)
    cache = policy.prefill(prompts.token, prompts.length)

    def decide(carry: _Carry, logits, grows):
        """Draws for every line and asks the branching rule."""
        lines = carry.lines
        noise = _fold(lines.key, lines.cursor)
        uniform = jax.vmap(jax.vmap(lambda k: jax.random.uniform(jax.random.wrap_key_data(k))))(noise)
        drawn, best, score = survey(logits, temperature, top_p, uniform, branching.candidates, fused=policy.kernels)
        free = _free_from(lines)
        shown = lines
        if environment is not None:
            forkable = episodes.fresh(carry.worlds) if fork_at == "turn" else ~episodes.listens(carry.worlds)
            shown = lines.replace(may_fork=lines.may_fork & forkable)
        token, births = branching.step(Frontier(shown, logits, drawn.token, drawn.entropy, best, score, free, carry.iteration))
        if not grows:
            return drawn, token, births._replace(line=jnp.full_like(births.line, -1))
        allowed = (births.line >= 0) & (free <= births.row + 1) & ~carry.reviewed
        status, head = take(lines.status, births.line), take(lines.cursor, births.line) - 1
        # above the end of a line that runs or is finished, a forced token at a head, whose logits its log-prob is of
        held = (status != FREE) & (births.row <= head - (status == DONE))
        held &= (births.token < 0) | (births.row == head)
        if environment is not None:  # what is known of an episode is its end
            held &= (births.row == head) & (status == ACTIVE)
            held &= (births.token < 0) | ~take(episodes.listens(carry.worlds), births.line)
        allowed &= held | ((births.row < 0) & (births.token < 0))  # the prompt is nobody's
        allowed &= carry.active[:, None]  # a tree that is over is only stepped because others are not
        return drawn, token, births._replace(line=jnp.where(allowed, births.line, -1))

    def newborn(lines: Lines, births: Births):
        """Lines with those just born in their slots, cursor at their first own row."""
        born = births.line >= 0
        forced = born & (births.token >= 0)
        row = births.row + 1
        path = jnp.where(jnp.arange(rows) < row[..., None], take(lines.path, births.line), T.NONE)
        complement = jnp.uint32(0xFFFFFFFF) - row.astype(jnp.uint32)  # never the key of a draw
        # a fork's identity is (its parent's, row, token), that of a start (tree, slot, how often it started, row)
        either = lambda fork, start: jnp.where(forced, fork.astype(jnp.uint32), start.astype(jnp.uint32))
        base = jnp.where(forced[..., None], take(lines.key, births.line), slot_key)
        key = _fold(base, either(complement, lines.started), either(births.token, row))
        pick = lambda new, old: jnp.where(born.reshape(born.shape + (1,) * (old.ndim - 2)), new, old)
        return Lines(
            status=pick(ACTIVE, lines.status),
            cursor=pick(row, lines.cursor),
            path=pick(path, lines.path),
            birth=pick(row, lines.birth),
            parent=pick(jnp.where((births.row >= 0) | forced, births.line, -1), lines.parent),
            may_fork=pick(births.may_fork, lines.may_fork),
            started=lines.started + (born & ~forced),
            key=pick(key, lines.key),
        )

    def clear(lines: Lines, grid: dict, born) -> dict:
        """The grid without what stood where newborn lines will write."""
        below = (jnp.arange(rows)[:, None] >= lines.cursor[:, None]) & born[:, None]  # [B, S, K]
        return dict(grid, used=grid["used"] & ~below, end=jnp.where(below, T.RUNNING, grid["end"]))

    def step(rows_in_use, grows, carry: _Carry) -> _Carry:
        lines, grid = carry.lines, carry.grid
        slot = jnp.broadcast_to(jnp.arange(lines.status.shape[1]), lines.status.shape)
        row = _head_row(lines.cursor)
        column = jnp.maximum(jnp.take_along_axis(lines.path, row[..., None], axis=-1)[..., 0], 0)
        head = jax.vmap(lambda token, row, column: token[row, column])(grid["token"], row, column)
        was_active = lines.status == ACTIVE
        write = was_active & (lines.cursor > lines.birth)  # another line's cell has been written by its own
        at = jnp.where(was_active, lines.cursor - 1, T.NONE)  # nobody reads the logits of lines that ended
        logits, cache = policy.decode(carry.cache, head, at, lines.path, write, rows_in_use)
        drawn, ruled, births = decide(carry, logits, grows)

        born = births.line >= 0
        forked = born & (births.token >= 0)
        lines = newborn(lines, births) if grows else lines
        writes = was_active | forked
        source = jnp.where(forked, births.line, slot)  # whose logits the token comes from
        token = jnp.where(forked, births.token, jnp.where(ruled >= 0, ruled, drawn.token))
        forced, told = forked | (ruled >= 0), jnp.zeros_like(forked)
        worlds_now = carry.worlds
        if environment is not None:
            if grows:
                worlds_now = episodes.born(worlds_now, worlds, births.line, births.row)
            told = episodes.listens(worlds_now) & writes
            token, forced = jnp.where(told, episodes.next_word(worlds_now), token), forced & ~told
            turn, worlds_now = worlds_now.turn, episodes.advance(environment, worlds_now, token, writes, eos, anchor)
            turn = turn - told  # an observation belongs to the action that it answers
        at_token = jax.vmap(lambda logits, source, token: logits[source, token])(logits, source, token)
        ended = jnp.any(token[..., None] == eos, axis=-1) if environment is None else worlds_now.over
        end = jnp.where(ended, T.FINISHED, jnp.where(lines.cursor == rows - 1, T.TRUNCATED, T.RUNNING))
        above = jnp.take_along_axis(lines.path, _head_row(lines.cursor)[..., None], axis=-1)[..., 0]
        cell = dict(
            token=token,
            parent=jnp.where(lines.cursor > 0, above, T.NONE),
            used=writes,
            source=jnp.where(told, T.ENVIRONMENT, jnp.where(forced, T.FORCED, T.SAMPLED)),
            end=end,
            entropy=take(drawn.entropy, source),
            logp_behavior=jnp.where(forced | told, 0.0, drawn.logp),
            logp_policy=(at_token - take(drawn.top, source)) / temperature - take(drawn.norm, source),
        )
        if environment is not None:
            cell["turn"] = turn
        here = (jnp.arange(rows)[:, None] == lines.cursor[:, None]) & writes[:, None]  # [B, S, K]
        grid = clear(lines, grid, born) if grows else grid
        grid = {k: jnp.where(here, cell[k][:, None].astype(v.dtype), v) for k, v in grid.items()}
        here = here.swapaxes(1, 2)
        lines = lines.replace(
            path=jnp.where(here, slot[..., None], lines.path),
            cursor=lines.cursor + writes,
            status=jnp.where(writes & (end != T.RUNNING), DONE, lines.status),
        )

        memory, stopped = carry.memory, jnp.zeros(lines.status.shape, bool)
        if grows:
            reason, memory = pruning.step(memory, lines, grid)
            lines, grid["end"], stopped = stop(lines, grid["end"], reason, carry.active)
        stats = Stats(
            sampled=carry.stats.sampled + count(writes & ~told),
            forks=carry.stats.forks + count(forked),
            restarts=carry.stats.restarts + count(born & ~forked),
            pruned=carry.stats.pruned + count(stopped),
            iterations=carry.stats.iterations + 1,
        )
        seen = carry.hidden
        if keeps:
            seen = jnp.where(writes[..., None], take(policy.hidden(cache), source), seen)
        # an empty slot may still be filled at the next iteration, when the rule sees nothing runs
        idle = jnp.any(was_active, axis=1) & jnp.any(lines.status == FREE, axis=1)
        active = jnp.any(lines.status == ACTIVE, axis=1) | (idle if grows else False)
        return carry._replace(
            lines=lines, grid=grid, cache=cache, memory=memory, stats=stats, active=active,
            iteration=carry.iteration + 1, hidden=seen, worlds=worlds_now,
        )  # fmt: skip

    def review(carry: _Carry) -> _Carry:
        """Asks the rule once about all lines; what it changes is small beside the cache, which a cond would copy."""
        keys = jax.random.wrap_key_data(tree_key)

        def look(lines, grid, stats, worlds_now):
            found = pruning.review(lines, carry.hidden, keys)
            lines, end, stopped = stop(lines, grid["end"], found.reason, carry.active)
            grid, row = dict(grid, end=end), take(lines.cursor, found.fork) - 1
            born = (found.fork >= 0) & (take(lines.status, found.fork) == ACTIVE) & (lines.status == FREE)
            born &= (row >= 0) & (_free_from(lines) <= row + 1) & carry.active[:, None]
            none = jnp.full_like(found.fork, -1)
            lines = newborn(lines, Births(jnp.where(born, found.fork, -1), row, none, born & False))
            stats = stats._replace(pruned=stats.pruned + count(stopped), forks=stats.forks + count(born))
            if environment is not None:
                worlds_now = episodes.born(worlds_now, worlds, jnp.where(born, found.fork, -1), row)
            return lines, clear(lines, grid, born), stats, found.record, worlds_now

        same = lambda lines, grid, stats, worlds_now: (lines, grid, stats, carry.record, worlds_now)
        now = ~carry.reviewed & (carry.iteration >= review_at)
        marks = {name: carry.grid[name] for name in ("used", "end")}
        lines, marks, stats, record, met = jax.lax.cond(now, look, same, carry.lines, marks, carry.stats, carry.worlds)
        reviewed = carry.reviewed | now
        return carry._replace(lines=lines, grid=dict(carry.grid, **marks), stats=stats, record=record, reviewed=reviewed, worlds=met)

    begins, may_fork = branching.start(batch, slots)
    none = jnp.full((batch, slots), -1, jnp.int32)
    births = Births(line=jnp.where(begins, first, -1), row=none, token=none, may_fork=may_fork)
    lines = newborn(empty_lines(batch, slots, rows), births)
    blank = jnp.zeros((batch, rows, slots))
    types = dict(token=jnp.int32, parent=jnp.int32, used=bool, source=jnp.int8, end=jnp.int8)
    grid = {name: blank.astype(types.get(name, jnp.float32)) for name in _GRID}
    if environment is not None:
        grid["turn"] = blank.astype(jnp.int32)
    nothing = jnp.zeros((batch,), jnp.int32)
    seen = jnp.zeros_like(policy.hidden(cache), shape=(batch, slots, policy.hidden(cache).shape[-1])) if keeps else ()
    record = ()
    if reviews:
        shapes = jax.eval_shape(pruning.review, lines, seen, jax.random.wrap_key_data(tree_key)).record
        record = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    carry = _Carry(
        lines, grid, cache, pruning.start(batch, slots), Stats(*[nothing] * 5), jnp.ones((batch,), bool), jnp.int32(0),
        seen, jnp.bool_(False), record,
        () if environment is None else jax.tree.map(lambda x: jnp.repeat(x, slots, axis=1), worlds),
    )  # fmt: skip

    def need(carry):
        """Rows that the next segment may touch; a line may be born on any that runs or is finished."""
        held = jnp.where(carry.lines.status != FREE, carry.lines.cursor, 0)
        return jnp.max(held) + segment

    def loop(carry, grows: bool):
        """Iterates until all trees are over, or fit into the smaller pool; `grows` before that (static)."""

        def goes_on(carry):
            more = jnp.any(carry.active) & (carry.iteration < budget)  # the only test over all trees
            if grows and reviews and columns < slots:
                more &= ~(carry.reviewed & jnp.all(compaction.running(carry.lines) <= columns))
            return more

        def waits(carry):
            """For the review."""
            return grows and reviews and ~carry.reviewed & (carry.iteration >= review_at)

        def run(carry):
            carry = review(carry) if grows and reviews else carry
            for shorter, length in zip((0,) + tuple(lengths), lengths):
                fits = lambda c: (need(c) > shorter) & ((need(c) <= length) | (length == rows))
                carry = jax.lax.while_loop(
                    lambda c: goes_on(c) & fits(c) & jnp.logical_not(waits(c)),
                    lambda c: jax.lax.fori_loop(0, segment, lambda _, c: step(length, grows, c), c),
                    carry,
                )
            return carry

        return jax.lax.while_loop(goes_on, run, carry)

    carry = loop(carry, True)
    if reviews and columns < slots:
        moved, lines, grid = compaction.compact(carry.lines, carry.grid, columns)
        narrow = loop(
            carry._replace(
                lines=lines, grid=grid, cache=policy.gather(carry.cache, moved.path), memory=(),
                hidden=take(carry.hidden, moved.slot), worlds=jax.tree.map(lambda x: take(x, moved.slot), carry.worlds),
            ),
            False,
        )  # fmt: skip
        lines, grid = compaction.restore(moved, carry.lines, carry.grid, narrow.lines, narrow.grid)
        carry = carry._replace(
            lines=lines,
            grid=grid,
            stats=narrow.stats,
            hidden=compaction.back(moved, carry.hidden, narrow.hidden),
            worlds=jax.tree.map(functools.partial(compaction.back, moved), carry.worlds, narrow.worlds),
        )
    return *_finish(carry, first, penalty), Seen(carry.hidden if keeps else (), carry.record)


def _finish(carry: _Carry, slot, penalty) -> tuple[T.Tree, Stats]:
    """The tree of what the loop left: lines still running are CUT, lines that ended are leaves."""
    lines, grid = carry.lines, carry.grid
    cut = _last_cell(lines) & (lines.status == ACTIVE)[:, None]
    done = (lines.status == DONE)[..., None]
    leaf = jnp.stack([lines.cursor - 1, slot], axis=-1)
    grid, turn = dict(grid), grid.get("turn")
    grid.pop("turn", None)
    tree = T.Tree(
        turns=None if turn is None else episodes.turns(carry.worlds, turn, done[..., 0], penalty),
        **dict(grid, end=jnp.where(cut, T.CUT, grid["end"]), parent=jnp.where(grid["used"], grid["parent"], T.NONE)),
        leaf=jnp.where(done, leaf, T.NONE),
        leaf_path=jnp.where(done, lines.path, T.NONE),
    )
    return tree, carry.stats
