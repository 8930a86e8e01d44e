"""Attention on FP8 numbers, step by step in PyTorch, and the same with one step broken on purpose.

`Fp8Attention` itself is right: it rounds wherever the contract allows, as FP8 tensor cores make it."""

from __future__ import annotations

import torch

from ospnext.backends.reference import quantize as honest
from ospnext.backends.reference.attention import math
from ospnext.numerics import carrier

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


class Fp8Attention:
    """Operands carried as E4M3, probabilities and the result rounded to it. Products of 32 at a time are added to a sum
    that is cut to 14 bits.
    """

    contract = "native_attention"
    #: Of the mantissa of a sum: 13 of 23, and the one that is not stored.
    cut = 10

    def forward(
        self, q, k, v, *, cu_seqlens_q, cu_seqlens_kv, scale, scale_max, scale_mode, amax, **lengths
    ) -> torch.Tensor:
        mean = self.mean(v)
        given = (*(amax or (None, None)), None)
        settings = {"scale_max": scale_max, "scale_mode": scale_mode, "granularity": "tensor", "carried": True}
        carried = [self.quantize(t, a, **settings) for t, a in zip((q, k, v.float() - mean), given, strict=True)]
        numbers = [codes.float() for codes, _ in carried]
        scales = [s.item() for _, s in carried]
        self.centre = mean - self.mean(numbers[2] * scales[2])
        if cu_seqlens_q is None:
            parts = [self.sequence(*one, scales, scale, scale_max) for one in zip(*numbers, strict=True)]
            return torch.stack(parts).to(q.dtype)
        ends = [cu.tolist() for cu in (cu_seqlens_q, cu_seqlens_kv, cu_seqlens_kv)]
        parts = [
            self.sequence(*(t[e[i] : e[i + 1]] for t, e in zip(numbers, ends, strict=True)), scales, scale, scale_max)
            for i in range(len(ends[0]) - 1)
        ]
        return torch.cat(parts).to(q.dtype)

    def mean(self, v):
        return v.float().flatten(0, -3).mean(0)

    def quantize(self, t, amax, **settings):
        return honest.quantize(t, amax, **settings)

    def sequence(self, q, k, v, scales, scale, scale_max):
        q_scale, k_scale, v_scale = scales
        if not len(k):
            return torch.zeros_like(q)
        logits = torch.einsum("qhd,khd->hqk", q, k) * self.of_logits(q_scale, k_scale) * scale
        exponentials = (logits - logits.amax(-1, keepdim=True)).exp()
        out = self.sum(self.probabilities(exponentials), v)
        return self.result(out / exponentials.sum(-1).mT[..., None] * v_scale, v_scale, scale_max) + self.centre

    def sum(self, p, v):
        total = torch.zeros(p.shape[1], *v.shape[1:])
        for weights, values in zip(p.split(32, -1), v.split(32), strict=True):
            total += torch.einsum("hqk,khd->qhd", weights, values)
            total = (total.view(torch.int32) >> self.cut << self.cut).view(torch.float32)
        return total

    def of_logits(self, q_scale, k_scale):
        return q_scale * k_scale

    def probabilities(self, exponentials):
        return (exponentials * 256).to(E4M3).float() / 256

    def result(self, out, v_scale, scale_max):
        of_result = v_scale * scale_max * 2.0 ** carrier.shift_for(scale_max) / 448
        return (out / of_result).clamp(-448, 448).to(E4M3).float() * of_result


class ProbabilitiesInE5m2(Fp8Attention):
    """Probabilities keep two bits of mantissa and not three."""

    def probabilities(self, exponentials):
        return exponentials.to(E5M2).float()


class SmallProbabilitiesLost(Fp8Attention):
    """Probabilities below 2^-6 of the largest are zero."""

    def probabilities(self, exponentials):
        return super().probabilities(exponentials * (exponentials >= 2.0**-6))


class ProbabilitiesTruncated(Fp8Attention):
    """Probabilities are cut off to three bits of mantissa: none is rounded up."""

    def probabilities(self, exponentials):
        mantissa, exponent = torch.frexp(exponentials)
        return torch.ldexp((mantissa * 16).floor() / 16, exponent)


class ResultClipped(Fp8Attention):
    """The scale of the result leaves no room for values above half the largest of v."""

    def result(self, out, v_scale, scale_max):
        return super().result(out, v_scale / 2, scale_max)


class ResultInE5m2(Fp8Attention):
    """The result keeps two bits of mantissa."""

    def result(self, out, v_scale, scale_max):
        return (out / v_scale).to(E5M2).float() * v_scale


class KeyScaleForgotten(Fp8Attention):
    """Logits lack the scale of k."""

    def of_logits(self, q_scale, k_scale):
        return q_scale


class ScalesTwiceAsLarge(Fp8Attention):
    """Carried numbers are multiplied by twice the scale they have."""

    def quantize(self, t, amax, **settings):
        codes, scale = super().quantize(t, amax, **settings)
        return codes, scale * 2


class PlainE4m3(Fp8Attention):
    """q, k and v are E4M3 numbers, but not those that carry HiFloat8 values."""

    def quantize(self, t, amax, *, scale_max, **_):
        scale = t.abs().amax().float() / (scale_max * 2.0 ** carrier.shift_for(scale_max))
        return (t.float() / scale).to(E4M3), scale


class PackedAsOne(Fp8Attention):
    """Packed sequences attend to each other."""

    def forward(self, q, k, v, *, cu_seqlens_q, cu_seqlens_kv, **rest):
        if cu_seqlens_q is not None:
            q, k, v = q[None], k[None], v[None]
        found = super().forward(q, k, v, cu_seqlens_q=None, cu_seqlens_kv=None, **rest)
        return found if cu_seqlens_q is None else found[0]


class MeanKept(Fp8Attention):
    """v is quantized with its mean, which long sums lose."""

    def mean(self, v):
        return torch.zeros(v.shape[-2:])


class SumsKeep9Bits(Fp8Attention):
    """Sums keep 9 bits."""

    cut = 15


class CentreForgotten(Fp8Attention):
    """The mean of v is taken out and not added again."""

    def sequence(self, *arguments):
        return super().sequence(*arguments) - self.centre


class NotQuantized(Fp8Attention):
    """The attention of the backend, on q, k and v as they are."""

    def forward(self, q, k, v, *, scale_max, scale_mode, amax, **rest):
        return math.forward(q, k, v, key_mask=None, need_lse=False, **rest)[0]
