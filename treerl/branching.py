"""Where to fork: branching rules, pure functions of what the sampler sees at a step."""
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
        lines, logits, drawn = frontier.lines, frontier.logits, frontier.drawn
        batch, slots = drawn.shape
        best, score = [], []  # the likeliest tokens, one more than children, each found by one pass
        left = logits
        for _ in range(max_children + 1):
            best.append(jnp.argmax(left, -1))
            # read before it is masked: a vocabulary that is used up gives -inf, never a candidate
            score.append(jnp.take_along_axis(left, best[-1][..., None], axis=-1)[..., 0])
            left = jnp.where(jnp.arange(logits.shape[-1]) == best[-1][..., None], -jnp.inf, left)
        best, score = jnp.stack(best, -1), jnp.stack(score, -1)  # [B, K, M + 1]
        top = score[..., :1]
        score = score - (top + jnp.log(jnp.sum(jnp.exp(logits - top), -1, keepdims=True)))
        bar = jnp.log(jnp.maximum(tau_abs, jnp.exp(score[..., :1]) - tau_rel))
        active = lines.status == ACTIVE
        may_fork = active & lines.may_fork
        forced = jnp.where(may_fork & greedy, best[..., 0], -1)
        taken = jnp.where(forced >= 0, forced, drawn)[..., None]
        forks = may_fork & (score[..., 1] > bar[..., 0])  # two candidates
        child = (score > bar) & (best != taken) & forks[..., None]
        child &= jnp.cumsum(child, axis=-1) <= max_children
        tokens = best.reshape(batch, -1)  # [B, K * (M + 1)], line-major
        scores = jnp.where(child, score, -jnp.inf).reshape(batch, -1)
        order = jnp.argsort(-scores, axis=-1, stable=True)

        free = (lines.status == FREE) & (frontier.free == 0)
        nth = jnp.minimum(jnp.cumsum(free, axis=-1) - 1, order.shape[-1] - 1)
        pick = jnp.take_along_axis(order, jnp.maximum(nth, 0), axis=-1)
        admitted = free & (jnp.cumsum(free, axis=-1) <= order.shape[-1])
        admitted &= jnp.take_along_axis(scores, pick, axis=-1) > -jnp.inf
        line = jnp.where(admitted, pick // (max_children + 1), -1)
        row = jnp.take_along_axis(lines.cursor, jnp.maximum(line, 0), axis=-1) - 1
        child = jnp.where(admitted, jnp.take_along_axis(tokens, pick, axis=-1), -1)

        late = (frontier.iteration >= fill_after) | ~jnp.any(active, -1, keepdims=True)
        fill = free & ~admitted & late
        line = jnp.where(fill, jnp.arange(slots), line)
        row = jnp.where(fill, -1, row)
        return forced, Births(line=line, row=row, token=child, may_fork=admitted)

    return Branching(start=start, step=step)
