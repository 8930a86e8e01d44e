"""Attention kernels that are broken on purpose and that no check has found so far: each names a sentence of the
contract, or a size that the model needs, without a case. `benchmarks/mutant_table.py --unseen` runs them; one that is
found moves to broken_attention.py.
"""

from __future__ import annotations

import math

import torch

from ospnext.backends.reference.attention import MathAttention


class OffsetsWrapAt32BitsInGradients(MathAttention):
    """dout 2^31 elements and more into the tensor is lost. https://github.com/thu-ml/SageAttention/issues/386"""

    def backward(self, grad_out, *tensors, **named):
        if sum((n - 1) * s for n, s in zip(grad_out.shape, grad_out.stride(), strict=True)) >= 1 << 31:
            grad_out = torch.zeros_like(grad_out)
        return super().backward(grad_out, *tensors, **named)


class FailureLeavesMark(MathAttention):
    """After a call with a wrong cu_seqlens, results are NaN."""

    failed = False

    def forward(self, q, k, v, **named):
        try:
            out, lse = super().forward(q, k, v, **named)
        except ValueError:
            self.failed = True
            raise
        return out + (math.nan if self.failed else 0), lse


class BackwardNeedsItsOwnForward(MathAttention):
    """The backward looks its inputs up by the address of the output, which only its own forward can have written.
    Whether opcheck sees it depends on which addresses are reused.
    """

    def __init__(self) -> None:
        self.known: set[int] = set()

    def forward(self, q, k, v, **named):
        out, lse = super().forward(q, k, v, **named)
        self.known.add(out.data_ptr())
        return out, lse

    def backward(self, grad_out, q, k, v, out, lse, **named):
        grads = super().backward(grad_out, q, k, v, out, lse, **named)
        return grads if out.data_ptr() in self.known else tuple(g.fill_(math.nan) for g in grads)
