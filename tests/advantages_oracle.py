"""Slow, plain-Python truths of the estimators, by recursion over nodes in float64."""

import math
import statistics

import numpy as np
import oracles


class Node:
    """A node: the leaves on it, its children, and its cells on the path of each leaf."""

    def __init__(self, leaves, depth, parent=None, virtual=False):
        self.leaves, self.depth, self.parent, self.virtual = leaves, depth, parent, virtual
        self.children, self.cells = [], {}  # cells: leaf -> its cells on the node

    def walk(self):
        yield self
        for child in self.children:
            yield from child.walk()


def grow(tree, segment=0) -> Node:
    """The prompt's node with all others below it."""
    paths = oracles.leaf_cells(tree)

    def forks(node, start):
        """Follows cells from row `start` on until the leaves part."""
        row = start
        while len({paths[leaf][row] if row < len(paths[leaf]) else None for leaf in node.leaves}) == 1:
            if row >= len(paths[node.leaves[0]]):
                break
            for leaf in node.leaves:
                node.cells.setdefault(leaf, []).append(paths[leaf][row])
            row += 1
        if len(node.leaves) > 1:
            split(node, lambda leaf: paths[leaf][row], lambda child: forks(child, row))

    def segments(node, start):
        end = lambda leaf: min(start + segment, len(paths[leaf]))
        going = [leaf for leaf in node.leaves if len(paths[leaf]) > start]
        if not going:
            return

        def enter(child):
            for leaf in child.leaves:
                child.cells[leaf] = paths[leaf][start : end(leaf)]
            segments(child, start + segment)

        split(node, lambda leaf: paths[leaf][end(leaf) - 1], enter)

    def split(node, key, enter):
        groups = {}
        for leaf in node.leaves:
            groups.setdefault(key(leaf), []).append(leaf)
        for leaves in groups.values():
            child = Node(leaves, node.depth + 1, node)
            node.children.append(child)
            enter(child)

    root = Node(list(paths), 0)
    if paths:
        (segments if segment else forks)(root, 0)
    return root


def to_cells(tree, root, credit) -> np.ndarray:
    """Credit of nodes {id(node): A} as cells [S, K]: the mean over the leaves below of what their node has."""
    seen = {}
    for node in root.walk():
        for cells in node.cells.values():
            for cell in cells:
                seen.setdefault(cell, []).append(credit.get(id(node), 0.0))
    result = np.zeros(np.asarray(tree.token).shape)
    for cell, values in seen.items():
        result[cell] = np.mean(values)
    return result


def logps(tree):
    """Leaf -> log-probs along its path."""
    logp = np.asarray(tree.logp_policy, np.float64)
    return {leaf: [logp[cell] for cell in cells] for leaf, cells in oracles.leaf_cells(tree).items()}


def softmax_mean(values, scores):
    weights = [math.exp(s - max(scores)) for s in scores]
    return sum(w * v for w, v in zip(weights, values)) / sum(weights)


def prefix_rows(node) -> int:
    """Rows from the prompt to the end of a node."""
    leaf = node.leaves[0]
    own = len(node.cells.get(leaf, []))
    return own + (prefix_rows(node.parent) if node.parent else 0)


def values(tree, root, reward, fusion="leaf", beta=0.0, per_token=False) -> dict:
    """id(node) -> value."""
    logp, result = logps(tree), {}

    def leaf_value(node):
        below = {leaf: logp[leaf][prefix_rows(node) :] for leaf in node.leaves}
        score = lambda x: beta * sum(x) / (max(len(x), 1) if per_token else 1)
        return softmax_mean([float(reward[leaf]) for leaf in node.leaves], [score(below[leaf]) for leaf in node.leaves])

    def child_value(node):
        if not node.children:
            return float(reward[node.leaves[0]])
        scores = []
        for child in node.children:
            leaf = child.leaves[0]
            edge = logp[leaf][prefix_rows(node) : prefix_rows(child)]
            scores.append(beta * sum(edge) / (max(len(edge), 1) if per_token else 1))
        return softmax_mean([child_value(c) for c in node.children], scores)

    for node in root.walk():
        if node.leaves:
            result[id(node)] = leaf_value(node) if fusion == "leaf" else child_value(node)
    return result


def branch_depthwise(
    tree, reward, *, fusion="leaf", beta=0.0, per_token=False, segment=0, pool="prompt", virtual=True, std=True, ddof=1,
    eps=1e-6, clip=5.0,
):  # fmt: skip
    root = grow(tree, segment)
    value = values(tree, root, reward, fusion, beta, per_token)
    every = list(root.walk())
    first = {leaf: cells[0] for leaf, cells in oracles.leaf_cells(tree).items()}
    credit = {}
    for node in every:
        if not node.cells:
            continue
        pool_nodes = [n for n in every if n.depth == node.depth and n.leaves]
        extra = [n for n in every if len(n.leaves) == 1 and not n.children and n.depth < node.depth] if virtual else []
        if pool == "depth":
            same = lambda n: first[n.leaves[0]] == first[node.leaves[0]]
            pool_nodes, extra = [n for n in pool_nodes if same(n)], [n for n in extra if same(n)]
            if node.depth == 0:
                pool_nodes, extra = [node], []
        if pool == "sibling":
            pool_nodes, extra = [n for n in pool_nodes if n.parent is node.parent], []
        pooled = [value[id(n)] for n in pool_nodes + extra]
        if len(pooled) <= ddof or np.std(pooled, ddof=ddof) < 1e-6:
            continue
        a = value[id(node)] - np.mean(pooled)
        a = a / (np.std(pooled, ddof=ddof) + eps) if std else a
        credit[id(node)] = float(np.clip(a, -clip, clip))
    return to_cells(tree, root, credit)


def eptree(tree, reward, *, segment=0, scale="paper"):
    root = grow(tree, segment)
    own = rloo(tree, reward)
    v = {id(n): np.mean([own[leaf] for leaf in n.leaves]) for n in root.walk() if n.leaves}
    if scale == "code":
        v = {id(n): v[id(n)] / len(n.leaves) ** 0.5 for n in root.walk() if n.leaves}
    credit = {}
    for node in root.walk():
        if node.leaves:
            local = v[id(node)] - v[id(node.parent)] if node.parent else 0.0
            credit[id(node)] = v[id(node)] - v[id(root)] + local
            if scale == "paper":
                credit[id(node)] /= len(node.leaves) ** 0.5
    return to_cells(tree, root, credit)


def spo_tree(tree, reward, *, segment=0, std=False, eps=1e-8):
    root = grow(tree, segment)
    v = values(tree, root, reward, "child")
    credit = {}
    for node in root.walk():
        for child in node.children:
            spread = np.std([v[id(c)] for c in node.children])
            if spread >= 1e-6:
                credit[id(child)] = (v[id(child)] - v[id(node)]) / (spread + eps if std else 1)
    return to_cells(tree, root, credit)


def treepo(tree, reward, *, segment=0, weight="average", skip_equal=False):
    root, result = grow(tree, segment), np.zeros(len(reward))
    if constant(tree, reward):
        return result
    for leaf in root.leaves:
        pairs = []
        for node in root.walk():
            size = len(node.leaves)
            group = [float(reward[x]) for x in node.leaves]
            if leaf not in node.leaves or (size < 2 and node is not root):
                continue
            if skip_equal and np.std(group, ddof=1) < 1e-6:
                continue
            pairs.append((float(reward[leaf]) - np.mean(group), size if weight == "size" else 1))
        if pairs:
            result[leaf] = sum(a * w for a, w in pairs) / sum(w for _, w in pairs)
    return result


def group(tree, reward):
    leaves = list(oracles.leaf_cells(tree))
    return leaves, [float(reward[leaf]) for leaf in leaves]


def constant(tree, reward) -> bool:
    _, r = group(tree, reward)
    return len(r) < 2 or np.std(r, ddof=1) < 1e-6


def each_leaf(tree, reward, of):
    """Fills [L] with of(index among the leaves, leaf, rewards), 0 for groups without contrast."""
    leaves, r = group(tree, reward)
    result = np.zeros(len(reward))
    if not constant(tree, reward):
        for i, leaf in enumerate(leaves):
            result[leaf] = of(i, leaf, r)
    return result


def grpo(tree, reward, *, std=True, eps=1e-6):
    return each_leaf(tree, reward, lambda i, _, r: (r[i] - np.mean(r)) / (np.std(r, ddof=1) + eps if std else 1))


def dr_grpo(tree, reward):
    return each_leaf(tree, reward, lambda i, _, r: r[i] - np.mean(r))


def rloo(tree, reward):
    return each_leaf(tree, reward, lambda i, _, r: r[i] - np.mean(r[:i] + r[i + 1 :]))


def opo(tree, reward):
    length = {leaf: len(cells) for leaf, cells in oracles.leaf_cells(tree).items()}
    total = sum(length.values())
    baseline = sum(length[leaf] * float(reward[leaf]) for leaf in length) / max(total, 1)
    return each_leaf(tree, reward, lambda i, _, r: r[i] - baseline)


def minimum_variance(tree, reward, norm, importance):
    leaves, r = group(tree, reward)
    weight = [float(importance[leaf]) ** 2 * float(norm[leaf]) for leaf in leaves]
    baseline = sum(w * x for w, x in zip(weight, r)) / sum(weight) if sum(weight) else np.mean(r or [0])
    return each_leaf(tree, reward, lambda i, _, r: r[i] - baseline)


def mc_grpo(tree, reward, *, floor=0.25, eps=1e-3, rescale=False):
    """(credit, weight)."""
    leaves, r = group(tree, reward)
    weight = np.zeros(len(reward))
    if not leaves:
        return np.zeros(len(reward)), weight
    median = statistics.median_low(r)
    mad = statistics.median_low([abs(x - median) for x in r])
    credit = each_leaf(tree, reward, lambda i, _, r: (r[i] - median) / (max(mad, floor) + eps))
    if rescale:
        credit = credit * len(leaves) / max(np.sum(np.abs(credit) > 1e-6), 1)
    weight[leaves] = 1
    weight[leaves[r.index(median)]] = 0
    return credit, weight


def reinforce_pp(tree, reward, *, baseline=False):
    if baseline:
        return dr_grpo(tree, reward)
    result = np.zeros(len(reward))
    leaves, r = group(tree, reward)
    result[leaves] = r
    return result


def tree_grpo(tree, reward, *, inter=True, intra=True, std=True, eps=1e-6):
    paths, result = oracles.leaf_cells(tree), np.zeros(len(reward))
    everyone = list(paths)
    trees = {}
    for leaf, cells in paths.items():
        trees.setdefault(cells[0], []).append(leaf)
    for groups in ([everyone] if inter else []), (list(trees.values()) if intra else []):
        for members in groups:
            r = [float(reward[leaf]) for leaf in members]
            if len(r) < 2 or np.std(r, ddof=1) < 1e-6:
                continue
            for leaf in members:
                result[leaf] += (float(reward[leaf]) - np.mean(r)) / (np.std(r, ddof=1) + eps if std else 1)
    return result


def whiten(trees, credit, eps=1e-8):
    """Every token of every rollout spelled out."""
    tokens = []
    for tree, row in zip(trees, credit):
        for leaf, cells in oracles.leaf_cells(tree).items():
            tokens += [float(row[leaf])] * len(cells)
    result = np.zeros(np.shape(credit))
    if len(tokens) > 1 and np.std(tokens, ddof=1) >= 1e-6:
        for b, tree in enumerate(trees):
            for leaf in oracles.leaf_cells(tree):
                result[b, leaf] = (float(credit[b][leaf]) - np.mean(tokens)) / math.sqrt(np.var(tokens, ddof=1) + eps)
    return result


def ear(tree, reward, credit, *, floor=0.0):
    entropy = np.asarray(tree.entropy, np.float64)
    mean = {leaf: np.mean([entropy[c] for c in cells]) for leaf, cells in oracles.leaf_cells(tree).items()}
    result = np.ones(len(reward))
    for leaf, h in mean.items():
        overall = np.mean(list(mean.values()))
        result[leaf] = max(2 - h / overall, floor) if overall > 0 else 1.0
    return result


def novelty(tree, reward, credit, *, strength=2.5, cap=0.5, correct=0.5):
    score = {leaf: np.mean(x) for leaf, x in logps(tree).items()}
    result = np.ones(len(reward))
    for leaf, s in score.items():
        if reward[leaf] > correct and credit[leaf] > 0:
            eta = math.exp(s - np.mean(list(score.values())))
            a = float(credit[leaf])
            result[leaf] = (a + min(max(strength * (1 - eta), 0), cap * a)) / a
    return result


def ace(tree, reward, credit, reference, *, alpha=1.0, correct=0.5, per_token=False, limit=20.0):
    reference, result = np.asarray(reference, np.float64), np.ones(len(reward))
    for leaf, cells in oracles.leaf_cells(tree).items():
        c = sum(float(tree.logp_policy[cell]) - reference[cell] for cell in cells)
        c = min(max(c / (len(cells) if per_token else 1), -limit), limit)
        if reward[leaf] <= correct:
            result[leaf] = 1 + alpha * math.log1p(math.exp(c))
    return result
