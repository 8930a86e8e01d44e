"""A complete checkpoint with random weights, for demos, tests and bringing up hardware without a download."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ospnext.diffusion import FlowMatchSchedule
from ospnext.models import OSPNextTransformer, TransformerConfig
from ospnext.models import preset as preset_config
from ospnext.optional import require
from ospnext.pipelines.checkpoint_folder import check_replaceable
from ospnext.pipelines.random_tokenizer import make_tokenizer
from ospnext.pipelines.storage import save_parts
from ospnext.pipelines.text_encoder import TextEncoder
from ospnext.pipelines.vae import VideoAutoencoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_UMT5_XXL: dict[str, int] = {"vocab_size": 256384, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
_TINY_UMT5: dict[str, int] = {"d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
_TINY_VAE_BASE_DIM, _WAN_VAE_BASE_DIM = 8, 96


def write_random_checkpoint(
    directory: str | Path, preset: str = "tiny", seed: int = 0, overwrite: bool = False
) -> None:
    """Write diffusers' WanPipeline layout with random weights: the same bytes for the same seed and library versions.

    "tiny" is fp32 and a few megabytes. The others have the sizes of the real model, text encoder and autoencoder, in
    bfloat16 (the autoencoder in fp32): 40 GB for "14B", all of it in memory while it is written.
    """
    check_replaceable(directory, overwrite=overwrite)
    config = preset_config(preset)
    tiny = preset == "tiny"
    dtype = torch.float32 if tiny else torch.bfloat16
    save_parts(
        directory,
        _transformer(config, seed, dtype),
        _text_encoder(config, seed, tiny, dtype),
        _autoencoder(seed, tiny),
        FlowMatchSchedule(),
        "unipc",
        overwrite=overwrite,
    )


def _transformer(config: TransformerConfig, seed: int, dtype: torch.dtype) -> OSPNextTransformer:
    generator = torch.Generator().manual_seed(seed)
    with _seeded(seed), _default_dtype(dtype):
        model = OSPNextTransformer(config)
    model.init_weights(generator)
    # Training starts from a zero head and weak text and time. Here they must show, else any kernel would look right.
    with torch.no_grad():
        for part in (model.text_embedding, model.time_embedding, model.head):
            for linear in (module for module in part.modules() if isinstance(module, torch.nn.Linear)):
                linear.weight.normal_(std=linear.in_features**-0.5, generator=generator)
    return model


def _text_encoder(config: TransformerConfig, seed: int, tiny: bool, dtype: torch.dtype) -> TextEncoder:
    transformers = require("transformers", extra="t2v")
    tokenizer: PreTrainedTokenizerBase = make_tokenizer()
    sizes: dict[str, Any] = {"vocab_size": len(tokenizer), **_TINY_UMT5} if tiny else _UMT5_XXL
    umt5 = transformers.UMT5Config(d_model=config.text_dim, is_encoder_decoder=False, use_cache=False, **sizes)
    with _seeded(seed), _default_dtype(dtype):
        model = transformers.UMT5EncoderModel(umt5)
    return TextEncoder(model.eval(), tokenizer)


def _autoencoder(seed: int, tiny: bool) -> VideoAutoencoder:
    model_class = require("diffusers", extra="t2v").AutoencoderKLWan
    with _seeded(seed):
        model = model_class(base_dim=_TINY_VAE_BASE_DIM if tiny else _WAN_VAE_BASE_DIM)
    return VideoAutoencoder(model.eval())


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Libraries initialise from the global generator; it is put back afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Build a model in `dtype` at once: 14 billion parameters do not fit twice."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(previous)
