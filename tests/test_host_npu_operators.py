"""The emulated norms, rotary embedding, activation, casts and quantized products against definitions in fp64 and
HiFloat8 by en_dtypes. They run on CPU tensors; no torch_npu is needed.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hif8_by_en_dtypes import codes_of, values_of
from torch import Tensor
from torch.nn import functional

from ospnext.conformance.host_npu import device

K = device.kernels()
HIFLOAT8 = 290
NUMBERS = {torch.float16: 5, torch.float32: 6, torch.bfloat16: 15}
ROUNDING = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
DTYPES = list(ROUNDING)


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def close(found: Tensor, right: Tensor, dtype: torch.dtype, factor: float = 1.0) -> None:
    assert found.dtype == dtype and found.shape == right.shape
    assert float((found.double() - right).abs().max()) <= factor * ROUNDING[dtype] * float(right.abs().max()) + 1e-7


def wide(*tensors: Tensor) -> list[Tensor]:
    return [t.double().requires_grad_() for t in tensors]


# ---- norms


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalized", [(16,), (4, 16)])
@pytest.mark.parametrize("fp32_gamma", [False, True])
def test_rms_norm(normalized: tuple[int, ...], dtype: torch.dtype, fp32_gamma: bool) -> None:
    x, dy = randn(3, 5, 4, 16, dtype=dtype), randn(3, 5, 4, 16, dtype=dtype, seed=1)
    gamma = randn(*normalized, dtype=torch.float32 if fp32_gamma else dtype, seed=2)
    y, rstd = K["npu_rms_norm"](x, gamma, 1e-2)
    x64, gamma64 = wide(x, gamma)
    right = functional.rms_norm(x64, normalized, gamma64, 1e-2)
    close(y, right.detach(), dtype)
    over = tuple(range(-len(normalized), 0))
    close(rstd, torch.rsqrt(x64.square().mean(over, keepdim=True) + 1e-2).detach(), torch.float32, 4)
    dx, dgamma = torch.autograd.grad(right, (x64, gamma64), dy.double())
    found = K["npu_rms_norm_backward"](dy, x, gamma, rstd)
    close(found[0], dx, dtype, 2)
    close(found[1], dgamma, torch.float32, 8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_norms(dtype: torch.dtype) -> None:
    x1, x2, dy, dsum = (randn(3, 5, 16, dtype=dtype, seed=i) for i in range(4))
    gamma, beta = (randn(16, dtype=dtype, seed=i) for i in (4, 5))
    leaves = wide(x1, x2, gamma, beta)
    x64 = leaves[0] + leaves[1]
    right = functional.layer_norm(x64, (16,), *leaves[2:], 1e-3)
    y, mean, rstd, added = K["npu_add_layer_norm"](x1, x2, gamma, beta, 1e-3, True)
    close(y, right.detach(), dtype)
    close(mean, x64.mean(-1, keepdim=True).detach(), torch.float32, 4)
    close(rstd, torch.rsqrt(x64.var(-1, correction=0, keepdim=True) + 1e-3).detach(), torch.float32, 4)
    close(added, x64.detach(), dtype)
    assert K["npu_add_layer_norm"](x1, x2, gamma, beta, 1e-3)[3].isnan().all()
    gradients = torch.autograd.grad((right, x64), leaves, (dy.double(), dsum.double()))
    found = K["npu_add_layer_norm_backward"](dy, x1, x2, rstd, mean, gamma, dsum)
    for a, b, kind in zip(found, gradients, (dtype, dtype, torch.float32, torch.float32), strict=True):
        close(a, b, kind, 8)
    for weights in ((), (gamma, beta)):
        plain = functional.layer_norm(x1.double(), (16,), *(t.double() for t in weights), eps=1e-3)
        close(K["npu_layer_norm_eval"](x1, [16], *weights, eps=1e-3), plain, dtype)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.int8), (torch.float32, torch.float32)])
def test_rms_norm_quant(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    x, gamma, beta = (randn(*shape, dtype=torch.bfloat16, seed=i) for i, shape in enumerate(((40, 64), (64,), (64,))))
    scale, offset = torch.tensor([2.5]).to(dtypes[0]), torch.tensor([1]).to(dtypes[1])
    found = K["npu_rms_norm_quant"](x, gamma, beta, scale, offset, 1e-6, dst_dtype=HIFLOAT8)
    y = functional.rms_norm(x.double(), (64,), gamma.double(), 1e-6) + beta.double()
    agrees = found == codes_of(y * 2.5 + 1)
    assert agrees.double().mean() > 0.999


# ---- rotary embedding


def pairs(mode: str, dim: int) -> list[tuple[int, int]]:
    """Places (i, j) that turn together: result_i = x_i cos_i - x_j sin_i, result_j = x_j cos_j + x_i sin_j."""
    half, quarter = dim // 2, dim // 4
    if mode == "half":
        return [(i, i + half) for i in range(half)]
    if mode == "interleave":
        return [(2 * i, 2 * i + 1) for i in range(half)]
    return [(i, i + quarter) for start in (0, half) for i in range(start, start + quarter)]


def rotated(x: Tensor, cos: Tensor, sin: Tensor, mode: str) -> Tensor:
    if mode == "interleave-half":
        x, mode = torch.cat((x[..., ::2], x[..., 1::2]), -1), "half"
    matrix = torch.zeros(x.shape[-1], x.shape[-1], dtype=x.dtype)
    for i, j in pairs(mode, x.shape[-1]):
        matrix[j, i], matrix[i, j] = -1, 1
    return x * cos + x @ matrix * sin


SHAPES = [
    ((2, 5, 3, 16), (1, 5, 1, 16)),
    ((2, 5, 3, 16), (2, 5, 1, 16)),
    ((2, 5, 3, 16), (2, 5, 3, 16)),
    ((2, 5, 3, 16), (1, 1, 1, 16)),
    ((7, 3, 16), (7, 1, 16)),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("mode", ["half", "interleave", "quarter", "interleave-half"])
def test_rotary_mul(mode: str, shapes: Any, dtype: torch.dtype) -> None:
    x, dy = (randn(*shapes[0], dtype=dtype, seed=i) for i in range(2))
    cos, sin = (randn(*shapes[1], dtype=dtype, seed=i) for i in (2, 3))
    leaves = wide(x, cos, sin)
    right = rotated(*leaves, mode)
    close(K["npu_rotary_mul"](x, cos, sin, mode), right.detach(), dtype)
    gradients = torch.autograd.grad(right, leaves, dy.double())
    for a, b in zip(K["npu_rotary_mul_backward"](dy, x, cos, sin, mode), gradients, strict=True):
        close(a, b, dtype, 4)


def test_rotary_mul_casts_angles_to_the_dtype_of_its_input() -> None:
    x, cos, sin = randn(1, 4, 2, 16, dtype=torch.bfloat16), randn(1, 4, 1, 16, seed=1), randn(1, 4, 1, 16, seed=2)
    half = (cos.bfloat16(), sin.bfloat16())
    found = K["npu_rotary_mul"](x, cos, sin, "interleave")
    assert torch.equal(found, K["npu_rotary_mul"](x, *half, "interleave"))
    close(found, rotated(x.double(), *(t.double() for t in half), "interleave"), torch.bfloat16)


# ---- activation


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu(approximate: str, dtype: torch.dtype) -> None:
    x, dy = (2 * randn(50, 40, dtype=dtype, seed=i) for i in range(2))
    (x64,) = wide(x)
    right = functional.gelu(x64, approximate=approximate)
    close(K["npu_gelu"](x, approximate=approximate), right.detach(), dtype)
    (gradient,) = torch.autograd.grad(right, x64, dy.double())
    close(K["npu_gelu_backward"](dy, x, approximate=approximate), gradient, dtype, 2)


def test_gelu_quant() -> None:
    x = 2 * randn(50, 64, dtype=torch.bfloat16)
    options: dict[str, Any] = {"approximate": "tanh", "dst_type": HIFLOAT8, "round_mode": "round"}
    y = functional.gelu(x.double(), approximate="tanh")
    codes, scale = K["npu_gelu_quant"](x, **options)
    assert scale.shape == (50,) and scale.dtype == torch.float32
    torch.testing.assert_close(scale.double(), y.abs().amax(-1) / 32768, rtol=1e-5, atol=0)
    # Far below zero the formula loses digits in fp32.
    clear = y.abs() > 1e-2
    assert (codes == codes_of(y / scale[:, None].double()))[clear].double().mean() > 0.999
    factor, shift = torch.tensor([3.0]), torch.tensor([0.25])
    codes, none = K["npu_gelu_quant"](x, input_scale=factor, input_offset=shift, quant_mode="static", **options)
    assert none is None and (codes == codes_of(y * 3 + 0.25)).double().mean() > 0.999


# ---- casts and quantization


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cast_of_every_value(dtype: torch.dtype) -> None:
    x = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    codes = K["npu_dtype_cast"](x, HIFLOAT8)
    assert torch.equal(codes, codes_of(x))
    every = torch.arange(256, dtype=torch.uint8)
    for to, number in NUMBERS.items():
        back = K["npu_dtype_cast"](every, number, HIFLOAT8)
        assert back.dtype == to and torch.equal(back.double().nan_to_num(), values_of(every).nan_to_num())
    assert torch.equal(K["npu_dtype_cast"](every.view(torch.int8), 6, HIFLOAT8)[:8], values_of(every).float()[:8])


def test_casts_between_torch_dtypes() -> None:
    x = randn(4, 4)
    assert torch.equal(K["npu_dtype_cast"](x, 15), x.bfloat16())
    assert torch.equal(K["_npu_dtype_cast"](x, torch.float16), x.half())
    assert torch.equal(K["npu_dtype_cast_backward"](x.bfloat16(), torch.float32), x.bfloat16().float())
    assert torch.equal(K["_npu_dtype_cast_backward"](x.half(), torch.float32), x.half().float())


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize(dtype: torch.dtype) -> None:
    x = 40 * randn(6, 20, 32, dtype=dtype)
    scale = torch.tensor([0.37]).to(dtype)
    assert torch.equal(K["npu_quantize"](x, scale, None, HIFLOAT8, -1, True), codes_of(x.float() / scale.float()))
    assert torch.equal(K["npu_quantize"](x, scale, None, HIFLOAT8, -1, False), codes_of(x.float() * scale.float()))
    rows = (0.5 + torch.rand(20)).to(dtype)
    right = codes_of(x.float() / rows.float()[:, None] + 1)
    assert torch.equal(K["npu_quantize"](x, rows, torch.ones_like(rows), HIFLOAT8), right)
    if dtype == torch.float32:
        K["npu_quantize"](x, scale.bfloat16(), None, HIFLOAT8)
    far = torch.tensor([1e6, torch.inf, -torch.inf, torch.nan, 32768.0])
    assert K["npu_quantize"](far, torch.ones(1), None, HIFLOAT8, 0).tolist() == [0x6E, 0x6E, 0xEE, 0, 0x6E]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("largest", [15.0, 224.0, 0.0])
@pytest.mark.parametrize(("mode", "dims"), [("pertensor", (0, 1, 2)), ("pertoken", (2,)), ("perchannel", (1,))])
def test_dynamic_quant(mode: str, dims: tuple[int, ...], largest: float, dtype: torch.dtype) -> None:
    x = randn(3, 20, 32, dtype=dtype)
    options: dict[str, Any] = {} if mode == "pertoken" else {"quant_mode": mode}
    codes, scale = K["npu_dynamic_quant"](x, dst_type=HIFLOAT8, dst_type_max=largest, **options)
    right = x.float().abs().amax(dims, keepdim=True) * (1 / torch.tensor(largest or 32768.0))
    assert scale.dtype == torch.float32 and scale.shape == (
        right.shape[:1] if mode == "pertensor" else right.squeeze(dims).shape
    )
    assert torch.equal(scale.flatten(), right.flatten())
    assert torch.equal(codes, codes_of(x.float() / right))


def test_dynamic_quant_of_zeros_and_nan() -> None:
    """The scale tells; the codes are those of NaN, which saturation makes 0."""
    x = torch.ones(3, 8, dtype=torch.bfloat16)
    x[0], x[1, 3] = 0, torch.nan
    codes, scale = K["npu_dynamic_quant"](x, dst_type=HIFLOAT8, dst_type_max=15.0)
    assert scale[0] == 0 and scale[1].isnan() and scale[2] == 1 / torch.tensor(15.0)
    assert codes[:2].eq(0).all() and codes[2].eq(0x2F).all()


# ---- products


def operand(*shape: int, seed: int) -> Tensor:
    return codes_of(2 * randn(*shape, seed=seed))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [(False, True), (True, False), (True, True), (False, False)])
@pytest.mark.parametrize("sizes", [(1, 1), (1, 24), (40, 24)])
def test_quant_matmul(sizes: tuple[int, int], transposed: tuple[bool, bool], dtype: torch.dtype) -> None:
    x1, x2 = operand(24, 64, seed=1), operand(64, 40, seed=2)
    views = [t.t().contiguous().t() if flip else t for t, flip in zip((x1, x2), transposed, strict=True)]
    scale, pertoken = (0.5 + torch.rand(n, generator=torch.Generator().manual_seed(n)) for n in sizes)
    if sizes == (1, 1):  # exact with few bits
        scale, pertoken = torch.tensor([0.75]), torch.tensor([1.125])
    options: dict[str, Any] = {"output_dtype": NUMBERS[dtype], "x1_dtype": HIFLOAT8, "x2_dtype": HIFLOAT8}
    found = K["npu_quant_matmul"](*views, scale, pertoken_scale=pertoken, **options)
    right = values_of(x1) @ values_of(x2) * scale.double() * pertoken.double()[:, None]
    close(found, right, dtype, 2)
    bias = randn(40, seed=3)
    found = K["npu_quant_matmul"](*views, scale, pertoken_scale=pertoken, bias=bias, **options)
    close(found, right + bias.double() * scale.double() * pertoken.double()[:, None], dtype, 2)
    signed = [t.view(torch.int8) for t in views]
    assert torch.equal(K["npu_quant_matmul"](*signed, scale, pertoken_scale=pertoken, bias=bias, **options), found)


def test_two_scales_are_multiplied_in_few_bits() -> None:
    x1, x2, one = operand(24, 64, seed=1), operand(64, 40, seed=2), torch.ones(1)
    options: dict[str, Any] = {"output_dtype": 6, "x1_dtype": HIFLOAT8, "x2_dtype": HIFLOAT8}
    fine = torch.tensor([1 + 2.0**-10 + 2.0**-11])
    right = values_of(x1) @ values_of(x2) * (1 + 2.0**-10)
    close(K["npu_quant_matmul"](x1, x2, one, pertoken_scale=fine, **options), right, torch.float32, 2)
    total, scales = torch.zeros(24, 40), {"x1_scale": fine, "x1_dtype": HIFLOAT8, "x2_dtype": HIFLOAT8}
    close(K["npu_add_quant_matmul_"](total, x1.t().contiguous().t(), x2, one, **scales), right, torch.float32, 2)
    rows = fine.expand(24).contiguous()
    right = values_of(x1) @ values_of(x2) * fine.double()
    close(K["npu_quant_matmul"](x1, x2, one, pertoken_scale=rows, **options), right, torch.float32, 2)


def test_quant_matmul_of_batches() -> None:
    x1, x2 = operand(2, 3, 8, 16, seed=1), operand(16, 4, seed=2)
    options: dict[str, Any] = {"output_dtype": 6, "x1_dtype": HIFLOAT8, "x2_dtype": HIFLOAT8}
    found = K["npu_quant_matmul"](x1, x2, torch.tensor([0.5]), pertoken_scale=torch.arange(8.0), **options)
    close(found, values_of(x1) @ values_of(x2) * 0.5 * torch.arange(8.0).double()[:, None], torch.float32, 2)


def test_add_quant_matmul() -> None:
    gradient, x = operand(64, 24, seed=1), operand(64, 40, seed=2)
    total = randn(24, 40, seed=3)
    right = total.double() + values_of(gradient).t() @ values_of(x) * 0.25 * 3
    scales: dict[str, Any] = {"x1_scale": torch.tensor([0.25]), "x1_dtype": HIFLOAT8, "x2_dtype": HIFLOAT8}
    found = K["npu_add_quant_matmul_"](total, gradient.t(), x, torch.tensor([3.0]), **scales)
    assert found is total
    close(found, right, torch.float32, 2)
