"""What workdirs tell of runs: one self-contained HTML page of a run or of several; curves at equal steps and at equal tokens."""

import html
import io
import os
import re
from fnmatch import fnmatch
from typing import NamedTuple

import matplotlib
import numpy as np
from etils import epath
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from scipy import stats

from treerl import metrics
from treerl.draw import TEXT_LEGEND, Page
from treerl.errors import UserError
from treerl.files import write_text
from treerl.workdir import has_config, read_fields, telling

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

SVG = {"svg.fonttype": "none", "svg.hashsalt": "treerl"}  # of matplotlib: text stays text, and the same numbers give the same file
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --paper: #fff; --ink: #222; --line: #ddd; --panel: #f6f6f6; }}
@media (prefers-color-scheme: dark) {{ :root {{ --paper: #15171a; --ink: #ddd; --line: #444; --panel: #22252a; }} }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 66rem; margin: 2rem auto; padding: 0 1rem;
  color: var(--ink); background: var(--paper); }}
table {{ border-collapse: collapse; display: block; overflow-x: auto; }}
th, td {{ padding: .2rem .7rem; border-bottom: 1px solid var(--line); text-align: right; }}
td {{ white-space: nowrap; }}
th:first-child, td:first-child {{ text-align: left; }}
pre {{ font-size: 13px; line-height: 1.3; overflow-x: auto; background: var(--panel); padding: 1rem; }}
svg {{ max-width: 100%; height: auto; fill: var(--ink); }}
.panels {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(26rem, 100%), 1fr)); gap: 1rem; align-items: end; }}
figure {{ margin: 0; }}
figure svg {{ width: 100%; }}
figcaption {{ font-weight: 600; }}
figcaption span {{ font-weight: 400; font-size: .85em; margin-left: .8em; white-space: nowrap; }}
figcaption i {{ display: inline-block; width: .8em; height: .8em; margin-right: .3em; }}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""


class Run(NamedTuple):
    """What a workdir tells of a run; what is missing is empty, and `notes` say so."""

    name: str
    config: dict  # field -> value
    history: list[dict]  # lines of metrics.jsonl
    warmup: list[dict]  # of warm_start.jsonl: step, loss, pass@1
    trees: list[dict]  # of trees.jsonl, see `train.example_trees`
    starts: list[dict]  # of starts.jsonl: versions and devices, each time the run was started or went on
    notes: list[str]

    def scores(self, last: bool) -> dict:
        """What held-out examples measured before training, and last: name -> number."""
        lines = [line for line in self.history if (line["step"] > 0) == last and any("@" in name for name in line)]
        return {name: x for name, x in lines[-1].items() if _held_out(name)} if lines else {}


def find(workdir: epath.PathLike) -> list[str]:
    """The runs in a folder: itself, or its seeds if launch.seeds made it."""
    here = epath.Path(workdir)
    seeds = [] if (here / "metrics.jsonl").exists() else sorted(here.glob("seed*/metrics.jsonl"))
    return [os.fspath(path.parent) for path in seeds] or [os.fspath(workdir)]


def read_run(workdir: epath.PathLike) -> Run:
    """Reads what there is of a run, finished or not.

    Raises:
      UserError: there is nothing of one.
    """
    here = epath.Path(workdir)
    parts, parent = here.parts, os.fspath(here.parent)
    of_seeds = not has_config(workdir) and re.fullmatch(r"seed\d+", parts[-1]) is not None and has_config(parent)
    notes, config = [], {}
    if of_seeds or has_config(workdir):
        config = read_fields(parent if of_seeds else workdir)
        config |= dict(seed=int(parts[-1].removeprefix("seed"))) if of_seeds else {}
    elif not (here / "metrics.jsonl").exists():
        missing = "is a folder without a run" if here.exists() else "does not exist"
        raise UserError(f"workdir={workdir} {missing}; give the workdir of a run made by launch.train or launch.seeds.")
    else:
        notes.append("config.json is missing: nothing is known of the experiment.")

    def lines(name):
        path = here / name
        if not path.exists():
            return []
        found, cut = metrics.read_whole(path)
        if cut:
            notes.append(f"The last line of {name} is cut short and left out.")
        return found

    history = lines("metrics.jsonl")
    done, steps = max([line["step"] for line in history], default=0), config.get("steps")
    if not done:
        notes.append("No step is finished yet: metrics.jsonl has no line of one.")
    elif steps is not None and done < steps:
        notes.append(f"{done} of {steps} steps are done: the run goes on, or was stopped and the same command continues it.")
    name = "/".join(parts[-2:]) if of_seeds else os.path.basename(os.path.abspath(workdir))
    return Run(name, config, history, lines("warm_start.jsonl"), lines("trees.jsonl"), lines("starts.jsonl"), notes)


def kinds(runs: list[Run]) -> dict[str, list[Run]]:
    """Runs by what they are: those that differ in their seeds and nothing else are one kind, named by what their names share."""
    found, seed = [], lambda run: run.config.get("seed")
    for run in runs:
        own = telling(run.config)
        same = next((kind for other, kind in found if own and other == own and seed(run) not in map(seed, kind)), None)
        if same is None:
            found.append((own, [run]))
        else:
            same.append(run)
    names = [_shared_name([run.name for run in kind]) for _, kind in found]
    twice = lambda i: names[i] if names.count(names[i]) == 1 else f"{names[i]} ({names[: i + 1].count(names[i])})"
    return {twice(i): kind for i, (_, kind) in enumerate(found)}


def _shared_name(names: list[str]) -> str:
    shared = os.path.commonprefix(names).removesuffix("seed").rstrip("-_./= ") if len(names) > 1 else names[0]
    return shared or ", ".join(names)


def write_report(path, runs: list[Run]) -> None:
    """Writes one page that needs nothing beside it and no network: of a run, or of several, beside each other.

    Runs of one kind, see `kinds`, are drawn as their mean and its 95% interval (Student's t). Sections and panels with nothing
    to show are left out; every metric is in one panel, see GROUPS. Of a single run trees are shown.

    Args:
        path: file to write; its folder is created if missing. A reader never sees half a page.
    """
    groups, alone = kinds(runs), len(runs) == 1
    notes = [note if alone else f"{run.name}: {note}" for run in runs for note in run.notes]
    tasks = sorted({str(run.config["task.name"]) for run in runs if "task.name" in run.config})
    if len(tasks) > 1:
        notes.insert(0, f"These runs learn different tasks ({', '.join(tasks)}): their rewards and scores do not compare.")
    same = lambda a, b: a.config and telling(a.config) == telling(b.config) and a.config.get("seed") == b.config.get("seed")
    for i, run in enumerate(runs):
        if twin := next((other for other in runs[:i] if same(run, other)), None):
            notes.append(f"{run.name} has the fields and the seed of {twin.name}: they are shown beside each other, not averaged.")
    curves = _curves({name: [run.history for run in kind] for name, kind in groups.items()}, by_tokens=not alone)
    sections = [
        ("", "".join(f"<p class=note>{html.escape(note)}</p>\n" for note in notes)),
        ("Before and after", _table(groups) + _INTERVALS * any(len(kind) > 1 for kind in groups.values())),
        ("Runs", _facts(runs)),
        ("What differs", "" if alone else _differences(groups)),
        ("Training", curves + _METRICS * bool(curves)),
        ("Warm start", _warm_start(runs) + _curves({name: [run.warmup for run in kind] for name, kind in groups.items()})),
        ("Trees", _LEGEND + "\n".join(_tree(**tree) for tree in _by_example(runs[0].trees)) if alone and runs[0].trees else ""),
        ("Configuration", "".join(_config(name, kind[0].config) for name, kind in groups.items())),
    ]
    body = "\n".join((f"<h2>{heading}</h2>\n" if heading else "") + text for heading, text in sections if text)
    title = _shared_name([run.name for run in runs])
    write_text(path, _PAGE.format(title=html.escape(title), body=body))


def _config(name: str, fields: dict) -> str:
    text = "\n".join(f"{field} = {value!r}" for field, value in fields.items())
    summary = f"every field of {html.escape(name)}"
    return f"<details><summary>{summary}</summary>\n<pre>{html.escape(text)}</pre></details>\n" if fields else ""


_INTERVALS = """<p>Mean ± half of its 95% interval (Student's t), in brackets the number of seeds. Two seeds say little: the interval is wide.</p>
"""
_METRICS = """<p>What each metric is, and its unit, stands in the README under "Metrics". Scores are shares, 1 is all. Peaks of seconds are
evaluations. In training, trees have forced tokens among their own and are no fair sample of the policy: compare runs by held-out scores.</p>
"""
_LEGEND = """<p>Each tree is an answer's tokens from left to right, a line for every answer, which ends in its reward and the advantage A of its last
token; ▮ is the end. A square was forced by the branching rule: a likely token that a line did not draw and a free slot took up. Lines are as
thick as their tokens were probable. Grey, dashed tokens have no answer below them and say why: "similar" lines stayed within pruning.tau_ed edits
a token of the line that they had forked from. Lines that begin at the prompt are samples of their own and are not compared. Click a token: for
what else was likely there and why no line took it, and at the end of a grey line for which line it repeated.</p>
"""


def _by_example(trees: list[dict]) -> list[dict]:
    """Trees of one example after each other, earlier ones first."""
    places = list(dict.fromkeys(tree["index"] for tree in trees))
    return sorted(trees, key=lambda tree: (places.index(tree["index"]), tree["step"]))


def _tree(step: int, caption: str, page: str, text: str, **_) -> str:
    when = "before training" if step == 0 else f"after step {step}"
    fold = f"<details><summary>as text</summary>\n<pre>{html.escape(text)}\n\n{html.escape(TEXT_LEGEND)}</pre></details>"
    return f"<p>{html.escape(f'{caption} ({when})')}</p>\n{Page(page).frame()}\n{fold}"


def _rows(head: list[str], rows: list[list[str]]) -> str:
    cell = lambda kind, text: f"<{kind}>{html.escape(text)}</{kind}>"
    lines = ["".join(cell("th", text) for text in head), *("".join(cell("td", text) for text in row) for row in rows)]
    return "<table>\n" + "\n".join(f"<tr>{line}</tr>" for line in lines) + "\n</table>\n" if rows else ""


def _table(groups: dict[str, list[Run]]) -> str:
    """Scores on held-out examples before and after, and the change of each run, of each kind with its interval."""
    found, head = {}, []
    for name, kind in groups.items():
        before, after = ([run.scores(last) for run in kind] for last in (False, True))
        known = lambda metric, own: own[0].get(metric) is not None and own[1].get(metric) is not None
        change = [{metric: own[1][metric] - own[0][metric] for metric in own[1] if known(metric, own)} for own in zip(before, after)]
        for what, numbers in dict(before=before, after=after, change=change).items():
            found[name, what] = numbers
            head.append(f"{name} {what}" if len(groups) > 1 else what)
    metric_names = dict.fromkeys(metric for scores in found.values() for own in scores for metric in own)
    shown = lambda what, scores, metric: _mean([own.get(metric) for own in scores], "+" if what == "change" else "")
    return _rows(["", *head], [[metric, *(shown(what, scores, metric) for (_, what), scores in found.items())] for metric in metric_names])


def _mean(values: list, sign: str = "") -> str:
    """A number, or the mean of several and the half width of its interval; with a sign if asked."""
    values = [x for x in values if x is not None]
    if len(values) < 2:
        return format(values[0], sign + ".4g") if values else "—"
    mean, half = interval(np.array(values, float))
    return f"{mean:{sign}.4g} ± {half:.2g} ({len(values)})"


def _warm_start(runs: list[Run]) -> str:
    """Which of the measured states training started from: the best."""
    told = []
    for run in runs:
        if best := metrics.best(run.warmup):
            told.append(f"{run.name} goes on from update {best['step']}, the best by pass@1 ({_number(best['pass@1'])}).")
    return "".join(f"<p>{html.escape(text)}</p>\n" for text in told)


def _facts(runs: list[Run]) -> str:
    """How far each run is, what it took, and on what."""
    rows = []
    for run in runs:
        steps = [line for line in run.history if line["step"] > 0]
        rate = [line["sampled_tokens"] / line["seconds"] for line in steps if line.get("sampled_tokens") and line.get("seconds")]
        last = run.starts[-1] if run.starts else {}
        versions = ", ".join(f"{name} {last[name]}" for name in ("treerl", "jax", "python") if name in last)
        more = "" if len({tuple(start.get(k) for k in ("treerl", "jax", "devices")) for start in run.starts}) < 2 else ", others before"
        rows.append([
            run.name, f"{max([line['step'] for line in steps], default=0)} of {run.config.get('steps', '?')}",
            f"{sum(line.get('sampled_tokens') or 0 for line in steps):,}", _number(sum(line.get("seconds") or 0 for line in steps)),
            _number(np.median([line["seconds"] for line in steps if line.get("seconds")] or [np.nan])),
            _number(np.median(rate or [np.nan])), str(last.get("devices", "—")), (versions or "—") + more,
        ])  # fmt: skip
    return _rows(
        ["", "steps", "tokens sampled", "seconds of steps", "seconds a step (median)", "tokens a second (median)", "devices", "versions"],
        rows,
    )


def _differences(groups: dict[str, list[Run]]) -> str:
    """Fields in which kinds differ, or the runs of one: a row each."""
    every = dict.fromkeys(field for kind in groups.values() for run in kind for field in run.config)
    told = lambda kind, field: ", ".join(dict.fromkeys(repr(run.config.get(field)) for run in kind))
    rows = [[field, *(told(kind, field) for kind in groups.values())] for field in every]
    return _rows(["", *groups], [row for row in rows if len(set(row[1:])) > 1 or ", " in row[1] and row[0] == "seed"])


def _number(value: float) -> str:
    if np.isnan(value):
        return "—"
    return f"{float(value):,.0f}" if abs(value) >= 1e4 else f"{float(value):.4g}"


def _curves(histories: dict[str, list[list[dict]]], by_tokens: bool = False) -> str:
    """Panels of the metrics that the lines have numbers of, '' without any: one for every group, or of several kinds for each.

    What never changes is told in a sentence instead, but for the reward and held-out scores.

    Args:
      histories: kind -> lines of each of its runs. by_tokens: scores over the tokens sampled up to then, too.
    """
    groups, same = {title: {} for title in [*(title for title, _ in GROUPS), "other"]}, []
    for name in dict.fromkeys(name for runs in histories.values() for lines in runs for name in _series(lines)):
        found = {kind: [own for lines in runs if len(own := _points(lines, name))] for kind, runs in histories.items()}
        found = {kind: curves for kind, curves in found.items() if curves}
        values = np.concatenate([own[:, 2] for curves in found.values() for own in curves])
        if len(values) > 1 and np.ptp(values) == 0 and name != "reward" and not _held_out(name):
            same.append(f"{name} {_number(values[0])}")
        else:
            groups[_group(name)][name] = found
    panels = [(title, series, 0) for title, series in groups.items() if series]
    if len(histories) > 1:
        panels = [(name, {name: own}, 0) for _, series, _ in panels for name, own in series.items()]
    panels += [(f"{title} by tokens", series, 1) for title, series, _ in panels if by_tokens and any("@" in name for name in series)]
    colours = None if len(histories) == 1 else {kind: f"C{i % 10}" for i, kind in enumerate(histories)}
    text = "".join(_panel(*panel, colours) for panel in panels)
    text = f"<div class=panels>\n{text}</div>\n" if text else ""
    return text + (f"<p>The same at every step: {html.escape(', '.join(same))}.</p>\n" if same else "")


def _panel(title: str, series: dict, along: int, colours: dict | None) -> str:
    """A chart and its caption: title, and what has which colour. Kinds have `colours`; without them each metric has one."""
    shown = {}  # label -> colour
    with matplotlib.rc_context(SVG):
        figure = Figure(figsize=(5.5, 2.5), layout="constrained")
        axis = figure.subplots()
        for i, (name, of_kind) in enumerate(series.items()):
            for kind, curves in of_kind.items():
                label, colour = (kind, colours[kind]) if colours else (name, f"C{i % 10}")
                shown[label] = to_hex(colour)
                _draw(axis, curves, along, shown[label])
        axis.set_xlabel(("step", "tokens sampled")[along])
        axis.grid(alpha=0.3)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue().replace("#000000", "var(--ink)").replace("#ffffff", "var(--paper)")  # of the page, by its reader's colours
    legend = "".join(f'<span><i style="background:{colour}"></i>{html.escape(label)}</span>' for label, colour in shown.items())
    return (
        f"<figure><figcaption>{html.escape(title)}{legend * (list(shown) != [title])}</figcaption>\n{svg[svg.index('<svg') :]}</figure>\n"
    )


def _draw(axis, curves: list[np.ndarray], along: int, colour: str) -> None:
    """A curve, or the mean of several as far as all reach with its interval, of two with both; each alone where they do not overlap."""
    meet = len(curves) > 1 and max(c[0, along] for c in curves) <= min(c[-1, along] for c in curves)
    for own in [mean_curve(curves, along)] if meet else [c[:, [along, 2]] for c in curves]:
        axis.plot(own[:, 0], own[:, 1], marker="." if len(own) < 30 else None, color=colour)
        if meet and len(curves) == 2:  # their interval would cover everything
            for each in curves:
                axis.plot(each[:, along], each[:, 2], color=colour, alpha=0.4, linewidth=0.7)
        elif meet:  # the interval of few runs is wide: the runs themselves set the panel's height
            for each in curves:
                axis.update_datalim(each[:, [along, 2]])
            limits = axis.dataLim.frozen()
            axis.fill_between(own[:, 0], own[:, 1] - own[:, 2], own[:, 1] + own[:, 2], alpha=0.2, color=colour)
            axis.dataLim.set(limits)
            axis.autoscale_view()


def _series(lines: list[dict]) -> dict:
    """The metrics that have a finite number in some line, in the order of the lines."""
    finite = lambda value: isinstance(value, (int, float)) and np.isfinite(value)
    return dict.fromkeys(name for line in lines for name, value in line.items() if name != "step" and finite(value))


def _points(lines: list[dict], name: str) -> np.ndarray:
    """See `curve`, of the finite numbers."""
    finite = lambda value: value if isinstance(value, (int, float)) and np.isfinite(value) else None
    lines = [line | {name: finite(line.get(name))} for line in lines]
    return curve(lines, name) if any(line[name] is not None for line in lines) else np.zeros((0, 3))


def _group(name: str) -> str:
    """Title of the first group that knows the metric."""
    return next((title for title, patterns in GROUPS if any(fnmatch(name, p) for p in patterns)), "other")


def _held_out(name: str) -> bool:
    """Whether held-out examples measure it."""
    return "@" in name or name.startswith(("heldout/", "novel/"))


# --- curves of several runs ---------------------------------------------------------------------------------


def curve(history: list[dict], metric: str) -> np.ndarray:
    """(step, tokens sampled up to then, value) of the steps at which a metric was measured: float64 [n, 3]."""
    tokens = np.cumsum([line.get("sampled_tokens") or 0 for line in history])  # a line of step 0 has scores alone
    rows = [(line["step"], t, line[metric]) for line, t in zip(history, tokens) if line.get(metric) is not None]
    if not rows:
        known = sorted({name for line in history for name in line if "@" in name})
        raise UserError(f"metric {metric!r} was not measured in these runs; known are {', '.join(known)}.")
    return np.array(rows, float)


def interval(values: np.ndarray) -> tuple[np.ndarray | np.floating, np.ndarray | np.floating]:
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
    with matplotlib.rc_context(SVG):
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
