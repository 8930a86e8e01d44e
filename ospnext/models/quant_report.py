"""How HiFloat8 fares in a model that runs: what lands at either end of the format, by kind of layer and operand."""

from __future__ import annotations

import functools
import inspect
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ospnext import ops
from ospnext.errors import ConfigError
from ospnext.models.attend import Attend
from ospnext.models.hif8_linear import HiF8Linear, StoredHiF8Linear, quantized_weight
from ospnext.numerics import carrier, hif8
from ospnext.numerics.scaling import amax_of
from ospnext.ops import HiF8Recipe, Quantized

#: Elements that are looked at together: bounds what is computed on the way.
_PIECE = 1 << 24

_FAKE_QUANTIZE = "hif8_fake_quantize"


class QuantReport:
    """Counts while it is entered, by hooks: layers know nothing of it, and a model without it pays nothing.

    Every operand is quantized a second time for the count. A count stays on the device until it is read, so that
    nothing waits for it. Blocks are counted together: a layer is "ffn.2" of all blocks. Stored weights count once, all
    else in each call, recomputed ones too.

    Where ranks share scales, all of them must report, because counting shares scales too. A model that was compiled
    before runs no hooks.

    Raises:
        ConfigError: no layer of the model computes in HiFloat8.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = {name: module for name, module in model.named_modules() if _is_counted(module)}
        if not self._layers:
            raise ConfigError(
                "no layer computes in HiFloat8, so there is nothing to report: set quant=hif8 or quant_attn=hif8 (in "
                "Python: quantize_model), or take a checkpoint of HiFloat8 codes. Layers with compat are not counted"
            )
        self._counters: dict[tuple[str, str], _Counter] = {}
        self._stored_seen = False
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> QuantReport:
        if self._handles:
            raise RuntimeError("this QuantReport is entered already")
        for name, module in self._layers.items():
            hook = self._attend_ran if isinstance(module, Attend) else self._linear_ran
            bound: Callable[..., None] = functools.partial(hook, _kind_of(name))
            self._handles.append(module.register_forward_hook(bound, with_kwargs=True))
            if isinstance(module, StoredHiF8Linear) and not self._stored_seen:
                self._see_stored(_kind_of(name), module)
        self._stored_seen = True
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def as_dict(self) -> dict[str, dict[str, dict[str, Any]]]:
        """By layer and operand: elements, saturated, underflow (None where only codes are known), non_finite, and amax
        (None where it is not finite). Waits for the device.
        """
        found: dict[str, dict[str, dict[str, Any]]] = {_kind_of(name): {} for name in self._layers}
        for (layer, operand), counter in sorted(self._counters.items(), key=lambda item: _OPERANDS.index(item[0][1])):
            found[layer][operand] = counter.read()
        return {layer: operands for layer, operands in found.items() if operands}

    def table(self) -> str:
        """The counts as text, a line for each layer and operand. Waits for the device."""
        heads = ("layer", "operand", "elements", "saturated", "underflow", "non-finite", "largest amax")
        rows = [heads, *(_row(*words) for words in self._lines())]
        if len(rows) == 1:
            return "HiFloat8: no quantized layer has run"
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(_aligned(row, widths)) for row in rows]
        return "\n".join([_LEGEND, *lines])

    def _lines(self) -> Iterator[tuple[str, str, dict[str, Any]]]:
        for layer, operands in self.as_dict().items():
            yield from ((layer, operand, counts) for operand, counts in operands.items())

    # ---- hooks

    def _linear_ran(
        self, layer: str, module: HiF8Linear | StoredHiF8Linear, args: Any, kwargs: Any, output: Tensor
    ) -> None:
        given = _arguments(module, args, kwargs)
        x, recipe = given["input"], module.recipe
        codes = given.get("x_quantized")
        if codes is not None and codes.codes.dtype != torch.uint8:  # carried: E4M3 does not tell all values apart
            codes = None
        self._see(layer, "x", x, recipe, module.amax_group, codes=codes)
        if isinstance(module, HiF8Linear):
            self._see(layer, "weight", module.weight, recipe, codes=quantized_weight(module.weight, recipe))
        if output.requires_grad:
            output.register_hook(self._gradient_hook(layer, "grad", module))

    def _attend_ran(self, layer: str, module: Attend, args: Any, kwargs: Any, output: Tensor) -> None:
        given, recipe = _arguments(module, args, kwargs), module.recipe
        assert recipe is not None
        for operand in "qkv":
            self._see(layer, operand, given[f"{operand}_BSHD"], recipe, module.amax_group, granularity="tensor")
        # Hooks on q, k and v themselves would see gradients that made the round trip already.
        for operand, node in zip("qkv", _round_trips(output), strict=False):
            if node is not None:
                see = self._gradient_hook(layer, f"grad of {operand}", module)
                node.register_prehook(lambda grads, see=see: see(grads[0]))

    def _gradient_hook(self, layer: str, operand: str, module: Any) -> Callable[[Tensor | None], None]:
        """For a graph, which may outlive the report: it then counts nothing."""

        def see(grad: Tensor | None) -> None:
            if self._handles and grad is not None:
                self._see(layer, operand, grad, module.recipe, module.amax_group, of_gradient=True)

        return see

    # ---- counting

    @torch.no_grad()
    def _see(
        self,
        layer: str,
        operand: str,
        x: Tensor,
        recipe: HiF8Recipe,
        amax_group: Any = None,
        *,
        codes: Quantized | None = None,
        granularity: Any = None,
        of_gradient: bool = False,
    ) -> None:
        x, scale_max = x.detach(), recipe.grad_scale_max if of_gradient else recipe.scale_max
        if codes is None:
            codes = ops.hif8_quantize(
                x,
                scale_max=scale_max,
                scale_mode=recipe.scale_mode,
                granularity="tensor" if of_gradient else granularity or recipe.granularity,
                amax_group=amax_group,
            )
        counts = _counts(codes.codes, x, _top(scale_max))
        self._counter(layer, operand, x.device).add(x.numel(), counts, amax_of(x, "tensor"))

    @torch.no_grad()
    def _see_stored(self, layer: str, module: StoredHiF8Linear) -> None:
        codes, scale, top = module.weight, module.weight_scale, _top(module.recipe.scale_max)
        largest = carrier.values(codes, torch.bfloat16).abs().amax(1, keepdim=True).float() * scale
        if module.carried:
            top *= 2.0 ** carrier.shift_for(module.recipe.scale_max)
        counts = _counts(codes, None, top)
        self._counter(layer, "weight", codes.device).add(codes.numel(), counts, largest.amax(), underflow=False)

    def _counter(self, layer: str, operand: str, device: torch.device) -> _Counter:
        if (layer, operand) not in self._counters:
            with torch.inference_mode(False):  # calls of every mode add to it
                counts = torch.zeros(3, dtype=torch.int64, device=device)
                self._counters[layer, operand] = _Counter(counts, torch.zeros((), device=device))
        return self._counters[layer, operand]


_LEGEND = """\
HiFloat8. saturated: at the largest value of a scale, where scale_mode=amax puts at least one element of each tensor;
underflow: zero that was not zero before"""

#: In the order of the table.
_OPERANDS = ("x", "weight", "grad", "q", "k", "v", "grad of q", "grad of k", "grad of v")


@dataclass
class _Counter:
    """`counts` int64 [3]: saturated, underflow, not finite; `amax` fp32 []. Both on the device."""

    counts: Tensor
    amax: Tensor
    elements: int = 0
    #: Whether all that was counted could tell underflow from zero.
    underflow: bool = True

    def add(self, elements: int, counts: Tensor, amax: Tensor, *, underflow: bool = True) -> None:
        self.elements += elements
        self.underflow &= underflow
        self.counts += counts.to(self.counts.device)
        self.amax.copy_(torch.maximum(self.amax, amax.reshape(()).to(self.amax.device)))

    def read(self) -> dict[str, Any]:
        saturated, underflow, non_finite = self.counts.tolist()
        amax = self.amax.item()
        return {
            "elements": self.elements,
            "saturated": saturated,
            "underflow": underflow if self.underflow else None,
            "non_finite": non_finite,
            "amax": amax if math.isfinite(amax) else None,
        }


def _counts(codes: Tensor, x: Tensor | None, top: float) -> Tensor:
    """int64 [3] on the device of `codes`; underflow is 0 without the values `x` that the codes are of."""
    found = torch.zeros(3, dtype=torch.int64, device=codes.device)
    given = (None,) * (codes.numel() // _PIECE + 1) if x is None else x.reshape(-1).split(_PIECE)
    for piece, values in zip(codes.reshape(-1).split(_PIECE), given, strict=False):
        magnitude = carrier.values(piece, torch.bfloat16).abs_()  # exact in it
        finite = magnitude.isfinite()
        lost = torch.zeros_like(finite) if values is None else (piece == hif8.ZERO) & (values != 0)
        found += torch.stack([((magnitude >= top) & finite).sum(), lost.sum(), (~finite).sum()])
    return found


@functools.cache
def _top(scale_max: float) -> float:
    """The largest HiFloat8 value up to `scale_max`."""
    return max(value for value in map(hif8.value_of, range(256)) if value <= scale_max)


def _is_counted(module: nn.Module) -> bool:
    attends = isinstance(module, Attend) and module.recipe is not None
    return attends or isinstance(module, HiF8Linear | StoredHiF8Linear)


def _kind_of(name: str) -> str:
    """ "blocks.3.ffn.2" is "ffn.2"."""
    return re.sub(r"^(.*\.)?blocks\.\d+\.", "", name)


def _arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return dict(inspect.signature(module.forward).bind(*args, **kwargs).arguments)


def _round_trips(output: Tensor) -> tuple[Any, ...]:
    """The nodes of the graph that take gradients of q, k and v through HiFloat8, None for each that has no gradient;
    empty where attention is not that composition.
    """
    node = output.grad_fn
    while node is not None:
        before = [n for n, _ in node.next_functions]
        if any(n is not None and _FAKE_QUANTIZE in n.name() for n in before):
            return tuple(before[:3])
        node = before[0] if len(before) == 1 else None  # only views lie between
    return ()


def _aligned(row: tuple[str, ...], widths: list[int]) -> Iterator[str]:
    for column, (word, width) in enumerate(zip(row, widths, strict=True)):
        yield word.ljust(width) if column < 2 else word.rjust(width)


def _row(layer: str, operand: str, counts: dict[str, Any]) -> tuple[str, ...]:
    def share(count: int | None) -> str:
        if count is None:
            return "not known"
        return f"{100 * count / counts['elements']:.3g}%" if count else "0"

    amax = "not finite" if counts["amax"] is None else f"{counts['amax']:.4g}"
    elements, non_finite = f"{counts['elements']:,}", f"{counts['non_finite']:,}"
    return layer, operand, elements, share(counts["saturated"]), share(counts["underflow"]), non_finite, amax
