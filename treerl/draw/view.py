"""What pictures of one tree read of it, and where its tokens lie."""

import unicodedata
from typing import NamedTuple

import numpy as np

from treerl.tree import CUT, DROPPED, FINISHED, PRUNED, RUNNING, SIMILAR, TRUNCATED

ENDS = {
    RUNNING: "running", FINISHED: "finished", TRUNCATED: "truncated", CUT: "cut", PRUNED: "pruned",
    SIMILAR: "pruned: similar", DROPPED: "pruned: dropped at detection",
}  # fmt: skip
CHAR, CHIP, GAP, MARGIN = 7.9, 22, 12, 16  # pixels: of a character, of a token's box, between boxes, around the tree


class View(NamedTuple):
    """One tree on the host: fields of tree.Tree, [S, K] each, and what was made of them."""

    token: np.ndarray
    parent: np.ndarray
    used: np.ndarray
    source: np.ndarray
    end: np.ndarray
    entropy: np.ndarray
    logp_policy: np.ndarray
    advantage: np.ndarray  # [S, K]
    rewards: dict  # cell (row, column) of each leaf -> its reward
    right: float  # rewards above it are marked as right
    children: dict  # cell, or None for the prompt -> its used children, by column

    def kept(self) -> set:
        """The cells that have a leaf at or below them."""
        found = set()
        for row, column in self.rewards:
            while row >= 0 and (row, column) not in found:
                found.add((row, column))
                row, column = row - 1, int(self.parent[row, column])
        return found


def view_of(tree, reward, advantage, right: float) -> View:
    fields = {name: np.asarray(getattr(tree, name)) for name in View._fields[:7]}
    used, parent = fields["used"], fields["parent"]
    leaf, reward, advantage = (np.asarray(x) for x in (tree.leaf, reward, advantage))
    for name, x, shape in (("reward", reward, leaf.shape[:1]), ("advantage", advantage, used.shape)):
        if x.shape != shape:
            raise ValueError(f"{name} has shape {x.shape} and the tree {shape}: pass one tree's.")
    rewards = {(int(s), int(k)): float(r) for (s, k), r in zip(leaf, reward, strict=True) if s >= 0}
    children = {}
    for s, k in np.argwhere(used).tolist():
        above = None if s == 0 else (s - 1, int(parent[s, k]))
        children.setdefault(above, []).append((s, k))
    return View(**fields, advantage=advantage, rewards=rewards, right=right, children=children)


def chain_of(cell, view: View) -> list:
    """The cells from `cell` down to the next fork or end."""
    chain = [cell]
    while view.end[cell] == RUNNING and cell not in view.rewards and len(view.children.get(cell, [])) == 1:
        (cell,) = view.children[cell]
        chain.append(cell)
    return chain


def outcome(view: View, cell) -> str:
    """What became of the line whose last token is a cell, such as '✓ 1.0'; '' where it goes on or forks."""
    end, reward, words = int(view.end[cell]), view.rewards.get(cell), []
    if end in (TRUNCATED, CUT) or end >= PRUNED:
        words.append(end_name(end))
    elif end == RUNNING and reward is None and not view.children.get(cell):
        words.append("pruned")  # and what ended it was overwritten
    elif end == FINISHED and reward is None:
        words.append("finished, not graded")
    if reward is not None:
        words.append(f"{mark(reward, view.right)} {number(reward)}")
    return " ".join(words)


def end_name(end: int) -> str:
    return ENDS.get(end, "pruned")


def mark(reward: float, right: float) -> str:
    return "✓" if reward > right else "✗"


def number(reward: float) -> str:
    return f"{reward:.1f}" if reward % 1 == 0 else f"{reward:.3g}"


class Box(NamedTuple):
    """A token, or a chain of them, and where it is drawn."""

    cells: list  # (row, column) of each token
    text: str
    x: float
    width: float
    lane: int
    above: tuple  # (right edge, lane) of the box that it hangs on


def boxes_of(view: View, tokens_to_text, collapse: bool) -> list[Box]:
    """Lays the tree out: a line's own next token stays in its lane, forks open lanes below."""
    boxes, lanes = [], 1
    order = lambda cells, column: sorted(cells, key=lambda cell: (cell[1] != column, cell[1]))
    start = (MARGIN + 10, 0)
    stack = [(cell, start, i == 0) for i, cell in reversed(list(enumerate(view.children.get(None, []))))]
    while stack:
        cell, above, straight = stack.pop()
        lane, lanes = (above[1], lanes) if straight else (lanes, lanes + 1)
        chain = chain_of(cell, view)
        below = view.children.get(chain[-1], [])
        for part in [chain] if collapse and len(chain) > 3 else [[c] for c in chain]:
            text = _box_text(view, part, tokens_to_text)
            width = max(CHIP, CHAR * columns_of(text) + 10)
            x = above[0] + GAP
            boxes.append(Box(part, text, x, width, lane, above))
            above = x + width, lane
        ended = view.end[chain[-1]] != RUNNING or chain[-1] in view.rewards  # its label takes the lane
        below = order(below, chain[-1][1])
        stack += [(c, above, i == 0 and not ended) for i, c in reversed(list(enumerate(below)))]
    return boxes


def _box_text(view: View, cells, tokens_to_text) -> str:
    text = visible(tokens_to_text([int(view.token[cell]) for cell in cells]))
    if len(cells) == 1:
        return shorten(text.replace(" ", "␣"), 12) or "∎"
    return f"{shorten(text, 24)} · {len(cells)} tokens"


def visible(text: str) -> str:
    """Text on one line: breaks and tabs as signs, other characters that cannot be drawn as �."""
    signs = {"\n": "↵", "\r": "↵", "\t": "⇥", "\xa0": " "}
    return "".join(signs.get(c) or ("�" if unicodedata.category(c)[0] == "C" else c) for c in text)


def columns_of(text: str) -> int:
    """Width of a text in characters of a monospaced font."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def shorten(text: str, limit: int) -> str:
    """The text, or its begin and its end."""
    return text if len(text) <= limit else text[: limit * 2 // 3] + "…" + text[-(limit // 3) :]
