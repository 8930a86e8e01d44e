"""The gradient of a collective: it is linear in what the ranks hold, so its backward is another collective, its
adjoint. No collective is called by name here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Linear = Callable[[Tensor], Tensor]


def wants_gradient(x: Tensor) -> bool:
    return x.requires_grad and torch.is_grad_enabled()


def with_adjoint(x: Tensor, forward: Linear, adjoint: Linear) -> Tensor:
    """`forward(x)`, whose gradient with respect to x is `adjoint` of the incoming one. Both are called on every rank.

    `adjoint` may be differentiated in its turn."""
    return _WithAdjoint.apply(x, forward, adjoint)


class _WithAdjoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Linear, adjoint: Linear) -> Tensor:
        ctx.adjoint = adjoint
        return forward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.adjoint(grad), None, None
