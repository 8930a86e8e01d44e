"""The collective family: how ranks exchange tensors. One contract whose cases are run by as many processes as they have
ranks, and judged exactly: every sum of a case is of small integers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ospnext.ops.contract import Case, Contract, Need, Through, as_is, need
from ospnext.ops.registry import DeviceInfo

MEANING = """\
All of them work along dim 0, and return new contiguous memory, on one rank too; inputs stay as they are.

all_to_all      rank r sends its i-th part to rank i; the result holds what rank 0, 1, ... sent, in that order. Parts
                may be uneven or empty; the split sizes of both sides are part of the call, so that no size is exchanged
                at run time. Adjoint: the reverse exchange.
all_gather      concatenation over ranks in rank order; the shape is the same on each. Adjoint: reduce_scatter (sum).
reduce_scatter  sum over ranks, of which rank r keeps its part; the parts are even. Adjoint: all_gather.
all_reduce      sum or maximum over ranks. The adjoint of the sum is the sum; the maximum has no gradient.
broadcast       the tensor of one rank. Adjoint: sum onto that rank; elsewhere x has a gradient of zeros.

all_to_all may be asynchronous: it then returns what is waited for, and x may not change before. An implementation that
cannot do so exchanges at once.

A rank sees its own parts only: one may ask for an uneven exchange where another asks for an even one, so the
implementations that a backend chooses for the two must be able to meet.

Each is linear, the maximum apart, and its gradient is its adjoint: another of these calls. Implementations know nothing
of gradients. What one rank of a group does, all do, in the same order: that x requires a gradient, and that a result
takes part in the backward pass, holds on every rank or on none."""

Operation = Literal["all_to_all", "all_gather", "reduce_scatter", "all_reduce", "broadcast"]
OPERATIONS: tuple[Operation, ...] = get_args(Operation)


@dataclass(frozen=True)
class CollectiveRequest:
    """What selection knows of a call. `elements` counts what this rank contributes."""

    device_type: str
    dtype: torch.dtype
    operation: Operation
    ranks: int
    elements: int
    uneven: bool = False
    reduction: Literal["sum", "max"] = "sum"
    #: Where ranks are on several hosts: how many of them are on this one, at most.
    local_ranks: int | None = None
    #: How many of them hold the same physical device, at most; None where they have not told each other.
    ranks_per_device: int | None = None


def each_has_a_device(request: CollectiveRequest, device: DeviceInfo, kind: str) -> Need:
    """Code `ranks`, for a transport that refuses two ranks on one device; `kind` is what its users call one ("GPU").

    What ranks have told each other decides. Where they have not, those of a host must be as many as the devices that
    this rank sees, which may be fewer than there are.
    """
    shared = request.ranks_per_device
    if shared is not None:
        return need(shared == 1, "ranks", got=f"{shared} ranks on one {kind}", want=f"one rank on each {kind}")
    here = request.local_ranks or request.ranks
    return need(
        here <= device.count,
        "ranks",
        got=f"{here} ranks, and {device.count} {kind}{'s' if device.count > 1 else ''} that this one sees",
        want=f"a {kind} for each rank; if each sees only its own, a mesh, for which they tell each other which it is",
    )


# ---- cases

RANKS = (2, 3, 4)
#: Rows of a part and what each row holds; no two sizes of a case are equal by accident.
PART, ROW = 5, (3,)

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "u8": torch.uint8}
#: (operation, what is special, dtype). HiF8 codes travel as uint8.
_KINDS: tuple[tuple[Operation, str, str], ...] = (
    ("all_to_all", "even", "fp32"),
    ("all_to_all", "even", "bf16"),
    ("all_to_all", "even", "u8"),
    ("all_to_all", "even-strided", "fp32"),
    ("all_to_all", "uneven", "fp32"),
    ("all_to_all", "uneven", "bf16"),
    ("all_to_all", "uneven", "u8"),
    ("all_gather", "", "fp32"),
    ("all_gather", "strided", "fp32"),
    ("reduce_scatter", "", "fp32"),
    ("all_reduce", "sum", "fp32"),
    ("all_reduce", "max", "fp32"),
    ("broadcast", "", "fp32"),
    ("all_to_all", "uneven-strided", "fp32"),
    ("reduce_scatter", "strided", "fp32"),
    ("all_reduce", "sum-strided", "fp32"),
    ("broadcast", "strided", "fp32"),
    ("all_to_all", "to_first", "bf16"),
)
#: How many rows an all_to_all sends to each: see part_size.
Splits = Literal["even", "uneven", "to_first"]
UNEVEN: tuple[Splits, ...] = ("uneven", "to_first")
Form = Literal["plain", "backward", "roundtrip", "async"]
#: What more is done with an operation: its gradient is taken, its inverse or adjoint applied to the result, or two of
#: them are on their way at once.
_FORMS: tuple[tuple[Operation, str, str, Form], ...] = (
    ("all_to_all", "even-strided", "fp32", "backward"),
    ("all_to_all", "uneven", "fp32", "backward"),
    ("all_to_all", "uneven", "bf16", "backward"),
    ("all_gather", "", "fp32", "backward"),
    ("all_gather", "strided", "fp32", "backward"),
    ("reduce_scatter", "", "fp32", "backward"),
    ("all_reduce", "sum", "fp32", "backward"),
    ("broadcast", "", "fp32", "backward"),
    ("all_to_all", "even", "bf16", "roundtrip"),
    ("all_to_all", "uneven", "fp32", "roundtrip"),
    ("all_to_all", "uneven", "u8", "roundtrip"),
    ("all_gather", "", "fp32", "roundtrip"),
    ("reduce_scatter", "", "fp32", "roundtrip"),
    ("all_to_all", "even-strided", "fp32", "async"),
    ("all_to_all", "uneven", "bf16", "async"),
)


def cases() -> Iterator[Case]:
    for ranks in RANKS:
        for operation, kind, tag, form in (*((*kind, "plain") for kind in _KINDS), *_FORMS):
            words = "-".join(filter(None, (operation, f"r{ranks}", kind, tag, "" if form == "plain" else form)))
            splits: Splits = next((one for one in UNEVEN if kind.startswith(one)), "even")
            request = CollectiveRequest(
                "cpu",
                _DTYPES[tag],
                operation,
                ranks,
                elements=_rows(operation, ranks, splits, rank=0) * math.prod(ROW),
                uneven=splits != "even",
                reduction="max" if kind == "max" else "sum",
            )
            layout = "last_stride" if kind.endswith("strided") else "contiguous"
            options = {"splits": splits} if form == "plain" else {"splits": splits, "form": form}
            yield Case(f"collective/required/{words}", "required", request, options, layout=layout, exact=True)


def part_size(source: int, to: int, splits: Splits) -> int:
    """Rows that `source` sends `to` another rank. Where uneven they are not symmetric, and 0 from rank 1 to rank 0;
    "to_first" leaves rank 0 without any to send, and the others without any to receive.
    """
    if splits == "to_first":
        return PART + source if source > to == 0 else 0
    return (2 * source + 3 * to + 3) % 5 if splits == "uneven" else PART


def _rows(operation: Operation, ranks: int, splits: Splits, rank: int) -> int:
    if operation == "all_to_all":
        return sum(part_size(rank, to, splits) for to in range(ranks))
    return PART * ranks if operation == "reduce_scatter" else PART


def _rows_out(request: CollectiveRequest, splits: Splits, rank: int) -> int:
    if request.operation == "all_to_all":
        return sum(part_size(source, rank, splits) for source in range(request.ranks))
    return PART * request.ranks if request.operation == "all_gather" else PART


def _inputs(case: Case) -> dict[str, dict[str, Any]]:
    """`rank0`, `rank1`, ... -> the operation and its arguments on that rank."""
    request, splits = case.request, case.options["splits"]
    named = {}
    for rank in range(request.ranks):
        rows = _rows(request.operation, request.ranks, splits, rank)
        form = case.options.get("form", "plain")
        arguments: dict[str, Any] = {"form": form, "operation": request.operation, "x": _payload(request, rank, rows)}
        if request.operation == "all_to_all":
            everyone = range(request.ranks)
            arguments["send_splits"] = [part_size(rank, to, splits) for to in everyone]
            arguments["receive_splits"] = [part_size(source, rank, splits) for source in everyone]
        elif request.operation == "all_reduce":
            arguments["reduction"] = request.reduction
        elif request.operation == "broadcast":
            arguments["source"] = request.ranks - 1
        if form == "backward":
            arguments["grad_out"] = (
                _payload(request, rank, _rows_out(request, splits, rank)) + 7
            )  # no gradient is a result
        named[f"rank{rank}"] = arguments
    return named


def _payload(request: CollectiveRequest, rank: int, rows: int) -> Tensor:
    """Integers that tell their rank and place, exact in the dtype and never 0: what was swapped or not written shows.

    For a maximum, each rank has the largest value somewhere."""
    index = torch.arange(rows * math.prod(ROW)).reshape(rows, *ROW)
    if request.reduction == "max":
        return (((rank + index) % request.ranks) * 1000 + index + 1).to(request.dtype)
    if request.dtype == torch.float32:
        return (rank * 1000 + index + 1).to(request.dtype)
    return ((rank * 37 + index) % 200 + 1).to(request.dtype)  # bf16 holds integers up to 256


# ---- oracle


def _oracle(inputs: Mapping[str, Mapping[str, Any]]) -> dict[str, Tensor]:
    """What each rank receives, by indexing into what all of them hold."""
    ranks = list(inputs.values())
    return dict(zip(inputs, _ORACLES_OF_FORMS[ranks[0]["form"]](ranks), strict=True))


Arguments = Sequence[Mapping[str, Any]]


def _all_to_all(xs: Sequence[Tensor], arguments: Arguments, rank: int) -> Tensor:
    parts = []
    for x, sender in zip(xs, arguments, strict=True):
        ends = [0, *itertools.accumulate(sender["send_splits"])]
        parts.append(x[ends[rank] : ends[rank + 1]])
    return torch.cat(parts)


def _reduce_scatter(xs: Sequence[Tensor], arguments: Arguments, rank: int) -> Tensor:
    rows = len(xs[0]) // len(xs)
    return torch.stack([x[rank * rows : (rank + 1) * rows] for x in xs]).sum(0)


def _all_reduce(xs: Sequence[Tensor], arguments: Arguments, rank: int) -> Tensor:
    stacked = torch.stack(list(xs))
    return stacked.amax(0) if arguments[rank]["reduction"] == "max" else stacked.sum(0)


_ORACLES: dict[str, Callable[[Sequence[Tensor], Arguments, int], Tensor]] = {
    "all_to_all": _all_to_all,
    "all_gather": lambda xs, arguments, rank: torch.cat(list(xs)),
    "reduce_scatter": _reduce_scatter,
    "all_reduce": _all_reduce,
    "broadcast": lambda xs, arguments, rank: xs[arguments[rank]["source"]].clone(),
}


def _received(xs: Sequence[Tensor], arguments: Arguments) -> list[Tensor]:
    receive = _ORACLES[arguments[0]["operation"]]
    return [receive(xs, arguments, rank) for rank in range(len(xs))]


def _gradients(arguments: Arguments) -> list[Tensor]:
    """Of what all ranks receive, weighted and summed over all of them, with respect to what each one held."""
    xs = [each["x"].double().requires_grad_() for each in arguments]
    total = sum((out * each["grad_out"]).sum() for out, each in zip(_received(xs, arguments), arguments, strict=True))
    return list(torch.autograd.grad(total, xs, materialize_grads=True))


def _round_trips(arguments: Arguments) -> list[Tensor]:
    xs = [each["x"].double() for each in arguments]
    if arguments[0]["operation"] == "all_to_all":
        return xs
    if arguments[0]["operation"] == "all_gather":
        return [x * len(xs) for x in xs]
    return [torch.stack(xs).sum(0)] * len(xs)


def _two_exchanges(arguments: Arguments) -> list[Tensor]:
    pair = [_received([each["x"].double() + more for each in arguments], arguments) for more in (0, 1)]
    return [torch.cat(both) for both in zip(*pair, strict=True)]


_ORACLES_OF_FORMS: dict[Form, Callable[[Arguments], list[Tensor]]] = {
    "plain": lambda arguments: _received([each["x"].double() for each in arguments], arguments),
    "backward": _gradients,
    "roundtrip": _round_trips,
    "async": _two_exchanges,
}


def _yardstick(inputs: Mapping[str, Mapping[str, Any]]) -> dict[str, Tensor]:
    return {name: out.to(inputs[name]["x"].dtype) for name, out in _oracle(inputs).items()}


def _call(inputs: Mapping[str, Any], through: Through = as_is) -> dict[str, Tensor]:
    """The calls of one rank, on the default group; every rank must make its own."""
    from ospnext.ops import collective

    arguments = dict(inputs)
    form, name, x = (arguments.pop(key) for key in ("form", "operation", "x"))
    function = through(getattr(collective, name))
    if form == "backward":
        grad_out, x = arguments.pop("grad_out"), x.detach().requires_grad_()
        return {"out": torch.autograd.grad(function(x, **arguments), x, grad_out)[0]}
    if form == "roundtrip":
        out = function(x, **arguments)
        if name == "all_to_all":
            return {"out": function(out, arguments["receive_splits"], arguments["send_splits"])}
        return {"out": collective.reduce_scatter(out) if name == "all_gather" else collective.all_gather(out)}
    if form == "async":
        first, second = (function(sent, **arguments, async_op=True) for sent in (x, x + 1))
        last = second.wait()
        return {"out": torch.cat((first.wait(), last))}
    return {"out": function(x, **arguments)}


CONTRACT = Contract(
    name="collective",
    family="collective",
    level="required",
    request=CollectiveRequest,
    by_ranks=True,
    meaning=MEANING,
    inputs=_inputs,
    oracle=_oracle,
    yardstick=_yardstick,
    call=_call,
    cases=cases,
)
CONTRACTS = (CONTRACT,)
