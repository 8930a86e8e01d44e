"""Attention kernels that are broken on purpose beyond a size, or in what they keep: each was once found by no check,
and has a case since.
"""

from __future__ import annotations

import torch
from broken_attention import Changed, ChangedMask

from ospnext.backends.reference.attention import MathAttention


class MaskIgnoredPastKey1024(ChangedMask):
    """Keys from 1024 on take part, masked or not. https://github.com/vllm-project/vllm-ascend/issues/15503"""

    def mask(self, mask):
        return mask | (torch.arange(mask.shape[1], device=mask.device) >= 1024)


class PackedLosesKeysPast256(MathAttention):
    """A packed sequence sees its first 256 keys."""

    def forward(self, q, k, v, *, cu_seqlens_q, cu_seqlens_kv, **named):
        out, lse = super().forward(q, k, v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_kv=cu_seqlens_kv, **named)
        if cu_seqlens_q is not None:
            long = cu_seqlens_kv.diff() > 256
            out[long.repeat_interleave(cu_seqlens_q.diff())] = 0
        return out, lse


class HeadsPast8Lost(MathAttention):
    """Only eight heads are computed; the model has 40."""

    def forward(self, q, k, v, **named):
        out, lse = super().forward(q, k, v, **named)
        out[..., 8:, :] = 0
        return out, lse


class SamplesPast2Lost(MathAttention):
    """Only two samples are computed."""

    def forward(self, q, k, v, **named):
        out, lse = super().forward(q, k, v, **named)
        if q.ndim == 4:
            out[2:] = 0
        return out, lse


class BackwardLosesQueriesPast1024(MathAttention):
    """dk and dv add the gradients of the first 1024 queries only."""

    def backward(self, grad_out, *tensors, **named):
        dq, dk, dv = super().backward(grad_out, *tensors, **named)
        if grad_out.ndim == 4 and grad_out.shape[1] > 1024:
            cut = grad_out.clone()
            cut[:, 1024:] = 0
            _, dk, dv = super().backward(cut, *tensors, **named)
        return dq, dk, dv


class ZeroScaleIsDefault(Changed):
    """scale = 0 is taken for "not given"."""

    def change(self, q, k, v, named):
        return q, k, v, named | {"scale": named["scale"] or q.shape[-1] ** -0.5}


class GradientsShareMemory(MathAttention):
    """dk and dv are two halves of one buffer."""

    def backward(self, *tensors, **named):
        dq, dk, dv = super().backward(*tensors, **named)
        return dq, *torch.stack((dk, dv)).unbind()
