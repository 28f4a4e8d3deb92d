"""Branching rules alone, on lines made by hand: no sampler, no model."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sampler_test

from treerl import branching
from treerl import tree as T
from treerl.types import ACTIVE, Frontier, empty_lines


def first_step(probabilities, slots, drawn=0):
    """What a rule sees when the line in slot 0 is about to take its first token: probabilities [V]."""
    lines = empty_lines(1, slots, 4)
    own = jnp.arange(slots) == 0
    lines = lines.replace(status=jnp.where(own, ACTIVE, lines.status), may_fork=lines.may_fork | own)
    logits = jnp.broadcast_to(jnp.log(jnp.asarray(probabilities, jnp.float32)), (1, slots, len(probabilities)))
    zero = jnp.zeros((1, slots), jnp.int32)
    return Frontier(
        lines=lines, logits=logits, drawn=zero + drawn, entropy=zero * 1.0, free=jnp.where(own, 5, 0)[None],
        iteration=jnp.int32(0),
    )  # fmt: skip


@pytest.mark.parametrize("max_children", [1, 2, 3, 4])
@pytest.mark.parametrize("probabilities", [(0.6, 0.4), (0.5, 0.3, 0.2), (0.6, 0.4, 0.0, 0.0, 0.0)], ids=str)
def test_a_vocabulary_that_is_used_up_gives_no_more_children(max_children, probabilities):
    """As many children as the vocabulary has tokens or more, or tokens masked by -inf: no line is born twice."""
    rule = branching.lookahead(
        tau_abs=0.05, tau_rel=0.9, share=1.0, fill_after=9, greedy=False, max_children=max_children
    )
    drawn = 1  # so that token 0, the argmax of nothing, is not the line's own
    _, births = rule.step(first_step(probabilities, 7, drawn))
    children = [int(t) for t in births.token[0] if t >= 0]
    likely = [int(t) for t in np.argsort(-np.asarray(probabilities), kind="stable") if probabilities[t] and t != drawn]
    assert children == likely[:max_children]
    assert int((births.line >= 0).sum()) == len(children)
