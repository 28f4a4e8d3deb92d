"""The config.json of a run's folder, which says whose folder it is."""
import json

from etils import epath
from ml_collections import ConfigDict

from treerl.config import fields
from treerl.errors import UserError
from treerl.files import write_text


def claim(workdir: str, config: ConfigDict) -> None:
    """Checks that a workdir is new, or has a config.json with the same fields; writes nothing.

    Devices, folders of data, where and by how many processes answers are graded or games played, learner.max_skipped,
    samples_every and which checkpoints are kept may differ, and so may `steps` without a schedule over them.

    Raises:
      UserError: the workdir belongs to another experiment; names the first field that differs.
    """
    if not has_config(workdir):
        return
    old, new = (_decisive(found) for found in (read_fields(workdir), dict(fields(json.loads(config.to_json_best_effort())))))
    free = ("steps",) if config.optimizer.schedule == "constant" else ()
    for name in sorted(old | new):
        if not name.startswith(free) and old.get(name) != new.get(name):
            raise UserError(
                f"workdir={workdir} belongs to a run with {name}={old.get(name)!r}, not {new.get(name)!r}; "
                "give another --workdir, or the same config."
            )


_FREE = ("mesh.", "data_dir", "learner.max_skipped", "samples_every", "checkpoint_", "text.workers", "text.grading")


def _decisive(found: dict) -> dict:
    """Of a config's fields those that decide what a run does."""
    options = found.get("environment.options") or {}
    options = {k: v for k, v in options.items() if k not in ("workers", "live", "seconds", "folder")}
    return {k: v for k, v in found.items() if not k.startswith(_FREE)} | {"environment.options": options}


def telling(found: dict) -> dict:
    """Of a config's fields those by which runs are of one kind, whatever their seeds; {} of none."""
    return {k: v for k, v in _decisive(found).items() if k != "seed"} if found else {}


def has_config(workdir: str) -> bool:
    """Whether a run has claimed this folder."""
    return (epath.Path(workdir) / "config.json").exists()


def read_config(workdir: str) -> dict:
    """The config.json of a workdir."""
    path = epath.Path(workdir) / "config.json"
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise UserError(
            f"workdir={workdir} has no config.json; give the workdir of a run made by launch.train."
        ) from error
    except ValueError as error:
        raise UserError(f"{path} is damaged; give another --workdir, or put the run's own config there.") from error


def read_fields(workdir: str) -> dict:
    """The fields of a workdir's config.json by their dotted names."""
    return dict(fields(read_config(workdir)))


def write_config(workdir: str, config: ConfigDict) -> None:
    """Writes config.json into a workdir, made if missing; all of it or nothing."""
    write_text(epath.Path(workdir) / "config.json", config.to_json_best_effort(indent=2))
