import functools
import xml.etree.ElementTree
from fnmatch import fnmatch

import jax
import numpy as np
import pytest

from sharding_test import Tiny, one_device
from treerl import report
from treerl import step as S
from treerl.draw import Page
from treerl.errors import UserError

EVIL = '<script>alert("1")</script> & {x} $y_1$'


def write(path, **changes):
    arguments = dict(
        title="a run",
        config_text="lr = 1",
        history=[],
        warmup=[],
        before={},
        after={},
        trees=[],
    )
    report.write_report(path, **(arguments | changes))
    return path.read_text(encoding="utf-8")


def svgs(page):
    return ["<svg" + part.split("</svg>")[0] + "</svg>" for part in page.split("<svg")[1:]]


def drawn(page) -> list[list[tuple[str, list[str]]]]:
    """(title, names in the legend) of each panel, for every picture with panels."""
    result, tag = [], "{http://www.w3.org/2000/svg}"
    for svg in svgs(page):
        found = []
        for panel in xml.etree.ElementTree.fromstring(svg).iter(tag + "g"):
            if panel.get("id", "").startswith("axes_"):
                legend = next(g for g in panel.iter(tag + "g") if g.get("id", "").startswith("legend_"))
                names = [text.text for text in legend.iter(tag + "text")]
                title = [text.text for text in panel.iter(tag + "text")][-1 - len(names)]
                found.append((title, names))
        result += [found] if found else []
    return result


def test_report_escapes_everything(tmp_path):
    page = write(
        tmp_path / "report.html",
        title=EVIL,
        config_text=EVIL,
        trees=[(EVIL, Page("<p>a tree</p>"), EVIL)],
        before={EVIL: 0.5},
        after={EVIL: EVIL},
        history=[{"step": i, "reward" + EVIL: float(i)} for i in range(3)],
    )
    assert "<script" not in page
    escaped = "&lt;script&gt;alert(&quot;1&quot;)&lt;/script&gt; &amp; {x} $y_1$"
    assert page.count(escaped) == 7  # title, heading, configuration, caption and text of the tree, twice in the table
    assert "&amp; {x} $y_1$</text>" in page  # In the picture, and no TeX.


def test_report_draws_the_metrics_that_exist(tmp_path):
    history = [
        {"step": 1, "unknown": 3.0, "reward": 0.1, "entropy": 1.0, "kl": None},
        {"step": 2, "my_entropy": 4.0, "reward": 0.2, "entropy": float("nan"), "pass@4": 0.5, "kl": np.nan},
    ]
    warmup = [{"step": 0, "loss": 2.0, "pass@1": 0.0}, {"step": 10, "loss": 1.0, "pass@1": 0.1}]
    page = write(tmp_path / "new" / "report.html", history=history, warmup=warmup)
    training, warm = drawn(page)
    assert training == [
        ("reward", ["reward"]), ("pass@k and votes on held-out examples", ["pass@4"]), ("entropy, nats", ["entropy"]),
        ("other", ["unknown", "my_entropy"]),
    ]  # fmt: skip
    assert warm == [("pass@k and votes on held-out examples", ["pass@1"]), ("loss", ["loss"])]


def test_every_metric_of_a_step_is_drawn_once_and_no_group_is_for_none(tmp_path):
    tiny = Tiny(one_device(), kl=0.1, pruning=dict(rule="balance", detection=4), branching=dict(rule="stochastic"))
    step = functools.partial(S.train_step, tiny.fns)
    _, values = jax.eval_shape(step, tiny.state(), tiny.prompts(), tiny.knobs)
    del values["samples"]  # no number
    names = [*values, "pass@1", "pass@8", "majority@8", "weighted@8", "seconds", "tokens_per_second"]  # what train adds
    names += ["reward/number", "heldout/number", "graders_raised", "games_hung"]  # of graders and games on the host
    names += ["turns", "invalid", "novel/pass@1"]  # of environments
    [panels] = drawn(write(tmp_path / "report.html", history=[{"step": 1} | dict.fromkeys(names, 0.5)]))
    assert sorted(name for _, panel in panels for name in panel) == sorted(names)
    for _, patterns in report.GROUPS:
        for pattern in patterns:
            assert [name for name in names if fnmatch(name, pattern)], pattern


def test_report_of_nothing_has_no_empty_sections(tmp_path):
    page = write(tmp_path / "report.html", config_text="", history=[{"step": 1}])
    assert "<h1>a run</h1>" in page and "<h2>" not in page and "<svg" not in page


def test_report_table_lists_missing_numbers_as_dashes(tmp_path):
    page = write(tmp_path / "report.html", before={"pass@1": 0.12345}, after={"pass@8": 1})
    assert "<td>pass@1</td><td>0.1235</td><td>—</td>" in page
    assert "<td>pass@8</td><td>—</td><td>1</td>" in page


def test_report_is_self_contained_and_repeatable(tmp_path):
    history = [{"step": i, "reward": i / 7} for i in range(40)]
    pages = [write(tmp_path / f"{i}.html", history=history, trees=[("c", Page("<p>a tree</p>"), "t")]) for i in range(2)]
    assert pages[0] == pages[1]
    assert "src=" not in pages[0] and 'href="http' not in pages[0] and "@import" not in pages[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0.html", "1.html"]


# --- several runs ---------------------------------------------------------------------------------


def history(values, tokens, every=2):
    """Lines of a run that measures pass@1 every so many steps."""
    return [
        dict(step=i, sampled_tokens=tokens) | ({"pass@1": values[i // every - 1]} if i % every == 0 else {})
        for i in range(1, every * len(values) + 1)
    ]


def test_curves_are_compared_at_equal_steps_and_at_equal_tokens(tmp_path):
    runs = {
        "a": [history([0.1, 0.2, 0.3], 10), history([0.3, 0.4, 0.5], 10)],
        "b": [history([0.0, 0.5, 1.0], 20)],  # by step 3 it has drawn what the others have in all
    }
    both = report.compare(tmp_path / "c.svg", runs, ("pass@1", "sampled_tokens"))
    found = both["pass@1"]
    half = 12.7062 * 0.1  # Student's t of one degree of freedom, times the standard error of 0.3 and 0.5
    np.testing.assert_allclose(found["a"], [[6, 0.4, half], [60, 0.4, half]], rtol=1e-4)
    np.testing.assert_allclose(found["b"][:, :2], [[6, 1.0], [60, 0.25]])
    assert np.isnan(found["b"][:, 2]).all()
    text = (tmp_path / "c.svg").read_text()
    np.testing.assert_allclose([own[0, 1] for own in both["sampled_tokens"].values()], [10, 20])
    assert "pass@1 at equal steps" in text and "sampled_tokens at equal steps" in text
    assert "pass@1 at equal tokens sampled" in text and "a, 2 seeds" in text


def test_means_reach_as_far_as_every_run():
    short, long = (report.curve(history(v, 1), "pass@1") for v in ([0.0, 1.0], [1.0, 2.0, 9.0]))
    np.testing.assert_allclose(report.mean_curve([long, short], 0)[:, :2], [[2, 0.5], [4, 1.5]])


def test_a_metric_that_was_not_measured_is_named(tmp_path):
    with pytest.raises(UserError, match="metric 'pass@3' was not measured in these runs; known are pass@1."):
        report.compare(tmp_path / "c.svg", {"a": [history([0.1], 1)]}, ("pass@3",))
    late = {"a": [history([0.1, 0.2], 10)], "b": [history([0.3], 10, every=8)]}
    with pytest.raises(UserError, match="metric 'pass@1' of b is first measured after 4 steps, where another run ends; train that one"):
        report.compare(tmp_path / "c.svg", late)
