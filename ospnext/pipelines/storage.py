"""A whole pipeline from and to a checkpoint folder: which part is loaded from where, and diffusers' folder written."""

from __future__ import annotations

import json
from pathlib import Path
from types import EllipsisType
from typing import TYPE_CHECKING, Any, Literal

import torch

from ospnext.diffusion import FlowMatchSchedule, schedule_from_diffusers, schedule_to_diffusers
from ospnext.errors import CheckpointError, ConfigError
from ospnext.models import load_transformer, save_transformer
from ospnext.models.config import TransformerConfig
from ospnext.models.hif8_linear import StoredHiF8Linear
from ospnext.models.quantization import QuantPolicy, quantize_model
from ospnext.optional import require
from ospnext.pipelines.checkpoint_folder import INDEX, replace_folder
from ospnext.pipelines.layout import Layout, Part, detect_layout
from ospnext.pipelines.strict_load import read_json
from ospnext.pipelines.text_encoder import TextEncoder
from ospnext.pipelines.vae import VideoAutoencoder

if TYPE_CHECKING:
    from ospnext.models import OSPNextTransformer


def load_parts(
    path: Path,
    *,
    dtype: torch.dtype | None,
    vae_dtype: torch.dtype | None,
    device: torch.device | str,
    transformer: OSPNextTransformer | None,
    text_encoder: TextEncoder | EllipsisType | None,
    vae: VideoAutoencoder | EllipsisType | None,
    transformer_overrides: dict[str, Any] | None,
    timestep_rounding: Literal["none", "bf16"],
    quant: QuantPolicy | None,
) -> dict[str, Any]:
    """Arguments of OSPNextPipeline. `...` stands for "from the checkpoint"; nothing is read that is not needed."""
    if quant is not None and transformer is not None:
        raise ConfigError("quant is for a transformer that is loaded; call quantize_model on the one that is passed")
    absent: dict[Part, bool] = {
        "transformer": transformer is None,
        "text_encoder": text_encoder is ...,
        "vae": vae is ...,
    }
    layout = detect_layout(path, [part for part, needed in absent.items() if needed])
    schedule, solver = _read_schedule(layout)
    # The smallest part first, so that a broken one is reported before the long load.
    if vae is ...:
        vae = _load_vae(layout, vae_dtype, device)
    if text_encoder is ...:
        text_encoder = _load_text_encoder(layout, dtype, device)
    if transformer is None:
        transformer = load_transformer(
            layout.transformer, dtype=dtype, device=device, config_overrides=transformer_overrides,
            timestep_rounding=timestep_rounding,
        )  # fmt: skip
        if quant is not None:
            _quantize(transformer, quant, layout.transformer)
    for part in (transformer, text_encoder, vae):
        if part is not None:
            part.to(device)
    return {
        "transformer": transformer, "text_encoder": text_encoder, "vae": vae, "schedule": schedule, "solver": solver,
    }  # fmt: skip


def _quantize(transformer: OSPNextTransformer, quant: QuantPolicy, path: Path) -> None:
    """For inference: weights become codes once, with the same result as in each call and half the memory."""
    linears = (transformer.get_submodule(name) for name in quant.linear_names(transformer.config.num_layers))
    if any(isinstance(linear, StoredHiF8Linear) for linear in linears):
        raise ConfigError(f"quant=hif8, but {path} has weights of linears as HiFloat8 codes already; leave quant out")
    quantize_model(transformer, quant, store=quant.compat == "none")


def _load_vae(layout: Layout, dtype: torch.dtype | None, device: torch.device | str) -> VideoAutoencoder:
    load = VideoAutoencoder.from_diffusers if layout.kind == "diffusers" else VideoAutoencoder.from_official
    return load(layout.vae, dtype=dtype, device=device)


def _load_text_encoder(layout: Layout, dtype: torch.dtype | None, device: torch.device | str) -> TextEncoder:
    load = TextEncoder.from_diffusers if layout.kind == "diffusers" else TextEncoder.from_official
    return load(layout.text_encoder, layout.tokenizer, dtype=dtype, device=device)


def _read_schedule(layout: Layout) -> tuple[FlowMatchSchedule, str]:
    """What the checkpoint says, or Wan's default: shift 5 with UniPC."""
    if layout.scheduler_config is None:
        return FlowMatchSchedule(), "unipc"
    return schedule_from_diffusers(read_json(layout.scheduler_config))


def check_fit(config: TransformerConfig, text_encoder: TextEncoder | None, vae: VideoAutoencoder | None) -> None:
    """Parts of different models must not meet in one pipeline."""
    if text_encoder is not None and text_encoder.dim != config.text_dim:
        raise CheckpointError(
            f"the transformer reads text of width {config.text_dim} but the text encoder gives {text_encoder.dim}; "
            "they are not from one checkpoint"
        )
    if vae is not None and not vae.latent_channels == config.in_dim == config.out_dim:
        raise CheckpointError(
            f"the transformer has {config.in_dim} latent channels in and {config.out_dim} out but the autoencoder has "
            f"{vae.latent_channels}; they are not from one checkpoint"
        )


def save_parts(
    directory: str | Path,
    transformer: OSPNextTransformer,
    text_encoder: TextEncoder,
    vae: VideoAutoencoder,
    schedule: FlowMatchSchedule,
    solver: str,
    *,
    overwrite: bool,
) -> None:
    """Write diffusers' WanPipeline layout; the folder appears complete or not at all."""
    with replace_folder(directory, overwrite=overwrite) as folder:
        save_transformer(transformer, folder / "transformer", naming="diffusers")
        text_encoder.save(folder / "text_encoder", folder / "tokenizer")
        vae.save(folder / "vae")
        scheduler = schedule_to_diffusers(schedule, solver)
        _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
        _write_json(folder / INDEX, _model_index(scheduler["_class_name"], type(text_encoder.tokenizer).__name__))


def _model_index(scheduler_class: str, tokenizer_class: str) -> dict[str, Any]:
    return {
        "_class_name": "WanPipeline",
        "_diffusers_version": require("diffusers", extra="t2v").__version__,
        "boundary_ratio": None,
        "expand_timesteps": False,
        "scheduler": ["diffusers", scheduler_class],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", tokenizer_class],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "transformer_2": [None, None],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
