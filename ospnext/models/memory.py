"""Bytes that a forward without gradients needs, tensor by tensor, from the config and the token grid. No tensors here.

Eager order, as the layers are written: a tensor lives until the function that holds it returns. What a kernel allocates
and frees inside one operator is not known here."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from ospnext.models.config import TransformerConfig
from ospnext.models.layout import block_orders
from ospnext.models.loading import parameter_dtype
from ospnext.models.quant_policy import ATTENTIONS, LINEARS
from ospnext.models.weights.quantized import Quantization
from ospnext.models.weights.shapes import parameter_shapes
from ospnext.ops import HiF8Recipe
from ospnext.sparse import Grid

#: What lives at one moment: bytes by what they are for.
Moment = dict[str, int]


def activation_peak(
    config: TransformerConfig,
    grid: Grid,
    batch: int,
    dtype: torch.dtype,
    *,
    quantization: Quantization | None = None,
    fused: Collection[str] = (),
) -> Moment:
    """The tensors that live at the worst moment of a forward, text keys and values and the layout not counted.

    Args:
        grid: tokens (T, H, W) of a sample; batch: samples of a forward, branches of guidance that share it included.
        dtype: of the stream.
        quantization: linears whose weights are stored as codes, and attentions that compute in HiFloat8.
        fused: operators of `ospnext.ops` that the backend has a kernel for, such as "rms_norm". Others are their plain
            PyTorch definitions, which keep several copies in fp32 for a while.
    """
    quantization = quantization or Quantization()
    tokens, fused = batch * math.prod(grid), frozenset(fused)
    moments = list(_outside_blocks(_Block(config, tokens, dtype, fused)))
    for recipes, attention, permuted in _kinds_of_blocks(config, quantization):
        moments += _Block(config, tokens, dtype, fused, recipes, attention, permuted).moments()
    worst = max(moments, key=lambda moment: sum(moment.values()))
    return {**worst, "time and modulation": _conditioning(config, batch, dtype)}


def exchange_peak(
    config: TransformerConfig, tokens: int, whole: int, ssp: int, ulysses: int, dtype: torch.dtype
) -> int:
    """While q, k and v go from tokens to heads, for n `tokens` of N of a sample, in elements:

    stream and normalised stream 2 n C; q, k and v 3 n C; they together, head by head 3 n C; the part for each rank, and
    the parts one after the other 3 n C each. Then the parts are gone and as much has arrived, of all tokens and the
    heads of this rank; and it is there twice where a group holds several subsequences and takes them apart.
    """
    ranks = ssp * ulysses if "full" in config.block_kinds else ulysses
    pieces = config.sparse_ratio**2 // ssp
    if ranks == 1:
        return 0
    C = config.dim
    arrived = 3 * whole * -(-config.num_heads // ranks) * config.head_dim
    elements = 11 * tokens * C + max(3 * tokens * C, arrived)
    if config.sparse and ulysses > 1:
        of_group = 3 * min(whole, tokens * ulysses) * -(-config.num_heads // ulysses) * config.head_dim
        elements = max(elements, 11 * tokens * C + of_group * (2 if pieces > 1 else 1))
    return dtype.itemsize * elements


def weight_bytes(config: TransformerConfig, dtype: torch.dtype, quantization: Quantization) -> int:
    """Of the transformer's parameters, codes and scales."""
    shapes, fixed = quantization.shapes(parameter_shapes(config)), quantization.dtypes
    return sum(
        math.prod(shape) * (fixed.get(name) or parameter_dtype(name, dtype)).itemsize for name, shape in shapes.items()
    )


def text_bytes(config: TransformerConfig, dtype: torch.dtype, batch: int = 1) -> int:
    """Keys and values of the text for every cross-attention, kept for all steps."""
    return batch * config.num_layers * 2 * config.text_len * config.dim * dtype.itemsize


def layout_bytes(config: TransformerConfig, grid: Grid, dtype: torch.dtype) -> int:
    """Rotary and index tables of one grid, which the model keeps."""
    orders = block_orders(config.block_kinds)
    changes = {(a, b) for a, b in itertools.pairwise(orders) if a != b}
    wide = 8 if dtype == torch.float64 else 4
    rotary = len(set(orders)) * 2 * (config.head_dim // 2) * wide  # cosines and sines
    indices = 8 * (len(changes) + (2 if config.sparse else 0))  # switches; into the first order and out of the last
    return math.prod(grid) * (rotary + indices)


def latent_bytes(config: TransformerConfig, grid: Grid, videos: int, *, solver: str, branches: int) -> int:
    """fp32 latents and what is shaped like them during a forward of a denoising step."""
    kept_by_solver = {"unipc": 3}.get(solver, 0)  # two predictions of earlier steps and the sample before this one
    velocity = 1 if branches > 1 else 0  # of the first branch while the second one runs, or the latents of both
    patch = math.prod(config.patch_size)
    return 4 * videos * math.prod(grid) * patch * config.in_dim * (1 + kept_by_solver + velocity)


def _conditioning(config: TransformerConfig, batch: int, dtype: torch.dtype) -> int:
    """The embedded time [B, C], its six projections, and their sum with the modulation of a block."""
    return batch * 13 * config.dim * (8 if dtype == torch.float64 else 4)


def _kinds_of_blocks(
    config: TransformerConfig, quantization: Quantization
) -> Iterator[tuple[Mapping[str, HiF8Recipe], Mapping[str, HiF8Recipe], bool]]:
    """(recipes of linears, of attentions, whether the output is permuted) of blocks that differ in them."""
    orders = block_orders(config.block_kinds)
    seen = []
    for i in range(config.num_layers):
        linears, attention = (
            {name: known[f"blocks.{i}.{name}"] for name in names if f"blocks.{i}.{name}" in known}
            for names, known in ((LINEARS, quantization.linears), (ATTENTIONS, quantization.attention))
        )
        kind = (linears, attention, i + 1 < len(orders) and orders[i] != orders[i + 1])
        if kind not in seen:
            seen.append(kind)
            yield kind


@dataclass(frozen=True)
class _Block:
    """One kind of block, moment by moment, in the order of `layers.Block.forward`."""

    config: TransformerConfig
    tokens: int
    dtype: torch.dtype
    fused: frozenset[str]
    recipes: Mapping[str, HiF8Recipe] = field(default_factory=dict)
    attention: Mapping[str, HiF8Recipe] = field(default_factory=dict)
    permuted: bool = False

    def of(self, channels: int) -> int:
        """A tensor [B, N, channels] in the dtype of the stream."""
        return self.tokens * channels * self.dtype.itemsize

    def codes(self, name: str, channels: int) -> int:
        """Codes and scales of what enters the linear `name`, while it runs."""
        if name not in self.recipes:
            return 0
        return self.tokens * (channels + (4 if self.recipes[name].granularity == "row" else 0))

    def as_codes(self, *names: str) -> bool:
        """Whether the operator before these linears leaves nothing but codes: `hif8_linear.input_form`."""
        recipes = [self.recipes.get(name) for name in names]
        return recipes[0] is not None and all(recipe == recipes[0] for recipe in recipes)

    def moments(self) -> Iterator[Moment]:
        yield from self._self_attention()
        yield from self._cross_attention()
        yield from self._feed_forward()

    def _self_attention(self) -> Iterator[Moment]:
        C, qkv = self.config.dim, ("self_attn.q", "self_attn.k", "self_attn.v")
        x = {"stream": self.of(C)}  # the caller keeps what entered the block until the block returns
        yield x | {"norm before self-attention": self._norm("modulated", C, *qkv)}
        y = x | {"normalised stream": self._normed(C, *qkv)}  # a local of the block until the next norm
        entering = 0 if self.as_codes(*qkv) else self.codes("self_attn.v", C)
        y_qkv = y | {"q, k and v": self.of(3 * C)}
        yield y_qkv | {"codes of the normalised stream": entering}
        yield y_qkv | {"norm and rotation of q or k": self._rms_norm_rope(C)}
        through = self._through_hif8("self_attn", 3 * C)
        yield y_qkv | {"q, k and v in HiFloat8": through, "attention output": self.of(C)}
        out = y | {"attention output": self.of(C)}
        yield out | {"codes of the attention output": self.codes("self_attn.o", C), "projected output": self.of(C)}
        yield y | {"projected output": self.of(C), "gated sum": self._gate_residual(gated=True)}

    def _cross_attention(self) -> Iterator[Moment]:
        C, q, o = self.config.dim, "cross_attn.q", "cross_attn.o"
        held = {"stream": self.of(2 * C)}  # of the caller, and after self-attention
        held["normalised stream"] = self._normed(C, "self_attn.q", "self_attn.k", "self_attn.v")
        yield held | {"norm before cross-attention": self._norm("affine", C, q)}
        y = held | {"normalised for cross-attention": self._normed(C, q)}  # an argument of the attention
        y_q = y | {"q": self.of(C)}
        yield y_q | {"codes of the normalised stream": 0 if self.as_codes(q) else self.codes(q, C)}
        yield y_q | {"norm of q": self._rms_norm(C)}
        through = self._through_hif8("cross_attn", C)
        yield y_q | {"q in HiFloat8": through, "attention output": self.of(C)}
        out = y | {"attention output": self.of(C)}
        yield out | {"codes of the attention output": self.codes(o, C), "projected output": self.of(C)}
        yield held | {"projected output": self.of(C), "sum": self._gate_residual(gated=False)}

    def _feed_forward(self) -> Iterator[Moment]:
        C, F = self.config.dim, self.config.ffn_dim
        x = {"stream": self.of(2 * C)}  # of the caller, and after cross-attention
        before = {"normalised for self-attention": self._normed(C, "self_attn.q", "self_attn.k", "self_attn.v")}
        yield x | before | {"norm before the feed-forward": self._norm("modulated", C, "ffn.0")}
        y = x | {"normalised stream": self._normed(C, "ffn.0")}  # an argument of the feed-forward
        plain = not self.recipes.keys() & {"ffn.0", "ffn.2"}
        hidden = y | {"hidden": self.of(F)}
        if not (plain and "linear_gelu_tanh" in self.fused):
            yield hidden | {"codes of the normalised stream": 0 if self.as_codes("ffn.0") else self.codes("ffn.0", C)}
            yield hidden | {"GELU of hidden": self._gelu(F)}
        gelu = y | {"GELU of hidden": self._normed(F, "ffn.2")}
        codes = 0 if self.as_codes("ffn.2") else self.codes("ffn.2", F)
        yield gelu | {"codes of the GELU": codes, "projected output": self.of(C)}
        yield y | {"projected output": self.of(C), "gated sum": self._gate_residual(gated=True, permuted=self.permuted)}

    def _through_hif8(self, name: str, channels: int) -> int:
        """Values after a round trip in the dtype of the stream, or the 8-bit operands of a native kernel."""
        recipe = self.attention.get(name)
        if recipe is None:
            return 0
        return self.tokens * channels if recipe.attention == "native" else self.of(channels)

    # ---- results of operators, with what their definitions keep on the way

    def _normed(self, channels: int, *consumers: str) -> int:
        return self.codes(consumers[0], channels) if self.as_codes(*consumers) else self.of(channels)

    def _norm(self, kind: str, channels: int, *consumers: str) -> int:
        quantizes = self.as_codes(*consumers)
        name = "layer_norm_modulate_quantize" if quantizes else "layer_norm_modulate"
        if name in self.fused:
            return self._normed(channels, *consumers)
        made = self._defined("layer_norm_modulate", {"affine": (1, 1, 1), "modulated": (1, 3, 0)}[kind], channels)
        return max(made, self.of(channels) + self.codes(consumers[0], channels)) if quantizes else made

    def _gelu(self, channels: int) -> int:
        if not self.as_codes("ffn.2"):
            return self.of(channels)
        codes = self.codes("ffn.2", channels)
        return codes if "gelu_tanh_quantize" in self.fused else self.of(channels) + codes

    def _rms_norm(self, channels: int) -> int:
        return self._defined("rms_norm", (1, 2, 0), channels)

    def _rms_norm_rope(self, channels: int) -> int:
        return self._defined("rms_norm_rope", (1, 3, 0), channels)

    def _gate_residual(self, *, gated: bool, permuted: bool = False) -> int:
        C = self.config.dim
        if gated:
            return self._defined("gate_residual", (2, 2, 0), C)
        return self._defined("gate_residual", (2, 1, 1), C)

    def _defined(self, name: str, copies: tuple[int, int, int], channels: int) -> int:
        """The most that one operator holds, its result included: the result alone where there is a kernel, else
        operands converted to fp32, other fp32 tensors, and results rounded from them. fp32 is not converted or rounded.
        """
        narrow = self.dtype.itemsize
        if name in self.fused:
            return self.of(channels)
        wide = 8 if self.dtype == torch.float64 else 4
        converted, others, rounded = copies
        if narrow == wide:
            converted = rounded = 0
        return self.tokens * channels * ((converted + others) * wide + rounded * narrow)


def _outside_blocks(block: _Block) -> Iterator[Moment]:
    """Embedding of patches and the head."""
    config, of = block.config, block.of
    patch = math.prod(config.patch_size)
    into, out = config.in_dim * patch, config.out_dim * patch
    wide = block.tokens * out * (8 if block.dtype == torch.float64 else 4)
    yield {"patches, in raster order and in that of the first block": of(3 * into)}
    yield {"patches": of(2 * into), "stream": of(config.dim)}
    stream = {"stream": of(config.dim)}
    yield stream | {"norm before the head": block._defined("layer_norm_modulate", (1, 3, 0), config.dim)}
    yield stream | {"normalised stream": of(config.dim), "patches": of(out)}
    yield stream | {"patches, in the last order and in raster order": of(2 * out), "velocity": 2 * wide}
