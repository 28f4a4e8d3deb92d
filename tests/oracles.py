"""Slow, plain-Python truths that the fast code is compared with."""

import jax
import numpy as np

from treerl import tree as T

_from_parents = jax.jit(T.from_parents)


def random_tree(rng, rows=7, slots=5, *, fork=0.4, end=0.12, prune=0.08, vocab=9, roots=None):
    """Grows a random tree by hand: forks, prunes, early ends, overwritten columns, one-leaf trees.

    Returns a Tree (numpy leaves), each leaf FINISHED or, in the last row, TRUNCATED.
    """
    shape = rows, slots
    field = lambda dtype, value=0: np.full(shape, value, dtype)
    parent, used, token, ends = field(np.int32, -1), field(bool), field(np.int32), field(np.int8)
    lines = {k: [] for k in range(roots or rng.integers(1, slots + 1))}  # slot -> columns so far
    leaves, held = {}, set()
    for row in range(rows):
        for slot in sorted(lines):
            free = [k for k in range(slots) if k not in lines and k not in held]
            for k in [slot] + ([rng.choice(free)] if free and row and rng.random() < fork else []):
                path = lines[slot][:row]
                parent[row, k] = path[-1] if path else -1
                parent[row + 1 :, k], used[row:, k], ends[row:, k] = -1, False, 0
                used[row, k], token[row, k] = True, rng.integers(2, vocab)
                lines[k] = path + [k]
        for slot in sorted(lines):
            if row == rows - 1 or rng.random() < end:
                ends[row, slot] = T.TRUNCATED if row == rows - 1 else T.FINISHED
                token[row, slot] = token[row, slot] if row == rows - 1 else 1
                leaves[slot] = (row, slot), lines.pop(slot)
                held |= set(leaves[slot][1])
            elif rng.random() < prune:
                ends[row, slot] = T.SIMILAR
                stood_on = {c for path in lines.values() for c in path[: row + 1]}
                lines.pop(slot)
                held |= stood_on & {slot}  # its column is stood on by another line: not reusable
    table = np.full((slots, 2), -1, np.int32)
    for slot, (cell, _) in leaves.items():
        table[slot] = cell
    source = np.where(rng.random(shape) < 0.2, T.FORCED, T.SAMPLED).astype(np.int8)
    logp = -rng.random(shape).astype(np.float32)
    return _from_parents(
        parent, used, table, token=token, end=ends, source=source, logp_policy=logp,
        logp_behavior=np.where(source == T.FORCED, 0, logp).astype(np.float32),
        entropy=rng.random(shape).astype(np.float32),
    )  # fmt: skip


def leaf_cells(tree) -> dict:
    """Leaf index -> its cells from the prompt down, by walking parents one by one."""
    result = {}
    parent = np.asarray(tree.parent).tolist()
    for index, (row, column) in enumerate(np.asarray(tree.leaf).tolist()):
        cells = []
        while row >= 0:
            cells.append((row, column))
            column = parent[row][column]
            row -= 1
        if cells:
            result[index] = cells[::-1]
    return result


def children_of(tree) -> dict:
    """Kept cell, or None for the prompt -> its kept children."""
    result = {None: set()}
    for cells in leaf_cells(tree).values():
        for above, cell in zip([None] + cells, cells):
            result.setdefault(above, set()).add(cell)
            result.setdefault(cell, set())
    return result


def depths(tree) -> dict:
    """Kept cell -> number of strict ancestors, the prompt included, with two or more children."""
    children = children_of(tree)
    result = {}
    for cells in leaf_cells(tree).values():
        count = 0
        for above, cell in zip([None] + cells, cells):
            count += len(children[above]) >= 2
            result[cell] = count
    return result


def nodes(tree) -> list:
    """Chains of kept cells between forks, each a list of cells."""
    children = children_of(tree)
    heads = [cell for above, cells in children.items() for cell in cells if above is None or len(cells) >= 2]
    result = []
    for head in heads:
        chain = [head]
        while len(children[chain[-1]]) == 1:
            chain += children[chain[-1]]
        result.append(chain)
    return result


def levenshtein(a, b) -> int:
    """Edit distance by the textbook recursion."""
    if not len(a) or not len(b):
        return len(a) + len(b)
    return min(levenshtein(a[1:], b) + 1, levenshtein(a, b[1:]) + 1, levenshtein(a[1:], b[1:]) + int(a[0] != b[0]))
