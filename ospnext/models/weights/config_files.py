"""config.json of both namings, overrides, and the config that tensor shapes imply. No files and no tensors here."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Mapping
from typing import Any

from ospnext.errors import CheckpointError, ConfigError
from ospnext.models.config import SKIPARSE_KEYS, TransformerConfig
from ospnext.models.weights.keymaps import Naming
from ospnext.models.weights.shapes import Shape

_FIELDS = tuple(field.name for field in dataclasses.fields(TransformerConfig))
_WAN_HEAD_DIM = 128


def read_config(raw: Mapping[str, Any]) -> TransformerConfig:
    """The config of a text-to-video transformer from either `config.json`; CheckpointError for one of another kind."""
    if raw.get("model_type", "t2v") != "t2v":
        raise CheckpointError(f"this Wan model is of type {raw['model_type']!r}; ospnext runs text-to-video ('t2v')")
    try:
        return TransformerConfig.from_dict(raw)
    except ConfigError as error:
        raise CheckpointError(str(error)) from error


def require_text_to_video(config: TransformerConfig) -> None:
    """Refuse a transformer that takes more channels than it predicts: the rest is an image or video to condition on."""
    if config.in_dim != config.out_dim:
        raise CheckpointError(
            f"this model takes {config.in_dim} latent channels and predicts {config.out_dim}: the others condition it "
            "on an image or a video. ospnext runs text-to-video models, where the two are equal"
        )


def check_overrides(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`overrides` with unknown names refused (ConfigError with the nearest known one) and JSON lists made tuples."""
    for name in overrides:
        if name not in _FIELDS:
            near = difflib.get_close_matches(name, _FIELDS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"fields: {', '.join(_FIELDS)}"
            raise ConfigError(f"config_overrides: there is no config field {name!r}; {hint}")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in overrides.items()}


def override_config(config: TransformerConfig, overrides: Mapping[str, Any]) -> TransformerConfig:
    """`config` with `overrides` applied. Turning Skiparse on takes all of its keys, turning it off takes one."""
    changes = check_overrides(overrides)
    kind = changes.get("skiparse_model_type")
    if kind == "full":
        changes = {"sparse_ratio": 1, "num_full_blocks": 0, **changes}
    elif kind == "dual_end" and not config.sparse and (missing := [key for key in SKIPARSE_KEYS if key not in changes]):
        raise ConfigError(
            "config_overrides: turning on skiparse_model_type='dual_end' for a dense model also needs "
            f"{' and '.join(missing)} (the OSP-Next models use sparse_ratio=2, num_full_blocks=8)"
        )
    return config.replace(**changes)


def infer_config(shapes: Mapping[str, Shape], overrides: Mapping[str, Any]) -> TransformerConfig:
    """The config that official-named parameters of these shapes belong to; dense unless overridden.

    Shapes do not tell the number of heads: it is dim / 128, as in every Wan model, or has to be given.
    """
    values = _read_shapes(shapes)
    overrides = check_overrides(overrides)
    if "num_heads" not in overrides:
        if values["dim"] % _WAN_HEAD_DIM:
            raise ConfigError(
                "tensor shapes do not tell the number of attention heads, and dim "
                f"{values['dim']} is no multiple of Wan's head size {_WAN_HEAD_DIM}; give it with "
                "config_overrides={'num_heads': ...}, or put the model's config.json next to the file"
            )
        overrides["num_heads"] = values["dim"] // _WAN_HEAD_DIM
    # num_heads has to be there from the start: the constructor refuses a dim that the default does not divide.
    return override_config(TransformerConfig(**values, num_heads=overrides["num_heads"]), overrides)


def _read_shapes(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    def shape(name: str, rank: int) -> Shape:
        found = shapes.get(name)
        if found is None or len(found) != rank:
            what = "is absent" if found is None else f"has shape {list(found)}, expected {rank} dimensions"
            raise CheckpointError(
                f"the sizes of the model cannot be inferred: {name} {what}. Is the file a part of a "
                "checkpoint? Give the folder with config.json and all of its files"
            )
        return found

    dim, in_dim, *patch_size = shape("patch_embedding.weight", 5)
    layers = {int(match[1]) for name in shapes if (match := re.match(r"blocks\.(\d+)\.", name))}
    return {
        "dim": dim,
        "ffn_dim": shape("blocks.0.ffn.0.weight", 2)[0],
        "num_layers": max(layers) + 1,
        "freq_dim": shape("time_embedding.0.weight", 2)[1],
        "text_dim": shape("text_embedding.0.weight", 2)[1],
        "in_dim": in_dim,
        "out_dim": shape("head.head.weight", 2)[0] // math.prod(patch_size),
        "patch_size": tuple(patch_size),
    }


def config_json(config: TransformerConfig, naming: Naming) -> dict[str, Any]:
    """`config.json` as official Wan or diffusers writes it, plus the fields that only OSP-Next has."""
    values = config.to_dict()
    if naming == "official":
        return {"_class_name": "WanModel", "model_type": "t2v", **values}
    for ours in ("dim", "num_heads", "in_dim", "out_dim", "qk_norm"):
        values.pop(ours)
    return {
        "_class_name": "WanTransformer3DModel",
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.head_dim,
        "in_channels": config.in_dim,
        "out_channels": config.out_dim,
        "qk_norm": "rms_norm_across_heads",
        "added_kv_proj_dim": None,
        "image_dim": None,
        "pos_embed_seq_len": None,
        "rope_max_seq_len": 1024,
        **values,
    }
