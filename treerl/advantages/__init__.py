"""Group-relative advantage estimators, and how a chosen one runs on a batch.

Each is `estimator(tree, reward [L], **options)` of one tree, returning leaf credit [L] or cell
credit [S, K] (or leaf credit and the weight of each leaf's tokens); callers vmap, and `tree.spread`
turns either into what the learner reads. One that needs more than the tree names it as a further
argument: `reference_logp` [S, K], `gradient_norm` [L], `importance` [L] or `survival` [L].
"""

import inspect
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from treerl import tree as T
from treerl.advantages import gdro as _gdro
from treerl.advantages.branch_depthwise import branch_depthwise
from treerl.advantages.flat import dr_grpo, grpo, mc_grpo, minimum_variance, opo, reinforce_pp, rloo, whiten
from treerl.advantages.gdro import gdro
from treerl.advantages.hgpo import gigpo, gigpo_tree, hgpo, hgpo_tree
from treerl.advantages.multipliers import ace, ear, novelty
from treerl.advantages.trees import eptree, spo_tree, tree_grpo, treepo

ESTIMATORS = {
    f.__name__: f
    for f in (
        branch_depthwise, dr_grpo, eptree, grpo, mc_grpo, minimum_variance, opo, reinforce_pp, rloo, spo_tree,
        tree_grpo, treepo,
    )
} | {"gigpo": gigpo_tree, "hgpo": hgpo_tree}  # fmt: skip
WHITENED = {"reinforce_pp": whiten, "treepo": whiten}  # (B trees, credit [B, L]) -> credit, after the estimator
MULTIPLIERS = {"novelty": novelty, "ear": ear, "ace": ace, "gdro": gdro}  # in the order in which they apply


class Advantage(NamedTuple):
    """An estimator with what follows it, on batched trees."""

    credit: Callable  # (tree, reward [B, L], extras {name: [B, ...]}, memory, graded) -> (credit, leaf_weight, memory);
    #                   multipliers read the rewards as graded [B, L], by default the same
    needs: tuple[str, ...]  # names of extras
    leaf: bool  # credit is [B, L], else [B, S, K]; leaf_weight is [B, L] float32
    memory: dict  # what it remembers, at the start of a run


def extras(function: Callable) -> tuple[str, ...]:
    """What an estimator or multiplier reads beside the tree, rewards and credit, by its argument names."""
    known = ("tree", "reward", "credit", "memory")
    kinds = inspect.signature(function).parameters.values()
    return tuple(p.name for p in kinds if p.kind is not p.KEYWORD_ONLY and p.name not in known)


def gives_leaf_credit(estimator: Callable) -> bool:
    """Whether an estimator credits leaves [L]; else it credits cells [S, K].

    Raises:
      ValueError: it does neither, or asks for what it is not given.
    """
    example = T.from_parents([[-1, -1], [0, 1], [0, 1]], [[1, 1]] * 3, [[2, 0], [2, 1]])
    fills = dict(reference_logp=example.logp_policy, gradient_norm=jnp.ones(2), importance=jnp.ones(2), survival=jnp.ones(2))
    parameters = inspect.signature(estimator).parameters.values()
    asked = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    if asked := asked + [name for name in extras(estimator) if name not in fills]:
        raise ValueError(
            f"it asks for {asked[0]!r}; beside tree and reward it can be given {', '.join(fills)}, before any *, and options, "
            "behind it, need a default."
        )
    found = jax.eval_shape(estimator, example, jnp.ones(2), *(fills[name] for name in extras(estimator)))
    shapes = [getattr(x, "shape", type(x).__name__) for x in (found if isinstance(found, tuple) else (found,))]
    if shapes[:1] not in ([(2,)], [(3, 2)]) or shapes[1:] not in ([], [(2,)]):
        raise ValueError(
            f"of a tree with S=3 rows, K=2 slots and L=2 leaves it returns {', '.join(map(str, shapes))}; return the credit of leaves, [L], or of cells, "
            "[S, K], or a pair of such credit and the weight of leaves, [L]."
        )
    return len(shapes[0]) == 1


def leaf_estimators() -> list[str]:
    """Names of the estimators that credit leaves."""
    return sorted(name for name, estimator in ESTIMATORS.items() if gives_leaf_credit(estimator))


def compose(estimator: Callable, whitening: Callable | None = None, multipliers: dict[str, Callable] = {}) -> Advantage:
    """Puts an estimator, its whitening over the batch and multipliers together.

    Args:
      estimator: of one tree, options bound. whitening: on the batch, see WHITENED.
      multipliers: name -> function of MULTIPLIERS, options bound; applied in the order of MULTIPLIERS.

    Raises:
      ValueError: novelty with an estimator of cell credit, or options that an estimator refuses.
    """

    def one(tree, reward, given):
        result = estimator(tree, reward, **{name: given[name] for name in extras(estimator) if name in given})
        credit, weight = result if isinstance(result, tuple) else (result, jnp.ones(reward.shape))
        return credit, jnp.where(T.leaf_valid(tree), weight, 0).astype(jnp.float32)

    leaf = gives_leaf_credit(estimator)
    if "novelty" in multipliers and not leaf:
        names = ", ".join(leaf_estimators())
        raise ValueError(f"novelty reads the credit of leaves, and this estimator gives credit to cells; use one of {names}.")
    factors = {name: multipliers[name] for name in MULTIPLIERS if name in multipliers}
    needs = {name for f in (estimator, *factors.values()) for name in extras(f)}

    def credit(tree, reward, given, memory, graded=None):
        graded = reward if graded is None else graded
        result, weight = jax.vmap(one)(tree, reward, given)
        if whitening:
            result = whitening(tree, result)
        for name, multiplier in factors.items():
            if name == "gdro":
                factor, after = multiplier(tree, graded, memory["gdro"])
                memory = dict(memory, gdro=after)
            else:
                arguments = [given[n] for n in extras(multiplier)]
                factor = jax.vmap(multiplier)(tree, graded, result if leaf else jnp.zeros_like(reward), *arguments)
                if not leaf:  # the mean of the leaves below a cell
                    along = jnp.broadcast_to(factor[..., None], tree.leaf_path.shape)
                    factor = jax.vmap(T.mean_below)(tree, along)
            result = result * factor.reshape(factor.shape + (1,) * (result.ndim - factor.ndim))
        return jax.lax.stop_gradient(result), weight, memory

    memory = {"gdro": _gdro.start(*_edges(factors["gdro"]))} if "gdro" in factors else {}
    return Advantage(credit=credit, needs=tuple(sorted(needs)), leaf=leaf, memory=memory)


def _edges(function: Callable) -> tuple:
    """The bins' edges that an option chose."""
    return (tuple(inspect.signature(function).parameters["edges"].default),)
