"""The fused Triton kernels in Triton's interpreter, on the CPU: a program that compares one of them with its contract.

    TRITON_INTERPRET=1 python tests/interpreted_fused.py rms_norm

It prints what differs. What only a real compiler refuses, or a race, is left to the conformance suite on a GPU."""

from __future__ import annotations

import dataclasses
import itertools
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from ospnext.backends.cuda import fused
from ospnext.backends.reference.quantize import quantize
from ospnext.conformance.layouts import LAYOUTS, Placed, values_in
from ospnext.numerics import carrier
from ospnext.ops.contract import Case
from ospnext.ops.contracts import CONTRACTS
from ospnext.ops.contracts import quantize_oracle as oracle
from ospnext.ops.contracts.fused_quantize import SETTINGS


def _fma(self: Any, x: Any, y: Any, z: Any) -> Any:
    """One rounding, in which a product of fp32 numbers is exact; the interpreter's own has two."""
    wide = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
    return interpreter.TensorHandle(wide.astype(x.data.dtype), z.dtype.scalar)


def _convert(data: Any, source: Any, target: Any, rounding: Any) -> Any:
    """To the nearest, as a GPU does; the interpreter's own loses bits of the smallest E4M3 numbers."""
    if target == tl.float8e4nv:
        return torch.from_numpy(np.ascontiguousarray(data)).to(carrier.DTYPE).view(torch.uint8).numpy()
    return _converted(data, source, target, rounding)


def _patch_tensor(tensor: Any, scope: Any) -> None:
    """A number of one element ends a range, too; the interpreter's own asks NumPy for what it no longer does."""
    _patched(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


_converted, _patched = interpreter._convert_float, interpreter._patch_lang_tensor
interpreter._patch_lang_tensor = _patch_tensor
interpreter._convert_float = _convert
interpreter.InterpreterBuilder.create_fma = _fma

#: Tokens of a sample: more than a program adds up, and the last chunk is not full.
TOKENS = 35
CPU = torch.device("cpu")


def cases(name: str) -> Iterator[tuple[Case, str]]:
    """Every case with few tokens, and the crossed ones of the usual channels in every layout."""
    for case in CONTRACTS[f"fused.{name}"].cases():
        sizes = case.options["sizes"]
        small = dataclasses.replace(sizes, N=min(sizes.N, TOKENS))
        case = dataclasses.replace(case, options={**case.options, "sizes": small})
        for layout in ("contiguous", *(LAYOUTS if case.crossed and sizes.C < 1000 else ())):
            yield case, layout


def wrong(name: str, case: Case, layout: str) -> Iterator[str]:
    contract, kernel = CONTRACTS[f"fused.{name}"], getattr(fused, name)
    inputs = values_in(layout, contract.inputs(case))
    placed = Placed(inputs, layout, CPU)
    operands = dict(placed.values)
    grad = operands.pop("grad_out", None)
    if name.endswith("_quantize"):
        codes, scale = kernel.forward(*operands.values())
        yield from wrong_codes(name, operands, codes, scale)
        found = {"codes": (codes if operands["carried"] else oracle.decoded(codes)).float(), "scale": scale}
    else:
        found = {"out": kernel.forward(*operands.values())}
    if grad is not None:
        gradients = zip(operands, kernel.backward(grad, *operands.values()), strict=True)
        found |= {f"d{operand}": gradient for operand, gradient in gradients if gradient is not None}
    placed.require_untouched()
    yield from (f"{n} is not contiguous" for n, result in found.items() if not result.is_contiguous())
    for what, verdict in contract.expect(inputs).judge(found).items():
        if not verdict.ok:
            yield f"{what}: {verdict}"


def wrong_codes(name: str, operands: dict[str, Any], codes: Tensor, scale: Tensor) -> Iterator[str]:
    """Codes and scale must be those of the plain kernel's result, bit for bit, but for the sign of a carried zero."""
    settings = {setting: operands[setting] for setting in SETTINGS}
    plain = [value for operand, value in operands.items() if operand not in SETTINGS]
    y = getattr(fused, name.removesuffix("_quantize")).forward(*plain)
    expected = quantize(y, None, **settings)
    numbers = [t.float().nan_to_num(512.0) for t in (codes, expected[0])]
    if codes.dtype != expected[0].dtype or not numbers[0].equal(numbers[1]):
        yield f"codes differ from those of the rounded {name.removesuffix('_quantize')}"
    if scale.shape != expected[1].shape or not torch.allclose(scale, expected[1], rtol=0, atol=0, equal_nan=True):
        yield "scales differ"


# ---- what no case has


def rows_of_all_sizes(name: str) -> Iterator[str]:
    """Rows from 1e-9 to 1e4, quantized in every way; in the second sample one has an Inf and one a NaN."""
    size = torch.logspace(-9, 4, 18).reshape(2, 9, 1)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = (torch.randn(2, 9, 100, generator=torch.Generator().manual_seed(0)) * size).to(dtype)
        x[0, 3], x[1, 2, 5], x[1, 3, 7] = 0, torch.inf, torch.nan
        more = dict.fromkeys(("weight", "bias", "shift", "scale")) | {"eps": 1e-6} if "norm" in name else {}
        for rows, *form in itertools.product(
            (x, x[:1], x[:1] * 0), (1.0, 15.0, 224.0, 448.0), ("amax", "pow2"), ("row", "tensor"), (False, True)
        ):
            every = {"x": rows} | more | dict(zip(SETTINGS, form, strict=True))
            codes, scale = getattr(fused, name).forward(*every.values())
            for line in wrong_codes(name, every, codes, scale):
                yield f"{dtype} {form}: {line}"


def unusual_operands(name: str) -> Iterator[str]:
    """Nothing at all, one of everything, parameters in another dtype, four dimensions: against the definition."""
    composite, kernel = CONTRACTS[f"fused.{name}"].composite, getattr(fused, name)
    for args in UNUSUAL[name]():
        out = composite.forward(*args)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        found = [kernel.forward(*args), *kernel.backward(grad, *args)]
        for one, other in zip(found, [out, *composite.backward(grad, *args)], strict=True):
            shapes = [None if t is None else (t.shape, t.dtype) for t in (one, other)]
            if shapes[0] != shapes[1] or (one is not None and not torch.allclose(one, other, 1e-4, 1e-5)):
                yield f"{[tuple(a.shape) for a in args if isinstance(a, Tensor)]}: {shapes}"


def _randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _streams() -> Iterator[Tensor]:
    for shape in ((1, 1, 1), (0, 3, 8), (2, 0, 8), (2, 33, 40)):
        yield _randn(*shape)


def _rms_norm() -> Iterator[tuple[Any, ...]]:
    for x in (*_streams(), _randn(2, 3, 4, 6), _randn(2, 3, 4, 6).transpose(0, 2), _randn(3, 6)):
        yield x, _randn(x.shape[-1]).double(), 1e-6


def _layer_norm() -> Iterator[tuple[Any, ...]]:
    for x in _streams():
        samples, _, channels = x.shape
        weight, bias = _randn(channels).half(), _randn(channels)
        shift, scale = _randn(samples, 6, channels)[:, 2], _randn(channels, samples).T
        yield x, weight, bias, None, None, 1e-6
        yield x, None, None, shift, scale, 1e-6
        yield x, weight, bias, shift, scale, 1e-6


def _rope() -> Iterator[tuple[Any, ...]]:
    for shape in ((2, 5, 3, 10), (1, 2, 70, 128), (2, 3, 1, 2), (0, 2, 2, 4)):
        angles = _randn(shape[1], shape[3] // 2)
        yield _randn(*shape), angles.cos().double(), angles.T.contiguous().T.sin()


def _rms_norm_rope() -> Iterator[tuple[Any, ...]]:
    for x, cos, sin in _rope():
        yield x.flatten(2), _randn(x.flatten(2).shape[-1]), cos, sin, 1e-6


def _gate_residual() -> Iterator[tuple[Any, ...]]:
    for x in (*_streams(), _randn(1, 3, 2050)):
        samples, tokens, channels = x.shape
        yield x, x + 1, _randn(samples, 6, channels)[:, 1], torch.arange(tokens).roll(1)


def _gelu_tanh() -> Iterator[tuple[Any, ...]]:
    yield from ((x,) for x in (*_streams(), _randn(2, 3, 4, 6).transpose(0, 3), _randn()))
    yield (torch.tensor([-1e6, -90.0, -6.0, -0.0, 1e-30, 6.0, 90.0, 1e6]),)


UNUSUAL = {
    "rms_norm": _rms_norm,
    "layer_norm_modulate": _layer_norm,
    "rope": _rope,
    "rms_norm_rope": _rms_norm_rope,
    "gate_residual": _gate_residual,
    "gelu_tanh": _gelu_tanh,
}


def main(name: str) -> int:
    warnings.simplefilter("ignore")  # the interpreter computes with numpy, which warns of overflow
    lines, count = [], 0
    for case, layout in cases(name):
        lines += [f"{case.id}, {layout}: {line}" for line in wrong(name, case, layout)]
        count += 1
    lines += rows_of_all_sizes(name) if name.endswith("_quantize") else unusual_operands(name)
    print(*lines, f"{count} cases", sep="\n")
    return bool(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
