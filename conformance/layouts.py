"""Where inputs lie in memory: odd strides and offsets, inside buffers full of NaN whose every other byte must survive.

An out-of-bounds read brings a NaN into the result, an out-of-bounds write or a written input changes the buffer."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ospnext.numerics import hif8

from .check import CheckFailure

#: Elements of NaN before and after each tensor. A multiple of every alignment that a kernel may ask for.
GUARD = 1024
#: Heads of the 14B model; `batched_qkv` lays a tensor out as one slice of q, k and v of them all.
FUSED_HEADS = 40

#: The layouts in which a crossed case is repeated, beside contiguous tensors.
LAYOUTS = ("transposed", "fused_qkv", "last_stride", "offset", "broadcast", "expanded_grad")
#: Those that change values, so that a broadcast has something to broadcast: the oracle must see them too.
_CHANGE_VALUES = ("broadcast", "expanded_grad")


def values_in(layout: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs with the values that `layout` implies."""
    changed = dict(inputs)
    for name, tensor in inputs.items():
        if not isinstance(tensor, Tensor):
            continue
        if layout == "broadcast" and (axis := _broadcast_axis(tensor, "cu_seqlens_q" in inputs)) is not None:
            changed[name] = tensor.narrow(axis, 0, 1).expand(tensor.shape)
        elif layout == "expanded_grad" and name == "grad_out":
            changed[name] = tensor.flatten()[0].expand(tensor.shape)
    return changed


def changes_values(layout: str) -> bool:
    return layout in _CHANGE_VALUES


class Placed:
    """Inputs on the device in a layout, with the buffers around them."""

    def __init__(self, inputs: Mapping[str, Any], layout: str, device: torch.device) -> None:
        self.values: dict[str, Any] = {}
        self._buffers: dict[str, Tensor] = {}
        self._before: dict[str, Tensor] = {}
        for name, value in inputs.items():
            self.values[name] = self._place(name, value, layout, device) if isinstance(value, Tensor) else value

    def _place(self, name: str, value: Tensor, layout: str, device: torch.device) -> Tensor:
        strides, offset, extent = _geometry(value, layout)
        size = GUARD + extent + GUARD
        if layout == "batched_qkv" and extent > 1 << 24:
            buffer = torch.empty(size, dtype=value.dtype, device=device)  # too large to fill; only the values are kept
            view = buffer.as_strided(value.shape, strides, GUARD + offset)
            view.copy_(value)
            self._buffers[name] = view
        else:
            buffer = torch.full((size,), _poison(value.dtype), dtype=value.dtype, device=device)
            view = buffer.as_strided(value.shape, strides, GUARD + offset)
            written = view if 0 not in strides else buffer.as_strided(*_without_broadcast(value, strides, offset))
            written.copy_(value if 0 not in strides else value[_first_where_zero(value, strides)])
            self._buffers[name] = buffer
        self._before[name] = _bits(self._buffers[name]).clone()
        return view

    def storages(self, *, but: str = "") -> set[int]:
        """Addresses of the memory that inputs live in; no result may share one."""
        tensors = (v for k, v in self.values.items() if isinstance(v, Tensor) and v.numel() and k != but)
        return {t.untyped_storage().data_ptr() for t in tensors}

    def require_untouched(self) -> None:
        """Raise CheckFailure if an input or anything around one was written to."""
        for name, buffer in self._buffers.items():
            if not torch.equal(_bits(buffer), self._before[name]):
                raise CheckFailure(f"{name}, or memory next to it, was written to: inputs must stay as they are")


def dirty_allocator(device: torch.device, like: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Leave freed blocks full of NaN for the outputs to be allocated from, so that what is not written shows."""
    blocks = [torch.full((max(1, t.numel()),), torch.nan, dtype=dtype, device=device) for t in like.values()]
    blocks += [torch.full((max(1, t.numel()),), torch.nan, dtype=torch.float32, device=device) for t in like.values()]
    del blocks


# ---- geometry


def _geometry(tensor: Tensor, layout: str) -> tuple[tuple[int, ...], int, int]:
    """(strides, offset of the first element, elements of memory) of `tensor` in `layout`."""
    shape = tuple(tensor.shape)
    strides, offset = _contiguous(shape), 0
    if not _is_data(tensor):
        layout = "contiguous"  # index tensors are contiguous by contract
    if layout in ("contiguous", "expanded_grad", "broadcast"):
        # A broadcast dimension keeps its stride of 0, whoever made it.
        strides = tuple(0 if s == 0 else natural for s, natural in zip(tensor.stride(), strides, strict=True))
    elif layout == "transposed" and len(shape) > 2:
        swapped = (*shape[:-3], shape[-2], shape[-3], shape[-1])
        natural = _contiguous(swapped)
        strides = (*natural[:-3], natural[-2], natural[-3], natural[-1])
    elif layout == "transposed" and len(shape) == 2:
        strides = (1, max(1, shape[0]))
    elif layout in ("fused_qkv", "batched_qkv") and len(shape) > 1:
        block = 2 if len(shape) == 4 else 1
        slices = 3 if layout == "fused_qkv" else 3 * FUSED_HEADS // (shape[-2] if block == 2 else 1)
        strides = (*(s * slices for s in strides[:-block]), *strides[-block:])
        offset = (slices - 1) * _elements(shape[-block:], strides[-block:])  # the last slice: offsets are largest there
    elif layout == "last_stride":
        strides = tuple(2 * s for s in strides)
    elif layout == "offset":
        offset = 1
    return strides, offset, offset + _elements(shape, strides)


def _contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(itertools.accumulate((1, *reversed(shape[1:])), lambda a, b: a * max(1, b)))[::-1] if shape else ()


def _elements(shape: Sequence[int], strides: Sequence[int]) -> int:
    if 0 in shape:
        return 0
    return 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))


def _broadcast_axis(tensor: Tensor, packed: bool) -> int | None:
    """Heads of an attention tensor, samples of a stream; small vectors have nothing to broadcast."""
    if not _is_data(tensor) or tensor.dtype == torch.bool or tensor.ndim < 3:
        return None
    return -2 if tensor.ndim == 4 or packed else 0


def _first_where_zero(tensor: Tensor, strides: Sequence[int]) -> tuple[Any, ...]:
    return tuple(slice(0, 1) if s == 0 else slice(None) for s in strides)


def _without_broadcast(tensor: Tensor, strides: Sequence[int], offset: int) -> tuple[Any, ...]:
    shape = [1 if s == 0 else n for n, s in zip(tensor.shape, strides, strict=True)]
    return shape, [s or 1 for s in strides], GUARD + offset


def _is_data(tensor: Tensor) -> bool:
    """Values, masks and HiFloat8 codes, which may lie anyhow."""
    return tensor.is_floating_point() or tensor.dtype in (torch.bool, torch.uint8)


def _poison(dtype: torch.dtype) -> Any:
    if dtype.is_floating_point:
        return torch.nan
    return {torch.bool: True, torch.uint8: hif8.NAN}.get(dtype, 7)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().view(torch.uint8)
