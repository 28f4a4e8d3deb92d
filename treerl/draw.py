"""Pictures of one tree: as an SVG, as indented text, and its leaves as a table."""

import html
import json
import unicodedata
from typing import NamedTuple

import numpy as np

from treerl.tree import CUT, DROPPED, FINISHED, FORCED, PRUNED, RUNNING, SIMILAR, TRUNCATED

TEXT_LIMIT = 100  # characters of one node; the middle of a longer text is left out
WIDTH_LIMIT = 1600  # pixels; in a wider tree chains of tokens become one box each
ENDS = {
    RUNNING: "running", FINISHED: "finished", TRUNCATED: "truncated", CUT: "cut", SIMILAR: "pruned: similar",
    DROPPED: "pruned: dropped at detection",
}  # fmt: skip


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
    view = _view(tree, reward, advantage, right)
    lines, shown = ["prompt"], 0
    children = view.children
    stack = [(cell, "", cell == children[None][-1]) for cell in reversed(children.get(None, []))]
    while stack:
        cell, indent, last = stack.pop()
        chain = _chain(cell, view)
        shown += len(chain)
        below = children.get(chain[-1], [])
        text = _chain_text(view, chain, tokens_to_text)
        outcome = _outcome(int(view.end[chain[-1]]), view.rewards.get(chain[-1]), view.right, bool(below))
        lines.append(f"{indent}{'└─' if last else '├─'} {text}{outcome}")
        indent += "   " if last else "│  "
        stack += [(child, indent, child == below[-1]) for child in reversed(below)]
    if (lost := int(view.used.sum()) - shown) > 0:
        lines.append(f"({lost} more tokens belong to pruned lines that were partly overwritten)")
    return "\n".join(lines)


class _View(NamedTuple):
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


def _view(tree, reward, advantage, right: float) -> _View:
    fields = {name: np.asarray(getattr(tree, name)) for name in _View._fields[:7]}
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
    return _View(**fields, advantage=advantage, rewards=rewards, right=right, children=children)


def _chain(cell, view: _View) -> list:
    """The cells from `cell` down to the next fork or end."""
    chain = [cell]
    while view.end[cell] == RUNNING and cell not in view.rewards and len(view.children.get(cell, [])) == 1:
        (cell,) = view.children[cell]
        chain.append(cell)
    return chain


def _chain_text(view: _View, chain, tokens_to_text) -> str:
    text = tokens_to_text([int(view.token[cell]) for cell in chain])
    if len(text) > TEXT_LIMIT:
        text = text[: TEXT_LIMIT // 2] + " … " + text[-(TEXT_LIMIT // 2) :]
    star = "*" if view.source[chain[0]] == FORCED else ""
    probability = np.exp(float(view.logp_policy[chain[0]]))
    credit = np.mean([float(view.advantage[cell]) for cell in chain])
    return f"{star}{json.dumps(text, ensure_ascii=False)} p={probability:.2f} A={credit:+.2f}"


def _outcome(end: int, reward, right: float, has_children: bool) -> str:
    """What became of a line, such as ' ✓ 1.0'; '' where it forks."""
    words = []
    if end in (TRUNCATED, CUT) or end >= PRUNED:
        words.append(_end_name(end))
    elif end == RUNNING and reward is None and not has_children:
        words.append("pruned")  # and what ended it was overwritten
    elif end == FINISHED and reward is None:
        words.append("finished, not graded")
    if reward is not None:
        words.append(f"{_mark(reward, right)} {_number(reward)}")
    return "".join(f" {word}" for word in words)


def _end_name(end: int) -> str:
    return ENDS.get(end, "pruned")


def _mark(reward: float, right: float) -> str:
    return "✓" if reward > right else "✗"


def _number(reward: float) -> str:
    return f"{reward:.1f}" if reward % 1 == 0 else f"{reward:.3g}"


def format_leaves(tree, tokens_to_text, *, reward, advantage, right: float = 0.5) -> str:
    """Prints a line for every leaf of one tree: reward, advantage, how it ended, and its text.

    Takes what `format_tree` takes; the advantage is that of the leaf's own cell.
    """
    view = _view(tree, reward, advantage, right)
    rows = [("reward", "advantage", "end", "text")]
    for cell in sorted(view.rewards, key=lambda cell: cell[::-1]):  # by column
        path = [cell]
        while path[-1][0] > 0:
            path.append((path[-1][0] - 1, int(view.parent[path[-1]])))
        text = tokens_to_text([int(view.token[c]) for c in path[::-1]])
        rows.append((
            f"{_mark(view.rewards[cell], view.right)} {_number(view.rewards[cell])}", f"{view.advantage[cell]:+.2f}",
            _end_name(int(view.end[cell])), json.dumps(text, ensure_ascii=False),
        ))  # fmt: skip
    widths = [max(map(len, column)) for column in list(zip(*rows))[:3]]
    return "\n".join("  ".join(x.ljust(w) for x, w in zip(row, widths)) + f"  {row[3]}" for row in rows)


# --- the drawing ---------------------------------------------------------------------------

CHAR, CHIP, LANE, GAP, MARGIN, LABEL = 7.9, 22, 32, 12, 16, 6  # pixels
NEGATIVE, NEUTRAL, POSITIVE = (217, 95, 14), (242, 242, 242), (33, 102, 172)  # orange, blue: told apart by all eyes
_STYLE = (
    ".treerl-tree{white-space:pre}"
    ".treerl-tree .card{fill:#fff;stroke:#ddd}.treerl-tree .ink{fill:#222}.treerl-tree .quiet{fill:#666}"
    ".treerl-tree .edge{fill:none;stroke:#8a8a8a;stroke-width:1.5}.treerl-tree .gone{stroke-dasharray:3 3}"
    ".treerl-tree .free{stroke:#9a9a9a}.treerl-tree .forced{stroke:#222;stroke-width:2.5}"
    ".treerl-tree .off{fill:#e9e9e9;stroke:#9a9a9a}.treerl-tree .off-ink{fill:#6a6a6a}"
    "@media (prefers-color-scheme:dark){"
    ".treerl-tree .card{fill:#1d2025;stroke:#3a3f47}.treerl-tree .ink{fill:#e4e4e4}.treerl-tree .quiet{fill:#a2a2a2}"
    ".treerl-tree .forced{stroke:#f4f4f4}.treerl-tree .off{fill:#33373d;stroke:#8a8a8a}"
    ".treerl-tree .off-ink{fill:#a9a9a9}}"
)


def draw_tree(tree, tokens_to_text, *, reward, advantage, right: float = 0.5, title: str = "") -> str:
    """Draws one tree as an SVG: depth from left to right, a box for every token, a lane for every line.

    Colour is advantage: blue above zero, orange below, as strong as in the largest of the tree. A
    square box with a heavy outline was forced by a branching rule. Grey boxes have no leaf below:
    lines that were pruned or cut, or what later births in their columns left of them. A line ends
    in its reward and advantage, or in what became of it. In a tree wider than WIDTH_LIMIT a chain
    of tokens between two forks is one box. Hovering shows each box's numbers.

    Show it in a notebook with IPython.display.HTML; it needs nothing beside it.

    Args:
        tree, tokens_to_text, reward, advantage, right: as `format_tree` takes them.
        title: any text, such as the prompt's.

    Returns:
        The SVG element, well-formed XML.

    Raises:
        ValueError: reward or advantage has another shape.
    """
    view = _view(tree, reward, advantage, right)
    for collapse in (False, True):
        boxes = _boxes(view, tokens_to_text, collapse)
        edge = max([box.x + box.width for box in boxes], default=0)
        if edge <= WIDTH_LIMIT:
            break
    kept = view.kept()
    top = max([abs(float(view.advantage[c])) for c in kept if np.isfinite(view.advantage[c])], default=0.0)

    head = 44 if title else 18
    y = lambda lane: head + lane * LANE + CHIP / 2
    lanes = 1 + max([box.lane for box in boxes], default=0)
    edges, chips, labels = [], [], []
    width = max(edge + MARGIN, 660)  # of the legend, at least
    for box in boxes:
        last, alive = box.cells[-1], box.cells[0] in kept
        edges.append(_edge(box, y, "edge" if alive else "edge gone"))
        chips.append(_chip(box, y(box.lane), view, alive, top))
        outcome = _outcome(int(view.end[last]), view.rewards.get(last), view.right, box.children).strip()
        if outcome:
            kind, x = "quiet", box.x + box.width + LABEL
            if last in view.rewards:
                kind, outcome = "ink", f"{outcome} · A {view.advantage[last]:+.2f}"
            labels.append(_say(outcome, x, y(box.lane) + 4.5, f"outcome {kind}"))
            width = max(width, x + CHAR * _columns(outcome) + MARGIN)
    bottom = y(lanes - 1) + CHIP
    if lost := int(view.used.sum()) - sum(len(box.cells) for box in boxes):
        bottom += 20
        text = f"{lost} more tokens belong to pruned lines that were partly overwritten"
        labels.append(_say(text, MARGIN, bottom, "quiet"))
    height = bottom + 34
    if title:
        shown = _shorten(_visible(title), int((width - 2 * MARGIN) / (CHAR * 1.2)))
        labels.append(_say(shown, MARGIN, 26, "ink", 'font-size="15" font-weight="bold"'))
    root = f'<circle class="ink" cx="{MARGIN + 5}" cy="{y(0):.0f}" r="4"><title>the prompt</title></circle>'
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" class="treerl-tree" role="img" width="{width:.0f}" '
        f'height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}" font-size="13" '
        'font-family="ui-monospace, Menlo, Consolas, \'DejaVu Sans Mono\', monospace">',
        f"<title>{_escape(_visible(title) or 'a tree')}</title>",
        f"<style>{_STYLE}</style>",
        f'<rect class="card" x="0.5" y="0.5" width="{width - 1:.0f}" height="{height - 1:.0f}" rx="6"/>',
        *edges, root, *chips, *labels, _legend(top, bottom + 6), "</svg>",
    ])  # fmt: skip


class _Box(NamedTuple):
    """A token, or a chain of them, and where it is drawn."""

    cells: list  # (row, column) of each token
    text: str
    x: float
    width: float
    lane: int
    above: tuple  # (right edge, lane) of the box that it hangs on
    children: bool


def _boxes(view: _View, tokens_to_text, collapse: bool) -> list[_Box]:
    """Lays the tree out: a line's own next token stays in its lane, forks open lanes below."""
    boxes, lanes = [], 1
    order = lambda cells, column: sorted(cells, key=lambda cell: (cell[1] != column, cell[1]))
    start = (MARGIN + 10, 0)
    stack = [(cell, start, i == 0) for i, cell in reversed(list(enumerate(view.children.get(None, []))))]
    while stack:
        cell, above, straight = stack.pop()
        lane, lanes = (above[1], lanes) if straight else (lanes, lanes + 1)
        chain = _chain(cell, view)
        below = view.children.get(chain[-1], [])
        for part in [chain] if collapse and len(chain) > 3 else [[c] for c in chain]:
            text = _box_text(view, part, tokens_to_text)
            width = max(CHIP, CHAR * _columns(text) + 10)
            x = above[0] + GAP
            boxes.append(_Box(part, text, x, width, lane, above, bool(below) or part[-1] != chain[-1]))
            above = x + width, lane
        ended = view.end[chain[-1]] != RUNNING or chain[-1] in view.rewards  # its label takes the lane
        below = order(below, chain[-1][1])
        stack += [(c, above, i == 0 and not ended) for i, c in reversed(list(enumerate(below)))]
    return boxes


def _box_text(view: _View, cells, tokens_to_text) -> str:
    text = _visible(tokens_to_text([int(view.token[cell]) for cell in cells]))
    if len(cells) == 1:
        return _shorten(text.replace(" ", "␣"), 12) or "∎"
    return f"{_shorten(text, 24)} · {len(cells)} tokens"


def _edge(box: _Box, y, kind: str) -> str:
    (x0, lane), x1 = box.above, box.x
    middle, r = x0 + GAP / 2, GAP / 2
    if lane == box.lane:
        path = f"M{x0:.1f} {y(lane):.1f}H{x1:.1f}"
    else:
        path = (
            f"M{x0:.1f} {y(lane):.1f}Q{middle:.1f} {y(lane):.1f} {middle:.1f} {y(lane) + r:.1f}"
            f"V{y(box.lane) - r:.1f}Q{middle:.1f} {y(box.lane):.1f} {x1:.1f} {y(box.lane):.1f}"
        )
    return f'<path class="{kind}" d="{path}"/>'


def _chip(box: _Box, y: float, view: _View, alive: bool, top: float) -> str:
    first, many = box.cells[0], len(box.cells) > 1
    credit = float(np.mean([float(view.advantage[cell]) for cell in box.cells]))
    fill, ink = _colours(credit / top if top else 0.0)
    forced = int(view.source[first]) == FORCED
    kind = ("forced" if forced else "free") + ("" if alive else " off gone")
    paint = f' fill="{fill}"' if alive else ""
    hover = (
        f"{box.text}\np {np.exp(float(view.logp_policy[first])):.3f}, A {credit:+.3f}, "
        f"entropy {float(view.entropy[first]):.3f}\n"
        f"row {first[0]}{f' to {box.cells[-1][0]}' if many else ''}, slot {first[1]}{', forced' if forced else ''}"
    )
    place = f'x="{box.x:.1f}" y="{y - CHIP / 2:.1f}" width="{box.width:.1f}" height="{CHIP}"'
    style = f'fill="{ink}" text-anchor="middle"'
    return (
        f'<g class="{"segment" if many else "token"}" data-cell="{first[0]},{first[1]}" data-tokens="{len(box.cells)}">'
        f'<title>{_escape(hover)}</title><rect class="{kind}" {place} rx="{2 if forced else 10}"{paint}/>'
        f"{_say(box.text, box.x + box.width / 2, y + 4.5, '' if alive else 'off-ink', style)}</g>"
    )


def _legend(top: float, y: float) -> str:
    """A scale of advantages and the three kinds of boxes."""
    say = lambda x, text: _say(text, x, y + 11, "quiet", 'font-size="11"')
    if top:
        parts = [say(MARGIN, f"A {-top:+.2f}"), say(MARGIN + 172, f"{top:+.2f}")]
        for i in range(9):
            fill, _ = _colours(i / 4 - 1)
            parts.append(f'<rect x="{MARGIN + 58 + 12 * i}" y="{y + 1:.0f}" width="12" height="12" fill="{fill}"/>')
    else:
        parts = [say(MARGIN, "A 0 throughout")]
    x = MARGIN + 228
    for kind, rx, text in (
        ("free", 7, "sampled"),
        ("forced", 2, "forced by branching"),
        ("free off gone", 7, "pruned or cut"),
    ):
        paint = "" if "off" in kind else ' fill="none"'
        parts.append(f'<rect class="{kind}" x="{x}" y="{y:.0f}" width="14" height="14" rx="{rx}"{paint}/>')
        parts.append(say(x + 20, text))
        x += 44 + 7 * len(text)
    return f'<g class="legend">{"".join(parts)}</g>'


def _colours(share: float) -> tuple[str, str]:
    """Fill and text of a box whose advantage is this share, -1 to 1, of the largest."""
    share = float(np.clip(share, -1, 1)) if np.isfinite(share) else 0.0
    far = POSITIVE if share > 0 else NEGATIVE
    rgb = [round(n + abs(share) * (f - n)) for n, f in zip(NEUTRAL, far)]
    light = 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2]
    return "#%02x%02x%02x" % tuple(rgb), "#222222" if light > 135 else "#ffffff"


def _visible(text: str) -> str:
    """Text on one line: breaks and tabs as signs, other characters that cannot be drawn as �."""
    signs = {"\n": "↵", "\r": "↵", "\t": "⇥", "\xa0": " "}
    return "".join(signs.get(c) or ("�" if unicodedata.category(c)[0] == "C" else c) for c in text)


def _columns(text: str) -> int:
    """Width of a text in characters of a monospaced font."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _shorten(text: str, limit: int) -> str:
    """The text, or its begin and its end."""
    return text if len(text) <= limit else text[: limit * 2 // 3] + "…" + text[-(limit // 3) :]


def _say(text: str, x: float, y: float, kind: str, more: str = "") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" {more}>{_escape(text)}</text>'


_escape = html.escape
