"""Products of HiFloat8 codes by npu_quant_matmul, and of bf16 numbers with a result in fp32."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ospnext.numerics import hif8
from ospnext.ops.acceptance import Finding, Item

from .calls import all_of, equal_to, nearest, taken, vendors

FP32 = "in fp32"
CUT = "cut off to 19 bits"
RIGHT = "exact"
QDQ = "OSPNEXT_OPS=quantized_linear=ascend.qdq"
#: Tokens of a video of 720p, more than the operator's page allows in "the last dimension of x1".
TOKENS = 75_600
#: fp32 rounds three times here: the factors of a scale, and the result.
_ROUNDED = 2.0**-22


def codes(*shape: int, seed: int) -> Tensor:
    """Codes of integers from -15 to 15."""
    return hif8.encode(torch.randint(-15, 16, shape, generator=torch.Generator().manual_seed(seed)).float())


def exact(a: Tensor, b: Tensor) -> Tensor:
    """The product of codes in fp64."""
    return hif8.decode(a, torch.float64) @ hif8.decode(b, torch.float64)


def multiply(device: torch.device, a: Tensor, b: Tensor, of_a: Tensor, of_b: Tensor, **named: Any) -> Tensor:
    npu = vendors()
    a, b, of_a, of_b = (t.to(device) for t in (a, b, of_a, of_b))
    settings = {"output_dtype": torch.float32, "x1_dtype": npu.hifloat8, "x2_dtype": npu.hifloat8}
    return taken(npu.npu_quant_matmul, a, b, of_b, pertoken_scale=of_a, **settings, **named)


def _scales(n: int, seed: int) -> Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed)) + 0.5


def _cut(scale: Tensor) -> Tensor:
    return (scale.view(torch.int32) & ~0x1FFF).view(torch.float32)


def one_scale_each(device: torch.device) -> Finding:
    a, b = codes(32, 64, seed=1), codes(64, 48, seed=2)
    found = {}
    for seed in range(4):
        of_a, of_b = _scales(1, seed), _scales(1, seed + 10)
        both = of_a * of_b
        by = {FP32: exact(a, b) * both.double(), CUT: exact(a, b) * _cut(both).double()}
        found[str(seed)] = nearest(multiply(device, a, b, of_a, of_b), by, _ROUNDED)
    return all_of(found)


def row_and_column(device: torch.device) -> Finding:
    a, b = codes(32, 64, seed=1), codes(64, 48, seed=2)
    of_a, of_b = _scales(32, 3), _scales(48, 4)
    both = of_a[:, None] * of_b
    by = {FP32: exact(a, b) * both.double(), CUT: exact(a, b) * _cut(both).double()}
    return nearest(multiply(device, a, b, of_a, of_b), by, _ROUNDED)


def single_rows(device: torch.device) -> Finding:
    found = {}
    for name, (rows, columns) in {"1 row": (1, 48), "1 column": (48, 1), "1 element": (1, 1)}.items():
        a, b = codes(rows, 64, seed=1), codes(64, columns, seed=2)
        out = multiply(device, a, b, torch.ones(rows), torch.ones(columns))
        found[name] = equal_to(out, out, {RIGHT: exact(a, b).float()})
    return all_of(found)


def bias(device: torch.device) -> Finding:
    a, b = codes(32, 64, seed=1), codes(64, 48, seed=2)
    of_a, of_b, added = _scales(32, 3) / 4, _scales(48, 4) / 4, 100 * _scales(48, 5)
    out = multiply(device, a, b, of_a, of_b, bias=added.to(device))
    scale = (of_a[:, None] * of_b).double()
    by = {"before the scales": (exact(a, b) + added) * scale, "after the scales": exact(a, b) * scale + added}
    return nearest(out, by, 2.0**-20)


def transposed(device: torch.device) -> Finding:
    a, b = codes(32, 64, seed=1), codes(64, 48, seed=2)
    views = {
        "x1": (a.T.contiguous().to(device).T, b.to(device)),
        "x2": (a.to(device), b.T.contiguous().to(device).T),
        "both": (a.T.contiguous().to(device).T, b.T.contiguous().to(device).T),
    }
    wanted, found = exact(a, b).float(), {}
    for name, operands in views.items():
        out = multiply(device, *operands, torch.ones(32), torch.ones(48))
        found[name] = equal_to(out, out, {RIGHT: wanted})
    return all_of(found)


def many_tokens(device: torch.device) -> Finding:
    """A gradient of a weight: both factors are transposed views over tokens. Sums need all 24 bits of fp32."""
    grad, x = codes(TOKENS, 16, seed=1), codes(TOKENS, 32, seed=2)
    grad[:, 0], x[:, 0] = hif8.encode(torch.full((2, TOKENS), 14.0))
    grad[0, 0] = x[0, 0] = hif8.encode(torch.tensor(13.0))
    out = multiply(device, grad.to(device).T, x.to(device), torch.ones(16), torch.ones(32))
    return equal_to(out, out, {RIGHT: exact(grad.T, x).float()})


def not_finite(device: torch.device) -> Finding:
    a, b = codes(4, 64, seed=1), codes(64, 48, seed=2)
    b[b == hif8.ZERO] = hif8.encode(torch.tensor(1.0))  # Inf times 0 would be NaN
    a[0, 3], a[1, 5], a[2, 7] = hif8.NAN, hif8.INF, hif8.NEGATIVE_INF
    of_a = torch.tensor([1.0, 1.0, 1.0, torch.nan])
    out = multiply(device, a, b, of_a, torch.ones(48))
    wanted = (hif8.decode(a) @ hif8.decode(b)) * of_a[:, None]
    return equal_to(wanted, out, {"stay": wanted})


def mm_in_bf16(device: torch.device) -> Finding:
    """An odd sum of nearly 2^24: it needs all bits of fp32."""
    grad, x = (hif8.decode(codes(TOKENS, n, seed=n), torch.bfloat16) for n in (16, 32))
    grad[:, 0], x[:, 0] = 14, 14
    grad[0, 0] = x[0, 0] = 13
    out = taken(torch.mm, grad.T.contiguous().to(device), x.to(device), out_dtype=torch.float32)
    sums = grad.double().T @ x.double()
    return equal_to(sums.float(), out, {RIGHT: sums.float(), "rounded to bf16": sums.bfloat16().float()})


def items_of_950() -> Iterator[Item]:
    call = "npu_quant_matmul(codes, codes, scale, pertoken_scale=..., x1_dtype=290, x2_dtype=290)"
    yield Item(
        id="quant_matmul/one-scale-each",
        question="With one scale for each factor ([1] and [1]), is their product taken in fp32 or cut off to 19 bits?",
        why="ascend.hif8 expands scales to rows and columns, which costs two small tensors, since sources of CANN cut",
        calls=(call,),
        expected={CUT: "", FP32: "quantized_linear.py, _of_codes: scales need not be expanded"},
        otherwise={},
        unforeseen="none: this form is not used; note it in docs/ascend.md",
        ask=one_scale_each,
    )
    yield Item(
        id="quant_matmul/row-and-column",
        question="With a scale for each row and column ([M] and [N]), are sums multiplied in fp32?",
        why="ascend.hif8 uses this form for everything",
        calls=(call,),
        expected={FP32: ""},
        otherwise={
            CUT: "quantized_linear.py, _of_codes: multiply with scales of 1 and scale outside, as for one element"
        },
        unforeseen=f"{QDQ}, and read the distances in the details",
        ask=row_and_column,
    )
    yield Item(
        id="quant_matmul/single-rows",
        question="Are one row, one column and one element taken?",
        why="ascend.hif8: a single token is one row, and torch_npu's page asks for more where scales are [1] and [1]",
        calls=(call,),
        expected={RIGHT: ""},
        otherwise={"refused": "quantized_linear.py, _of_codes: append a row of zeros where there is one"},
        unforeseen=f"predicates_numeric.py, hif8_matmul: refuse a single token; until then {QDQ}",
        ask=single_rows,
    )
    yield Item(
        id="quant_matmul/bias",
        question="Is the bias added before or after the scales?",
        why="pages of CANN say before until July 2026, and after since; ascend.hif8 adds it outside, right with both",
        calls=(f"{call[:-1]}, bias=...)",),
        expected={
            "before the scales": "",
            "after the scales": "quantized_linear.py, forward: the operator may add it, which saves a pass",
        },
        otherwise={},
        unforeseen="none: it is added outside",
        ask=bias,
    )
    yield Item(
        id="quant_matmul/transposed-views",
        question="Are transposed views of codes multiplied as they are?",
        why="ascend.hif8: weight.T in the forward pass, grad.T in the gradient of the weight",
        calls=(call,),
        expected={RIGHT: ""},
        otherwise={"refused": "quantized_linear.py, _dense: copy every operand that is not contiguous"},
        unforeseen=f"quantized_linear.py, _dense: copy every operand that is not contiguous; until then {QDQ}",
        ask=transposed,
    )
    yield Item(
        id="quant_matmul/many-tokens",
        question=f"Is the gradient of a weight over {TOKENS:,} tokens taken, and is it summed in fp32?",
        why="ascend.hif8 in training: torch_npu's page limits the last dimension of x1 to 65,535, and CANN's says that "
        "this means features where x1 is transposed; the sums need all 24 bits",
        calls=(call,),
        expected={RIGHT: ""},
        otherwise={
            "refused": "quantized_linear.py, backward: add up products over at most 65,535 tokens; until then "
            f"{QDQ} in training"
        },
        unforeseen=f"sums have fewer bits than fp32: {QDQ} in training",
        ask=many_tokens,
        seconds=10,
    )
    yield Item(
        id="quant_matmul/not-finite",
        question="Do codes of NaN and Inf, and a scale of NaN, stay NaN and Inf in the result?",
        why="ascend.hif8: a NaN anywhere in x must show in the result, as the contract says",
        calls=(call,),
        expected={"stay": ""},
        otherwise={},
        unforeseen="quantized_linear.py, _of_codes: fill rows and columns whose scale is NaN; say in docs/ascend.md "
        f"which codes are lost; {QDQ} keeps them",
        ask=not_finite,
    )


def items() -> Iterator[Item]:
    yield Item(
        id="mm/fp32-result",
        question="Does torch.mm of bf16 with out_dtype=torch.float32 sum in fp32 and return the sums unrounded?",
        why="ascend.qdq, the HiF8 linear of 910B and 910C, and the second choice on a 950",
        calls=("aten::mm.dtype",),
        expected={RIGHT: ""},
        otherwise={
            "rounded to bf16": "quantized_linear.py, _of_values: widen both factors to fp32 first; "
            "OSPNEXT_OPS=quantized_linear=ascend.torch until then",
            "refused": "quantized_linear.py, _of_values: widen both factors to fp32 first; "
            "OSPNEXT_OPS=quantized_linear=ascend.torch until then",
        },
        unforeseen="sums have fewer bits than fp32: OSPNEXT_OPS=quantized_linear=ascend.torch",
        ask=mm_in_bf16,
        seconds=10,
    )
