"""The state of a model and its optimizer as tensors by name, whichever ranks have which parts of them; and back. No
files and no collectives here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from ospnext.errors import CheckpointError

#: [shape, dtype] of a tensor as a whole, as JSON has it.
Spec = list[Any]
#: Hyper-parameters of a group, "params" being names.
Group = dict[str, Any]

_MODEL, _OPTIMIZER = "model.", "optimizer."
#: How an optimizer computes its step on a device: no state, and another device may not have it.
_OF_DEVICE = ("foreach", "fused", "capturable", "differentiable")
_SHOWN = 10


@dataclass(frozen=True, eq=False)
class PortableState:
    """`tensors`: "model.NAME" share the memory of the model, and "optimizer.NAME.KEY" is what an optimizer keeps of a
    parameter. `names` are of its parameters, in the order in which it counts them.
    """

    tensors: dict[str, Tensor]
    names: list[str]
    groups: list[Group]

    @property
    def specs(self) -> dict[str, Spec]:
        return {name: [list(t.shape), _dtype_name(t.dtype)] for name, t in self.tensors.items()}


def state_of(model: nn.Module, optimizer: Optimizer) -> PortableState:
    """What is to be saved.

    Raises:
        CheckpointError: the optimizer has parameters that the model has not, or state that other ranks could not read.
    """
    state, packed = _without_optimizer(model, optimizer), optimizer.state_dict()["state"]
    for i, values in packed.items():
        parameter = model.get_parameter(state.names[i])
        for key, value in values.items():
            if value is not None:
                _require_portable(f"{key} of {state.names[i]}", value, parameter)
                state.tensors[f"{_OPTIMIZER}{state.names[i]}.{key}"] = value
    return state


def room_for(model: nn.Module, optimizer: Optimizer, specs: Mapping[str, Spec], groups: list[Group]) -> PortableState:
    """What is to be read into, as it was saved: an optimizer that has not made a step yet has no state of its own.

    Raises:
        CheckpointError: what was saved is not of this model, or not of an optimizer like this one; it lists why.
    """
    state = _without_optimizer(model, optimizer)
    for name, (shape, dtype) in specs.items():
        parameter, _ = _of_optimizer(name)
        if parameter in state.names:
            state.tensors[name] = _empty(model.get_parameter(parameter), shape, getattr(torch, dtype))
    _require_same(state, specs, groups)
    return state


def give(state: PortableState, groups: list[Group], model: nn.Module, optimizer: Optimizer) -> None:
    """To model and optimizer what the tensors hold, and to the optimizer the settings of `groups`."""
    model.load_state_dict({n.removeprefix(_MODEL): t for n, t in state.tensors.items() if n.startswith(_MODEL)})
    index = {name: i for i, name in enumerate(state.names)}
    values: dict[int, dict[str, Tensor]] = {}
    for name, tensor in state.tensors.items():
        parameter, key = _of_optimizer(name)
        if parameter in index:
            values.setdefault(index[parameter], {})[key] = tensor
    packed = []
    for mine, theirs in zip(optimizer.param_groups, groups, strict=True):
        saved = {key: tuple(v) if isinstance(v, list) else v for key, v in theirs.items() if key not in _OF_DEVICE}
        kept = {key: mine[key] for key in _OF_DEVICE if key in mine}
        packed.append(saved | kept | {"params": [index[name] for name in theirs["params"]]})
    optimizer.load_state_dict({"state": values, "param_groups": packed})


def _without_optimizer(model: nn.Module, optimizer: Optimizer) -> PortableState:
    """Names and settings, and the tensors of the model only."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # a forward without a backward may have left it gathered
    names = _names(model, optimizer)
    packed = optimizer.state_dict()["param_groups"]
    groups = [group | {"params": [names[i] for i in group["params"]]} for group in packed]
    return PortableState({_MODEL + name: t.detach() for name, t in model.state_dict().items()}, names, groups)


def _names(model: nn.Module, optimizer: Optimizer) -> list[str]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if foreign := sum(id(parameter) not in names for parameter in parameters):
        raise CheckpointError(
            f"{foreign} of the {len(parameters)} parameters of the optimizer are not those of the model: make the "
            "optimizer after the model was sharded and loaded"
        )
    return [names[id(parameter)] for parameter in parameters]


def _of_optimizer(name: str) -> tuple[str, str]:
    """(parameter, key); ("", "") of what is no state of an optimizer."""
    if not name.startswith(_OPTIMIZER):
        return "", ""
    parameter, _, key = name.removeprefix(_OPTIMIZER).rpartition(".")
    return parameter, key


def _require_portable(what: str, value: Any, parameter: Tensor) -> None:
    """That any layout knows which part of it each rank has."""
    if not isinstance(value, Tensor) or value.shape not in (parameter.shape, torch.Size()):
        found = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise CheckpointError(
            f"the optimizer keeps {what} as {found}; other ranks can go on with tensors in the shape of their "
            f"parameter, {list(parameter.shape)}, or with scalar ones. Take an optimizer like AdamW or SGD"
        )


def _empty(parameter: Tensor, shape: list[int], dtype: torch.dtype) -> Tensor:
    """Sharded as the parameter is, where it is of its shape."""
    if shape == list(parameter.shape):
        return torch.zeros_like(parameter.detach(), dtype=dtype)
    return torch.zeros(shape, dtype=dtype)


def _require_same(state: PortableState, specs: Mapping[str, Spec], groups: list[Group]) -> None:
    found = state.specs
    differ = [
        f"{name}: saved as {specs.get(name, 'nothing')}, here {found.get(name, 'nothing')}"
        for name in sorted(found.keys() | specs.keys())
        if found.get(name) != specs.get(name)
    ]
    if len(state.groups) != len(groups):
        differ.append(f"saved with {len(groups)} parameter groups, here {len(state.groups)}")
    for number, (mine, theirs) in enumerate(zip(state.groups, groups, strict=False)):
        if mine["params"] != theirs["params"]:
            differ.append(f"parameter group {number} has other parameters, or in another order")
        if settings := (mine.keys() ^ theirs.keys()) - set(_OF_DEVICE):
            differ.append(f"parameter group {number} has other settings: {', '.join(sorted(settings))}")
    if differ:
        rest = [f"and {len(differ) - _SHOWN} more"] if len(differ) > _SHOWN else []
        raise CheckpointError("\n  ".join(["it is of another model or optimizer:", *differ[:_SHOWN], *rest]))


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
