"""What must hold between calls, whatever the numbers are: no oracle is needed, so no oracle can be wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from ospnext import ops
from ospnext.ops.contracts.attention import CONTRACT, DTYPES, AttentionRequest, cumulative
from ospnext.ops.tolerance import UNIT_ROUNDOFF, Verdict

from .check import Check, Target
from .modes import under_test

B, SQ, SK, H, D = 2, 113, 239, 3, 64
#: Two correct results may each be a few roundings off; a broken invariant is off by as much as the values themselves.
ROUNDINGS = 16


def checks() -> Iterator[Check]:
    for tag in ("bf16", "fp32"):
        for invariant, features in INVARIANTS.items():
            name = invariant.__name__.replace("_", "-")
            request = AttentionRequest("cpu", DTYPES[tag], B, SQ, SK, H, D, **dict.fromkeys(features, True))
            yield Check(
                id=f"attention/required/invariant-{name}-{tag}",
                level="required",
                run=_run(invariant, DTYPES[tag]),
                contract=CONTRACT,
                request=request,
            )


def _run(invariant: Callable[..., tuple[Tensor, Tensor]], dtype: torch.dtype) -> Callable[[Target], Mapping]:
    def run(target: Target) -> Mapping[str, Verdict]:
        generator = torch.Generator().manual_seed(0)
        shapes = ((B, SQ, H, D), (B, SK, H, D), (B, SK, H, D))
        q, k, v = (torch.randn(*s, generator=generator).to(target.device, dtype) for s in shapes)
        with under_test(CONTRACT, target):
            found, wanted = (t.double().cpu() for t in invariant(q, k, v))
        error, largest = (found - wanted).abs().max().item(), wanted.abs().max().item()
        bound = ROUNDINGS * UNIT_ROUNDOFF[dtype] * largest
        return {"out": Verdict(error, bound, error, bound, bool(found.isfinite().all()))}

    return run


def all_true_mask_is_no_mask(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    mask = torch.ones(k.shape[:2], dtype=torch.bool, device=k.device)
    return ops.attention(q, k, v, key_mask=mask), ops.attention(q, k, v)


def masked_keys_are_absent_keys(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """A mask that ends at key 100 is a sequence of 100 keys."""
    mask = (torch.arange(SK, device=k.device) < 100).expand(B, SK)
    return ops.attention(q, k, v, key_mask=mask), ops.attention(q, k[:, :100], v[:, :100])


def samples_and_heads_are_independent(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    order = torch.tensor([2, 0, 1], device=q.device)
    swapped = [t.flip(0)[:, :, order] for t in (q, k, v)]
    return ops.attention(*swapped), ops.attention(q, k, v).flip(0)[:, :, order]


def order_of_keys_is_free(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return ops.attention(q, k.flip(1), v.flip(1)), ops.attention(q, k, v)


def one_packed_sequence_is_dense(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    ends = {"q": cumulative((SQ,)).to(q.device), "kv": cumulative((SK,)).to(q.device)}
    packed = ops.attention_packed(
        q[1], k[1], v[1], cu_seqlens_q=ends["q"], cu_seqlens_kv=ends["kv"], max_seqlen_q=SQ, max_seqlen_kv=SK
    )
    return packed, ops.attention(q, k, v)[1]


def halves_merge_by_logsumexp(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    halves = [ops.attention(q, k[:, part], v[:, part], return_lse=True) for part in (slice(0, 100), slice(100, SK))]
    outs, lses = (torch.stack([half[i].float() for half in halves]) for i in (0, 1))
    weights = lses.softmax(0).transpose(2, 3)[..., None]  # [2, B, Sq, H, 1]
    return (weights * outs).sum(0), ops.attention(q, k, v)


#: Invariant -> features of the request that decide which implementations can be asked.
INVARIANTS: dict[Callable[..., tuple[Tensor, Tensor]], tuple[str, ...]] = {
    all_true_mask_is_no_mask: ("key_mask",),
    masked_keys_are_absent_keys: ("key_mask",),
    samples_and_heads_are_independent: (),
    order_of_keys_is_free: (),
    one_packed_sequence_is_dense: ("packed",),
    halves_merge_by_logsumexp: ("logsumexp",),
}
