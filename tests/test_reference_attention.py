"""The reference attention beyond the contract's cases: masked values, strides, blocks, needles, merged halves."""

from __future__ import annotations

import pytest
import torch

from ospnext import ops
from ospnext.backends.reference import attention as formula
from ospnext.ops.contracts.attention import cumulative

IMPLEMENTATIONS = ["reference.math", "reference.sdpa"]


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    with ops.use_backend("reference", ops={"attention": request.param}):
        yield request.param


@pytest.fixture
def math():
    with ops.use_backend("reference", ops={"attention": "reference.math"}):
        yield


def qkv(q_len=7, kv_len=9, heads=2, dim=8, batch=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    shapes = [(batch, n, heads, dim) for n in (q_len, kv_len, kv_len)]
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def test_true_means_the_key_takes_part(math):
    q, k, v = qkv()
    keep = torch.zeros(2, 9, dtype=torch.bool)
    keep[:, :4] = True
    torch.testing.assert_close(ops.attention(q, k, v, key_mask=keep), ops.attention(q, k[:, :4], v[:, :4]))


def test_a_mask_that_keeps_everything_is_no_mask(math):
    q, k, v = qkv()
    assert torch.equal(ops.attention(q, k, v, key_mask=torch.ones(2, 9, dtype=torch.bool)), ops.attention(q, k, v))


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_masked_keys_hold_never_matters(math, poison):
    q, k, v = qkv()
    keep = torch.arange(9).expand(2, 9) % 3 != 1
    dirty_k, dirty_v = k.clone(), v.clone()
    dirty_k[~keep], dirty_v[~keep] = poison, poison
    results = []
    for keys, values in ((k, v), (dirty_k, dirty_v)):
        leaves = [t.clone().requires_grad_() for t in (q, keys, values)]
        out, lse = ops.attention(*leaves, key_mask=keep, return_lse=True)
        results.append([out, lse, *torch.autograd.grad(out.square().sum(), leaves)])
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)
    assert not results[1][3][~keep].any()


def test_a_row_without_keys_is_zero_with_zero_gradients(math):
    leaves = [t.requires_grad_() for t in qkv()]
    keep = torch.ones(2, 9, dtype=torch.bool)
    keep[0] = False
    out, lse = ops.attention(*leaves, key_mask=keep, return_lse=True)
    assert not out[0].any()
    assert (lse[0] == -torch.inf).all()
    for gradient in torch.autograd.grad(out.sum() + out.square().sum(), leaves):
        assert not gradient[0].any()
        assert gradient[1].any()


def test_blocks_of_query_rows_do_not_show(math, monkeypatch):
    q, k, v = qkv(q_len=50, kv_len=31)
    whole = [t.clone() for t in ops.attention(q, k, v, return_lse=True)]
    monkeypatch.setattr(formula, "BLOCK_ELEMENTS", 2 * 31 * 7)
    for found, wanted in zip(ops.attention(q, k, v, return_lse=True), whole, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("length", [1023, 75_600])
def test_needles_are_found(implementation, length):
    """A query planted on one key returns that key's value: a lost first, last or tile-edge key cannot hide."""
    positions = torch.tensor([0, 1, 63, 64, 127, 128, length - 64, length - 16, length - 1])
    generator = torch.Generator().manual_seed(1)
    k = torch.randn(1, length, 1, 32, generator=generator)
    k = 8 * k / k.norm(dim=-1, keepdim=True)
    v = torch.randn(1, length, 1, 32, generator=generator)
    # At this scale the planted key's logit exceeds every other one by so much that the rest weighs under 1e-6.
    found = ops.attention(k[:, positions], k, v, scale=4.0)
    torch.testing.assert_close(found, v[:, positions], rtol=0, atol=1e-5)


def test_two_halves_merged_by_logsumexp_are_the_whole(implementation):
    q, k, v = qkv(kv_len=64)
    whole, whole_lse = ops.attention(q, k, v, return_lse=True)
    halves = [ops.attention(q, k[:, s], v[:, s], return_lse=True) for s in (slice(0, 24), slice(24, 64))]
    lse = torch.logsumexp(torch.stack([part for _, part in halves]), dim=0)
    merged = sum(out * (part - lse).exp().mT[..., None] for out, part in halves)
    torch.testing.assert_close(merged, whole, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(lse, whole_lse, rtol=1e-12, atol=1e-13)


def strided(t: torch.Tensor, layout: str) -> torch.Tensor:
    """`t` with the same values in another memory layout."""
    if layout == "transposed":
        return t.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "fused":
        return torch.stack([t, t * 2, t * 3], dim=2)[:, :, 0]
    if layout == "last stride 2":
        return torch.stack([t, -t], dim=-1)[..., 0]
    return torch.cat([t.new_full((1,), torch.nan), t.flatten()])[1:].view(t.shape)  # storage offset 1


@pytest.mark.parametrize("layout", ["transposed", "fused", "last stride 2", "offset"])
def test_strides_do_not_matter(implementation, layout):
    grad = torch.randn(2, 7, 2, 8, dtype=torch.float64)
    results = []
    for change in (lambda t: t, lambda t: strided(t, layout)):
        leaves = [change(t).requires_grad_() for t in qkv()]
        out = ops.attention(*leaves)
        results.append([out, *torch.autograd.grad(out, leaves, change(grad))])
    for plain, other in zip(*results, strict=True):
        torch.testing.assert_close(other, plain, rtol=1e-12, atol=1e-13)
    assert out.is_contiguous()


def test_keys_broadcast_with_stride_zero(implementation):
    q, k, v = qkv()
    k0, v0 = (t[:1].expand(2, -1, -1, -1) for t in (k, v))
    torch.testing.assert_close(ops.attention(q, k0, v0), ops.attention(q, k0.contiguous(), v0.contiguous()))


def test_gradcheck_dense_and_packed(implementation):
    leaves = [t.requires_grad_() for t in qkv(3, 4, 1, 4, 1)]
    assert torch.autograd.gradcheck(lambda *t: ops.attention(*t, scale=0.7), leaves)
    packed = [torch.randn(n, 1, 4, dtype=torch.float64, requires_grad=True) for n in (5, 6, 6)]
    lengths = {"cu_seqlens_q": cumulative((2, 0, 3)), "cu_seqlens_kv": cumulative((3, 2, 1))}
    assert torch.autograd.gradcheck(
        lambda *t: ops.attention_packed(*t, **lengths, max_seqlen_q=3, max_seqlen_kv=3), packed
    )


@pytest.mark.parametrize(("first", "second"), [IMPLEMENTATIONS, IMPLEMENTATIONS[::-1]])
def test_the_backward_of_one_follows_the_forward_of_the_other(first, second):
    leaves = [t.requires_grad_() for t in qkv()]
    with ops.use_backend("reference", ops={"attention": first}):
        out = ops.attention(*leaves)
        own = torch.autograd.grad(out.square().sum(), leaves, retain_graph=True)
    with ops.use_backend("reference", ops={"attention": second}):
        other = torch.autograd.grad(out.square().sum(), leaves)
    for found, wanted in zip(other, own, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-13)


BAD = {
    "rank": (lambda q, k, v: ops.attention(q[0], k[0], v[0]), r"must be \[B, S, H, D\]"),
    "heads": (lambda q, k, v: ops.attention(q, k[:, :, :1], v[:, :, :1]), "must agree in batch, heads"),
    "dtype": (lambda q, k, v: ops.attention(q, k.float(), v), "one floating dtype"),
    "additive mask": (lambda q, k, v: ops.attention(q, k, v, key_mask=torch.zeros(2, 9)), "key_mask must be bool"),
    "mask shape": (lambda q, k, v: ops.attention(q, k, v, key_mask=torch.ones(2, 1, 1, 9).bool()), "key_mask must"),
    "cu_seqlens dtype": (lambda q, k, v: packed(q, k, v, torch.tensor([0, 14])), "must be int32"),
    "cu_seqlens values": (lambda q, k, v: packed(q, k, v, torch.tensor([0, 13], dtype=torch.int32)), "end at"),
}


def packed(q, k, v, cu_seqlens):
    flat = [t.flatten(0, 1) for t in (q, q, q)]
    return ops.attention_packed(
        *flat, cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens, max_seqlen_q=14, max_seqlen_kv=14
    )


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD)
def test_wrong_arguments_are_named(math, call, message):
    with pytest.raises(ValueError, match=message):
        call(*qkv())
