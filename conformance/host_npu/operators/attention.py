"""npu_fusion_attention and its gradient: dense and packed attention for training, fp16, bf16 and fp32.

Sources: torch_npu's page of the operator, CANN's pages of aclnnFlashAttentionScore V2 and V4 and their gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import layouts
from .dtypes import FLOATS
from .layouts import narrow, sequences, wide
from .masks import UNLIMITED, Mask, MaskOf, mask_of
from .rules import require, require_absent, require_dtype, require_shape
from .softmax import attend, attend_backward

FORWARD, BACKWARD = "npu_fusion_attention", "npu_fusion_attention_grad"

#: Sizes start at 1 and end here.
MOST_HEADS, MOST_TOKENS, MOST_DIM = 256, 1_000_000, 768


@dataclass(frozen=True)
class Call:
    """A call that the documents allow. `lengths` are of packed queries and keys."""

    op: str
    layout: str
    heads: int
    #: Query heads per key head.
    groups: int
    q_shape: list[int]
    lengths: tuple[list[int], list[int]] | None
    q: list[Tensor]
    k: list[Tensor]
    v: list[Tensor]
    mask: MaskOf
    #: Look for rows that are masked out entirely.
    empty_rows: bool
    softmax_layout: str

    def of_queries(self, tensor: Tensor) -> list[Tensor]:
        """Views [N, S, D] of each sequence of something laid out as queries are."""
        return sequences(self.layout, tensor, self.heads, self.lengths[0] if self.lengths else None)

    def of_keys(self, tensor: Tensor) -> list[Tensor]:
        return sequences(self.layout, tensor, self.heads // self.groups, self.lengths[1] if self.lengths else None)

    def statistics_shape(self) -> list[int]:
        if self.lengths:
            return [self.q_shape[0], self.heads, 8]
        return [len(self.q), self.heads, self.q[0].shape[1], 8]

    def statistics(self, tensor: Tensor) -> list[Tensor]:
        return layouts.statistics_views(tensor, self.lengths[0] if self.lengths else None, self.softmax_layout)


def npu_fusion_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_num: int,
    input_layout: str,
    pse: Tensor | None = None,
    padding_mask: Tensor | None = None,
    atten_mask: Tensor | None = None,
    scale: float = 1.0,
    keep_prob: float = 1.0,
    pre_tockens: int = UNLIMITED,
    next_tockens: int = UNLIMITED,
    inner_precise: int = 0,
    prefix: Sequence[int] | None = None,
    actual_seq_qlen: Sequence[int] | None = None,
    actual_seq_kvlen: Sequence[int] | None = None,
    sparse_mode: int = 0,
    gen_mask_parallel: bool = True,
    sync: bool = False,
    softmax_layout: str = "",
    sink: Tensor | None = None,
    dropout_mask: Tensor | None = None,
    seed: int = 0,
    offset: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int, int]:
    """(out, softmax_max, softmax_sum, nothing, seed, offset, elements of the dropout mask).

    The statistics are fp32 with eight equal copies in the last dimension; see `layouts.statistics_views` for packed
    calls. `scale` is 1 unless given.
    """
    require_absent(FORWARD, pse=pse, padding_mask=padding_mask, prefix=prefix, sink=sink, dropout_mask=dropout_mask)
    call = _checked(
        FORWARD,
        (query, key, value),
        head_num,
        input_layout,
        atten_mask,
        keep_prob,
        (pre_tockens, next_tockens),
        inner_precise,
        (actual_seq_qlen, actual_seq_kvlen),
        sparse_mode,
        softmax_layout,
    )
    # Tokens of a packed tensor that belong to no sequence are not written.
    value_dim = call.v[0].shape[-1]
    shape = [*query.shape[:-1], value_dim * (head_num if query.ndim == 3 and call.layout != "TND" else 1)]
    out = layouts.poisoned(shape, query.dtype)
    largest, total = (layouts.poisoned(call.statistics_shape(), torch.float32) for _ in range(2))
    written = (call.of_queries(out), call.statistics(largest), call.statistics(total))
    for q, k, v, mask, (o, m, s) in zip(call.q, call.k, call.v, _masks(call), zip(*written, strict=True), strict=True):
        if q.shape[1] == 0:
            continue
        found = attend(wide(q), wide(k, call.groups), wide(v, call.groups), scale, mask, empty_rows=call.empty_rows)
        for place, result in zip((o, m, s), found, strict=True):
            place.copy_(result)
    elements = sum(head_num * q.shape[1] * k.shape[1] for q, k in zip(call.q, call.k, strict=True))
    return out, largest, total, query.new_empty(0), seed, offset, elements


def npu_fusion_attention_grad(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dy: Tensor,
    head_num: int,
    input_layout: str,
    *,
    pse: Tensor | None = None,
    padding_mask: Tensor | None = None,
    atten_mask: Tensor | None = None,
    softmax_max: Tensor | None = None,
    softmax_sum: Tensor | None = None,
    softmax_in: Tensor | None = None,
    attention_in: Tensor | None = None,
    scale_value: float = 1.0,
    keep_prob: float = 1.0,
    pre_tockens: int = UNLIMITED,
    next_tockens: int = UNLIMITED,
    inner_precise: int = 0,
    seed: int = 0,
    offset: int = 0,
    numels: int = 0,
    prefix: Sequence[int] | None = None,
    actual_seq_qlen: Sequence[int] | None = None,
    actual_seq_kvlen: Sequence[int] | None = None,
    sparse_mode: int = 0,
    gen_mask_parallel: bool = True,
    sync: bool = False,
    softmax_layout: str = "",
    sink: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, None, Tensor]:
    """(dq, dk, dv, no gradient of pse, empty gradient of sink).

    Probabilities are exp(logit - softmax_max) / softmax_sum with the statistics that are passed, so that the logsumexp
    and a sum of 1 serve as well as what the forward returned.
    """
    require_absent(BACKWARD, pse=pse, padding_mask=padding_mask, prefix=prefix, sink=sink)
    call = _checked(
        BACKWARD,
        (query, key, value),
        head_num,
        input_layout,
        atten_mask,
        keep_prob,
        (pre_tockens, next_tockens),
        inner_precise,
        (actual_seq_qlen, actual_seq_kvlen),
        sparse_mode,
        softmax_layout,
    )
    passed: dict[str, Tensor | None] = {"softmax_max": softmax_max, "softmax_sum": softmax_sum}
    for name, tensor in (passed | {"attention_in": attention_in}).items():
        require(BACKWARD, tensor is not None, f"{name} is given")
    assert softmax_max is not None and softmax_sum is not None and attention_in is not None
    require_dtype(BACKWARD, "dy", dy, (query.dtype,))
    require_dtype(BACKWARD, "attention_in", attention_in, (query.dtype,))
    require_shape(BACKWARD, "dy", dy, attention_in.shape)
    for name, tensor in (("softmax_max", softmax_max), ("softmax_sum", softmax_sum)):
        _check_statistics(name, tensor, call.statistics_shape())
    # What belongs to no sequence gets no gradient.
    gradients = [torch.zeros(t.shape, dtype=t.dtype) for t in (query, key, value)]
    written = (call.of_queries(gradients[0]), call.of_keys(gradients[1]), call.of_keys(gradients[2]))
    read = (
        call.of_queries(dy),
        call.of_queries(attention_in),
        call.statistics(softmax_max),
        call.statistics(softmax_sum),
    )
    for q, k, v, mask, places, (grad, out, m, s) in zip(
        call.q, call.k, call.v, _masks(call), zip(*written, strict=True), zip(*read, strict=True), strict=True
    ):
        if q.shape[1] == 0:
            continue
        keys, values = wide(k, call.groups), wide(v, call.groups)
        statistics = (t[..., :1].contiguous() for t in (m, s))
        dq, dk, dv = attend_backward(wide(grad), wide(q), keys, values, wide(out), *statistics, scale_value, mask)
        for place, result in zip(places, (dq, narrow(dk, call.groups), narrow(dv, call.groups)), strict=True):
            place.copy_(result)
    return (*gradients, None, torch.empty(0))  # type: ignore[return-value]


def _masks(call: Call) -> list[Mask | None]:
    pairs = zip(call.q, call.k, strict=True)
    return [call.mask(index, q.shape[1], k.shape[1]) if q.shape[1] else None for index, (q, k) in enumerate(pairs)]


def _check_statistics(name: str, tensor: Tensor, shape: list[int]) -> None:
    require_dtype(BACKWARD, name, tensor, (torch.float32,))
    require_shape(BACKWARD, name, tensor, shape)
    # The device reads blocks of eight.
    same = (tensor == tensor[..., :1]) | tensor.isnan()
    require(BACKWARD, bool(same.all()), f"the eight copies in {name} are equal")


def _checked(
    op: str,
    qkv: tuple[Tensor, Tensor, Tensor],
    heads: int,
    input_layout: str,
    atten_mask: Tensor | None,
    keep_prob: float,
    limits: tuple[int, int],
    inner_precise: int,
    ends: tuple[Sequence[int] | None, Sequence[int] | None],
    sparse_mode: int,
    softmax_layout: str,
) -> Call:
    query, key, _ = qkv
    layout = input_layout.upper()
    require(op, layout in layouts.DIMENSIONS, "input_layout is BSH, SBH, BSND, BNSD or TND", input_layout)
    for name, tensor in zip(("query", "key", "value"), qkv, strict=True):
        require_dtype(op, name, tensor, FLOATS)
        require(op, tensor.dtype == query.dtype, "query, key and value have one dtype", (query.dtype, tensor.dtype))
        require(op, tensor.ndim == layouts.DIMENSIONS[layout], f"{name} has the dimensions of {layout}", tensor.ndim)
    require(op, keep_prob == 1, "dropout is not emulated", keep_prob)
    require(op, inner_precise in (0, 1, 2), "inner_precise is 0, 1 or 2", inner_precise)
    packed = layout == "TND"
    require(
        op, softmax_layout in ("", "TND") and (packed or not softmax_layout), 'softmax_layout is "", or "TND" for TND'
    )
    head_dim = query.shape[-1] // (heads if layout in ("BSH", "SBH") else 1)
    found = layouts.heads_of(op, layout, query, max(1, head_dim))
    require(op, heads == found, "head_num is the number of query heads", (heads, found))
    groups = _groups(op, layout, heads, head_dim, key)
    lengths = None
    if packed:
        lengths = _lengths(op, ends, query, key)
    q, k, v = (
        sequences(layout, tensor, heads // share, None if lengths is None else lengths[min(1, index)])
        for index, (tensor, share) in enumerate(zip(qkv, (1, groups, groups), strict=True))
    )
    _check_sizes(op, q, k, v, packed)
    longest = (max(t.shape[1] for t in q), max(t.shape[1] for t in k))
    mask = mask_of(op, atten_mask, sparse_mode, *limits, batch=len(q), heads=heads, longest=longest, packed=packed)
    # Found by the operator itself where the mode alone says so.
    by_mode = atten_mask is not None and sparse_mode in (3, 4) and longest[0] > longest[1]
    empty_rows = inner_precise == 2 or by_mode
    return Call(op, layout, heads, groups, list(query.shape), lengths, q, k, v, mask, empty_rows, softmax_layout)


def _groups(op: str, layout: str, heads: int, head_dim: int, key: Tensor) -> int:
    kv_heads = layouts.heads_of(op, layout, key, max(1, head_dim))
    require(op, kv_heads > 0 and heads % kv_heads == 0, "query heads are a multiple of key heads", (heads, kv_heads))
    return heads // kv_heads


def _lengths(
    op: str, ends: tuple[Sequence[int] | None, Sequence[int] | None], query: Tensor, key: Tensor
) -> tuple[list[int], list[int]]:
    q_lengths = layouts.lengths_of(op, "actual_seq_qlen", ends[0], query.shape[0])
    kv_lengths = layouts.lengths_of(op, "actual_seq_kvlen", ends[1], key.shape[0])
    sizes = (len(q_lengths), len(kv_lengths))
    require(op, sizes[0] == sizes[1], "actual_seq_qlen and actual_seq_kvlen have as many entries", sizes)
    for rows, keys in zip(q_lengths, kv_lengths, strict=True):
        require(
            op, not rows or keys > 0, "a sequence with queries has keys (documented for queries only)", (rows, keys)
        )
    return q_lengths, kv_lengths


def _check_sizes(op: str, q: list[Tensor], k: list[Tensor], v: list[Tensor], packed: bool) -> None:
    require(op, len(q) == len(k) == len(v), "query, key and value have one batch", (len(q), len(k), len(v)))
    dims = (q[0].shape[-1], k[0].shape[-1], v[0].shape[-1])
    require(op, 1 <= dims[0] <= MOST_DIM, f"head dimensions are 1 to {MOST_DIM}", dims[0])
    require(
        op, dims[0] == dims[1] >= dims[2], "head dimensions of query and key agree, that of value is no larger", dims
    )
    require(op, q[0].shape[0] <= MOST_HEADS, f"there are at most {MOST_HEADS} heads", q[0].shape[0])
    for a, b in zip(k, v, strict=True):
        require(op, a.shape[:2] == b.shape[:2], "key and value agree but for the head dimension", (a.shape, b.shape))
    for name, side in (("query", q), ("key", k)):
        tokens = sum(t.shape[1] for t in side) if packed else side[0].shape[1]
        require(op, 1 <= tokens <= MOST_TOKENS, f"{name} has 1 to {MOST_TOKENS} tokens", tokens)


KERNELS: dict[str, Callable] = {FORWARD: npu_fusion_attention, BACKWARD: npu_fusion_attention_grad}
