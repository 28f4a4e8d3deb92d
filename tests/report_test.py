import functools
import json
import re
import subprocess
import xml.etree.ElementTree
from fnmatch import fnmatch

import jax
import numpy as np
import pytest
from draw_test import BROWSER, needs_browser
from matplotlib import image
from sharding_test import Tiny, one_device

from treerl import report, step as S
from treerl.errors import UserError

EVIL = '<script>alert("1")</script> & {x} $y_1$'


def run(name="a run", **changes) -> report.Run:
    """What a workdir tells that tells nothing, but for the changes."""
    return report.Run(**(dict(name=name, config={}, history=[], warmup=[], trees=[], starts=[], notes=[]) | changes))


def tree(**changes) -> dict:
    """A line of trees.jsonl."""
    return dict(step=0, index=3, caption="c", page="<p>a tree</p>", text="t") | changes


def write(path, *runs, **changes):
    report.write_report(path, list(runs) or [run(**changes)])
    return path.read_text(encoding="utf-8")


def drawn(page) -> list[list[tuple[str, list[str]]]]:
    """(title, metrics or kinds) of each panel, for every section with panels; each panel's picture is well-formed."""
    sections = []
    for section in page.split("<div class=panels>")[1:]:
        panels = re.findall(r"<figure><figcaption>(.*?)</figcaption>\n(.*?)</figure>", section.split("</div>")[0], re.DOTALL)
        assert all(xml.etree.ElementTree.fromstring(svg).tag.endswith("svg") for _, svg in panels)
        titles = [caption.partition("<span>")[0] for caption, _ in panels]
        sections.append([(title, re.findall("</i>(.*?)</span>", caption) or [title]) for title, (caption, _) in zip(titles, panels)])
    return sections


def told(page) -> list[str]:
    """The metrics that are said to be the same at every step."""
    return [part.rpartition(" ")[0] for text in re.findall(r"<p>The same at every step: (.*)\.</p>", page) for part in text.split(", ")]


def test_report_escapes_everything(tmp_path):
    lines = [{"step": i, "reward" + EVIL: float(i), EVIL + "@1": 0.5} for i in range(3)]
    evil = dict(
        config={EVIL: EVIL}, trees=[tree(caption=EVIL, text=EVIL, page=EVIL)], history=lines, notes=[EVIL], starts=[dict(devices=EVIL)]
    )
    page = write(tmp_path / "report.html", run(EVIL, **evil))
    assert "<script" not in page
    escaped = "&lt;script&gt;alert(&quot;1&quot;)&lt;/script&gt; &amp; {x} $y_1$"
    # title, heading, note, score, run, device, two charts, three in the configuration, caption, tree, text
    assert page.count(escaped) == 14
    assert "<script" not in write(tmp_path / "both.html", run(EVIL, **evil), run("other", **evil | dict(config={EVIL: 1})))


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
    assert "a run goes on from update 10, the best by pass@1 (0.1)." in page
    assert warm == [("pass@k and votes on held-out examples", ["pass@1"]), ("loss", ["loss"])]


def test_what_never_changes_is_told_and_not_drawn(tmp_path):
    lines = [{"step": i, "clipped": 0, "truncated": 0.25, "ess": i / 2, "reward": 1.0, "pass@1": 0.5} for i in (1, 2)]
    page = write(tmp_path / "report.html", history=lines)
    kept = [("reward", ["reward"]), ("pass@k and votes on held-out examples", ["pass@1"]), ("shares of tokens, leaves and trees", ["ess"])]
    assert told(page) == ["clipped", "truncated"] and drawn(page) == [kept]
    assert "<p>The same at every step: clipped 0, truncated 0.25.</p>" in page
    other = [line | dict(clipped=0.5, truncated=0.25) for line in lines]
    page = write(tmp_path / "both.html", run("a", history=lines, config={"x": 1}), run("b", history=other, config={"x": 2}))
    assert "<p>The same at every step: truncated 0.25.</p>" in page and ("clipped", ["a", "b"]) in drawn(page)[0]


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


def test_trees_of_an_example_lie_beside_each_other(tmp_path):
    trees = [tree(step=s, index=i, caption=f"{i} at {s}") for s, i in [(0, 5), (0, 2), (9, 5), (9, 2)]]
    page = write(tmp_path / "report.html", trees=trees)
    assert "Each tree is" in page and "Each tree is" not in write(tmp_path / "none.html")
    assert re.findall(r"<p>(\d at \d) \((.*?)\)</p>", page) == [
        ("5 at 0", "before training"), ("5 at 9", "after step 9"), ("2 at 0", "before training"), ("2 at 9", "after step 9"),
    ]  # fmt: skip


def test_report_of_nothing_has_no_empty_sections(tmp_path):
    page = write(tmp_path / "report.html", history=[{"step": 1}])
    assert "<h1>a run</h1>" in page and re.findall("<h2>(.*)</h2>", page) == ["Runs"] and "<svg" not in page


def test_report_table_is_of_what_held_out_examples_measured_first_and_last(tmp_path):
    lines = [{"step": 0, "pass@1": 0.12345}, {"step": 1, "pass@1": 0.2, "heldout/x": 0.7, "pass@8": 1}, {"step": 2, "reward": 3.0}]
    page = write(tmp_path / "report.html", history=lines)
    assert "<td>pass@1</td><td>0.1235</td><td>0.2</td><td>+0.07655</td>" in page
    assert "<td>pass@8</td><td>—</td><td>1</td><td>—</td>" in page and "<td>heldout/x</td><td>—</td><td>0.7</td><td>—</td>" in page
    assert "<td>reward</td>" not in page


def test_report_is_self_contained_and_repeatable(tmp_path):
    history = [{"step": i, "reward": i / 7} for i in range(40)]
    pages = [write(tmp_path / f"{i}.html", history=history, trees=[tree()]) for i in range(2)]
    assert pages[0] == pages[1]
    assert "src=" not in pages[0] and 'href="http' not in pages[0] and "@import" not in pages[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0.html", "1.html"]


@needs_browser
def test_charts_are_dark_where_the_page_is(tmp_path):
    page = write(tmp_path / "report.html", history=[{"step": i, "reward": i / 7, "loss": -i} for i in range(40)])
    assert len(drawn(page)) == 1
    for scheme, name, paper in ((0, "dark", (21, 23, 26)), (1, "light", (255, 255, 255))):
        flags = [f"--blink-settings=preferredColorScheme={scheme}", f"--screenshot={tmp_path / name}.png", "--window-size=1100,500"]
        command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", *flags, (tmp_path / "report.html").as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        pixels = 255 * image.imread(tmp_path / f"{name}.png")[..., :3]
        assert (np.abs(pixels - paper).max(axis=-1) < 2).mean() > 0.9, name  # no panel of another colour
        assert (np.abs(pixels.mean(axis=-1) - np.mean(paper)) > 180).mean() > 0.003, name  # text and axes
        assert (pixels.max(axis=-1) < paper[0] - 5).mean() < 1e-4 or name == "light", name  # nothing black on dark


def test_a_run_tells_how_far_it_is_and_how_fast(tmp_path):
    lines = [{"step": i, "sampled_tokens": 100, "seconds": s} for i, s in enumerate((None, 50.0, 2.0, 2.0))]
    starts = [dict(treerl="1", jax="2", python="3", devices="8 x TPU"), dict(treerl="1", jax="2.1", python="3", devices="8 x TPU")]
    page = write(tmp_path / "report.html", history=lines, config=dict(steps=5), starts=starts)
    cells = re.search("<tr>(<td>a run</td>.*)</tr>", page)[1]
    assert re.findall("<td>(.*?)</td>", cells) == [
        "a run", "3 of 5", "300", "54", "2", "50", "8 x TPU", "treerl 1, jax 2.1, python 3, others before",
    ]  # fmt: skip


def test_runs_that_differ_in_their_seeds_are_one_kind(tmp_path):
    lines = lambda x: [{"step": i, "sampled_tokens": 10 + i, "pass@1": x * i, "reward": x} for i in range(3)]
    config = lambda seed, **more: {"seed": seed, "steps": 2, "advantage.name": "grpo", "data_dir": f"d{seed}", "task.name": "sum"} | more
    runs = [run(f"g_{s}", history=lines(s), config=config(s)) for s in (1, 2)]
    runs.append(run("other", history=lines(3), config=config(1, **{"advantage.name": "rloo"}), notes=["half"]))
    assert {name: [x.name for x in kind] for name, kind in report.kinds(runs).items()} == {"g": ["g_1", "g_2"], "other": ["other"]}
    page = write(tmp_path / "report.html", *runs)
    assert "<td>pass@1</td><td>0 ± 0 (2)</td><td>3 ± 13 (2)</td><td>+3 ± 13 (2)</td><td>0</td><td>6</td><td>+6</td>" in page
    assert "<td>advantage.name</td><td>&#x27;grpo&#x27;</td><td>&#x27;rloo&#x27;</td>" in page
    assert "<td>seed</td><td>1, 2</td><td>1</td>" in page and "<td>steps</td>" not in page
    assert ">other: half</p>" in page and "different tasks" not in page
    [panels] = drawn(page)
    assert panels == [(title, ["g", "other"]) for title in ("reward", "pass@1", "sampled_tokens", "pass@1 by tokens")]
    unlike = write(tmp_path / "tasks.html", runs[0], run("x", config=config(1, **{"task.name": "shop"})))
    assert "These runs learn different tasks (shop, sum): their rewards and scores do not compare." in unlike


def test_a_run_and_its_copy_are_not_two_seeds(tmp_path):
    lines = [{"step": 0, "pass@1": 0.1}, {"step": 1, "pass@1": 0.2}]
    runs = [run(name, history=lines, config={"seed": seed, "x": 1}) for name, seed in (("a1", 0), ("a2", 1), ("copy", 0))]
    assert [[x.name for x in kind] for kind in report.kinds(runs).values()] == [["a1", "a2"], ["copy"]]
    page = write(tmp_path / "report.html", *runs)
    assert "copy has the fields and the seed of a1: they are shown beside each other, not averaged." in page
    assert "95% interval" in page and "95% interval" not in write(tmp_path / "one.html", runs[0], runs[2])


def test_kinds_are_told_apart_by_name():
    runs = [run("a", config={"x": 1}), run("a", config={"x": 2}), run("b"), run("b")]
    assert list(report.kinds(runs)) == ["a (1)", "a (2)", "b (1)", "b (2)"]  # of what is not known nothing is said to be the same


def test_seeds_that_do_not_meet_are_drawn_each(tmp_path):
    short, late = [{"step": 1, "reward": 0.5}], [{"step": 5, "reward": 0.1}, {"step": 6, "reward": 0.2}]
    runs = [run(f"r{i}", history=lines, config={"seed": i, "x": 0}) for i, lines in enumerate((short, late))]
    page = write(tmp_path / "report.html", *runs)
    assert drawn(page) == [[("reward", ["reward"])]] and len(re.findall(r"<use[^>]*#1f77b4", page)) == 3  # their points, of no mean


def test_of_two_seeds_both_are_drawn_and_of_three_the_interval(tmp_path):
    for count, thin, bands in ((1, 0, 0), (2, 2, 0), (3, 0, 1)):
        runs = [
            run(f"r{i}", history=[{"step": s, "reward": s * i} for s in (1, 2)], config={"seed": i, "x": 0}) for i in range(1, count + 1)
        ]
        page = write(tmp_path / "report.html", *runs)
        assert (page.count("stroke-opacity: 0.4"), page.count('id="FillBetween')) == (thin, bands), count


def workdir(folder, **files):
    """A run's folder with these files; lists are lines of JSON."""
    folder.mkdir(parents=True)
    for name, what in files.items():
        text = "".join(json.dumps(line) + "\n" for line in what) if isinstance(what, list) else what
        (folder / name.replace("_jsonl", ".jsonl").replace("_json", ".json")).write_text(text)
    return folder


@pytest.mark.parametrize("end, last", [('{"step": 2, "rew', 1), ('{"step": 2, "rew\n', 1), ('{"step": 2}', 2), ("\n\n", 1)])
def test_a_last_line_cut_short_is_left_out_and_told(tmp_path, end, last):
    lines = json.dumps({"step": 1, "reward": 0.5}) + "\n" + end
    found = report.read_run(workdir(tmp_path / "x", config_json=json.dumps({"steps": last, "seed": 0}), metrics_jsonl=lines))
    assert [line["step"] for line in found.history] == list(range(1, last + 1))
    assert found.notes == (["The last line of metrics.jsonl is cut short and left out."] if "rew" in end else [])


def test_half_a_run_says_what_is_missing(tmp_path):
    config = json.dumps({"steps": 4, "seed": 7, "model": {"width": 8}})
    begun = report.read_run(workdir(tmp_path / "begun", config_json=config))
    assert begun.config == {"steps": 4, "seed": 7, "model.width": 8}
    assert begun.notes == ["No step is finished yet: metrics.jsonl has no line of one."]
    half = report.read_run(workdir(tmp_path / "half", config_json=config, metrics_jsonl=[{"step": 0, "pass@1": 0}, {"step": 1}]))
    assert half.notes == ["1 of 4 steps are done: the run goes on, or was stopped and the same command continues it."]
    bare = report.read_run(workdir(tmp_path / "bare", metrics_jsonl=[{"step": 1}]))
    assert bare.notes == ["config.json is missing: nothing is known of the experiment."]
    assert all(note in write(tmp_path / "r.html", half) for note in half.notes)
    for missing, why in [("begun/checkpoints", "does not exist"), ("", "is a folder without a run")]:
        with pytest.raises(UserError, match=f"workdir={tmp_path / missing} {why}; give the workdir of a run made by"):
            report.read_run(tmp_path / missing)
    with pytest.raises(UserError, match="config.json is damaged"):
        report.read_run(workdir(tmp_path / "damaged", config_json=config[:-3]))


def test_seeds_of_one_program_are_runs(tmp_path):
    folder = workdir(tmp_path / "many", config_json=json.dumps({"steps": 1, "seed": 4}))
    for seed in (4, 5):
        workdir(folder / f"seed{seed}", metrics_jsonl=[{"step": 1, "reward": 0.1 * seed}])
    runs = [report.read_run(path) for path in report.find(str(folder))]
    assert [(x.name, x.config["seed"], x.notes) for x in runs] == [("many/seed4", 4, []), ("many/seed5", 5, [])]
    assert list(report.kinds(runs)) == ["many"]
    assert report.find(str(folder / "seed4")) == [str(folder / "seed4")]


# --- curves of several runs ---------------------------------------------------------------------------------


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
