"""The vendor's autograd formulas on the host NPU: their names, and gradients through the emulated kernels against fp64
on the CPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch_npu_calls import HIFLOAT8
from torch_npu_checks import OLD_SOC, check


def register() -> None:
    for layout in ("BSND", "BNSD", "BSH", "TND"):
        for masked in (False, True):
            if not (masked and layout == "TND"):
                name = f"autograd attention {layout}{' masked' if masked else ''}"
                check(name)(functools.partial(attention_gradients, layout, masked))
    check("autograd rms_norm")(rms_norm_gradients)
    for mode in ("half", "interleave"):
        check(f"autograd rotary_mul {mode}")(functools.partial(rotary_gradients, mode))
    check("autograd gelu")(gelu_gradients)
    check("autograd add_layer_norm")(add_layer_norm_gradients)
    check("autograd dtype_cast")(cast_gradient)
    for layout in ("BSND", "TND"):
        check(f"gradient by logsumexp {layout}")(functools.partial(logsumexp_serves, layout))
    check("no autograd formula for what is quantized")(no_formula)
    check("HiFloat8 casts refuse what requires a gradient")(cast_to_codes_refuses)
    check("autocast is fp16 unless told otherwise")(autocast_dtype)
    check("attention v3 is not of this NPU")(v3_is_refused)
    for soc in ({"soc": OLD_SOC}, {}):
        for masked in (False, True):
            check(f"autograd SDPA{' masked' if masked else ''}", **soc)(functools.partial(sdpa_gradients, masked))
    check("HiFloat8 is not of this NPU", OLD_SOC)(hifloat8_is_refused)
    check("autograd attention BSND", OLD_SOC)(functools.partial(attention_gradients, "BSND", True))


def leaves(*shapes: tuple[int, ...], seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """fp32 on the device, and the same in fp64 on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(shape, generator=generator) for shape in shapes]
    return [v.to("npu").requires_grad_() for v in values], [v.double().requires_grad_() for v in values]


def agree(out: Tensor, right: Tensor, ours: list[Tensor], theirs: list[Tensor], formula: str) -> None:
    """Result and gradients agree within fp32, and `formula` is the vendor's node in the graph."""
    assert type(out.grad_fn).__name__ == formula, type(out.grad_fn).__name__
    weights = torch.randn(right.shape, generator=torch.Generator().manual_seed(9))
    torch.testing.assert_close(out.detach().cpu().double(), right.detach(), rtol=1e-5, atol=1e-5)
    (out * weights.to("npu")).sum().backward()
    (right * weights.double()).sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        assert a.grad is not None and b.grad is not None
        torch.testing.assert_close(a.grad.cpu().double(), b.grad, rtol=1e-5, atol=1e-5)


SIZES = {"BSND": (2, 24, 3, 16), "BNSD": (2, 3, 24, 16), "BSH": (2, 24, 48), "TND": (48, 3, 16)}


def heads_second(x: Tensor, layout: str) -> Tensor:
    """[B, N, S, D]; the two packed sequences are equally long."""
    if layout == "BNSD":
        return x
    if layout == "BSH":
        x = x.unflatten(-1, (3, 16))
    return (x.unflatten(0, (2, -1)) if layout == "TND" else x).transpose(1, 2)


def back(x_BNSD: Tensor, layout: str) -> Tensor:
    if layout == "BNSD":
        return x_BNSD
    x = x_BNSD.transpose(1, 2)
    return x.flatten(0, 1) if layout == "TND" else x.flatten(2) if layout == "BSH" else x


def attention_gradients(layout: str, masked: bool) -> None:
    ours, theirs = leaves(*(SIZES[layout],) * 3)
    named: dict[str, Any] = {"scale": 0.2}
    keep = None
    if masked:
        # All but the last five keys, in both senses of a mask.
        keep = (torch.arange(24) < 19).expand(2, 1, 24, 24)
        named |= {"atten_mask": (~keep).contiguous().to("npu"), "sparse_mode": 1}
    if layout == "TND":
        named |= {"actual_seq_qlen": [24, 48], "actual_seq_kvlen": [24, 48]}
    out = torch.ops.npu.npu_fusion_attention(*ours, 3, layout, **named)[0]
    q, k, v = (heads_second(t, layout) for t in theirs)
    right = back(functional.scaled_dot_product_attention(q, k, v, attn_mask=keep, scale=0.2), layout)
    agree(out, right, ours, theirs, "NpuFusionAttentionBackward0")


def sdpa_gradients(masked: bool) -> None:
    """torch's own operator becomes the vendor's, by another of its forms before 950."""
    ours, theirs = leaves(*((2, 3, 24, 16),) * 3)
    keep = (torch.arange(24) < 19).expand(2, 1, 24, 24).contiguous() if masked else None
    sdpa = functional.scaled_dot_product_attention
    out = sdpa(*ours, attn_mask=None if keep is None else keep.to("npu"), scale=0.2)
    right = sdpa(*theirs, attn_mask=keep, scale=0.2)
    third = "" if torch.npu.get_device_name().startswith("Ascend950") else "V3"
    agree(out, right, ours, theirs, f"NpuFusionAttention{third}Backward0")


def rms_norm_gradients() -> None:
    ours, theirs = leaves((4, 5, 32), (32,))
    out = torch.ops.npu.npu_rms_norm(*ours, 1e-3)[0]
    agree(out, functional.rms_norm(theirs[0], (32,), theirs[1], 1e-3), ours, theirs, "NpuRmsNormBackward0")


def rotary_gradients(mode: str) -> None:
    ours, theirs = leaves((2, 5, 3, 16), (1, 5, 1, 16), (1, 5, 1, 16))
    x, cos, sin = theirs
    if mode == "half":
        turned = torch.cat((-x[..., 8:], x[..., :8]), -1)
    else:
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    out = torch.ops.npu.npu_rotary_mul(*ours, mode)
    agree(out, x * cos + turned * sin, ours, theirs, "NpuRotaryMulBackward0")


def gelu_gradients() -> None:
    ours, theirs = leaves((20, 30))
    out = torch.ops.npu.npu_gelu(*ours, approximate="tanh")
    agree(out, functional.gelu(theirs[0], approximate="tanh"), ours, theirs, "NpuGeluBackward0")


def add_layer_norm_gradients() -> None:
    ours, theirs = leaves((4, 5, 32), (4, 5, 32), (32,), (32,))
    out = torch.ops.npu.npu_add_layer_norm(*ours, 1e-3)[0]
    right = functional.layer_norm(theirs[0] + theirs[1], (32,), theirs[2], theirs[3], 1e-3)
    agree(out, right, ours, theirs, "NpuAddLayerNormBackward0")


def cast_gradient() -> None:
    x = torch.randn(4, 8).to("npu").requires_grad_()
    out = torch.ops.npu.npu_dtype_cast(x, torch.bfloat16)
    assert out.dtype == torch.bfloat16 and type(out.grad_fn).__name__ == "NpuDtypeCastBackward0"
    out.sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32 and bool((x.grad == 1).all())


def logsumexp_serves(layout: str) -> None:
    """The gradient from the logsumexp and a sum of 1 is that from the forward's own two statistics."""
    tensors = [torch.randn(SIZES[layout], generator=torch.Generator().manual_seed(i)).to("npu") for i in range(4)]
    q, k, v, dy = (t.bfloat16() for t in tensors)
    ends = {"actual_seq_qlen": [24, 48], "actual_seq_kvlen": [24, 48]} if layout == "TND" else {}
    out, largest, total, *_ = torch.ops.npu.npu_fusion_attention(q, k, v, 3, layout, scale=0.2, **ends)
    lse = largest + total.log()
    found = [
        torch.ops.npu.npu_fusion_attention_grad(
            q, k, v, dy, 3, layout, softmax_max=m, softmax_sum=s, attention_in=out, scale_value=0.2, **ends
        )[:3]
        for m, s in ((largest, total), (lse, torch.ones_like(lse)))
    ]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a.cpu(), b.cpu(), rtol=2**-7, atol=1e-6)
        assert float(a.abs().max()) > 0.01


#: Without a formula of the vendor's: a gradient through them has to be our own.
WITHOUT_FORMULA = (
    *("npu_quantize", "npu_dynamic_quant", "npu_quant_matmul", "npu_add_quant_matmul_", "npu_gelu_quant"),
    *("npu_quant_fusion_attention", "npu_fused_infer_attention_score_v2", "npu_layer_norm_eval", "npu_rms_norm_quant"),
)


def no_formula() -> None:
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    with_one = [name for name in WITHOUT_FORMULA if has(f"npu::{name}", "AutogradPrivateUse1")]
    assert with_one == []


def _raises(words: str, call: Callable[[], Any]) -> None:
    try:
        call()
    except Exception as error:
        assert words in str(error), f"other words: {error}"
    else:
        raise AssertionError("not refused any more")


def cast_to_codes_refuses() -> None:
    x = torch.randn(4, 8).to("npu").requires_grad_()
    _raises("Autograd not support dtype: Byte", lambda: torch.ops.npu.npu_dtype_cast(x, HIFLOAT8))
    assert torch.ops.npu.npu_dtype_cast(x.detach(), HIFLOAT8).dtype == torch.uint8


def v3_is_refused() -> None:
    q = torch.randn(1, 8, 2, 16, device="npu")
    _raises("Ascend 950 does not have it", lambda: torch.ops.npu.npu_fusion_attention_v3(q, q, q, 2, "BSND"))


def hifloat8_is_refused() -> None:
    x = torch.randn(4, 8, device="npu", dtype=torch.bfloat16)
    _raises("of Ascend 950 only", lambda: torch.ops.npu.npu_dynamic_quant(x, dst_type=HIFLOAT8, dst_type_max=15.0))


def autocast_dtype() -> None:
    assert torch.get_autocast_dtype("npu") == torch.float16
