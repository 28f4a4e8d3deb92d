"""Pictures of a run: one self-contained report.html, and one tree as indented text."""

import html
import io
import json
import os
from fnmatch import fnmatch

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from treerl.tree import CUT, FINISHED, FORCED, PRUNED, RUNNING, TRUNCATED

# (title, names of the metrics drawn together); a name may stand behind a prefix such as "eval/".
GROUPS = (
    ("reward", ("reward*", "return*", "accuracy*")),
    ("pass@k", ("pass@*", "majority*", "vote*")),
    ("entropy, nats", ("entropy*",)),
    ("KL, nats", ("kl*",)),
    ("loss", ("loss*",)),
    ("ratio and clipping", ("ratio*", "clip*")),
    ("gradient norm", ("grad_norm*", "gradient_norm*")),
    ("answer length, tokens", ("length*", "tokens_per_leaf*")),
    ("leaves and forks per tree", ("leaves*", "forks*", "depth*", "slots*", "tree/*", "tree_*")),
    ("pruned and cut lines", ("pruned*", "cut*", "truncated*", "finished*")),
    ("tokens", ("tokens*", "unique_tokens*", "shared*")),
    ("learning rate", ("learning_rate*", "lr")),
    ("seconds", ("seconds*", "*_seconds")),
)
WARMUP_GROUPS = (("warm-up loss", ("loss*",)), ("warm-up pass@k", ("pass@*",)))

CORRECT = 0.5  # rewards from here on are shown as right answers
TEXT_LIMIT = 100  # characters of one node; the middle of a longer text is left out

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 66rem; margin: 2rem auto; padding: 0 1rem;
  color: #222; background: #fff; }}
table {{ border-collapse: collapse; }}
th, td {{ padding: .2rem 1rem; border-bottom: 1px solid #ddd; text-align: right; }}
th:first-child, td:first-child {{ text-align: left; }}
pre {{ font-size: 13px; line-height: 1.3; overflow-x: auto; background: #f6f6f6; padding: 1rem; }}
svg {{ max-width: 100%; height: auto; }}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""


def write_report(
    path,
    *,
    title: str,
    config_text: str,
    history: list[dict],
    warmup: list[dict],
    before: dict,
    after: dict,
    tree_text: str,
) -> None:
    """Writes report.html, one file that needs nothing beside it and no network.

    Sections with nothing to show are left out; metrics are looked up by GROUPS, so keys that a
    run does not have are no error.

    Args:
        path: file to write; its folder is created if missing. A reader never sees half a page.
        title: heading, any text.
        config_text: the experiment's fields, shown folded.
        history: lines of metrics.jsonl, each with "step"; None marks a number that was not finite.
        warmup: lines of the supervised warm-up: step, loss, pass@1.
        before: name -> number measured before training.
        after: the same after training.
        tree_text: a tree as `format_tree` prints it.
    """
    sections = [
        ("Before and after", _table(before, after)),
        ("Training", _curves(history, GROUPS)),
        ("Warm-up", _curves(warmup, WARMUP_GROUPS)),
        ("One tree", f"<pre>{html.escape(tree_text)}</pre>" if tree_text else ""),
        (
            "Configuration",
            f"<details><summary>every field</summary>\n<pre>{html.escape(config_text)}</pre>"
            "</details>"
            if config_text
            else "",
        ),
    ]
    body = "\n".join(f"<h2>{heading}</h2>\n{text}" for heading, text in sections if text)
    path = os.fspath(path)
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with open(path + ".tmp", "w", encoding="utf-8") as file:
        file.write(_PAGE.format(title=html.escape(title), body=body))
    os.replace(path + ".tmp", path)


def _table(before: dict, after: dict) -> str:
    rows = []
    for name in dict.fromkeys([*before, *after]):
        cells = [name, *(_number(numbers.get(name)) for numbers in (before, after))]
        rows.append("".join(f"<td>{html.escape(cell)}</td>" for cell in cells))
    if not rows:
        return ""
    head = "<th></th><th>before</th><th>after</th>"
    return "<table>\n" + "\n".join(f"<tr>{row}</tr>" for row in [head, *rows]) + "\n</table>"


def _number(value) -> str:
    if value is None:
        return "—"
    return value if isinstance(value, str) else f"{float(value):.4g}"


def _curves(lines: list[dict], groups) -> str:
    """One SVG with a panel for every group that the lines have numbers of; '' without any."""
    panels = [(title, _series(lines, patterns)) for title, patterns in groups]
    panels = [(title, series) for title, series in panels if series]
    if not panels:
        return ""
    rows = -(-len(panels) // 2)
    # Text stays text, keys are no TeX, and the same numbers give the same file.
    style = {"svg.fonttype": "none", "svg.hashsalt": "treerl", "text.parse_math": False}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(11, 2.8 * rows), layout="constrained")
        axes = figure.subplots(rows, 2, squeeze=False).flatten()
        for axis, (title, series) in zip(axes, panels, strict=False):
            for name, (steps, values) in series.items():
                axis.plot(steps, values, label=name, marker="." if len(steps) < 30 else None)
            axis.set_title(title)
            axis.set_xlabel("step")
            axis.grid(alpha=0.3)
            axis.legend(fontsize="small")
        for axis in axes[len(panels) :]:
            axis.set_visible(False)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


def _series(lines: list[dict], patterns) -> dict:
    """name -> (steps, values) of the finite numbers whose names match one of the patterns."""
    series = {}
    for line in lines:
        for name, value in line.items():
            if name == "step" or not isinstance(value, (int, float)) or not np.isfinite(value):
                continue
            if any(fnmatch(part, p) for p in patterns for part in (name, name.split("/")[-1])):
                steps, values = series.setdefault(name, ([], []))
                steps.append(line["step"])
                values.append(value)
    return series


def format_tree(tree, tokens_to_text, *, reward, advantage) -> str:
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
            source, end and logp_policy, each [S, K], and leaf [L, 2]; see tree.Tree.
        tokens_to_text: function from a list of token ids to their text.
        reward: [L] float, of each leaf.
        advantage: [S, K] float, of each cell.

    Returns:
        The text, without a newline at its end.

    Raises:
        ValueError: reward or advantage has another shape.
    """
    used, parent, end = (np.asarray(x) for x in (tree.used, tree.parent, tree.end))
    leaf, reward, advantage = (np.asarray(x) for x in (tree.leaf, reward, advantage))
    for name, x, shape in (
        ("reward", reward, leaf.shape[:1]),
        ("advantage", advantage, used.shape),
    ):
        if x.shape != shape:
            raise ValueError(f"{name} has shape {x.shape} and the tree {shape}: pass one tree's.")
    rewards = {(int(s), int(k)): float(r) for (s, k), r in zip(leaf, reward, strict=True) if s >= 0}
    children = _children(used, parent)

    lines, shown = ["prompt"], 0
    stack = [(cell, "", cell == children[None][-1]) for cell in reversed(children.get(None, []))]
    while stack:
        cell, indent, last = stack.pop()
        chain = _chain(cell, children, end, rewards)
        shown += len(chain)
        below = children.get(chain[-1], [])
        text = _chain_text(tree, chain, tokens_to_text, advantage)
        outcome = _outcome(int(end[chain[-1]]), rewards.get(chain[-1]), bool(below))
        lines.append(f"{indent}{'└─' if last else '├─'} {text}{outcome}")
        indent += "   " if last else "│  "
        stack += [(child, indent, child == below[-1]) for child in reversed(below)]
    if (lost := int(used.sum()) - shown) > 0:
        lines.append(f"({lost} more tokens belong to pruned lines that were partly overwritten)")
    return "\n".join(lines)


def _children(used, parent) -> dict:
    """Cell (row, column), or None for the prompt -> its used children, by column."""
    children = {}
    for s, k in np.argwhere(used).tolist():
        above = None if s == 0 else (s - 1, int(parent[s, k]))
        children.setdefault(above, []).append((s, k))
    return children


def _chain(cell, children, end, rewards) -> list:
    """The cells from `cell` down to the next fork or end."""
    chain = [cell]
    while end[cell] == RUNNING and cell not in rewards and len(children.get(cell, [])) == 1:
        (cell,) = children[cell]
        chain.append(cell)
    return chain


def _chain_text(tree, chain, tokens_to_text, advantage) -> str:
    text = tokens_to_text([int(tree.token[cell]) for cell in chain])
    if len(text) > TEXT_LIMIT:
        text = text[: TEXT_LIMIT // 2] + " … " + text[-(TEXT_LIMIT // 2) :]
    star = "*" if tree.source[chain[0]] == FORCED else ""
    probability = np.exp(float(tree.logp_policy[chain[0]]))
    credit = np.mean([float(advantage[cell]) for cell in chain])
    return f"{star}{json.dumps(text, ensure_ascii=False)} p={probability:.2f} A={credit:+.2f}"


def _outcome(end: int, reward, has_children: bool) -> str:
    """What became of a line, such as ' ✓ 1.0'; '' where it forks."""
    words = []
    if end == TRUNCATED:
        words.append("truncated")
    elif end == CUT:
        words.append("cut")
    elif end >= PRUNED or (end == RUNNING and reward is None and not has_children):
        words.append("pruned")
    elif end == FINISHED and reward is None:
        words.append("finished, not graded")
    if reward is not None:
        number = f"{reward:.1f}" if reward % 1 == 0 else f"{reward:.3g}"
        words.append(f"{'✓' if reward >= CORRECT else '✗'} {number}")
    return "".join(f" {word}" for word in words)
