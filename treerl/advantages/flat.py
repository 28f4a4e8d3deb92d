"""Estimators that compare the leaves of one prompt and read nothing else of the tree than their lengths.

Each gives leaf credit [L]: 0 where there is no leaf, and exactly 0 for groups whose rewards differ
by less than rounding. `survival` [L] weighs the leaves of a group that was thinned by chance, inversely to a leaf's
chance of surviving and with mean 1 (`treerl.survival.inverse_weights`); 1 everywhere otherwise.
"""

import chex
import jax
import jax.numpy as jnp

from treerl import masked, tree as T

ROUNDING = 1e-6  # rewards with a smaller standard deviation are all the same


def _group(tree: T.Tree, reward: jax.Array, survival=1.0):
    """(which entries are leaves [L], number of leaves, their mean reward, whether they differ)."""
    chex.assert_equal_shape([reward, tree.leaf[:, 0]])
    valid = T.leaf_valid(tree)
    contrast = masked.std(reward, valid, ddof=1) >= ROUNDING
    return valid, jnp.sum(valid), masked.mean(reward, valid, weight=survival), contrast


def grpo(tree: T.Tree, reward: jax.Array, survival: jax.Array | float = 1.0, *, std: bool = True, eps: float = 1e-6) -> jax.Array:
    """Normalises rewards within the group: A_l = (r_l - mean) / (std + eps).

    GRPO, arXiv 2402.03300, eq. 10 (outcome supervision), with the sample standard deviation
    (ddof 1) of the released trainers. A group of one leaf gets zero (verl: its raw reward).

    Args:
      tree: one tree; only its leaf table is read. reward: [L] float32.
      std: divide by the standard deviation (False gives Dr. GRPO's advantage).
    """
    valid, _, mean, contrast = _group(tree, reward, survival)
    advantage = reward - mean
    if std:
        advantage = advantage / (masked.std(reward, valid, ddof=1, weight=survival) + eps)
    return jnp.where(valid & contrast, advantage, 0.0)


def dr_grpo(tree: T.Tree, reward: jax.Array, survival: jax.Array | float = 1.0) -> jax.Array:
    """Centres rewards within the group: A_l = r_l - mean.

    Dr. GRPO, arXiv 2503.20783, section 3.2. Differs from GRPO by the missing standard deviation; the
    paper's other half, a constant in place of lengths, is `learner.aggregation=constant`.
    """
    return grpo(tree, reward, survival, std=False)


def rloo(tree: T.Tree, reward: jax.Array, survival: jax.Array | float = 1.0) -> jax.Array:
    """Subtracts the mean of the other leaves: A_l = r_l - mean of r_j over j != l.

    RLOO, arXiv 2402.14740, section 2.3. Differs from GRPO by the missing standard deviation and the
    leaf's own reward, which is not in its baseline: it is n / (n - 1) times Dr. GRPO's (n / (n - w) with a
    weight w of survival). A single
    leaf has no baseline and gets zero (trl; verl: its raw reward).
    """
    valid, count, _, _ = _group(tree, reward)
    weight = jnp.where(valid, survival, 0)
    others = count - weight  # the weights' sum is the number of leaves
    return jnp.where(others > 0, dr_grpo(tree, reward, survival) * count / jnp.where(others > 0, others, 1), 0.0)


def opo(tree: T.Tree, reward: jax.Array) -> jax.Array:
    """Subtracts the length-weighted mean: A_l = r_l - sum_j |o_j| r_j / sum_j |o_j|.

    OPO, arXiv 2505.23585: the baseline of least variance where the squared norm of a rollout's
    gradient grows with its length; `minimum_variance` takes the norms themselves. Differs from
    GRPO by the weights and by the missing standard deviation; it is not zero-mean over leaves.
    """
    valid, _, _, contrast = _group(tree, reward)
    length = T.leaf_length(tree).astype(jnp.float32)
    return jnp.where(valid & contrast, reward - masked.mean(reward, valid, weight=length), 0.0)


def minimum_variance(tree: T.Tree, reward: jax.Array, gradient_norm: jax.Array, importance: jax.Array) -> jax.Array:
    """Subtracts the baseline of least gradient variance: b = sum w^2 |g|^2 r / sum w^2 |g|^2.

    VCPO's off-policy optimal baseline, arXiv 2602.17616 (the formula of its README; the released
    code multiplies truncated and untruncated weights). b minimises the expectation of
    |sum_l w_l (r_l - b) g_l|^2 for independent rollouts. With equal w and |g| it is the group's mean.
    Differs from GRPO by the weights and by the missing standard deviation.

    Args:
      gradient_norm: [L] float32, squared norm of the gradient of each leaf's log-prob.
      importance: [L] float32, probability of the leaf's tokens by the policy over the sampler's.
    """
    valid, _, mean, contrast = _group(tree, reward)
    weight = jnp.where(valid, jnp.square(importance) * gradient_norm, 0)
    baseline = jnp.where(jnp.sum(weight) > 0, masked.mean(reward, valid, weight=weight), mean)
    return jnp.where(valid & contrast, reward - baseline, 0.0)


def mc_grpo(
    tree: T.Tree, reward: jax.Array, *, floor: float = 0.25, eps: float = 1e-3, rescale: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Centres on the median and leaves the median's own leaf out: A_l = (r_l - median) / (max(MAD, floor) + eps).

    MC-GRPO, arXiv 2601.22582; MAD is the median of |r_l - median|. With binary rewards and an odd group
    the majority IS the median, so MAD is always 0 and the published scale is 1 / eps = 1000; the
    `floor` (not in the paper; 0 is the paper's formula) keeps credit near GRPO's. Then only the minority has credit.
    Differs from GRPO by centre and scale, and by the pivot: the first leaf at the median weighs nothing.

    Use an odd number of slots. A group with an even number of leaves takes the lower of the two
    medians, as the released code would.

    Args:
      rescale: multiply by leaves / leaves with credit, as the released code does and the paper does not say.

    Returns:
      (leaf credit [L], weight of each leaf's tokens [L], 0 for the pivot and missing leaves).
    """
    valid, count, _, contrast = _group(tree, reward)

    median = lambda x: jnp.sort(jnp.where(valid, x, jnp.inf))[jnp.maximum(count - 1, 0) // 2]
    centre = median(reward)
    deviation = median(jnp.abs(reward - centre))
    pivot = jnp.argmax(valid & (reward == centre))
    advantage = jnp.where(valid & contrast, (reward - centre) / (jnp.maximum(deviation, floor) + eps), 0.0)
    if rescale:
        advantage = advantage * count / jnp.maximum(jnp.sum(jnp.abs(advantage) > 1e-6), 1)
    return advantage, valid & (jnp.arange(reward.shape[0]) != pivot)


def reinforce_pp(tree: T.Tree, reward: jax.Array, *, baseline: bool = False) -> jax.Array:
    """Gives every token its leaf's reward; `whiten` then normalises over all tokens of the batch.

    REINFORCE++, arXiv 2501.03262, without discount (gamma = 1, as its trainers). Differs from GRPO:
    no group's standard deviation, and without `baseline` no group at all, so a prompt that is
    always solved keeps a positive credit.

    Args:
      baseline: subtract the group's mean first (REINFORCE++-baseline); then a group without contrast has zero
        before whitening, and nearly zero after it.
    """
    valid, _, _, _ = _group(tree, reward)
    return dr_grpo(tree, reward) if baseline else jnp.where(valid, reward, 0.0)


def whiten(tree: T.Tree, credit: jax.Array, *, eps: float = 1e-8) -> jax.Array:
    """Normalises leaf credit over all tokens of all rollouts of a batch: (A - mean) / sqrt(variance + eps).

    The masked whitening of the released trainers (verl, trl): every token of a leaf counts, a
    shared one as often as leaves stand on it; sample variance.

    Args:
      tree: B trees. credit: [B, L].

    Returns:
      [B, L], with mean 0 and variance 1 over tokens; 0 everywhere if all credit is the same.
    """
    length = jnp.where(jax.vmap(T.leaf_valid)(tree), jax.vmap(T.leaf_length)(tree), 0).astype(jnp.float32)
    there = length > 0
    centre, spread = masked.mean(credit, there, weight=length), masked.std(credit, there, weight=length, ddof=1)
    advantage = (credit - centre) * jax.lax.rsqrt(jnp.square(spread) + eps)
    return jnp.where(there & (spread >= ROUNDING), advantage, 0.0)
