"""Checks a checkpoint against its config: names, shapes, dtypes, all differences at once. Reads no tensor data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ospnext.errors import CheckpointError
from ospnext.models.config import TransformerConfig
from ospnext.models.weights.checkpoint_files import Checkpoint, is_one_of_many
from ospnext.models.weights.config_files import infer_config, override_config, read_config, require_text_to_video
from ospnext.models.weights.foreign import describe_foreign
from ospnext.models.weights.keymaps import KeyMap, detect
from ospnext.models.weights.quantized import KEY, Quantization, disagreements
from ospnext.models.weights.shapes import Shape, parameter_shapes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
#: What tensors of a readable checkpoint can be; uint8 are HiFloat8 codes.
STORED_DTYPES = DTYPES | {"uint8": torch.uint8}

_SHOWN = 10


def detect_keys(checkpoint: Checkpoint) -> KeyMap:
    """The naming of `checkpoint`; CheckpointError if it holds no tensors or none of a Wan transformer."""
    names = checkpoint.tensors.keys()
    if not names:
        raise CheckpointError(f"{checkpoint.path} holds no tensors at all; fetch it again or give another file")
    keys = detect(names)
    if keys is None:
        kind = describe_foreign(names)
        raise CheckpointError(
            f"{checkpoint.path} is not a Wan transformer: none of its {len(names)} tensor names is an official or a "
            f"diffusers one (first names: {', '.join(sorted(names)[:3])})" + (f"; {kind}" if kind else "")
        )
    return keys


def resolve_config(checkpoint: Checkpoint, keys: KeyMap, overrides: Mapping[str, Any]) -> TransformerConfig:
    """The config of `checkpoint`, from its config.json or else from its tensor shapes, with `overrides` applied."""
    stored = checkpoint.tensors
    try:
        if checkpoint.config is None:
            config = infer_config({ours: stored[name].shape for name, ours in keys.official.items()}, overrides)
        else:
            config = override_config(read_config(checkpoint.config), overrides)
        require_text_to_video(config)
    except CheckpointError as error:
        hint = _hint(checkpoint)
        where = checkpoint.config_path or checkpoint.path
        raise CheckpointError(f"{where}: {error}" + (f" ({hint})" if hint else "")) from error
    return config


def require_match(checkpoint: Checkpoint, keys: KeyMap, config: TransformerConfig, quantization: Quantization) -> None:
    """CheckpointError with every kind of difference between the stored tensors and those the configs call for."""
    stored, expected = checkpoint.tensors, quantization.shapes(parameter_shapes(config))
    fixed = quantization.dtypes
    kinds = {
        "missing": _missing(keys, expected),
        "unexpected": [f"{name} {list(stored[name].shape)}" for name in _unexpected(keys, expected)],
        "wrongly shaped": [
            f"{name} {list(stored[name].shape)}, expected {list(expected[ours])}"
            for name, ours in keys.official.items()
            if ours in expected and stored[name].shape != expected[ours]
        ],
        f"of a dtype other than {', '.join(DTYPES)}": [
            f"{name} {stored[name].dtype}"
            for name, ours in keys.official.items()
            if ours not in fixed and stored[name].dtype not in STORED_DTYPES
        ],
        **disagreements(stored, keys, quantization),
    }
    if not any(kinds.values()):
        return
    lines = [
        f"{checkpoint.path} ({keys}) does not fit the model of its config (dim {config.dim}, ffn_dim {config.ffn_dim}, "
        f"{config.num_layers} layers, {len(expected)} tensors); nothing was loaded",
        *(_listed(kind, names) for kind, names in kinds.items() if names),
        _hint(checkpoint) or "check that all files come from one download and that the config is that of these weights",
    ]
    raise CheckpointError("\n  ".join(lines))


def _missing(keys: KeyMap, expected: Mapping[str, Shape]) -> list[str]:
    there = set(keys.official.values())
    return [f"{keys.stored(name)} {list(shape)}" for name, shape in expected.items() if name not in there]


def _unexpected(keys: KeyMap, expected: Mapping[str, Shape]) -> list[str]:
    return [*keys.unknown, *(name for name, ours in keys.official.items() if ours not in expected)]


def _listed(kind: str, names: list[str]) -> str:
    rest = f"; and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{len(names)} {kind}: {'; '.join(names[:_SHOWN])}{rest}"


def _hint(checkpoint: Checkpoint) -> str | None:
    if is_one_of_many(checkpoint.path):
        return "this file is one shard of several: give its folder"
    names = checkpoint.tensors.keys()
    if KEY in (checkpoint.config or {}):  # scales belong there, and say nothing about what the file is
        return describe_foreign([name for name in names if not name.endswith(".weight_scale")])
    return describe_foreign(names)
