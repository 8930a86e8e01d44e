"""npu_gelu, its gradient, and npu_gelu_quant.

Sources: torch_npu's page of npu_gelu and CANN's page of aclnnGeluQuant, whose published kernel saturates.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .dtypes import FLOATS, require_hifloat8, saturated
from .quantize import LARGEST
from .rules import require, require_dtype, require_shape


def _check(op: str, x: Tensor, approximate: str) -> None:
    require_dtype(op, "input", x, FLOATS)
    require(op, approximate in ("none", "tanh"), "approximate is none or tanh", approximate)


def npu_gelu(input: Tensor, *, approximate: str = "none") -> Tensor:
    """x * Phi(x), with `approximate` "tanh" by its approximation."""
    _check("npu_gelu", input, approximate)
    return torch.nn.functional.gelu(input.float(), approximate=approximate).to(input.dtype)


def npu_gelu_backward(grad_output: Tensor, input: Tensor, *, approximate: str = "none") -> Tensor:
    """Gradient of input."""
    op = "npu_gelu_backward"
    _check(op, input, approximate)
    require_dtype(op, "grad_output", grad_output, (input.dtype,))
    require_shape(op, "grad_output", grad_output, input.shape)
    gradient = torch.ops.aten.gelu_backward(grad_output.float(), input.float(), approximate=approximate)
    return gradient.to(input.dtype)


def npu_gelu_quant(
    input: Tensor,
    *,
    input_scale: Tensor | None = None,
    input_offset: Tensor | None = None,
    approximate: str = "none",
    quant_mode: str = "dynamic",
    dst_type: int | None = None,
    round_mode: str = "rint",
) -> tuple[Tensor, Tensor | None]:
    """(HiFloat8 codes of gelu(input), their scale).

    "static": codes of gelu * input_scale + input_offset, no scale. "dynamic": a scale for each row, which is the
    largest magnitude over 32768, the largest HiFloat8 value; nothing lets it end at 15. input_scale may come first.
    """
    op = "npu_gelu_quant"
    _check(op, input, approximate)
    require_hifloat8(op, "only HiFloat8 is emulated (dst_type 290; None is int8)", dst_type)
    require(op, round_mode != "hybrid", "hybrid rounding is not emulated: its random bits are not documented")
    require(op, round_mode == "round", "round_mode is round for HiFloat8", round_mode)
    require(op, quant_mode in ("static", "dynamic"), "quant_mode is static or dynamic", quant_mode)
    require(op, input.numel() > 0, "input is not empty")
    factor, shift = (
        _row(op, name, t, input) for name, t in (("input_scale", input_scale), ("input_offset", input_offset))
    )
    y = torch.nn.functional.gelu(input.float(), approximate=approximate)
    if quant_mode == "static":
        require(op, factor is not None and shift is not None, "static quantization has input_scale and input_offset")
        assert input_scale is not None and input_offset is not None and factor is not None and shift is not None
        alike = (input_scale.dtype, input_scale.shape) == (input_offset.dtype, input_offset.shape)
        require(op, alike, "input_offset has the dtype and shape of input_scale", input_offset.shape)
        return saturated(y * factor + shift), None
    require(op, input.ndim >= 2, "dynamic quantization has 2 dimensions or more", input.ndim)
    require(op, shift is None, "dynamic quantization has no input_offset")
    if factor is not None:
        y = y * factor
    scale = y.abs().amax(-1, keepdim=True) / torch.full((), LARGEST)
    return saturated(y / scale), scale.squeeze(-1)


def _row(op: str, name: str, tensor: Tensor | None, x: Tensor) -> Tensor | None:
    if tensor is None:
        return None
    require_dtype(op, name, tensor, {x.dtype, torch.float32})
    require_shape(op, name, tensor, (1,), (x.shape[-1],))
    return tensor.float()


KERNELS: dict[str, Callable] = {
    "npu_gelu": npu_gelu,
    "npu_gelu_backward": npu_gelu_backward,
    "npu_gelu_quant": npu_gelu_quant,
}
