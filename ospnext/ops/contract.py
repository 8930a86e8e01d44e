"""What a contract is: the one place that says what an operator means. No operator and no backend is named here.

A contract holds the request type that selection looks at, the fp64 oracle, a same-dtype yardstick and the cases that
prove an implementation. The torch.library op, `explain`, the conformance suite and the benchmarks are all derived from
it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from ospnext.ops.tolerance import (
    GRADIENT_FACTOR,
    Interval,
    Verdict,
    factor_of,
    judge,
    judge_exact,
    judge_interval,
)

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


@dataclass(frozen=True)
class Need:
    """One line of a predicate: whether it is met, and the reason to give where it is not.

    Met needs are yielded too, so that the conformance suite can see every code a predicate knows."""

    reason: Reason
    met: bool


def need(condition: bool, code: str, *, got: object, want: str) -> Need:
    """One line of a predicate."""
    return Need(Reason(code, str(got), want), bool(condition))


@dataclass(frozen=True)
class Case:
    """One conformance case. `id` is stable across releases; must-pass lists and waivers name it."""

    id: str
    level: Level
    request: Any
    options: Mapping[str, Any] = field(default_factory=dict)
    #: How the suite lays out the inputs in memory; see `ospnext.conformance.layouts`.
    layout: str = "contiguous"
    #: The suite repeats this case in every memory layout and execution mode.
    crossed: bool = False
    #: Takes so long that only the implementation that is chosen runs it.
    costly: bool = False
    #: The result is exact in the dtype under test: it must equal the oracle bit for bit.
    exact: bool = False


#: Turns the public function under test into another form of it, e.g. a compiled one.
Through = Callable[[Callable[..., Any]], Callable[..., Any]]


def as_is(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


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
    oracle: Callable[[Mapping[str, Any]], Mapping[str, Tensor | Interval]]
    #: The same in the dtype of the inputs, naive and in another operation order: what plain rounding costs.
    yardstick: Callable[[Mapping[str, Any]], dict[str, Tensor]]
    #: (named inputs, through) -> named results of the public function under test.
    call: Callable[[Mapping[str, Any], Through], dict[str, Tensor]]
    cases: Callable[[], Iterator[Case]]
    #: Named inputs -> (torch.library op, its arguments) of every op behind the public function, for opcheck.
    library_calls: Callable[[Mapping[str, Any]], Iterator[tuple[Any, tuple[Any, ...]]]] | None = None
    #: Definition in plain PyTorch, or in terms of other contracts: what runs where a backend declares no kernel.
    composite: Any = None
    #: The contracts that `composite` calls, where it is made of others.
    composed_of: tuple[str, ...] = ()
    #: A kernel may take the place of that composition, where a backend declares one.
    fusible: bool = False
    #: Cases are run by as many processes as their request has `ranks`; inputs are `rank0`, `rank1`, ...
    by_ranks: bool = False
    #: A gradient may be the very tensor that came in, as autograd hands it on through a sum.
    hands_on_gradient: bool = False
    #: How many times the yardstick's error a gradient may have; see tolerance.py.
    gradient_factor: float = GRADIENT_FACTOR
    version: int = 1

    def expect(self, inputs: Mapping[str, Any], *, exact: bool = False) -> Expectation:
        """What a call on `inputs` must return. Costs an evaluation in fp64, so keep it for several calls."""
        oracle = self.oracle(inputs)
        return Expectation(self.name, oracle, None if exact else self.yardstick(inputs), self.gradient_factor)

    @property
    def always_composed(self) -> bool:
        """Whether it is made of other contracts on every backend."""
        return bool(self.composed_of) and not self.fusible

    def features(self, request: Any) -> dict[str, Any]:
        """Fields of `request` that ask for more than the default: an implementation must list each, or it is
        refused.
        """
        return {name: value for name, value in self.options(request).items() if value != _default(request, name)}

    @staticmethod
    def options(request: Any) -> dict[str, Any]:
        """The fields of `request` that have a default, by name."""
        return {
            f.name: getattr(request, f.name)
            for f in dataclasses.fields(request)
            if f.default is not dataclasses.MISSING
        }


def _default(request: Any, name: str) -> Any:
    return next(f.default for f in dataclasses.fields(request) if f.name == name)


@dataclass(frozen=True)
class Expectation:
    """The named results of one call: fp64 oracle, and the yardstick (None: the result must be exact). Integers, such as
    codes, are always exact.
    """

    contract: str
    oracle: Mapping[str, Tensor | Interval]
    yardstick: Mapping[str, Tensor] | None
    gradient_factor: float = GRADIENT_FACTOR

    def judge(self, found: Mapping[str, Tensor], only: Sequence[str] | None = None) -> dict[str, Verdict]:
        """One verdict per named result.

        Raises:
            ValueError: a result is missing or not asked for, or has another shape or dtype than the contract's.
        """
        if found.keys() != self.oracle.keys():
            raise ValueError(f"{self.contract} was to give {sorted(self.oracle)}, it gave {sorted(found)}")
        verdicts = {}
        for name in only or self.oracle:
            try:
                verdicts[name] = self._judge_one(name, found[name])
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        return verdicts

    def _judge_one(self, name: str, found: Tensor) -> Verdict:
        oracle = self.oracle[name]
        if isinstance(oracle, Interval):
            assert self.yardstick is not None
            return judge_interval(found, oracle, self.yardstick[name].dtype)
        if self.yardstick is None or not oracle.is_floating_point():
            return judge_exact(found, oracle)
        return judge(found, oracle, self.yardstick[name], factor_of(name, self.gradient_factor))
