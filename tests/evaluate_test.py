import itertools

import numpy as np
import pytest

from treerl.evaluate import pass_at_k


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
        np.testing.assert_allclose(
            pass_at_k(correct, samples, k), brute_force(correct, samples, k), atol=1e-14
        )


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
