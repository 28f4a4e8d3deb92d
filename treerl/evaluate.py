"""How good a policy is, measured from several samples a problem."""

import numpy as np


def pass_at_k(correct, samples: int, k: int) -> float:
    """Estimates the chance that at least one of k samples is right, without bias.

    Chen et al. 2021, https://arxiv.org/abs/2107.03374, equation 1:

        pass@k = mean over problems of 1 - C(n - c, k) / C(n, k)

    computed as 1 - prod_{i = n-c+1..n} (1 - k / i), whose factors lie in [0, 1].

    Args:
      correct: [N] int, the number c of right samples of each problem.
      samples: n, the samples drawn for each problem.
      k: samples that the imagined user may try, 1..n.

    Returns:
      The mean over the N problems, in [0, 1].

    Raises:
      ValueError: k is not in 1..n, a count is not in 0..n, or there is no problem.
    """
    correct = np.asarray(correct)
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} cannot be estimated from {samples} samples a problem; use 1 <= k <= samples.")
    if correct.ndim != 1 or not correct.size:
        raise ValueError(f"correct has shape {list(correct.shape)}; give one count for each of N >= 1 problems.")
    if not np.issubdtype(correct.dtype, np.integer) or correct.min() < 0 or correct.max() > samples:
        raise ValueError(
            f"correct must hold whole numbers from 0 to samples = {samples}; found {correct.dtype} from {correct.min()} to {correct.max()}."
        )
    return float(np.mean([_any_right(int(c), samples, k) for c in correct]))


def _any_right(c: int, n: int, k: int) -> float:
    """Chance that k of n samples, drawn without replacement, hold one of the c right ones."""
    if n - c < k:  # Too few wrong ones to fill k.
        return 1.0
    return 1 - np.prod(1 - k / np.arange(n - c + 1, n + 1))


def majority_vote(answer, valid) -> np.ndarray:
    """Picks the answer that most samples of a problem give (self-consistency, https://arxiv.org/abs/2203.11171).

    Args:
      answer: [N, n] int, an id of each sample's answer, equal ids being equal answers.
      valid: [N, n] bool, whether the sample has an answer; others do not vote.

    Returns:
      [N], the winning id; the first seen among equals. -1 where no sample votes, so let ids start from 0.
    """
    return _winner(*_ballots(answer, valid), np.ones(np.shape(answer), int))


def weighted_vote(answer, score, valid) -> np.ndarray:
    """Picks the answer of a problem with the largest sum of weights, ranks of the samples' scores.

    ARRoL, https://arxiv.org/abs/2603.24840, test-time voting, see `rank_weights`; the score is a quality
    head's of the whole sample. Scores matter by their order alone.

    Args:
      answer, valid: [N, n], see `majority_vote`. score: [N, n] float, higher is better.

    Returns:
      [N], the winning id; the first seen among equals. -1 where no sample votes. The worst of several
      samples has no weight: of two that differ in score, the better decides.

    Raises:
      ValueError: shapes differ, ids are not whole, or a voting sample's score is NaN.
    """
    answer, valid = _ballots(answer, valid)
    return _winner(answer, valid, _doubled_ranks(score, valid))


def rank_weights(score, valid) -> np.ndarray:
    """Maps scores to weights by their rank among a problem's voting samples, from 0 (worst) to 1 (best), evenly.

    Scores 2.1, 1.4 and 0.7 weigh 1, 0.5 and 0. A single sample weighs 1. Equal scores share the mean of
    their ranks, so that equal scores alone make a majority vote; what the paper does with them is not known.

    Args:
      score: [N, n]. valid: [N, n] bool; samples without a vote take no rank.

    Returns:
      [N, n] float64, 0 where not valid.

    Raises:
      ValueError: shapes differ, or a voting sample's score is NaN.
    """
    valid = np.asarray(valid, bool)
    ranks, voters = _doubled_ranks(score, valid), valid.sum(axis=1, keepdims=True)
    return ranks / np.where(voters > 1, 2 * (voters - 1), 1)


def _doubled_ranks(score, valid) -> np.ndarray:
    """Twice the rank of each voting sample, 0 for the worst, so that means of ranks are whole: [N, n] int."""
    score = np.asarray(score)
    if score.shape != valid.shape:
        raise ValueError(f"score has shape {list(score.shape)}, and valid {list(valid.shape)}.")
    if np.isnan(score[valid]).any():
        raise ValueError("the score of a voting sample is NaN.")
    others = valid[:, None, :] & valid[:, :, None]  # [N, mine, other]
    lower = np.sum(others & (score[:, None, :] < score[:, :, None]), axis=2)
    equal = np.sum(others & (score[:, None, :] == score[:, :, None]), axis=2)
    alone = valid.sum(axis=1, keepdims=True) == 1
    return np.where(valid, np.where(alone, 1, 2 * lower + equal - 1), 0)


def _ballots(answer, valid) -> tuple[np.ndarray, np.ndarray]:
    """Checks what is voted on."""
    answer, valid = np.asarray(answer), np.asarray(valid, bool)
    if answer.ndim != 2 or answer.shape != valid.shape or not answer.shape[1]:
        raise ValueError(f"answer has shape {list(answer.shape)} and valid {list(valid.shape)}; both are [N, n], n >= 1.")
    if not np.issubdtype(answer.dtype, np.integer):
        raise ValueError(f"answer must hold whole ids; found {answer.dtype}.")
    return answer, valid


def _winner(answer, valid, weight) -> np.ndarray:
    """Answer of the largest sum of whole weights, the first seen among equals, -1 where nobody votes: [N]."""
    same = valid[:, :, None] & valid[:, None, :] & (answer[:, :, None] == answer[:, None, :])
    total = np.where(valid, np.sum(same * weight[:, None, :], axis=2), -1)
    first = np.argmax(total, axis=1)  # samples with one answer have one sum, so this is where it was first seen
    return np.where(valid.any(axis=1), answer[np.arange(len(answer)), first], -1)
