"""Attention kernels for Ascend that are broken on purpose, each in one way that the vendor's operators invite. Loaded
where torch_npu is: in the process that has the host NPU.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from typing import Any

import torch
from broken_attention import as_if_contiguous
from torch import Tensor

from ospnext.backends.ascend import masks
from ospnext.backends.ascend.attention.fusion import Fusion
from ospnext.backends.ascend.attention.hif8 import of_blocks
from ospnext.backends.ascend.attention.infer_hif8 import InferHiF8
from ospnext.backends.ascend.attention.quant_fusion import QuantFusion
from ospnext.backends.ascend.attention.statistics import REPEATED, logsumexp

# ---- masks


class InvertedMask(Fusion):
    """True keeps a key, as in PyTorch."""

    def mask_arguments(self, key_mask: Tensor, q_len: int) -> dict[str, Any]:
        return super().mask_arguments(~key_mask, q_len)


class MaskIgnoredPastKey512(Fusion):
    """The mask is broadcast for the first 512 keys, all others take part."""

    def mask_arguments(self, key_mask: Tensor, q_len: int) -> dict[str, Any]:
        arguments = super().mask_arguments(key_mask, q_len)
        arguments["atten_mask"][..., 512:] = False
        return arguments


class MaskOfOneRow(Fusion):
    """The mask is [B, 1, 1, Sk], for the operator to broadcast."""

    def mask_arguments(self, key_mask: Tensor, q_len: int) -> dict[str, Any]:
        return super().mask_arguments(key_mask, 1)


class MaskMissingInGradient(Fusion):
    """The gradient is that of all keys."""

    def call_grad(self, *tensors: Any, atten_mask: Tensor | None = None, **more: Any):
        return super().call_grad(*tensors, **more)


class MaskedValuesMultiplied(Fusion):
    """Values that are masked are multiplied by probabilities of 0, whatever they hold."""

    def masked(self, q, k, v, key_mask, scale, need_lse):
        out, *found = self.call(q, k, v, "BSND", scale, **self.mask_arguments(key_mask, q.shape[1]))
        keyless = masks.keyless(key_mask)
        return out.masked_fill(keyless[:, None, None, None], 0), logsumexp(*found).masked_fill(
            keyless[:, None, None], -torch.inf
        )


class LogsumexpAsItIs(Fusion):
    """The gradient is told the logsumexp -inf of rows without keys, and a sum of 1, and kept as it comes."""

    def without_keyless(self, gradients, key_mask):
        return gradients

    def call_grad(self, grad_out, q, k, v, out, found, layout, scale, **more):
        unbounded = found[0].masked_fill(found[0] == torch.finfo(torch.float32).max, -torch.inf)
        return super().call_grad(grad_out, q, k, v, out, (unbounded, found[1]), layout, scale, **more)


class GradientOfKeyless(Fusion):
    """The gradient of samples without keys is what the operator makes of their queries."""

    def without_keyless(self, gradients, key_mask):
        return gradients


# ---- packs


class LeadingZero(Fusion):
    """The ends of sequences are cu_seqlens, with the 0 in front."""

    def pack_arguments(self, pack) -> dict[str, Any]:
        return {name: [0, *ends] for name, ends in super().pack_arguments(pack).items()}


class LengthsForEnds(Fusion):
    """Lengths of sequences, where the operator wants to know their ends."""

    def pack_arguments(self, pack) -> dict[str, Any]:
        return {"actual_seq_qlen": pack.q.lengths, "actual_seq_kvlen": pack.kv.lengths}


class StatisticsByToken(Fusion):
    """Statistics of a pack are read by their shape, [T, H, 8], and not as they lie."""

    def packed(self, q, k, v, pack, scale, need_lse):
        operands = (pack.q.take(q), pack.kv.take(k), pack.kv.take(v))
        out, largest, total = self.call(*operands, "TND", scale, **self.pack_arguments(pack))
        return pack.q.put(out), pack.q.put(logsumexp(largest, total).T.contiguous(), -torch.inf, dim=1)


# ---- operands


class ScaleForgotten(Fusion):
    """Logits are not scaled: the operator's default is 1."""

    def call(self, q, k, v, layout, scale, **more):
        return super().call(q, k, v, layout, 1.0, **more)


class ScaleForgottenInGradient(Fusion):
    """Logits of the gradient are not scaled."""

    def call_grad(self, grad_out, q, k, v, out, found, layout, scale, **more):
        return super().call_grad(grad_out, q, k, v, out, found, layout, 1.0, **more)


class WrongStrides(Fusion):
    """Queries are read as if they were contiguous."""

    def forward(self, q, *tensors, **named):
        return super().forward(as_if_contiguous(q), *tensors, **named)


class GradientStridesIgnored(Fusion):
    """dout is read as if it were contiguous."""

    def backward(self, grad_out, *tensors, **named):
        return super().backward(as_if_contiguous(grad_out), *tensors, **named)


class SixteenStatistics(Fusion):
    """Statistics of the gradient are repeated 16 times, not 8."""

    def call_grad(self, grad_out, q, k, v, out, found, layout, scale, **more):
        twice = tuple(t.repeat_interleave(16 // REPEATED, -1) for t in found)
        return super().call_grad(grad_out, q, k, v, out, twice, layout, scale, **more)


# ---- HiFloat8


class OneBlockSize(InferHiF8):
    """Scales of q for blocks of 256, as those of k and v are."""

    def call(self, q, k, v, scales, scale):
        return _infer(q, k, v, [of_blocks(s, c, 256) for s, c in zip(scales, (q, k, v), strict=True)], scale)


class ScaleOfKeysMissing(InferHiF8):
    """Codes of k are taken for its values."""

    def call(self, q, k, v, scales, scale):
        return super().call(q, k, v, (scales[0], torch.ones_like(scales[1]), scales[2]), scale)


class MeanOfValuesLost(InferHiF8):
    """The mean of each channel of v is taken out, and not added to the result."""

    def forward(self, q, k, v, **named):
        return super().forward(q, k, v.float() - v.float().flatten(0, -3).mean(0), **named).to(q.dtype)


class ModeForgotten(InferHiF8):
    """The operator is not told how its operands are quantized."""

    def call(self, q, k, v, scales, scale):
        blocks = [of_blocks(s, c, b) for s, c, b in zip(scales, (q, k, v), (128, 256, 256), strict=True)]
        return _infer(q, k, v, blocks, scale, mode=0)


def _infer(q, k, v, scales, scale, mode=7):
    names = ("query", "key", "value")
    named: dict[str, Any] = {f"dequant_scale_{n}": s for n, s in zip(names, scales, strict=True)}
    named |= {f"{n}_dtype": 290 for n in names} | {f"{n}_quant_mode": mode for n in names}
    return torch.ops.npu.npu_fused_infer_attention_score_v2(
        q, k, v, num_query_heads=q.shape[2], input_layout="BSND", softmax_scale=scale, out_dtype=torch.bfloat16, **named
    )[0]


# ---- not broken: what the cases of the suite do not reach by themselves


class KeysPacked(Fusion):
    """Keys are packed where the mask is small as well."""

    def forward(self, *tensors, **named):
        with _masks_of(0):
            return super().forward(*tensors, **named)

    def backward(self, *tensors, **named):
        with _masks_of(0):
            return super().backward(*tensors, **named)


class AnyShape(QuantFusion):
    """npu_quant_fusion_attention in other shapes than those that the operator takes on hardware."""


@contextlib.contextmanager
def _masks_of(size: int) -> Iterator[None]:
    """The size of the largest mask, for a while."""
    before, masks.MASK_BYTES = masks.MASK_BYTES, size
    try:
        yield
    finally:
        masks.MASK_BYTES = before


def __getattr__(name: str) -> object:
    """The kernel of the mutant `name`: an instance of the class, under the name that a manifest's target has."""
    for kernel in vars(sys.modules[__name__]).values():
        if isinstance(kernel, type) and kernel.__module__ == __name__ and snake(kernel.__name__) == name:
            return kernel()
    raise AttributeError(name)


def snake(name: str) -> str:
    return re.sub(r"(?<=[a-z\d])(?=[A-Z])", "_", name).lower()
