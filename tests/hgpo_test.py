"""GiGPO and HGPO against dictionaries of tuples, golden values and reductions."""

import functools

import hgpo_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from treerl import tree as T
from treerl.advantages.flat import grpo
from treerl.advantages.hgpo import gigpo, gigpo_tree, hgpo, hgpo_tree, segments, step_returns

GROUPS, R, STEPS = 110, 5, 6
IDS = np.array([-1, 0, 5, 2**31 - 1], np.int32)  # -1 is the word that stands for missing history
HGPO = jax.jit(hgpo, static_argnames=("levels", "weight_shift", "std", "zero", "cross_steps"))
GIGPO = jax.jit(gigpo, static_argnames=("std", "cross_steps"))
HGPO_TREE = jax.jit(hgpo_tree, static_argnames=("segment", "levels", "weight_shift", "std", "zero"))
GIGPO_TREE = jax.jit(gigpo_tree, static_argnames=("segment", "std"))
KINDS = ("plain", "plain", "discounted", "constant", "single", "unique")


def random_groups(rng, words):
    """Groups of few states, some constant, single or without a repeated state; garbage where invalid.

    Returns (returns [G, R, T], state_id [G, R, T(, 2)], valid [G, R, T]) and the oracle's batch.
    """
    length = rng.integers(0, STEPS + 1, (GROUPS, R))
    kind = np.array(KINDS)[np.arange(GROUPS) % len(KINDS)]
    length[kind == "single", 1:] = 0
    valid = np.arange(STEPS) < length[:, :, None]
    symbol = rng.integers(0, rng.integers(2, 5, (GROUPS, 1, 1)), valid.shape)
    returns = rng.integers(0, 3, valid.shape).astype(np.float64)
    returns[kind == "discounted"] *= 0.95 ** rng.integers(0, 5, returns[kind == "discounted"].shape)
    returns[kind == "constant"] = 0.1
    if words == 2:  # neither word alone tells the four states apart
        state = np.stack([IDS[symbol // 2], IDS[symbol % 2]], -1).astype(np.uint32)
        state[kind == "unique", ..., 1] = 10 + np.arange(R * STEPS).reshape(R, STEPS)
    else:
        state = IDS[symbol]
        state[kind == "unique"] = 10 + np.arange(R * STEPS).reshape(R, STEPS)
    batch = []
    for g, r in np.ndindex(GROUPS, R):
        n = length[g, r]
        key = [tuple(np.atleast_1d(s).tolist()) for s in state[g, r, :n]]
        batch.append((g, key, returns[g, r, :n].tolist()))
    return (np.where(valid, returns, np.nan).astype(np.float32), state, valid), batch


def grid(rows):
    """The oracle's rows as an array like the fast code's."""
    out = np.zeros((GROUPS, R, STEPS))
    for (g, r), row in zip(np.ndindex(GROUPS, R), rows):
        out[g, r, : len(row)] = row
    return out


def by_group(batch, function, alphas):
    """Calls the oracle task by task, each with its own alpha."""
    rows = []
    for g, alpha in enumerate(alphas):
        rows += function(g, batch[g * R : (g + 1) * R], alpha)
    return grid(rows)


@pytest.mark.parametrize("std", [True, False])
@pytest.mark.parametrize("zero", ["drop", "keep"])
@pytest.mark.parametrize("levels", [0, 1, 2, 4])
def test_hgpo_equals_dictionaries_on_random_groups(levels, zero, std):
    shift, words = 1 + (levels // 2 + std) % 2, 1 + (levels + (zero == "keep") + std) % 2
    rng = np.random.default_rng(levels)
    arrays, batch = random_groups(rng, words)
    alphas = np.arange(GROUPS) % 3
    options = dict(levels=levels, weight_shift=shift, std=std, zero=zero)
    fast = jax.jit(jax.vmap(lambda x, s, v, alpha: hgpo(x, s, v, alpha=alpha, **options)))
    want = by_group(batch, lambda _, b, alpha: oracle.hgpo(b, alpha=alpha, **options), alphas)
    got = fast(*arrays, alphas.astype(np.float32))
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert np.mean(np.any(want != 0, axis=(1, 2))) > 0.4, "the groups lost variety"
    kinds = np.array(KINDS)[np.arange(GROUPS) % len(KINDS)]
    assert not np.any(got[np.isin(kinds, ("constant", "unique"))])


@pytest.mark.slow
@pytest.mark.parametrize("base", ["item", "sum"])
@pytest.mark.parametrize("cross_steps", [True, False])
@pytest.mark.parametrize("zero,std,shift", [("drop", True, 2), ("keep", False, 1)])
def test_hgpo_with_the_episode_term_equals_dictionaries(zero, std, shift, cross_steps, base):
    rng = np.random.default_rng(7)
    arrays, batch = random_groups(rng, 1)
    episode = rng.integers(0, 3, (GROUPS, R)).astype(np.float32)
    options = dict(levels=2, weight_shift=shift, std=std, zero=zero, cross_steps=cross_steps, base=base)
    fast = jax.jit(jax.vmap(lambda x, s, v, e: hgpo(x, s, v, episode=e, **options)))
    slow = lambda g, b, _: oracle.hgpo(b, episode=episode[g].tolist(), **options)
    np.testing.assert_allclose(fast(*arrays, episode), by_group(batch, slow, [1] * GROUPS), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("std", [True, False])
@pytest.mark.parametrize("words", [1, 2])
@pytest.mark.parametrize("cross_steps", [None, True, False])
def test_gigpo_equals_dictionaries_on_random_groups(cross_steps, words, std):
    rng = np.random.default_rng(10 + words)
    arrays, batch = random_groups(rng, words)
    episode = rng.integers(0, 3, (GROUPS, R)).astype(np.float32)
    options = dict(std=std, step_weight=0.5, cross_steps=bool(cross_steps))
    term = lambda e: None if cross_steps is None else e
    fast = jax.jit(jax.vmap(lambda x, s, v, e: gigpo(x, s, v, episode=term(e), **options)))
    slow = lambda g, b, _: oracle.gigpo(b, episode=term(episode[g].tolist()), **options)
    want = by_group(batch, slow, [1] * GROUPS)
    np.testing.assert_allclose(fast(*arrays, episode), want, atol=1e-5)
    assert np.any(want != 0, axis=(1, 2)).mean() > 0.4, "the groups lost variety"


def ids(rows):
    """Rows of letters -> int32 [R, T]."""
    return jnp.array([[ord(c) for c in row] for row in rows], jnp.int32)


GOLDEN = ids(["sab", "sab", "scb", "scd"])
FULL = jnp.ones((4, 3), bool)
REWARD = jnp.zeros((4, 3)).at[:, 2].set(jnp.array([10.0, 0, 10, 0]))
RETURNS = step_returns(REWARD, FULL, 0.95)


def test_golden_returns():
    np.testing.assert_allclose(RETURNS[0], [9.025, 9.5, 10], rtol=1e-6)
    assert not np.any(RETURNS[1])


def test_golden_hgpo():
    got = HGPO(RETURNS, GOLDEN, FULL, levels=0)
    a, b = 0.999999, 0.707106
    want = [[a, a, b], [-a, -a, -1.414213], [a, a, b], [-a, -a, 0]]
    np.testing.assert_allclose(got, want, atol=2e-6)
    code = HGPO(RETURNS, GOLDEN, FULL, weight_shift=2)[:, 2]
    np.testing.assert_allclose(code, [0.934912, -1.092047, 0.707106, 0], atol=2e-6)
    paper = HGPO(RETURNS, GOLDEN, FULL)[:, 2]
    np.testing.assert_allclose(paper, [0.951184, -1.069035, 0.707106, 0], atol=2e-6)
    centred = HGPO(RETURNS, GOLDEN, FULL, weight_shift=2, std=False)[:, 2]
    np.testing.assert_allclose(centred, [4.629629, -5.37037, 3.333332, 0], atol=5e-6)


def test_golden_gigpo():
    want = [[4.5125, 4.75, 3.33333], [-4.5125, -4.75, -6.66667], [4.5125, 4.75, 3.33333], [-4.5125, -4.75, 0]]
    np.testing.assert_allclose(GIGPO(RETURNS, GOLDEN, FULL), want, atol=1e-5)
    row = [0.866025, 0.707107, 0.577350]
    want = [row, [-row[0], -row[1], -1.154700], row, [-row[0], -row[1], 0]]
    np.testing.assert_allclose(GIGPO(RETURNS, GOLDEN, FULL, std=True), want, atol=2e-6)


def test_a_level_that_says_nothing_is_dropped_or_kept():
    state, valid = ids(["sx", "sx", "qx"]), jnp.ones((3, 2), bool)
    returns = jnp.array([[0, 1.0], [0, 1], [0, 0]])
    code = functools.partial(HGPO, returns, state, valid, levels=1, weight_shift=2)
    np.testing.assert_allclose(code()[:2, 1], 0.70710, atol=1e-5)
    np.testing.assert_allclose(code(zero="keep")[:2, 1], 0.28284, atol=1e-5)
    noisy = returns.at[0, 1].add(1e-7)  # the same return but for rounding
    np.testing.assert_allclose(HGPO(noisy, state, valid, levels=1, weight_shift=2)[:2, 1], 0.70710, atol=1e-5)
    assert HGPO(noisy, state, valid, levels=1, weight_shift=2, tolerance=0.0)[0, 1] < 0.4


def one_group(seed):
    """One full group of three states: (returns, state_id, valid)."""
    rng = np.random.default_rng(seed)
    shape = R, STEPS
    valid = np.arange(STEPS) < rng.integers(1, STEPS + 1, (R, 1))
    return rng.normal(size=shape).astype(np.float32), rng.integers(0, 3, shape).astype(np.int32), valid


@pytest.mark.parametrize("seed", range(8))
def test_reductions(seed):
    returns, state, valid = group = one_group(seed)
    step = GIGPO(*group)
    np.testing.assert_allclose(HGPO(*group, levels=0, std=False), step, atol=1e-5)
    count = np.sum((state[:, :, None, None] == state) & valid, axis=(2, 3))
    ratio = np.sqrt(count / np.maximum(count - 1, 1))
    np.testing.assert_allclose(HGPO(*group, levels=0), GIGPO(*group, std=True) * ratio, atol=1e-4)
    deep = HGPO(*group, levels=STEPS - 1)
    np.testing.assert_array_equal(HGPO(*group, levels=STEPS + 5), deep)


@pytest.mark.parametrize("seed", range(8))
def test_alpha_goes_from_the_plain_mean_to_the_finest_level(seed):
    returns, state, valid = group = one_group(seed)
    flat, finest = np.zeros((R, STEPS)), np.zeros((R, STEPS))
    for r, t in zip(*np.nonzero(valid)):
        past = lambda i, u, k: tuple(state[i, u - k : u + 1])
        terms = []
        for k in range(min(2, t) + 1):
            mine = [returns[i, u] for i, u in zip(*np.nonzero(valid)) if u >= k and past(i, u, k) == past(r, t, k)]
            terms += [(returns[r, t] - np.mean(mine)) / (np.std(mine) + 1e-6)] if len(mine) >= 2 else []
        if terms:
            flat[r, t], finest[r, t] = np.mean(terms), terms[-1]
    np.testing.assert_allclose(HGPO(*group, alpha=0.0), flat, atol=1e-5)
    for alpha in (60.0, 1e4):  # 3^1e4 is beyond float32
        np.testing.assert_allclose(HGPO(*group, alpha=alpha), finest, atol=1e-5)


def test_step_t_has_at_most_t_past_states():
    """First steps meet a later step in the same state at level 0, and at no other level."""
    state, valid = ids(["sss", "stt"]), jnp.ones((2, 3), bool)
    returns = jnp.array([[1.0, 2, 4], [8, 0, 0]])
    assert HGPO(returns, state, valid, std=False)[1, 0] == 8 - 15 / 4
    level1 = HGPO(returns, state, valid, levels=1, std=False, alpha=1e3)
    np.testing.assert_allclose(level1, [[1 - 15 / 4, -1, 1], [8 - 15 / 4, 0, 0]], atol=1e-6)


def test_unique_states_leave_the_episode_term_or_nothing():
    returns, _, valid = one_group(3)
    state = np.arange(R * STEPS, dtype=np.int32).reshape(R, STEPS)
    episode = np.array([0.0, 1, 2, 0, 5], np.float32)
    assert not np.any(HGPO(returns, state, valid)) and not np.any(GIGPO(returns, state, valid))
    base = GIGPO(returns, state, valid, episode=episode, std=True)
    assert np.all((base != 0) == valid)
    np.testing.assert_allclose(HGPO(returns, state, valid, episode=episode), base, atol=1e-6)


def test_the_episode_term_with_one_value_a_trajectory_is_grpo():
    returns, state, valid = one_group(4)
    episode = jnp.array([0.0, 1, 2, 0, 5])
    star = T.from_parents(np.full((1, R), -1), np.ones((1, R), bool), [[0, k] for k in range(R)])
    got = GIGPO(returns, state, valid, std=True, episode=episode, step_weight=0.0, cross_steps=False)
    np.testing.assert_allclose(got, jnp.where(valid, grpo(star, episode)[:, None], 0), atol=1e-6)


def test_an_episode_alone_is_no_group():
    valid = jnp.zeros((3, 2), bool).at[1, 0].set(True)
    returns, state = jnp.ones((3, 2)), jnp.zeros((3, 2), jnp.int32)
    for estimator in (GIGPO, HGPO):
        assert not np.any(estimator(returns, state, valid, std=True, episode=jnp.array([1.0, 7, 3])))


@pytest.mark.slow
@pytest.mark.parametrize("estimator", [GIGPO, HGPO])
@pytest.mark.parametrize("constant", [0.0, 0.1, -1e4 / 3])
@pytest.mark.parametrize("std", [True, False])
def test_constant_returns_get_exactly_zero(estimator, constant, std):
    _, state, valid = one_group(5)
    returns, episode = np.full((R, STEPS), constant, np.float32), np.full(R, constant, np.float32)
    for options in ({}, {"episode": episode}) + (({"zero": "keep", "tolerance": 0.0},) if estimator is HGPO else ()):
        np.testing.assert_array_equal(estimator(returns, state, valid, std=std, **options), 0)


@pytest.mark.parametrize("estimator", [GIGPO, HGPO])
def test_tasks_never_mix_and_trajectories_may_be_reordered(estimator):
    first, second = one_group(6), one_group(7)
    second = second[0], first[1], second[2]  # the same states in another task
    both = jax.vmap(estimator)(*(jnp.stack(x) for x in zip(first, second)))
    np.testing.assert_allclose(both[0], estimator(*first), atol=1e-6)
    np.testing.assert_allclose(both[1], estimator(*second), atol=1e-6)
    order = np.random.default_rng(0).permutation(R)
    np.testing.assert_allclose(estimator(*(x[order] for x in first)), both[0][order], atol=1e-5)


def test_a_hole_breaks_the_history():
    """The steps after the holes have no history: they meet the first step of the third at level 0."""
    valid = jnp.array([[True, False, True], [True, False, True], [True, False, False]])
    returns = jnp.array([[0.0, jnp.nan, 1], [0, jnp.nan, 2], [6, jnp.nan, jnp.nan]])
    for state in (ids(["abc", "abc", "cab"]), ids(["abc", "axc", "cab"])):
        got = HGPO(returns, state, valid, std=False, zero="keep", alpha=1e3)
        np.testing.assert_allclose(got, [[0, 0, -2], [0, 0, -1], [3, 0, 0]], atol=1e-6)


@pytest.mark.parametrize("gamma", [1.0, 0.95, 0.0])
def test_step_returns_are_discounted_sums(gamma):
    rng = np.random.default_rng(8)
    reward, length = rng.normal(size=(40, 9)).astype(np.float32), rng.integers(0, 10, 40)
    got = step_returns(reward, np.arange(9) < length[:, None], gamma)
    for row, n, values in zip(got, length, reward):
        np.testing.assert_allclose(row[:n], oracle.step_returns(values[:n].tolist(), gamma), atol=1e-5)
        assert not np.any(row[n:])


@pytest.mark.parametrize("levels", [0, 2, 4])
@pytest.mark.parametrize("words", [(), (2,)])
def test_one_sort_for_all_levels_and_no_recompilation(levels, words):
    shape = 3, R, STEPS
    fast = jax.jit(jax.vmap(lambda x, s, v, alpha: hgpo(x, s, v, levels=levels, alpha=alpha), (0, 0, 0, None)))
    arrays = jnp.zeros(shape), jnp.zeros(shape + words, jnp.uint32), jnp.ones(shape, bool)
    text = fast.lower(*arrays, 1.0).as_text()
    assert text.count("stablehlo.sort") == 2  # numbers the states, then orders all levels at once
    assert "custom_call" not in text and "stablehlo.while" not in text
    if levels == 0:
        fast(*arrays, 1.0), fast(*arrays, 2.0)
        assert fast._cache_size() == 1


def test_wrong_options_raise():
    group = one_group(0)
    for options in ({"zero": "none"}, {"levels": -1}, {"weight_shift": 0}):
        with pytest.raises(ValueError, match="hgpo: "):
            hgpo(*group, **options)
    for wrong in (group[1].astype(np.float32), group[1][:, :-1]):
        with pytest.raises(AssertionError):
            hgpo(group[0], wrong, group[2])


def texts(tree, reward, segment, gamma):
    """Leaf -> its cells, and the oracle's batch of leaves, whose states are tuples of tokens."""
    cells = oracles.leaf_cells(tree)
    batch = []
    for leaf, path in cells.items():
        token = [int(np.asarray(tree.token)[cell]) for cell in path]
        starts = range(0, len(path), segment)
        states = [tuple(token[s - segment : s]) for s in starts]
        rewards = [0.0] * (len(states) - 1) + [float(reward[leaf])]
        batch.append((0, states, oracle.step_returns(rewards, gamma)))
    return cells, batch


@pytest.mark.parametrize("segment", [1, 2, 3, 9])
def test_trees_equal_dictionaries_of_texts(segment):
    rng = np.random.default_rng(segment)
    fast = {"hgpo": HGPO_TREE, "gigpo": GIGPO_TREE}
    nonzero = 0
    for _ in range(60):
        tree = oracles.random_tree(rng, vocab=4)
        reward = rng.integers(0, 3, 5).astype(np.float32)
        cells, batch = texts(tree, reward, segment, 0.9)
        score = [float(reward[leaf]) for leaf in cells]
        slow = {"hgpo": oracle.hgpo(batch), "gigpo": oracle.gigpo(batch, episode=score)}
        garbage = np.where(np.isin(np.arange(5), list(cells)), reward, np.nan)  # where there is no leaf
        for name, rows in slow.items():
            below = {}
            for path, row in zip(cells.values(), rows):
                for depth, cell in enumerate(path):
                    below.setdefault(cell, []).append(row[depth // segment])
            want = np.zeros(tree.token.shape)
            for cell, values in below.items():
                want[cell] = np.mean(values) if len(set(score)) >= 2 else 0  # no contrast, no credit
            np.testing.assert_allclose(fast[name](tree, garbage, segment=segment, gamma=0.9), want, atol=2e-5)
            nonzero += np.any(want != 0)
    assert nonzero > 60


def star(count, rows=2):
    """A tree that never forks below the prompt, its tokens all different."""
    shape = rows, count
    parent = np.broadcast_to(np.arange(count), shape)
    token = np.arange(rows * count).reshape(shape)
    return T.from_parents(parent, np.ones(shape, bool), [[rows - 1, k] for k in range(count)], token=jnp.array(token))


def test_one_step_a_leaf_is_grpo():
    tree, reward = star(5), jnp.array([1.0, 0, 0, 3, 1])
    want = jnp.broadcast_to(grpo(tree, reward, std=True), (2, 5))
    np.testing.assert_allclose(HGPO_TREE(tree, reward, segment=2), want * np.sqrt(5 / 4), rtol=1e-5)
    np.testing.assert_allclose(GIGPO_TREE(tree, reward, segment=8, std=True, step_weight=0.0), want, rtol=1e-5)
    np.testing.assert_allclose(GIGPO_TREE(tree, reward, segment=8, std=True), 2 * want, rtol=1e-5)


def test_segments_of_one_leaf():
    tree = T.from_parents([[-1]] + [[0]] * 4, [[True]] * 5, [[4, 0]], token=jnp.array([[3], [4], [3], [4], [5]]))
    returns, state, valid = segments(tree, jnp.array([2.0]), segment=2, gamma=0.5)
    np.testing.assert_allclose(returns, [[0.5, 1, 2]])
    assert state.shape == (1, 3, 2) and state.dtype == jnp.uint32 and np.all(valid)
    assert not np.any(state[0, 0]) and np.all(state[0, 1] == state[0, 2]) and np.all(state[0, 1] != 0)
    for estimator in (HGPO_TREE, GIGPO_TREE):  # its own repeated text is no group
        assert not np.any(estimator(tree, jnp.array([2.0]), segment=2, gamma=0.5))


def test_texts_do_not_collide():
    """Each word alone of 40,000 texts of three tokens: 0.2 pairs are expected to share it."""
    token = np.stack(np.meshgrid(np.arange(40), np.arange(40), np.arange(25)), -1).reshape(-1, 3)
    words = jax.jit(T.text_id)(token)
    assert all(len(np.unique(words[:, n])) >= len(token) - 3 for n in range(2))
