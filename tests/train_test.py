"""The host loop as a user starts it: killed and started again, it tells the same story."""
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from events_oracle import scalars
from profiling_test import traced_steps
from treerl import metrics

ROOT = pathlib.Path(__file__).resolve().parent.parent
STEPS = 12
SIZES = {  # sums of two numbers, which a model this small half learns at once
    "steps": STEPS,
    "checkpoint_every": 2,
    "task.train_size": 32,
    "task.heldout_size": 8,
    "task.numbers_min": 2,
    "task.numbers_max": 2,
    "task.operators": "+",
    "model.layers": 1,
    "model.width": 32,
    "model.heads": 2,
    "model.kv_heads": 1,
    "model.head_dim": 16,
    "model.hidden": 64,
    "sampler.prompts": 8,
    "sampler.slots": 4,
    "sampler.prompt_length": 8,
    "sampler.answer_length": 6,
    "sampler.temperature": 1.5,  # so that rewards of a group differ
    "learner.bin_tokens": 32,
    "optimizer.warmup_steps": 0,
    "warm_start.examples": 32,
    "warm_start.steps": 80,
    "warm_start.batch": 16,
    "warm_start.eval_every": 40,
    "warm_start.learning_rate": 0.01,
    "evaluation.every": 3,
    "evaluation.examples": 8,
    "evaluation.batch": 8,
    "evaluation.samples": 3,
}


def environment(folder: pathlib.Path) -> dict[str, str]:
    """Of a process on one CPU device that shares compiled programs with the others of the folder."""
    changes = dict(
        JAX_PLATFORMS="cpu",
        JAX_COMPILATION_CACHE_DIR=str(folder / "programs"),
        JAX_DISABLE_MOST_OPTIMIZATIONS="1",  # compiles in half the time
    )
    return {name: value for name, value in (os.environ | changes).items() if name != "XLA_FLAGS"}


def start(folder: pathlib.Path, workdir: str, *flags: str) -> subprocess.Popen:
    """Starts the training of SIZES in folder/workdir; runs of one folder share data and programs."""
    command = [sys.executable, "-m", "launch.train", "--config=experiments/countdown.py"]
    command += [f"--workdir={folder / workdir}", f"--config.data_dir={folder / 'data'}"]
    command += [*flags, *(f"--config.{name}={value}" for name, value in SIZES.items())]
    log = open(folder / f"{workdir}.log", "a")
    return subprocess.Popen(command, cwd=ROOT, env=environment(folder), stdout=subprocess.PIPE, stderr=log, text=True)


def finish(run: subprocess.Popen, log: pathlib.Path) -> dict:
    """Waits for a run; the JSON of the last line of its standard output."""
    output, _ = run.communicate()
    assert run.returncode == 0, log.read_text()[-4000:]
    return json.loads(output.splitlines()[-1])


def steps_written(path: pathlib.Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill_at(run: subprocess.Popen, path: pathlib.Path, step: int) -> None:
    """Kills a run, without a chance to clean up, once its metrics hold that many steps."""
    while run.poll() is None and steps_written(path) < step:
        time.sleep(0.002)
    run.send_signal(signal.SIGKILL)
    run.communicate()
    assert run.returncode == -signal.SIGKILL, f"the run ended by itself: {run.returncode}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One run killed in the middle and started again, and one left alone until its last line.

    (Then it is killed too: its report would cost time and show nothing new.)
    """
    folder = tmp_path_factory.mktemp("train")
    killed = folder / "killed"
    kill_at(start(folder, "killed"), killed / "metrics.jsonl", 5)
    before = (killed / "metrics.jsonl").read_text()
    saved = sorted(int(p.name) for p in (killed / "checkpoints/latest").iterdir() if p.name.isdigit())
    summary = finish(start(folder, "killed", f"--profile={STEPS - 1}:{STEPS}"), folder / "killed.log")
    kill_at(start(folder, "whole"), folder / "whole" / "metrics.jsonl", STEPS)
    return dict(folder=folder, before=before, saved=saved, summary=summary)


def story(workdir: pathlib.Path) -> list[dict]:
    """The lines of metrics.jsonl without their times."""
    return [{k: v for k, v in line.items() if k != "seconds"} for line in metrics.read(workdir / "metrics.jsonl")]


def test_the_run_was_killed_in_the_middle(runs):
    lines = runs["before"].splitlines()
    assert 5 <= len(lines) < STEPS
    assert runs["saved"] and 2 <= runs["saved"][-1] < STEPS  # it did not start over from the warm start


def test_a_killed_run_repeats_the_same_numbers(runs):
    """Bit for bit: metrics keep every bit of a float."""
    killed, whole = story(runs["folder"] / "killed"), story(runs["folder"] / "whole")
    assert [line["step"] for line in killed] == list(range(1, STEPS + 1))
    for mine, wanted in zip(killed, whole, strict=True):
        assert mine == wanted


def test_the_part_before_the_kill_is_the_same_story(runs):
    whole = story(runs["folder"] / "whole")
    for text, wanted in zip(runs["before"].splitlines(), whole):
        line = json.loads(text)
        line.pop("seconds")
        assert line == wanted


def test_the_numbers_are_worth_comparing(runs):
    """After the kill the policy learns, and pass@k is measured: no line is a line of zeros."""
    later = [line for line in story(runs["folder"] / "whole") if line["step"] > 6]
    assert sum(line["grad_norm"] > 0 for line in later) >= 4
    assert all(0 < line["reward"] < 1 for line in later)
    assert [line["step"] for line in later if "pass@1" in line] == [9, 12]


def test_event_files_tell_the_same_story(runs):
    """After a kill and a resume too: TensorBoard sees each step once."""
    for name in ("killed", "whole"):
        workdir = runs["folder"] / name
        tag = lambda key: ("eval/" if key.startswith("pass@") else "train/") + key
        lines = metrics.read(workdir / "metrics.jsonl")
        wanted = {line.pop("step"): {tag(key): np.float32(x) for key, x in line.items()} for line in lines}
        found = scalars(workdir / "tensorboard")
        if name == "whole" and len(found) < STEPS:  # killed between the two writes of its last step
            wanted.pop(STEPS)
        assert found == wanted
        curve = scalars(workdir / "tensorboard" / "warm_start")
        assert list(curve) == [40, 80]
        for line in curve.values():
            assert set(line) == {"warm_start/loss", "warm_start/pass@1", "warm_start/pass@2", "warm_start/pass@3"}


def test_the_profile_holds_the_steps_asked_for(runs):
    assert traced_steps(runs["folder"] / "killed" / "profile") == [STEPS - 1, STEPS]


def generate(runs, *flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "launch.generate", f"--workdir={runs['folder'] / 'killed'}", *flags]
    return subprocess.run(command, cwd=ROOT, env=environment(runs["folder"]), capture_output=True, text=True)


def test_generate_prints_a_graded_tree(runs):
    run = generate(runs, "--prompt= 3 5 = 8", "--best", "--seed=1")
    assert run.returncode == 0, run.stderr[-4000:]
    lines = run.stdout.splitlines()
    assert lines[:2] == ["3 5=8:", "prompt"]
    leaves = lines[lines.index("") + 2 :]
    assert len(leaves) == SIZES["sampler.slots"]
    for line in leaves:
        mark, reward, advantage, end, text = line.split(None, 4)
        right = end == "finished" and json.loads(text) in ("3+5", "5+3")
        assert (mark, reward) == (("✓", "1.0") if right else ("✗", "0.0")) and end in ("finished", "truncated")
        assert float(advantage) == 0 or (float(advantage) > 0) == right  # branch_depthwise: signs are those of GRPO


def test_generate_exits_with_one_sentence(runs):
    run = generate(runs, "--prompt=3 5")
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr == "--prompt='3 5' has no target; write one behind an equals sign, as in --prompt='1 2=3'.\n"


def test_a_prompt_too_long_for_the_run(runs):
    from types import SimpleNamespace

    from ml_collections import ConfigDict

    from treerl import tasks
    from treerl.train import Experiment

    config = ConfigDict(json.loads((runs["folder"] / "whole" / "config.json").read_text()))
    config.sampler.prompt_length = 6
    experiment = SimpleNamespace(config=config, task=tasks.make(config.task, config.data_dir))
    assert Experiment.parse(experiment, "3 5=8")["target"] == 8
    with pytest.raises(ValueError) as error:
        Experiment.parse(experiment, "3 5=12")
    assert str(error.value) == "--prompt='3 5=12' has 7 tokens and this run reads at most 6; give a shorter --prompt."


def test_summary(runs):
    """The last line on standard output, after a run that took two processes."""
    summary, last = runs["summary"], story(runs["folder"] / "killed")[-1]
    assert set(summary) == {
        "steps", "train_seconds", "pass@1_before", "pass@1_after", "pass@3_before", "pass@3_after",
    }  # fmt: skip
    assert summary["steps"] == STEPS and summary["train_seconds"] > 0
    assert (summary["pass@1_after"], summary["pass@3_after"]) == (last["pass@1"], last["pass@3"])
    assert 0 <= summary["pass@1_before"] <= summary["pass@3_before"] <= 1


def test_report(runs):
    page = (runs["folder"] / "killed" / "report.html").read_text()
    assert page.count('class="treerl-tree"') == 4 and page.count("leaves right; forks: ") == 4
    assert "Before and after" in page and "<th>before</th><th>after</th>" in page
    for name in ("pass@1", "pass@3"):
        before, after = (f"<td>{runs['summary'][f'{name}_{moment}']:.4g}</td>" for moment in ("before", "after"))
        assert f"<td>{name}</td>{before}{after}" in page


def test_only_what_the_design_names_is_written(runs):
    names = {p.name for p in (runs["folder"] / "killed").iterdir()}
    assert names == {"config.json", "metrics.jsonl", "tensorboard", "checkpoints", "report.html", "profile"}
    assert not list((runs["folder"] / "killed").rglob("*tmp*"))


def test_a_workdir_of_another_experiment_is_refused(runs, tmp_path):
    from ml_collections import ConfigDict

    from treerl.train import claim

    config = ConfigDict(json.loads((runs["folder"] / "whole" / "config.json").read_text()))
    workdir = tmp_path / "run"
    workdir.mkdir()
    claim(str(workdir), config)
    written = (workdir / "config.json").read_text()
    config.mesh.data = 1
    claim(str(workdir), config)  # other devices are the same experiment
    config.branching.tau_abs = 0.5
    with pytest.raises(ValueError) as error:
        claim(str(workdir), config)
    old = json.loads(written)["branching"]["tau_abs"]
    assert str(error.value) == (
        f"workdir={workdir} belongs to a run with branching.tau_abs={old!r}, not 0.5; "
        "give another --workdir, or the same config."
    )
    assert json.loads((workdir / "config.json").read_text())["branching"]["tau_abs"] == old
