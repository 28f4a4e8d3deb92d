"""Steps compared where their recent states agree: GiGPO, HGPO, and both carried to trees of text."""

from typing import Literal

import chex
import jax
import jax.numpy as jnp

from treerl import masked, tree as T


def step_returns(reward: jax.Array, valid: jax.Array, gamma: float) -> jax.Array:
    """Discounts rewards backwards: R_t = r_t + gamma R_{t+1} over the valid steps.

    GiGPO, arXiv 2505.10978, eq. 5. An invalid step is skipped: no reward, no discount.

    Args:
      reward: [R, T] float32. valid: [R, T] bool. gamma: discount a step, may be traced.

    Returns:
      float32 [R, T], 0 at invalid steps.
    """
    chex.assert_equal_shape([reward, valid])

    def compose(later, now):  # affine maps R -> r + g R
        return later[0] * now[0], now[1] + now[0] * later[1]

    maps = jnp.where(valid, gamma, 1.0), jnp.where(valid, reward, 0.0)
    _, returns = jax.lax.associative_scan(compose, maps, reverse=True, axis=1)
    return jnp.where(valid, returns, 0.0)


def gigpo(
    returns: jax.Array,
    state_id: jax.Array,
    valid: jax.Array,
    *,
    std: bool = False,
    episode: jax.Array | None = None,
    cross_steps: bool = True,
    step_weight: float = 1.0,
    eps: float = 1e-6,
) -> jax.Array:
    """Compares each step with the steps of its group that stand in the same state.

    GiGPO, arXiv 2505.10978, eq. 3 and 6 to 8:
        A_S = (R_t - mean) / F   over all valid steps of the group with this state,
        A   = A_E + step_weight A_S,   A_E = (episode - mean) / F   over the group.
    F is 1, or with `std` the sample standard deviation (ddof 1) + eps. A trajectory that visits a
    state twice counts twice; a state visited once has A_S = 0.

    What differs from flat GRPO: a step is compared with the steps taken from the same state, on
    the return from there; A_E alone (std, cross_steps=False) is GRPO.

    Where the paper and its released code differ, and the choice here:
      - the mean and std of A_E run over step rows, so a longer trajectory weighs more (released
        code; cross_steps=False: one value a trajectory, the paper);
      - a group of one gets A_E = 0 (the released code hands out the RAW score there);
      - states match exactly (the released code can also cluster similar texts).

    Args:
      returns: [R, T] float32, of R trajectories of one task (see `step_returns`).
      state_id: [R, T] or [R, T, words] int32 or uint32, equal exactly where the states are.
      valid: [R, T] bool, a prefix of each trajectory.
      std, cross_steps: static. episode: None (A_S alone) or [R], the return of each trajectory.

    Returns:
      float32 [R, T], 0 at invalid steps.
    """
    order, centred, square, count = _compare(returns, state_id, valid, 0)
    advantage = centred[0]
    if std:
        advantage = advantage / (jnp.sqrt(square[0] / jnp.maximum(count[0] - 1, 1)) + eps)
    advantage = step_weight * _unsort(jnp.where(count[0] >= 2, advantage, 0.0), order, valid.shape)
    if episode is not None:
        _, base, _ = _episode(episode, valid, cross_steps=cross_steps, std=std, eps=eps)
        advantage = advantage + base[:, None]
    return jnp.where(valid, advantage, 0.0)


def hgpo(
    returns: jax.Array,
    state_id: jax.Array,
    valid: jax.Array,
    *,
    levels: int = 2,
    alpha: float = 1.0,
    weight_shift: int = 1,
    std: bool = True,
    zero: Literal["drop", "keep"] = "drop",
    tolerance: float = 1e-6,
    episode: jax.Array | None = None,
    base: Literal["item", "sum"] = "item",
    cross_steps: bool = True,
    eps: float = 1e-6,
) -> jax.Array:
    """Averages, over ever longer matching histories, a step's advantage among the steps that match.

    HGPO, arXiv 2602.22817, eq. 7. Level k compares the valid steps of the group whose last k + 1
    states are equal (actions are not in the key); it exists from step k on, for two steps or more:
        A_k = (R_t - mean_k) / (std_k + eps),    population standard deviation (ddof 0),
        A   = sum_k w_k A_k / sum_k w_k,   w_k = (k + weight_shift)^alpha,   k = 0 .. levels.
    Without `std`, A_k = R_t - mean_k. A step without any level gets 0. Repeated visits by one trajectory count.

    What differs from flat GRPO: no episode term; a step is compared with steps in the same state,
    more weight going to those that also came the same way. levels=0 without std is GiGPO's A_S,
    with std it is A_S sqrt(n / (n - 1)).

    Where the paper and its released code differ, and the choice here:
      - weight_shift=1 is the paper's eq. 7, 2 the released code (whose 1e-6 added to the sum of
        weights is left out);
      - zero="drop" is the released code: a level in which this step's centred return is zero is
        left out and the others renormalised; "keep" is the paper: it stays with its weight. The
        code tests exact float equality, here |R - mean| <= tolerance max(1, max |R|);
      - `episode` with base="item" is the code's base_group=True: GiGPO's A_E (ddof 1) as one more item, of weight 1
        whatever alpha; it is absent for a group of one, where the code takes the RAW score.

    base="sum" is in neither: A_E + A, GiGPO with the average over histories in the place of A_S. As an item, A_E weighs
    less the more levels a step has, so that a trajectory that failed is blamed less where it repeated itself.

    One sort numbers the states, a second orders the steps by state, then by the state before, and so on,
    so that the groups of every level are runs. A segmented scan merges the moments of a run: its order of addition is
    fixed, and a group of equal returns is exactly zero. Memory is O(levels R T).

    Args:
      returns: [R, T] float32, of R trajectories of one task (see `step_returns`).
      state_id: [R, T] or [R, T, words] int32 or uint32, equal exactly where the states are.
      valid: [R, T] bool, a prefix of each trajectory.
      levels: longest history, in states before the present one; static, as are weight_shift (at
        least 1), std, zero, base and cross_steps. alpha (not negative), tolerance, eps may be traced.
      episode: None or [R], the return of each trajectory.

    Returns:
      float32 [R, T], 0 at invalid steps.
    """
    if zero not in ("drop", "keep") or base not in ("item", "sum") or levels < 0 or weight_shift < 1:
        raise ValueError(
            f"hgpo: zero={zero!r} is not drop or keep, base={base!r} not item or sum, levels={levels} < 0, or "
            f"weight_shift={weight_shift} < 1."
        )
    levels = min(levels, valid.shape[1] - 1)
    order, centred, square, count = _compare(returns, state_id, valid, levels)
    scale = jnp.sqrt(square / jnp.maximum(count, 1)) + eps if std else 1.0
    item, present = centred / scale, count >= 2
    nonzero = jnp.abs(centred) > tolerance * _magnitude(returns, valid)
    log_weight = alpha * jnp.log(weight_shift + jnp.arange(levels + 1.0))

    if episode is not None:
        offset, term, enough = _episode(episode, valid, cross_steps=cross_steps, std=std, eps=eps)
    if episode is not None and base == "item":
        differs = jnp.abs(offset) > tolerance * _magnitude(episode, jnp.any(valid, axis=1))
        trajectory = order // valid.shape[1]
        item = jnp.concatenate([item, term[None, trajectory]])
        nonzero = jnp.concatenate([nonzero, differs[None, trajectory]])
        present = jnp.concatenate([present, jnp.broadcast_to(enough, order.shape)[None]])
        log_weight = jnp.append(log_weight, 0.0)

    present = present & nonzero if zero == "drop" else present
    log_weight = jnp.where(present, log_weight[:, None], 0.0)
    weight = jnp.exp(log_weight - jnp.max(log_weight, axis=0))  # the largest is 1: no overflow
    advantage = _unsort(masked.mean(jnp.where(nonzero, item, 0.0), present, axis=0, weight=weight), order, valid.shape)
    if episode is not None and base == "sum":
        advantage = advantage + term[:, None]
    return jnp.where(valid, advantage, 0.0)


def segments(tree: T.Tree, reward: jax.Array, *, segment: int, gamma: float = 1.0) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Cuts the path of every leaf into steps, whose state is the text of the segment before.

    A step is a run of `segment` rows (the last of a leaf may be shorter), the reward arrives at
    the last step, and all first steps share one state, the prompt. With the exact prefix as the
    state every level of HGPO would collapse into the first: equal prefixes have equal histories,
    so every level is the sibling group, the leaves below one cell. The state is therefore an
    abstraction, the recent text, in which lines that came different ways can meet again.

    A state is `tree.text_id` of that text.

    Args:
      tree: one tree. reward: [L] float32. segment: rows a step, static. gamma: discount a step.

    Returns:
      (returns float32 [L, T], state_id uint32 [L, T, 2], valid bool [L, T]), T = ceil(S / segment).
    """
    chex.assert_equal_shape([reward, tree.leaf[:, 0]])
    if segment < 1:
        raise ValueError(f"segment={segment} makes no steps; set it to 1 or more.")
    leaves, rows = tree.leaf_path.shape
    steps = -(-rows // segment)
    count = -(-T.leaf_length(tree) // segment)[:, None]  # 0 where there is no leaf
    step = jnp.arange(steps)
    valid = step < count
    returns = step_returns(jnp.where(valid & (step == count - 1), reward[:, None], 0.0), valid, gamma)
    token = jnp.pad(T.along(tree, tree.token), ((0, 0), (0, steps * segment - rows)))
    text = T.text_id(token.reshape(leaves, steps, segment))
    return returns, _back(text, 1), valid


def of_turns(tree: T.Tree, gamma: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The turns of the episodes of a tree as steps.

    The penalty of an invalid action comes off the step's own return and is not discounted, as in verl-agent's released
    code, where it is taken off after the returns are made. (Comparisons of whole episodes see all of an episode's penalties,
    where that code's see the turn's own.)

    Args:
      tree: one tree, with turns. gamma: discount a turn.

    Returns:
      (returns float32 [L, T], state_id uint32 [L, T, 2], valid bool [L, T]).
    """
    turns = tree.turns
    valid = turns.valid & T.leaf_valid(tree)[:, None]
    returns = step_returns(turns.reward, valid, gamma) - turns.penalty
    return jnp.where(valid, returns, 0.0), turns.state_id, valid


def _steps(tree: T.Tree, reward: jax.Array, segment: int, gamma: float):
    """The steps of a tree's leaves: turns in an environment, segments of text."""
    return segments(tree, reward, segment=segment, gamma=gamma) if tree.turns is None else of_turns(tree, gamma)


def hgpo_tree(
    tree: T.Tree,
    reward: jax.Array,
    *,
    segment: int = 8,
    gamma: float = 1.0,
    levels: int = 2,
    alpha: float = 1.0,
    weight_shift: int = 1,
    std: bool = True,
    zero: Literal["drop", "keep"] = "drop",
    base: Literal["none", "item", "sum"] = "none",
) -> jax.Array:
    """Compares turns that were taken in the same state, or segments of text that follow the same text, by HGPO.

    HGPO, arXiv 2602.22817, `hgpo` of `of_turns`; on text, to which it is carried here, of `segments`. gamma is 1 by
    default, 0.95 in the paper. The leaves of the tree are the
    group; every row of a leaf's path has the credit of its step, and a cell the mean over the
    leaves below it; observations have none. What differs from flat GRPO: credit belongs to cells; with segment >= S there
    is one step, and this is GRPO with the population standard deviation. A tree of text whose rewards are
    all the same gets zero; of episodes, of which one can be solved sooner than another, turns without contrast do.

    Args:
      tree: one tree. reward: [L] float32, of text; episodes have rewards in their turns. segment, gamma: see `segments`.
        base: what the comparison of whole leaves is: not read (the paper), one more item (base_group of the released code)
          or added; see `episode` of `hgpo`. Others: see `hgpo`.

    Returns:
      Cell credit, float32 [S, K], 0 outside kept cells.
    """
    steps = _steps(tree, reward, segment, gamma)
    options = dict(levels=levels, alpha=alpha, weight_shift=weight_shift, std=std, zero=zero)
    if base != "none":
        options |= dict(episode=reward, base=base)
    credit = hgpo(*steps, **options)
    return _cell_credit(tree, reward, credit, segment)


def gigpo_tree(
    tree: T.Tree,
    reward: jax.Array,
    *,
    segment: int = 8,
    gamma: float = 1.0,
    std: bool = False,
    step_weight: float = 1.0,
) -> jax.Array:
    """Compares whole leaves, and turns taken in the same state or segments that follow the same text, by GiGPO.

    GiGPO, arXiv 2505.10978, `gigpo` of `of_turns`; on text, to which it is carried here, of `segments`. A_E is over step
    rows as in the released code: a longer leaf weighs more. Cells as in `hgpo_tree`. What differs from flat GRPO:
    the step term; step_weight=0 with segment >= S and std=True is GRPO. gamma is 1 here and 0.95 in the paper, whose
    steps are turns.

    Args:
      tree: one tree. reward: [L] float32. segment, gamma: see `segments`. Others: see `gigpo`.

    Returns:
      Cell credit, float32 [S, K], 0 outside kept cells.
    """
    steps = _steps(tree, reward, segment, gamma)
    credit = gigpo(*steps, std=std, episode=reward, step_weight=step_weight)
    return _cell_credit(tree, reward, credit, segment)


def _cell_credit(tree, reward, credit, segment):
    """Gives every cell the mean credit of its step over the leaves below: [L, T] -> [S, K]; 0 without contrast."""
    if tree.turns is not None:
        turn = jnp.minimum(T.along(tree, tree.turns.turn), credit.shape[1] - 1)
        found = T.mean_below(tree, jnp.take_along_axis(credit, turn, axis=1))
        return jnp.where(T.spoken(tree), found, 0.0)
    rows = jnp.repeat(credit, segment, axis=1)[:, : tree.leaf_path.shape[1]]
    contrast = masked.std(reward, T.leaf_valid(tree), ddof=1) >= 1e-6  # False for fewer than two leaves
    return jnp.where(contrast, T.mean_below(tree, rows), 0.0)


def _compare(returns, state_id, valid, levels):
    """Compares every step with the steps of equal history, at each level.

    Returns (all in the sorted order of the steps, N = R * T):
      order [N] int32, the step at each place; centred [levels + 1, N], return minus the group's
      mean; square [levels + 1, N], the group's sum of centred squares; count [levels + 1, N]
      float32, the size of the group, 0 where the step has no such level.
    """
    chex.assert_equal_shape([returns, valid])
    chex.assert_equal_shape_prefix([state_id, valid], 2)
    chex.assert_type(state_id, jnp.integer)
    order, start, member = _sort(state_id, valid, levels)
    values = jnp.where(valid, returns, 0.0).reshape(-1)[order]
    count, mean, square = _run_moments(jnp.broadcast_to(values, start.shape), start)
    return order, values - mean, square, jnp.where(member, count, 0.0)


def _sort(state_id, valid, levels):
    """Sorts the steps by state, then by the state before, and so on.

    States are numbered first, so that a whole history and the step's index fit into the 64 bits of
    one key: sorts of a single operand are several times faster than of many.

    Returns:
      order [N] int32; start [levels + 1, N] bool, where the groups of each level begin; member
      [levels + 1, N] bool, whether the step has the level.
    """
    steps = valid.size
    bits, index = steps.bit_length(), jnp.arange(steps)
    words = jnp.asarray(state_id).astype(jnp.uint32).reshape(*valid.shape, -1)
    with jax.enable_x64(True):  # for keys of 64 bits
        number = words[..., 0].reshape(-1).astype(jnp.uint64)
        for word in range(1, words.shape[-1]):
            number = (number << 32) | words[..., word].reshape(-1).astype(jnp.uint64)
            number = _rank(number) if word + 1 < words.shape[-1] else number
        state = _rank(number).astype(jnp.uint32).reshape(valid.shape)
        member, history = [], []
        for level in range(levels + 1):
            member.append(_back(valid, level) & member[-1] if member else valid)
            history.append(jnp.where(member[-1], _back(state, level), jnp.uint32(steps)).reshape(-1))
        key, used = history[0].astype(jnp.uint64), bits
        for part in history[1:]:
            if used + 2 * bits > 64:
                key, used = _rank(key), bits
            key, used = (key << bits) | part.astype(jnp.uint64), used + bits
        key = jax.lax.sort((key << bits) | index.astype(jnp.uint64))
        order = (key & jnp.uint64(2**bits - 1)).astype(jnp.int32)
    history = jnp.stack(history)[:, order]
    differs = jax.lax.associative_scan(jnp.logical_or, history[:, 1:] != history[:, :-1])  # groups nest
    return order, jnp.pad(differs, ((0, 0), (1, 0)), constant_values=True), history != steps


def _rank(key):
    """Numbers equal keys equally, in their order: how many keys are smaller."""
    return jnp.searchsorted(jax.lax.sort(key), key, method="scan_unrolled").astype(jnp.uint64)


def _back(x, count):
    """Reads x [R, T, ...] `count` steps earlier, 0 before the first."""
    return jnp.pad(x, ((0, 0), (count, 0)) + ((0, 0),) * (x.ndim - 2))[:, : x.shape[1]]


def _run_moments(x, start):
    """Count, mean and sum of centred squares of the run each entry is in: x, start [levels, N].

    A segmented scan that merges moments pairwise (Chan, Golub and LeVeque 1979): as accurate as two
    passes, and exact where all values of a run are equal.
    """

    def merge(left, right):
        (_, n, mean, square), (fresh, count, centre, spread) = left, right
        share = count / (n + count)
        gap = centre - mean
        both = n + count, mean + gap * share, square + spread + jnp.square(gap) * n * share
        return left[0] | fresh, *(jnp.where(fresh, new, old) for new, old in zip(right[1:], both))

    _, *running = jax.lax.associative_scan(merge, (start, jnp.ones_like(x), x, jnp.zeros_like(x)), axis=1)
    places = jnp.arange(x.shape[1])
    ends = jnp.pad(start[:, 1:], ((0, 0), (0, 1)), constant_values=True)
    last = jax.lax.cummin(jnp.where(ends, places, places.size), axis=1, reverse=True)
    return [jnp.take_along_axis(moment, last, axis=1) for moment in running]


def _unsort(x, order, shape):
    """Puts sorted values back in their places: x [N] -> [R, T]."""
    return jnp.zeros_like(x).at[order].set(x, unique_indices=True).reshape(shape)


def _magnitude(x, mask):
    """The larger of 1 and the largest |x|: what a tolerance is relative to."""
    return jnp.maximum(1.0, jnp.max(jnp.where(mask, jnp.abs(x), 0.0)))


def _episode(score, valid, *, cross_steps, std, eps):
    """Compares whole trajectories: (score - mean [R], A_E [R], whether the group has two members)."""
    chex.assert_equal_shape([score, valid[:, 0]])
    length = jnp.sum(valid, axis=1)
    some = length > 0
    weight = length if cross_steps else some.astype(jnp.int32)
    offset = jnp.where(some, score - score[jnp.argmax(some)], 0.0)  # equal scores give exact zeros
    centred = jnp.where(some, offset - masked.mean(offset, some, weight=weight), 0.0)
    spread = masked.std(offset, some, weight=weight, ddof=1)
    return centred, centred / (spread + eps) if std else centred, jnp.sum(weight) >= 2
