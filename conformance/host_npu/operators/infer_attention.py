"""npu_fused_infer_attention_score_v2: attention without a gradient, on fp16 and bf16 and on HiFloat8 codes.

Sources: torch_npu's page of the operator, CANN's page of aclnnFusedInferAttentionScoreV5.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import layouts
from .dtypes import HALVES, decoded, encoded, require_codes, require_hifloat8, torch_dtype
from .layouts import sequences, wide
from .masks import COMPRESSED, UNLIMITED, Mask, Stored, mask_of
from .native_attention import values_BNSD
from .rules import is_950, require, require_absent, require_dtype, require_shape
from .softmax import LOWEST, attend

OP = "npu_fused_infer_attention_score_v2"

#: Layout of the inputs -> that of the result, where the name has two parts.
OUT_LAYOUT = {"BNSD_BSND": ("BNSD", "BSND")}
MOST_DIM, MOST_DIM_OF_CODES = 512, 128
#: Quantization mode "scales per block", of query (128 tokens) and of key and value (256).
PER_BLOCK, BLOCK_OF_QUERY, BLOCK_OF_KEY = 7, 128, 256


@dataclass(frozen=True)
class Operands:
    """fp32 [N, S, D] of each sequence, whatever they came as."""

    q: list[Tensor]
    k: list[Tensor]
    v: list[Tensor]
    rounded: Callable[[Tensor], Tensor]


def npu_fused_infer_attention_score_v2(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    query_rope: Tensor | None = None,
    key_rope: Tensor | None = None,
    pse_shift: Tensor | None = None,
    atten_mask: Tensor | None = None,
    actual_seq_qlen: Sequence[int] | None = None,
    actual_seq_kvlen: Sequence[int] | None = None,
    block_table: Tensor | None = None,
    dequant_scale_query: Tensor | None = None,
    dequant_scale_key: Tensor | None = None,
    dequant_offset_key: Tensor | None = None,
    dequant_scale_value: Tensor | None = None,
    dequant_offset_value: Tensor | None = None,
    dequant_scale_key_rope: Tensor | None = None,
    quant_scale_out: Tensor | None = None,
    quant_offset_out: Tensor | None = None,
    quant_scale_p: Tensor | None = None,
    learnable_sink: Tensor | None = None,
    num_query_heads: int = 1,
    num_key_value_heads: int = 0,
    softmax_scale: float = 1.0,
    pre_tokens: int = UNLIMITED,
    next_tokens: int = UNLIMITED,
    input_layout: str = "BSH",
    sparse_mode: int = 0,
    block_size: int = 0,
    query_quant_mode: int = 0,
    key_quant_mode: int = 0,
    value_quant_mode: int = 0,
    inner_precise: int = 0,
    return_softmax_lse: bool = False,
    query_dtype: int | None = None,
    key_dtype: int | None = None,
    value_dtype: int | None = None,
    query_rope_dtype: int | None = None,
    key_rope_dtype: int | None = None,
    key_shared_prefix_dtype: int | None = None,
    value_shared_prefix_dtype: int | None = None,
    dequant_scale_query_dtype: int | None = None,
    dequant_scale_key_dtype: int | None = None,
    dequant_scale_value_dtype: int | None = None,
    dequant_scale_key_rope_dtype: int | None = None,
    out_dtype: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, logsumexp [B, N, S, 1], packed [T, N, 1], or an empty tensor). A row without keys has logsumexp +inf.

    HiFloat8: uint8 with all three dtypes 290, mode 7 ("per block") and one fp32 scale for 128 queries and for 256
    keys and values; probabilities are rounded to HiFloat8 as they are. `softmax_scale` is 1 unless given.
    """
    require_absent(
        OP,
        query_rope=query_rope,
        key_rope=key_rope,
        pse_shift=pse_shift,
        block_table=block_table,
        dequant_offset_key=dequant_offset_key,
        dequant_offset_value=dequant_offset_value,
        dequant_scale_key_rope=dequant_scale_key_rope,
        quant_scale_out=quant_scale_out,
        quant_offset_out=quant_offset_out,
        quant_scale_p=quant_scale_p,
        learnable_sink=learnable_sink,
        dequant_scale_query_dtype=dequant_scale_query_dtype,
        dequant_scale_key_dtype=dequant_scale_key_dtype,
        dequant_scale_value_dtype=dequant_scale_value_dtype,
        query_rope_dtype=query_rope_dtype,
        key_rope_dtype=key_rope_dtype,
        key_shared_prefix_dtype=key_shared_prefix_dtype,
        value_shared_prefix_dtype=value_shared_prefix_dtype,
        dequant_scale_key_rope_dtype=dequant_scale_key_rope_dtype,
    )
    require(OP, block_size == 0, "paged attention is not emulated", block_size)
    layout, out_layout = OUT_LAYOUT.get(input_layout, (input_layout, input_layout))
    known = [*(name for name in layouts.DIMENSIONS if name != "SBH"), *OUT_LAYOUT]
    require(OP, layout in known, f"input_layout is one of {', '.join(known)}; others are not emulated", input_layout)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        require(OP, tensor.is_contiguous(), f"{name} is contiguous", tensor.stride())
        require(OP, tensor.ndim == layouts.DIMENSIONS[layout], f"{name} has the dimensions of {layout}", tensor.ndim)
    heads, kv_heads = num_query_heads, num_key_value_heads or num_query_heads
    require(OP, heads > 0 and heads % kv_heads == 0, "query heads are a multiple of key heads", (heads, kv_heads))
    require(OP, inner_precise in range(4), "inner_precise is 0 to 3", inner_precise)
    packed = layout == "TND"
    lengths = _packed_lengths(query, key, actual_seq_qlen, actual_seq_kvlen) if packed else (None, None)
    views = [
        sequences(layout, tensor, count, of)
        for tensor, count, of in (
            (query, heads, lengths[0]),
            (key, kv_heads, lengths[1]),
            (value, kv_heads, lengths[1]),
        )
    ]
    _check_sizes(views, heads, kv_heads)
    dtypes, scales = (
        (query_dtype, key_dtype, value_dtype),
        (dequant_scale_query, dequant_scale_key, dequant_scale_value),
    )
    if dtypes == (None, None, None):
        result_dtype = query.dtype
        operands = _plain(views, scales, packed)
    else:
        result_dtype = torch_dtype(OP, "out_dtype", torch.float16 if out_dtype is None else out_dtype)
        require(OP, result_dtype in HALVES, "out_dtype is float16 or bfloat16", result_dtype)
        operands = _coded(views, dtypes, (query_quant_mode, key_quant_mode, value_quant_mode), scales, layout)
        bare = atten_mask is None and actual_seq_qlen is None and actual_seq_kvlen is None
        require(OP, bare, "HiFloat8 goes with no mask and no lengths")
    if packed:
        require(OP, atten_mask is None, "atten_mask of a packed call is not emulated")
        masks: list[Mask | None] = [None] * len(operands.q)
    else:
        require_absent(OP, actual_seq_qlen=actual_seq_qlen)
        masks = _masks(atten_mask, sparse_mode, (pre_tokens, next_tokens), views, actual_seq_kvlen)
    empty_rows = inner_precise >= 2 or (sparse_mode in (3, 4) and views[0][0].shape[1] > views[1][0].shape[1])
    # Tokens of a packed tensor that belong to no sequence are not written.
    if out_layout in ("BSH", "TND"):
        shape = [*query.shape[:2], value.shape[2] * (heads // kv_heads if layout == "BSH" else 1)]
    else:
        batch, rows = len(views[0]), views[0][0].shape[1]
        shape = [batch, *((heads, rows) if out_layout == "BNSD" else (rows, heads)), value.shape[-1]]
    out = layouts.poisoned(shape, result_dtype)
    lse_shape = (query.shape[0], heads, 1) if packed else (len(operands.q), heads, views[0][0].shape[1], 1)
    lse = layouts.poisoned(lse_shape, torch.float32)
    places = sequences(out_layout, out, heads, lengths[0])
    lse_places = sequences("TND", lse, heads, lengths[0]) if packed else list(lse.unbind(0))
    for q, k, v, mask, place, lse_place in zip(
        operands.q, operands.k, operands.v, masks, places, lse_places, strict=True
    ):
        found = _attended(q, k, v, softmax_scale, mask, empty_rows, operands.rounded)
        place.copy_(found[0])
        lse_place.copy_(found[1])
    return out, lse if return_softmax_lse else torch.empty(0)


def _attended(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    mask: Mask | None,
    empty_rows: bool,
    rounded: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """out and logsumexp of one sequence; zeros and +inf without keys."""
    groups = q.shape[0] // k.shape[0]
    if k.shape[1] == 0:
        return q.new_zeros(*q.shape[:2], v.shape[-1]), q.new_full((*q.shape[:2], 1), torch.inf)
    out, largest, total = attend(
        wide(q), wide(k, groups), wide(v, groups), scale, mask, empty_rows=empty_rows, rounded=rounded
    )
    lse = largest + total.log()
    return out, lse.masked_fill(largest == LOWEST, torch.inf) if empty_rows else lse


def _packed_lengths(
    query: Tensor, key: Tensor, q_ends: Sequence[int] | None, kv_ends: Sequence[int] | None
) -> tuple[list[int], list[int]]:
    """A sequence may lack keys, unlike in training."""
    q_lengths = layouts.lengths_of(OP, "actual_seq_qlen", q_ends, query.shape[0])
    kv_lengths = layouts.lengths_of(OP, "actual_seq_kvlen", kv_ends, key.shape[0])
    sizes = (len(q_lengths), len(kv_lengths))
    require(OP, sizes[0] == sizes[1], "actual_seq_qlen and actual_seq_kvlen have as many entries", sizes)
    return q_lengths, kv_lengths


def _check_sizes(views: list[list[Tensor]], heads: int, kv_heads: int) -> None:
    q, k, v = views
    require(OP, len(q) == len(k) == len(v), "query, key and value have one batch", (len(q), len(k), len(v)))
    found = (q[0].shape[0], k[0].shape[0], v[0].shape[0])
    rule = "num_query_heads and num_key_value_heads are the heads of query, and of key and value"
    require(OP, found == (heads, kv_heads, kv_heads), rule, found)
    dims = (q[0].shape[-1], k[0].shape[-1], v[0].shape[-1])
    require(OP, dims[0] == dims[1] and max(dims) <= MOST_DIM, f"head dimensions agree, {MOST_DIM} at most", dims)
    require(OP, all(a.shape[1] == b.shape[1] for a, b in zip(k, v, strict=True)), "key and value have as many tokens")


def _plain(views: list[list[Tensor]], scales: Sequence[Tensor | None], packed: bool) -> Operands:
    require(OP, all(scale is None for scale in scales), "scales are of quantized inputs (query_dtype, ...)")
    dtype = views[0][0].dtype
    for name, parts in zip(("query", "key", "value"), views, strict=True):
        require_dtype(OP, f"{name} without a dtype argument", parts[0], HALVES)
        require(OP, parts[0].dtype == dtype, "query, key and value have one dtype", (dtype, parts[0].dtype))
        if not is_950():
            _check_dim_of_910(parts[0].shape[-1], packed)
    return Operands(*views, rounded=lambda p: p)


def _check_dim_of_910(dim: int, packed: bool) -> None:
    require(OP, dim % 16 == 0, "head dimensions are multiples of 16 before Ascend 950", dim)
    require(OP, not packed or dim in (64, 128), "head dimensions of packed calls are 64 or 128 before Ascend 950", dim)


def _coded(
    views: list[list[Tensor]],
    dtypes: Sequence[int | None],
    modes: Sequence[int],
    scales: Sequence[Tensor | None],
    layout: str,
) -> Operands:
    """Values of HiFloat8 codes."""
    require_hifloat8(OP, "query_dtype, key_dtype and value_dtype are all HiFloat8 (290)", *dtypes)
    require(OP, layout != "TND", "HiFloat8 goes with BSH, BSND, BNSD and BNSD_BSND", layout)
    require(OP, tuple(modes) == (PER_BLOCK,) * 3, "all three quantization modes are 7, per block, for HiFloat8", modes)
    found = []
    for name, parts, scale in zip(("query", "key", "value"), views, scales, strict=True):
        require_codes(OP, name, parts[0])
        heads, tokens, dim = parts[0].shape
        require(OP, name != "query" or tokens > 1, "HiFloat8 goes with two queries or more", tokens)
        require(OP, dim <= MOST_DIM_OF_CODES, f"head dimension is {MOST_DIM_OF_CODES} at most for HiFloat8", dim)
        require(OP, scale is not None, f"dequant_scale_{name} is given")
        assert scale is not None
        block = BLOCK_OF_QUERY if name == "query" else BLOCK_OF_KEY
        require_dtype(OP, f"dequant_scale_{name}", scale, (torch.float32,))
        shape = (len(parts), heads, -(-tokens // block), 1)
        require_shape(OP, f"dequant_scale_{name}, one for {block} tokens,", scale, shape)
        # From [N, S, D] of each sequence to [B, S, N, D].
        found.append(list(values_BNSD(torch.stack(parts).transpose(1, 2), scale, block)))
    return Operands(*found, rounded=lambda p: decoded(encoded(p)))


def _masks(
    atten_mask: Tensor | None,
    sparse_mode: int,
    limits: tuple[int, int],
    views: list[list[Tensor]],
    kv_lengths: Sequence[int] | None,
) -> list[Mask | None]:
    """Of every sequence of a dense call."""
    batch, rows, keys = len(views[0]), views[0][0].shape[1], views[1][0].shape[1]
    require(OP, sparse_mode in range(5), "sparse_mode is 0 to 4", sparse_mode)
    require(OP, sparse_mode == 0 or atten_mask is not None, f"sparse_mode {sparse_mode} has an atten_mask")
    if kv_lengths is not None:
        require(OP, atten_mask is None, "actual_seq_kvlen beside atten_mask is not emulated")
        lengths = list(kv_lengths) * batch if len(kv_lengths) == 1 else list(kv_lengths)[:batch]
        legal = len(lengths) == batch and all(0 <= length <= keys for length in lengths)
        require(OP, legal, f"actual_seq_kvlen has 1 or {batch} lengths of 0 to {keys}", lengths)
        return [Stored((torch.arange(keys) >= length).expand(1, rows, keys)) for length in lengths]
    if atten_mask is None:
        return [None] * batch
    of = mask_of(
        OP,
        _four_dimensions(atten_mask, batch, rows, keys) if sparse_mode < 2 else _triangle(atten_mask),
        sparse_mode,
        *limits,
        batch=batch,
        heads=views[0][0].shape[0],
        longest=(rows, keys),
        packed=False,
    )
    return [of(index, rows, keys) for index in range(batch)]


def _four_dimensions(mask: Tensor, batch: int, rows: int, keys: int) -> Tensor:
    """[B or 1, 1, Sq, Sk] of the documented shapes, which may be larger than needed in the last two."""
    dims = (2, 3, 4)
    require(OP, mask.ndim in dims, "atten_mask has shape [Sq, Sk], [B or 1, Sq, Sk] or [B or 1, 1, Sq, Sk]", mask.shape)
    if mask.ndim < 4:
        mask = mask.view(*(1 for _ in range(3 - mask.ndim)), *mask.shape).unsqueeze(1)
    large_enough = mask.shape[2] >= rows and mask.shape[3] >= keys
    legal = large_enough and mask.shape[1] == 1 and mask.shape[0] in (1, batch)
    require(OP, legal, f"atten_mask covers {rows} queries and {keys} keys of 1 or {batch} sequences", list(mask.shape))
    return mask[:, :, :rows, :keys]


def _triangle(mask: Tensor) -> Tensor:
    shapes = [(*(1,) * ones, COMPRESSED, COMPRESSED) for ones in range(3)]
    require_shape(OP, "atten_mask of sparse_mode 2 to 4", mask, *shapes)
    return mask.view(COMPRESSED, COMPRESSED)


KERNELS: dict[str, Callable] = {OP: npu_fused_infer_attention_score_v2}
