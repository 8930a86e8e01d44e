"""What attention on Ascend does that no check of the suite looks at, found in a process that has the host NPU. Prints
one JSON object of what was found; test_ascend_attention.py says what it must be.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch_npu
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ospnext.backends.ascend.attention.fusion import fusion
from ospnext.backends.ascend.attention.infer import infer
from ospnext.backends.ascend.attention.infer_hif8 import infer_hif8
from ospnext.backends.ascend.attention.packs import Pack, Side
from ospnext.backends.ascend.attention.sdpa import sdpa
from ospnext.backends.reference.attention import math

NPU = torch.device("npu")
DENSE = {"cu_seqlens_q": None, "cu_seqlens_kv": None, "max_seqlen_q": 0, "max_seqlen_kv": 0, "scale": 0.1}
HIF8 = {"scale_max": 15.0, "scale_mode": "amax", "amax": None}


def tensors(dtype: torch.dtype = torch.bfloat16, batch: int = 2, q_len: int = 37, kv_len: int = 53) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, q_len, 2, 64), (batch, kv_len, 2, 64), (batch, kv_len, 2, 64), (batch, q_len, 2, 64)]
    return [torch.randn(shape, generator=generator).to(dtype).to(NPU) for shape in shapes]


def strided(t: Tensor) -> dict[str, Tensor]:
    """The same numbers, laid out otherwise."""
    apart = t.new_empty((*t.shape[:-1], 3 * t.shape[-1])).zero_()
    apart[..., ::3] = t
    return {
        "heads first": t.transpose(1, 2).contiguous().transpose(1, 2),
        "every third channel": apart[..., ::3],
        "behind another": torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
    }


def any_strides() -> Iterator[str]:
    """Forward passes whose result depends on strides. No case of the suite has strides and no gradient."""
    q, k, v, _ = tensors()
    kernels: dict[str, Callable[..., Any]] = {
        "infer": lambda *t: infer.forward(*t, key_mask=None, need_lse=True, **DENSE)[0],
        "sdpa": lambda *t: sdpa.forward(*t, key_mask=None, need_lse=False, **DENSE)[0],
        "infer_hif8": lambda *t: infer_hif8.forward(*t, **DENSE, **HIF8),
    }
    for name, kernel in kernels.items():
        expected = kernel(q, k, v)
        for layout in strided(q):
            found = kernel(*(strided(t)[layout] for t in (q, k, v)))
            if not torch.equal(found, expected) or not found.is_contiguous():
                yield f"{name}: {layout}"


class Spy(TorchDispatchMode):
    """Keeps the arguments of npu_fusion_attention."""

    def __torch_dispatch__(self, op, types, arguments=(), named=None):
        if op is torch.ops.npu.npu_fusion_attention.default:
            given = zip((a.name for a in op._schema.arguments), arguments, strict=False)
            self.seen = {**dict(given), **(named or {})}
        return op(*arguments, **(named or {}))


def masks_seen() -> dict[str, dict[str, Any]]:
    """What the operator is given for a key mask, by its own call and through PyTorch's function."""
    q, k, v, _ = tensors()
    key_mask = torch.ones(2, 53, dtype=torch.bool, device=NPU)
    key_mask[1, 40:] = False
    found = {}
    for name, kernel in (("fusion", fusion), ("sdpa", sdpa)):
        with Spy() as spy:
            kernel.forward(q, k, v, key_mask=key_mask, need_lse=False, **DENSE)
        mask = spy.seen["atten_mask"]
        left_out = [int(n) for n in mask.reshape(2, -1, 53)[:, 0].sum(-1).tolist()]
        found[name] = {"shape": list(mask.shape), "dtype": str(mask.dtype), "left_out": left_out}
    return found


def gradient_of_another() -> float:
    """How far the gradient from the forward of the formula is from that of the formula itself."""
    q, k, v, grad = tensors(torch.float32)
    named = {"key_mask": None, **DENSE}
    out, lse = math.forward(q, k, v, need_lse=True, **named)
    found = fusion.backward(grad, q, k, v, out, lse, **named)
    expected = math.backward(grad, q, k, v, out, lse, **named)
    return max((a - b).abs().max().item() for a, b in zip(found, expected, strict=True))


def too_many_tokens() -> str:
    many = Pack(Side((slice(0, 600_000), slice(600_000, 1_200_000)), 1_200_000), Side((slice(0, 5), slice(5, 9)), 9))
    try:
        fusion.pack_arguments(many)
    except ValueError as error:
        return str(error)
    return ""


def fakes() -> dict[str, list[Any]]:
    """Of npu_quant_fusion_attention: what the wheel says of its result, and what we say."""
    codes = torch.empty(1, 7200, 40, 128, dtype=torch.uint8, device="meta")
    scales = {f"d_scale_{name}": torch.empty(1, 40, 57, 1, device="meta") for name in "qkv"}

    def ask() -> list[Any]:
        try:
            out, largest, *_ = torch_npu.npu_quant_fusion_attention(
                codes, codes, codes, 40, "BSND", **scales, query_dtype=torch_npu.hifloat8
            )
        except NameError as error:
            return [type(error).__name__]
        return [str(out.dtype), list(out.shape), list(largest.shape)]

    of_wheel = ask()
    from ospnext.backends.ascend.attention import quant_fusion  # noqa: F401

    return {"wheel": of_wheel, "ours": ask()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(
        json.dumps(
            {
                "strides": list(any_strides()),
                "masks": masks_seen(),
                "gradient": gradient_of_another(),
                "tokens": too_many_tokens(),
                "fakes": fakes(),
            }
        )
    )
