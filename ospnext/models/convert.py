"""Rewrites a checkpoint: naming, dtype, sharding, HiFloat8 codes; one shard in memory at a time. Builds no model."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ospnext.errors import ConfigError
from ospnext.models.hif8_linear import quantized_weight
from ospnext.models.loading import DEFAULT_SHARD_SIZE, LoadReport, check_checkpoint, in_naming, parameter_dtype
from ospnext.models.quant_policy import LINEARS, QuantPolicy
from ospnext.models.weights.check import STORED_DTYPES
from ospnext.models.weights.config_files import config_json
from ospnext.models.weights.keymaps import Naming
from ospnext.models.weights.quantized import Quantization, scale_name
from ospnext.models.weights.shapes import parameter_shapes
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
    quant: QuantPolicy | None = None,
) -> LoadReport:
    """Read any checkpoint `load_transformer` reads and write it as a folder in `naming`; returns what was read.

    `dtype=None` keeps every tensor as it is stored, bit for bit; otherwise parameters get the dtype they would have in
    a model loaded with `dtype`. Codes that are stored already, and their scales, stay as they are in any case.
    `config_overrides` end up in the written config.json. Errors as in `load_transformer`.

    `quant` stores linears as HiFloat8 codes: the same tensors as of a model that was loaded with `dtype`, went through
    `quantize_model(..., store=True)` and was saved. A `dtype` rounds weights before they are quantized. ConfigError if
    it names no linears, or if the checkpoint is quantized already.
    """
    checked = check_checkpoint(source, dtype=dtype, config_overrides=config_overrides)
    report = checked.report
    quantization = report.quantization if quant is None else _asked(quant, report)
    new = {} if quant is None else {f"{name}.weight": recipe for name, recipe in quantization.linears.items()}
    fixed_before, fixed = report.quantization.dtypes, quantization.dtypes
    shapes = quantization.shapes(parameter_shapes(report.config))
    origin, dtypes, recipes, num_bytes = {}, {}, {}, {}
    for file in checked.checkpoint.files:
        for stored, tensor in file.tensors.items():
            official = checked.keys.official[stored]
            name = in_naming(official, naming)
            origin[name] = file, stored
            if dtype is None or official in fixed_before:
                dtypes[name] = STORED_DTYPES[tensor.dtype]
            else:
                dtypes[name] = parameter_dtype(official, dtype)
            num_bytes[name] = tensor.numel * fixed.get(official, dtypes[name]).itemsize
            if official in new:
                recipes[name] = new[official]
                scale = scale_name(official)
                num_bytes[scale_name(name)] = math.prod(shapes[scale]) * fixed[scale].itemsize
    scales: dict[str, torch.Tensor] = {}

    def read(name: str) -> torch.Tensor:
        if name in scales:  # a scale comes right after its codes, with which it was computed
            return scales.pop(name)
        file, stored = origin[name]
        tensor = file.read(stored).to(dtypes[name])
        if name not in recipes:
            return tensor.contiguous()
        codes, scales[scale_name(name)] = quantized_weight(tensor, recipes[name])
        return codes

    config = config_json(report.config, naming) | quantization.config_entry(report.config.num_layers)
    weights = write_checkpoint(destination, config, num_bytes, read, max_shard_size)
    made = f", {quantization}" if quantization else ""
    logger.info("converted %s into %s: %d files, %s Wan names%s", report, destination, len(weights), naming, made)
    return report


def _asked(quant: QuantPolicy, report: LoadReport) -> Quantization:
    if report.quantization:
        raise ConfigError(
            f"{report.path} is quantized already ({report.quantization}), and codes cannot be quantized again: leave "
            "quant out to rename or reshard it, or take the checkpoint that it was made from"
        )
    quantization = Quantization.of([quant], report.config.num_layers)
    if not quantization.linears:
        raise ConfigError(
            f"the policy names no linears (quant={quant.quant!r}, linears={quant.linears}), so there is nothing to "
            f"store as codes; give quant='hif8' and some of {', '.join(LINEARS)}"
        )
    return quantization
