"""Shared containers and the glossary of axis letters.

    B  trees (one a prompt)            V  vocabulary
    S  rows: depth below the prompt    D  width of the model
    K  columns: slots                  H  query heads      G  key/value heads
    L  leaves of a tree                C  tokens of a bin  P  prompt positions
    M  children a fork may get         N  bins             E  end-of-sequence ids

Batched, B in front: rules, `sample`, `grade`, `pack`. Of one tree: its algebra, estimators. Of one answer: graders.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

Params = Any  # nested dict of arrays


@chex.dataclass(frozen=True)
class Prompts:
    """A batch of prompts, right-padded."""

    token: jax.Array  # [B, P] int32
    length: jax.Array  # [B] int32, at least 1
    index: jax.Array  # [B] int32, position in the stream of examples: part of the random key
    data: Any  # pytree of [B, ...]: what the task's grader needs


@chex.dataclass(frozen=True)
class TrainState:
    """Everything that decides the next step; restoring it replays the same numbers."""

    params: Params
    opt_state: Any
    reference: Params  # frozen policy of the KL term and of ACE, None without one
    memory: Any  # what multipliers remember (GDRO's scores), {} without one
    quality: Any  # head that scores rollouts: dict of params, opt_state and table (survival.Calibration); None without
    step: jax.Array  # [] int32, number of updates of the policy by reinforcement learning
    key: jax.Array  # [2] uint32, the run's random key (constant; steps fold their number in)
    position: jax.Array  # [] int32, number of examples drawn from the stream so far
    skipped: jax.Array  # [] int32, updates skipped in a row, up to now, for what was not finite


class Cells(NamedTuple):
    """What each cell of a tree contributes to the loss, see `tree.spread`; float32 [..., S, K], 0 outside kept cells."""

    positive: jax.Array  # weighted sum of positive credit of the leaves below
    negative: jax.Array  # of negative credit
    weight: jax.Array  # of the cell's token, in KL and metrics


class Policy(NamedTuple):
    """What the sampler needs of a model. The functions close over the parameters.

    prefill(token [B, P], length [B]) -> cache: whatever `decode` needs of the prompts.
    decode(cache, token, row, path, write, rows) -> (logits [B, K, V] float32, cache): the
        distribution after each slot's head. token [B, K] is the head's token, row [B, K] its row,
        -1 for the prompt (the token then means nothing), path [B, K, S] the column of each of its
        ancestors and itself, write [B, K] whether its keys and values are new; rows (static)
        bounds every row in use.

    Only where a pruning rule has a `review`, or hidden states are asked for:
    hidden(cache) -> [B, K, D]: hidden states of the heads decoded last.
    gather(cache, path [B, C, S]) -> cache of C slots: what the cells of the n-th path have, all in slot n, at their rows.

    kernels: logits lie on one GPU, and kernels may read them.
    """

    prefill: Callable
    decode: Callable
    hidden: Callable | None = None
    gather: Callable | None = None
    kernels: bool = False


FREE, ACTIVE, DONE = 0, 1, 2  # status of a slot; DONE holds a leaf and stays taken


@chex.dataclass(frozen=True)
class Lines:
    """What the sampler knows of each slot's line, as branching and pruning rules see it."""

    status: jax.Array  # [B, K] int32, FREE, ACTIVE or DONE
    cursor: jax.Array  # [B, K] int32, the next row to write; the head lies one above
    path: jax.Array  # [B, K, S] int32, column of each cell of the line, -1 from the cursor on
    birth: jax.Array  # [B, K] int32, row of the line's first own token
    parent: jax.Array  # [B, K] int32, slot of the line it forked from, -1 if from the prompt
    may_fork: jax.Array  # [B, K] bool
    started: jax.Array  # [B, K] int32, how often the slot was started by a draw
    key: jax.Array  # [B, K, 2] uint32, the line's identity in the random stream


def empty_lines(batch: int, slots: int, rows: int) -> Lines:
    """Lines before anything starts, every slot FREE: where the sampler begins, and enough to try a rule alone."""
    zero = jnp.zeros((batch, slots), jnp.int32)
    return Lines(
        status=zero, cursor=zero, path=jnp.full((batch, slots, rows), -1, jnp.int32), birth=zero, parent=zero - 1,
        may_fork=zero > 0, started=zero, key=jnp.zeros((batch, slots, 2), jnp.uint32),
    )  # fmt: skip


class Frontier(NamedTuple):
    """What a branching rule sees at one iteration of the sampler."""

    lines: Lines
    logits: jax.Array  # [B, K, V] float32, untempered
    drawn: jax.Array  # [B, K] int32, the token sampled for each active line
    entropy: jax.Array  # [B, K] float32, nats, of the tempered distribution
    best: jax.Array  # [B, K, M] int32, the likeliest tokens in descending order, M = Branching.candidates
    score: jax.Array  # [B, K, M] float32, their untempered log-probs, -inf where fewer are possible
    free: jax.Array  # [B, K] int32, first row the slot may be reborn at; S + 1 if it is taken
    iteration: jax.Array  # [] int32


class Births(NamedTuple):
    """Lines that a branching rule starts in free slots. The sampler ignores a birth that breaks what is said here."""

    line: jax.Array  # [B, K] int32, slot of the line whose path is copied, ACTIVE or DONE (at the
    #                  prompt any, even FREE); -1 for no birth
    row: jax.Array  # [B, K] int32, row of the cell forked at, on that line and above the end of a
    #                 DONE one; -1 is the prompt; at least Frontier.free - 1
    token: jax.Array  # [B, K] int32, forced first token (the cell must be an ACTIVE line's head now),
    #                   or -1: the newborn decodes that cell and draws at the next iteration
    may_fork: jax.Array  # [B, K] bool


class Branching(NamedTuple):
    """A branching rule.

    start(B, K) -> (bool [B, K] lines that start at the prompt, bool [B, K] which may fork).
    step(Frontier) -> (token [B, K], Births): the token each active line takes, -1 for the one
        drawn, and the lines to start.
    candidates: how many of each line's likeliest tokens the rule wants to see (static).

    A tree in which nothing runs, and nothing ran at the iteration before, is over: no line starts
    in it any more, even while other trees go on, so a rule can look at the iteration's number.
    """

    start: Callable
    step: Callable
    candidates: int = 0


class Review(NamedTuple):
    """What a pruning rule says when it looks at all lines of the trees, once."""

    reason: jax.Array  # [B, K] int8, 0 to go on, else as in Pruning
    fork: jax.Array  # [B, K] int32, a running line whose path a FREE slot continues with draws of its own; -1 for none
    record: Any  # pytree of arrays, handed to the sampler's caller


class Pruning(NamedTuple):
    """A pruning rule, a pair of functions around a memory of its own, or a look at all lines at one moment.

    start(B, K) -> memory.
    step(memory, Lines, cells) -> (reason [B, K] int8, 0 to go on, memory); cells has token, entropy, logp_policy and
        the other fields [S, K] of `tree.Tree` by name, as [B, S, K], up to the newest tokens. A DONE line can be pruned
        too, and is then no leaf. In a tree that is over (see Branching) none is.
    review(Lines, hidden [B, K, D], key [B] typed keys, one a tree) -> Review, or None without one. The sampler
        calls it once (`sample`, review_at); hidden is of the cell that each line's newest token was drawn from.
        From then on no line is born but those it forks, and lines may move to other slots of a smaller
        pool, where `step` is not called any more.

    A reason is tree.PRUNED or above, as it becomes the `end` of the line's last cell, where 1 to 3
    are the other ends. One that pictures should tell apart needs a number in tree.py and a name in draw.view.ENDS.
    """

    start: Callable
    step: Callable
    review: Callable | None = None
