"""The emulated attention operators against torch's own attention in fp64. They run on CPU tensors; no torch_npu is
needed.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ospnext.conformance.host_npu.operators import attention, attention_v3, infer_attention

forward, backward = attention.npu_fusion_attention, attention.npu_fusion_attention_grad
infer = infer_attention.npu_fused_infer_attention_score_v2
ROUNDING = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def to_layout(x_BNSD: Tensor, layout: str) -> Tensor:
    if layout == "BNSD":
        return x_BNSD.contiguous()
    x = x_BNSD.transpose(1, 2)
    if layout == "BSND":
        return x.contiguous()
    x = x.flatten(2)
    return (x if layout == "BSH" else x.transpose(0, 1)).contiguous()


def from_layout(x: Tensor, layout: str, heads: int) -> Tensor:
    if layout in ("BSH", "SBH"):
        x = (x if layout == "BSH" else x.transpose(0, 1)).unflatten(-1, (heads, -1))
    return x if layout == "BNSD" else x.transpose(1, 2)


def exact(q: Tensor, k: Tensor, v: Tensor, scale: float, masked: Tensor | None, grad: Tensor) -> list[Tensor]:
    """out, dq, dk, dv in fp64 of [B, N, S, D]; torch's mask is True where the key takes part."""
    leaves = [t.double().detach().requires_grad_() for t in (q, k, v)]
    keep = None if masked is None else ~masked.bool()
    groups = q.shape[1] // k.shape[1]
    repeated = [leaves[0], *(t.repeat_interleave(groups, 1) for t in leaves[1:])]
    out = scaled_dot_product_attention(*repeated, attn_mask=keep, scale=scale)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.double())]


def close(found: Tensor, right: Tensor, dtype: torch.dtype, factor: float = 1.0) -> None:
    bound = factor * ROUNDING[dtype] * float(right.abs().max()) + 1e-6
    assert float((found.double() - right).abs().max()) <= bound


MASKS = ("none", "BNSS", "B1SS", "11SS", "SS")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("layout", ["BSND", "BNSD", "BSH", "SBH"])
def test_dense(layout: str, kind: str, dtype: torch.dtype) -> None:
    batch, heads, kv_heads, rows, keys, dim, value_dim = 2, 4, 2, 13, 17, 16, 8
    q, k = (randn(batch, n, s, dim, dtype=dtype, seed=s) for n, s in ((heads, rows), (kv_heads, keys)))
    v = randn(batch, kv_heads, keys, value_dim, dtype=dtype, seed=3)
    grad = randn(batch, heads, rows, value_dim, dtype=dtype, seed=4)
    shapes = {"BNSS": (batch, heads), "B1SS": (batch, 1), "11SS": (1, 1), "SS": ()}
    masked = None
    if kind != "none":
        masked = randn(*shapes[kind], rows, keys, seed=5) > 0.3
        masked[..., 2] = False
    laid_out = [to_layout(t, layout) for t in (q, k, v, grad)]
    mask = None if masked is None else masked.to(torch.uint8 if kind == "SS" else torch.bool)
    out, largest, total, *rest = forward(*laid_out[:3], heads, layout, atten_mask=mask, scale=0.3)
    assert rest[0].shape == (0,) and rest[1:] == [0, 0, batch * heads * rows * keys]
    assert out.dtype == dtype and out.is_contiguous() and out.shape == laid_out[3].shape
    right = exact(q, k, v, 0.3, masked, grad)
    close(from_layout(out, layout, heads), right[0], dtype)
    assert largest.shape == total.shape == (batch, heads, rows, 8) and largest.dtype == torch.float32
    s = q.double() @ k.double().repeat_interleave(2, 1).transpose(-1, -2) * 0.3
    s = s if masked is None else s.masked_fill(masked, -torch.inf)
    torch.testing.assert_close((largest + total.log())[..., 5].double(), s.logsumexp(-1), rtol=1e-5, atol=1e-5)
    # Through fp32 everywhere: only the result is rounded.
    given = {"softmax_max": largest, "softmax_sum": total, "attention_in": out, "atten_mask": mask, "scale_value": 0.3}
    *gradients, of_pse, of_sink = backward(*laid_out, heads, layout, **given)
    assert of_pse is None and of_sink.shape == (0,)
    for found, true, count in zip(gradients, right[1:], (heads, kv_heads, kv_heads), strict=True):
        assert found.dtype == dtype and found.is_contiguous()
        close(from_layout(found, layout, count), true, dtype, factor=4)


PACKS = {
    "uneven": ([5, 1, 9], [7, 2, 4]),
    "single": ([11], [6]),
    "empty": ([3, 0, 4], [5, 0, 2]),
    "keys only": ([3, 0, 4], [5, 6, 2]),
}


@pytest.mark.parametrize("softmax_layout", ["TND", ""])
@pytest.mark.parametrize("pack", PACKS)
def test_packed(pack: str, softmax_layout: str) -> None:
    heads, dim = 3, 16
    lengths = PACKS[pack]
    ends = {"actual_seq_qlen": list(accumulate(lengths[0])), "actual_seq_kvlen": list(accumulate(lengths[1]))}
    rows, keys = (sum(side) for side in lengths)
    q, k, v, grad = (randn(n, heads, dim, seed=i) for i, n in enumerate((rows, keys, keys, rows)))
    layout: dict[str, Any] = {"softmax_layout": softmax_layout}
    out, largest, total, *_ = forward(q, k, v, heads, "TND", scale=0.3, **ends, **layout)
    assert largest.shape == total.shape == (rows, heads, 8)
    given = {"softmax_max": largest, "softmax_sum": total, "attention_in": out, "scale_value": 0.3}
    gradients = backward(q, k, v, grad, heads, "TND", **given, **ends, **layout)[:3]
    starts = [[a - n for a, n in zip(e, n, strict=True)] for e, n in zip(ends.values(), lengths, strict=True)]
    for i, (n, m) in enumerate(zip(*lengths, strict=True)):
        a, b = slice(starts[0][i], starts[0][i] + n), slice(starts[1][i], starts[1][i] + m)
        if n == 0:
            assert float(gradients[1][b].abs().sum() + gradients[2][b].abs().sum()) == 0
            continue
        parts = [t.transpose(0, 1)[None] for t in (q[a], k[b], v[b], grad[a])]
        right = [t[0].transpose(0, 1) for t in exact(*parts[:3], 0.3, None, parts[3])]
        for found, true in zip((out[a], gradients[0][a], gradients[1][b], gradients[2][b]), right, strict=True):
            close(found, true, torch.float32, factor=4)
        s = (parts[0].double() @ parts[1].double().transpose(-1, -2) * 0.3)[0]
        lse = largest + total.log()
        if softmax_layout == "TND":
            found_NS = lse[a, :, 0].t()
        else:  # a block [N, S] for each sequence
            flat = lse.reshape(-1, 8)[a.start * heads : a.stop * heads, 0]
            found_NS = flat.view(heads, n)
        torch.testing.assert_close(found_NS.double(), s.logsumexp(-1), rtol=1e-5, atol=1e-5)


def test_tokens_of_no_sequence_are_not_written() -> None:
    q, k = randn(9, 2, 16), randn(12, 2, 16, seed=1)
    ends = {"actual_seq_qlen": [4, 6, 0, 0], "actual_seq_kvlen": [5, 9, 0, 0]}
    out, largest, total, *_ = forward(q, k, k, 2, "TND", scale=0.3, softmax_layout="TND", **ends)
    assert not out[:6].isnan().any() and out[6:].isnan().all() and largest[6:].isnan().all()
    clean = [t.nan_to_num() for t in (out, largest, total)]
    given = dict(zip(("attention_in", "softmax_max", "softmax_sum"), clean, strict=True))
    dq, dk, dv, *_ = backward(q, k, k, q, 2, "TND", scale_value=0.3, softmax_layout="TND", **given, **ends)
    assert not dq[6:].any() and not dk[9:].any() and not dv[9:].any() and dq[:6].any()


@pytest.mark.parametrize("shape", [(1, 12, 20000, 1, 64), (1, 700, 900, 3, 64)])
def test_in_blocks(shape: tuple[int, ...]) -> None:
    """Long enough for several blocks of rows, and of heads."""
    batch, rows, keys, heads, dim = shape
    q, k, v, grad = (randn(batch, heads, s, dim, seed=i) for i, s in enumerate((rows, keys, keys, rows)))
    masked = randn(rows, keys, seed=7) > 1
    out, largest, total, *_ = forward(q, k, v, heads, "BNSD", atten_mask=masked, scale=0.125, sparse_mode=1)
    right = exact(q, k, v, 0.125, masked, grad)
    close(out, right[0], torch.float32, factor=4)
    given = {"softmax_max": largest, "softmax_sum": total, "attention_in": out, "atten_mask": masked}
    found = backward(q, k, v, grad, heads, "BNSD", scale_value=0.125, sparse_mode=1, **given)[:3]
    for a, b in zip(found, right[1:], strict=True):
        close(a, b, torch.float32, factor=8)


@pytest.mark.parametrize("sizes", [(9, 9), (6, 11), (11, 6)])
@pytest.mark.parametrize("mode", [2, 3, 4])
def test_compressed_masks(mode: int, sizes: tuple[int, int]) -> None:
    rows, keys = sizes
    q, k, v, grad = (randn(2, 2, s, 16, seed=i) for i, s in enumerate((rows, keys, keys, rows)))
    i, j = torch.arange(rows)[:, None], torch.arange(keys)[None]
    shift = 0 if mode == 2 else keys - rows
    masked = j > i + shift + (1 if mode == 4 else 0)
    if mode == 4:
        masked |= j < i + shift - 3
    triangle = torch.ones(2048, 2048, dtype=torch.bool).triu(1)
    limits = {"pre_tockens": 3, "next_tockens": 1} if mode == 4 else {}
    out, *_ = forward(q, k, v, 2, "BNSD", atten_mask=triangle, scale=0.3, sparse_mode=mode, **limits)
    alive = ~masked.all(-1)
    close(out[:, :, alive], exact(q, k, v, 0.3, masked, grad)[0][:, :, alive], torch.float32)
    assert not out[:, :, ~alive].any()


def test_without_a_mask_the_mode_is_ignored() -> None:
    """Documented, and the reason why a forgotten mask goes unnoticed."""
    q = randn(1, 2, 9, 16)
    plain = forward(q, q, q, 2, "BNSD", scale=0.3)[0]
    causal = forward(q, q, q, 2, "BNSD", scale=0.3, sparse_mode=2, next_tockens=0)[0]
    assert torch.equal(plain, causal)


def test_rows_without_keys() -> None:
    q, k, v = randn(1, 1, 4, 16), randn(1, 1, 6, 16, seed=1), randn(1, 1, 6, 16, seed=2)
    masked = torch.zeros(4, 6, dtype=torch.bool)
    masked[1] = True
    average = forward(q, k, v, 1, "BNSD", atten_mask=masked, scale=0.3)[0][0, 0, 1]
    torch.testing.assert_close(average, v[0, 0].mean(0))
    options: dict[str, Any] = {"atten_mask": masked, "inner_precise": 2}
    out, largest, total, *_ = forward(q, k, v, 1, "BNSD", scale=0.3, **options)
    assert not out[0, 0, 1].any()
    assert largest[0, 0, 1, 0] == torch.finfo(torch.float32).min and total[0, 0, 1, 0] == torch.finfo(torch.float32).max
    given = {"softmax_max": largest, "softmax_sum": total, "attention_in": out, "scale_value": 0.3}
    dq = backward(q, k, v, torch.ones_like(q), 1, "BNSD", **given, **options)[0]
    assert float(dq[0, 0, 1].abs().max()) < 1e-30
    # What a masked key holds is selected away; what its value holds is multiplied by 0.
    k[0, 0, 5], masked[:, 5] = torch.nan, True
    assert not forward(q, k, v, 1, "BNSD", scale=0.3, **options)[0].isnan().any()
    v[0, 0, 5] = torch.inf
    assert forward(q, k, v, 1, "BNSD", scale=0.3, **options)[0].isnan().any()


def test_logsumexp_and_one_serve_as_statistics() -> None:
    q, k, v, grad = (randn(2, 7, 3, 32, dtype=torch.bfloat16, seed=i) for i in range(4))
    out, largest, total, *_ = forward(q, k, v, 3, "BSND", scale=0.2)
    given: dict[str, Any] = {"attention_in": out, "scale_value": 0.2}
    own = backward(q, k, v, grad, 3, "BSND", softmax_max=largest, softmax_sum=total, **given)[:3]
    lse = largest + total.log()
    ours = backward(q, k, v, grad, 3, "BSND", softmax_max=lse, softmax_sum=torch.ones_like(lse), **given)[:3]
    for a, b in zip(own, ours, strict=True):
        torch.testing.assert_close(a, b, rtol=2**-7, atol=1e-6)


def test_third_form_before_950(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOST_NPU_SOC", "Ascend910B4")
    x = randn(2, 7, 3, 16)
    one, three = (
        forward(x, x, x, 3, "BSND", scale=0.2),
        attention_v3.npu_fusion_attention_v3(x, x, x, 3, "BSND", scale=0.2),
    )
    assert all(torch.equal(a, b) for a, b in zip(one[:3], three[:3], strict=True))
    assert [t.tolist() for t in three[4:]] == [[0], [0]]
    given: dict[str, Any] = dict(zip(("attention_in", "softmax_max", "softmax_sum"), one, strict=False))
    gradients = (
        backward(x, x, x, x, 3, "BSND", **given)[:3],
        attention_v3.npu_fusion_attention_grad_v3(x, x, x, x, 3, "BSND", seed=three[4], offset=three[5], **given)[:3],
    )
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


# ---- inference


@pytest.mark.parametrize("layout", ["BSND", "BNSD", "BSH", "BNSD_BSND"])
def test_infer(layout: str) -> None:
    heads, dtype = 4, torch.bfloat16
    q, k, v = (randn(2, n, s, 16, dtype=dtype, seed=n + s) for n, s in ((heads, 9), (2, 13), (2, 13)))
    masked = randn(2, 1, 9, 13, seed=1) > 0.3
    masked[..., 0] = False
    laid_out = [to_layout(t, layout.split("_")[0]) for t in (q, k, v)]
    options: dict[str, Any] = {"num_query_heads": heads, "num_key_value_heads": 2, "input_layout": layout}
    # A mask may be larger than what it covers.
    wide = torch.nn.functional.pad(masked, (0, 3, 0, 7))
    out, lse = infer(*laid_out, **options, softmax_scale=0.3, atten_mask=wide, return_softmax_lse=True)
    right = exact(q, k, v, 0.3, masked, q)
    close(from_layout(out, layout.split("_")[-1], heads), right[0], dtype)
    s = (q.double() @ k.double().repeat_interleave(2, 1).transpose(-1, -2) * 0.3).masked_fill(masked, -torch.inf)
    torch.testing.assert_close(lse[..., 0].double(), s.logsumexp(-1), rtol=1e-4, atol=1e-5)
    assert out.dtype == dtype and infer(*laid_out, **options)[1].shape == (0,)


def test_infer_packed_and_rows_without_keys() -> None:
    q, k = randn(9, 2, 64, dtype=torch.float16), randn(7, 2, 64, dtype=torch.float16, seed=1)
    options: dict[str, Any] = {"num_query_heads": 2, "input_layout": "TND", "return_softmax_lse": True}
    ends = {"actual_seq_qlen": [4, 6, 9], "actual_seq_kvlen": [5, 5, 7]}
    out, lse = infer(q, k, k, **options, **ends, softmax_scale=0.125)
    for a, b in ((slice(0, 4), slice(0, 5)), (slice(6, 9), slice(5, 7))):
        parts = [t.transpose(0, 1)[None] for t in (q[a], k[b], k[b])]
        close(out[a].transpose(0, 1)[None], exact(*parts, 0.125, None, parts[0])[0], torch.float16)
    assert lse.shape == (9, 2, 1) and not out[4:6].any() and bool((lse[4:6] == torch.inf).all())
    dense = {"num_query_heads": 2, "input_layout": "BSND", "return_softmax_lse": True}
    two = [torch.stack((t[:4], t[2:6])) for t in (q, k, k)]
    out, lse = infer(*two, **dense, softmax_scale=0.125, actual_seq_kvlen=[4, 3], inner_precise=2)
    parts = [t[1].transpose(0, 1)[None] for t in (two[0], two[1][:, :3], two[2][:, :3])]
    close(out[1].transpose(0, 1)[None], exact(*parts, 0.125, None, parts[0])[0], torch.float16)
    out, lse = infer(*two, **dense, softmax_scale=0.125, actual_seq_kvlen=[0, 3], inner_precise=2)
    assert not out[0].any() and bool((lse[0] == torch.inf).all()) and bool(lse[1].isfinite().all())
