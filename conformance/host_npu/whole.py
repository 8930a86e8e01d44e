"""Folders that are either complete or absent, also when two processes make one at a time."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from ospnext.errors import ConfigError


def whole_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Make `target` unless it is there: fill a folder next to it, then rename it. Who comes second throws theirs away.

    Raises:
        ConfigError: the place cannot be written to.
    """
    if target.is_dir():
        return
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    except OSError as error:
        raise ConfigError(
            f"cannot write to {target.parent}: {error.strerror}; set XDG_CACHE_HOME to a folder"
        ) from None
    try:
        scratch.chmod(0o755)  # mkdtemp makes it private
        fill(scratch)
        os.rename(scratch, target)
    except OSError as error:
        if not target.is_dir():
            raise ConfigError(f"cannot make {target}: {error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
