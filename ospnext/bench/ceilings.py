"""What the kernels of this device reach at the shapes of a model, each run alone, in this very process, by the device's
events: a profiler stops the device between calls, and clocks then move.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ospnext import ops
from ospnext.bench.measure import Call, timed
from ospnext.models.attend import Attend
from ospnext.models.hif8_linear import StoredHiF8Linear, project
from ospnext.models.layout import Subsequences
from ospnext.ops import HiF8Recipe

REPEATS, WARM_UP = 5, 2


@dataclass
class Ceilings:
    """Milliseconds of kernels at the shapes asked for. A shape is measured once and kept."""

    device: torch.device
    dtype: torch.dtype = torch.bfloat16
    _kept: dict[tuple, float] = field(default_factory=dict)

    def linear(self, tokens: int, inner: int, outer: int) -> float:
        """A linear with bias on the stream."""
        key = ("linear", tokens, inner, outer)
        if key not in self._kept:
            x, weight, bias = self._randn(tokens, inner), self._randn(outer, inner), self._randn(outer)
            self._kept[key] = self._timed(lambda: F.linear(x, weight, bias))
        return self._kept[key]

    def quantized_linear(self, tokens: int, layer: nn.Module, inner: int, outer: int, recipe: HiF8Recipe) -> float:
        """The faster of `layer`, a quantized linear of these features, without the quantization of its input, and of
        the device's FP8 product with scales per tensor and sums like those of the recipe, where it has one.
        """
        key = ("quantized", tokens, inner, outer, repr(layer))
        if key not in self._kept:
            found = self._quantized(tokens, layer, inner, recipe)
            self._kept[key] = min(found, self._fp8(tokens, inner, outer, fast=recipe.accumulate == "fast"))
        return self._kept[key]

    def _fp8(self, tokens: int, inner: int, outer: int, *, fast: bool) -> float:
        """Infinite where there is no such product."""
        one = torch.ones((), device=self.device)
        try:
            x, weight = (self._randn(n, inner).to(torch.float8_e4m3fn) for n in (tokens, outer))
            bias = self._randn(outer)

            def product() -> Tensor:
                return torch._scaled_mm(x, weight.T, one, one, bias=bias, out_dtype=self.dtype, use_fast_accum=fast)

            return self._timed(product)
        except (RuntimeError, ValueError, NotImplementedError):  # no FP8 at all, or not at this shape
            return float("inf")

    def attention(
        self, attend: Attend, q_shape: tuple[int, ...], kv_shape: tuple[int, ...], pieces: Subsequences | None = None
    ) -> float:
        """`attend` on [B, S, H, D], inside `pieces` if given; without what it does to q, k and v before."""
        key = ("attention", repr(attend), q_shape, kv_shape, pieces and pieces.lengths)
        if key not in self._kept:
            q, k, v = self._randn(*q_shape), self._randn(*kv_shape), self._randn(*kv_shape)
            self._kept[key] = self._timed(lambda: attend(q, k, v, pieces))
        return self._kept[key]

    def copy(self, elements: int) -> float:
        """Bytes per second, read and written, of a copy of `elements`."""
        key = ("copy", elements)
        if key not in self._kept:
            x = self._randn(elements)
            out = torch.empty_like(x)
            self._kept[key] = self._timed(lambda: out.copy_(x))
        return 2 * elements * self.dtype.itemsize / (1e-3 * self._kept[key])

    def _quantized(self, tokens: int, layer: Any, inner: int, recipe: HiF8Recipe) -> float:
        """`layer` on codes that are there already."""
        carried = isinstance(layer, StoredHiF8Linear) and layer.carried
        settings: dict[str, Any] = {"scale_max": recipe.scale_max, "scale_mode": recipe.scale_mode}
        x = ops.hif8_quantize(
            self._randn(1, tokens, inner), **settings, granularity=recipe.granularity, carried=carried
        )
        return self._timed(lambda: project(x, layer, dtype=self.dtype))

    @torch.no_grad()
    def _timed(self, call: Call) -> float:
        return timed(call, self.device, repeats=REPEATS, warm_up=WARM_UP).median

    def _randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=self.dtype)
