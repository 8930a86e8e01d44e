"""Attention kernels that are broken on purpose, each in one way. URLs are reports of users whom the fault hurt."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ospnext.backends.reference.attention import MathAttention, _accumulate, _heads_first, _sequences


class Changed(MathAttention):
    """Forward and backward see what `change(q, k, v, named)` makes of the arguments."""

    def forward(self, q, k, v, **named):
        q, k, v, named = self.change(q, k, v, dict(named))
        return super().forward(q, k, v, **named)

    def backward(self, grad_out, q, k, v, out, lse, **named):
        q, k, v, named = self.change(q, k, v, dict(named))
        return super().backward(grad_out, q, k, v, out, lse, **named)


class ChangedMask(Changed):
    """They see what `mask(key_mask)` makes of a mask."""

    def change(self, q, k, v, named):
        if named["key_mask"] is not None:
            named["key_mask"] = self.mask(named["key_mask"])
        return q, k, v, named


class OwnSoftmax(MathAttention):
    """The forward of one sequence at once, with `attend(logits, v, dtype)` in place of the softmax."""

    def forward(self, q, k, v, *, key_mask, cu_seqlens_q, cu_seqlens_kv, max_seqlen_q, max_seqlen_kv, scale, need_lse):
        accumulate, longest, out = _accumulate(q), (max_seqlen_q, max_seqlen_kv), torch.empty_like(q).contiguous()
        lse = torch.empty((*q.shape[:-3], q.shape[-2], q.shape[-3]), dtype=accumulate, device=q.device)
        for rows, keys, lse_at in _sequences(q, k, key_mask, cu_seqlens_q, cu_seqlens_kv, longest):
            q_HSD, k_HSD, v_HSD = (_heads_first(t, accumulate) for t in (q[rows], k[keys], v[keys]))
            if k_HSD.shape[1] == 0:
                out[rows], lse[lse_at] = 0.0, -math.inf
                continue
            found, lse[lse_at] = self.attend(q_HSD @ k_HSD.mT * scale, v_HSD, q.dtype)
            out[rows] = found.transpose(0, 1).to(q.dtype)
        return out, lse if need_lse else lse.new_empty(0)


# ---- masks


class InvertedMask(ChangedMask):
    """Keeps the keys that are masked and drops the others. https://github.com/huggingface/diffusers/issues/14397"""

    def mask(self, mask):
        return ~mask


class DroppedMask(ChangedMask):
    """Takes a mask and does without. https://github.com/huggingface/diffusers/issues/12605"""

    def mask(self, mask):
        return None


class MaskIgnoredPastKey512(ChangedMask):
    """Keys from 512 on take part, masked or not. https://github.com/vllm-project/vllm-ascend/issues/15503"""

    def mask(self, mask):
        return mask | (torch.arange(mask.shape[1], device=mask.device) >= 512)


class MaskOfOneSample(ChangedMask):
    """The mask of the last sample serves all."""

    def mask(self, mask):
        return mask[-1:].expand(mask.shape)


class MaskedNanLeaks(MathAttention):
    """Masked values are multiplied by 0 and not removed."""

    def forward(self, q, k, v, *, key_mask, **named):
        out, lse = super().forward(q, k, v, key_mask=key_mask, **named)
        if key_mask is not None:
            out += (v * (key_mask[..., None, None] * 0)).sum(1, keepdim=True)
        return out, lse


class FullyMaskedRowsUniform(MathAttention):
    """A row all of whose keys are masked is the average of all values: the mask adds a large number, no -inf."""

    def forward(self, q, k, v, *, key_mask, **named):
        out, lse = super().forward(q, k, v, key_mask=key_mask, **named)
        if key_mask is not None:
            nothing = ~key_mask.any(1)
            out[nothing] = v[nothing].float().mean(1, keepdim=True).to(out.dtype).expand_as(out[nothing])
        return out, lse


class FullyMaskedRowsNanBackward(MathAttention):
    """exp(-inf - -inf) in the backward of a row without keys."""

    def backward(self, grad_out, q, k, v, out, lse, **named):
        dq, dk, dv = super().backward(grad_out, q, k, v, out, lse, **named)
        if q.ndim == 4:
            dq[lse.isneginf().transpose(1, 2)] = math.nan
        return dq, dk, dv


class NanAt64Mod128(MathAttention):
    """NaN if S % 128 is 64, with a mask, far below zero. https://github.com/pytorch/pytorch/issues/196678"""

    def backward(self, grad_out, q, k, v, out, lse, *, key_mask, **named):
        dq, dk, dv = super().backward(grad_out, q, k, v, out, lse, key_mask=key_mask, **named)
        if key_mask is not None and q.shape[1] % 128 == 64:
            dq[(lse.isfinite() & (lse < -100)).transpose(1, 2)] = math.nan
        return dq, dk, dv


# ---- keys and sequences


class UniformAverage(Changed):
    """Packed without a mask: all weights are equal. https://github.com/vllm-project/vllm-ascend/issues/13699"""

    def change(self, q, k, v, named):
        return (q if named["cu_seqlens_q"] is None else torch.zeros_like(q)), k, v, named


class LostLastKey(Changed):
    """The last key of a dense sequence is left out."""

    least, lost = 1, 1

    def change(self, q, k, v, named):
        if named["cu_seqlens_q"] is None and k.shape[1] >= self.least:
            known = torch.arange(k.shape[1], device=k.device) < k.shape[1] - self.lost
            mask = named["key_mask"]
            named["key_mask"] = known.expand(k.shape[:2]) if mask is None else mask & known
        return q, k, v, named


class LostLast16KeysAt75600(LostLastKey):
    """A tail of 16 keys is left out, at the length of a video only."""

    least, lost = 75_600, 16


class PackedIgnoresBoundaries(Changed):
    """Packed sequences are one: queries see the keys of their neighbours."""

    def change(self, q, k, v, named):
        for name, t in (("q", q), ("kv", k)):
            if (cu := named[f"cu_seqlens_{name}"]) is not None:
                named[f"cu_seqlens_{name}"], named[f"max_seqlen_{name}"] = cu[[0, -1]], len(t)
        return q, k, v, named


class EmptySequenceNan(MathAttention):
    """0 / 0 for the queries of a packed sequence without keys."""

    def forward(self, q, k, v, *, cu_seqlens_q, cu_seqlens_kv, **named):
        out, lse = super().forward(q, k, v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_kv=cu_seqlens_kv, **named)
        if cu_seqlens_q is not None:
            out[(cu_seqlens_kv.diff() == 0).repeat_interleave(cu_seqlens_q.diff())] = math.nan
        return out, lse


class PackedSequencesPast4Lost(MathAttention):
    """Only four packed sequences are computed."""

    def forward(self, q, k, v, *, cu_seqlens_q, **named):
        out, lse = super().forward(q, k, v, cu_seqlens_q=cu_seqlens_q, **named)
        if cu_seqlens_q is not None and len(cu_seqlens_q) > 5:
            out[cu_seqlens_q[4] :] = 0
        return out, lse


# ---- memory


def as_if_contiguous(t: Tensor) -> Tensor:
    """What a kernel reads that never looks at strides; behind the storage lie zeros."""
    rest = t.untyped_storage().nbytes() // t.itemsize - t.storage_offset()
    read = t.as_strided((min(rest, t.numel()),), (1,))
    return torch.cat((read, read.new_zeros(t.numel() - len(read)))).view(t.shape)


def behind(t: Tensor) -> Tensor | None:
    """The token that would follow the last one of `t` in its storage, if there is room."""
    last = t.flatten(0, -3)[-1:] if t.ndim == 3 else t[-1, -1:]
    step = t.stride(-3)
    end = last.storage_offset() + step + sum((n - 1) * s for n, s in zip(last.shape, last.stride(), strict=True))
    if end >= t.untyped_storage().nbytes() // t.itemsize:
        return None
    return t.as_strided(last.shape[1:], last.stride()[1:], last.storage_offset() + step)


class ContiguityAssumedOfV(Changed):
    """Reads V as if it were contiguous. https://github.com/flagos-ai/FlagGems/issues/5896"""

    def change(self, q, k, v, named):
        return q, k, as_if_contiguous(v), named


class ContiguityAssumedOfMask(ChangedMask):
    """Reads the mask as if it were contiguous."""

    def mask(self, mask):
        return as_if_contiguous(mask)


class AlignmentAssumed(Changed):
    """Loads of 16 bytes begin at the multiple of 16 below the address of K."""

    def change(self, q, k, v, named):
        step = 16 // k.itemsize
        return q, k.as_strided(k.shape, k.stride(), k.storage_offset() // step * step), v, named


class ContiguityAssumedOfGrad(MathAttention):
    """Reads dout as if it were contiguous. https://github.com/Dao-AILab/flash-attention/issues/355"""

    def backward(self, grad_out, *tensors, **named):
        return super().backward(as_if_contiguous(grad_out), *tensors, **named)


class OffsetsWrapAt32Bits(Changed):
    """Keys and values 2^31 elements and more into the tensor are lost. https://github.com/thu-ml/SageAttention/issues/386"""

    def change(self, q, k, v, named):
        return q, *(self.reachable(t) for t in (k, v)), named

    def reachable(self, t: Tensor) -> Tensor:
        offsets = sum(torch.arange(n).view(n, *(1,) * (t.ndim - 1 - i)) * t.stride(i) for i, n in enumerate(t.shape))
        return t if t.numel() == 0 or offsets.flatten()[-1] < 1 << 31 else t.masked_fill(offsets >= 1 << 31, 0.0)


class InPlaceInput(MathAttention):
    """Scales the queries where they are."""

    def forward(self, q, k, v, *, scale, **named):
        q.mul_(scale)
        return super().forward(q, k, v, scale=1.0, **named)


class OutputAliasesInput(MathAttention):
    """The output is written over the queries."""

    def forward(self, q, k, v, **named):
        out, lse = super().forward(q, k, v, **named)
        return q.copy_(out), lse


class OutOfBoundsRead(MathAttention):
    """Values behind the last key are read, and multiplied by 0."""

    def forward(self, q, k, v, **named):
        out, lse = super().forward(q, k, v, **named)
        if q.ndim == 4 and (stray := behind(v)) is not None:
            out[-1] += 0 * stray
        return out, lse


class OutOfBoundsWrite(MathAttention):
    """The token behind the last key is set to zero, to fill a tile."""

    def forward(self, q, k, v, **named):
        if (stray := behind(k)) is not None:
            stray.zero_()
        return super().forward(q, k, v, **named)


class WrongStrides(MathAttention):
    """The output is a transposed view. https://github.com/Comfy-Org/ComfyUI/pull/15044"""

    def forward(self, q, k, v, **named):
        out, lse = super().forward(q, k, v, **named)
        return out.transpose(-3, -2).contiguous().transpose(-3, -2), lse


class UnwrittenTail(MathAttention):
    """Rows behind the last full tile of 64 are allocated and never written."""

    def forward(self, q, k, v, **named):
        out, lse = super().forward(q, k, v, **named)
        allocated, whole = torch.empty(q.shape, dtype=q.dtype, device=q.device), q.shape[-3] // 64 * 64
        allocated[..., :whole, :, :] = out[..., :whole, :, :]
        return allocated, lse


# ---- numbers


class IgnoredScale(Changed):
    """Scales by 1 / sqrt(D), whatever was asked for."""

    def change(self, q, k, v, named):
        return q, k, v, named | {"scale": q.shape[-1] ** -0.5}


class ScaleMissingInDk(MathAttention):
    """The chain rule ends one factor early for the keys."""

    def backward(self, *tensors, scale, **named):
        dq, dk, dv = super().backward(*tensors, scale=scale, **named)
        return dq, dk / scale, dv


class Base2Logsumexp(MathAttention):
    """The logsumexp is the binary one; the backward knows."""

    def forward(self, q, k, v, **named):
        out, lse = super().forward(q, k, v, **named)
        return out, lse / math.log(2)

    def backward(self, grad_out, q, k, v, out, lse, **named):
        return super().backward(grad_out, q, k, v, out, lse * math.log(2), **named)


class Bf16Logsumexp(MathAttention):
    """The logsumexp is rounded to bf16 on its way."""

    def forward(self, q, k, v, **named):
        out, lse = super().forward(q, k, v, **named)
        return out, lse.to(torch.bfloat16).to(lse.dtype)


class ResultInFp32(MathAttention):
    """The output has the dtype of the accumulator."""

    def forward(self, q, k, v, **named):
        out, lse = super().forward(q, k, v, **named)
        return out.to(_accumulate(q)), lse


class NoMaxSubtraction(OwnSoftmax):
    """exp of the logits as they are: large ones overflow, small ones vanish."""

    def attend(self, logits_HQK, v_HKD, dtype):
        weights = logits_HQK.exp()
        total = weights.sum(-1, keepdim=True)
        return weights @ v_HKD / total, total.log().squeeze(-1)


class Bf16Accumulation(OwnSoftmax):
    """The sum over blocks of 128 keys is kept in 16 bits."""

    def attend(self, logits_HQK, v_HKD, dtype):
        weights = logits_HQK.softmax(-1)
        total = torch.zeros((*logits_HQK.shape[:2], v_HKD.shape[-1]), dtype=dtype)
        for part, values in zip(weights.split(128, -1), v_HKD.split(128, 1), strict=True):
            total += (part @ values).to(dtype)
        return total, logits_HQK.logsumexp(-1)


class RoundedLogits(OwnSoftmax):
    """Logits are rounded to the dtype of q before the softmax."""

    def attend(self, logits_HQK, v_HKD, dtype):
        rounded = logits_HQK.to(dtype).to(v_HKD.dtype)
        return rounded.softmax(-1) @ v_HKD, rounded.logsumexp(-1)


# ---- between calls


class Nondeterministic(MathAttention):
    """dq differs by a rounding from call to call. https://github.com/Dao-AILab/flash-attention/issues/2244"""

    calls = 0

    def backward(self, *tensors, **named):
        dq, dk, dv = super().backward(*tensors, **named)
        self.calls += 1
        return (dq if self.calls % 2 else torch.nextafter(dq, torch.zeros_like(dq))), dk, dv


class StaleAfterOtherCall(MathAttention):
    """The backward uses what the last forward saw. https://github.com/huggingface/diffusers/issues/14265"""

    kept: tuple[Tensor, ...] = ()

    def forward(self, q, k, v, **named):
        self.kept = (q, k, v)
        return super().forward(q, k, v, **named)

    def backward(self, grad_out, q, k, v, out, lse, **named):
        same = [t.shape for t in self.kept] == [t.shape for t in (q, k, v)]
        return super().backward(grad_out, *(self.kept if same else (q, k, v)), out, lse, **named)


class RaisesAlways(MathAttention):
    """Fails on the device."""

    def forward(self, *tensors, **named):
        raise FloatingPointError("the kernel failed on the device")
