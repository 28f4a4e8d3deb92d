"""Files of a workdir, on a disk and in Google Cloud Storage by an emulator on this machine."""
import numpy as np
import pytest
from etils import epath

from treerl import files, metrics
from treerl.checkpoint import Checkpoints
from treerl.config import default
from treerl.events import EventFile
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
