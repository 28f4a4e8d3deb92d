"""The review of a pruning rule, re-forks and the smaller pool, by a policy whose next token depends on the whole path."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sampler_test import EOS, VOCAB, each

from treerl import branching, compaction, pruning, sampler, survival, tree as T
from treerl.types import ACTIVE, FREE, Policy, Prompts, Review, empty_lines

B, K, S, SEGMENT = 6, 6, 12, 2
DETECTION, LATE = 4, 3
STATES = 31


def history(logits):
    """A policy that reads all tokens of a line from a pool [B, K, S], by a sum that is exact: any lost one shows."""
    logits = jnp.asarray(logits)

    def prefill(token, length):
        batch = token.shape[0]
        return jnp.zeros((batch, K, S), jnp.int32), jnp.zeros((batch, K), jnp.int32), jnp.zeros((batch, K, 3))

    def decode(cache, token, row, path, write, rows):
        pool, *_ = cache
        slots = path.shape[1]
        here = (jnp.arange(S) == row[..., None]) & write[..., None]
        pool = jnp.where(here, token[..., None], pool)
        read = jax.vmap(lambda pool, path: pool[jnp.maximum(path, 0), jnp.arange(S)])(pool, path)
        on = (jnp.arange(S) <= row[..., None]) & (path >= 0)
        state = jnp.sum(jnp.where(on, (read + 1) * (jnp.arange(S) + 2), 0), -1) % STATES
        assert pool.shape[1] == slots
        return logits[state], (pool, state, jnp.stack([state, row, token], -1).astype(jnp.float32))

    def gather(cache, path):
        pool = jax.vmap(lambda pool, path: pool[jnp.maximum(path, 0), jnp.arange(S)])(cache[0], path)
        return pool, jnp.zeros(path.shape[:2], jnp.int32), jnp.zeros((*path.shape[:2], 3))

    return Policy(prefill, decode, hidden=lambda cache: cache[2], gather=gather)


def states(seed):
    logits = np.random.default_rng(seed).normal(size=(STATES, VOCAB)) - 1.5 * (np.arange(VOCAB) == EOS)
    return np.asarray(logits, np.float32)


@functools.partial(jax.jit, static_argnames=("rule", "lookahead", "columns", "refork", "segment", "lengths", "detection"))
def grow(logits, index, *, rule=None, lookahead=False, kappa=0.5, columns=3, refork=False, warm=False, segment=SEGMENT,
         lengths=(S,), detection=DETECTION, greedy=False, least=2):  # fmt: skip
    """(tree, stats, seen); the posterior of a line is the share of its state."""
    branch, late = branching.stochastic(), 0
    if lookahead:
        late = LATE + 1
        branch = branching.lookahead(tau_abs=0.15, tau_rel=0.5, share=0.8, fill_after=LATE, greedy=greedy)
    prune = pruning.none()
    if rule:
        choose = functools.partial(survival.RULES[rule], kappa=kappa, rho=0.5, least=least)
        if rule.startswith("arrol"):
            choose = functools.partial(choose, p_max=1.0)
        judge = lambda hidden: (hidden[..., 0], hidden[..., 0] / STATES)
        prune = pruning.survival(judge, choose, detection=detection, columns=columns, rho=0.5, warm=jnp.bool_(warm), refork=refork)
    pad = Prompts(token=jnp.zeros((B, 2), jnp.int32), length=jnp.ones(B, jnp.int32), index=index, data={})
    return sampler.sample(
        history(logits), branch, prune, pad, jax.random.key(5), slots=K, rows=S, budget=S + late, segment=segment,
        lengths=lengths, temperature=jnp.float32(1), top_p=jnp.float32(1), eos=jnp.array([EOS]),
        review_at=detection + late, columns=columns,
    )  # fmt: skip


def lines_of(tree) -> list[dict]:
    """Of each tree: slot -> tokens of the leaf there."""
    found = []
    for t in each(tree):
        tokens = np.asarray(T.along(t, t.token))
        found.append({k: tokens[k, : t.leaf[k, 0] + 1].tolist() for k in range(K) if t.leaf[k, 0] >= 0})
    return found


def check_log_probs(tree, logits):
    """Every leaf's log-probs are those of the table at the states that its own tokens give."""
    logp = np.asarray(jax.nn.log_softmax(logits))
    tokens, found = np.asarray(T.along(tree, tree.token)), np.asarray(T.along(tree, tree.logp_policy))
    for k in np.flatnonzero(tree.leaf[:, 0] >= 0):
        sums = np.cumsum((tokens[k] + 1) * (np.arange(S) + 2))
        state = np.concatenate([[0], sums])[:-1] % STATES
        length = tree.leaf[k, 0] + 1
        np.testing.assert_allclose(found[k, :length], logp[state, tokens[k]][:length], atol=1e-5)


MODES = dict(lookahead=dict(lookahead=True), greedy=dict(lookahead=True, greedy=True))


@pytest.mark.slow
@pytest.mark.parametrize("rule, mode", [("arrol", {}), ("balance", MODES["lookahead"]), ("random", MODES["greedy"])])
def test_keeping_all_is_bit_identical_to_no_pruning(rule, mode):
    logits, index = states(0), jnp.arange(B)
    plain, stats, _ = grow(logits, index, **mode)
    for options in (dict(kappa=1.0, columns=K), dict(warm=True, columns=K), dict(warm=True)):
        tree, others, seen = grow(logits, index, rule=rule, **options, **mode)
        chex.assert_trees_all_equal(tree, plain)
        chex.assert_trees_all_equal(others, stats)
        assert seen.record.due.any() and np.all(seen.record.keep == seen.record.due) and np.all(seen.record.chance == 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "rule, columns, mode",
    [("balance", 3, {}), ("arrol_group", 4, MODES["lookahead"]), ("balance", 6, MODES["lookahead"]), ("arrol", 3, MODES["greedy"])],
)
def test_survivors_are_those_of_an_unpruned_run_and_the_others_stop_at_detection(rule, columns, mode):
    stopped = 0
    for seed in range(4):
        logits, index = states(seed), jnp.arange(seed, seed + B)
        plain, _, _ = grow(logits, index, **mode)
        tree, stats, seen = grow(logits, index, rule=rule, columns=columns, **mode)
        found = jax.device_get(seen.record)
        assert np.all(stats.pruned == (found.due & ~found.keep).sum(1)) and found.keep.sum(1).max() <= columns
        for b, (mine, whole) in enumerate(zip(lines_of(tree), lines_of(plain))):
            T.check(each(tree)[b])
            dropped = np.flatnonzero(found.due[b] & ~found.keep[b])
            assert mine == {k: tokens for k, tokens in whole.items() if k not in dropped}
            for k in dropped:  # it ended at or after the detection length in the unpruned run
                assert len(whole[k]) >= DETECTION and np.any(each(tree)[b].end[:, k] == T.DROPPED)
            for k in set(whole) - set(dropped):
                assert whole[k] == mine[k]
            cells, same = each(tree)[b], each(plain)[b]
            kept = np.asarray(T.kept(cells))
            for name in ("token", "parent", "source", "entropy", "logp_behavior", "logp_policy"):
                np.testing.assert_array_equal(np.asarray(cells[name])[kept], np.asarray(same[name])[kept], err_msg=name)
        stopped += int(stats.pruned.sum())
    assert stopped > 20


def test_lines_that_ended_before_detection_are_never_pruned():
    logits = states(1) + 3.0 * (np.arange(VOCAB) == EOS)  # short answers
    plain, _, _ = grow(logits, jnp.arange(B))
    tree, stats, seen = grow(logits, jnp.arange(B), rule="random", kappa=0.2, columns=2, least=0)
    short = [{k: x for k, x in lines.items() if len(x) < DETECTION} for lines in lines_of(plain)]
    assert sum(map(len, short)) > 10 and stats.pruned.sum() > 0
    for mine, few in zip(lines_of(tree), short):
        assert few.items() <= mine.items()
    ended = np.asarray(plain.leaf[..., 0] + 1)
    assert not np.any(np.asarray(seen.record.due) & (ended < DETECTION) & (ended > 0))


@pytest.mark.slow
@pytest.mark.parametrize("mode", [{}, MODES["lookahead"]], ids=["stochastic", "lookahead"])
def test_reforks_continue_survivors_in_the_room_that_is_left(mode):
    """Columns 5 of 6, a quarter survives: the rest is filled by lines that share a survivor's path down to the review."""
    born = 0
    for seed in range(4):
        tree, stats, seen = grow(states(seed), jnp.arange(B), rule="balance", kappa=0.25, columns=5, refork=True, **mode)
        plain, before, _ = grow(states(seed), jnp.arange(B), rule="balance", kappa=0.25, columns=5, **mode)
        found = jax.device_get(seen.record)
        for b, t in enumerate(each(tree)):
            T.check(t)
            old, new = lines_of(plain)[b], lines_of(tree)[b]
            assert old.items() <= new.items()  # survivors are as without re-forks
            fresh = set(new) - set(old)
            born += len(fresh)
            survivors = np.flatnonzero(found.keep[b])
            assert len(fresh) == int(stats.forks[b] - before.forks[b])
            assert len(survivors) + len(fresh) <= 5
            starts = [tuple(new[k][:DETECTION]) for k in survivors if k in new]
            check_log_probs(t, states(seed))
            for k in fresh:
                assert tuple(new[k][:DETECTION]) in starts
                row = DETECTION - 1 if not mode else None
                if row is not None:
                    assert t.leaf_path[k, row] != k and t.leaf_path[k, row + 1] == k
        if not mode:
            full = found.due.sum(1) >= 5  # so many could be forked that all room was used
            assert np.all((stats.forks + found.keep.sum(1))[full & (found.keep.sum(1) > 0)] == 5)
    assert born > 20


def test_reforks_draw_tokens_of_their_own():
    tree, *_ = grow(states(2), jnp.arange(B), rule="balance", kappa=0.2, columns=6, refork=True, least=1)
    answers = [tuple(x) for lines in lines_of(tree) for x in lines.values()]
    assert len(set(answers)) > len(answers) * 0.7


@pytest.mark.slow
def test_the_place_in_the_batch_the_segments_and_the_lengths_do_not_change_a_tree():
    logits = states(3)
    whole, _, seen = grow(logits, jnp.arange(B), rule="arrol_group", refork=True, columns=4)
    order = np.array([4, 0, 5, 2, 1, 3])
    moved, _, again = grow(logits, jnp.asarray(order), rule="arrol_group", refork=True, columns=4)
    chex.assert_trees_all_equal(moved, jax.tree.map(lambda x: x[order], whole))
    np.testing.assert_array_equal(again.record.keep, seen.record.keep[order])
    for options in (dict(segment=4), dict(segment=1), dict(lengths=(5, 8, S))):
        other, _, _ = grow(logits, jnp.arange(B), rule="arrol_group", refork=True, columns=4, **options)
        chex.assert_trees_all_equal(other, whole)
    later, _, seen = grow(logits, jnp.arange(B), rule="arrol_group", refork=True, columns=4, segment=3)
    same, *_ = grow(logits, jnp.arange(B), rule="arrol_group", refork=True, columns=4, segment=6)
    chex.assert_trees_all_equal(later, same)  # segments that do not divide the detection: the review comes after 6
    ended = np.asarray(grow(logits, jnp.arange(B), columns=K)[0].leaf[..., 0]) + 1
    np.testing.assert_array_equal(np.asarray(seen.record.due), ended > 6)


@pytest.mark.slow
def test_too_many_lines_for_the_small_pool_lose_nothing():
    """Nothing is stopped and more lines run than fit: all stay in the large pool until they fit."""
    keep_all = pruning.none()._replace(
        review=lambda lines, hidden, key: Review(jnp.zeros(lines.status.shape, jnp.int8), jnp.full(lines.status.shape, -1), ())
    )

    def run(prune, columns):
        pad = Prompts(token=jnp.zeros((B, 2), jnp.int32), length=jnp.ones(B, jnp.int32), index=jnp.arange(B), data={})
        return sampler.sample(
            history(states(0)), branching.stochastic(), prune, pad, jax.random.key(5), slots=K, rows=S, budget=S, segment=1,
            lengths=(S,), temperature=jnp.float32(1), top_p=jnp.float32(1), eos=jnp.array([EOS]), review_at=2, columns=columns,
        )  # fmt: skip

    plain, stats, _ = run(pruning.none(), None)
    assert len(set(np.asarray(plain.leaf[..., 0]).ravel())) > 4  # lines end one after the other
    for columns in (1, 2, 5):
        tree, others, seen = run(keep_all, columns)
        chex.assert_trees_all_equal(tree, plain)
        chex.assert_trees_all_equal(others, stats)
        row = np.asarray(tree.leaf[..., 0])  # the hidden state kept is of the cell above the last one
        np.testing.assert_array_equal(np.asarray(seen.hidden)[..., 1], row - 1)


def test_a_rule_that_reviews_asks_for_what_it_needs():
    plain = history(states(0))._replace(gather=None)
    rule = pruning.none()._replace(review=lambda *_: None)
    with pytest.raises(ValueError, match="a review needs Policy.hidden and gather"):
        sampler.sample(
            plain, branching.stochastic(), rule, None, None, slots=K, rows=S, budget=S, segment=1, lengths=(S,),
            temperature=1, top_p=1, eos=None,
        )  # fmt: skip


def test_lines_come_back_where_they_were():
    """compact and restore by hand: three of five slots run, one more line ended and one slot is free."""
    lines = empty_lines(1, 5, 6).replace(
        status=jnp.array([[ACTIVE, FREE, 2, ACTIVE, ACTIVE]]), cursor=jnp.array([[3, 2, 4, 3, 2]]),
        path=jnp.array([[[0, 0, 0, -1, -1, -1], [0, 1, -1, -1, -1, -1], [2, 2, 2, 2, -1, -1], [0, 0, 3, -1, -1, -1],
                         [2, 2, -1, -1, -1, -1]]]),
    )  # fmt: skip
    grid = dict(token=jnp.arange(30).reshape(1, 6, 5), parent=jnp.zeros((1, 6, 5), jnp.int32), used=jnp.zeros((1, 6, 5), bool))
    moved, narrow, small = compaction.compact(lines, grid, 3)
    np.testing.assert_array_equal(moved.slot, [[0, 3, 4]])
    np.testing.assert_array_equal(narrow.path[0, :, :4], [[0, 0, 0, -1], [1, 1, 1, -1], [2, 2, -1, -1]])
    np.testing.assert_array_equal(small["token"][0].T[:, :3], [[0, 5, 10], [0, 5, 13], [2, 7, 0]])
    row = jnp.arange(6)[None, :, None]
    new = (row >= narrow.cursor[:, None]) & (row < narrow.cursor[:, None] + 2)
    small = dict(token=jnp.where(new, 100 + row, small["token"]), parent=jnp.full((1, 6, 3), 9), used=new)
    wide, back = compaction.restore(moved, lines, grid, narrow.replace(cursor=narrow.cursor + 2), small)
    np.testing.assert_array_equal(wide.path[0, 3], [0, 0, 3, 3, 3, -1])
    np.testing.assert_array_equal(wide.path[0, 4], [2, 2, 4, 4, -1, -1])
    np.testing.assert_array_equal(wide.cursor, [[5, 2, 4, 5, 4]])
    np.testing.assert_array_equal(back["token"][0, :, 3], [3, 8, 13, 103, 104, 28])
    np.testing.assert_array_equal(back["parent"][0, 2:5, [3, 4]], [[0, 3, 3], [2, 4, 0]])
    np.testing.assert_array_equal(back["used"].sum((0, 1)), [2, 0, 0, 2, 2])
    np.testing.assert_array_equal(back["token"][0, :, [1, 2]], grid["token"][0, :, [1, 2]])
