"""Which rollouts go on once they reach the detection length: calibrated scores, survival rules, weights.

A quality head scores every rollout when it has `detection` tokens. `Calibration` turns the score into a
posterior q, the chance that the answer will be right; a rule turns q into survivors, group by group:

    rule(key, q [B, K], due [B, K], *, kappa, rho, least, capacity, ...) -> (keep [B, K] bool, p [B, K] float32)

Lines that are not due (shorter, or stopped before) are kept, with p = 1; what q says of them is never read.
Arguments that all rules have:

  key: typed random key, or one for each group [B]. Line k of group b draws from (key, b, k), or from (key[b], k),
    whatever the shapes are.
  q: [B, K] float32, posterior of each line; B groups of K slots.
  due: [B, K] bool, lines that have just reached the detection length.
  kappa: [] float32, share of the due lines to keep. 1 keeps all of them, exactly (p_max 1 or above where there is one).
  rho: [] float32, share of right answers wanted among survivors; a reward's variance rho (1 - rho) is largest at 1/2.
  least: static, so many of a group's due lines survive at least, or all if there are fewer. Lines that are not due
    do not count: a slot may be empty, and a group must not lose its contrast to that.
  capacity: at most so many of a group's due lines survive, a number or [B] int32; None without a limit. Where it
    is below `least`, capacity wins.
"""

import chex
import jax
import jax.numpy as jnp

from treerl import masked

HALVINGS = 40  # of an interval of a few units: below float32's spacing

# --- calibration ----------------------------------------------------------------------------------


@chex.dataclass(frozen=True)
class Calibration:
    """Decayed counts of finished rollouts by bin of their score."""

    right: jax.Array  # [bins] float32, whose answer was right
    wrong: jax.Array  # [bins] float32


def start_calibration(bins: int = 128) -> Calibration:
    """A table without counts."""
    return Calibration(right=jnp.zeros(bins, jnp.float32), wrong=jnp.zeros(bins, jnp.float32))


def bin_of(score: jax.Array, bins: int) -> jax.Array:
    """Bins a score: min(bins - 1, floor(bins s')) with s' = sigmoid(score), so s' = 1 is in the last bin."""
    return jnp.minimum(bins - 1, jnp.floor(bins * jax.nn.sigmoid(score)).astype(jnp.int32))


def observe(table: Calibration, score: jax.Array, label: jax.Array, weight: jax.Array, *, decay) -> Calibration:
    """Counts rollouts whose answers are known: c = decay c + sum of weights, by bin and label.

    ARRoL, arXiv 2603.24840, the buffer of (score, label). The paper does not say how old counts leave it; the
    head moves, so they must, and here they decay by each call, whatever number of rollouts it brings.

    Args:
      score: [...] float32, logits of the head. label: [...] bool, the answer was right.
      weight: [...] float32 or bool, 0 for what must not count (no answer, pruned); its score may be anything.
      decay: [] float32, 1 to forget nothing.
    """
    chex.assert_equal_shape([score, label, weight])
    bins = table.right.shape[0]
    place = jnp.where(weight > 0, bin_of(score, bins), 0)
    count = lambda old, which: (decay * old).at[place].add(jnp.where(which, weight, 0).astype(jnp.float32))
    return Calibration(right=count(table.right, label), wrong=count(table.wrong, ~label))


def posterior(table: Calibration, score: jax.Array, *, smoothing=1.0) -> jax.Array:
    """Reads the chance of a right answer off the table: q = pi P(b | 1) / (pi P(b | 1) + (1 - pi) P(b | 0)).

    ARRoL, arXiv 2603.24840, with P(b | y) = (c^y_b + alpha) / (sum over b' of c^y_b' + alpha bins), pi the share
    of right answers in the same counts, alpha the smoothing. With alpha = 0 this is the bin's frequency,
    c^1_b / (c^1_b + c^0_b): the two likelihoods matter through smoothing only. Rollouts thinned by their score
    (and nothing else) leave that frequency unbiased, as both labels of a bin are thinned alike; pi and P(b | y)
    alone are biased. So a table fed by survivors is right as long as every bin keeps some (p_min > 0).

    Not in the paper: a table without counts gives 0.5, an empty bin pi if alpha = 0 (near pi if not). While only
    one label was seen, pi and q are 0 or 1 everywhere.

    Args:
      score: [...] float32, logits of the head.

    Returns:
      [...] float32, 0 .. 1.
    """
    right, wrong = jnp.sum(table.right), jnp.sum(table.wrong)
    share = lambda part, whole: jnp.where(whole > 0, part / jnp.where(whole > 0, whole, 1), 0.0)
    prior = jnp.where(right + wrong > 0, share(right, right + wrong), 0.5)
    norm = smoothing * table.right.shape[0]
    one = prior * share(table.right + smoothing, right + norm)
    none = (1 - prior) * share(table.wrong + smoothing, wrong + norm)
    return jnp.where(one + none > 0, share(one, one + none), prior)[bin_of(score, table.right.shape[0])]


# --- what rules share -----------------------------------------------------------------------------


Capacity = int | jax.Array | None


def _check(q: jax.Array, due: jax.Array):
    chex.assert_rank([q, due], 2)
    chex.assert_equal_shape([q, due])
    chex.assert_type(due, bool)


def _uniform(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """[B, K] float32 in [0, 1), each from its own place: more groups or slots change no other draw."""
    keys = jax.vmap(lambda b: jax.random.fold_in(key, b))(jnp.arange(shape[0])) if key.ndim == 0 else key
    draw = lambda key, k: jax.random.uniform(jax.random.fold_in(key, k))
    return jax.vmap(lambda key: jax.vmap(lambda k: draw(key, k))(jnp.arange(shape[1])))(keys)


def _rank(*keys: jax.Array) -> jax.Array:
    """[B, K] int32, place of each line in its group by ascending keys, the first one first; then by index."""
    return jnp.argsort(jnp.lexsort(keys[::-1], axis=-1), axis=-1)


def _room(due: jax.Array, capacity: int | jax.Array) -> jax.Array:
    """[B, 1] int32, due lines that may survive."""
    return jnp.broadcast_to(jnp.maximum(capacity, 0), due.shape[:1])[:, None]


def _draw(key, p: jax.Array, due: jax.Array, least: int, capacity: Capacity) -> tuple[jax.Array, jax.Array]:
    """Keeps lines where uniform < p, then mends groups with too few or too many.

    Too few: the lines of the highest p that were not drawn join, of equal p the one with the lowest uniform. Too
    many: of those that would survive, the ones with the lowest uniform / p go. Given that a line was
    drawn, uniform / p is uniform on [0, 1) whatever p was, so this is a fair lottery among the drawn; lines that
    joined (1 or above) go last.
    """
    uniform = _uniform(key, p.shape)
    drawn = due & (uniform < p)
    keep = drawn | (due & (_rank(~due, ~drawn, -p, uniform) < least))
    if capacity is not None:
        ratio = uniform / jnp.maximum(p, jnp.finfo(jnp.float32).tiny)
        keep &= _rank(~keep, -ratio) < _room(due, capacity)
    return keep | ~due, jnp.where(due, p, 1.0)


def _count(due: jax.Array, kappa, least: int, capacity: Capacity) -> tuple[jax.Array, jax.Array]:
    """(number of due lines to keep [B, 1] int32, that number over the due lines [B, K], 1 where not due)."""
    there = jnp.sum(due, axis=-1, keepdims=True)
    count = jnp.minimum(jnp.maximum(jnp.round(kappa * there).astype(jnp.int32), least), there)
    if capacity is not None:
        count = jnp.minimum(count, _room(due, capacity))
    return count, jnp.where(due, count / jnp.maximum(there, 1), 1.0).astype(jnp.float32)


def _level(tilt: jax.Array, due: jax.Array, kappa, p_min, p_max) -> jax.Array:
    """p = clip(kappa + delta + tilt, p_min, p_max) with delta such that p has mean kappa where due; any shape.

    Bisection; delta is the upper end of its last interval, so the mean is kappa or a rounding above it: kappa = 1
    makes every p exactly 1. Where kappa is outside [p_min, p_max], all p are the nearer bound. The sum is of
    p - kappa, near 0 at the end, so that large batches lose no digits; the mean is within 1e-6 of kappa for tilts
    up to 10 or so (above, p of a single line moves by more than that with the last bit of q).
    """
    p = lambda delta: jnp.clip(kappa + delta + tilt, p_min, jnp.minimum(p_max, 1.0)).astype(jnp.float32)
    far = 1.0 + jnp.max(jnp.where(due, jnp.abs(tilt), 0.0))  # all p at a bound

    def halve(_, ends):
        bottom, top = ends
        middle = (bottom + top) / 2
        enough = masked.total(p(middle) - kappa, due) >= 0
        return jnp.where(enough, bottom, middle), jnp.where(enough, middle, top)

    return p(jax.lax.fori_loop(0, HALVINGS, halve, (-far, far))[1])


# --- rules ----------------------------------------------------------------------------------------


def arrol(key, q, due, *, kappa, rho, lam=0.5, p_min=0.1, p_max=0.9, least: int = 2, capacity: Capacity = None):
    """Keeps each line by a draw of its own: p = clip(kappa + delta + lam (rho - q), p_min, p_max).

    ARRoL, arXiv 2603.24840, the survival probability as our notes have it. One delta for all groups, by
    bisection, so that the mean of p over due lines is kappa. This prefers LOW q whatever the group: on prompts
    seldom solved it stops the few rollouts that would be right, and leaves less contrast than a random choice.
    Where nothing is clipped, p = kappa + lam (mean q - q) and rho cancels. Use `arrol_group` or `balance`.

    Differs from the paper: delta is of the batch's due lines, not of a buffer; `least` and `capacity`.

    Args:
      lam: [] float32, how steeply p falls with q. p_min, p_max: [] float32, bounds of p. The rest: see the module.

    Returns:
      (keep [B, K] bool, p [B, K] float32); p is a line's chance before `least` and `capacity`.
    """
    _check(q, due)
    return _draw(key, _level(lam * (rho - q), due, kappa, p_min, p_max), due, least, capacity)


def arrol_group(key, q, due, *, kappa, rho, lam=2.0, p_min=0.1, p_max=0.9, least: int = 2, capacity: Capacity = None):
    """Keeps each line by a draw whose slope follows its group: p = clip(kappa + delta - t (q - m), p_min, p_max).

    Not in the paper: ARRoL (arXiv 2603.24840) with the sign its own theorem 4.2 asks for. m is the mean of q over
    the group's due lines, v its variance, and

        t = clip(kappa (m - rho) / v, -lam, lam).

    Unclipped, survivors have the expected mean m - t v / kappa, so t moves a group to rho and no further, and lam
    bounds the slope. Groups far from rho get t = lam sign(m - rho), the plain sign rule; a group at rho
    is thinned evenly, where the sign alone would push it off by the noise of m. Simulated on `bench.pruning`'s mixes
    (concentrations 2, 4 and 8, lam from .5 to 8), t left the contrast of the sign rule or up to 4% more.

    Each group has its own delta, so each keeps kappa of its lines in expectation, and no line's fate
    depends on other groups. The sum of q - m is 0: delta only undoes what clipping adds.

    Args:
      lam: [] float32, the steepest slope. p_min, p_max: [] float32, bounds of p. The rest: see the module.

    Returns:
      (keep [B, K] bool, p [B, K] float32); p is a line's chance before `least` and `capacity`.
    """
    _check(q, due)
    mean, spread = (f(q, due, axis=-1)[:, None] for f in (masked.mean, masked.std))
    variance = jnp.square(spread)
    slope = jnp.where(variance > 0, kappa * (mean - rho) / jnp.where(variance > 0, variance, 1), 0.0)
    tilt = -jnp.clip(slope, -lam, lam) * (q - mean)
    p = jax.vmap(lambda tilt, due: _level(tilt, due, kappa, p_min, p_max))(tilt, due)
    return _draw(key, p, due, least, capacity)


def balance(key, q, due, *, kappa, rho, least: int = 2, capacity: Capacity = None):
    """Removes the line whose absence brings the group's mean nearest to rho, again and again.

    ARRoL, arXiv 2603.24840, theorem 4.2: j = argmin over j of |mean of q without j - rho|, of equal ones the lowest
    index, until round(kappa n) of the n due lines are left (halves to even), at least `least`. The theorem is
    about one removal; of several, each is the best of its step and all together need not be the best subset.

    Differs from the paper, which draws: this is deterministic, and exact in number.

    Args: see the module; key is not used.

    Returns:
      (keep [B, K] bool, p [B, K] float32); p is the share kept of the group's due lines, NOT a chance: what is
      kept follows from q, so `inverse_weights` corrects nothing here.
    """
    del key
    _check(q, due)
    count, p = _count(due, kappa, least, capacity)
    index = jnp.arange(q.shape[1])

    def one(q, due, count):
        def remove(_, keep):
            left = jnp.sum(keep)
            off = masked.total(q, keep) - q - rho * (left - 1)  # the mean's distance times left - 1, the same for all
            gap = jnp.where(keep, jnp.abs(off), jnp.inf)
            return keep & ((index != jnp.argmin(gap)) | (left <= count))

        return jax.lax.fori_loop(0, q.shape[0], remove, due)

    return jax.vmap(one)(q, due, count[:, 0]) | ~due, p


def random(key, q, due, *, kappa, rho, least: int = 2, capacity: Capacity = None):
    """Keeps as many lines as `balance` does, uniformly chosen: the control.

    Args: see the module; q and rho are not used.

    Returns:
      (keep [B, K] bool, p [B, K] float32); p is exactly a line's chance.
    """
    del rho
    _check(q, due)
    count, p = _count(due, kappa, least, capacity)
    return ~due | (_rank(~due, _uniform(key, q.shape)) < count), p


RULES = dict(arrol=arrol, arrol_group=arrol_group, balance=balance, random=random)
ACROSS = {"arrol"}  # what these rules do to a group depends on the others of the batch


def inverse_weights(p: jax.Array, keep: jax.Array) -> jax.Array:
    """Weighs survivors by 1 / p: w = (1 / p) / mean of 1 / p over the group's survivors, 0 for the others.

    Horvitz and Thompson, JASA 47 (1952), normalised (Hajek), so that sums over survivors estimate the whole
    group's up to a bias that falls with its size. ARRoL has no such weights: its survivors count alike.

    p must be the chance of surviving. That of `arrol` and `arrol_group` is, up to groups that `least` or `capacity`
    changed; that of `random` is exactly. That of `balance` is not an inclusion probability (nothing was
    drawn): its due lines all weigh the same.

    Args:
      p: [B, K] float32, above 0 where kept. keep: [B, K] bool.

    Returns:
      [B, K] float32, mean 1 over the survivors of each group; all 0 in a group without any.
    """
    chex.assert_equal_shape([p, keep])
    weight = jnp.where(keep, 1 / jnp.where(keep, p, 1.0), 0.0)
    norm = masked.mean(weight, keep, axis=-1)[..., None]
    return weight / jnp.where(norm > 0, norm, 1.0)
