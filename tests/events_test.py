import logging
import os

import jax.numpy as jnp
import numpy as np

from events_oracle import crc32c, scalars
from treerl import events


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
    assert scalars(tmp_path) == {
        step: {"train/a": float(step + 100 * resume)} for step, resume in [(1, 0), (2, 0), (3, 0), (4, 3), (5, 3)]
    }


def test_grouped_tags():
    assert events.grouped({"loss": 1, "pass@8": 2}) == {"train/loss": 1, "eval/pass@8": 2}


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path, caplog):
    folder = tmp_path / "tensorboard"
    folder.write_text("a file")
    with caplog.at_level(logging.WARNING), events.EventFile(folder, resume_step=0) as file:
        file.write(1, {"train/a": 1.0})
    assert [record.getMessage() for record in caplog.records] == [
        f"{folder} cannot be written (File exists): the run goes on without event files; metrics.jsonl has its numbers."
    ]


def test_a_full_disk_is_one_warning(tmp_path, caplog, monkeypatch):
    """/dev/full refuses every byte, as a full disk does."""
    full = lambda path, mode, buffering: open("/dev/full", "wb", buffering=buffering)
    monkeypatch.setattr(events, "open", full, raising=False)
    with caplog.at_level(logging.WARNING), events.EventFile(tmp_path, resume_step=0) as file:
        for step in range(50):
            file.write(step, {"train/a": 1.0})
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path} cannot be written (No space left on device): the run goes on without event files; "
        "metrics.jsonl has its numbers."
    ]


def test_a_record_that_fits_in_part_is_a_full_disk_too(tmp_path, caplog):
    class Half:
        def write(self, data):
            return len(data) // 2

        def close(self):
            pass

    file = events.EventFile(tmp_path, resume_step=0)
    file._file.close()
    file._file = Half()
    with caplog.at_level(logging.WARNING):
        file.write(1, {"train/a": 1.0})
        file.write(2, {"train/a": 1.0})
    assert len(caplog.records) == 1 and os.strerror(28) in caplog.text
