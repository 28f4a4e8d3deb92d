"""Files of a workdir, on a disk and in Google Cloud Storage by an emulator on this machine."""

import json
import pathlib
import re
import sys

import numpy as np
import pytest
from etils import epath
from events_test import Wandb, send

from treerl import config as C, files, metrics
from treerl.checkpoint import Checkpoints
from treerl.config import default
from treerl.errors import UserError
from treerl.events import EventFile, WandbRun
from treerl.workdir import claim, has_config, read_config, write_config


@pytest.fixture(scope="module")
def bucket():
    """gs://bucket, in the memory of this process; gcsfs finds it by the environment."""
    for package in ("gcsfs", "gcp_storage_emulator"):
        pytest.importorskip(package, reason=f"gs:// paths are tested with {package}, of the extra `test`")
    from gcp_storage_emulator.server import create_server

    server = create_server("localhost", 0, in_memory=True, default_bucket="bucket")
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", f"http://localhost:{server._api._httpd.server_address[1]}")
        yield "gs://bucket"
    server.stop()


@pytest.fixture(params=["disk", "store"])
def workdir(request, tmp_path):
    return str(tmp_path / "run") if request.param == "disk" else request.getfixturevalue("bucket") + "/" + tmp_path.name


def test_a_config(workdir):
    config = default()
    assert not has_config(workdir)
    claim(workdir, config)
    write_config(workdir, config)
    assert has_config(workdir) and read_config(workdir)["steps"] == config.steps
    claim(workdir, config)
    assert [path.name for path in epath.Path(workdir).iterdir()] == ["config.json"]


def test_a_config_of_the_first_treerl_with_this_version(tmp_path):
    """Where this fails, a field went, has another name or type, or is new: see VERSION and ADDED of treerl/config.py.

    With a new VERSION the golden file is written anew.
    """
    written = json.loads((pathlib.Path(__file__).parent / "config_golden.json").read_text())
    known = {name for name, _ in C.fields(default())}
    assert known - {name for name, _ in C.fields(written)} == set(C.ADDED)
    for version in ({}, dict(version=1)):  # runs before it was written have none
        (tmp_path / "config.json").write_text(json.dumps(written | version))
        found = read_config(str(tmp_path))
        assert {name for name, _ in C.fields(found)} == known and "version" not in found
        C.check(C.ConfigDict(found))
        claim(str(tmp_path), default())
        assert {name: x for name, x in C.fields(found) if name not in C.ADDED} == dict(C.fields(written))
        new = dict(C.fields(json.loads(default().to_json_best_effort())))
        assert all(x == new[name] for name, x in C.fields(found) if name in C.ADDED)


@pytest.mark.parametrize("change, words", [
    (dict(version=2), "is of version 2, not 1"),
    (dict(version=0, gone=["sampler.slots"]), "is of version 0, not 1; it lacks sampler.slots"),
    (dict(gone=["seed", "mesh"]), "lacks mesh.data, mesh.fsdp, mesh.tensor, seed"),
    (dict(sampler={}, new=3, text=dict(options=dict(digits=2))), "has new, unknown here; it lacks sampler.answer_length, sampler.lengths, "
     "sampler.pool_dtype, sampler.prompt_length, sampler.prompts and 22 more"),
])  # fmt: skip
def test_a_config_of_another_version(change, words, tmp_path):
    """Asked to go on, and to load, as evaluating, generating and exporting do."""
    from treerl.experiment import load

    write_config(str(tmp_path), default())
    written = json.loads((tmp_path / "config.json").read_text())
    for name in change.pop("gone", ()):
        section, _, field = name.rpartition(".")
        (written[section] if section else written).pop(field)
    (tmp_path / "config.json").write_text(json.dumps(written | change))
    message = (
        f"workdir={tmp_path} was made by another version of treerl: its config.json {words}; use the version that made it, or give "
        "another --workdir."
    )
    for ask in (lambda: claim(str(tmp_path), default()), lambda: load(str(tmp_path))):
        with pytest.raises(UserError, match=re.escape(message)):
            ask()


@pytest.mark.parametrize("text", ["[]", "3", "{", '{"sampler": 3}', '{"mesh": null}'])
def test_a_config_that_is_none(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(
        UserError, match="config.json is damaged; give another|version of treerl: its config.json lacks|has .*, unknown here"
    ):
        read_config(str(tmp_path))


def test_lines_of_a_run_that_goes_on(workdir):
    """An object store has them when they are uploaded, and closing uploads."""
    path, read = f"{workdir}/metrics.jsonl", lambda: [line["x"] for line in metrics.read(path)]
    with metrics.MetricsFile(path, 0) as lines:
        lines.write(1, dict(x=np.float32(0.5)))
        lines.upload()
        assert read() == [0.5]
        lines.write(2, dict(x=2))
        assert read() == ([0.5] if files.remote(path) else [0.5, 2])
    assert read() == [0.5, 2]
    with metrics.MetricsFile(path, 1) as lines:  # step 2 is done again
        lines.write(2, dict(x=3))
    assert read() == [0.5, 3]


def test_wandb_knows_its_run_again(workdir, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", wandb := Wandb())
    for first, last in ((1, 3), (3, 5)):
        with WandbRun("mine", workdir, {}, []) as run:
            send(run, range(first, last + 1))
            run.upload()
            assert json.loads(epath.Path(f"{workdir}/wandb/run.json").read_text())["step"] == last
    assert [step for step, _ in wandb.sent] == [1, 2, 3, 4, 5]
    assert len({asked["id"] for asked in wandb.asked}) == 1
    assert {asked["dir"] for asked in wandb.asked} == {None if files.remote(workdir) else workdir}


def test_events_and_pages(workdir):
    for step in (1, 2):
        with EventFile(f"{workdir}/tensorboard", step - 1) as events:
            events.write(step, dict(x=1.0))
    found = sorted(path.name for path in epath.Path(f"{workdir}/tensorboard").iterdir())
    assert len(found) == 2 and [name.split(".")[4] for name in found] == ["0000", "0001"]
    assert all(len((epath.Path(f"{workdir}/tensorboard") / name).read_bytes()) > 50 for name in found)
    files.write_text(f"{workdir}/deep/report.html", "page")
    assert epath.Path(f"{workdir}/deep/report.html").read_text() == "page"


def test_metrics_of_checkpoints(workdir):
    with Checkpoints(workdir) as checkpoints:
        checkpoints._write_metric(3, 0.5)
        checkpoints._write_metric(5, 0.25)
    with Checkpoints(workdir, read_only=True) as checkpoints:
        assert checkpoints._metrics == {3: 0.5, 5: 0.25}
        assert checkpoints.best_step is None  # none of them is there
