"""Writes a checkpoint folder: config.json, sharded safetensors and their index, all or nothing. Knows no models."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ospnext.errors import CheckpointError, ConfigError
from ospnext.models.weights.checkpoint_files import CONFIG_NAME, INDEX_SUFFIX, WEIGHTS_STEM

_OWN_WEIGHTS = re.compile(rf"{WEIGHTS_STEM}(-\d{{5}}-of-\d{{5}})?\.safetensors(\.index\.json)?")


def plan_shards(num_bytes: Mapping[str, int], max_shard_size: int) -> list[list[str]]:
    """Tensor names in order, cut into shards of at most `max_shard_size` bytes; a larger tensor gets one of its own."""
    if max_shard_size < 1:
        raise ConfigError(f"max_shard_size must be a positive number of bytes, got {max_shard_size}")
    shards: list[list[str]] = []
    room = 0
    for name, size in num_bytes.items():
        if not shards or size > room:
            shards.append([])
            room = max_shard_size
        shards[-1].append(name)
        room -= size
    return shards


def write_checkpoint(
    directory: str | Path,
    config: Mapping[str, Any],
    num_bytes: Mapping[str, int],
    read: Callable[[str], torch.Tensor],
    max_shard_size: int,
) -> list[Path]:
    """Write the tensors named by `num_bytes`, fetched shard by shard through `read`; returns the weight files.

    All is written to a folder inside `directory` first, so a failure leaves what was there untouched. Files of an
    earlier checkpoint are replaced, others stay. Raises CheckpointError if `directory` is a file.
    """
    shards = plan_shards(num_bytes, max_shard_size)
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise CheckpointError(f"cannot write a checkpoint folder at {directory}: a file is there; give another path")
    created = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=directory))
    try:
        _write_json(staging / CONFIG_NAME, config)
        weights = _write_shards(staging, shards, num_bytes, read)
        _publish(staging, directory)
    except BaseException:
        shutil.rmtree(staging)
        if created:
            directory.rmdir()
        raise
    staging.rmdir()
    return [directory / name for name in weights]


def _write_shards(
    staging: Path, shards: list[list[str]], num_bytes: Mapping[str, int], read: Callable[[str], torch.Tensor]
) -> list[str]:
    count = len(shards)
    files = [f"{WEIGHTS_STEM}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    if count == 1:
        files = [f"{WEIGHTS_STEM}.safetensors"]
    for file, names in zip(files, shards, strict=True):
        # Readers of other libraries look for this metadata entry to tell PyTorch files from others.
        save_file({name: read(name) for name in names}, staging / file, metadata={"format": "pt"})
        # safetensors creates files only their owner may read; give them the mode any other new file here has.
        (staging / file).chmod((staging / CONFIG_NAME).stat().st_mode)
    if count > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(num_bytes.values())}, "weight_map": weight_map}
        _write_json(staging / f"{WEIGHTS_STEM}{INDEX_SUFFIX}", index)
    return files


def _publish(staging: Path, directory: Path) -> None:
    """Move the finished files into place.

    Readers refuse a folder without config.json, so that goes first and comes last: nobody, not even after a crash,
    reads a mixture of two checkpoints.
    """
    (directory / CONFIG_NAME).unlink(missing_ok=True)
    for file in directory.iterdir():
        if _OWN_WEIGHTS.fullmatch(file.name):
            file.unlink()
    for file in sorted(staging.iterdir()):
        if file.name != CONFIG_NAME:
            os.replace(file, directory / file.name)
    os.replace(staging / CONFIG_NAME, directory / CONFIG_NAME)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
