import xml.etree.ElementTree

import numpy as np

from treerl import report

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
    return [part.split("</svg>")[0] + "</svg>" for part in page.split("<svg")[1:]]


def test_report_escapes_everything(tmp_path):
    page = write(
        tmp_path / "report.html",
        title=EVIL,
        config_text=EVIL,
        trees=[(EVIL, "<svg></svg>", EVIL)],
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
        {"step": 1, "reward": 0.1, "sample/entropy": 1.0, "unknown": 3.0, "kl": None},
        {
            "step": 2,
            "reward": 0.2,
            "sample/entropy": float("nan"),
            "eval/pass@4": 0.5,
            "kl": np.nan,
        },
    ]
    warmup = [{"step": 0, "loss": 2.0, "pass@1": 0.0}, {"step": 10, "loss": 1.0, "pass@1": 0.1}]
    page = write(tmp_path / "new" / "report.html", history=history, warmup=warmup)
    training, warm = svgs(page)
    for svg in (training, warm):
        xml.etree.ElementTree.fromstring("<svg" + svg)
    for name in ("reward", "sample/entropy", "eval/pass@4"):
        assert f">{name}</text>" in training
    for name in ("unknown", "kl", "KL, nats", "gradient norm"):
        assert f">{name}</text>" not in training
    assert ">loss</text>" in warm and ">pass@1</text>" in warm


def test_report_of_nothing_has_no_empty_sections(tmp_path):
    page = write(tmp_path / "report.html", config_text="", history=[{"step": 1}])
    assert "<h1>a run</h1>" in page and "<h2>" not in page and "<svg" not in page


def test_report_table_lists_missing_numbers_as_dashes(tmp_path):
    page = write(tmp_path / "report.html", before={"pass@1": 0.12345}, after={"pass@8": 1})
    assert "<td>pass@1</td><td>0.1235</td><td>—</td>" in page
    assert "<td>pass@8</td><td>—</td><td>1</td>" in page


def test_report_is_self_contained_and_repeatable(tmp_path):
    history = [{"step": i, "reward": i / 7} for i in range(40)]
    pages = [write(tmp_path / f"{i}.html", history=history, trees=[("c", "<svg></svg>", "t")]) for i in range(2)]
    assert pages[0] == pages[1]
    assert "src=" not in pages[0] and 'href="http' not in pages[0] and "@import" not in pages[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0.html", "1.html"]
