"""One tree as an SVG or PNG."""

import html
import os

import numpy as np
from etils import epath

from treerl.draw.view import CHAR, CHIP, GAP, MARGIN, Box, View, boxes_of, columns_of, outcome, shorten, view_of, visible
from treerl.errors import UserError
from treerl.files import write_text
from treerl.tree import FORCED

WIDTH_LIMIT = 1600  # pixels; in a wider tree chains of tokens become one box each
LANE, LABEL = 32, 6  # pixels
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


class Picture(str):
    """The text of an SVG element; at the end of a notebook's cell it shows itself."""

    def _repr_html_(self) -> str:
        return str(self)

    def save(self, path, scale: float = 3.0) -> None:
        """Writes FILE.svg, or FILE.png with `scale` pixels for each of the drawing's (96 to the inch), by the package resvg-py.

        Raises:
          UserError: another ending, or resvg-py is not installed.
        """
        ending = os.path.splitext(os.fspath(path))[1]
        if ending == ".svg":
            return write_text(path, str(self))
        if ending != ".png":
            raise UserError(f"path={os.fspath(path)!r} names neither FILE.svg nor FILE.png.")
        try:
            import resvg_py
        except ImportError as error:
            raise UserError("a PNG needs the package resvg-py; pip install resvg-py, or save FILE.svg.") from error
        epath.Path(path).parent.mkdir(parents=True, exist_ok=True)
        epath.Path(path).write_bytes(bytes(resvg_py.svg_to_bytes(svg_string=str(self), zoom=scale)))


def draw_tree(tree, tokens_to_text, *, reward, advantage, right: float = 0.5, title: str = "", stops=None) -> Picture:
    """Draws one tree as an SVG: depth from left to right, a box for every token, a lane for every line.

    Colour is advantage: blue above zero, orange below, as strong as in the largest of the tree. A
    square box with a heavy outline was forced by a branching rule. Grey boxes have no leaf below:
    lines that were pruned or cut, or what later births in their columns left of them. A line ends
    in its reward and advantage, or in what became of it. In a tree wider than WIDTH_LIMIT a chain
    of tokens between two forks is one box. Hovering shows each box's numbers.

    It needs nothing beside it, and shows itself in a notebook.

    Args:
        tree, tokens_to_text, reward, advantage, right: as `format_tree` takes them.
        title: any text, such as the prompt's.
        stops: (row, column) that a line ends in -> why it was pruned, see `why.similar`.

    Returns:
        The SVG element, well-formed XML.

    Raises:
        ValueError: reward or advantage has another shape.
    """
    view = view_of(tree, reward, advantage, right)
    for collapse in (False, True):
        boxes = boxes_of(view, tokens_to_text, collapse)
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
        chips.append(_chip(box, y(box.lane), view, alive, top, (stops or {}).get(last, "")))
        ended = outcome(view, last)
        if ended:
            kind, x = "quiet", box.x + box.width + LABEL
            if last in view.rewards:
                kind, ended = "ink", f"{ended} · A {view.advantage[last]:+.2f}"
            labels.append(_say(ended, x, y(box.lane) + 4.5, f"outcome {kind}"))
            width = max(width, x + CHAR * columns_of(ended) + MARGIN)
    bottom = y(lanes - 1) + CHIP
    if lost := int(view.used.sum()) - sum(len(box.cells) for box in boxes):
        bottom += 20
        text = f"{lost} more tokens belong to pruned lines that were partly overwritten"
        labels.append(_say(text, MARGIN, bottom, "quiet"))
    height = bottom + 34
    if title:
        shown = shorten(visible(title), int((width - 2 * MARGIN) / (CHAR * 1.2)))
        labels.append(_say(shown, MARGIN, 26, "ink", 'font-size="15" font-weight="bold"'))
    root = f'<circle class="ink" cx="{MARGIN + 5}" cy="{y(0):.0f}" r="4"><title>the prompt</title></circle>'
    return Picture("\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" class="treerl-tree" role="img" width="{width:.0f}" '
        f'height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}" font-size="13" '
        'font-family="ui-monospace, Menlo, Consolas, \'DejaVu Sans Mono\', monospace">',
        f"<title>{_escape(visible(title) or 'a tree')}</title>",
        f"<style>{_STYLE}</style>",
        f'<rect class="card" x="0.5" y="0.5" width="{width - 1:.0f}" height="{height - 1:.0f}" rx="6"/>',
        *edges, root, *chips, *labels, _legend(top, bottom + 6), "</svg>",
    ]))  # fmt: skip


def _edge(box: Box, y, kind: str) -> str:
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


def _chip(box: Box, y: float, view: View, alive: bool, top: float, stop: str) -> str:
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
        + (f"\npruned: {stop}" if stop else "")
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
    return "#" + "".join(f"{n:02x}" for n in rgb), "#222222" if light > 135 else "#ffffff"


def _say(text: str, x: float, y: float, kind: str, more: str = "") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" {more}>{_escape(text)}</text>'


_escape = html.escape
