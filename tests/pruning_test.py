"""Edit distances against the textbook, and the similarity rule against its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import sampler_test

from treerl import pruning, tree as T
from treerl.types import ACTIVE, DONE, Lines, empty_lines


def test_distance_extended_token_by_token_equals_the_textbook():
    rng = np.random.default_rng(0)
    size = 7
    extend = jax.jit(pruning.extend_distance)
    for _ in range(40):
        a, b = rng.integers(0, 3, (2, size))
        row = column = jnp.zeros(size + 1, jnp.int32)
        for n in range(1, size + 1):
            hidden = np.arange(size) >= n  # what is not known yet must not matter
            row, column = extend(row, column, jnp.where(hidden, 9, a), jnp.where(hidden, 8, b), n)
            want = [oracles.levenshtein(tuple(a[:n]), tuple(b[:j])) for j in range(n + 1)]
            np.testing.assert_array_equal(row[: n + 1], want)
            want = [oracles.levenshtein(tuple(a[:i]), tuple(b[:n])) for i in range(n + 1)]
            np.testing.assert_array_equal(column[: n + 1], want)


def children_at_risk(one, windows):
    """For each fork still in the tree: (slot, parent slot, birth row)."""
    for row, slot in np.argwhere(one.used & (one.source == T.FORCED)):
        above = one.parent[row, slot]
        heir = [
            k for k in range(one.used.shape[1])
            if k != slot and one.used[row, k] and one.parent[row, k] == above and one.source[row, k] == T.SAMPLED
        ]  # fmt: skip
        if heir:
            yield slot, heir[0], row


def line(one, slot, birth):
    """Tokens of the line in a column from its birth to its end; what was reborn below is not its."""
    tokens = [int(one.token[birth, slot])]
    for row in range(birth + 1, one.used.shape[0]):
        if one.end[row - 1, slot] or not one.used[row, slot] or one.parent[row, slot] != slot:
            break
        tokens.append(int(one.token[row, slot]))
    return tokens


@pytest.mark.parametrize("windows", [(3,), (2, 5)])
def test_no_surviving_child_repeats_its_parent_and_every_pruned_one_did(windows):
    pruned = survived = 0
    for seed in range(8):
        tree, _ = sampler_test.grow(
            sampler_test.table(seed, peak=2.0), jax.random.key(seed), jnp.arange(sampler_test.B), rule="lookahead",
            prune="similarity", windows=windows, tau_abs=0.05, tau_rel=0.9, tau_ed=0.6, fill_after=99,
        )  # fmt: skip
        for one in sampler_test.each(tree):
            for slot, parent, birth in children_at_risk(one, windows):
                mine, theirs = line(one, slot, birth), line(one, parent, birth)
                distances = {
                    r: oracles.levenshtein(tuple(mine[:r]), tuple(theirs[:r])) / r
                    for r in windows
                    if len(mine) > r and len(theirs) > r  # neither ended inside the window
                }
                last = birth + len(mine) - 1
                if one.end[last, slot] == T.SIMILAR:
                    own = len(mine)
                    if own in windows and len(theirs) >= own:
                        assert oracles.levenshtein(tuple(mine), tuple(theirs[:own])) / own < 0.6
                        pruned += 1
                else:
                    survived += sum(d >= 0.6 for d in distances.values())
                    assert all(d >= 0.6 for d in distances.values())
    assert pruned > 5 and survived > 5


def test_descendants_go_with_the_child_even_finished_ones():
    """A hand-made set of lines: slot 1 is a copy of slot 0, slot 2 and (finished) 3 stem from 1."""
    path = np.full((1, 5, 4), -1)
    path[0, 0, :3] = 0
    path[0, 1, :3] = [0, 1, 1]
    path[0, 2, :3] = [0, 1, 2]
    path[0, 3, :3] = [0, 1, 3]
    path[0, 4, :3] = [0, 0, 4]
    array = lambda x: jnp.asarray([x])
    lines = Lines(
        status=array([ACTIVE, ACTIVE, ACTIVE, DONE, ACTIVE]), cursor=array([3] * 5), path=jnp.asarray(path),
        birth=array([0, 1, 2, 2, 2]), parent=array([-1, 0, 1, 1, 0]), may_fork=array([True] * 5),
        started=array([0] * 5), key=jnp.zeros((1, 5, 2), jnp.uint32),
    )  # fmt: skip
    rule = pruning.similarity(windows=(2,), tau_ed=1.1)  # prunes every child that is due
    token = jnp.zeros((1, 4, 5), jnp.int32)
    reason, _ = jax.jit(rule.step)(rule.start(1, 5), lines, dict(token=token))
    np.testing.assert_array_equal(reason, [[0, T.SIMILAR, T.SIMILAR, T.SIMILAR, 0]])


def two_lines(**changes):
    """Slot 1 forked from slot 0 at row 1 and says the same; both have rows 1 and 2: window 2 is due."""
    path = np.full((1, 2, 4), -1)
    path[0, 0, :3], path[0, 1, :3] = 0, [0, 1, 1]
    array = lambda x: jnp.asarray([x])
    fields = dict(
        status=array([ACTIVE, ACTIVE]), cursor=array([3, 3]), path=jnp.asarray(path), birth=array([0, 1]),
        parent=array([-1, 0]), may_fork=array([True] * 2), started=array([1, 0]), key=jnp.zeros((1, 2, 2), jnp.uint32),
    )  # fmt: skip
    return Lines(**(fields | {name: array(value) for name, value in changes.items()}))


@pytest.mark.parametrize(
    "changes, pruned",
    [
        ({}, True),
        (dict(status=[2, 1], cursor=[3, 3]), False),  # the parent ended with the window's last row
        (dict(status=[2, 1], cursor=[2, 3]), False),  # the parent ended before
        (dict(status=[0, 1], cursor=[2, 3]), False),  # the parent was pruned before
        (dict(status=[1, 2]), False),  # the child ended with the window's last row
        (dict(cursor=[4, 4]), False),  # the window is over
        (dict(parent=[-1, -1]), False),  # no child
    ],
)
def test_a_child_is_kept_if_either_line_ended_inside_the_window(changes, pruned):
    rule = pruning.similarity(windows=(2,), tau_ed=1.1)
    step = jax.jit(rule.step)
    reason, _ = step(rule.start(1, 2), two_lines(**changes), dict(token=jnp.zeros((1, 4, 2), jnp.int32)))
    np.testing.assert_array_equal(reason, [[0, T.SIMILAR if pruned else 0]])


def test_threshold_extremes():
    for tau_ed, all_go in ((0.0, False), (1.5, True)):
        tree, stats = sampler_test.grow(
            sampler_test.table(4), jax.random.key(0), jnp.arange(sampler_test.B), rule="lookahead", prune="similarity",
            windows=(2,), tau_ed=tau_ed, eos=(-1,), fill_after=99, tau_abs=0.05, tau_rel=0.9,
        )  # fmt: skip
        assert bool(stats.pruned.sum() > 0) == all_go
        if all_go:  # no child outlives its window of two tokens, which the last row may cut off
            for one in sampler_test.each(tree):
                for row, slot in np.argwhere(one.used & (one.source == T.FORCED)):
                    assert len(line(one, slot, row)) <= 2


def test_a_child_reborn_above_its_parents_birth_is_compared_along_the_parents_path():
    """Slot 1 forked from slot 0 at row 2; slot 2 is reborn on slot 1's line at row 0, where that stands on slot 0."""
    rule = pruning.similarity(windows=(1,), tau_ed=0.5)
    lines = empty_lines(1, 3, 4).replace(
        status=jnp.full((1, 3), ACTIVE), cursor=jnp.array([[3, 3, 2]]), birth=jnp.array([[0, 2, 1]]),
        parent=jnp.array([[-1, 0, 1]]), path=jnp.array([[[0, 0, 0, -1], [0, 0, 1, -1], [0, 2, -1, -1]]]),
    )  # fmt: skip
    for said, pruned in ((6, True), (9, False)):  # slot 0 says 6 at row 1; 9 is old, in the column of slot 1
        token = jnp.array([[[5, 0, 0], [6, 9, said], [7, 4, 0], [0, 0, 0]]])
        reason, _ = rule.step(rule.start(1, 3), lines, dict(token=token))
        np.testing.assert_array_equal(reason, [[0, 0, T.SIMILAR if pruned else 0]])
