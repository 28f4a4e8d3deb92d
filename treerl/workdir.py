"""The config.json of a run's folder, which says whose folder it is."""

import json

from etils import epath
from ml_collections import ConfigDict

from treerl.config import ADDED, VERSION, default, fields
from treerl.errors import UserError
from treerl.files import write_text


def claim(workdir: epath.PathLike, config: ConfigDict) -> None:
    """Checks that a workdir is new, or has a config.json with the same fields; writes nothing.

    Devices, folders of data, where and by how many processes answers are graded or games played, learner.max_skipped,
    samples_every, wandb and which checkpoints are kept may differ, and so may `steps` without a schedule over them.

    Raises:
      UserError: the workdir is a file, or belongs to another experiment; names the first field that differs.
    """
    if not has_config(workdir):
        if epath.Path(workdir).exists() and not epath.Path(workdir).is_dir():
            raise UserError(f"workdir={workdir} is a file; give a folder, or a name that is free.")
        return
    old, new = (_decisive(found) for found in (dict(fields(read_config(workdir))), dict(fields(json.loads(config.to_json_best_effort())))))
    free = ("steps",) if config.optimizer.schedule == "constant" else ()
    for name in sorted(old | new):
        if not name.startswith(free) and old.get(name) != new.get(name):
            why = f", and optimizer.schedule={config.optimizer.schedule} ends with them (constant ones can be lengthened)"
            raise UserError(
                f"workdir={workdir} belongs to a run with {name}={old.get(name)!r}, not {new.get(name)!r}{why * (name == 'steps')}; "
                "give another --workdir, or the same config."
            )


_FREE = ("mesh.", "data_dir", "learner.max_skipped", "samples_every", "wandb", "checkpoint_", "text.workers", "text.grading")


def _decisive(found: dict) -> dict:
    """Of a config's fields those that decide what a run does."""
    options = found.get("environment.options") or {}
    options = {k: v for k, v in options.items() if k not in ("workers", "live", "seconds", "folder")}
    return {k: v for k, v in found.items() if not k.startswith(_FREE)} | {"environment.options": options}


def telling(found: dict) -> dict:
    """Of a config's fields those by which runs are of one kind, whatever their seeds; {} of none."""
    return {k: v for k, v in _decisive(found).items() if k != "seed"} if found else {}


def has_config(workdir: epath.PathLike) -> bool:
    """Whether a run has claimed this folder."""
    return (epath.Path(workdir) / "config.json").exists()


def read_config(workdir: epath.PathLike) -> dict:
    """The fields in the config.json of a workdir; those of config.ADDED that it lacks have their defaults.

    Raises:
      UserError: there is none, it is damaged, or has other fields than this treerl knows, which it names.
    """
    version, found = _read(workdir)
    known = dict(fields(json.loads(default().to_json_best_effort())))
    for name in ADDED:
        section, _, field = name.rpartition(".")
        (found.setdefault(section, {}) if section else found).setdefault(field, known[name])
    there = dict(fields(found))
    unlike = [f"is of version {version}, not {VERSION}"] * (version != VERSION)
    for names, text in ((there.keys() - known, "has {}, unknown here"), (known.keys() - there, "lacks {}")):
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        unlike += [text.format(", ".join(sorted(names)[:5]) + more)] * bool(names)
    if unlike:
        raise UserError(
            f"workdir={workdir} was made by another version of treerl: its config.json {'; it '.join(unlike)}; use the version that "
            "made it, or give another --workdir."
        )
    return found


def read_fields(workdir: epath.PathLike) -> dict:
    """The fields in the config.json of a workdir by their dotted names, whichever treerl made it."""
    return dict(fields(_read(workdir)[1]))


def _read(workdir: epath.PathLike) -> tuple[int, dict]:
    """(version, fields) in a workdir's config.json."""
    path = epath.Path(workdir) / "config.json"
    try:
        found = json.loads(path.read_text())
        return found.pop("version", 1), found  # runs before it was written are of the first
    except OSError as error:
        raise UserError(f"workdir={workdir} has no config.json; give the workdir of a run made by launch.train.") from error
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{path} is damaged; give another --workdir, or put the run's own config there.") from error


def write_config(workdir: epath.PathLike, config: ConfigDict) -> None:
    """Writes config.json, with the version of its fields, into a workdir, made if missing; all of it or nothing."""
    written = dict(version=VERSION) | json.loads(config.to_json_best_effort())
    write_text(epath.Path(workdir) / "config.json", json.dumps(written, indent=2))
