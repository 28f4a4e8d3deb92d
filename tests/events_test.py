import importlib.machinery
import importlib.util
import json
import os
import re
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest
from events_oracle import crc32c, scalars, wandb_lines

from treerl import events
from treerl.errors import UserError


def test_the_oracle_knows_the_checksum():
    assert crc32c(b"123456789") == 0xE3069283  # RFC 3720's own example


def test_scalars_come_back_as_float32(tmp_path):
    with events.EventFile(tmp_path / "new" / "folder", resume_step=0) as file:
        file.write(1, {"train/a": 1 / 3, "train/n": np.int32(7), "eval/x": jnp.bfloat16(0.5), "gone": None})
        file.write(np.int64(2), {"train/a": float("nan"), "train/yes": np.bool_(True)})
    lines = scalars(tmp_path / "new" / "folder")
    assert lines[1] == {"train/a": np.float32(1 / 3), "train/n": 7.0, "eval/x": 0.5}
    assert list(lines) == [1, 2] and np.isnan(lines[2]["train/a"]) and lines[2]["train/yes"] == 1.0


def test_every_step_is_on_disk_at_once(tmp_path):
    file = events.EventFile(tmp_path, resume_step=0)
    file.write(1, {"train/a": 2.0})
    assert scalars(tmp_path) == {1: {"train/a": 2.0}}
    file.close()


def test_a_resumed_run_replaces_the_steps_it_repeats(tmp_path):
    """Three processes, the first killed in the middle of a record, all within a second."""
    for resume, steps in ((0, range(1, 8)), (5, range(6, 10)), (3, range(4, 6))):
        with events.EventFile(tmp_path, resume) as file:
            for step in steps:
                file.write(step, {"train/a": float(step + 100 * resume)})
        if resume == 0:
            [first] = tmp_path.iterdir()
            first.write_bytes(first.read_bytes()[:-5])
    assert scalars(tmp_path) == {step: {"train/a": float(step + 100 * resume)} for step, resume in [(1, 0), (2, 0), (3, 0), (4, 3), (5, 3)]}


def test_grouped_tags():
    assert events.grouped({"loss": 1, "pass@8": 2}) == {"train/loss": 1, "eval/pass@8": 2}


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path, capsys):
    folder = tmp_path / "tensorboard"
    folder.write_text("a file")
    with events.EventFile(folder, resume_step=0) as file:
        file.write(1, {"train/a": 1.0})
    assert capsys.readouterr().err == (
        f"{folder} cannot be written (File exists): the run goes on without event files; metrics.jsonl has its numbers.\n"
    )


def test_a_full_disk_is_one_warning(tmp_path, capsys, monkeypatch):
    """/dev/full refuses every byte, as a full disk does."""
    full = lambda path, mode, buffering: open("/dev/full", "wb", buffering=buffering)
    monkeypatch.setattr(events, "open", full, raising=False)
    with events.EventFile(tmp_path, resume_step=0) as file:
        for step in range(50):
            file.write(step, {"train/a": 1.0})
    assert capsys.readouterr().err == (
        f"{tmp_path} cannot be written (No space left on device): the run goes on without event files; metrics.jsonl has its numbers.\n"
    )


def test_a_record_that_fits_in_part_is_a_full_disk_too(tmp_path, capsys):
    class Half:
        def write(self, data):
            return len(data) // 2

        def close(self):
            pass

    file = events.EventFile(tmp_path, resume_step=0)
    file._file.close()
    file._file = Half()
    file.write(1, {"train/a": 1.0})
    file.write(2, {"train/a": 1.0})
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and os.strerror(28) in told


# --- Weights & Biases ------------------------------------------------------------------------------


def lines(steps, own=0.0) -> list[dict]:
    return [{"step": step, "reward": step / 3 + own, "pass@1": 0.5, "kl": None} for step in steps]


def send(run, steps, own=0.0) -> None:
    for line in lines(steps, own):
        run.write(line.pop("step"), line)


def test_wandb_itself_takes_each_step_once(tmp_path, monkeypatch):
    """Offline: a run that goes on from step 5 after it had sent 7, and one that asks for W&B from step 4 on."""
    wandb = pytest.importorskip("wandb", reason="its own files are read where the package is installed, of the extra `test`")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_CONSOLE", "off")
    for folder, first in (("run", []), ("late", lines(range(1, 4)))):
        workdir = tmp_path / folder
        workdir.mkdir()
        with events.WandbRun("mine", str(workdir), dict(sampler=dict(slots=8)), first) as run:
            send(run, range(len(first) + 1, 8))
        wandb.teardown()  # as a process ends: W&B's own closes the file only then
        with events.WandbRun("mine", str(workdir), {}, lines(range(1, 6))) as run:
            send(run, range(6, 10), own=1.0)
        wandb.teardown()
        files = sorted(workdir.glob("wandb/offline-run-*/run-*.wandb"))
        name = json.loads((workdir / "wandb/run.json").read_text())["id"]
        assert [file.name for file in files] == [f"run-{name}.wandb"] * 2
        found = [line for file in files for line in wandb_lines(file)]
        wanted = [*lines(range(1, 8)), *lines(range(8, 10), own=1.0)]
        assert found == [(line["step"], {"reward": line["reward"], "pass@1": 0.5}) for line in wanted]


class Wandb(types.ModuleType):
    """As much of wandb as is called: what was asked of init, and what was logged; `fails` names what raises."""

    def __init__(self):
        super().__init__("wandb")
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None, origin="here")
        self.fails, self.asked, self.sent, self.resumed, self.starting_step, self.ended = set(), [], [], False, 0, []

    def _reach(self, name):
        if name in self.fails:
            raise ConnectionError(f"no route to {name}\nand more")

    def login(self, verify):
        assert not verify
        self._reach("login")

    def init(self, **asked):
        self.asked.append(asked)
        self._reach("init " + asked.get("mode", "online"))
        return self

    def teardown(self):
        self.asked[-1]["given up"] = True

    def log(self, values, step):
        self._reach("log")
        self.sent.append((step, values))

    def finish(self, exit_code):
        self._reach("finish")
        self.ended.append(exit_code)


@pytest.fixture
def wandb(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", Wandb())
    monkeypatch.delenv("WANDB_MODE", raising=False)
    for name in ("WANDB_CONSOLE", "WANDB_FINISH_TIMEOUT"):
        monkeypatch.setenv(name, "1")
    return sys.modules["wandb"]


def test_what_wandb_is_asked_for(wandb, tmp_path):
    with pytest.raises(KeyError), events.WandbRun("mine", str(tmp_path / "run"), dict(steps=3), []) as run:
        send(run, [1])
        raise KeyError
    [asked] = wandb.asked
    assert re.fullmatch("[0-9a-f]{8}", asked.pop("id"))
    assert asked == dict(project="mine", name="run", resume="allow", dir=str(tmp_path / "run"), config=dict(steps=3))
    assert wandb.ended == [1]


def test_the_server_knows_which_steps_it_has(wandb, tmp_path):
    """More than run.json says, or less where a machine was lost with what it had not sent."""
    with events.WandbRun("mine", str(tmp_path), {}, []) as run:
        send(run, range(1, 6))
    for had, wanted in ((3, [4, 5, 6, 7]), (6, [7])):
        wandb.sent, wandb.resumed, wandb.starting_step = [], True, had + 1
        with events.WandbRun("mine", str(tmp_path), {}, lines(range(1, 6))) as run:
            send(run, range(6, 8))
        assert [step for step, _ in wandb.sent] == wanted
    assert len({asked["id"] for asked in wandb.asked}) == 1 and wandb.ended == [0, 0, 0]


def test_a_killed_run_had_noted_every_step(wandb, tmp_path):
    """Nothing is closed: without a server to ask, the next process knows all the same what was sent."""
    send(events.WandbRun("mine", str(tmp_path), {}, []), range(1, 8))
    with events.WandbRun("mine", str(tmp_path), {}, lines(range(1, 6))) as run:
        send(run, range(6, 10), own=1.0)
    assert [step for step, _ in wandb.sent] == list(range(1, 10))
    assert wandb.sent[6][1]["reward"] == 7 / 3 and wandb.sent[7][1]["reward"] == 8 / 3 + 1.0


def test_without_a_network_the_run_goes_on(wandb, tmp_path, capsys):
    wandb.fails = {"init online"}
    with events.WandbRun("mine", str(tmp_path), {}, []) as run:
        send(run, [1, 2])
    assert [step for step, _ in wandb.sent] == [1, 2] and wandb.asked[0].pop("given up")
    assert wandb.asked[1] == wandb.asked[0] | dict(mode="offline")
    assert capsys.readouterr().err == "W&B cannot be reached (no route to init online): its files are kept for wandb sync.\n"


@pytest.mark.parametrize("fails, sent", [({"log"}, 0), ({"finish"}, 2), ({"init online", "init offline"}, 0)])
def test_whatever_fails_is_one_warning(fails, sent, wandb, tmp_path, capsys):
    wandb.fails = fails
    with events.WandbRun("mine", str(tmp_path), {}, []) as run:
        send(run, [1, 2])
        run.upload()
    assert len(wandb.sent) == sent
    last = sorted(fails)[-1] if "log" in fails or "finish" in fails else "init offline"
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"W&B takes nothing more (no route to {last}): the run goes on without it; metrics.jsonl has its numbers."
    )


def test_wandb_that_is_not_there(monkeypatch, tmp_path):
    """A folder that W&B made is not the package."""
    message = "wandb='mine' needs the package wandb; pip install wandb, or set wandb=''."
    (tmp_path / "wandb").mkdir()
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert importlib.util.find_spec("wandb")
    for _ in range(2):
        with pytest.raises(UserError, match=re.escape(message)):
            events.check_wandb("mine")
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    events.check_wandb("")


def test_wandb_without_an_account(wandb, monkeypatch):
    events.check_wandb("mine")
    wandb.fails = {"login"}
    with pytest.raises(UserError) as error:
        events.check_wandb("mine")
    assert str(error.value) == (
        "wandb='mine' has no account to write to (no route to login); log in, or set WANDB_MODE=offline in the environment to "
        "keep the numbers on disk for wandb sync."
    )
    monkeypatch.setenv("WANDB_MODE", "offline")
    events.check_wandb("mine")
