import gzip
import json
import logging
import pathlib
import subprocess
import sys

import jax
import pytest

from treerl import profiling

ROOT = pathlib.Path(__file__).resolve().parent.parent
MALFORMED = "--profile={!r} is no span of steps; write the first and the last of them, such as --profile=3:5."


def traced_steps(folder: pathlib.Path) -> list[int]:
    """Numbers of the steps in the only trace below a folder."""
    [path] = folder.glob("plugins/profile/*/*.trace.json.gz")
    assert len(list(path.parent.glob("*.xplane.pb"))) == 1
    found = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    marks = [event["args"] for event in found if event.get("name") == "train" and "args" in event]
    return sorted(int(mark["step_num"]) for mark in marks if "step_num" in mark)


def test_parse_span():
    assert profiling.parse_span("3:5", 5) == (3, 5)
    assert profiling.parse_span("7:7", 9) == (7, 7)
    assert profiling.parse_span(None, 5) is None


BAD = ["", "3", "3:", ":5", "a:b", "3-5", "5:3", "0:2", "-1:2", "3:5:7", "3.0:5", " 3:5", "٣:٥", "9" * 5000 + ":1"]


@pytest.mark.parametrize("text", BAD)
def test_malformed_spans(text):
    with pytest.raises(ValueError) as error:
        profiling.parse_span(text, 400)
    assert str(error.value) == MALFORMED.format(text)


def test_a_span_behind_the_end():
    with pytest.raises(ValueError) as error:
        profiling.parse_span("3:401", 400)
    assert str(error.value) == "--profile='3:401' ends after the run's last step; choose steps from 1 to 400."


def test_launch_exits_with_one_sentence(tmp_path):
    command = [sys.executable, "-m", "launch.train", "--config=experiments/countdown.py", "--profile=5:3"]
    run = subprocess.run([*command, f"--workdir={tmp_path / 'run'}"], cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (1, "", MALFORMED.format("5:3") + "\n")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("start, expected", [(0, [2, 3]), (2, [3])])  # from the start, and resumed inside the span
def test_only_the_span_is_traced(tmp_path, start, expected):
    with profiling.Trace(str(tmp_path), (2, 3), start) as trace:
        for number in range(start + 1, 6):
            with trace.step(number):
                jax.block_until_ready(jax.numpy.ones(3) + number)
    assert traced_steps(tmp_path) == expected


def test_an_interrupted_span_is_written(tmp_path):
    with pytest.raises(KeyboardInterrupt), profiling.Trace(str(tmp_path), (1, 9), 0) as trace:
        with trace.step(1):
            pass
        with trace.step(2):
            raise KeyboardInterrupt
    assert traced_steps(tmp_path) == [1, 2]


def test_no_span_and_a_span_that_is_over_trace_nothing(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        for span in (None, (1, 2)):
            with profiling.Trace(str(tmp_path), span, 2) as trace, trace.step(3):
                pass
    assert list(tmp_path.iterdir()) == []
    assert [record.getMessage() for record in caplog.records] == [
        "--profile=1:2 lies before step 3, where this run goes on: nothing is traced."
    ]
