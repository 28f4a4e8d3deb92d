"""One tree as indented text, and its leaves as a table."""

import json

import numpy as np

from treerl.draw.view import View, chain_of, end_name, mark, number, outcome, view_of
from treerl.tree import FORCED

TEXT_LEGEND = (
    "* forced by branching; p: probability of a segment's first token; A: advantage, mean of its tokens; ✓ ✗: right, wrong, and the reward"
)
TEXT_LIMIT = 100  # characters of one node; the middle of a longer text is left out


def format_tree(tree, tokens_to_text, *, reward, advantage, right: float = 0.5) -> str:
    """Prints one tree as indented text, a line for every chain of tokens between two forks.

        prompt
        ├─ "(3+5)" p=0.41 A=+0.31
        │  ├─ "*2\\n" p=0.80 A=+0.94 ✓ 1.0
        │  └─ *"-4\\n" p=0.11 A=-0.31 ✗ 0.0
        └─ "3*" p=0.20 A=+0.00 pruned

    p is the policy's probability of the chain's first token, A the mean advantage of its tokens;
    a star marks a chain whose first token was forced by a branching rule. A chain also ends where
    a line did. Cells that pruned lines left behind are printed as they stand; those whose
    ancestors were overwritten hang nowhere and are only counted, in the last line.

    Args:
        tree: one unbatched tree, S rows and K columns, with the fields token, parent, used,
            source, end, entropy and logp_policy, each [S, K], and leaf [L, 2]; see tree.Tree.
        tokens_to_text: function from a list of token ids to their text.
        reward: [L] float, of each leaf.
        advantage: [S, K] float, of each cell.
        right: rewards above it get a ✓.

    Returns:
        The text, without a newline at its end.

    Raises:
        ValueError: reward or advantage has another shape.
    """
    view = view_of(tree, reward, advantage, right)
    lines, shown = ["prompt"], 0
    children = view.children
    stack = [(cell, "", cell == children[None][-1]) for cell in reversed(children.get(None, []))]
    while stack:
        cell, indent, last = stack.pop()
        chain = chain_of(cell, view)
        shown += len(chain)
        below = children.get(chain[-1], [])
        text = _chain_text(view, chain, tokens_to_text)
        ended = outcome(view, chain[-1])
        lines.append(f"{indent}{'└─' if last else '├─'} {text}{' ' if ended else ''}{ended}")
        indent += "   " if last else "│  "
        stack += [(child, indent, child == below[-1]) for child in reversed(below)]
    if (lost := int(view.used.sum()) - shown) > 0:
        lines.append(f"({lost} more tokens belong to pruned lines that were partly overwritten)")
    return "\n".join(lines)


def _chain_text(view: View, chain, tokens_to_text) -> str:
    text = tokens_to_text([int(view.token[cell]) for cell in chain])
    if len(text) > TEXT_LIMIT:
        text = text[: TEXT_LIMIT // 2] + " … " + text[-(TEXT_LIMIT // 2) :]
    star = "*" if view.source[chain[0]] == FORCED else ""
    probability = np.exp(float(view.logp_policy[chain[0]]))
    credit = np.mean([float(view.advantage[cell]) for cell in chain])
    return f"{star}{json.dumps(text, ensure_ascii=False)} p={probability:.2f} A={credit:+.2f}"


def format_leaves(tree, tokens_to_text, *, reward, advantage, right: float = 0.5) -> str:
    """Prints a line for every leaf of one tree: reward, advantage, how it ended, and its text.

    Takes what `format_tree` takes; the advantage is that of the leaf's own cell.
    """
    view = view_of(tree, reward, advantage, right)
    rows = [("reward", "advantage", "end", "text")]
    for cell in sorted(view.rewards, key=lambda cell: cell[::-1]):  # by column
        path = [cell]
        while path[-1][0] > 0:
            path.append((path[-1][0] - 1, int(view.parent[path[-1]])))
        text = tokens_to_text([int(view.token[c]) for c in path[::-1]])
        rows.append((
            f"{mark(view.rewards[cell], view.right)} {number(view.rewards[cell])}", f"{view.advantage[cell]:+.2f}",
            end_name(int(view.end[cell])), json.dumps(text, ensure_ascii=False),
        ))  # fmt: skip
    widths = [max(map(len, column)) for column in list(zip(*rows))[:3]]
    return "\n".join("  ".join(x.ljust(w) for x, w in zip(row, widths)) + f"  {row[3]}" for row in rows)
