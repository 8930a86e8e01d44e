"""Rewrites a checkpoint in another naming, dtype or sharding, one shard in memory at a time. Builds no model."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ospnext.models.loading import DEFAULT_SHARD_SIZE, LoadReport, check_checkpoint, in_naming, parameter_dtype
from ospnext.models.weights.check import DTYPES
from ospnext.models.weights.config_files import config_json
from ospnext.models.weights.keymaps import Naming
from ospnext.models.weights.writer import write_checkpoint

logger = logging.getLogger("ospnext")


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    naming: Naming,
    dtype: torch.dtype | None = None,
    config_overrides: Mapping[str, Any] | None = None,
    max_shard_size: int = DEFAULT_SHARD_SIZE,
) -> LoadReport:
    """Read any checkpoint `load_transformer` reads and write it as a folder in `naming`; returns what was read.

    `dtype=None` keeps every tensor as it is stored, bit for bit; otherwise parameters get the dtype they would have in
    a model loaded with `dtype`. `config_overrides` end up in the written config.json. Errors as in `load_transformer`.
    """
    checked = check_checkpoint(source, dtype=dtype, config_overrides=config_overrides)
    origin, dtypes, num_bytes = {}, {}, {}
    for file in checked.checkpoint.files:
        for stored, tensor in file.tensors.items():
            official = checked.keys.official[stored]
            name = in_naming(official, naming)
            origin[name] = file, stored
            dtypes[name] = DTYPES[tensor.dtype] if dtype is None else parameter_dtype(official, dtype)
            num_bytes[name] = tensor.numel * dtypes[name].itemsize

    def read(name: str) -> torch.Tensor:
        file, stored = origin[name]
        return file.read(stored).to(dtypes[name]).contiguous()

    weights = write_checkpoint(destination, config_json(checked.report.config, naming), num_bytes, read, max_shard_size)
    logger.info("converted %s into %s: %d files, %s Wan names", checked.report, destination, len(weights), naming)
    return checked.report
