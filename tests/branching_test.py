"""Branching rules alone, on lines made by hand: no sampler, no model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treerl import branching, nucleus
from treerl.types import ACTIVE, FREE, Frontier, empty_lines


def first_step(probabilities, slots, drawn=0, candidates=1):
    """What a rule sees when the line in slot 0 is about to take its first token: probabilities [V]."""
    lines = empty_lines(1, slots, 4)
    own = jnp.arange(slots) == 0
    lines = lines.replace(status=jnp.where(own, ACTIVE, lines.status), may_fork=lines.may_fork | own)
    logits = jnp.broadcast_to(jnp.log(jnp.asarray(probabilities, jnp.float32)), (1, slots, len(probabilities)))
    zero = jnp.zeros((1, slots), jnp.int32)
    best, score = nucleus.likeliest(logits, candidates)
    return Frontier(
        lines=lines, logits=logits, drawn=zero + drawn, entropy=zero * 1.0, best=best, score=score, free=jnp.where(own, 5, 0)[None],
        iteration=jnp.int32(0),
    )  # fmt: skip


@pytest.mark.parametrize("max_children", [1, 2, 3, 4])
@pytest.mark.parametrize("probabilities", [(0.6, 0.4), (0.5, 0.3, 0.2), (0.6, 0.4, 0.0, 0.0, 0.0)], ids=str)
def test_a_vocabulary_that_is_used_up_gives_no_more_children(max_children, probabilities):
    """As many children as the vocabulary has tokens or more, or tokens masked by -inf: no line is born twice."""
    rule = branching.lookahead(tau_abs=0.05, tau_rel=0.9, share=1.0, fill_after=9, greedy=False, max_children=max_children)
    drawn = 1  # so that token 0, the argmax of nothing, is not the line's own
    _, births = rule.step(first_step(probabilities, 7, drawn, rule.candidates))
    children = [int(t) for t in births.token[0] if t >= 0]
    likely = [int(t) for t in np.argsort(-np.asarray(probabilities), kind="stable") if probabilities[t] and t != drawn]
    assert children == likely[:max_children]
    assert int((births.line >= 0).sum()) == len(children)


def test_likeliest_are_the_top_of_a_sort():
    logits = np.random.default_rng(0).normal(size=(3, 4, 9)).astype(np.float32)
    logits[0, 0, 2:] = -np.inf
    token, logp = jax.jit(nucleus.likeliest, static_argnums=1)(logits, 5)
    want = np.asarray(jax.nn.log_softmax(logits))
    np.testing.assert_allclose(logp, -np.sort(-want, axis=-1)[..., :5], atol=1e-6)
    at = np.isfinite(logp)
    assert not at[0, 0, 2:].any() and at.sum() == 12 * 5 - 3
    np.testing.assert_array_equal(np.asarray(token)[at], np.argsort(-want, axis=-1)[..., :5][at])


def test_admission_against_a_walk_over_sorted_candidates():
    """Random candidates of 6 lines in random states; what is admitted, where and in which order."""
    rng = np.random.default_rng(0)
    slots, children, full = 6, 3, 0
    admit = jax.jit(branching.admit)
    for _ in range(60):
        status, cursor, free = rng.integers(0, 3, slots), rng.integers(0, 4, slots), rng.integers(0, 2, slots)
        token = rng.integers(0, 9, (slots, children))
        score = np.where(rng.random((slots, children)) < 0.4, -np.inf, rng.integers(0, 4, (slots, children)))
        lines = empty_lines(1, slots, 4).replace(status=jnp.asarray([status]), cursor=jnp.asarray([cursor]))
        frontier = first_step([1.0], slots)._replace(lines=lines, free=jnp.asarray([free]))
        births = admit(frontier, jnp.asarray([token]), jnp.asarray([score], jnp.float32))
        wanted = [(line, m) for line in range(slots) for m in range(children)]
        wanted = [(line, m) for line, m in wanted if status[line] == ACTIVE and score[line, m] > -np.inf]
        wanted.sort(key=lambda at: -score[at])
        empty = [k for k in range(slots) if status[k] == FREE and not free[k]]
        want = {slot: (at[0], cursor[at[0]] - 1, token[at], True) for slot, at in zip(empty, wanted)}
        got = np.stack([births.line, births.row, births.token, births.may_fork], -1)[0]
        assert {k: tuple(got[k]) for k in range(slots) if got[k, 0] >= 0} == want
        full += len(wanted) > len(empty) > 0
    assert full > 5
