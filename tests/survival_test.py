"""Calibration against frequencies, survival rules against plain loops and their own promises."""

import fractions
import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treerl import survival as V

KEY = jax.random.key(7)
DRAWN, EXACT = (V.arrol, V.arrol_group), (V.balance, V.random)
by_name = pytest.mark.parametrize("rule", V.RULES.values(), ids=V.RULES)
drawn = pytest.mark.parametrize("rule", DRAWN, ids=lambda rule: rule.__name__)
exact = pytest.mark.parametrize("rule", EXACT, ids=lambda rule: rule.__name__)


@functools.cache
def compiled(rule, **static):
    """A rule whose numbers are traced; least and capacity are not."""
    return jax.jit(lambda key, q, due, knobs: rule(key, q, due, **knobs, **static))


def apply(rule, q, due=None, *, key=KEY, kappa=0.5, rho=0.5, least=2, capacity=None, **knobs):
    due = np.ones(np.shape(q), bool) if due is None else due
    knobs = {name: jnp.float32(x) for name, x in dict(kappa=kappa, rho=rho, **knobs).items()}
    return jax.device_get(compiled(rule, least=least, capacity=capacity)(key, jnp.float32(q), jnp.asarray(due), knobs))


def groups(seed, b=64, k=16, share=0.8):
    """Posteriors that differ between groups, and which lines are due; q of the others is NaN."""
    rng = np.random.default_rng(seed)
    centre = rng.beta(1, 1, (b, 1)).clip(0.02, 0.98)
    q = rng.beta(4 * centre, 4 * (1 - centre), (b, k)).astype(np.float32)
    due = rng.random((b, k)) < share
    return np.where(due, q, np.nan), due


# --- oracles: plain loops -------------------------------------------------------------------------


def plain_table(scores, labels, weights, bins):
    right, wrong = [0.0] * bins, [0.0] * bins
    for s, y, w in zip(scores, labels, weights):
        b = min(bins - 1, int(bins / (1 + np.exp(-s))))
        (right if y else wrong)[b] += w
    return right, wrong


def plain_balance(q, count, rho):
    """Lines left of one group after single removals, each the nearest to rho; the first of equals."""
    left = list(range(len(q)))
    while len(left) > count:
        rest = [[q[i] for i in left if i != j] for j in left]
        gaps = [abs(fractions.Fraction(float(sum(x))) / max(len(x), 1) - fractions.Fraction(rho)) for x in rest]
        del left[int(np.argmin(gaps))]
    return left


def plain_draw(uniform, p, due, least, capacity):
    """Survivors of one group, in the words of the module."""
    mine = [k for k in range(len(p)) if due[k]]
    keep = [k for k in mine if uniform[k] < p[k]]
    rest = sorted((k for k in mine if k not in keep), key=lambda k: (-p[k], uniform[k]))
    keep += rest[: max(0, least - len(keep))]
    if capacity is not None:
        keep = sorted(keep, key=lambda k: -uniform[k] / p[k])[:capacity]
    return sorted(keep + [k for k in range(len(p)) if not due[k]])


# --- calibration ----------------------------------------------------------------------------------


def test_counts_equal_a_plain_loop_and_the_bins_frequency_is_the_posterior_without_smoothing():
    rng = np.random.default_rng(0)
    score, label, weight = rng.normal(0, 0.8, (3, 200)), rng.random((3, 200)) < 0.3, rng.integers(0, 3, (3, 200))
    score = np.float32(np.where(weight > 0, score, np.nan))  # what does not count may be anything
    table = V.start_calibration(16)
    for one in zip(score, label, np.float32(weight)):
        table = V.observe(table, *one, decay=0.5)
    part = [plain_table(*(x[w > 0] for x in (s, y, w)), 16) for s, y, w in zip(score, label, weight)]
    right, wrong = (sum(np.array(p[i]) * 0.5 ** (2 - t) for t, p in enumerate(part)) for i in (0, 1))
    np.testing.assert_allclose(table.right, right, atol=1e-5)
    np.testing.assert_allclose(table.wrong, wrong, atol=1e-5)
    centres = (np.arange(16) + 0.5) / 16
    got = V.posterior(table, jnp.float32(np.log(centres / (1 - centres))), smoothing=0.0)
    there = right + wrong > 0
    assert there.sum() > 10 and not there.all()
    np.testing.assert_allclose(got[there], (right / np.maximum(right + wrong, 1e-9))[there], atol=1e-6)
    np.testing.assert_allclose(got[~there], right.sum() / (right + wrong).sum(), atol=1e-6)


def test_smoothed_posterior_is_the_bayes_form():
    right, wrong = np.array([3.0, 0, 5, 0]), np.array([1.0, 0, 0, 11])
    table = V.Calibration(right=jnp.float32(right), wrong=jnp.float32(wrong))
    for alpha in (1.0, 0.25):
        for b in range(4):
            pi = 8 / 20
            one, none = (right[b] + alpha) / (8 + 4 * alpha), (wrong[b] + alpha) / (12 + 4 * alpha)
            want = pi * one / (pi * one + (1 - pi) * none)
            centre = (b + 0.5) / 4
            got = V.posterior(table, jnp.float32(np.log(centre / (1 - centre))), smoothing=alpha)
            np.testing.assert_allclose(got, want, rtol=1e-6)


def test_without_counts_the_posterior_is_a_half():
    for smoothing in (0.0, 1.0):
        q = V.posterior(V.start_calibration(), jnp.array([-9.0, 0, 9]), smoothing=smoothing)
        np.testing.assert_array_equal(q, 0.5)


def test_only_right_answers_so_far_give_one():
    table = V.observe(V.start_calibration(8), jnp.zeros(3), jnp.ones(3, bool), jnp.ones(3), decay=1.0)
    np.testing.assert_array_equal(V.posterior(table, jnp.array([-9.0, 0, 9]), smoothing=0.0), 1.0)


def test_scores_at_both_ends_are_in_the_end_bins():
    score = jnp.array([-jnp.inf, -200.0, 0.0, 200.0, jnp.inf])
    assert float(jax.nn.sigmoid(score[3])) == 1.0
    np.testing.assert_array_equal(V.bin_of(score, 128), [0, 0, 64, 127, 127])
    table = V.observe(V.start_calibration(), score, jnp.ones(5, bool), jnp.ones(5), decay=1.0)
    assert table.right[127] == 2 and table.right.sum() == 5


def synthetic(seed, count):
    """(score [count], label, P(Y | score)) of a head that is monotone but not calibrated."""
    rng = np.random.default_rng(seed)
    score = np.float32(rng.normal(0, 1.5, count))
    truth = 0.1 + 0.6 / (1 + np.exp(-2 * score + 1))
    return score, rng.random(count) < truth, truth


def test_calibration_converges_on_known_probabilities():
    score, label, _ = synthetic(0, 200_000)
    fresh, _, truth = synthetic(1, 20_000)
    errors = []
    for n in (500, 20_000, 200_000):
        table = V.observe(V.start_calibration(), score[:n], label[:n], jnp.ones(n), decay=1.0)
        errors.append(np.abs(np.asarray(V.posterior(table, fresh)) - truth).mean())
    assert errors[0] > 2 * errors[1] > 3 * errors[2]
    assert errors[2] < 0.01  # 1,500 a bin: a standard error of .012, .009 in the mean of |error|


def test_thinning_by_score_leaves_the_frequency_unbiased_and_the_prior_not():
    """Rollouts survive by a probability that falls with the score; labels of the others are never seen."""
    score, label, _ = synthetic(2, 400_000)
    stays = np.random.default_rng(3).random(score.shape) < np.clip(0.9 - np.where(score > 0, 0.7, 0), 0.1, 0.9)
    whole = V.observe(V.start_calibration(16), score, label, jnp.ones(score.shape), decay=1.0)
    thin = V.observe(V.start_calibration(16), score, label, stays, decay=1.0)
    centre = (np.arange(16) + 0.5) / 16
    q = [np.asarray(V.posterior(t, jnp.float32(np.log(centre / (1 - centre))), smoothing=0.0)) for t in (whole, thin)]
    seen = np.asarray(thin.right + thin.wrong)
    error = np.sqrt(q[0] * (1 - q[0]) * (1 / seen - 1 / np.asarray(whole.right + whole.wrong)))
    assert np.all(np.abs(q[1] - q[0]) < 4 * error) and error.max() < 0.02
    prior = [float(t.right.sum() / (t.right.sum() + t.wrong.sum())) for t in (whole, thin)]
    assert prior[0] - prior[1] > 0.05


# --- probabilities --------------------------------------------------------------------------------


@pytest.mark.parametrize("lam", [0.0, 0.5, 2.0, 8.0])
@pytest.mark.parametrize("kappa, p_min, p_max", [(0.5, 0.1, 0.9), (0.1, 0.1, 0.9), (0.9, 0.1, 0.9), (0.37, 0.0, 1.0)])
def test_mean_of_p_is_kappa_within_its_bounds(lam, kappa, p_min, p_max):
    for b, k in ((1, 1), (3, 4), (1024, 16)):
        q, due = groups(b, b, k)
        due[0, 0] = True
        q = np.where(due & np.isnan(q), 0.3, q)
        for rule in DRAWN:
            _, p = apply(rule, q, due, kappa=kappa, lam=lam, p_min=p_min, p_max=p_max)
            assert np.all(p[due] >= np.float32(p_min)) and np.all(p[due] <= np.float32(p_max))
            assert abs(np.mean(p[due], dtype=np.float64) - kappa) <= 1e-6
            assert np.all(p[~due] == 1)
        sums = np.sum(np.where(due, p, 0), axis=1, dtype=np.float64)  # of arrol_group: each group by itself
        np.testing.assert_allclose(sums[due.any(1)] / due.sum(1)[due.any(1)], kappa, atol=1e-6)


@drawn
@pytest.mark.parametrize("kappa, bound", [(0.05, 0.1), (0.97, 0.9)])
def test_a_share_out_of_reach_gives_the_nearer_bound(rule, kappa, bound):
    q, due = groups(5)
    _, p = apply(rule, q, due, kappa=kappa)
    np.testing.assert_allclose(p[due], bound, rtol=1e-6)


def test_p_falls_with_q_in_arrol_whatever_the_group():
    q, due = groups(1)
    _, p = apply(V.arrol, q, due, lam=2.0)
    order = np.argsort(q[due])
    assert np.all(np.diff(p[due][order]) <= 0) and np.ptp(p[due]) > 0.5


def test_rho_cancels_in_arrol_where_nothing_is_clipped():
    q, due = groups(1)
    wants = 0.5 + 0.3 * (np.mean(q[due]) - q)
    for rho in (0.2, 0.5, 0.8):
        np.testing.assert_allclose(apply(V.arrol, q, due, lam=0.3, rho=rho)[1][due], wants[due], atol=2e-6)


def test_p_follows_the_side_of_the_group_in_arrol_group():
    q, due = groups(1)
    _, p = apply(V.arrol_group, q, due)
    for q, due, p in zip(q, due, p):
        q, p = q[due], p[due]
        steps = np.diff(p[np.argsort(q)])
        assert np.all(steps <= 0) if np.mean(q) > 0.5 else np.all(steps >= 0)
        assert np.ptp(p) > 0


def test_arrol_group_tilts_to_rho_and_no_further():
    """Expected mean of survivors, sum p q / sum p: rho where the slope may be steep enough, else nearer to it."""
    q, due = groups(2, share=1.0)
    mean, gap = np.mean(q, axis=1), lambda p: np.abs(np.sum(p * q, axis=1) / np.sum(p, axis=1) - 0.5)
    _, p = apply(V.arrol_group, q, due, lam=50.0, p_min=-9, p_max=9)  # 9 is 1: p is a probability
    inside = (p.min(1) > -8) & (p.max(1) < 1)
    assert inside.sum() > 5
    np.testing.assert_allclose(gap(p)[inside], 0, atol=1e-5)
    _, p = apply(V.arrol_group, q, due, lam=0.5)
    assert np.all(gap(p) < np.abs(mean - 0.5))


def test_arrol_group_far_from_rho_is_the_sign_rule():
    q, due = groups(2, share=1.0)
    mean, variance = q.mean(1, keepdims=True), q.var(1, keepdims=True)
    far = np.abs(mean - 0.5)[:, 0] * 0.5 > 0.5 * variance[:, 0]
    assert far.sum() > 20
    _, p = apply(V.arrol_group, q, due, lam=0.5, p_min=-9.0)
    np.testing.assert_allclose(p[far], (0.5 - 0.5 * np.sign(mean - 0.5) * (q - mean))[far], atol=1e-5)


def test_arrol_group_ignores_other_groups():
    q, due = groups(3)
    whole = apply(V.arrol_group, q, due)
    other = np.where(np.arange(64)[:, None] < 10, q, 0.9)
    part = apply(V.arrol_group, other, due)
    chex.assert_trees_all_equal(jax.tree.map(lambda x: x[:10], whole), jax.tree.map(lambda x: x[:10], part))


# --- survivors ------------------------------------------------------------------------------------


@drawn
@pytest.mark.parametrize("least, capacity", [(0, None), (2, None), (6, None), (2, 4), (5, 5), (0, 0), (3, 9)])
def test_survivors_are_those_of_a_plain_loop(rule, least, capacity):
    q, due = groups(4, 80, 8)
    keep, p = apply(rule, q, due, kappa=0.4, lam=2.0, least=least, capacity=capacity)
    uniform = np.asarray(V._uniform(KEY, q.shape))
    assert 0 <= uniform.min() and uniform.max() < 1 and len(np.unique(uniform)) > 630
    for b in range(80):
        assert np.flatnonzero(keep[b]).tolist() == plain_draw(uniform[b], p[b], due[b], least, capacity)


@pytest.mark.slow
@by_name
def test_least_capacity_and_lines_not_due_are_respected(rule):
    q, due = groups(6, 200, 8, share=0.6)
    keep, _ = apply(rule, q, due, kappa=0.1, least=3)
    assert np.all(keep[~due])
    assert np.all((keep & due).sum(1) >= np.minimum(3, due.sum(1)))
    for capacity in (4, 1):  # 1 is below least, and wins
        keep, _ = apply(rule, q, due, kappa=0.9, capacity=capacity)
        assert np.all(keep[~due])
        assert np.all((keep & due).sum(1) <= capacity) and np.any((keep & due).sum(1) == capacity)
    each = np.arange(200) % 5
    keep, _ = rule(KEY, jnp.float32(q), jnp.asarray(due), kappa=0.9, rho=0.5, capacity=jnp.asarray(each))
    assert np.all((keep & due).sum(1) <= each) and np.any((keep & due).sum(1) == each)


@drawn
def test_least_prefers_high_p(rule):
    """No p is 0 and some joined: everyone who joined has at least the p of everyone who did not."""
    q, due = groups(7, 100, 8, share=1.0)
    few, p = apply(rule, q, due, kappa=0.15, least=0, lam=2.0)
    more, _ = apply(rule, q, due, kappa=0.15, least=4, lam=2.0)
    joined = more & ~few
    assert joined.sum() > 50 and np.all(few <= more)
    for b in np.flatnonzero(joined.any(1)):
        assert more[b].sum() == 4 and p[b][joined[b]].min() >= np.max(p[b][~more[b]], initial=0)


@by_name
def test_kappa_one_keeps_everything(rule):
    q, due = groups(8, 512)
    knobs = dict(p_max=1.0, lam=8.0) if rule in DRAWN else {}
    keep, p = apply(rule, q, due, kappa=1.0, **knobs)
    assert np.all(keep) and np.all(p == 1)


@pytest.mark.slow
@by_name
@pytest.mark.parametrize("k", [1, 2, 3])
def test_groups_of_nobody_or_one(rule, k):
    """Nothing is due in the first group, one line is in the second, whose q is extreme; all in the third."""
    due = np.zeros((3, k), bool)
    due[1, -1], due[2] = True, True
    q = np.where(due, [[np.nan], [0.0], [1.0]], np.nan)
    keep, p = apply(rule, q, due, kappa=0.2, least=1)
    assert np.all(keep[:2]) and keep[2].sum() >= 1 and np.all(np.isfinite(p)) and np.all(p[~due] == 1)
    weight = np.asarray(V.inverse_weights(p, keep))
    assert np.all(np.isfinite(weight))
    keep, p = apply(rule, q, np.zeros((3, k), bool))
    assert np.all(keep) and np.all(p == 1)


@pytest.mark.slow
@by_name
def test_draws_depend_on_the_place_alone(rule):
    """More groups, and more slots of which none is due, change no survivor."""
    q, due = groups(9, 12, 8)
    knobs = dict(lam=0.0) if rule in DRAWN else {}  # arrol's delta sees the whole batch
    keep, _ = apply(rule, q, due, least=0, **knobs)
    wide, more = np.full((20, 11), 0.5), np.zeros((20, 11), bool)
    wide[:12, :8], more[:12, :8], more[12:] = q, due, True
    other, _ = apply(rule, wide, more, least=0, **knobs)
    np.testing.assert_array_equal(other[:12, :8], keep)
    if rule is not V.balance:
        again, _ = apply(rule, q, due, least=0, key=jax.random.key(8), **knobs)
        assert np.any(again != keep)
        assert len({tuple(x) for x in keep.tolist()}) > 6  # groups draw apart
        keys = jax.vmap(lambda b: jax.random.fold_in(KEY, b))(jnp.arange(12))
        order = np.random.default_rng(0).permutation(12)
        run = functools.partial(rule, kappa=0.5, rho=0.5, least=0, **knobs)
        moved, _ = run(keys[order], jnp.float32(q)[order], jnp.asarray(due)[order])
        np.testing.assert_array_equal(moved, keep[order])  # a group's own key goes with it


@drawn
def test_as_many_are_kept_as_p_says(rule):
    """4,000 keys of the same two groups: each line's share is its p within 4.5 standard errors, the whole is kappa."""
    q, due = groups(10, 2, 16)
    keys = jax.random.split(jax.random.key(1), 4000)
    rule = functools.partial(rule, kappa=0.5, rho=0.5, lam=2.0, least=0)
    run = jax.jit(jax.vmap(lambda key: rule(key, jnp.float32(q), jnp.asarray(due))))
    keep, p = jax.device_get(run(keys))
    share, p = keep.mean(0), p[0]
    assert np.all(np.abs(share - p) <= 4.5 * np.sqrt(p * (1 - p) / 4000))
    assert abs(share[due].mean() - 0.5) < 4.5 * np.sqrt(0.25 / (4000 * due.sum()))


def test_random_keeps_every_line_equally_often():
    q, due = groups(11, 2, 8)
    keys = jax.random.split(jax.random.key(1), 4000)
    run = jax.jit(jax.vmap(lambda key: V.random(key, jnp.float32(q), jnp.asarray(due), kappa=0.4, rho=0.5)))
    keep, p = jax.device_get(run(keys))
    assert np.all(np.abs(keep.mean(0) - p[0]) <= 4.5 * np.sqrt(p[0] * (1 - p[0]) / 4000))
    assert len(np.unique(keep[:, 0], axis=0)) > 20


@exact
@pytest.mark.parametrize("kappa", [0.0, 0.3, 0.5, 0.8])
def test_the_number_kept_is_exact(rule, kappa):
    q, due = groups(12, 100, 9, share=0.5)
    keep, p = apply(rule, q, due, kappa=kappa)
    for due, keep, p in zip(due, keep, p):
        n = int(due.sum())
        want = min(n, max(2, round(float(np.float32(kappa)) * n)))
        assert (keep & due).sum() == want and np.allclose(p[due], want / max(n, 1))


@pytest.mark.parametrize("rho", [0.5, 0.25])
def test_balance_is_single_removals_step_by_step(rho):
    """Multiples of 1/8, so sums are exact and ties many: the first of equals goes."""
    rng = np.random.default_rng(13)
    q = rng.binomial(8, rng.random((150, 1)), (150, 9)) / 8
    due = rng.random(q.shape) < 0.8
    keep, _ = apply(V.balance, np.where(due, q, np.nan), due, kappa=0.4, rho=rho)
    for q, due, keep in zip(np.float32(q), due, keep):
        mine = np.flatnonzero(due)
        want = plain_balance(q[mine], min(len(mine), max(2, round(0.4 * len(mine)))), rho)
        assert np.flatnonzero(keep & due).tolist() == mine[want].tolist()


def test_one_removal_of_balance_is_the_best_and_many_need_not_be():
    """Theorem 4.2 is about one removal; of several, greedy is never better than the best subset and mostly near it."""
    q, _ = groups(14, 60, 7, share=1.0)
    gap = lambda subset: abs(np.mean(subset, dtype=np.float64) - 0.5)
    worse, previous = [], None
    for count in (6, 5, 4, 3, 2):
        keep, _ = apply(V.balance, q, kappa=count / 7)
        assert np.all(keep.sum(1) == count)
        best = [min(gap(s) for s in itertools.combinations(one, count)) for one in q]
        excess = np.array([gap(one[k]) for one, k in zip(q, keep)]) - best
        assert np.all(excess > -1e-6)
        if count == 6:
            assert np.all(excess < 1e-6)
        else:  # each step by itself: from the survivors of the step before, no other removal is nearer to rho
            for one, k, before in zip(q, keep, previous):
                others = [gap(one[before & (np.arange(7) != j)]) for j in np.flatnonzero(before)]
                assert np.all(k <= before) and gap(one[k]) <= min(others) + 1e-6
        worse.append(np.mean(excess > 1e-6))
        previous = keep
    assert worse[-1] > 0.1


def test_changed_numbers_compile_nothing():
    q, due = groups(15)
    for rule in V.RULES.values():
        bounds = dict(lam=1.0, p_min=0.1, p_max=0.9), dict(lam=3.0, p_min=0.2, p_max=1.0)
        bounds = bounds if rule in DRAWN else ({}, {})
        apply(rule, q, due, **bounds[0])
        size = compiled(rule, least=2, capacity=None)._cache_size()
        apply(rule, q, due, kappa=0.7, rho=0.2, key=jax.random.key(3), **bounds[1])
        assert compiled(rule, least=2, capacity=None)._cache_size() == size


# --- weights --------------------------------------------------------------------------------------


def test_weights_are_inverse_and_have_mean_one_over_survivors():
    p = jnp.array([[0.5, 0.25, 1.0, 0.0], [0.3, 0.2, 0.1, 0.4]])
    keep = jnp.array([[True, True, True, False], [False] * 4])
    weight = V.inverse_weights(p, keep)
    np.testing.assert_allclose(weight, [[6 / 7, 12 / 7, 3 / 7, 0], [0] * 4], rtol=1e-6)


@drawn
def test_weighted_means_of_survivors_estimate_the_whole_groups(rule):
    """Over 2,000 keys, G = 64: the plain mean of survivors' q is pushed to rho, the weighted one is not."""
    q = np.random.default_rng(16).beta(4, 1, (1, 64)).astype(np.float32)
    due = np.arange(64)[None] < 60
    keys = jax.random.split(jax.random.key(2), 2000)

    def one(key):
        keep, p = rule(key, jnp.float32(q), jnp.asarray(due), kappa=0.5, rho=0.5, lam=2.0)
        weight = V.inverse_weights(p, keep)
        return jnp.mean(weight * q, where=keep), jnp.mean(jnp.float32(q), where=keep)

    weighted, plain = np.asarray(jax.jit(jax.vmap(one))(keys)).mean(1)
    assert abs(weighted - q.mean()) < 0.004 and q.mean() - plain > 0.03
