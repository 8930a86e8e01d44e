"""Files that are either complete or absent: written under a temporary name, then renamed."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from ospnext.errors import ConfigError


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` (UTF-8) in one step; an interruption leaves the old file."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes it private
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def check_writable(path: Path) -> None:
    """For what takes long: know before that `path` can be written after.

    Raises:
        ConfigError: it is a folder, or is in none that can be written to.
    """
    if path.is_dir():
        raise ConfigError(f"cannot write {path}: it is a folder; name a file, e.g. {path / 'result'}")
    if not path.parent.is_dir():
        raise ConfigError(f"cannot write {path}: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise ConfigError(f"cannot write {path}: folder {path.parent} is not yours to write to; name another")


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
