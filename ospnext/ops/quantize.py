"""HiFloat8 casts and scaled quantization: the functions that models call, and the torch.library ops behind them. The
meaning is in contracts/hif8_cast.py and contracts/quantize.py.
"""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ospnext.numerics import carrier
from ospnext.numerics.hif8 import INFO
from ospnext.numerics.scaling import (
    GRANULARITIES,
    SCALE_MODES,
    Granularity,
    ScaleMode,
    amax_of,
    scale_shape,
)
from ospnext.ops import collective
from ospnext.ops.contracts import hif8_cast, quantize
from ospnext.ops.contracts.hif8_cast import CastRequest
from ospnext.ops.contracts.quantize import QuantizeRequest
from ospnext.ops.library import Decided, define

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Quantized(NamedTuple):
    """Codes (any shape) and their scale (fp32, the same shape with some dimensions 1): values(codes) * scale.

    Codes are HiFloat8 ones (uint8), or E4M3 numbers that carry them (float8_e4m3fn): see numerics/carrier.py.
    """

    codes: Tensor
    scale: Tensor


class EncodeKernel(Protocol):
    """What an implementation's `target` provides for hif8_encode."""

    def __call__(self, x: Tensor, saturate: bool) -> Tensor: ...


class DecodeKernel(Protocol):
    """For hif8_decode."""

    def __call__(self, codes: Tensor, dtype: torch.dtype) -> Tensor: ...


class QuantizeKernel(Protocol):
    """For hif8_quantize, which returns (codes, scale), and for hif8_fake_quantize, which returns the values.

    `carried` is given, as True, to implementations of hif8_quantize that declare to handle it.
    """

    def __call__(
        self,
        x: Tensor,
        amax: Tensor | None,
        *,
        scale_max: float,
        scale_mode: ScaleMode,
        granularity: Granularity,
        carried: bool = False,
    ) -> Any: ...


def hif8_encode(x: Tensor, *, saturate: bool = False) -> Tensor:
    """HiFloat8 codes (uint8) of x (fp64, fp32, bf16 or fp16), halves away from zero. Has no gradient.

    With `saturate`, magnitudes of 40960 and more become 32768 instead of Inf.
    """
    return _encode_op(x, saturate)


def hif8_decode(codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values of HiFloat8 codes (uint8), exact in `dtype`."""
    return _decode_op(codes, dtype)


def hif8_quantize(
    x: Tensor,
    *,
    scale_max: float = INFO.max_of_3_bits,
    scale_mode: ScaleMode = "amax",
    granularity: Granularity = "tensor",
    amax: Tensor | None = None,
    amax_group: ProcessGroup | None = None,
    carried: bool = False,
) -> Quantized:
    """Codes of x / s and the fp32 scale s, by which the largest magnitude of x becomes `scale_max`. Has no gradient.

    Args:
        x: any shape; fp64, fp32, bf16 or fp16; any strides.
        scale_max: from 2^-22 to 32768. 15 keeps three bits of mantissa over four binades, 224 two bits over eight.
        scale_mode: "amax" is s = amax / scale_max, "pow2" the power of two at or above it.
        granularity: one scale for the "tensor", each "row" (last dimension) or each "channel" (last but one).
        amax: fp32 in the shape of the scale, to be used instead of that of x.
        amax_group: ranks that share one amax; each must make the same calls in the same order.
        carried: codes as the E4M3 numbers that FP8 tensor cores multiply. Values below 2^-12 of 15 are then rounded.

    Raises:
        ValueError: an argument is not one of these.
        UnsupportedRequestError: no implementation that the policy allows takes the call.
    """
    amax = _shared_amax(x, granularity, amax, amax_group)
    return Quantized(*quantize_op(x, amax, scale_max, scale_mode, granularity, carried))


def hif8_fake_quantize(
    x: Tensor,
    *,
    scale_max: float = INFO.max_of_3_bits,
    grad_scale_max: float | None = None,
    scale_mode: ScaleMode = "amax",
    granularity: Granularity = "tensor",
    amax: Tensor | None = None,
    amax_group: ProcessGroup | None = None,
) -> Tensor:
    """x through HiFloat8 and back, in its own dtype; gradients pass straight through.

    With `grad_scale_max` (usually 224) the gradient makes the same trip at that scale. Other arguments and errors as in
    `hif8_quantize`.
    """
    amax = _shared_amax(x, granularity, amax, amax_group)
    group = remember_group(amax_group)
    return _fake_quantize_op(x, amax, scale_max, scale_mode, granularity, grad_scale_max, group)


# ---- amax of several ranks

#: By name: what the ops take for a process group, since an argument of an op can be text. Weak, since a group that
#: outlives its destruction aborts the process at its end.
_groups: weakref.WeakValueDictionary[str, ProcessGroup] = weakref.WeakValueDictionary()


def remember_group(group: ProcessGroup | None) -> str:
    """The name by which ops find `group` again; empty for none."""
    if group is None:
        return ""
    _groups[group.group_name] = group
    return group.group_name


def _shared_amax(x: Tensor, granularity: Granularity, amax: Tensor | None, group: ProcessGroup | None) -> Tensor | None:
    if group is None:
        return amax
    if amax is not None:
        raise ValueError("hif8: give amax or amax_group, not both")
    return amax_op(x.detach(), granularity, remember_group(group))


def _amax(x: Tensor, granularity: Granularity, group: str) -> Tensor:
    """Largest magnitude over `granularity` and all ranks of the group, fp32 in the shape of the scale. Opaque, so that
    a compiled model can contain it.
    """
    check_scaling("hif8_quantize", x, None, 1.0, "amax", granularity)
    amax = amax_of(x, granularity)
    if not group:
        return amax
    # A maximum over ranks may lose a NaN; Inf, which gives the same scale, it keeps.
    return collective.all_reduce(amax.masked_fill(amax.isnan(), torch.inf), "max", _groups[group])


def _amax_fake(x: Tensor, granularity: Granularity, group: str) -> Tensor:
    return x.new_empty(scale_shape(x.shape, granularity), dtype=torch.float32)


# ---- behind the functions

_CONTRACTS = {contract.name: contract for contract in (*hif8_cast.CONTRACTS, *quantize.CONTRACTS)}
_decided = {name: Decided(contract) for name, contract in _CONTRACTS.items()}
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_scaling(
    name: str,
    x: Tensor,
    amax: Tensor | None,
    scale_max: float,
    scale_mode: str,
    granularity: Granularity,
    *,
    carried: bool = False,
) -> None:
    """Raise ValueError, with what was expected, unless x can be quantized so."""
    if x.dtype not in _FLOATS:
        raise ValueError(f"{name}: x must be fp64, fp32, bf16 or fp16; got {x.dtype}")
    if scale_mode not in SCALE_MODES or granularity not in GRANULARITIES:
        raise ValueError(
            f"{name}: scale_mode is one of {', '.join(SCALE_MODES)} and granularity one of {', '.join(GRANULARITIES)}; "
            f"got {scale_mode!r} and {granularity!r}"
        )
    if not INFO.smallest_subnormal <= scale_max <= INFO.max:
        raise ValueError(f"{name}: scale_max must lie between 2^-22 and 32768, the values of HiFloat8; got {scale_max}")
    if carried and scale_max > carrier.LARGEST:
        raise ValueError(f"{name}: carried codes are at most {carrier.LARGEST:g}; got scale_max={scale_max}")
    if x.ndim < {"tensor": 0, "row": 1, "channel": 2}[granularity]:
        raise ValueError(f"{name}: granularity {granularity!r} needs more dimensions than x has, {tuple(x.shape)}")
    shape = scale_shape(x.shape, granularity)
    if amax is not None and (amax.dtype != torch.float32 or list(amax.shape) != shape or amax.device != x.device):
        raise ValueError(
            f"{name}: amax must be fp32 {tuple(shape)} on {x.device} for x {tuple(x.shape)} and granularity "
            f"{granularity!r}; got {amax.dtype} {tuple(amax.shape)} on {amax.device}"
        )


def _scaled_kernel(name: str, x: Tensor, amax: Tensor | None, *settings: Any, carried: bool = False) -> QuantizeKernel:
    given = None if amax is None else (amax.shape, amax.dtype, amax.device)
    signature = (x.shape, x.dtype, x.device, given, settings, carried)
    kernel = _decided[name].get(signature)
    if kernel is None:
        check_scaling(name, x, amax, *settings, carried=carried)
        request = QuantizeRequest(x.device.type, x.dtype, tuple(x.shape), *settings)
        request = replace(request, given_amax=amax is not None, carried=carried)
        kernel = _decided[name].decide(signature, request)
    return kernel


def _cast_kernel(name: str, given: Tensor, dtype: torch.dtype, saturate: bool = False) -> Any:
    signature = (given.shape, given.dtype, given.device, dtype, saturate)
    kernel = _decided[name].get(signature)
    if kernel is None:
        if dtype not in _FLOATS or (given.dtype != torch.uint8 and name == "hif8_decode"):
            raise ValueError(
                f"{name}: values are fp64, fp32, bf16 or fp16 and codes uint8; got {given.dtype} and {dtype}"
            )
        request = CastRequest(given.device.type, dtype, tuple(given.shape), saturate)
        kernel = _decided[name].decide(signature, request)
    return kernel


def _encode(x: Tensor, saturate: bool) -> Tensor:
    return _cast_kernel("hif8_encode", x, x.dtype, saturate)(x, saturate)


def _decode(codes: Tensor, dtype: torch.dtype) -> Tensor:
    return _cast_kernel("hif8_decode", codes, dtype)(codes, dtype)


def _quantize(
    x: Tensor, amax: Tensor | None, scale_max: float, scale_mode: Any, granularity: Any, carried: bool = False
) -> Any:
    kernel = _scaled_kernel("hif8_quantize", x, amax, scale_max, scale_mode, granularity, carried=carried)
    form = {"carried": True} if carried else {}
    return kernel(x, amax, scale_max=scale_max, scale_mode=scale_mode, granularity=granularity, **form)


def _fake_quantize(x, amax, scale_max, scale_mode, granularity, grad_scale_max, group) -> Tensor:
    if grad_scale_max is not None:
        check_scaling("hif8_fake_quantize (gradient)", x, None, grad_scale_max, scale_mode, granularity)
    kernel = _scaled_kernel("hif8_fake_quantize", x, amax, scale_max, scale_mode, granularity)
    return kernel(x, amax, scale_max=scale_max, scale_mode=scale_mode, granularity=granularity)


def _contiguous(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype or x.dtype)


def _quantize_fake(
    x: Tensor,
    amax: Tensor | None,
    scale_max: float,
    scale_mode: str,
    granularity: Granularity,
    carried: bool = False,
) -> Any:
    return _contiguous(x, carrier.DTYPE if carried else torch.uint8), _amax_fake(x, granularity, "")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.settings = inputs[3:]


def _straight_through(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    scale_mode, granularity, grad_scale_max, group = ctx.settings
    if grad_scale_max is not None:
        amax = amax_op(grad, granularity, group) if group else None
        grad = _fake_quantize_op(grad, amax, grad_scale_max, scale_mode, granularity, None, "")
    return (grad, *(None,) * 6)


_SETTINGS = "Tensor x, Tensor? amax, float scale_max, str scale_mode, str granularity"

amax_op = define("hif8_amax", "Tensor x, str granularity, str group", "Tensor", kernel=_amax, fake=_amax_fake)
_encode_op = define(
    "hif8_encode",
    "Tensor x, bool saturate",
    "Tensor",
    kernel=_encode,
    fake=lambda x, saturate: _contiguous(x, torch.uint8),
)
_decode_op = define(
    "hif8_decode", "Tensor codes, ScalarType dtype", "Tensor", kernel=_decode, fake=lambda c, d: _contiguous(c, d)
)
quantize_op = define(
    "hif8_quantize",
    f"{_SETTINGS}, bool carried=False",
    "(Tensor, Tensor)",
    kernel=_quantize,
    fake=_quantize_fake,
)
_fake_quantize_op = define(
    "hif8_fake_quantize",
    f"{_SETTINGS}, float? grad_scale_max, str group",
    "Tensor",
    kernel=_fake_quantize,
    fake=lambda x, *settings: _contiguous(x),
    backward=_straight_through,
    setup_context=_setup_context,
)
