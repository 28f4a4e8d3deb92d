"""Trees as text, as SVG and as pages in a browser, against oracles that walk parents one by one."""

import html
import json
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from matplotlib import image
from oracles import leaf_cells, random_tree

from treerl import draw
from treerl.draw import view
from treerl.errors import UserError
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
    text = draw.format_tree(tree, to_text, reward=reward, advantage=advantage)
    assert text == "\n".join([
        "prompt",
        '├─ "ab" p=0.50 A=+0.00',
        '│  ├─ "ce" p=0.50 A=+1.00 ✓ 1.0',
        '│  └─ *"d" p=0.25 A=+0.00',
        '│     ├─ "fh" p=0.50 A=-0.25 ✗ 0.0',
        '│     └─ *"g" p=0.50 A=+0.00 pruned: similar',
        '└─ "tu" p=0.50 A=+0.00 truncated ✗ 0.1',
        "(1 more tokens belong to pruned lines that were partly overwritten)",
    ])  # fmt: skip


def test_what_is_right_is_the_task_s():
    tree, reward, advantage = hand_built_tree()
    for right, marks in ((0.5, "✓✗✗"), (0.05, "✓✗✓"), (1.0, "✗✗✗")):
        given = dict(reward=reward, advantage=advantage, right=right)
        for text in (draw.format_tree(tree, to_text, **given), draw.draw_tree(tree, to_text, **given)):
            assert "".join(c for c in text if c in "✓✗") == marks
        assert sorted(c for c in draw.format_leaves(tree, to_text, **given) if c in "✓✗") == sorted(marks)


def test_ends_that_are_not_leaves():
    tree, reward, advantage = hand_built_tree()
    tree.leaf[:] = -1
    tree.end[4, 1] = CUT
    tree.end[1, 2] = 0  # A leftover: no end, no child, no leaf.
    text = draw.format_tree(tree, to_text, reward=reward, advantage=advantage)
    assert '"fh" p=0.50 A=-0.25 cut\n' in text
    assert '"ce" p=0.50 A=+1.00 finished, not graded\n' in text
    assert '"tu" p=0.50 A=+0.00 pruned\n' in text
    assert "✗" not in text and "✓" not in text


def test_a_line_that_ended_above_a_survivor_keeps_its_mark():
    tree, reward, advantage = hand_built_tree()
    tree.end[1, 0] = SIMILAR
    tree.used[2:, 1:] = False  # One child is left below the pruned cell.
    text = draw.format_tree(tree, to_text, reward=reward, advantage=advantage)
    assert '├─ "ab" p=0.50 A=+0.00 pruned: similar\n│  └─ "ce"' in text


def test_an_empty_tree_and_long_chains():
    tree, reward, advantage = hand_built_tree()
    tree.used[:] = False
    tree.leaf[:] = -1
    assert draw.format_tree(tree, to_text, reward=reward, advantage=advantage) == "prompt"
    rows = 3000  # Deeper than Python's recursion goes; every cell forks or is pruned.
    deep = SimpleNamespace(
        token=np.full((rows, 2), ord('"')),
        parent=np.zeros((rows, 2), int),
        used=np.ones((rows, 2), bool),
        source=np.zeros((rows, 2), int),
        end=np.zeros((rows, 2), int),
        entropy=np.zeros((rows, 2)),
        logp_policy=np.zeros((rows, 2)),
        leaf=np.array([[rows - 1, 0]]),
    )
    deep.parent[0] = -1
    text = draw.format_tree(deep, to_text, reward=np.ones(1), advantage=np.zeros((rows, 2)))
    assert len(text.splitlines()) == 1 + 2 * rows
    deep.used[:, 1] = False
    text = draw.format_tree(deep, to_text, reward=np.ones(1), advantage=np.zeros((rows, 2)))
    assert len(text.splitlines()) == 2 and len(text) < 400 and r"\"" in text


def test_arrays_of_another_tree_are_an_error():
    tree, reward, advantage = hand_built_tree()
    with pytest.raises(ValueError, match="reward has shape"):
        draw.format_tree(tree, to_text, reward=reward[:2], advantage=advantage)
    with pytest.raises(ValueError, match="advantage has shape"):
        draw.format_tree(tree, to_text, reward=reward, advantage=advantage[None])


def test_format_leaves():
    tree, reward, advantage = hand_built_tree()
    tree.token[1, 0] = ord("\n")
    text = draw.format_leaves(tree, to_text, reward=reward, advantage=advantage)
    assert text == "\n".join([
        "reward  advantage  end        text",
        '✓ 1.0   +1.50      finished   "a\\nce"',
        '✗ 0.0   -0.25      finished   "a\\ndfh"',
        '✗ 0.1   +0.00      truncated  "tu"',
    ])  # fmt: skip
    tree.leaf[:] = -1
    text = draw.format_leaves(tree, to_text, reward=reward, advantage=advantage)
    assert text == "reward  advantage  end  text"


# --- the drawing ---------------------------------------------------------------------------

SVG = "{http://www.w3.org/2000/svg}"


class Drawn:
    """What an SVG shows, read back from its XML."""

    def __init__(self, svg: str):
        root = xml.etree.ElementTree.fromstring(svg)
        self.size = float(root.get("width")), float(root.get("height"))
        boxes = [g for g in root.iter(f"{SVG}g") if g.get("data-cell")]
        self.cells = {tuple(map(int, g.get("data-cell").split(","))): g for g in boxes}
        assert len(self.cells) == len(boxes)  # no cell twice
        self.tokens = {cell: int(g.get("data-tokens")) for cell, g in self.cells.items()}
        self.rect = {cell: g.find(f"{SVG}rect") for cell, g in self.cells.items()}
        self.text = {cell: g.find(f"{SVG}text").text for cell, g in self.cells.items()}
        dot = root.find(f"{SVG}circle")
        self.prompt = float(dot.get("cx")), float(dot.get("cy")) - view.CHIP / 2, 5, view.CHIP  # x, y, width, height
        self.edges = [p for p in root.iter(f"{SVG}path")]
        self.outcomes = [t.text for t in root.iter(f"{SVG}text") if "outcome" in t.get("class")]
        self.all_text = [t.text for t in root.iter(f"{SVG}text")]

    def graded(self) -> list:
        """(reward, advantage) of every leaf, as text; sorted."""
        return sorted(re.findall(r"[✓✗] (\S+) · A (\S+)", "\n".join(self.outcomes)))

    def kind(self, cell) -> set:
        return set(self.rect[cell].get("class").split())


def graded(tree, reward, advantage) -> list:
    number = lambda x: f"{x:.1f}" if x in (0, 1) else f"{x:.3g}"
    return sorted((number(reward[i]), f"{advantage[cells[-1]]:+.2f}") for i, cells in leaf_cells(tree).items())


def hanging(tree) -> dict:
    """Used cell -> its path from the prompt, where every cell of the path is used."""
    found = {}
    for row, column in np.argwhere(tree.used).tolist():
        path = [(row, column)]
        while path[-1][0] > 0 and tree.used[path[-1]]:
            path.append((path[-1][0] - 1, int(tree.parent[path[-1]])))
        if tree.used[path[-1]]:
            found[row, column] = path[::-1]
    return found


@pytest.mark.parametrize("seed", range(8))
def test_every_cell_is_drawn_once_with_its_kind_and_colour(seed):
    rng = np.random.default_rng(seed)
    tree = jax.tree.map(np.asarray, random_tree(rng, prune=0.15))
    reward, advantage = rng.random(5).round(2), rng.normal(size=tree.used.shape)
    drawn = Drawn(draw.draw_tree(tree, to_text, reward=reward, advantage=advantage))
    paths, kept = hanging(tree), {cell for cells in leaf_cells(tree).values() for cell in cells}
    assert set(drawn.cells) == set(paths) and set(drawn.tokens.values()) <= {1}
    assert len(drawn.edges) == len(paths)  # one to each parent
    for cell in paths:
        assert ("forced" in drawn.kind(cell)) == (tree.source[cell] == FORCED)
        assert ("off" in drawn.kind(cell)) == (cell not in kept)
        fill = drawn.rect[cell].get("fill")
        assert (fill is not None) == (cell in kept)
        if fill:
            red, blue = int(fill[1:3], 16), int(fill[5:7], 16)
            assert red == blue or (blue > red) == (advantage[cell] > 0)
    assert drawn.graded() == graded(tree, reward, advantage)


@pytest.mark.parametrize("seed", range(4))
def test_boxes_do_not_overlap_and_stand_right_of_their_parents(seed):
    rng = np.random.default_rng(seed)
    tree = jax.tree.map(np.asarray, random_tree(rng, rows=12, slots=7, prune=0.15))
    drawn = Drawn(draw.draw_tree(tree, to_text, reward=np.zeros(7), advantage=np.zeros((12, 7)), title="a prompt"))
    place = {c: [float(r.get(name)) for name in ("x", "y", "width", "height")] for c, r in drawn.rect.items()}
    paths_drawn = [edge.get("d") for edge in drawn.edges]
    for cell, path in hanging(tree).items():
        x, y, width, height = place[cell]
        assert 0 < x and x + width < drawn.size[0] and 26 < y and y + height < drawn.size[1]
        for other, (x2, y2, width2, height2) in place.items():
            apart = x + width < x2 or x2 + width2 < x or y + height < y2 or y2 + height2 < y
            assert apart or other == cell
        x2, y2, width2, _ = place[path[-2]] if cell[0] else drawn.prompt
        edge = f"M{x2 + width2:.1f} {y2 + height / 2:.1f}"
        assert x > x2 + width2
        assert any(d.startswith(edge) and re.search(rf"[H ]{x:.1f}( {y + height / 2:.1f})?$", d) for d in paths_drawn)
        x_of_row = {place[c][0] for c in place if c[0] == cell[0]}
        assert len(x_of_row) == 1  # tokens of one width: depth is a column


@pytest.mark.parametrize("seed", range(4))
def test_long_chains_become_one_box(seed):
    rng = np.random.default_rng(seed)
    tree = jax.tree.map(np.asarray, random_tree(rng, rows=400, slots=6, fork=0.02, end=0.004, prune=0.004))
    reward, advantage = rng.random(6).round(), rng.normal(size=(400, 6))
    svg = draw.draw_tree(tree, to_text, reward=reward, advantage=advantage)
    drawn, paths = Drawn(svg), hanging(tree)
    assert sum(drawn.tokens.values()) == len(paths) > 100 and len(drawn.tokens) < 100 and len(svg) < 80_000
    below = {}
    for cell, path in paths.items():
        below.setdefault(path[-2] if cell[0] else None, set()).add(cell)
    for cell, count in drawn.tokens.items():
        if count > 1:
            assert count > 3 and re.search(rf" · {count} tokens$", drawn.text[cell])
            for _ in range(count - 1):  # a chain: one child each, no end inside
                assert tree.end[cell] == 0
                (cell,) = below[cell]
    assert drawn.graded() == graded(tree, reward, advantage)


def test_drawing_of_the_hand_built_tree():
    tree, reward, advantage = hand_built_tree()
    svg = draw.draw_tree(tree, to_text, reward=reward, advantage=advantage, title="3 5=8:")
    drawn = Drawn(svg)
    assert "".join(drawn.text[cell] for cell in [(0, 0), (1, 0), (2, 1), (3, 1), (4, 1)]) == "abdfh"
    assert "3 5=8:" in drawn.all_text
    assert drawn.outcomes == [
        "✓ 1.0 · A +1.50", "✗ 0.0 · A -0.25", "pruned: similar", "truncated ✗ 0.1 · A +0.00",
    ]  # fmt: skip
    assert "1 more tokens belong to pruned lines that were partly overwritten" in drawn.all_text
    assert drawn.rect[3, 0].get("fill") == "#2166ac" and drawn.rect[1, 2].get("fill") == "#f2f2f2"
    assert {"A -1.50", "+1.50", "sampled", "forced by branching"} <= set(drawn.all_text)
    assert "row 2, slot 1, forced" in svg and "p 0.250" in svg
    for text in svg.split("<text")[1:]:  # nothing leaves the card
        at, what = re.match(r'[^>]* x="(\S+)"[^>]*>([^<]*)<', text).groups()
        size = 6.7 if 'font-size="11"' in text else view.CHAR
        assert float(at) + size * len(what) < drawn.size[0]
    tree.end[1, 0] = SIMILAR  # a line that ended above survivors
    drawn = Drawn(draw.draw_tree(tree, to_text, reward=reward, advantage=advantage))
    assert drawn.outcomes.count("pruned: similar") == 2
    rows = {cell: float(drawn.rect[cell].get("y")) for cell in drawn.cells}
    assert rows[1, 0] not in (rows[2, 0], rows[2, 1])  # its label has the lane to itself


def test_drawing_of_nothing_and_of_numbers_that_are_none():
    tree, reward, advantage = hand_built_tree()
    advantage[3, 0], reward[1] = np.nan, np.nan
    drawn = Drawn(draw.draw_tree(tree, to_text, reward=reward, advantage=advantage))
    assert drawn.rect[3, 0].get("fill") == "#f2f2f2" and "✗ nan · A -0.25" in drawn.outcomes
    tree.used[:], tree.leaf[:] = False, -1
    drawn = Drawn(draw.draw_tree(tree, to_text, reward=reward, advantage=advantage))
    assert drawn.cells == {} and "A 0 throughout" in drawn.all_text
    with pytest.raises(ValueError, match="advantage has shape"):
        draw.draw_tree(tree, to_text, reward=reward, advantage=advantage[None])


def test_hostile_text_is_escaped_and_shown():
    tree, reward, advantage = hand_built_tree()
    words = dict(zip("abcdef", ["<script>", "&amp;\"'", "\n", " ", "", "\x00\ud800\u202e"]))
    evil = lambda ids: "".join(words.get(chr(i), chr(i)) for i in ids)
    title = "</title><script>alert(1)</script>\n\x1b & more"
    svg = draw.draw_tree(tree, evil, reward=reward, advantage=advantage, title=title)
    drawn = Drawn(svg)
    assert "<script" not in svg and svg.count("<title>") == 2 + len(drawn.cells)
    assert [drawn.text[c] for c in [(0, 0), (1, 0), (2, 0), (2, 1), (3, 0), (3, 1)]] == [
        "<script>", "&amp;\"'", "↵", "␣", "∎", "���",
    ]  # fmt: skip
    assert "</title><script>alert(1)</script>↵� & more" in drawn.all_text


def test_two_drawings_are_equal_and_need_nothing():
    tree, reward, advantage = hand_built_tree()
    one, two = (draw.draw_tree(tree, to_text, reward=reward, advantage=advantage) for _ in range(2))
    assert one == two and " id=" not in one and "href" not in one and "url(" not in one


# --- the page --------------------------------------------------------------------------------------


def data_of(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


def test_a_picture_is_saved_as_svg_and_as_png(tmp_path, monkeypatch):
    tree, reward, advantage = hand_built_tree()
    picture = draw.draw_tree(tree, to_text, reward=reward, advantage=advantage)
    assert picture._repr_html_() == picture
    picture.save(tmp_path / "new" / "a.svg")
    assert (tmp_path / "new" / "a.svg").read_text() == picture
    width, height = (float(re.search(rf'{name}="(\d+)"', picture)[1]) for name in ("width", "height"))
    pytest.importorskip("resvg_py", reason="resvg-py makes PNGs; it is not installed")
    picture.save(tmp_path / "new" / "a.png", scale=2)
    pixels = image.imread(tmp_path / "new" / "a.png")
    assert abs(pixels.shape[1] - 2 * width) <= 1 and abs(pixels.shape[0] - 2 * height) <= 1
    blue, orange = ((np.abs(pixels[..., :3] * 255 - colour) < 3).all(-1).sum() for colour in ([33, 102, 172], [217, 95, 14]))
    assert blue > 1000  # a token's disc and the legend's square; orange is the legend's alone, whose tokens are paler
    assert 400 < orange < blue
    with pytest.raises(UserError, match="names neither FILE.svg nor FILE.png"):
        picture.save(tmp_path / "a.jpg")
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(UserError, match="a PNG needs the package resvg-py; pip install resvg-py, or save FILE.svg"):
        picture.save(tmp_path / "b.png")


def test_the_page_knows_what_the_tree_knows():
    rng = np.random.default_rng(0)
    for _ in range(20):
        tree = random_tree(rng, rows=9, slots=6)
        reward, advantage = (rng.random(6) < 0.5).astype(float), rng.normal(size=(9, 6))
        quality = np.where(rng.random((9, 6)) < 0.5, np.nan, rng.random((9, 6)))
        data = data_of(draw.explore_tree(tree, to_text, reward=reward, advantage=advantage, columns={"quality": quality}))
        cells = data["cells"]
        places = list(zip(cells["row"], cells["column"]))
        paths = leaf_cells(tree)
        assert set(sum(paths.values(), [])) == {place for place, kept in zip(places, cells["kept"]) if kept}
        for i, place in enumerate(places):
            up = cells["parent"][i]
            assert up < i and (up < 0 if place[0] == 0 else places[up] == (place[0] - 1, tree.parent[place]))
            below = [reward[leaf] for leaf, path in paths.items() if place in path]
            assert cells["leaves"][i] == len(below) and cells["mean"][i] == (pytest.approx(np.mean(below), abs=1e-4) if below else None)
            assert data["columns"]["advantage"][i] == pytest.approx(advantage[place], abs=1e-4)
            wanted = None if np.isnan(quality[place]) else pytest.approx(quality[place], abs=1e-4)
            assert data["columns"]["quality"][i] == wanted
            assert data["raw"][i] == chr(tree.token[place])
        leaves = {places[end["i"]] for end in data["ends"] if end["leaf"]}
        assert leaves == {path[-1] for path in paths.values()}
        assert len(places) == len(set(places)) and f"{len(places)} tokens, {len(paths)} leaves" in data["summary"]


def test_characters_of_several_tokens_are_whole_in_the_page():
    """Tokens are bytes here: the last of a character shows it."""
    tree, reward, advantage = hand_built_tree()
    for cell, byte in zip([(0, 0), (1, 0), (2, 0), (3, 0), (2, 1), (3, 1), (4, 1)], "a€".encode() + bytes([0xA9, 0x21, 0x22])):
        tree.token[cell] = byte  # a and the three bytes of a euro; after the first also one that does not go on with it
    decode = lambda ids: bytes(ids).decode("utf-8", "replace")
    data = data_of(draw.explore_tree(tree, decode, reward=reward, advantage=advantage))
    raw = dict(zip(zip(data["cells"]["row"], data["cells"]["column"]), data["raw"]))
    assert [raw[cell] for cell in [(0, 0), (1, 0), (2, 0), (3, 0)]] == ["a", "", "", "€"]
    assert (raw[2, 1], raw[3, 1], raw[4, 1]) == ("", "�!", '"')  # what was no character is shown as such


def test_the_page_is_one_piece_and_shows_itself_in_a_notebook(tmp_path):
    tree, reward, advantage = hand_built_tree()
    page = draw.explore_tree(tree, to_text, reward=reward, advantage=advantage, prompt="</script><img src=x onerror=alert(1)>")
    assert page.count("<script") == 2 and "<img" not in page and "http" not in page.replace("http://www.w3.org", "")
    frame = page._repr_html_()
    assert frame.startswith("<iframe srcdoc=") and frame.count("<") == 2 and html.unescape(re.search('srcdoc="([^"]*)"', frame)[1]) == page
    assert "height:380px" in frame and "height:450px" in draw.Page("<p>x</p>").frame()  # few lines, and a page of another kind
    many = random_tree(np.random.default_rng(0), rows=4, slots=16, roots=16, fork=0, end=0, prune=0)
    given = dict(reward=np.ones(16), advantage=np.zeros((4, 16)), prompt='"lanes": 99')
    assert "height:630px" in draw.explore_tree(many, to_text, **given).frame()
    page.save(tmp_path / "tree.html")
    assert (tmp_path / "tree.html").read_text(encoding="utf-8") == page
    with pytest.raises(ValueError, match=r"column quality has shape \(2, 2\)"):
        draw.explore_tree(tree, to_text, reward=reward, advantage=advantage, columns={"quality": np.zeros((2, 2))})


def test_what_is_known_of_rules_is_said_and_shown_as_text():
    """In the page's data and the drawing's hover; words and tokens that are HTML stay text."""
    tree, reward, advantage = hand_built_tree()
    texts = dict(zip("gq", ["<b>g</b>", "</script><i>q</i>"]))
    decode = lambda ids: "".join(texts.get(chr(i), chr(i)) for i in ids)
    given = dict(reward=reward, advantage=advantage, stops={(3, 2): "similar to <u>one</u>"})
    assert "\npruned: similar to &lt;u&gt;one&lt;/u&gt;</title>" in draw.draw_tree(tree, decode, **given)
    candidates, refusals = {None: [(ord("a"), 0.5), (ord("q"), 0.25), (ord("r"), 0.125)]}, {None: {ord("q"): "below <u>"}}
    page = draw.explore_tree(tree, decode, candidates=candidates, refusals=refusals, **given)
    assert page.count("<script") == 2 and "<u>" not in page and "<i>" not in page
    data = data_of(page)
    assert data["candidates"] == {
        "prompt": [["a", 0.5, ord("a"), ""], ["</script><i>q</i>", 0.25, ord("q"), "below <u>"], ["r", 0.125, ord("r"), ""]]
    }
    fates = dict(zip(zip(data["cells"]["row"], data["cells"]["column"]), data["cells"]["fate"]))
    assert fates[3, 2] == "pruned: similar to <u>one</u>" and fates[1, 2] == "truncated ✗ 0.1"
    assert {end["text"] for end in data["ends"] if not end["leaf"]} == {"pruned: similar"}  # beside the line, where room is short


def test_inner_tokens_of_a_pruned_line_say_why_and_those_of_several_do_not():
    tree, reward, advantage = hand_built_tree()
    tree.end[3, 2], tree.end[4, 2], tree.used[4, 2], tree.parent[4, 2] = 0, SIMILAR, True, 2
    stops = {(4, 2): "similar to one"}

    def fate():
        cells = data_of(draw.explore_tree(tree, to_text, reward=reward, advantage=advantage, stops=stops))["cells"]
        return dict(zip(zip(cells["row"], cells["column"]), cells["fate"]))

    assert fate()[3, 2] == "its line was pruned: similar to one" and fate()[4, 2] == "pruned: similar to one"
    assert fate()[2, 1] == "" and fate()[4, 1] == "✗ 0.0"  # leaves below, and one
    tree.parent[4, 3], tree.end[4, 3] = 2, SIMILAR
    stops[4, 3] = "similar to another"
    assert fate()[3, 2] == "its lines were pruned" and fate()[4, 3] == "pruned: similar to another"


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="install chromium to see pages as a browser does")


def in_browser(page, folder, script=""):
    """The page's elements after a script has run in it."""
    file = folder / "page.html"
    file.write_text(page.replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
    run = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--timeout=20000", "--dump-dom", file.as_uri()],
        capture_output=True, timeout=120, check=True,
    )  # fmt: skip
    return run.stdout.decode()


def elements(dom, tag, kind=""):
    """Texts of the elements of a tag whose class has a word."""
    found = re.findall(rf'<{tag}\b(?: id="\w+")?(?: class="([^"]*)")?[^>]*>(.*?)</{tag}>', dom, re.DOTALL)
    return [html.unescape(text) for words, text in found if kind in words.split() or not kind]


@needs_browser
def test_a_browser_shows_every_token_and_how_lines_ended(tmp_path):
    tree, reward, advantage = hand_built_tree()
    dom = in_browser(draw.explore_tree(tree, to_text, reward=reward, advantage=advantage, prompt="a question"), tmp_path)
    shown = elements(dom.split('id="view"')[1].split("<aside")[0], "b")
    assert sorted(filter(None, shown)) == sorted("abcedfhgtu")  # x hangs nowhere
    assert sorted(elements(dom, "b", "forced")) == ["d", "g"] and elements(dom, "b", "gone") == ["g"]
    assert sorted(elements(dom, "em")) == sorted(["✓ 1.0 · A +1.50", "✗ 0.0 · A -0.25", "truncated ✗ 0.1 · A +0.00", "pruned: similar"])
    assert "1 more of pruned lines partly overwritten" in dom and elements(dom, "pre") == ["a question"]


@needs_browser
def test_a_browser_answers_clicks_searches_and_colours(tmp_path):
    tree, reward, advantage = hand_built_tree()
    candidates = {(1, 0): [(ord("c"), 0.5), (ord("q"), 0.125)], None: [(ord("r"), 0.25)]}
    page = draw.explore_tree(tree, to_text, reward=reward, advantage=advantage, candidates=candidates, columns={"quality": np.ones((5, 4))})
    root = in_browser(page, tmp_path)
    assert "2 lines begin here" in root and ['"r"', "0.250", "not taken"] == elements(root, "td")[-3:]
    script = """
      [...document.querySelectorAll("b")].find(b => b.textContent === "b").click();
      at("search").value = "DF"; at("search").dispatchEvent(new Event("input"));
      at("colour").value = "quality"; at("colour").dispatchEvent(new Event("change"));"""
    dom = in_browser(page, tmp_path, script)
    cells = elements(dom, "td")
    assert "a fork into 2" in dom and cells[-9:] == [
        '"c"',
        "0.500",
        "drawn: 1 leaf, reward 1.000",
        '"d"',
        "0.250",
        "forced: 1 leaf, reward 0.000",
        '"q"',
        "0.125",
        "not taken",
    ]
    assert elements(dom, "pre") == ["(not given)", "ab"] and elements(dom, "b", "path") == ["a", "b"]
    assert elements(dom, "b", "found") == ["d", "f"] and elements(dom, "span")[-2:][0] == "1 found"
    full = re.findall(r"<b\b[^>]*rgb\(33, 102, 172\)[^>]*>(.)</b>", dom)  # the highest there is, but for what is grey
    assert sorted(full) == sorted("abcedfhtu")


@needs_browser
def test_a_browser_says_why_a_line_was_pruned_and_a_token_not_taken(tmp_path):
    tree, reward, advantage = hand_built_tree()
    given = dict(stops={(3, 2): "similar to <u>one</u>"}, candidates={None: [(ord("q"), 0.125)]}, refusals={None: {ord("q"): "below <u>"}})
    page = draw.explore_tree(tree, to_text, reward=reward, advantage=advantage, **given)
    assert elements(in_browser(page, tmp_path), "td")[-3:] == ['"q"', "0.125", "not taken: below <u>"]
    script = """
      const pruned = [...document.querySelectorAll("b")].find(b => b.textContent === "g");
      pruned.dispatchEvent(new MouseEvent("mouseover", {bubbles: true})); pruned.click();"""
    dom = in_browser(page, tmp_path, script)
    assert elements(dom, "p") == ["pruned: similar to <u>one</u>"]
    assert ", forced, pruned: similar to <u>one</u>" in html.unescape(re.search(r'<b [^>]*title="([^"]*)"[^>]*>g</b>', dom)[1])


@needs_browser
def test_a_browser_takes_text_for_text(tmp_path):
    tree, reward, advantage = hand_built_tree()
    texts = dict(zip("abcedfhgtu", ["<i>", "</script>", "&amp;", "\x00", "\n", "<!--", "'\"", "‮", "", "<b>x</b>"]))
    decode = lambda ids: "".join(texts.get(chr(i), chr(i)) for i in ids)
    dom = in_browser(draw.explore_tree(tree, decode, reward=reward, advantage=advantage, title="<u>t</u>"), tmp_path, "boxes[0].click()")
    shown = elements(dom.split('id="view"')[1].split("<aside")[0], "b")
    assert {"<i>", "</script>", "&amp;", "�", "↵", "<!--", "<b>x</b>", "∎"} <= set(shown)
    assert "<i>" not in dom.split("<main>")[1].split("<script")[0] and elements(dom, "h1") == ["<u>t</u>"]


@needs_browser
def test_a_browser_shows_a_tree_without_tokens_and_one_of_thousands(tmp_path):
    tree, reward, advantage = hand_built_tree()
    tree.used[:], tree.leaf[:] = False, -1
    dom = in_browser(draw.explore_tree(tree, to_text, reward=reward, advantage=advantage), tmp_path)
    assert "0 tokens, 0 leaves" in dom
    tree = random_tree(np.random.default_rng(0), rows=256, slots=16, roots=16, fork=0, end=0, prune=0)
    dom = in_browser(draw.explore_tree(tree, to_text, reward=np.ones(16), advantage=np.zeros((256, 16))), tmp_path)
    assert len(re.findall(r"<b\b[^>]*data-i", dom)) == 4096
