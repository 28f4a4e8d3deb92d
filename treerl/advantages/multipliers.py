"""Factors on the credit of leaves that compose with any estimator; none carries a gradient.

Each is `(tree, reward [L], credit [L], ...) -> factor [L]` for one tree. They apply in the order of
`advantages.MULTIPLIERS`: novelty first, which reads the estimator's own credit; the others commute.
With cell credit a cell takes the mean of the factors of the leaves below it.
"""

import chex
import jax
import jax.numpy as jnp

from treerl import masked, tree as T


def novelty(
    tree: T.Tree, reward: jax.Array, credit: jax.Array, *, strength: float = 2.5, cap: float = 0.5, correct: float = 0.5
) -> jax.Array:
    """Raises the credit of right answers that the policy found unlikely.

    XRPO's novelty sharpening, arXiv 2510.06672 (from secondary sources; strength and cap as a review quotes them):
        A+ = A + min(max(strength (1 - eta), 0), cap A),   eta = exp(s_l - mean s),
    s_l being the mean log-prob of a leaf's tokens, its mean over all leaves of the group. Only leaves
    with reward > `correct` and A > 0. A forced token's log-prob is the policy's. Breaks the group's zero sum.

    Returns:
      Factor [L], 1 .. 1 + cap. Needs leaf credit.
    """
    chex.assert_equal_shape([reward, credit, tree.leaf[:, 0]])
    valid, length = T.leaf_valid(tree), jnp.maximum(T.leaf_length(tree), 1)
    score = T.down(tree, tree.logp_policy) / length
    eta = jnp.exp(score - masked.mean(score, valid))
    bonus = jnp.maximum(strength * (1 - eta), 0)
    gains = valid & (reward > correct) & (credit > 0)
    return jnp.where(gains, 1 + jnp.minimum(bonus / jnp.where(gains, credit, 1), cap), 1.0)


def ear(tree: T.Tree, reward: jax.Array, credit: jax.Array, *, floor: float = 0.0) -> jax.Array:
    """Damps the credit of answers the policy was unsure of: Y_l = max(2 - H_l / mean H, floor).

    ETTRL's entropy-based advantage reshaping (Adv-Res), arXiv 2508.11356: H_l is the mean entropy of the
    leaf's tokens, its mean over the group's leaves. The paper does not clamp, so that Y < 0, a sign flip, where
    H_l > 2 mean H; here it stops at `floor`. The mean of Y is 1 where nothing is clamped. H = 0 everywhere: Y = 1.

    Returns:
      Factor [L], at most 2.
    """
    del reward, credit
    valid, length = T.leaf_valid(tree), jnp.maximum(T.leaf_length(tree), 1)
    entropy = T.down(tree, tree.entropy) / length
    mean = masked.mean(entropy, valid)
    factor = jnp.where(mean > 0, 2 - entropy / jnp.where(mean > 0, mean, 1), 1.0)
    return jnp.where(valid, jnp.maximum(factor, floor), 1.0)


def ace(
    tree: T.Tree, reward: jax.Array, credit: jax.Array, reference_logp: jax.Array,
    *, alpha: float = 1.0, correct: float = 0.5, per_token: bool = False, limit: float = 20.0,
) -> jax.Array:  # fmt: skip
    """Punishes wrong answers more, the surer the policy has become of them: 1 + alpha softplus(c_l).

    ACE, arXiv 2602.21420 (from its abstract and secondary sources; no default of alpha was found, so sweep it):
    c_l = log policy(leaf) - log reference(leaf), the sum over its tokens. Leaves with reward > `correct`
    keep their credit. softplus(0) = log 2, so a policy equal to its reference is already scaled by 1 + alpha log 2.
    Breaks the group's zero sum.

    Args:
      reference_logp: [S, K] float32, log-prob of each token under the reference policy.
      per_token: divide c by the leaf's length; `limit`: |c| at most. Neither is in the paper, whose
        factor grows with length without bound.

    Returns:
      Factor [L], 1 for right answers.
    """
    del credit
    length = jnp.maximum(T.leaf_length(tree), 1)
    surer = T.down(tree, jnp.where(T.kept(tree), tree.logp_policy - reference_logp, 0))
    surer = jnp.clip(surer / (length if per_token else 1), -limit, limit)
    wrong = T.leaf_valid(tree) & (reward <= correct)
    return jnp.where(wrong, 1 + alpha * jax.nn.softplus(surer), 1.0)
