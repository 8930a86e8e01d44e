"""Loads and saves the transformer: strict, one file at a time, in either naming. File formats live in `weights`."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from ospnext.errors import CheckpointError, ConfigError
from ospnext.models.attend import Attend
from ospnext.models.config import SKIPARSE_KEYS, TransformerConfig
from ospnext.models.hif8_linear import StoredHiF8Linear
from ospnext.models.transformer import OSPNextTransformer, TimestepRounding
from ospnext.models.weights.check import DTYPES, detect_keys, require_match, resolve_config
from ospnext.models.weights.checkpoint_files import Checkpoint, TensorFile, open_checkpoint
from ospnext.models.weights.config_files import config_json
from ospnext.models.weights.keymaps import KeyMap, Naming, from_official
from ospnext.models.weights.quantized import Quantization, read_quantization
from ospnext.models.weights.shapes import parameter_shapes
from ospnext.models.weights.writer import write_checkpoint

logger = logging.getLogger("ospnext")

DEFAULT_SHARD_SIZE = 5 * 1024**3

_HALF = (torch.bfloat16, torch.float16)


def keeps_fp32(name: str) -> bool:
    """Whether the parameter `name` (official) stays fp32 in a half-precision model.

    The timestep path, the modulation tables and the norms: few elements, and the forward computes with them in fp32.
    """
    return (
        name.startswith(("time_embedding.", "time_projection."))
        or name.endswith((".modulation", ".norm_q.weight", ".norm_k.weight"))
        or ".norm3." in name
    )


def parameter_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of the parameter `name` (official) in a model of `dtype`."""
    return torch.float32 if dtype in _HALF and keeps_fp32(name) else dtype


@dataclass(frozen=True)
class LoadReport:
    """What a checkpoint was found to be; `str()` gives the line that loading it logs."""

    path: Path
    naming: Naming
    prefix: str
    config: TransformerConfig
    config_source: str
    skiparse_named: bool
    tensors: int
    parameters: int
    stored_dtypes: tuple[str, ...]
    dtype: torch.dtype
    quantization: Quantization

    @property
    def skiparse(self) -> str:
        """The attention pattern in words and, for a dense model, whether anyone asked for it to be dense."""
        config = self.config
        if config.sparse:
            return (
                f"{config.skiparse_model_type} (ratio {config.sparse_ratio}, "
                f"{config.num_full_blocks} of {config.num_layers} blocks full)"
            )
        if self.skiparse_named:
            return "full (dense)"
        return f"full (dense Wan2.1: nothing sets {', '.join(SKIPARSE_KEYS)}; config_overrides can turn on 'dual_end')"

    def __str__(self) -> str:
        prefix = f" with prefix {self.prefix!r}" if self.prefix else ""
        quantized = f"{self.quantization}, " if self.quantization else ""
        return (
            f"transformer {self.path}: {self.naming} Wan names{prefix}, {self.tensors} tensors, "
            f"{self.parameters:,} parameters, stored as {' + '.join(self.stored_dtypes)}, {quantized}"
            f"used as {str(self.dtype).removeprefix('torch.')}, attention {self.skiparse}, config {self.config_source}"
        )


@dataclass(frozen=True)
class CheckedCheckpoint:
    """A checkpoint that fits its config: `keys.official` translates every stored name."""

    checkpoint: Checkpoint
    keys: KeyMap
    report: LoadReport


def load_transformer(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    config_overrides: Mapping[str, Any] | None = None,
    timestep_rounding: TimestepRounding = "none",
) -> OSPNextTransformer:
    """Load a transformer from a folder, a diffusers pipeline folder, a .safetensors file or a torch.save file.

    The naming (official or diffusers) is told by the tensor names. `dtype=None` keeps the stored dtype, the widest one
    if the large tensors were stored in several; in bfloat16 and float16 some parameters stay fp32 (`keeps_fp32`).
    Weights that are stored as HiFloat8 codes stay codes, with fp32 scales, in any dtype (`StoredHiF8Linear`).
    Raises CheckpointError unless exactly the tensors of the model are there, and ConfigError for a wrong override.
    """
    checked = check_checkpoint(path, dtype=dtype, config_overrides=config_overrides)
    model = empty_transformer(checked, timestep_rounding=timestep_rounding)
    for file in checked.checkpoint.files:
        _assign(model, file, checked, torch.device(device))
    if unset := [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]:
        raise CheckpointError(
            f"loading {checked.report.path} left {len(unset)} tensors of the model without a value: "
            f"{', '.join(unset[:10])}. This is a bug of the model class: it holds state no file has"
        )
    logger.info("loaded %s", checked.report)
    return model


def empty_transformer(
    checked: CheckedCheckpoint, *, timestep_rounding: TimestepRounding = "none"
) -> OSPNextTransformer:
    """The model that `load_transformer` gives, on "meta": its layers, shapes and dtypes, without values."""
    with torch.device("meta"):
        model = OSPNextTransformer(checked.report.config, timestep_rounding=timestep_rounding)
        _quantize_layers(model, checked.report.quantization)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(parameter_dtype(name, checked.report.dtype))
    return model


def _quantize_layers(model: nn.Module, quantization: Quantization) -> None:
    """Put layers that hold codes, still without them, in the place of plain ones."""
    for name, recipe in quantization.linears.items():
        linear = cast(nn.Linear, model.get_submodule(name))
        model.set_submodule(name, StoredHiF8Linear(linear.in_features, linear.out_features, recipe))
    for name, recipe in quantization.attention.items():
        cast(Attend, model.get_submodule(f"{name}.attend")).recipe = recipe


def _assign(model: nn.Module, file: TensorFile, checked: CheckedCheckpoint, device: torch.device) -> None:
    """Give `model` the tensors of one file. Each is copied once: a view of the file would change with the file."""
    state, fixed = {}, checked.report.quantization.dtypes
    for stored in file.tensors:
        name = checked.keys.official[stored]
        dtype = fixed.get(name) or parameter_dtype(name, checked.report.dtype)
        state[name] = file.read(stored).to(device, dtype, copy=True)
    model.load_state_dict(state, strict=False, assign=True)


def inspect_checkpoint(
    path: str | Path, *, dtype: torch.dtype | None = None, config_overrides: Mapping[str, Any] | None = None
) -> LoadReport:
    """Everything `load_transformer` checks and reports, from the file headers alone: no tensor data is read."""
    return check_checkpoint(path, dtype=dtype, config_overrides=config_overrides).report


def check_checkpoint(
    path: str | Path, *, dtype: torch.dtype | None = None, config_overrides: Mapping[str, Any] | None = None
) -> CheckedCheckpoint:
    """Open `path` and check that it fits its config; neither needs a model, nor a backend to run one."""
    if dtype not in (None, *DTYPES.values()):
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)} or None to keep the stored one, got {dtype}")
    overrides = dict(config_overrides or {})
    checkpoint = open_checkpoint(path)
    keys = detect_keys(checkpoint)
    config = resolve_config(checkpoint, keys, overrides)
    quantization = read_quantization(checkpoint, config.num_layers)
    require_match(checkpoint, keys, config, quantization)
    stored = checkpoint.tensors
    source = "inferred from tensor shapes" if checkpoint.config is None else f"from {checkpoint.config_path}"
    report = LoadReport(
        path=checkpoint.path,
        naming=keys.naming,
        prefix=keys.prefix,
        config=config,
        config_source=source + (f", overridden: {', '.join(overrides)}" if overrides else ""),
        skiparse_named=any(key in (checkpoint.config or {}) or key in overrides for key in SKIPARSE_KEYS),
        tensors=len(stored),
        parameters=sum(math.prod(shape) for shape in parameter_shapes(config).values()),
        stored_dtypes=tuple(sorted({tensor.dtype for tensor in stored.values()})),
        dtype=_stored_dtype(checkpoint, keys, quantization) if dtype is None else dtype,
        quantization=quantization,
    )
    return CheckedCheckpoint(checkpoint, keys, report)


def _stored_dtype(checkpoint: Checkpoint, keys: KeyMap, quantization: Quantization) -> torch.dtype:
    """The dtype that loses nothing of the large tensors. Those that stay fp32 in half-precision models have no say, nor
    have codes and scales.
    """
    stored, fixed = checkpoint.tensors, quantization.dtypes
    large = [name for name, ours in keys.official.items() if not keeps_fp32(ours) and ours not in fixed]
    return functools.reduce(torch.promote_types, {DTYPES[stored[name].dtype] for name in large})


def save_transformer(
    model: OSPNextTransformer,
    directory: str | Path,
    *,
    naming: Naming = "diffusers",
    max_shard_size: int = DEFAULT_SHARD_SIZE,
) -> None:
    """Write config.json and sharded safetensors, bit for bit and in the dtypes the model has.

    With `naming="diffusers"` diffusers' WanTransformer3DModel loads the folder (and ignores the Skiparse keys).

    A `StoredHiF8Linear` is written as codes (`weight`, uint8) and their scale (`weight_scale`, fp32); config.json says
    so under `quantization_config`, together with the recipe of quantized attention, and only ospnext loads that folder.
    A model without one is a plain checkpoint, whatever it computes in: `HiF8Linear` has plain weights, so that they can
    be trained further and other libraries load them. How it quantizes is not written; `quantize_model` asks again.
    """
    state = {in_naming(name, naming): tensor.detach() for name, tensor in model.state_dict().items()}
    num_bytes = {name: tensor.nbytes for name, tensor in state.items()}
    entry = stored_quantization(model).config_entry(model.config.num_layers)
    config = config_json(model.config, naming) | entry
    write_checkpoint(directory, config, num_bytes, lambda name: state[name].cpu().contiguous(), max_shard_size)


def stored_quantization(model: nn.Module) -> Quantization:
    """What a checkpoint of `model` has to say about HiF8: nothing unless weights are codes."""
    linears = {name: m.recipe for name, m in model.named_modules() if isinstance(m, StoredHiF8Linear)}
    if not linears:
        return Quantization()
    attends = {name.removesuffix(".attend"): m for name, m in model.named_modules() if isinstance(m, Attend)}
    return Quantization(linears, {name: m.recipe for name, m in attends.items() if m.recipe is not None})


def in_naming(name: str, naming: Naming) -> str:
    """The official name `name` in `naming`; CheckpointError for a tensor that no Wan transformer has."""
    renamed = from_official(name, naming)
    if renamed is None:
        raise CheckpointError(
            f"{name} is no parameter of a Wan transformer, so files have no name for it; "
            "save the plain model, without adapters or wrappers around its modules"
        )
    return renamed
