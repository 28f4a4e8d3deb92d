"""Where to fork: branching rules, pure functions of what the sampler sees at a step.

A rule's keyword-only arguments are numbers of the section `branching` (those of `lookahead`, traced, where it names
them), or options of its own, with the type of their default.
"""

import jax
import jax.numpy as jnp

from treerl.types import ACTIVE, FREE, Births, Branching, Frontier


def stochastic() -> Branching:
    """K independent samples: every slot starts at the prompt and nothing forks (plain GRPO)."""

    def start(batch, slots):
        return jnp.ones((batch, slots), bool), jnp.zeros((batch, slots), bool)

    def step(frontier: Frontier):
        none = jnp.full_like(frontier.drawn, -1)
        return none, Births(line=none, row=none, token=none, may_fork=none >= 0)

    return Branching(start=start, step=step)


def _empty(frontier: Frontier) -> jax.Array:
    """Slots in whose column nothing is held, where a line may start at any row: bool [B, K]."""
    return (frontier.lines.status == FREE) & (frontier.free == 0)


def admit(frontier: Frontier, token: jax.Array, score: jax.Array) -> Births:
    """Starts the candidates of highest score at the heads of their lines, one in each empty slot.

    Slots are filled from the left by descending score, ties by line and then by candidate; when a
    tree's slots run out, the rest is dropped. A newborn may fork. A line takes a token of its own
    besides, so a rule should not offer that one.

    Args:
      frontier: what the rule sees.
      token: [B, K, M] int32, up to M candidates for the next token of each line.
      score: [B, K, M] float32, only compared within a tree; -inf where a candidate is not wanted.
        Candidates of lines that do not run are never wanted.
    """
    lines, (batch, _, children) = frontier.lines, token.shape
    score = jnp.where((lines.status == ACTIVE)[..., None], score, -jnp.inf)
    tokens, scores = token.reshape(batch, -1), score.reshape(batch, -1)  # [B, K * M], line-major
    order = jnp.argsort(-scores, axis=-1, stable=True)

    empty = _empty(frontier)
    rank = jnp.cumsum(empty, axis=-1) - 1  # of each empty slot, and so of the candidate it gets
    pick = jnp.take_along_axis(order, jnp.clip(rank, 0, order.shape[-1] - 1), axis=-1)
    admitted = empty & (rank < order.shape[-1]) & (jnp.take_along_axis(scores, pick, axis=-1) > -jnp.inf)
    line = jnp.where(admitted, pick // children, -1)
    row = jnp.take_along_axis(lines.cursor, jnp.maximum(line, 0), axis=-1) - 1
    token = jnp.where(admitted, jnp.take_along_axis(tokens, pick, axis=-1), -1)
    return Births(line=line, row=row, token=token, may_fork=admitted)


def lookahead(*, tau_abs, tau_rel, share, fill_after, greedy, max_children: int = 2) -> Branching:
    """Forks into every likely token (LATR, arXiv 2510.24302, section 3, eq. 5).

    At each step of a tree line, on untempered probabilities p, the candidates are the tokens with
        p > tau_abs   and   p_top - p < tau_rel;
    with two or more, a child starts on every candidate but the token the line itself takes, at
    most `max_children`, the most probable first. When a tree's slots run out, its children are
    admitted by descending probability; the others are dropped. Parent and child both run on.

    Paper and released code disagree or are silent on the following; this is:
      - the line itself samples (code: argmax), so thresholds that never fire give plain sampling,
        token for token; `greedy` gives the code's argmax line;
      - p_top - p < tau_rel as printed (the code had the sign inverted until January 2026);
      - admission by probability as printed (code: by row, older branches first);
      - a finished line holds its slot, and an end-of-sequence token can be a candidate (code);
      - hybrid (eq. 9): round(share * K) slots grow the tree, the others sample from the prompt;
      - the paper hands over to sampling once a tree is full, the code once all are. Here lines
        sample all the time, and slots still empty after `fill_after` iterations (or as soon as
        nothing of the tree runs) start from the prompt as samples that do not fork.

    Args:
      tau_abs, tau_rel: [] float32 thresholds. share: [] float32 in [0, 1], eta of eq. 9.
      fill_after: [] int32, iterations. greedy: [] bool. All traced: a new value compiles nothing.
      max_children: children a fork may have besides the line itself.
    """

    def start(batch, slots):
        slot = jnp.arange(slots)
        grown = jnp.round(share * slots).astype(jnp.int32)
        roots = (slot == 0) & (grown > 0)
        begins = roots | (slot >= grown)
        return tuple(jnp.broadcast_to(x, (batch, slots)) for x in (begins, roots))

    def step(frontier: Frontier):
        lines, drawn = frontier.lines, frontier.drawn
        slots = drawn.shape[1]
        best, score = frontier.best, frontier.score  # [B, K, M + 1]
        bar = jnp.log(jnp.maximum(tau_abs, jnp.exp(score[..., :1]) - tau_rel))
        active = lines.status == ACTIVE
        may_fork = active & lines.may_fork
        forced = jnp.where(may_fork & greedy, best[..., 0], -1)
        taken = jnp.where(forced >= 0, forced, drawn)[..., None]
        forks = may_fork & (score[..., 1] > bar[..., 0])  # two candidates
        child = (score > bar) & (best != taken) & forks[..., None]
        child &= jnp.cumsum(child, axis=-1) <= max_children
        births = admit(frontier, best, jnp.where(child, score, -jnp.inf))

        late = (frontier.iteration >= fill_after) | ~jnp.any(active, -1, keepdims=True)
        fill = _empty(frontier) & (births.line < 0) & late
        line = jnp.where(fill, jnp.arange(slots), births.line)
        return forced, births._replace(line=line, row=jnp.where(fill, -1, births.row))

    return Branching(start=start, step=step, candidates=max_children + 1)


RULES = {"stochastic": stochastic, "lookahead": lookahead}
