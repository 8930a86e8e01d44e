"""Which layers of a transformer compute in HiFloat8, by their names. No tensors and no models here."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Literal, get_args

from ospnext.errors import ConfigError
from ospnext.ops import HiF8Recipe

#: The linears of a block, by their names in it. Embeddings, head, norms and modulation are never quantized.
LINEARS = (
    *(f"self_attn.{name}" for name in "qkvo"),
    *(f"cross_attn.{name}" for name in "qkvo"),
    "ffn.0",
    "ffn.2",
)
ATTENTIONS = ("self_attn", "cross_attn")

Quant = Literal["none", "hif8"]
QuantAttn = Literal["none", "hif8", "hif8_native"]
Compat = Literal["none", "upstream_bf16"]


@dataclass(frozen=True)
class QuantPolicy:
    """What is quantized, and how.

    Args:
        quant: "hif8" quantizes linears.
        quant_attn: "hif8" quantizes q, k and v of attention. "hif8_native" also lets a kernel of the backend round
            probabilities and the result to 8 bits, for inference only; without such a kernel it is "hif8".
        linears: which linears of a block, of `LINEARS`.
        attention: which attention, of `ATTENTIONS`.
        blocks: which blocks: "all", or numbers and ranges from 0, such as "2-37" or "0,4-9".
        attention_blocks: the same for attention, where its blocks are others; None = `blocks`.
        recipe: scales and sums; what attention does beside them is said by `quant_attn`.
        compat: "upstream_bf16" computes scales as the training code of the released weights does, for comparisons with
            it only: never faster, less exact, in no contract. Of the recipe it knows scale_max and grad_scale_max.
    """

    quant: Quant = "none"
    quant_attn: QuantAttn = "none"
    linears: tuple[str, ...] = LINEARS
    attention: tuple[str, ...] = ATTENTIONS
    blocks: str = "all"
    recipe: HiF8Recipe = field(default_factory=HiF8Recipe)
    compat: Compat = "none"
    attention_blocks: str | None = None

    def __post_init__(self) -> None:
        for name, legal in (("quant", Quant), ("quant_attn", QuantAttn), ("compat", Compat)):
            choices = get_args(legal)
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name} must be {' or '.join(choices)}, got {getattr(self, name)!r}")
        for name, known in (("linears", LINEARS), ("attention", ATTENTIONS)):
            if isinstance(getattr(self, name), str):
                raise ConfigError(f"{name} must be a tuple of names, got the text {getattr(self, name)!r}")
            unknown = [word for word in getattr(self, name) if word not in known]
            if unknown:
                raise ConfigError(f"{name}: {unknown[0]!r} is not one of {', '.join(known)}")
        for name in ("blocks", "attention_blocks"):
            given = getattr(self, name)
            if given not in ("all", None) and not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", given):
                raise ConfigError(f"{name} must be 'all' or numbers and ranges such as 2-37 or 0,4-9; got {given!r}")
        if self.recipe.attention != "qdq":
            raise ConfigError("recipe has attention='native': say it as quant_attn='hif8_native'")
        if self.compat != "none" and self.quant_attn == "hif8_native":
            raise ConfigError(f"compat={self.compat!r} has no quant_attn='hif8_native': only 'hif8'")
        if self.compat != "none":
            for name, default in ((f.name, f.default) for f in fields(HiF8Recipe)):
                if name not in ("scale_max", "grad_scale_max") and getattr(self.recipe, name) != default:
                    raise ConfigError(
                        f"compat={self.compat!r} has no {name}={getattr(self.recipe, name)!r}: only {default!r}"
                    )

    @property
    def attention_recipe(self) -> HiF8Recipe:
        """Of the attentions that are quantized."""
        return replace(self.recipe, attention="native" if self.quant_attn == "hif8_native" else "qdq")

    def block_numbers(self, num_layers: int) -> list[int]:
        """The blocks whose linears are quantized, of `num_layers`.

        Raises:
            ConfigError: there is no such block.
        """
        return _numbers("blocks", self.blocks, num_layers)

    def attention_block_numbers(self, num_layers: int) -> list[int]:
        """The same for attention."""
        if self.attention_blocks is None:
            return self.block_numbers(num_layers)
        return _numbers("attention_blocks", self.attention_blocks, num_layers)

    def linear_names(self, num_layers: int) -> Iterator[str]:
        """Names in the model, such as "blocks.3.ffn.0", of the linears that are quantized."""
        if self.quant == "hif8":
            for number in self.block_numbers(num_layers):
                yield from (f"blocks.{number}.{name}" for name in LINEARS if name in self.linears)

    def attention_names(self, num_layers: int) -> Iterator[str]:
        """Names of the attentions whose q, k and v are quantized."""
        if self.quant_attn != "none":
            for number in self.attention_block_numbers(num_layers):
                yield from (f"blocks.{number}.{name}" for name in ATTENTIONS if name in self.attention)


def _numbers(name: str, blocks: str, num_layers: int) -> list[int]:
    """Ascending numbers of "all", or of a text such as "0,4-9"."""
    if blocks == "all":
        return list(range(num_layers))
    chosen: set[int] = set()
    for word in blocks.split(","):
        first, _, last = word.partition("-")
        numbers = range(int(first), int(last or first) + 1)
        if not numbers:
            raise ConfigError(f"{name} {word!r}: a range begins with the smaller number")
        if numbers[-1] >= num_layers:
            raise ConfigError(f"{name} {word!r}: the model has blocks 0 to {num_layers - 1}")
        chosen |= set(numbers)
    return sorted(chosen)
