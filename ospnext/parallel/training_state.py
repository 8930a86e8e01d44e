"""Checkpoints of training, written by all ranks together and read by any other number of them. Tensors are
safetensors, the rest is JSON: nothing is unpickled. What a state consists of is in portable_state.py.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.optim import Optimizer

from ospnext.atomic import write_text
from ospnext.errors import CheckpointError
from ospnext.ops.group_store import meet, names_of
from ospnext.parallel.portable_state import PortableState, give, room_for, state_of

MANIFEST = "training_state.json"

#: What a rank puts together in memory at once to write it, about.
FILE_BYTES = 512 * 1024**2

_FORMAT = 1
_SHOWN = 10

T = TypeVar("T")


def save_training_state(
    path: str | Path,
    model: nn.Module,
    optimizer: Optimizer,
    *,
    progress: Mapping[str, Any] | None = None,
    timeout: float = 1800.0,
) -> None:
    """Write a new folder `path`, which all ranks see. Each of them must call this, and writes its shards.

    It is written beside `path` and renamed in the end: what is at `path` is complete. After a failure nothing is there.

    Args:
        progress: what else is needed to go on, as JSON has it: the step, the place in the data.
        timeout: seconds that ranks may be apart.

    Raises:
        CheckpointError: on every rank, whichever of them failed: there is something at `path`, a rank does not see its
            folder or cannot write, or the optimizer has state that other ranks could not read.
    """
    path = Path(path)
    staging, leads = path.with_name(f".unfinished-{path.name}"), _leads()

    def together(act: Callable[[], T]) -> T:
        return _together(f"saving training state {path}", act, timeout)

    state = together(lambda: state_of(model, optimizer))
    together(lambda: _begin(path, staging) if leads else None)
    try:
        together(lambda: _require_seen(staging))
        together(lambda: _write(state.tensors, staging))
        together(lambda: _finish(state, dict(progress or {}), staging, path) if leads else None)
    except BaseException:
        if leads:
            shutil.rmtree(staging, ignore_errors=True)
        raise


def load_training_state(
    path: str | Path, model: nn.Module, optimizer: Optimizer, *, timeout: float = 1800.0
) -> dict[str, Any]:
    """Give model and optimizer the state of `path`, in place; returns its progress. Each rank must call this, and reads
    its shards: the number of ranks, and how they divide samples and parameters, may be another one than it was.

    The optimizer is of the same kind, with the same groups of parameters; its settings become those that were saved.

    Raises:
        CheckpointError: on every rank, whichever of them failed: the checkpoint is not finished or damaged, or of
            another model or optimizer; the message lists the differences. Unless what is wrong is inside a file of the
            right size, nothing has changed then.
    """
    path = Path(path)

    def together(act: Callable[[], T]) -> T:
        return _together(f"loading training state {path}", act, timeout)

    manifest = together(lambda: _read_manifest(path))
    together(lambda: _require_readable(path, manifest["files"]) if _leads() else None)
    groups = manifest["param_groups"]
    state = together(lambda: room_for(model, optimizer, manifest["tensors"], groups))
    together(lambda: _read(state.tensors, path))
    give(state, groups, model, optimizer)
    return manifest["progress"]


def _begin(path: Path, staging: Path) -> None:
    if path.exists():
        raise CheckpointError("there is something at that path already; give a new one, or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    if staging.exists():  # of a job that was killed
        shutil.rmtree(staging)
    staging.mkdir()


def _require_seen(staging: Path) -> None:
    if not staging.is_dir():
        raise CheckpointError(f"{staging} is not there: its folder must be one that all ranks see")


def _write(tensors: dict[str, Tensor], staging: Path) -> None:
    writer = dcp.HuggingFaceStorageWriter(str(staging), _file_numbers(tensors), save_distributed=True)
    with _as_told():
        dcp.save(tensors, storage_writer=writer)


def _file_numbers(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Tensors by number of the file: each rank has one of that number, with its parts of them."""
    numbers, before = {}, 0
    for name, tensor in tensors.items():
        numbers[name] = 1 + before // (FILE_BYTES * _ranks())
        before += tensor.numel() * tensor.itemsize
    return numbers


def _finish(state: PortableState, progress: dict[str, Any], staging: Path, path: Path) -> None:
    manifest = {
        "format": _FORMAT,
        "ranks": _ranks(),
        "progress": progress,
        "param_groups": state.groups,
        "files": {file.name: file.stat().st_size for file in sorted(staging.iterdir())},
        "tensors": state.specs,
    }
    try:
        text = json.dumps(manifest, indent=1)
    except TypeError as error:
        raise CheckpointError(f"progress or a setting of the optimizer is nothing that JSON has: {error}") from error
    write_text(staging / MANIFEST, text + "\n")
    os.rename(staging, path)


def _read_manifest(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise CheckpointError("there is no such folder")
    file = path / MANIFEST
    if not file.is_file():
        raise CheckpointError(f"it has no {MANIFEST}: it was not finished, or is something else. Take an earlier one")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        sizes, version = manifest["files"], manifest["format"]
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{MANIFEST} is damaged ({error!r}). Take an earlier checkpoint") from error
    if version != _FORMAT:
        raise CheckpointError(f"it is of format {version}, this version reads {_FORMAT}")
    found = {name: (path / name).stat().st_size if (path / name).is_file() else "none" for name in sizes}
    if wrong := [f"{name} ({found[name]} of {size} bytes)" for name, size in sizes.items() if found[name] != size]:
        raise CheckpointError(
            f"{len(wrong)} of its {len(sizes)} files are not as they were written: {', '.join(wrong[:_SHOWN])}"
            f"{', ...' if len(wrong) > _SHOWN else ''}. Copy it again, or take an earlier one"
        )
    return manifest


def _require_readable(path: Path, names: Iterable[str]) -> None:
    """That what is as long as it was is safetensors still; PyTorch would not say which file is not."""
    for name in names:
        try:
            with safe_open(path / name, framework="pt"):
                pass
        except SafetensorError as error:
            raise CheckpointError(f"{name} is damaged ({error}). Copy it again, or take an earlier one") from error


def _read(tensors: dict[str, Tensor], path: Path) -> None:
    with _as_told():
        dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(path)))


def _leads() -> bool:
    return _ranks() == 1 or dist.get_rank() == 0


def _ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _together(what: str, act: Callable[[], T], timeout: float) -> T:
    """The result of `act`, called on every rank.

    Raises:
        CheckpointError: on all of them, if it failed on one.
    """
    error, message = None, ""
    try:
        result = act()
    except Exception as found:  # the others hear of it, instead of waiting for this rank, and all of them raise
        error, message = found, str(found) if isinstance(found, CheckpointError) else repr(found)
    said = [message] if _ranks() == 1 else meet(what, message, None, timeout)
    failed = [rank for rank, text in enumerate(said) if text]
    if failed:
        where = f" on {names_of(failed)}" if _ranks() > 1 else ""
        raise CheckpointError(f"{what} failed{where}: {said[failed[0]]}") from error
    return result


@contextmanager
def _as_told() -> Iterator[None]:
    """Without the warning that one process is alone, as is meant, and with errors that are errors: PyTorch's has the
    failures of all ranks, and is no Exception.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            yield
    except CheckpointException as error:
        rank, (failure, _) = min(error.failures.items())
        raise CheckpointError(f"{failure!r} (rank {rank})") from error
