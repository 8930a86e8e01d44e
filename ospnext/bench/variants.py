"""The forms of one model that are compared, by name, and how each is made from weights that all of them share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ospnext.config import did_you_mean
from ospnext.errors import ConfigError
from ospnext.models import OSPNextTransformer, TransformerConfig
from ospnext.models.quantization import QuantPolicy, prepare_for_inference, quantize_model
from ospnext.ops import HiF8Recipe

_HIF8: dict[str, Any] = {"quant": "hif8"}
_ROW: dict[str, Any] = {"quant": "hif8", "recipe": HiF8Recipe(granularity="row")}
_FAST: dict[str, Any] = {"quant": "hif8", "recipe": HiF8Recipe(granularity="row", accumulate="fast")}
_ATTENTION = {"quant_attn": "hif8_native"}


@dataclass(frozen=True)
class Variant:
    """`settings` are those of a QuantPolicy, made when the variant runs: one that is refused fails alone."""

    name: str
    says: str
    sparse: bool = True
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def quantized(self) -> bool:
        return bool(self.settings)

    @property
    def recipe(self) -> HiF8Recipe | None:
        """Of the linears."""
        return self.settings.get("recipe", HiF8Recipe()) if self.quantized else None

    def config(self, config: TransformerConfig) -> TransformerConfig:
        return config if self.sparse else dense(config)

    def build(self, config: TransformerConfig, state: Mapping[str, Tensor]) -> OSPNextTransformer:
        """A model of `config` on the very tensors of `state`; weights in HiFloat8 are made of them and come on top."""
        with torch.device("meta"):
            model = OSPNextTransformer(self.config(config))
        model.load_state_dict(state, assign=True)
        if self.quantized:
            quantize_model(model, QuantPolicy(**self.settings), store=True)
            prepare_for_inference(model)
        return model.eval().requires_grad_(False)


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("dense", "full attention in every block, bf16: Wan2.1", sparse=False),
        Variant("osp", "Skiparse-2D attention between full blocks at both ends, bf16"),
        Variant("osp-hif8", "sparse, with HiFloat8 linears: a scale per tensor, as published", settings=_HIF8),
        Variant("osp-hif8-row", "as osp-hif8, with a scale per token and per output feature", settings=_ROW),
        Variant("osp-hif8-fast", "as osp-hif8-row, with sums that keep 14 bits", settings=_FAST),
        Variant("osp-hif8-attn", "as osp-hif8, with attention on 8-bit operands", settings=_HIF8 | _ATTENTION),
        Variant("osp-hif8-attn-fast", "as osp-hif8-fast, with that attention", settings=_FAST | _ATTENTION),
    )
}


def dense(config: TransformerConfig) -> TransformerConfig:
    """The same weights with full attention everywhere."""
    return config.replace(skiparse_model_type="full", sparse_ratio=1, num_full_blocks=0)


def named(names: str) -> tuple[Variant, ...]:
    """The variants in a comma-separated list.

    Raises:
        ConfigError: a name is unknown, or given twice.
    """
    words = [word.strip() for word in names.split(",") if word.strip()]
    for word in words:
        if word not in VARIANTS:
            raise ConfigError(
                f"unknown variant {word!r}{did_you_mean(word, VARIANTS)}; variants: {', '.join(VARIANTS)}"
            )
    if len(set(words)) < len(words) or not words:
        raise ConfigError(f"--variants {names!r}: name each variant once; variants: {', '.join(VARIANTS)}")
    return tuple(VARIANTS[word] for word in words)
