import itertools
from fractions import Fraction

import numpy as np
import pytest

from treerl.evaluate import majority_vote, pass_at_k, rank_weights, weighted_vote


def brute_force(correct, samples, k):
    """The share of all k-subsets of the samples that hold a right one, averaged over problems."""
    shares = []
    for count in correct:
        right = [i < count for i in range(samples)]
        subsets = list(itertools.combinations(right, k))
        shares.append(np.mean([any(subset) for subset in subsets]))
    return np.mean(shares)


@pytest.mark.parametrize("samples", [1, 2, 5, 7])
def test_equals_the_share_of_subsets_with_a_right_sample(samples):
    for k in range(1, samples + 1):
        for count in range(samples + 1):
            expected = brute_force([count], samples, k)
            np.testing.assert_allclose(pass_at_k([count], samples, k), expected, atol=1e-14)
        correct = np.arange(samples + 1)
        np.testing.assert_allclose(pass_at_k(correct, samples, k), brute_force(correct, samples, k), atol=1e-14)


def test_pass_at_1_is_the_accuracy():
    assert pass_at_k([0, 3, 8], 8, 1) == pytest.approx(11 / 24, abs=1e-15)


def test_large_counts_neither_overflow_nor_leave_the_unit_interval():
    assert pass_at_k([0], 10_000, 5_000) == 0.0
    assert pass_at_k([10_000], 10_000, 5_000) == 1.0
    assert pass_at_k([5_001], 10_000, 5_000) == 1.0
    assert pass_at_k([1], 10_000, 5_000) == pytest.approx(0.5, abs=1e-12)
    assert pass_at_k([2], 10_000, 1) == pytest.approx(2e-4, rel=1e-9)


@pytest.mark.parametrize(
    "correct, samples, k, message",
    [
        ([1], 4, 5, "pass@5 cannot be estimated from 4 samples"),
        ([1], 4, 0, "pass@0"),
        ([5], 4, 2, "from 0 to samples = 4"),
        ([-1], 4, 2, "from 0 to samples = 4"),
        ([0.5], 4, 2, "whole numbers"),
        ([], 4, 2, "N >= 1 problems"),
        ([[1]], 4, 2, "shape"),
    ],
)
def test_impossible_arguments_are_errors(correct, samples, k, message):
    with pytest.raises(ValueError, match=message):
        pass_at_k(correct, samples, k)


def ballots(seed=0, problems=2000, samples=9):
    """Random votes with many ties, of which some problems have none: answer, score, valid."""
    rng = np.random.default_rng(seed)
    answer = rng.integers(-2, 3, (problems, samples))
    valid = rng.random((problems, samples)) < rng.random((problems, 1))
    return answer, rng.integers(0, 5, (problems, samples)) / 4, valid


def count(answer, weight, valid):
    """The winner of one problem, by a ballot box in exact fractions."""
    box = {}
    for a, w, v in zip(answer.tolist(), weight, valid):
        if v:
            box[a] = box.get(a, 0) + w
    return max(box, key=box.get) if box else -1  # max takes the first of equals, and a dict keeps its order


def ranks(score, valid):
    voters = [s for s, v in zip(score, valid) if v]
    one = lambda s: Fraction(2 * sum(x < s for x in voters) + voters.count(s) - 1, 2 * max(len(voters) - 1, 1))
    return [one(s) if v and len(voters) > 1 else Fraction(int(v)) for s, v in zip(score, valid)]


def test_weights_are_ranks_from_the_best_to_the_worst():
    full = np.ones((1, 3), bool)
    np.testing.assert_array_equal(rank_weights([[2.1, 1.4, 0.7]], full), [[1, 0.5, 0]])
    np.testing.assert_array_equal(rank_weights([[0.7, 9.0, 1.4]], full), [[0, 1, 0.5]])
    np.testing.assert_array_equal(rank_weights([[3.0, 3.0, 1.0]], full), [[0.75, 0.75, 0]])
    np.testing.assert_array_equal(rank_weights([[2.1, np.nan, 0.7]], [[True, False, True]]), [[1, 0, 0]])
    np.testing.assert_array_equal(rank_weights([[-4.0], [5.0]], [[True], [False]]), [[1], [0]])


def test_votes_equal_a_ballot_box():
    answer, score, valid = ballots()
    weight = [ranks(*x) for x in zip(score, valid)]
    np.testing.assert_allclose(rank_weights(score, valid), np.array(weight, float), atol=1e-15)
    want = [count(*x) for x in zip(answer, weight, valid)]
    np.testing.assert_array_equal(weighted_vote(answer, score, valid), want)
    want = [count(a, np.ones(9, int).tolist(), v) for a, v in zip(answer, valid)]
    np.testing.assert_array_equal(majority_vote(answer, valid), want)


def test_equal_scores_make_a_majority_vote():
    answer, score, valid = ballots(1)
    majority = majority_vote(answer, valid)
    np.testing.assert_array_equal(weighted_vote(answer, np.full(score.shape, 0.3), valid), majority)
    assert (weighted_vote(answer, score, valid) != majority).any()


def test_only_the_order_of_scores_counts():
    answer, score, valid = ballots(2)
    want = weighted_vote(answer, score, valid)
    for transform in (np.exp, lambda x: x**3 - 7, lambda x: 1e6 * x):
        np.testing.assert_array_equal(weighted_vote(answer, transform(score), valid), want)
    assert (weighted_vote(answer, -score, valid) != want).any()


def test_good_samples_outvote_many_bad_ones_and_the_first_seen_wins_ties():
    full = np.ones((1, 5), bool)
    answer, score = [[7, 7, 7, 4, 4]], [[0.1, 0.2, 0.3, 0.8, 0.9]]
    assert majority_vote(answer, full) == [7] and weighted_vote(answer, score, full) == [4]
    assert majority_vote([[5, 2, 2, 5, 9]], full) == [5]
    assert weighted_vote([[8, 3, 3, 8, 1]], [[4, 3, 2, 1, 0]], full) == [8]  # 4 + 1 = 3 + 2 quarters


def test_a_single_sample_wins_and_no_sample_gives_minus_one():
    for vote in (majority_vote, lambda answer, valid: weighted_vote(answer, np.zeros((2, 1)), valid)):
        np.testing.assert_array_equal(vote([[6], [6]], [[True], [False]]), [6, -1])


def test_invalid_answers_never_vote():
    """Whatever an invalid sample says and scores, NaN included, nothing changes."""
    answer, score, valid = ballots(3)
    noise, bad = np.where(valid, answer, 1), np.where(valid, score, np.nan)
    np.testing.assert_array_equal(majority_vote(noise, valid), majority_vote(answer, valid))
    np.testing.assert_array_equal(weighted_vote(noise, bad, valid), weighted_vote(answer, score, valid))


@pytest.mark.parametrize(
    "answer, score, valid, message",
    [
        ([1, 2], [1, 2], [1, 1], "both are"),
        ([[1, 2]], [[1, 2]], [[1]], "both are"),
        ([[1.0]], [[1]], [[1]], "whole ids"),
        ([[1, 2]], [[1]], [[1, 1]], "score has shape"),
        ([[1, 2]], [[1, np.nan]], [[1, 1]], "NaN"),
        (np.zeros((2, 0), int), np.zeros((2, 0)), np.zeros((2, 0)), "n >= 1"),
    ],
)
def test_impossible_votes_are_errors(answer, score, valid, message):
    with pytest.raises(ValueError, match=message):
        weighted_vote(answer, score, valid)
