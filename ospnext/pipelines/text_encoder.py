"""Prompts to embeddings: tokenizer and UMT5 encoder of Wan, from either checkpoint layout. No sampling here.

Once prompts are encoded, the encoder may be dropped (UMT5-XXL: 11 GB in bfloat16); see `OSPNextPipeline.encode_prompt`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ospnext.errors import CheckpointError, ConfigError
from ospnext.optional import require
from ospnext.pipelines import t5_keys
from ospnext.pipelines.prompts import clean_prompt
from ospnext.pipelines.strict_load import build_and_load, read_pth, read_safetensors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, UMT5Config, UMT5EncoderModel

_EMBEDDING_NAMES = ("shared.weight", "encoder.embed_tokens.weight")


class TextEncoder:
    """UMT5 encoder with its tokenizer."""

    def __init__(self, model: UMT5EncoderModel, tokenizer: PreTrainedTokenizerBase) -> None:
        if len(tokenizer) > model.config.vocab_size:
            raise CheckpointError(
                f"the tokenizer has {len(tokenizer)} tokens but the text encoder embeds {model.config.vocab_size}; "
                "they are not from one checkpoint"
            )
        self.model = model
        self.tokenizer = tokenizer

    @classmethod
    def from_diffusers(
        cls,
        text_encoder: str | Path,
        tokenizer: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> TextEncoder:
        """From the folders of these names in a diffusers checkpoint. `dtype=None` keeps the stored one."""
        directory = Path(text_encoder)
        config_file = directory / "config.json"
        if not config_file.is_file():
            raise CheckpointError(f"{directory} is not a text encoder folder: it has no config.json")
        config = require("transformers", extra="t2v").UMT5Config.from_json_file(config_file)
        weights = read_safetensors(directory, "model")
        return cls(_load(config, weights, directory, dtype, device), _load_tokenizer(Path(tokenizer)))

    @classmethod
    def from_official(
        cls,
        weights: str | Path,
        tokenizer: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> TextEncoder:
        """From Wan's `models_t5_umt5-xxl-enc-bf16.pth` and its tokenizer folder `google/umt5-xxl`."""
        path = Path(weights)
        official = read_pth(path)
        # use_cache and is_encoder_decoder belong to the decoder, which is not here.
        config = require("transformers", extra="t2v").UMT5Config(
            **t5_keys.umt5_config(official, path), is_encoder_decoder=False, use_cache=False
        )
        return cls(
            _load(config, t5_keys.to_transformers(official), path, dtype, device), _load_tokenizer(Path(tokenizer))
        )

    @property
    def dim(self) -> int:
        return self.model.config.d_model

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def device(self) -> torch.device:
        return self.model.device

    def to(self, device: torch.device | str) -> TextEncoder:
        torch.nn.Module.to(self.model, device)  # transformers' own `to` only adds checks for quantised models
        return self

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], max_length: int) -> Tensor:
        """[B, max_length, dim] on the encoder's device, in its dtype. Rows past a prompt's last token are exactly zero.

        A prompt of more than `max_length` tokens, the end token included, loses its tail, with a warning.
        """
        if isinstance(prompts, str) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise ConfigError(f"encode takes a non-empty list of strings, got {prompts!r}")
        cleaned = [clean_prompt(prompt) for prompt in prompts]
        tokens = self.tokenizer(
            cleaned, padding="max_length", max_length=max_length, truncation=True, return_tensors="pt"
        ).to(self.device)
        ids_BL, mask_BL = tokens.input_ids, tokens.attention_mask
        self._warn_truncated(cleaned, mask_BL.sum(dim=1).tolist(), max_length)
        text_BLC = self.model(ids_BL, attention_mask=mask_BL).last_hidden_state
        # A select, not a product: zero times a padding row that overflowed would be NaN.
        return torch.where(mask_BL.bool()[..., None], text_BLC, 0)

    def _warn_truncated(self, prompts: list[str], lengths: list[int], max_length: int) -> None:
        for prompt, length in zip(prompts, lengths, strict=True):
            needed = len(self.tokenizer.tokenize(prompt)) + 1 if length == max_length else length
            if needed > max_length:
                warnings.warn(
                    f"a prompt has {needed} tokens but the model reads {max_length}; its end is lost: {prompt[-60:]!r}",
                    stacklevel=2,
                )

    def save(self, text_encoder: Path, tokenizer: Path) -> None:
        """Write both folders as diffusers and transformers expect them."""
        with _silent_progress():
            self.model.save_pretrained(text_encoder)
        self.tokenizer.save_pretrained(tokenizer)


def _load(
    config: UMT5Config,
    weights: dict[str, Tensor],
    source: Path,
    dtype: torch.dtype | None,
    device: torch.device | str,
) -> UMT5EncoderModel:
    if dtype == torch.float16:
        raise ConfigError("UMT5 overflows in float16; load the text encoder in bfloat16 or float32")
    model_class = require("transformers", extra="t2v").UMT5EncoderModel
    weights = _with_both_embeddings(weights, source)
    model = build_and_load(lambda: model_class(config), weights, source, dtype=dtype, device=device)
    model.tie_weights()
    if model.encoder.embed_tokens.weight is not model.shared.weight:
        raise CheckpointError(f"{source}: transformers did not tie embed_tokens to the shared embedding")
    return model


def _with_both_embeddings(weights: dict[str, Tensor], source: Path) -> dict[str, Tensor]:
    """UMT5 has one embedding under two names, and a file may store it under either or both."""
    stored = {name: weights[name] for name in _EMBEDDING_NAMES if name in weights}
    if len(stored) == 2 and not torch.equal(*stored.values()):
        raise CheckpointError(f"{source}: {' and '.join(stored)} differ, but UMT5 has one embedding")
    return {**weights, **{name: next(iter(stored.values())) for name in _EMBEDDING_NAMES if stored}}


def _load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    # Checked first, because AutoTokenizer would take the path of a missing folder for the name of a hub repository.
    if not any((directory / name).is_file() for name in ("tokenizer.json", "spiece.model")):
        raise CheckpointError(f"{directory} is not a tokenizer folder: it has neither tokenizer.json nor spiece.model")
    return require("transformers", extra="t2v").AutoTokenizer.from_pretrained(directory, local_files_only=True)


@contextmanager
def _silent_progress() -> Iterator[None]:
    """transformers draws its bars even when stderr is not a terminal; writing weights is not what ours report."""
    logging = require("transformers.utils.logging", extra="t2v")
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()
