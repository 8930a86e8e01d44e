"""HiFloat8 products as four FP8 ones. PyTorch's FP8 product runs on a CPU too, where its sums are exact enough."""

from __future__ import annotations

import pytest
import torch

from ospnext.backends.cuda.fp8_split import fp8_split, split
from ospnext.backends.reference.quantized_linear import linear
from ospnext.numerics import hif8
from ospnext.numerics.carrier import DTYPE, shift_for
from ospnext.ops import hif8_quantize, use_backend


@pytest.mark.parametrize("scale_max", [15.0, 224.0, 448.0])
def test_every_value_is_in_one_part_exactly(scale_max):
    codes = torch.arange(256, dtype=torch.uint8)
    values = hif8.decode(codes)
    codes = codes[values.isfinite() & (values.abs() <= scale_max)]
    parts = [part.float() * 2.0**-by for part, by in split(codes, shift_for(scale_max))]
    held = [part[: len(codes)] for part in parts]
    assert torch.equal(held[0] + held[1], hif8.decode(codes))
    assert not ((held[0] != 0) & (held[1] != 0)).any()


def test_what_the_format_cannot_hold_is_nan():
    codes = torch.tensor([0x80, 0x6F, 0xEF], dtype=torch.uint8)  # NaN and both infinities
    (large, _), _ = split(codes, 4)
    assert large.dtype == DTYPE
    assert large[:3].float().isnan().all()


def off(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.fixture
def operands():
    """With tails so long that a hundredth of the values are too small for one E4M3 operand."""
    generator = torch.Generator().manual_seed(0)

    def tailed(*shape):
        return torch.randn(*shape, generator=generator) * torch.exp(3 * torch.randn(*shape, generator=generator))

    with use_backend("reference"):
        x, weight = (hif8_quantize(tailed(n, 80)) for n in (37, 48))
        grad = hif8_quantize(tailed(37, 48), scale_max=224.0)
    return x, weight, grad


def test_it_computes_what_the_reference_does(operands):
    x, weight, grad = operands
    bias = torch.linspace(-1, 1, 48)
    settings = {"accumulate": "fp32", "scale_max": 15.0}
    found, expected = (k.forward(*x, *weight, bias, dtype=torch.float32, **settings) for k in (fp8_split, linear))
    assert off(found, expected) < 1e-6
    settings |= {"grad_scale_max": 224.0, "dtypes": (torch.float32,) * 3}
    found, expected = (k.backward(*grad, *x, *weight, **settings) for k in (fp8_split, linear))
    assert [off(*both) < 1e-6 for both in zip(found, expected, strict=True)] == [True] * 3


def test_one_operand_alone_would_not(operands):
    """The inputs are such that the small values matter."""
    (codes, _), *_ = operands
    (large, shift), (small, _) = split(codes, 4)
    assert small.float().ne(0).float().mean() > 0.01
    values = hif8.decode(codes)
    assert (large.float() * 2.0**-shift - values).norm() / values.norm() > 1e-5


def test_no_tokens():
    codes, scale = torch.zeros(0, 32, dtype=torch.uint8), torch.ones(1, 1)
    weight = torch.zeros(16, 32, dtype=torch.uint8)
    found = fp8_split.forward(
        codes, scale, weight, scale, None, dtype=torch.bfloat16, accumulate="fp32", scale_max=15.0
    )
    assert found.shape == (0, 16)
