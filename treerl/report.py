"""Pictures: of a run, one self-contained report.html; of several, curves at equal steps and at equal tokens."""

import html
import io
from fnmatch import fnmatch

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from treerl.draw import Page
from treerl.errors import UserError
from treerl.files import write_text

# (title, patterns of the metrics drawn together), the most wanted first; what no pattern knows is drawn as "other".
GROUPS = (
    ("reward", ("reward", "solved")),
    ("scores of graders", ("reward/*", "heldout/*")),
    ("held-out tasks of another distribution", ("novel/*",)),
    ("turns of an episode", ("turns",)),
    ("invalid actions", ("invalid",)),
    ("answers that graders failed on", ("graders_*",)),
    ("episodes that games failed in", ("games_*",)),
    ("pass@k and votes on held-out examples", ("pass@*", "majority@*", "weighted@*")),
    ("loss", ("loss",)),
    ("gradient norm", ("grad_norm",)),
    ("drift of log-probs, nats", ("logp_drift*",)),
    ("clipped tokens, skipped updates", ("clipped", "skipped")),
    ("KL, nats", ("kl",)),
    ("entropy, nats", ("entropy",)),
    ("leaves, forks and depth of a tree", ("leaves", "depth", "forks", "restarts", "pruned")),
    ("shares of tokens, leaves and trees", ("unique_tokens", "forced_tokens", "truncated", "trees_trained", "ess")),
    ("quality head", ("quality_*", "survivors")),
    ("length of an answer, tokens", ("length",)),
    ("tokens sampled", ("sampled_tokens",)),
    ("tokens sampled a second", ("tokens_per_second",)),
    ("bins", ("bins",)),
    ("seconds", ("seconds",)),
)

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
@media (prefers-color-scheme: dark) {{
  body {{ color: #ddd; background: #15171a; }}
  pre {{ background: #22252a; }}
  th, td {{ border-color: #444; }}
}}
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
    trees: list[tuple[str, Page, str]],
) -> None:
    """Writes report.html, one file that needs nothing beside it and no network.

    Sections and panels with nothing to show are left out; every metric is in one panel, see GROUPS.

    Args:
        path: file to write; its folder is created if missing. A reader never sees half a page.
        title: heading, any text.
        config_text: the experiment's fields, shown folded.
        history: lines of metrics.jsonl, each with "step"; None marks a number that was not finite.
        warmup: lines of the supervised warm-up: step, loss, pass@1.
        before: name -> number measured before training.
        after: the same after training.
        trees: (caption, page of `draw.explore_tree`, text) of some trees.
    """
    sections = [
        ("Before and after", _table(before, after)),
        ("Training", _curves(history)),
        ("Warm-up", _curves(warmup)),
        ("Trees", "\n".join(_tree(*tree) for tree in trees)),
        (
            "Configuration",
            f"<details><summary>every field</summary>\n<pre>{html.escape(config_text)}</pre>"
            "</details>"
            if config_text
            else "",
        ),
    ]
    body = "\n".join(f"<h2>{heading}</h2>\n{text}" for heading, text in sections if text)
    write_text(path, _PAGE.format(title=html.escape(title), body=body))


def _tree(caption: str, page: Page, text: str) -> str:
    fold = f"<details><summary>as text</summary>\n<pre>{html.escape(text)}</pre></details>"
    return f"<p>{html.escape(caption)}</p>\n{page._repr_html_()}\n{fold}"


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


def _curves(lines: list[dict]) -> str:
    """One SVG with a panel for every group that the lines have numbers of; '' without any."""
    groups = {title: {} for title in [*(title for title, _ in GROUPS), "other"]}
    for name, points in _series(lines).items():
        groups[_group(name)][name] = points
    panels = [(title, series) for title, series in groups.items() if series]
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


def _series(lines: list[dict]) -> dict:
    """name -> (steps, values) of the finite numbers."""
    series = {}
    for line in lines:
        for name, value in line.items():
            if name == "step" or not isinstance(value, (int, float)) or not np.isfinite(value):
                continue
            steps, values = series.setdefault(name, ([], []))
            steps.append(line["step"])
            values.append(value)
    return series


def _group(name: str) -> str:
    """Title of the first group that knows the metric."""
    return next((title for title, patterns in GROUPS if any(fnmatch(name, p) for p in patterns)), "other")


# --- several runs ---------------------------------------------------------------------------------


def curve(history: list[dict], metric: str) -> np.ndarray:
    """(step, tokens sampled up to then, value) of the steps at which a metric was measured: float64 [n, 3]."""
    tokens = np.cumsum([line.get("sampled_tokens", 0) for line in history])  # a line of step 0 has scores alone
    rows = [(line["step"], t, line[metric]) for line, t in zip(history, tokens) if line.get(metric) is not None]
    if not rows:
        known = sorted({name for line in history for name in line if "@" in name})
        raise UserError(f"metric {metric!r} was not measured in these runs; known are {', '.join(known)}.")
    return np.array(rows, float)


def interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean over runs, [n, ...], and half width of its 95% interval by Student's t, nan for a single run."""
    mean, count = np.mean(values, axis=0), len(values)
    if count < 2:
        return mean, np.full_like(mean, np.nan)
    return mean, stats.t.ppf(0.975, count - 1) * np.std(values, axis=0, ddof=1) / count**0.5


def mean_curve(curves: list[np.ndarray], axis: int) -> np.ndarray:
    """Mean and 95% interval over runs: float64 [n, 3] of (x, mean, half width).

    Args:
      curves: of `curve`, one a seed. axis: 0 for steps, 1 for tokens; values are interpolated to the first run's
        places, as far as all runs reach.

    The half width of a single run is nan.
    """
    end, start = min(c[-1, axis] for c in curves), max(c[0, axis] for c in curves)
    x = np.array([v for v in curves[0][:, axis] if start <= v < end] + [end])
    return np.stack([x, *interval(np.stack([np.interp(x, c[:, axis], c[:, 2]) for c in curves]))], axis=1)


def compare(path, runs: dict[str, list[list[dict]]], metrics: tuple[str, ...] = ("pass@1",)) -> dict[str, dict[str, np.ndarray]]:
    """Draws metrics of several kinds of runs as an SVG, a row each: at equal steps, and at equal sampled tokens.

    Args:
      runs: name -> histories (lines of metrics.jsonl), one a seed.

    Returns:
      metric -> name -> [2, 3]: (x, mean, half width of the 95% interval) at the end that all kinds reach, of steps and of
      tokens.

    Raises:
      UserError: a run has not measured a metric, or begins to after another ends.
    """
    found = {metric: {name: [] for name in runs} for metric in metrics}
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "treerl"}):
        figure = Figure(figsize=(11, 4 * len(metrics)), layout="constrained")
        for metric, places in zip(metrics, figure.subplots(len(metrics), 2, sharey=True, squeeze=False)):
            curves = {name: [curve(history, metric) for history in histories] for name, histories in runs.items()}
            for axis, (place, label) in enumerate(zip(places, ("steps", "tokens sampled"))):
                shared = min(c[-1, axis] for own in curves.values() for c in own)
                if late := [name for name, own in curves.items() for c in own if c[0, axis] > shared]:
                    raise UserError(
                        f"metric {metric!r} of {late[0]} is first measured after {shared:.0f} {label}, where another run ends; "
                        "train that one longer, or leave one of them out."
                    )
                for name, own in curves.items():
                    x, mean, half = mean_curve(own, axis).T
                    place.plot(x, mean, label=f"{name}, {len(own)} seeds" if len(own) > 1 else name)
                    place.fill_between(x, mean - half, mean + half, alpha=0.2)
                    cut = [np.concatenate([c[c[:, axis] < shared], [_at(c, axis, shared)]]) for c in own]
                    found[metric][name].append(mean_curve(cut, axis)[-1])
                place.set_xlabel(label)
                place.set_title(f"{metric} at equal {label}")
                place.grid(alpha=0.3)
                place.legend(fontsize="small")
        figure.savefig(path, format="svg", metadata={"Date": None})
    return {metric: {name: np.stack(rows) for name, rows in own.items()} for metric, own in found.items()}


def _at(points: np.ndarray, axis: int, x: float) -> np.ndarray:
    """A curve's point at x, between its own."""
    return np.array([np.interp(x, points[:, axis], points[:, i]) for i in range(3)])
