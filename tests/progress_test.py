"""What standard error shows of a loop, on a terminal and in a log."""

import io
import re
import sys

import pytest

from treerl import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown(stream, monkeypatch, steps=40, initial=0, **more) -> str:
    monkeypatch.setattr(sys, "stderr", stream)
    bar = progress.bar("train", steps, initial=initial, **more)
    for number in bar:
        bar.set_postfix_str(progress.words(number / 100, 0.25, 12345.6), refresh=False)
    return stream.getvalue()


def test_a_log_has_a_line_now_and_then(monkeypatch):
    """The first and the last, nothing between within `EVERY`; no carriage return, no bar."""
    text = shown(io.StringIO(), monkeypatch)
    assert re.fullmatch(
        r"train:  ?0/40 \[00:00<\?, \?step/s\]\n"
        r"train: 40/40 \[00:00<00:00, [0-9.]+step/s, reward 0\.400, pass@1 0\.250, 12,346 tokens/s\]\n",
        text,
    )


def test_a_log_of_slow_steps_has_a_line_for_each(monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.0)
    found = [line.split()[1] for line in shown(io.StringIO(), monkeypatch, steps=9, initial=5).splitlines()]
    assert found == ["5/9", "6/9", "7/9", "8/9", "9/9"]


def test_a_terminal_has_a_bar(monkeypatch):
    text = shown(Terminal(), monkeypatch)
    assert text.count("\n") == 1 and "\r" in text
    assert re.search(r"100%\|.*\| 40/40 \[00:00<00:00, .*step/s, reward 0\.400, pass@1 0\.250, 12,346 tokens/s\]", text)


def test_nothing_where_nobody_looks(monkeypatch):
    assert shown(io.StringIO(), monkeypatch, show=False) == shown(Terminal(), monkeypatch, show=False) == ""


@pytest.mark.parametrize("reward, speed, wanted", [(None, 9.7, "pass@1 0.500, 10 tokens/s"), (0.25, None, "reward 0.250, pass@1 0.500")])
def test_numbers_that_are_not_finite_are_left_out(reward, speed, wanted):
    assert progress.words(reward, 0.5, speed) == wanted
