"""What a contract is: the one place that says what an operator means. No operator and no backend is named here.

A contract holds the request type that selection looks at, the fp64 oracle, a same-dtype yardstick and the cases that
prove an implementation. The torch.library op, `explain`, the conformance suite and the benchmarks are all derived from
it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

Level = Literal["required", "optional", "extension"]

#: Version of the manifest and kernel signatures. A backend that names another one is not loaded, and `explain` says so.
API_VERSION = 1


@dataclass(frozen=True)
class Reason:
    """Why an implementation cannot take a request. `code` is lower_snake and stable: tests and tools match on it."""

    code: str
    got: str
    want: str

    def __str__(self) -> str:
        return f"{self.code}: got {self.got}, want {self.want}"


def need(condition: bool, code: str, *, got: object, want: str) -> Reason | None:
    """One line of a predicate: None if `condition` holds, else the reason."""
    return None if condition else Reason(code, str(got), want)


@dataclass(frozen=True)
class Case:
    """One conformance case. `id` is stable across releases; must-pass lists and waivers name it."""

    id: str
    level: Level
    request: Any
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Contract:
    """One operator: its meaning, its request type and what proves an implementation of it."""

    name: str
    family: str
    level: Level
    request: type
    meaning: str
    #: Case -> named CPU inputs, rounded to the dtype under test.
    inputs: Callable[[Case], dict[str, Any]]
    #: Named inputs -> named fp64 results, on the CPU.
    oracle: Callable[[Mapping[str, Any]], dict[str, Tensor]]
    #: The same in the dtype of the inputs, naive and in another operation order: what plain rounding costs.
    yardstick: Callable[[Mapping[str, Any]], dict[str, Tensor]]
    #: The public function under test, called with the named inputs.
    call: Callable[..., dict[str, Tensor]]
    cases: Callable[[], Iterator[Case]]
    #: Plain PyTorch definition, used by backends that declare no kernel. Only optional contracts have one.
    composite: Any = None
    version: int = 1

    def judge(self, found: Mapping[str, Tensor], inputs: Mapping[str, Any]) -> dict[str, Verdict]:
        """One verdict per named result of `call` on `inputs`."""
        oracle, yardstick = self.oracle(inputs), self.yardstick(inputs)
        if found.keys() != oracle.keys():
            raise ValueError(f"{self.name} was to give {sorted(oracle)}, it gave {sorted(found)}")
        return {name: judge(found[name], oracle[name], yardstick[name], factor_of(name)) for name in oracle}

    def features(self, request: Any) -> dict[str, Any]:
        """Fields of `request` that ask for more than the default: an implementation must list each, or it is
        refused.
        """
        return {
            f.name: getattr(request, f.name)
            for f in dataclasses.fields(request)
            if f.default is not dataclasses.MISSING and getattr(request, f.name) != f.default
        }


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
        return max(_ratio(self.max_error, self.max_bound), _ratio(self.rms_error, self.rms_bound))

    @property
    def ok(self) -> bool:
        return self.ratio <= 1.0


UNIT_ROUNDOFF: dict[torch.dtype, float] = {
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-11,
    torch.float32: 2.0**-24,
    torch.float64: 2.0**-53,
}


#: How many times the yardstick's error a correct kernel may have. Gradients subtract sums that nearly cancel, in an
#: order each kernel chooses for itself: PyTorch's own CPU flash attention needs 2.2 (fp32, dk), so they are given 3.
RESULT_FACTOR = 2.0
GRADIENT_FACTOR = 3.0


def factor_of(name: str) -> float:
    """The factor for a named result; names of gradients begin with "d"."""
    return GRADIENT_FACTOR if name.startswith("d") else RESULT_FACTOR


def judge(actual: Tensor, oracle: Tensor, yardstick: Tensor, factor: float = RESULT_FACTOR) -> Verdict:
    """Compare `actual` (dtype under test) with the fp64 `oracle`; bounds come from the same-dtype `yardstick`.

    max|Y-R| <= f max|P-R| + 2 u max|R|  and  rms(Y-R)/rms(R) <= f rms(P-R)/rms(R) + u, with u the unit roundoff of the
    dtype and f the `factor`. Infinities of the oracle (the logsumexp of a fully masked row) must be matched exactly and
    are left out of both errors.

    Raises:
        ValueError: shape or dtype of `actual` is not the contract's (a coarser dtype would bring its own, wider bound),
            or the yardstick overflowed and bounds nothing.
    """
    if actual.shape != oracle.shape:
        raise ValueError(f"result has shape {tuple(actual.shape)}, the contract asks for {tuple(oracle.shape)}")
    if actual.dtype != yardstick.dtype:
        raise ValueError(f"result is {actual.dtype}, the contract asks for {yardstick.dtype}")
    unit = UNIT_ROUNDOFF[actual.dtype]
    y, r, p = (t.detach().to("cpu", torch.float64) for t in (actual, oracle, yardstick))
    usual = torch.isfinite(r)
    finite = bool(torch.isfinite(y[usual]).all()) and torch.equal(y[~usual], r[~usual])
    y, r, p = y[usual], r[usual], p[usual]
    if not torch.isfinite(p).all():
        raise ValueError("the yardstick is not finite where the oracle is: choose inputs that its dtype can hold")
    if r.numel() == 0:
        return Verdict(0.0, 0.0, 0.0, 0.0, finite)
    scale, rms = r.abs().max().item(), r.square().mean().sqrt().item()
    norm = rms if rms > 0 else 1.0
    return Verdict(
        max_error=(y - r).abs().max().item(),
        max_bound=factor * (p - r).abs().max().item() + 2 * unit * scale,
        rms_error=(y - r).square().mean().sqrt().item() / norm,
        rms_bound=factor * (p - r).square().mean().sqrt().item() / norm + unit,
        finite=finite,
    )


def _ratio(error: float, bound: float) -> float:
    if error == 0.0:
        return 0.0
    return error / bound if bound > 0.0 else float("inf")
