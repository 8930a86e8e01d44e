"""npu_fusion_attention and npu_fused_infer_attention_score_v2 on dense bf16 and fp32 tensors: masks, sizes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ospnext.ops.acceptance import Finding, Item

from ..attention.statistics import statistics
from ..masks import INNER_PRECISE, SPARSE_MODE
from . import formulas
from .calls import all_of, nearest, normal, taken, vendors

RIGHT = "right"
MATH = "OSPNEXT_OPS=attention=ascend.math"
#: Relative, of the rms: results in bf16 are off by about 2^-9, and by twice that where probabilities are rounded, too.
IN_BF16 = 2.0**-7
#: Between what fp32 (4e-7) and what products of shortened factors (1e-3) leave.
IN_FP32 = 2.0**-17
#: Relative, of the rms, for a logsumexp of about 5: between what fp32 leaves (2^-20) and what fp16 would (2^-12).
OF_LSE = 2.0**-14
#: No multiples of 16, on both sides of 64 and of 128.
SIZES = (40, 72, 100, 136)
_SIZES = ", ".join(map(str, SIZES))
REPEATS = 12


def tensors(q_len: int, kv_len: int, heads: int = 2, dim: int = 64, batch: int = 2, **more: Any) -> list[Tensor]:
    """q, k, v and a gradient of the result, [B, S, H, D]."""
    shapes = [(batch, n, heads, dim) for n in (q_len, kv_len, kv_len, q_len)]
    return [normal(*shape, seed=seed, **more) for seed, shape in enumerate(shapes)]


def forward(device: torch.device, q: Tensor, k: Tensor, v: Tensor, scale: float, **more: Any) -> tuple[Tensor, ...]:
    """(out, largest logits, sums) of a dense call."""
    operands = (t.to(device) for t in (q, k, v))
    return taken(vendors().npu_fusion_attention, *operands, q.shape[2], "BSND", scale=scale, **more)[:3]


def backward(
    device: torch.device,
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    **more: Any,
) -> tuple[Tensor, ...]:
    """dq, dk, dv from the statistics that ascend.fusion keeps."""
    operands = (t.to(device) for t in (q, k, v, grad))
    largest, total = statistics(lse.float().to(device))
    return taken(
        torch.ops.npu.npu_fusion_attention_grad, *operands, q.shape[2], "BSND", softmax_max=largest, softmax_sum=total,
        attention_in=out.to(device), scale_value=scale, **more,
    )[:3]  # fmt: skip


def mask(device: torch.device) -> Finding:
    """Two samples with other keys each, beyond 512 of them."""
    q, k, v, _ = tensors(65, 700, dtype=torch.bfloat16)
    left_out = torch.zeros(2, 1, 65, 700, dtype=torch.bool)
    left_out[0, :, :, 300:], left_out[1, :, :, :650] = True, True
    out, *_ = forward(
        device, q, k, v, 0.125, atten_mask=left_out.to(device), sparse_mode=SPARSE_MODE, inner_precise=INNER_PRECISE
    )
    by = {
        "left out": formulas.attention(q, k, v, 0.125, left_out)[0],
        "kept": formulas.attention(q, k, v, 0.125, ~left_out)[0],
        "ignored": formulas.attention(q, k, v, 0.125)[0],
        "left out, by the mask of the first sample": formulas.attention(q, k, v, 0.125, left_out[:1])[0],
    }
    return nearest(out, by, IN_BF16)


def keyless(device: torch.device) -> Finding:
    """The second sample has no key: what the forward pass gives, and the gradient with what ascend.fusion hands it."""
    q, k, v, grad = tensors(33, 129, dtype=torch.bfloat16)
    left_out = torch.zeros(2, 1, 33, 129, dtype=torch.bool)
    left_out[1] = True
    modes: dict[str, Any] = {"sparse_mode": SPARSE_MODE, "inner_precise": INNER_PRECISE}
    modes["atten_mask"] = left_out.to(device)
    out, largest, total = forward(device, q, k, v, 0.125, **modes)
    lse = torch.full((2, 2, 33), -torch.inf)
    lse[0] = largest[0, ..., 0] + total[0, ..., 0].log()
    found = backward(device, grad, q, k, v, out.nan_to_num(0.0), lse, 0.125, **modes)
    details = {
        "largest result of the keyless sample": out[1].float().abs().max().item(),
        "its statistics": [largest[1].flatten()[0].item(), total[1].flatten()[0].item()],
        "largest gradient of it": max(t[1].float().abs().max().item() for t in found),
    }
    first = formulas.gradients(grad[:1], q[:1], k[:1], v[:1], 0.125)
    others = all_of(
        {name: nearest(t[:1], {RIGHT: wanted}, IN_BF16) for name, t, wanted in zip("qkv", found, first, strict=True)}
    )
    if others.answer != RIGHT:
        return Finding(f"the gradient of the other sample is not right: {others.answer}", {**details, **others.details})
    zeros = [not bool(out[1].any()), all(not bool(t[1].any()) for t in found)]
    words = {(True, True): "zeros, and no gradient", (False, True): "something else, but no gradient"}
    return Finding(words.get((zeros[0], zeros[1]), "there is a gradient, or it is NaN"), details)


def head_sizes(device: torch.device) -> Finding:
    found = {}
    for dim in SIZES:
        q, k, v, grad = tensors(33, 129, dim=dim, dtype=torch.bfloat16)
        out, largest, total = forward(device, q, k, v, 0.125)
        lse = largest[..., 0] + total[..., 0].log()
        wanted = formulas.gradients(grad, q, k, v, 0.125)
        results = {"out": (out, formulas.attention(q, k, v, 0.125)[0])}
        results |= {
            f"d{name}": pair
            for name, *pair in zip("qkv", backward(device, grad, q, k, v, out, lse, 0.125), wanted, strict=True)
        }
        for name, (one, other) in results.items():
            found[f"{name} of {dim}"] = nearest(one, {RIGHT: other}, IN_BF16)
    return all_of(found)


def head_sizes_of_infer(
    device: torch.device,
    sizes: Sequence[int] = SIZES,
    layouts: Sequence[str] = ("BSND", "TND"),
    dtype: torch.dtype = torch.bfloat16,
) -> Finding:
    found = {}
    for dim in sizes:
        q, k, v, _ = tensors(33, 129, dim=dim, dtype=dtype)
        wanted, largest, total = formulas.attention(q, k, v, 0.125)
        for layout in layouts:
            packed = layout == "TND"
            operands = (t.flatten(0, 1) if packed else t for t in (q, k, v))
            ends = {"actual_seq_qlen": [33, 66], "actual_seq_kvlen": [129, 258]} if packed else {}
            out, lse = taken(
                vendors().npu_fused_infer_attention_score_v2, *(t.to(device) for t in operands), num_query_heads=2,
                num_key_value_heads=2, input_layout=layout, softmax_scale=0.125, return_softmax_lse=True, **ends,
            )  # fmt: skip
            by_head = (largest + total.log()) if not packed else (largest + total.log()).transpose(1, 2)
            found[f"{dim} {layout}"] = nearest(out.view(wanted.shape), {RIGHT: wanted}, IN_BF16)
            found[f"logsumexp {dim} {layout}"] = nearest(lse.view(by_head.shape), {RIGHT: by_head}, OF_LSE)
    return all_of(found)


def packed_head_sizes_of_infer(device: torch.device) -> Finding:
    dtypes = (torch.bfloat16, torch.float16)
    return all_of({str(dtype): head_sizes_of_infer(device, (64, 128), ("TND",), dtype) for dtype in dtypes})


def fp32(device: torch.device) -> Finding:
    q, k, v, grad = tensors(65, 700)
    out, largest, total = forward(device, q, k, v, 0.125)
    lse = largest[..., 0] + total[..., 0].log()
    results = {"out": (out, formulas.attention(q, k, v, 0.125)[0])}
    wanted = formulas.gradients(grad, q, k, v, 0.125)
    results |= {
        f"d{name}": pair
        for name, *pair in zip("qkv", backward(device, grad, q, k, v, out, lse, 0.125), wanted, strict=True)
    }
    return all_of({name: nearest(one, {"fp32": other}, IN_FP32) for name, (one, other) in results.items()})


def every_key(device: torch.device) -> Finding:
    """75,600 keys without a mask: defaults must not limit how far a query sees. Each query looks for one key."""
    generator = torch.Generator().manual_seed(0)
    keys = 75_600
    places = [0, 1, 2047, 2048, 65_535, 65_536, keys - 64, keys - 1]
    k = torch.randn(1, keys, 1, 64, generator=generator)
    q = 24 * torch.nn.functional.normalize(k[:, places], dim=-1)
    v = normal(1, keys, 1, 64, seed=5)
    q, k, v = (t.bfloat16() for t in (q, k, v))
    out, *_ = forward(device, q, k, v, 1.0)
    return nearest(out, {"every key": formulas.attention(q, k, v, 1.0)[0]}, IN_BF16)


def repeated(device: torch.device) -> Finding:
    """Gradients of many rows and keys, with and without the flag that ascend.fusion relies on."""
    q, k, v, grad = tensors(640, 640, batch=1, dtype=torch.bfloat16)
    out, largest, total = forward(device, q, k, v, 0.125)
    lse = largest[..., 0] + total[..., 0].log()
    before, found = torch.are_deterministic_algorithms_enabled(), {}
    try:
        for flag in (True, False):
            torch.use_deterministic_algorithms(flag, warn_only=True)
            first = backward(device, grad, q, k, v, out, lse, 0.125)
            others = (backward(device, grad, q, k, v, out, lse, 0.125) for _ in range(REPEATS - 1))
            found[flag] = sum(not all(a.equal(b) for a, b in zip(first, other, strict=True)) for other in others)
    finally:
        torch.use_deterministic_algorithms(before)
    details = {"with the flag, others than the first": found[True], "without": found[False]}
    return Finding("equal with the flag" if not found[True] else "not equal with the flag", details)


def items() -> Iterator[Item]:
    grad = "npu_fusion_attention_grad"
    yield Item(
        id="fusion/mask",
        question="Does True in atten_mask leave a key out, for each sample by itself, also beyond 512 keys?",
        why="masks.py, for ascend.fusion and ascend.sdpa: [B, 1, Sq, Sk], sparse_mode 1, inner_precise 2",
        calls=("npu_fusion_attention(..., 'BSND', atten_mask=...)",),
        expected={"left out": ""},
        otherwise={
            "kept": "masks.py, left_out: return the mask as it is",
            "ignored": "masks.py: another SPARSE_MODE (0); OSPNEXT_OPS=attention=ascend.math until then",
            "left out, by the mask of the first sample": "fusion.py: a call for each sample, or the pack of kept keys; "
            f"{MATH} until then",
        },
        unforeseen=MATH,
        ask=mask,
    )
    yield Item(
        id="fusion/keyless-rows",
        question="Is a sample of which every key is left out 0, and has no gradient from statistics (largest fp32, 1)?",
        why="ascend.fusion: inner_precise 2 in both passes; it overwrites the result, and hands these statistics back",
        calls=("npu_fusion_attention(..., inner_precise=2)", f"{grad}(..., inner_precise=2)"),
        expected={
            "zeros, and no gradient": "",
            "something else, but no gradient": "",
        },
        otherwise={
            "there is a gradient, or it is NaN": "fusion.py, gradients: fill dq, dk and dv of keyless samples with 0, "
            "as the result is",
        },
        unforeseen=f"predicates.py, fusion: refuse key_mask; {MATH} until then",
        ask=keyless,
    )
    yield Item(
        id="fusion/head-size",
        question=f"Are head sizes {_SIZES}, no multiples of 16, taken and right, with their gradients?",
        why="predicates.py, fusion: pages allow 1 to 768 and say nothing of alignment",
        calls=("npu_fusion_attention(..., 'BSND')", grad),
        expected={RIGHT: ""},
        otherwise={
            "refused": "predicates.py, fusion: want head_dim to be a multiple of 16, with a Refusal 'alignment'"
        },
        unforeseen="predicates.py, fusion: want head_dim to be a multiple of 16, with a Refusal 'alignment'",
        ask=head_sizes,
        seconds=10,
    )
    yield Item(
        id="fusion/fp32",
        question="Is attention of fp32 as accurate as fp32, with its gradients?",
        why="predicates.py: ascend.fusion and ascend.sdpa take fp32, of which the contract asks products in fp32",
        calls=("npu_fusion_attention(..., 'BSND')", grad),
        expected={"fp32": ""},
        otherwise={"refused": f"predicates.py: take fp32 out of fusion and sdpa; {MATH} for fp32 until then"},
        unforeseen=f"products are not fp32: predicates.py, take it out of fusion and sdpa; {MATH} for fp32 until then",
        ask=fp32,
    )
    yield Item(
        id="fusion/every-key",
        question="Does a query see all of 75,600 keys when nothing limits it?",
        why="ascend.fusion leaves pre_tockens and next_tockens at their defaults",
        calls=("npu_fusion_attention(..., 'BSND')",),
        expected={"every key": ""},
        otherwise={},
        unforeseen=f"fusion.py, call: set pre_tockens and next_tockens; {MATH} until then",
        ask=every_key,
    )
    yield Item(
        id="fusion/repeated-gradient",
        question=f"Is the gradient the same {REPEATS} times under torch.use_deterministic_algorithms?",
        why="ascend.fusion declares the feature 'deterministic'; details say what happens without the flag",
        calls=(grad,),
        expected={"equal with the flag": ""},
        otherwise={
            "not equal with the flag": "manifest_attention.py: take 'deterministic' out of what ascend.fusion handles; "
            "OSPNEXT_OPS=attention=ascend.math for deterministic runs until then",
        },
        unforeseen="as for results that are not equal",
        ask=repeated,
    )


def items_of_950() -> Iterator[Item]:
    yield Item(
        id="infer/head-size",
        question=f"Does the operator for inference take head sizes {_SIZES}, dense and packed, and is its logsumexp "
        "[B, H, S, 1] and [T, H, 1]?",
        why="predicates.py, infer: a 950 takes any size up to 512; attention/infer.py reads the logsumexp",
        calls=("npu_fused_infer_attention_score_v2(..., 'BSND' | 'TND', return_softmax_lse=True)",),
        expected={RIGHT: ""},
        otherwise={"refused": "predicates.py, infer: the limits of 910B for 950, too"},
        unforeseen="predicates.py, infer: refuse what is wrong; ascend.fusion comes first in any case",
        ask=head_sizes_of_infer,
        seconds=10,
    )


def items_of_910() -> Iterator[Item]:
    yield Item(
        id="infer/packed-head-size",
        question="Does the operator for inference take packs with head sizes 64 and 128, in bf16 and in fp16?",
        why="predicates.py, infer: torch_npu's page says so, one of CANN says bf16 only, and 128 or 192",
        calls=("npu_fused_infer_attention_score_v2(..., 'TND', return_softmax_lse=True)",),
        expected={RIGHT: ""},
        otherwise={"refused": "predicates.py, infer: in packs bf16 and 128 only"},
        unforeseen="predicates.py, infer: refuse packs before 950; ascend.fusion comes first in any case",
        ask=packed_head_sizes_of_infer,
        seconds=10,
    )
