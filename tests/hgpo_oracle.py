"""GiGPO and HGPO in plain Python, float64: dictionaries keyed by (uid, the last states).

A batch is many tasks, `uid` numbering them; a trajectory is (uid, states, returns), both lists of
one length. Every function returns one list of advantages a trajectory.
"""

import math


def step_returns(reward, gamma):
    """Each step's return by its definition, a sum over the steps from there on."""
    steps = range(len(reward))
    return [sum(gamma ** (u - t) * reward[u] for u in steps if u >= t) for t in steps]


def _groups(batch, length):
    """(uid, the last `length` states) -> the (trajectory, step) pairs that have them."""
    groups = {}
    for i, (uid, states, _) in enumerate(batch):
        for t in range(length - 1, len(states)):
            groups.setdefault((uid, tuple(states[t - length + 1 : t + 1])), []).append((i, t))
    return groups


def _mean(values):
    return math.fsum(values) / len(values)


def _std(values, ddof):
    centre = _mean(values)
    return math.sqrt(math.fsum((v - centre) ** 2 for v in values) / (len(values) - ddof))


def episode_terms(batch, episode, *, std, cross_steps=True, eps=1e-6):
    """GiGPO's A_E: one (score - mean, A_E) a trajectory, None in a group of one."""
    pools = {}
    for (uid, states, _), score in zip(batch, episode):
        pools.setdefault(uid, []).extend([score] * (len(states) if cross_steps else min(1, len(states))))
    terms = []
    for (uid, _, _), score in zip(batch, episode):
        pool = pools[uid]
        offset = score - _mean(pool) if len(pool) >= 2 else 0.0
        scale = _std(pool, 1) + eps if std and len(pool) >= 2 else 1.0
        terms.append((offset, offset / scale) if len(pool) >= 2 else None)
    return terms


def gigpo(batch, *, std=False, episode=None, step_weight=1.0, cross_steps=True, eps=1e-6):
    result = [[0.0] * len(states) for _, states, _ in batch]
    for members in _groups(batch, 1).values():
        values = [batch[i][2][t] for i, t in members]
        if len(values) >= 2:
            scale = _std(values, 1) + eps if std else 1.0
            for (i, t), value in zip(members, values):
                result[i][t] = step_weight * (value - _mean(values)) / scale
    if episode is not None:
        for row, term in zip(result, episode_terms(batch, episode, std=std, cross_steps=cross_steps, eps=eps)):
            row[:] = [a + (term[1] if term else 0.0) for a in row]
    return result


def hgpo(
    batch, *, levels=2, alpha=1.0, weight_shift=1, std=True, zero="drop", tolerance=1e-6, episode=None,
    base="item", cross_steps=True, eps=1e-6,
):  # fmt: skip
    if episode is not None and base == "sum":
        options = dict(levels=levels, alpha=alpha, weight_shift=weight_shift, std=std, zero=zero, tolerance=tolerance, eps=eps)
        terms = episode_terms(batch, episode, std=std, cross_steps=cross_steps, eps=eps)
        return [[a + (term[1] if term else 0.0) for a in row] for row, term in zip(hgpo(batch, **options), terms)]
    items = [[[] for _ in states] for _, states, _ in batch]  # (weight, centred, divisor, magnitude)
    largest = {}
    for uid, _, returns in batch:
        largest[uid] = max([largest.get(uid, 1.0)] + [abs(r) for r in returns])
    for level in range(levels + 1):
        for (uid, _), members in _groups(batch, level + 1).items():
            values = [batch[i][2][t] for i, t in members]
            if len(values) < 2:
                continue
            centre, scale = _mean(values), _std(values, 0) + eps if std else 1.0
            for (i, t), value in zip(members, values):
                items[i][t].append(((level + weight_shift) ** alpha, value - centre, scale, largest[uid]))
    if episode is not None:
        scores = {}
        for (uid, states, _), score in zip(batch, episode):
            if states:
                scores.setdefault(uid, []).append(abs(score))
        terms = episode_terms(batch, episode, std=std, cross_steps=cross_steps, eps=eps)
        for (uid, _, _), row, term in zip(batch, items, terms):
            for step in row:
                if term:
                    scale = term[0] / term[1] if term[1] else 1.0
                    step.append((1.0, term[0], scale, max([1.0] + scores[uid])))
    return [[_average(step, zero, tolerance) for step in row] for row in items]


def _average(items, zero, tolerance):
    """Weighted mean of a step's levels, those that are zero left out or counted as zeros."""
    clean = [(w, 0.0 if abs(c) <= tolerance * size else c / scale) for w, c, scale, size in items]
    if zero == "drop":
        clean = [(w, a) for w, a in clean if a != 0]
    return sum(w * a for w, a in clean) / sum(w for w, _ in clean) if clean else 0.0
