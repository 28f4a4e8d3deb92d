"""Compiled estimators against straightforward Python with dictionaries, the form of the published trainers.

Every estimator runs on the same random trees (lines fork from random cells and end at random rows; a
tenth of the leaves is missing) and is compared with a plain implementation of its formula, in the
same run and on the same numbers: they must agree, else the suite raises. The plain side walks parents
cell by cell and keeps nodes in dictionaries; it is timed on one in `part` trees. HGPO and GiGPO run
on groups of trajectories through random states.
"""

import collections
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from treerl import advantages as A, tree as T
from treerl.bench import measure

TOLERANCE = 1e-3  # absolute, of credit in float32 at these sizes


def defaults() -> dict:
    """Sizes, the same on every machine."""
    return dict(trees=1024, slots=64, rows=1024, part=64, chunk=16, groups=64, trajectories=16, steps=64, states=200, repeats=5)


def random_trees(count: int, rows: int, slots: int, seed: int = 0) -> T.Tree:
    """Batched random trees, NumPy: line k forks from a random cell of a random earlier line; four start at the prompt."""
    rng = np.random.default_rng(seed)
    row, every = np.arange(rows), np.arange(count)
    path = np.zeros((count, slots, rows), np.int32)
    birth, end = np.zeros((2, count, slots), np.int64)
    for k in range(slots):
        mother = rng.integers(0, max(k, 1), count)
        room = end[every, mother] - birth[every, mother]  # a child starts above its mother's end, or beside her
        birth[:, k] = 0 if k < 4 else birth[every, mother] + rng.integers(np.minimum(room, 1), room + 1)
        end[:, k] = rng.integers(birth[:, k], rows)
        own = row >= birth[:, k, None]
        path[:, k] = np.where(own, k, path[every, mother])
    inside = row <= end[..., None]
    path = np.where(inside, path, T.NONE)
    used = (inside & (row >= birth[..., None])).swapaxes(1, 2)
    above = np.concatenate([np.full((count, slots, 1), T.NONE), path[..., :-1]], axis=2)
    parent = np.where(used, above.swapaxes(1, 2), T.NONE)
    there = rng.random((count, slots, 1)) < 0.9
    leaf = np.where(there, np.stack([end, np.broadcast_to(np.arange(slots), end.shape)], axis=-1), T.NONE)
    value = lambda: -rng.random((count, rows, slots), np.float32)
    logp = value()
    return T.Tree(
        token=np.zeros(used.shape, np.int32), parent=parent.astype(np.int32), used=used, source=np.zeros(used.shape, np.int8),
        end=np.zeros(used.shape, np.int8), entropy=-value(), logp_behavior=logp, logp_policy=logp,
        leaf=leaf.astype(np.int32), leaf_path=np.where(there, path, T.NONE).astype(np.int32),
    )  # fmt: skip


# --- the plain side: one tree, Python and dictionaries ---------------------------------------------


class Plain:
    """One tree as dictionaries: leaves below each cell, nodes (chains between forks) and their parents."""

    def __init__(self, tree: T.Tree):
        self.paths, self.below, children = {}, collections.defaultdict(list), collections.defaultdict(set)
        for index, (row, column) in enumerate(tree.leaf):
            cells = []
            while row >= 0:
                cells.append((int(row), int(column)))
                column = tree.parent[row, column]
                row -= 1
            if cells:
                self.paths[index] = cells[::-1]
        for leaf, cells in self.paths.items():
            above = None
            self.below[None].append(leaf)
            for cell in cells:
                self.below[cell].append(leaf)
                children[above].add(cell)
                above = cell
        self.node, self.parent, self.depth = {None: None}, {None: None}, {None: 0}  # cell -> head; head -> parent head
        for cells in self.paths.values():
            head, above = None, None
            for cell in cells:
                if len(children[above]) >= 2:
                    self.parent.setdefault(cell, head)
                    self.depth.setdefault(cell, self.depth[head] + 1)
                    head = cell
                self.node[cell], above = head, cell

    def cells(self, credit: dict, shape) -> np.ndarray:
        result = np.zeros(shape)
        for cell, head in self.node.items():
            if cell is not None:
                result[cell] = credit.get(head, 0.0)
        return result


def plain_depthwise(tree, reward):
    plain = Plain(tree)
    value = {head: np.mean([reward[x] for x in plain.below[head]]) for head in plain.parent}
    levels, credit = collections.defaultdict(list), {}
    for head, depth in plain.depth.items():
        levels[depth].append(value[head])
    ends = {leaf: plain.depth[plain.node[cells[-1]]] for leaf, cells in plain.paths.items()}
    pools = {d: own + [reward[leaf] for leaf, end in ends.items() if end < d] for d, own in levels.items()}
    moments = {d: (np.mean(x), np.std(x, ddof=1)) for d, x in pools.items() if len(x) > 1}
    for head, depth in plain.depth.items():
        mean, std = moments.get(depth, (0.0, 0.0))
        if std >= 1e-6:
            credit[head] = np.clip((value[head] - mean) / (std + 1e-6), -5, 5)
    return plain.cells(credit, tree.token.shape)


def plain_eptree(tree, reward):
    plain = Plain(tree)
    own = plain_flat(lambda r, _: (np.asarray(r) - np.mean(r)) * len(r) / max(len(r) - 1, 1), tree, reward)
    value = {head: np.mean([own[x] for x in plain.below[head]]) for head in plain.parent}
    local = {head: value[head] - value[above] if head else 0.0 for head, above in plain.parent.items()}
    credit = {h: (value[h] - value[None] + local[h]) / np.sqrt(len(plain.below[h])) for h in value}
    return plain.cells(credit, tree.token.shape)


def plain_spo(tree, reward):
    plain = Plain(tree)
    children = collections.defaultdict(list)
    for head, above in plain.parent.items():
        if head is not None:
            children[above].append(head)
    value = {}
    for head in sorted(plain.parent, key=plain.depth.get, reverse=True):
        below = children[head]
        value[head] = np.mean([value[x] for x in below]) if below else reward[plain.below[head][0]]
    credit = {head: value[head] - value[above] for head, above in plain.parent.items() if head is not None}
    return plain.cells(credit, tree.token.shape)


def plain_treepo(tree, reward):
    plain, result = Plain(tree), np.zeros(len(reward))
    mean = {head: np.mean([reward[x] for x in plain.below[head]]) for head in plain.parent}
    for leaf, cells in plain.paths.items():
        heads = {None} | {plain.node[c] for c in cells if len(plain.below[plain.node[c]]) >= 2}
        result[leaf] = np.mean([reward[leaf] - mean[head] for head in heads])
    return result


def plain_tree_grpo(tree, reward):
    groups, result = collections.defaultdict(list), np.zeros(len(reward))
    for leaf, path in enumerate(tree.leaf_path):
        if tree.leaf[leaf, 0] >= 0:
            groups["all"].append(leaf)
            groups[path[0]].append(leaf)
    for leaves in groups.values():
        r = [reward[x] for x in leaves]
        if len(r) > 1 and np.std(r, ddof=1) >= 1e-6:
            for leaf in leaves:
                result[leaf] += (reward[leaf] - np.mean(r)) / (np.std(r, ddof=1) + 1e-6)
    return result


def plain_flat(rule, tree, reward):
    """A rule (rewards, lengths) -> credit on the leaves of one group."""
    result, group = np.zeros(len(reward)), [x for x, (row, _) in enumerate(tree.leaf) if row >= 0]
    result[group] = rule([reward[x] for x in group], [tree.leaf[x, 0] + 1 for x in group])
    return result


def median(r):
    middle = np.median(r) if len(r) % 2 else np.sort(r)[(len(r) - 1) // 2]
    away = np.abs(np.asarray(r) - middle)
    spread = np.median(away) if len(r) % 2 else np.sort(away)[(len(r) - 1) // 2]
    return (np.asarray(r) - middle) / (max(spread, 0.25) + 1e-3)


FLAT = {
    "grpo": lambda r, n: (r - np.mean(r)) / (np.std(r, ddof=1) + 1e-6),
    "dr_grpo": lambda r, n: r - np.mean(r),
    "rloo": lambda r, n: [r[i] - np.mean(r[:i] + r[i + 1 :]) for i in range(len(r))],
    "opo": lambda r, n: r - np.average(r, weights=n),
    "minimum_variance": lambda r, n: r - np.mean(r),  # of equal norms and weights
    "mc_grpo": lambda r, n: median(r),
    "reinforce_pp": lambda r, n: r,
}
PLAIN = {name: functools.partial(plain_flat, rule) for name, rule in FLAT.items()} | dict(
    branch_depthwise=plain_depthwise, eptree=plain_eptree, spo_tree=plain_spo, treepo=plain_treepo,
    tree_grpo=plain_tree_grpo,
)  # fmt: skip


def plain_hgpo(returns, state, levels=2):
    """One group [R, T] by dictionaries of histories, as the released trainers keep them; paper's weights, std."""
    groups, items = collections.defaultdict(list), collections.defaultdict(list)
    for i, line in enumerate(state):
        for t in range(len(line)):
            for k in range(min(levels, t) + 1):
                groups[k, tuple(map(tuple, line[t - k : t + 1]))].append((i, t))
    for (k, _), members in groups.items():
        if len(members) >= 2:
            r = np.array([returns[m] for m in members])
            for m, a in zip(members, (r - np.mean(r)) / (np.std(r) + 1e-6)):
                items[m].append((k + 1, a))
    result = np.zeros(returns.shape)
    for m, pairs in items.items():
        pairs = [(w, a) for w, a in pairs if abs(a) > 1e-6]
        if pairs:
            result[m] = sum(w * a for w, a in pairs) / sum(w for w, _ in pairs)
    return result


def plain_gigpo(returns, state, episode):
    """One group [R, T] as the released trainers do: name the rows' groups, collect scores by name, walk the rows."""
    name, scores, rows = {}, collections.defaultdict(list), []
    for i, line in enumerate(state):
        for t, here in enumerate(line):
            name[i, t] = tuple(here)
    for m, group in name.items():
        scores[group].append(returns[m])
        rows.append(episode[m[0]])  # a row a step, so a longer trajectory weighs more
    mean = {group: np.mean(values) if len(values) > 1 else values[0] for group, values in scores.items()}
    centre, result = np.mean(rows), np.zeros(returns.shape)
    for m, group in name.items():
        result[m] = (episode[m[0]] - centre) + 1.0 * (returns[m] - mean[group])
    return result


# --- the suite ------------------------------------------------------------------------------------


def credit_of(name: str):
    """An estimator on batched trees, credit alone."""
    estimator = A.ESTIMATORS[name]

    def one(tree, reward):
        result = estimator(tree, reward, *[jnp.ones(reward.shape)] * len(A.extras(estimator)))
        return result[0] if isinstance(result, tuple) else result

    return jax.vmap(one)


def chunked(function, size: int):
    """A function of batches that runs `size` trees at a time: bounds memory, and suits a CPU's caches."""

    def run(*batch):
        split = lambda x: x.reshape(-1, size, *x.shape[1:])
        result = jax.lax.map(lambda part: function(*part), jax.tree.map(split, batch))
        return result.reshape(-1, *result.shape[2:])

    return run


def clock(function):
    """(seconds, result) of one call."""
    begin = time.perf_counter()
    result = function()
    return time.perf_counter() - begin, result


def check_agreement(name: str, fast, slow) -> float:
    """Largest difference; raises ValueError above TOLERANCE."""
    apart = float(np.max(np.abs(np.asarray(fast) - slow)))
    if not apart <= TOLERANCE:
        raise ValueError(f"estimators suite: {name} is {apart:.3g} away from its plain implementation, above {TOLERANCE:g}.")
    return apart


def rows(**sizes):
    """Yields rows of the suite; `sizes` replace `defaults()`."""
    sizes = {**defaults(), **sizes}
    row = functools.partial(measure.row, "estimators", shapes=sizes)
    count, part, rng = sizes["trees"], max(1, sizes["trees"] // sizes["part"]), np.random.default_rng(1)
    trees = random_trees(count, sizes["rows"], sizes["slots"])
    reward = np.where(rng.random((count, sizes["slots"])) < 0.5, 1, 0).astype(np.float32)
    on_device, chunk = jax.device_put((trees, reward)), min(count, sizes["chunk"])
    for name in sorted(PLAIN):
        program = measure.compiled(chunked(credit_of(name), chunk), *on_device)
        fast = np.asarray(program.run(*on_device)[:part])
        spent, slow = clock(lambda: [PLAIN[name](jax.tree.map(lambda x: x[i], trees), reward[i]) for i in range(part)])
        apart = check_agreement(name, fast, np.stack(slow))
        seconds = measure.alternate({name: functools.partial(program.run, *on_device)}, sizes["repeats"])[name].median
        plain = spent * count / part
        yield row(f"plain_{name}", plain, "s for all trees")
        yield row(name, seconds, "s for all trees", versus=f"plain_{name}", ratio=seconds / plain)
        yield row(f"{name}.memory", program.run.memory_analysis().temp_size_in_bytes / chunk, "bytes a tree, temporaries")
        yield row(f"{name}.difference", apart, "credit, largest")
    del on_device

    shape = sizes["groups"], sizes["trajectories"], sizes["steps"]
    states = rng.integers(0, 2**32, (sizes["states"], 2), dtype=np.uint64).astype(np.uint32)
    state = states[rng.integers(0, sizes["states"], shape)]
    returns = rng.integers(0, 11, shape).astype(np.float32)
    valid = np.ones(shape, bool)
    episode = returns[..., 0].copy()
    given = jax.device_put((returns, state, valid, episode))
    whole_gigpo = lambda returns, state, valid, episode: A.gigpo(returns, state, valid, episode=episode)
    steps_hgpo = lambda returns, state, valid, episode: A.hgpo(returns, state, valid)
    plains = dict(hgpo=lambda returns, state, _: plain_hgpo(returns, state), gigpo=plain_gigpo)
    for name, function in (("hgpo", steps_hgpo), ("gigpo", whole_gigpo)):
        program = measure.compiled(jax.vmap(function), *given)
        fast = np.asarray(program.run(*given))
        times = [clock(lambda: [plains[name](*one) for one in zip(returns, state, episode)]) for _ in range(3)]
        apart = check_agreement(name, fast, np.stack(times[0][1]))
        spent = min(seconds for seconds, _ in times)
        seconds = measure.alternate({name: functools.partial(program.run, *given)}, 4 * sizes["repeats"])[name].median
        yield row(f"plain_{name}", spent, "s for all groups")
        yield row(name, seconds, "s for all groups", versus=f"plain_{name}", ratio=seconds / spent)
        yield row(f"{name}.difference", apart, "credit, largest")
