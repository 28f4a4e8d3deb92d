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
        raise ValueError(
            f"pass@{k} cannot be estimated from {samples} samples a problem; use 1 <= k <= samples."
        )
    if correct.ndim != 1 or not correct.size:
        raise ValueError(
            f"correct has shape {list(correct.shape)}; give one count for each of N >= 1 problems."
        )
    if not np.issubdtype(correct.dtype, np.integer) or correct.min() < 0 or correct.max() > samples:
        raise ValueError(
            f"correct must hold whole numbers from 0 to samples = {samples}; "
            f"found {correct.dtype} from {correct.min()} to {correct.max()}."
        )
    return float(np.mean([_any_right(int(c), samples, k) for c in correct]))


def _any_right(c: int, n: int, k: int) -> float:
    """Chance that k of n samples, drawn without replacement, hold one of the c right ones."""
    if n - c < k:  # Too few wrong ones to fill k.
        return 1.0
    return 1 - np.prod(1 - k / np.arange(n - c + 1, n + 1))
