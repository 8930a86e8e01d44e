"""How close is close enough: bounds that come from an fp64 oracle and a same-dtype yardstick, never from what passes.

The yardstick runs on the CPU, so that a device under test cannot widen its own bound."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

UNIT_ROUNDOFF: dict[torch.dtype, float] = {
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-11,
    torch.float32: 2.0**-24,
    torch.float64: 2.0**-53,
}

#: How many times the yardstick's error a correct kernel may have. Gradients subtract sums that nearly cancel, in an
#: order each kernel chooses for itself. What kernels that nobody here wrote need is measured by
#: benchmarks/calibrate_bounds.py (results beside it); docs/conformance.md says how these two follow from it.
RESULT_FACTOR = 2.0
GRADIENT_FACTOR = 3.0


@dataclass(frozen=True)
class Verdict:
    """How far a result is from the oracle, against the bounds derived from the yardstick. Ratios above 1 fail."""

    max_error: float
    max_bound: float
    rms_error: float
    rms_bound: float
    finite: bool

    @property
    def ratio(self) -> float:
        """The worse of the two errors over its bound; infinite where a finite value was expected and none was found."""
        if not self.finite:
            return float("inf")
        return max(ratio(self.max_error, self.max_bound), ratio(self.rms_error, self.rms_bound))

    @property
    def ok(self) -> bool:
        return self.ratio <= 1.0


@dataclass(frozen=True, eq=False)
class Interval:
    """fp64 oracle of a result that is rounded coarsely, after it was computed or on the way: any value in here is
    right, and NaN where the ends are.

    With an `rms`, all elements together must be nearer than that to the middles: their difference as root mean square,
    over that of the middles.
    """

    low: Tensor
    high: Tensor
    rms: float | None = None

    def numel(self) -> int:
        return self.low.numel()


def factor_of(name: str, gradient_factor: float = GRADIENT_FACTOR) -> float:
    """The factor for a named result; names of gradients begin with "d"."""
    return gradient_factor if name.startswith("d") else RESULT_FACTOR


def judge(actual: Tensor, oracle: Tensor, yardstick: Tensor, factor: float = RESULT_FACTOR) -> Verdict:
    """Compare `actual` (dtype under test) with the fp64 `oracle`; bounds come from the same-dtype `yardstick`.

    max|Y-R| <= f max|P-R| + 2 u max|R|  and  rms(Y-R)/rms(R) <= f rms(P-R)/rms(R) + u, with u the unit roundoff of the
    dtype and f the `factor`. Infinities of the oracle (the logsumexp of a fully masked row) must be matched exactly and
    are left out of both errors.

    Raises:
        ValueError: shape or dtype of `actual` is not the contract's (a coarser dtype would bring its own, wider bound),
            or the yardstick overflowed and bounds nothing.
    """
    if actual.dtype != yardstick.dtype:
        raise ValueError(f"result is {actual.dtype}, the contract asks for {yardstick.dtype}")
    unit = UNIT_ROUNDOFF[actual.dtype]
    y, r, usual, finite = _finite_part(actual, oracle)
    p = yardstick.detach().to("cpu", torch.float64)[usual]
    if not torch.isfinite(p).all():
        raise ValueError("the yardstick is not finite where the oracle is: choose inputs that its dtype can hold")
    if r.numel() == 0:
        return Verdict(0.0, 0.0, 0.0, 0.0, finite)
    norm = _rms(r) or 1.0
    return Verdict(
        max_error=_largest(y - r),
        max_bound=factor * _largest(p - r) + 2 * unit * _largest(r),
        rms_error=_rms(y - r) / norm,
        rms_bound=factor * _rms(p - r) / norm + unit,
        finite=finite,
    )


def max_bound(oracle: Tensor, yardstick: Tensor, name: str) -> float:
    """What `judge` allows the largest error of the result `name` to be."""
    largest = _largest(yardstick.double() - oracle)
    return factor_of(name) * largest + 2 * UNIT_ROUNDOFF[yardstick.dtype] * _largest(oracle)


def judge_interval(actual: Tensor, oracle: Interval, dtype: torch.dtype) -> Verdict:
    """Compare `actual`, which is to be of `dtype`, with an interval for each element.

    Raises:
        ValueError: shape or dtype of `actual` is not the contract's.
    """
    if actual.dtype != dtype or actual.shape != oracle.low.shape:
        raise ValueError(
            f"result is {actual.dtype} {tuple(actual.shape)}, the contract asks for {dtype} {tuple(oracle.low.shape)}"
        )
    y = actual.detach().to("cpu", torch.float64)
    usual = torch.isfinite(oracle.low)
    finite = bool(torch.isfinite(y[usual]).all() and y[~usual].isnan().all())
    y, low, high = y[usual], oracle.low[usual], oracle.high[usual]
    outside = (low - y).clamp_min(0) + (y - high).clamp_min(0)
    largest = _largest(torch.maximum(low.abs(), high.abs()))
    rounding = 2 * UNIT_ROUNDOFF[dtype] * largest
    if oracle.rms is None:
        return Verdict(_largest(outside), rounding, _rms(outside), rounding, finite)
    middle = (low + high) / 2
    return Verdict(_largest(outside), rounding, _rms(y - middle) / (_rms(middle) or 1.0), oracle.rms, finite)


def judge_exact(actual: Tensor, oracle: Tensor) -> Verdict:
    """Compare `actual` with an oracle that its dtype can hold: no difference is allowed (0 and -0 are equal).

    Raises:
        ValueError: shape is not the contract's, or the dtype where the contract asks for integers.
    """
    if actual.dtype != oracle.dtype and not oracle.is_floating_point():
        raise ValueError(f"result is {actual.dtype}, the contract asks for {oracle.dtype}")
    y, r, _, finite = _finite_part(actual, oracle.to(actual.dtype))
    if r.numel() == 0:
        return Verdict(0.0, 0.0, 0.0, 0.0, finite)
    return Verdict(_largest(y - r), 0.0, _rms(y - r) / (_rms(r) or 1.0), 0.0, finite)


def _finite_part(actual: Tensor, oracle: Tensor) -> tuple[Tensor, Tensor, Tensor, bool]:
    """(actual, oracle) in fp64 where the oracle is finite, where that is, and whether `actual` agrees with it on
    that.
    """
    if actual.shape != oracle.shape:
        raise ValueError(f"result has shape {tuple(actual.shape)}, the contract asks for {tuple(oracle.shape)}")
    y, r = (t.detach().to("cpu", torch.float64) for t in (actual, oracle))
    usual = torch.isfinite(r)
    finite = bool(torch.isfinite(y[usual]).all()) and torch.allclose(y[~usual], r[~usual], 0.0, 0.0, equal_nan=True)
    return y[usual], r[usual], usual, finite


def _largest(difference: Tensor) -> float:
    return difference.abs().max().item() if difference.numel() else 0.0


def _rms(values: Tensor) -> float:
    return values.square().mean().sqrt().item() if values.numel() else 0.0


def ratio(error: float, bound: float) -> float:
    """error / bound, where no error is 0 and an error without a bound is infinite."""
    if error == 0.0:
        return 0.0
    return error / bound if bound > 0.0 else float("inf")
