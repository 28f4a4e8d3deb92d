"""A tree to walk about in: one HTML page with all that is known of every token."""

import html
import importlib.resources
import json
import re

import numpy as np

from treerl.draw.view import boxes_of, outcome, view_of
from treerl.files import write_text
from treerl.tree import FORCED


class Page(str):
    """The text of an HTML page that needs nothing beside it; at the end of a notebook's cell it shows itself."""

    def frame(self) -> str:
        """The page as a part of another, as high as its lines need, within bounds."""
        lanes = re.search(r'"lanes": (\d+)', self)  # of the data; in texts such quotes are escaped
        height = min(max(150 + 30 * int(lanes[1]), 380), 680) if lanes else 450
        return f'<iframe srcdoc="{html.escape(self)}" style="width:100%;box-sizing:border-box;height:{height}px;border:1px solid #8884"></iframe>'

    _repr_html_ = frame

    def save(self, path) -> None:
        """Writes the page to a file."""
        write_text(path, str(self))


def explore_tree(
    tree, tokens_to_text, *, reward, advantage, right: float = 0.5, title: str = "", prompt: str = "", columns=None, candidates=None,
    stops=None, refusals=None
) -> Page:  # fmt: skip
    """Draws one tree as an interactive page: `draw_tree`'s picture, to be coloured, searched and asked.

    Lines to a token are as thick as it was probable. Tokens are coloured by advantage, entropy, probability or a column of
    `columns`; a search finds text across tokens; a click on a token shows its numbers, what could have followed it, and the
    answer up to it. Grey tokens have no leaf below, and say why. Thousands of tokens are shown without delay.

    Args:
      tree, tokens_to_text, reward, advantage, right, title, stops: see `draw_tree`.
      prompt: text that the model read before the tree.
      columns: name -> [S, K] float, what else tokens can be coloured by; not finite where there is nothing to show.
      candidates: (row, column) of a token, or None for the prompt -> [(token, probability)], what the policy might have
        drawn next there; the tree knows only what was drawn.
      refusals: the same places -> token -> why it was not taken, see `why.not_taken`.

    Raises:
      ValueError: reward, advantage or a column has another shape.
    """
    view = view_of(tree, reward, advantage, right)
    columns = {
        "advantage": view.advantage, "entropy": view.entropy, "probability": np.exp(view.logp_policy),
        **{name: np.asarray(values) for name, values in (columns or {}).items()},
    }  # fmt: skip
    for name, values in columns.items():
        if values.shape != view.used.shape:
            raise ValueError(f"column {name} has shape {values.shape} and the tree {view.used.shape}: pass one tree's.")
    boxes, kept = boxes_of(view, tokens_to_text, collapse=False), view.kept()
    index = {box.cells[0]: i for i, box in enumerate(boxes)}
    above = [None if cell[0] == 0 else (cell[0] - 1, int(view.parent[cell])) for cell in index]
    leaves, total = np.zeros(len(index), int), np.zeros(len(index))
    for cell, value in view.rewards.items():
        while cell is not None and cell in index:
            leaves[index[cell]] += 1
            total[index[cell]] += value
            cell = above[index[cell]]
    finite = lambda x, digits=4: round(float(x), digits) if np.isfinite(x) else None
    fates, ends, stops, refusals = [], [], stops or {}, refusals or {}
    for i, cell in enumerate(index):
        fate = outcome(view, cell)
        leaf = cell in view.rewards
        fates.append(f"pruned: {stops[cell]}" if cell in stops else fate)
        if fate:
            ends.append(dict(i=i, text=f"{fate} · A {view.advantage[cell]:+.2f}" if leaf else fate, leaf=leaf))
    under = [{fate} - {""} for fate in fates]  # of each token what became of the lines through it
    for i in reversed(range(len(index))):  # a token comes before those that follow it
        if above[i] is not None:
            under[index[above[i]]] |= under[i]
    lines = lambda found: f"its line was {min(found)}" if len(found) == 1 else "its lines were pruned"
    fates = [fate or ("" if cell in kept else lines(found)) for cell, fate, found in zip(index, fates, under)]
    named = lambda cell, pairs: [
        (tokens_to_text([int(token)]), finite(p), int(token), refusals.get(cell, {}).get(token, "")) for token, p in pairs
    ]
    lost = int(view.used.sum()) - len(index)
    data = dict(
        title=title or prompt, prompt=prompt, raw=_texts(view, index, above, tokens_to_text),
        cells=dict(
            text=[box.text for box in boxes], row=[s for s, _ in index], column=[k for _, k in index],
            parent=[-1 if cell is None else index[cell] for cell in above], id=[int(view.token[cell]) for cell in index],
            x=[round(box.x) for box in boxes], width=[round(box.width) for box in boxes], lane=[box.lane for box in boxes],
            probability=[finite(np.exp(view.logp_policy[cell])) or 0 for cell in index],
            forced=[bool(view.source[cell] == FORCED) for cell in index], kept=[cell in kept for cell in index], fate=fates,
            leaves=leaves.tolist(), mean=[finite(t / n) if n else None for t, n in zip(total, leaves)],
        ),
        columns={name: [finite(values[cell]) for cell in index] for name, values in columns.items()},
        candidates={
            "prompt" if cell is None else index[cell]: named(cell, pairs)
            for cell, pairs in (candidates or {}).items() if cell is None or cell in index
        },
        ends=ends, lanes=1 + max([box.lane for box in boxes], default=0),
        width=round(max([box.x + box.width for box in boxes], default=0)) + 260,
        summary=f"{len(index)} tokens, {len(view.rewards)} leaves" + (f", {lost} more of pruned lines partly overwritten" if lost else ""),
    )  # fmt: skip
    text = json.dumps(data, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")  # no tag can begin in it
    before, after = importlib.resources.files("treerl.draw").joinpath("page.html").read_text(encoding="utf-8").split("DATA")
    return Page(before + text + after)


def _texts(view, index: dict, above: list, tokens_to_text) -> list[str]:
    """What each token adds to the text before it; the last of several tokens that are one character adds that character."""
    texts = []
    for cell, before in zip(index, above):
        path = []
        while before is not None and len(path) < 4:
            path.append(int(view.token[before]))
            before = above[index[before]]
        start = tokens_to_text(path[::-1]).rstrip("\ufffd") if path else ""
        whole = tokens_to_text([*path[::-1], int(view.token[cell])])
        unfinished = whole.endswith("\ufffd")
        texts.append("" if unfinished else whole[len(start) :])
    return texts
