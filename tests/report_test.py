import xml.etree.ElementTree
from types import SimpleNamespace

import numpy as np
import pytest

from treerl import report
from treerl.tree import CUT, FINISHED, FORCED, SIMILAR, TRUNCATED

S, K = 5, 4


def hand_built_tree():
    """Three lines with one forced fork, a pruned line, a truncated one and an orphan.

    row 0   a . t .          t: a second root, truncated at row 1
    row 1   b . u .
    row 2   c d . .          forced fork below b: d
    row 3   e f g .          slot 2 is reborn below d, too: g, pruned here
    row 4   . h . x          x: its parent (3, 3) was overwritten
    """
    tree = SimpleNamespace(
        token=np.full((S, K), ord("?")),
        parent=np.full((S, K), -1),
        used=np.zeros((S, K), bool),
        source=np.zeros((S, K), int),
        end=np.zeros((S, K), int),
        entropy=np.zeros((S, K)),
        logp_policy=np.full((S, K), np.log(0.5)),
        leaf=np.array([[3, 0], [4, 1], [1, 2], [-1, -1]]),
    )

    def put(row, column, letter, parent):
        tree.token[row, column] = ord(letter)
        tree.parent[row, column] = parent
        tree.used[row, column] = True

    for row, column, letter, parent in [
        (0, 0, "a", -1), (1, 0, "b", 0), (2, 0, "c", 0), (3, 0, "e", 0),
        (2, 1, "d", 0), (3, 1, "f", 1), (4, 1, "h", 1),
        (3, 2, "g", 1), (0, 2, "t", -1), (1, 2, "u", 2), (4, 3, "x", 3),
    ]:  # fmt: skip
        put(row, column, letter, parent)
    tree.source[2, 1] = tree.source[3, 2] = FORCED
    tree.logp_policy[2, 1] = np.log(0.25)
    tree.end[3, 0] = tree.end[4, 1] = FINISHED
    tree.end[1, 2] = TRUNCATED
    tree.end[3, 2] = SIMILAR
    advantage = np.zeros((S, K))
    advantage[2, 0], advantage[3, 0] = 0.5, 1.5
    advantage[3:, 1] = -0.25
    return tree, np.array([1.0, 0.0, 0.1, 9.0]), advantage


def to_text(ids):
    return "".join(chr(i) for i in ids)


def test_format_tree_prints_forks_prunes_rewards_and_advantages():
    tree, reward, advantage = hand_built_tree()
    text = report.format_tree(tree, to_text, reward=reward, advantage=advantage)
    assert text == "\n".join([
        "prompt",
        '├─ "ab" p=0.50 A=+0.00',
        '│  ├─ "ce" p=0.50 A=+1.00 ✓ 1.0',
        '│  └─ *"d" p=0.25 A=+0.00',
        '│     ├─ "fh" p=0.50 A=-0.25 ✗ 0.0',
        '│     └─ *"g" p=0.50 A=+0.00 pruned',
        '└─ "tu" p=0.50 A=+0.00 truncated ✗ 0.1',
        "(1 more tokens belong to pruned lines that were partly overwritten)",
    ])  # fmt: skip


def test_ends_that_are_not_leaves():
    tree, reward, advantage = hand_built_tree()
    tree.leaf[:] = -1
    tree.end[4, 1] = CUT
    tree.end[1, 2] = 0  # A leftover: no end, no child, no leaf.
    text = report.format_tree(tree, to_text, reward=reward, advantage=advantage)
    assert '"fh" p=0.50 A=-0.25 cut\n' in text
    assert '"ce" p=0.50 A=+1.00 finished, not graded\n' in text
    assert '"tu" p=0.50 A=+0.00 pruned\n' in text
    assert "✗" not in text and "✓" not in text


def test_a_line_that_ended_above_a_survivor_keeps_its_mark():
    tree, reward, advantage = hand_built_tree()
    tree.end[1, 0] = SIMILAR
    tree.used[2:, 1:] = False  # One child is left below the pruned cell.
    text = report.format_tree(tree, to_text, reward=reward, advantage=advantage)
    assert '├─ "ab" p=0.50 A=+0.00 pruned\n│  └─ "ce"' in text


def test_an_empty_tree_and_long_chains():
    tree, reward, advantage = hand_built_tree()
    tree.used[:] = False
    tree.leaf[:] = -1
    assert report.format_tree(tree, to_text, reward=reward, advantage=advantage) == "prompt"
    rows = 3000  # Deeper than Python's recursion goes; every cell forks or is pruned.
    deep = SimpleNamespace(
        token=np.full((rows, 2), ord('"')),
        parent=np.zeros((rows, 2), int),
        used=np.ones((rows, 2), bool),
        source=np.zeros((rows, 2), int),
        end=np.zeros((rows, 2), int),
        logp_policy=np.zeros((rows, 2)),
        leaf=np.array([[rows - 1, 0]]),
    )
    deep.parent[0] = -1
    text = report.format_tree(deep, to_text, reward=np.ones(1), advantage=np.zeros((rows, 2)))
    assert len(text.splitlines()) == 1 + 2 * rows
    deep.used[:, 1] = False
    text = report.format_tree(deep, to_text, reward=np.ones(1), advantage=np.zeros((rows, 2)))
    assert len(text.splitlines()) == 2 and len(text) < 400 and r"\"" in text


def test_arrays_of_another_tree_are_an_error():
    tree, reward, advantage = hand_built_tree()
    with pytest.raises(ValueError, match="reward has shape"):
        report.format_tree(tree, to_text, reward=reward[:2], advantage=advantage)
    with pytest.raises(ValueError, match="advantage has shape"):
        report.format_tree(tree, to_text, reward=reward, advantage=advantage[None])


EVIL = '<script>alert("1")</script> & {x} $y_1$'


def write(path, **changes):
    arguments = dict(
        title="a run",
        config_text="lr = 1",
        history=[],
        warmup=[],
        before={},
        after={},
        tree_text="",
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
        tree_text=EVIL,
        before={EVIL: 0.5},
        after={EVIL: EVIL},
        history=[{"step": i, "reward" + EVIL: float(i)} for i in range(3)],
    )
    assert "<script" not in page
    escaped = "&lt;script&gt;alert(&quot;1&quot;)&lt;/script&gt; &amp; {x} $y_1$"
    assert page.count(escaped) == 6  # title, heading, configuration, tree, twice in the table
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
    pages = [write(tmp_path / f"{i}.html", history=history, tree_text="t") for i in range(2)]
    assert pages[0] == pages[1]
    assert "src=" not in pages[0] and 'href="http' not in pages[0] and "@import" not in pages[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0.html", "1.html"]
