"""How a contract's case is run: eagerly, compiled, under opcheck, repeatedly, and with other calls in between.

Every mode ends in the same judgement: shape, dtype, strides, fresh memory, inputs untouched, errors within bounds."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ospnext import ops
from ospnext.errors import UnsupportedRequestError
from ospnext.ops.contract import Case, Contract, Expectation, Through, as_is
from ospnext.ops.tolerance import Verdict

from .check import CheckFailure, Target
from .layouts import Placed, dirty_allocator, values_in

#: Calls that must agree bit for bit where determinism was asked for.
REPEATS = 20

#: torch.compile's backend: traces, derives gradients and runs the graph, and needs no C compiler.
COMPILER = "aot_eager"

#: Checks of one case stand next to each other, so a few expectations are enough.
_KEPT_EXPECTATIONS = 4


@contextlib.contextmanager
def under_test(contract: Contract, target: Target) -> Iterator[None]:
    """The policy of a check: the backend, exactly one implementation of the contract, and no fallback."""
    chosen = {contract.name: target.implementation} if target.implementation else {}
    with ops.use_backend(target.backend, ops=chosen, fallback=()):
        yield


def eager(contract: Contract, case: Case, target: Target) -> Mapping[str, Verdict]:
    """One call."""
    return _judged(contract, case, target, as_is)


def compiled(contract: Contract, case: Case, target: Target) -> Mapping[str, Verdict]:
    """The call through torch.compile, in one graph."""
    torch._dynamo.reset()
    ops.bind()
    return _judged(contract, case, target, functools.partial(torch.compile, fullgraph=True, backend=COMPILER))


def opcheck(contract: Contract, case: Case, target: Target) -> Mapping[str, Verdict]:
    """torch.library.opcheck of every op behind the function: schema, fake, gradient registration, tracing."""
    assert contract.library_calls is not None
    placed = Placed(_inputs(contract, case), case.layout, target.device)
    with under_test(contract, target):
        for op, arguments in contract.library_calls(placed.values):
            try:
                torch.library.opcheck(op, arguments, test_utils=_opchecks(arguments, target.device))
            except Exception as error:
                if isinstance(error.__cause__, UnsupportedRequestError):
                    raise error.__cause__ from None  # an answer, where the op is made of others: see runner.py
                raise CheckFailure(f"opcheck of {op} failed: {error}") from error
    placed.require_untouched()
    return {}


def _opchecks(arguments: tuple[Any, ...], device: torch.device) -> tuple[str, ...]:
    """The check of the schema computes with its arguments, and PyTorch does no arithmetic on 8-bit floats; that of the
    gradient's registration knows no devices but PyTorch's own, and the registration is the same for all.
    """
    narrow = any(isinstance(a, Tensor) and a.is_floating_point() and a.dtype.itemsize == 1 for a in arguments)
    foreign = device.type == torch._C._get_privateuse1_backend_name()
    skipped = {"test_schema": narrow, "test_autograd_registration": foreign}
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    return tuple(test for test in tests if not skipped.get(test))


def interleaved(contract: Contract, case: Case, target: Target) -> Mapping[str, Verdict]:
    """Between forward and backward comes a call that fails and one with other inputs: nothing may be kept from them."""

    def through(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            found = function(*arguments, **named)
            first, *rest = arguments
            with contextlib.suppress(ValueError, RuntimeError):  # operators with one operand take this, too
                function(first[..., :-1], *rest, **named)
            function(-first.detach(), *(-t.detach() if _is_real(t) else t for t in rest), **named)
            return found

        return call

    return _judged(contract, case, target, through)


def repeated(contract: Contract, case: Case, target: Target) -> Mapping[str, Verdict]:
    """The same inputs again and again, bit for bit the same results."""
    placed = Placed(_inputs(contract, case), case.layout, target.device)
    expected = expectation(contract, case)
    with under_test(contract, target), _determinism(case):
        first = contract.call(placed.values, as_is)
        for count in range(1, REPEATS):
            dirty_allocator(target.device, expected.oracle, case.request.dtype)
            for name, value in contract.call(placed.values, as_is).items():
                if not torch.equal(value, first[name]):
                    raise CheckFailure(f"{name} of call {count} differs from that of call 0; determinism was asked for")
    return expected.judge(first)


MODES: dict[str, Callable[[Contract, Case, Target], Mapping[str, Verdict]]] = {
    "compiled": compiled,
    "opcheck": opcheck,
    "interleaved": interleaved,
}


def expectation(contract: Contract, case: Case) -> Expectation:
    """What the case must return; the few last ones are kept, since layouts and modes share them."""
    key = (contract.name, case.id)
    if key not in _expectations:
        while len(_expectations) >= _KEPT_EXPECTATIONS:
            _expectations.pop(next(iter(_expectations)))
        _expectations[key] = contract.expect(_inputs(contract, case), exact=case.exact)
    return _expectations[key]


_expectations: dict[tuple[str, str], Expectation] = {}


def on_device(request: Any, device: torch.device) -> Any:
    """The request that selection sees when the case is run on `device`."""
    return replace(request, device_type=device.type)


def _inputs(contract: Contract, case: Case) -> dict[str, Any]:
    return values_in(case.layout, contract.inputs(case))


def _judged(contract: Contract, case: Case, target: Target, through: Through) -> Mapping[str, Verdict]:
    expected = expectation(contract, case)
    placed = Placed(_inputs(contract, case), case.layout, target.device)
    dirty_allocator(target.device, expected.oracle, case.request.dtype)
    with under_test(contract, target), _determinism(case):
        found = contract.call(placed.values, through)
    placed.require_untouched()
    _require_fresh(found, placed, gradients_may_alias=contract.hands_on_gradient)
    try:
        return expected.judge(found)
    except ValueError as error:
        raise CheckFailure(str(error)) from error


def _require_fresh(found: Mapping[str, Tensor], placed: Placed, *, gradients_may_alias: bool) -> None:
    """Results own their memory, but for gradients of contracts that hand them on."""
    seen = placed.storages()
    for name, value in found.items():
        if name == "out" and not value.is_contiguous():
            raise CheckFailure(f"out has strides {value.stride()}; the contract asks for a contiguous tensor")
        address = value.untyped_storage().data_ptr()
        gradient = gradients_may_alias and name.startswith("d")
        if value.numel() and address in (placed.storages(but="grad_out") if gradient else seen):
            raise CheckFailure(f"{name} shares memory with an input or another result; it must own its own")
        if not gradient:
            seen.add(address)


@contextlib.contextmanager
def _determinism(case: Case) -> Iterator[None]:
    if not getattr(case.request, "deterministic", False):
        yield
        return
    before, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns of its own operators; the results are what is checked
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before, warn_only=warn_only)


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
