"""The one kernel of the host NPU: it runs any operator on CPU tensors that lie in the operands' own memory.

No operand is copied; results are, into memory that the device allocated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from . import generators
from .aliasing import CPU, DEVICE_TYPE, on_cpu, on_device

#: Operators that take tensors of the host next to tensors of the device: they copy, or take them as indices.
MIXED = {"aten::_foreach_copy_", "aten::index", "aten::index_put_", "aten::_index_put_impl_"}


class Kernel:
    """The kernel of `op` on the device: `compute`, which has the schema of `op`, on CPU tensors.

    Written operands are written in place, `out=` arguments take the shape that `compute` gives them, other results are
    new, and random numbers come from the device's generator. `compute` is given every argument, defaults included.

    Raises:
        RuntimeError: operands lie on the host and on the device, as a device would refuse them.
        NotImplementedError: `compute` gave another shape to an operand that it may only fill.
    """

    def __init__(self, op: OpOverload, compute: Callable[..., Any]) -> None:
        schema = op._schema
        arguments = schema.arguments
        self.name, self._compute = op.name(), compute
        self._names = [argument.name for argument in arguments]
        self._index = {name: n for n, name in enumerate(self._names)}
        self._defaults = [argument.default_value for argument in arguments]
        self._positional = sum(not argument.kwarg_only for argument in arguments)
        self._tensors = [n for n, argument in enumerate(arguments) if "Tensor" in str(argument.type)]
        self._outs = [n for n, argument in enumerate(arguments) if argument.is_out]
        writes = {n: a.alias_info.before_set for n, a in enumerate(arguments) if a.alias_info and a.alias_info.is_write}
        self._filled = [n for n in writes if n not in self._outs]
        by_alias = {name: n for n, names in writes.items() for name in names}
        # For each result, the operand that it is, where it is one.
        self._results = [
            next((by_alias[name] for name in result.alias_info.before_set if name in by_alias), None)
            if result.alias_info
            else None
            for result in schema.returns
        ]
        self._generator, self._device = self._index.get("generator"), self._index.get("device")
        self._draws = self._generator is not None or torch.Tag.nondeterministic_seeded in op.tags
        self._takes_both = schema.name in MIXED

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        operands = [*args, *self._defaults[len(args) :]]
        for name, value in kwargs.items():
            operands[self._index[name]] = value
        values, sources = list(operands), list[Tensor]()
        for n in self._tensors:
            values[n] = _enter(operands[n], sources, _room_for if n in self._outs else on_cpu)
        device = self._place(operands, values, sources)
        with self._randomness(operands, values, device):
            named = dict(zip(self._names[self._positional :], values[self._positional :], strict=True))
            result = self._compute(*values[: self._positional], **named)
        self._settle(operands, values)
        if device.type != DEVICE_TYPE or not self._results:
            return result
        parts = (result,) if len(self._results) == 1 else result
        left = [
            operands[n] if n is not None else _leave(part, device) for part, n in zip(parts, self._results, strict=True)
        ]
        return left[0] if len(left) == 1 else tuple(left)

    def _place(self, operands: list[Any], values: list[Any], sources: list[Tensor]) -> torch.device:
        """Where the result belongs: the device that was asked for, else the one of the operands, else the current."""
        asked = None if self._device is None else operands[self._device]
        if self._device is not None and asked is not None:
            asked = torch.device(asked)
            values[self._device] = CPU if asked.type == DEVICE_TYPE else asked
            return asked
        if not sources:
            return torch.device(DEVICE_TYPE, torch.get_device_module(DEVICE_TYPE).current_device())
        stranger = None if self._takes_both else next(self._strangers(operands), None)
        if stranger is not None:
            name, tensor = stranger
            raise RuntimeError(
                f"Expected all tensors to be on the same device: {self.name} got one on {sources[0].device}, and "
                f"{name} of shape {tuple(tensor.shape)} on {tensor.device}"
            )
        return sources[0].device

    def _strangers(self, operands: list[Any]) -> Iterator[tuple[str, Tensor]]:
        """Tensors of another device; a single number may come from the host."""
        for n in self._tensors:
            for part in operands[n] if isinstance(operands[n], Sequence) else (operands[n],):
                if isinstance(part, Tensor) and part.dim() and part.device.type != DEVICE_TYPE:
                    yield self._names[n], part

    def _randomness(self, operands: list[Any], values: list[Any], device: torch.device) -> AbstractContextManager[None]:
        if not self._draws or device.type != DEVICE_TYPE:
            return nullcontext()
        if self._generator is None:
            return generators.instead_of_cpus(generators.default_generator(device))
        given = operands[self._generator] or generators.default_generator(device)
        values[self._generator] = generators.next_cpu_generator(given) if given.device.type == DEVICE_TYPE else given
        return nullcontext()

    def _settle(self, operands: list[Any], values: list[Any]) -> None:
        """Bring `out=` results to the device, and see that what was to be filled was only filled."""
        for n in self._outs:
            many = isinstance(values[n], list)
            for out, value in zip(operands[n], values[n], strict=True) if many else ((operands[n], values[n]),):
                if out is value:  # it is on the host
                    continue
                if out.shape != value.shape:
                    out.resize_(value.shape)
                on_cpu(out).copy_(value)
        for n in self._filled:
            if isinstance(values[n], Tensor) and values[n].shape != operands[n].shape:
                raise NotImplementedError(
                    f"{self.name} gave its operand {self._names[n]} of shape {tuple(operands[n].shape)} the shape "
                    f"{tuple(values[n].shape)}, which the host NPU does not emulate"
                )


def _enter(value: Any, sources: list[Tensor], alias: Callable[[Tensor], Tensor]) -> Any:
    """An argument with its tensors of the device replaced; these are added to `sources`."""
    if isinstance(value, Tensor):
        if value.device.type != DEVICE_TYPE:
            return value
        sources.append(value)
        return alias(value)
    return [_enter(part, sources, alias) for part in value] if isinstance(value, Sequence) else value


def _leave(value: Any, device: torch.device) -> Any:
    """A result with its CPU tensors brought to the device: a new tensor, also where `compute` returned an operand."""
    if isinstance(value, list | tuple):
        return type(value)(_leave(part, device) for part in value)
    if not isinstance(value, Tensor) or value.device != CPU:
        return value
    return on_device(value, device)


def _room_for(out: Tensor) -> Tensor:
    """Memory for an `out=` argument: an operator may make it grow, which memory that is not its own cannot."""
    return torch.empty_strided(out.size(), out.stride(), dtype=out.dtype, device=CPU)
