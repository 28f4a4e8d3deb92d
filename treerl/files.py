"""Files on a disk, or in an object store such as gs://, where nothing can be appended to."""

import os
import tempfile

from etils import epath


def write_text(path, text: str) -> None:
    """Writes a file, its folder made if missing; all of it or nothing."""
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if remote(path):  # an object appears when it is complete
        path.write_text(text)
        return
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def remote(path) -> bool:
    """Whether a path is in an object store, where nothing can be appended."""
    return "://" in os.fspath(path)


class Growing:
    """A file that is appended to: `path` itself or, of an object store, a copy here that `upload` puts there.

    Args:
      path: its folder is made if missing, and the copy begins with what is there.
    """

    def __init__(self, path):
        self.path, self._remote = os.fspath(path), None
        if not remote(path):
            os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
            return
        self._remote, self._folder = epath.Path(path), tempfile.TemporaryDirectory()
        self.path = os.path.join(self._folder.name, self._remote.name)
        if self._remote.exists():
            with open(self.path, "wb") as file:
                file.write(self._remote.read_bytes())

    def upload(self) -> None:
        """Puts what is written so far into the store; on a disk it is there."""
        if self._remote is not None:
            with open(self.path, "rb") as file:
                self._remote.write_bytes(file.read())
