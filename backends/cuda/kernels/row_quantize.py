"""HiFloat8 codes of rows that a program has computed: the end of kernels whose result is quantized, and so never
written. The arithmetic is that of ospnext/numerics/scaling.py, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ospnext.numerics import carrier
from ospnext.numerics.scaling import SMALLEST_AMAX, Granularity, ScaleMode, amax_of, scale_of

from .carry import carry_quotient, divide
from .hif8 import codes_by_key, look_up
from .ptx import widened
from .rows import new

SHIFT_OF_15 = carrier.shift_for(15.0)
_SMALLEST_AMAX: tl.constexpr = tl.constexpr(SMALLEST_AMAX)


@dataclass(frozen=True)
class End:
    """What a kernel does with its rows: writes the "amax" of each, or codes with a scale for each "row", or codes with
    the "shared" scale that it is given.
    """

    form: str
    codes: Tensor
    scale: Tensor
    #: Of HiFloat8 codes by key; E4M3 numbers that carry 2^shift times a value need none.
    table: Tensor | None
    shift: int | None
    scale_max: float
    #: Carried codes have a scale that is so much smaller.
    unit: float
    power_of_two: bool

    @property
    def below_16(self) -> bool:
        """Whether quotients are, which carries them with less work: the largest is scale_max but for a rounding."""
        return self.shift == SHIFT_OF_15 and self.scale_max < 15.99

    def constants(self) -> dict[str, Any]:
        return {
            "FORM": self.form,
            "SHIFT": self.shift,
            "BELOW_16": self.below_16,
            "POWER_OF_TWO": self.power_of_two,
        }


#: Of kernels that write values.
VALUES: dict[str, Any] = {"FORM": "values", "SHIFT": None, "BELOW_16": False, "POWER_OF_TWO": False}


def quantized(
    x: Tensor,
    run: Callable[[End], None],
    *,
    scale_max: float,
    scale_mode: ScaleMode,
    granularity: Granularity,
    carried: bool,
) -> tuple[Tensor, Tensor]:
    """(codes, scale) of a function of the rows of x that `run` computes to an end. A scale of all rows takes a run of
    its own, which still moves less than to write the values and read them twice.
    """
    shift = carrier.shift_for(scale_max) if carried else None
    unit = 2.0 ** -(shift or 0)
    codes, scale = new(x, dtype=torch.uint8), new(x, *x.shape[:-1], 1, dtype=torch.float32)
    table = None if carried else codes_by_key(x.device)
    end = End("row", codes, scale, table, shift, scale_max, unit, scale_mode == "pow2")
    if not x.numel():
        scale = scale_of(amax_of(x, granularity), scale_max, scale_mode) * unit
    elif granularity == "row":
        run(end)
    else:
        run(replace(end, form="amax"))
        shared = scale_of(scale.amax().reshape([1] * x.ndim), scale_max, scale_mode)
        run(replace(end, form="shared", scale=shared))
        scale = shared * unit
    return codes.view(carrier.DTYPE) if carried else codes, scale


@triton.jit
def own_scale(largest, row, scale_ptr, scale_max, unit, POWER_OF_TWO: tl.constexpr):
    """The scale of a row whose magnitudes are at most those of `largest`; it is written."""
    scale = scale_of_row(amax_in(largest), scale_max, POWER_OF_TWO)
    tl.store(scale_ptr + row, scale * unit)
    return scale


@triton.jit
def codes_of(y, scale, table_ptr, SHIFT: tl.constexpr, BELOW_16: tl.constexpr):
    """Of floating-point numbers y and one scale."""
    if SHIFT is None:
        codes = look_up(divide(widened(y), scale), table_ptr)
    else:
        codes = carry_quotient(y, scale, SHIFT, BELOW_16)
    return codes


@triton.jit
def amax_in(largest):
    """fp32, and NaN where there is one: as bits of integers magnitudes have the same order, in which NaN comes last."""
    return tl.max(magnitude_bits(largest.to(tl.float32))).to(tl.float32, bitcast=True)


@triton.jit
def magnitude_bits(y):
    """As integers magnitudes have the same order, in which NaN comes last."""
    return y.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scale_of_row(amax, scale_max, POWER_OF_TWO: tl.constexpr):
    scale = tl.div_rn(tl.maximum(amax, _SMALLEST_AMAX), scale_max)
    if POWER_OF_TWO:
        above = (scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000
        scale = tl.minimum(above, 0x7F000000).to(tl.float32, bitcast=True)
    scale = tl.where(amax == 0, 1.0, scale)
    return tl.where(amax < float("inf"), scale, float("nan"))
