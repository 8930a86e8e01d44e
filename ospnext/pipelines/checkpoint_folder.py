"""Writing a checkpoint folder in one step: it appears complete or not at all. Knows nothing of what is in it."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ospnext.errors import CheckpointError
from ospnext.pipelines.strict_load import read_json

FOLDERS = ("scheduler", "text_encoder", "tokenizer", "transformer", "vae")
INDEX = "model_index.json"


@contextmanager
def replace_folder(target: str | Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield a new folder next to `target`; on success it takes the place of `target`, on any error it is removed.

    With `overwrite`, a WanPipeline checkpoint at `target` is replaced. A folder that holds anything else never is.
    """
    target = Path(target).expanduser().resolve()
    check_replaceable(target, overwrite=overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        _share(temporary)
        _swap(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_replaceable(target: str | Path, *, overwrite: bool) -> None:
    """CheckpointError unless a checkpoint may be written at `target`; cheap, so callers ask before long work."""
    target = Path(target).expanduser().resolve()
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target} is a file; a checkpoint is a folder, give another path")
    present = sorted(path.name for path in target.iterdir()) if target.is_dir() else []
    if not present:
        return
    foreign = [name for name in present if name not in (*FOLDERS, INDEX)]
    if foreign or INDEX not in present or read_json(target / INDEX).get("_class_name") != "WanPipeline":
        raise CheckpointError(
            f"{target} is not empty and not just a WanPipeline checkpoint (it has {', '.join(foreign or present)}); "
            "nothing was overwritten. Give another path, or empty that folder"
        )
    if not overwrite:
        raise CheckpointError(f"{target} already holds a checkpoint; overwrite=True (--overwrite) replaces it")


def _share(folder: Path) -> None:
    """Give every file the permissions of an ordinary new one: safetensors lets only their owner read its files."""
    ordinary = folder / ".mode"
    ordinary.touch()
    mode = ordinary.stat().st_mode
    ordinary.unlink()
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def _swap(temporary: Path, target: Path) -> None:
    if not target.exists():
        temporary.rename(target)
        return
    old = target.with_name(f".{target.name}.{uuid.uuid4().hex}.old")
    target.rename(old)
    try:
        temporary.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old)
