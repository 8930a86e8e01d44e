"""npu_rotary_mul and its gradient: rotary position embedding in four orders of pairs.

Sources: torch_npu's page of npu_rotary_mul, CANN's pages of aclnnRotaryPositionEmbedding and its gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .dtypes import FLOATS
from .rules import is_950, require, require_absent, require_dtype, require_shape

MODES = ("half", "interleave", "quarter", "interleave-half")
MOST_DIM = 1024

#: Before Ascend 950: two modes, narrower heads, and in one of them angles for tokens alone.
MODES_OF_910 = MODES[:2]
MOST_DIM_OF_910, MOST_OF_910 = 894, 999


def _rotated(x: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    """What cos and sin multiply."""
    if mode == "half":
        a, b = x.chunk(2, -1)
        return x, torch.cat((-b, a), -1)
    a, b = x[..., ::2], x[..., 1::2]
    if mode == "interleave":  # pairs (2i, 2i + 1)
        return x, torch.stack((-b, a), -1).flatten(-2)
    if mode == "quarter":
        first, second, third, fourth = x.chunk(4, -1)
        return x, torch.cat((-second, first, -fourth, third), -1)
    # Even places first, odd ones behind; the result stays in that order.
    return torch.cat((a, b), -1), torch.cat((-b, a), -1)


def _turned_back(by_cos: Tensor, by_sin: Tensor, mode: str) -> Tensor:
    """The transpose of `_rotated`: gradient of x from those of its two results."""
    if mode == "quarter":
        first, second, third, fourth = by_sin.chunk(4, -1)
        return by_cos + torch.cat((second, -first, fourth, -third), -1)
    if mode == "interleave":
        return by_cos + torch.stack((by_sin[..., 1::2], -by_sin[..., ::2]), -1).flatten(-2)
    first, second = by_sin.chunk(2, -1)
    if mode == "half":
        return by_cos + torch.cat((second, -first), -1)
    even, odd = by_cos.chunk(2, -1)
    return torch.stack((even + second, odd - first), -1).flatten(-2)


def _check(op: str, x: Tensor, r1: Tensor, r2: Tensor, mode: str) -> None:
    require(op, mode in MODES, f"rotary_mode is one of {', '.join(MODES)}", mode)
    for name, tensor in (("input", x), ("r1", r1), ("r2", r2)):
        require_dtype(op, name, tensor, FLOATS)
    require(op, x.ndim in (3, 4), "input has 3 or 4 dimensions", x.ndim)
    head_dim = x.shape[-1]
    pairs = 4 if mode == "quarter" else 2
    require(op, head_dim % pairs == 0, f"head dimension is a multiple of {pairs} in mode {mode}", head_dim)
    require(op, head_dim <= MOST_DIM, f"head dimension is at most {MOST_DIM}", head_dim)
    require_shape(op, "r2", r2, r1.shape)
    if not is_950():
        _check_910(op, x, r1, mode)
    if x.ndim == 3:
        tokens, heads = x.shape[:2]
        require_shape(op, "r1", r1, (tokens, 1, head_dim), (tokens, heads, head_dim))
        return
    b, s, n = x.shape[:3]
    leading = [(1, 1, 1), (b, s, n), (b, 1, n), (b, s, 1), (1, 1, n), (1, s, 1), (b, 1, 1)]
    require_shape(op, "r1", r1, *((*sizes, head_dim) for sizes in leading))


def _check_910(op: str, x: Tensor, r1: Tensor, mode: str) -> None:
    require(op, mode in MODES_OF_910, f"rotary_mode is one of {', '.join(MODES_OF_910)} before Ascend 950", mode)
    rule = f"head dimension is at most {MOST_DIM_OF_910} before Ascend 950"
    require(op, x.shape[-1] <= MOST_DIM_OF_910, rule, x.shape[-1])
    if x.ndim == 3 or mode == "half":
        return
    shared = [size == 1 for size in r1.shape[:3]]
    require(op, sum(shared) >= 2, "angles are shared by samples and heads (interleave, before Ascend 950)", r1.shape)
    tokens = next((dim for dim, one in enumerate(shared) if not one), 1)
    pairs = x.shape[:3].numel() // max(1, x.shape[tokens])
    require(op, pairs <= MOST_OF_910, f"samples times heads are at most {MOST_OF_910} before Ascend 950", pairs)


def npu_rotary_mul(
    input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate: Tensor | None = None
) -> Tensor:
    """input * r1 + rotated(input) * r2, in the dtype of input, to which r1 (cos) and r2 (sin) are cast first."""
    op = "npu_rotary_mul"
    require_absent(op, rotate=rotate)
    _check(op, input, r1, r2, rotary_mode)
    cos, sin = (t.to(input.dtype).float() for t in (r1, r2))
    x, turned = _rotated(input.float(), rotary_mode)
    return (x * cos + turned * sin).to(input.dtype)


def npu_rotary_mul_backward(
    grad: Tensor, input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half"
) -> tuple[Tensor, Tensor, Tensor]:
    """(gradient of input, of r1, of r2), all in the dtype of input."""
    op = "npu_rotary_mul_backward"
    _check(op, input, r1, r2, rotary_mode)
    require_dtype(op, "grad", grad, FLOATS)
    require_shape(op, "grad", grad, input.shape)
    dy, cos, sin = (t.to(input.dtype).float() for t in (grad, r1, r2))
    dx = _turned_back(dy * cos, dy * sin, rotary_mode)
    x, turned = _rotated(input.float(), rotary_mode)
    shared = tuple(dim for dim, (whole, one) in enumerate(zip(input.shape, r1.shape, strict=True)) if one != whole)
    products = (dy * x, dy * turned)
    d1, d2 = (p.sum(shared, keepdim=True) if shared else p for p in products)
    return dx.to(input.dtype), d1.to(input.dtype), d2.to(input.dtype)


KERNELS: dict[str, Callable] = {
    "npu_rotary_mul": npu_rotary_mul,
    "npu_rotary_mul_backward": npu_rotary_mul_backward,
}
