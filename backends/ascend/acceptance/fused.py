"""Norms, rotary embedding and GELU: conventions and accuracy of the vendor's operators."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ospnext.ops.acceptance import Finding, Item, RefusedCallError

from .calls import all_of, equal_to, least, nearest, normal, taken, vendors
from .casts import patterns

RIGHT = "right"
#: Relative, of the rms: fp32 with a few roundings, and results rounded to bf16.
IN_FP32, IN_BF16 = 2.0**-20, 2.0**-8
#: Gradients of weights, fp32 sums over 65 rows: one by one they lose at most 64 half units, 2^-18.
SUMS = 2.0**-18
#: Far from 0, so that it shows where it is added.
EPS = 1e-2


def _turned(x: Tensor, cos: Tensor, sin: Tensor, interleave: bool) -> Tensor:
    x, cos, sin = (t.double() for t in (x, cos, sin))
    if interleave:
        other = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    else:
        first, second = x.chunk(2, -1)
        other = torch.cat((-second, first), -1)
    return x * cos + other * sin


def rotary(device: torch.device) -> Finding:
    """Angles of tokens, [1, S, 1, D]; what becomes of those of tokens of each sample is kept beside the answer."""
    x = normal(2, 77, 3, 64)
    found = {}
    for batch in (1, 2):
        angles = normal(batch, 77, 1, 32, seed=1).repeat_interleave(2, -1)
        cos, sin = angles.cos(), angles.sin()
        ways = {
            RIGHT: _turned(x, cos, sin, True),
            "halves": _turned(x, cos, sin, False),
            "the other way": _turned(x, cos, -sin, True),
        }
        try:
            out = taken(vendors().npu_rotary_mul, *(t.to(device) for t in (x, cos, sin)), "interleave")
        except RefusedCallError as error:
            if batch == 1:
                raise
            return Finding(found[1].answer, {**found[1].details, "[B, S, 1, D]": str(error)})
        found[batch] = nearest(out, ways, IN_FP32)
    return Finding(found[1].answer, {**found[1].details, "[B, S, 1, D]": found[2].answer})


def rotary_angles(device: torch.device) -> Finding:
    """The first of each pair is 1.375, the other 0: the result is 1.375 times the cosine that was multiplied."""
    angles = torch.linspace(0.1, 1.4, 512)[None, :, None, None].expand(-1, -1, -1, 2)
    cos, sin = angles.cos().contiguous(), angles.sin().contiguous()
    x = torch.tensor([1.375, 0.0]).bfloat16().expand(1, 512, 1, 2).contiguous()
    out = taken(vendors().npu_rotary_mul, x.to(device), cos.to(device), sin.to(device), "interleave")[..., 0]
    by = {"kept": (1.375 * cos[..., 0]).bfloat16(), "rounded": (1.375 * cos[..., 0].bfloat16().float()).bfloat16()}
    return equal_to(cos[..., 0], out, by)


def rms_norm(device: torch.device) -> Finding:
    found = {}
    for name, dtype, of_weight in (
        ("fp32", torch.float32, torch.float32),
        ("bf16", torch.bfloat16, torch.bfloat16),
        ("bf16, weight fp32", torch.bfloat16, torch.float32),
    ):
        x, weight, grad = 0.1 * normal(65, 320), normal(320, seed=1), normal(65, 320, seed=2)
        x, weight, grad = x.to(dtype), weight.to(of_weight), grad.to(dtype)
        inside, outside = (_normed(x, weight, eps_inside) for eps_inside in (True, False))
        given = (x.to(device), weight.to(device))
        y, rstd = taken(vendors().npu_rms_norm, *given, EPS)
        near = IN_FP32 if dtype == torch.float32 else IN_BF16
        found[f"y, {name}"] = nearest(y, {RIGHT: inside[0], "epsilon outside the root": outside[0]}, near)
        found[f"rstd, {name}"] = nearest(
            rstd.view(65, 1), {RIGHT: inside[1], "epsilon outside the root": outside[1]}, IN_FP32
        )
        dx, dweight = taken(torch.ops.npu.npu_rms_norm_backward, grad.to(device), *given, rstd.to(device))
        wanted = _gradients(x, weight, grad)
        found[f"dx, {name}"] = nearest(dx, {RIGHT: wanted[0]}, near)
        found[f"dweight, {name}"] = nearest(dweight, {RIGHT: wanted[1]}, _of_weights(dweight))
    return all_of(found)


def _of_weights(found: Tensor) -> float:
    return SUMS if found.dtype == torch.float32 else IN_BF16


def _normed(x: Tensor, weight: Tensor, eps_inside: bool) -> tuple[Tensor, Tensor]:
    mean = x.double().square().mean(-1, keepdim=True)
    rstd = (mean + EPS).rsqrt() if eps_inside else 1 / (mean.sqrt() + EPS)
    return x.double() * rstd * weight.double(), rstd


def _gradients(x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    leaves = [t.double().requires_grad_() for t in (x, weight)]
    y = leaves[0] * (leaves[0].square().mean(-1, keepdim=True) + EPS).rsqrt() * leaves[1]
    return torch.autograd.grad(y, leaves, grad.double())


def layer_norm(device: torch.device) -> Finding:
    x, grad = (normal(65, 320, seed=seed, dtype=torch.bfloat16) for seed in (0, 2))
    weight, bias = normal(320, seed=3), normal(320, seed=4)
    given = [t.to(device) for t in (x, weight, bias)]
    y, mean, rstd = taken(torch.native_layer_norm, given[0], (320,), given[1], given[2], EPS)
    leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
    wanted = torch.nn.functional.layer_norm(leaves[0], (320,), leaves[1], leaves[2], EPS)
    found = {"y": nearest(y, {RIGHT: wanted.detach()}, IN_BF16)}
    if (mean.dtype, rstd.dtype) != (torch.float32, torch.float32):
        return Finding(f"statistics are {mean.dtype} and {rstd.dtype}", dict(found["y"].details))
    dx, dweight, _ = taken(
        torch.ops.aten.native_layer_norm_backward, grad.to(device), given[0], [320], mean.to(device), rstd.to(device),
        given[1], given[2], [True, True, False],
    )  # fmt: skip
    of_x, of_weight, _ = torch.autograd.grad(wanted, leaves, grad.double())
    found["dx"] = nearest(dx, {RIGHT: of_x}, IN_BF16)
    found["dweight"] = nearest(dweight, {RIGHT: of_weight}, _of_weights(dweight))
    return all_of(found)


def gelu(device: torch.device) -> Finding:
    """Which formula, in fp32, since bf16 hardly tells them apart; then every bf16 number up to 16."""
    npu, found = vendors(), {}
    x = torch.linspace(-6, 6, 4097)
    # Between what fp32 leaves (2^-22) and half of what lies between the formulas (2^-13.6).
    found["fp32"] = nearest(taken(npu.npu_gelu, x.to(device), approximate="tanh"), _gelu(x), 2.0**-16)
    x = patterns(torch.bfloat16)
    x = x[x.isfinite() & (x.abs() <= 16)]
    out = taken(npu.npu_gelu, x.to(device), approximate="tanh").double()
    # Small results of large negative x do not show in an rms, and a kernel may stop early.
    worst = {words: float(((out - y).abs() / (y.abs() + 2.0**-10)).max()) for words, y in _gelu(x).items()}
    # A rounding to bf16 is 2^-8, and the formulas are up to 2^-3 apart.
    found["bf16"] = least("largest error over |y| + 2^-10", worst, 2.0**-7)
    return all_of(found)


def _gelu(x: Tensor) -> dict[str, Tensor]:
    return {
        words: torch.nn.functional.gelu(x.double(), approximate=how)
        for words, how in (("tanh", "tanh"), ("erf", "none"))
    }


def items() -> Iterator[Item]:
    yield Item(
        id="rotary/interleave",
        question="Does mode 'interleave' turn pairs (2i, 2i + 1) in fp32, with angles [1, S, 1, D]?",
        why="ascend.npu, fused.rope and fused.rms_norm_rope: each angle twice in a row. Details say what becomes of "
        "[B, S, 1, D], which is not used",
        calls=("npu_rotary_mul(fp32, cos, sin, 'interleave')",),
        expected={RIGHT: ""},
        otherwise={
            "halves": "fused.py, _rope: the mode has another name",
            "the other way": "fused.py, _rope: hand over -sin",
            "refused": "OSPNEXT_OPS=fused.rope=ascend.torch,fused.rms_norm_rope=ascend.torch",
        },
        unforeseen="OSPNEXT_OPS=fused.rope=ascend.torch,fused.rms_norm_rope=ascend.torch",
        ask=rotary,
    )
    yield Item(
        id="rotary/angles",
        question="With x in bf16 and angles in fp32, are the angles rounded to bf16 first?",
        why="ascend.npu calls the operator in fp32, which costs a pass, since torch_npu casts them",
        calls=("npu_rotary_mul(bf16, fp32 cos, fp32 sin, 'interleave')",),
        expected={"rounded": "", "kept": "fused.py, _rope: x may stay in bf16", "refused": ""},
        otherwise={},
        unforeseen="none: it is called in fp32",
        ask=rotary_angles,
    )
    yield Item(
        id="rms_norm/convention",
        question="Is epsilon inside the root, rstd 1 / root in fp32, and an fp32 weight taken with bf16 x, both ways?",
        why="ascend.npu, fused.rms_norm and fused.rms_norm_rope",
        calls=("npu_rms_norm", "npu_rms_norm_backward"),
        expected={RIGHT: ""},
        otherwise={"refused": "fused.py, _gamma: widen x where the weight is fp32, and round the result"},
        unforeseen="OSPNEXT_OPS=fused.rms_norm=ascend.torch,fused.rms_norm_rope=ascend.torch",
        ask=rms_norm,
    )
    yield Item(
        id="layer_norm/fp32-weight",
        question="Is layer norm of bf16 with a weight and bias in fp32 taken and right, with its gradient?",
        why="ascend.npu, fused.layer_norm_modulate: the modulation is folded into weight and bias",
        calls=("aten::native_layer_norm", "aten::native_layer_norm_backward"),
        expected={RIGHT: ""},
        otherwise={
            "refused": "fused.py, _layer_norm: widen x; OSPNEXT_OPS=fused.layer_norm_modulate=ascend.torch until then"
        },
        unforeseen="OSPNEXT_OPS=fused.layer_norm_modulate=ascend.torch",
        ask=layer_norm,
    )
    yield Item(
        id="gelu/tanh",
        question="Is npu_gelu with approximate='tanh' the tanh formula, in fp32 and for every bf16 number up to 16?",
        why="ascend.npu, fused.gelu_tanh",
        calls=("npu_gelu(x, approximate='tanh')",),
        expected={"tanh": ""},
        otherwise={"erf": "OSPNEXT_OPS=fused.gelu_tanh=ascend.torch, and take it out of manifest_numeric.py"},
        unforeseen="OSPNEXT_OPS=fused.gelu_tanh=ascend.torch",
        ask=gelu,
    )
