"""Packed attention (TND): results, and how the statistics of several sequences lie in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ospnext.ops.acceptance import Finding, Item, RefusedCallError

from ..attention.statistics import statistics_of_pack
from ..predicates import MOST_SEQUENCES
from . import formulas
from .attention import IN_BF16, MATH, OF_LSE, RIGHT
from .calls import all_of, nearest, normal, taken, vendors

HEADS, DIM, SCALE = 3, 64, 0.125
#: Queries and keys of each sequence: of other lengths, none a multiple of 8.
LENGTHS = ((33, 129), (7, 301), (90, 5))
BLOCKS, ONE_BLOCK, BY_TOKEN = (
    "a block [H, S, 8] for each sequence",
    "one block [H, T, 8]",
    "[T, H, 8], as its shape says",
)


def pack(lengths: Sequence[tuple[int, int]]) -> list[Tensor]:
    """q, k, v and a gradient of the result, bf16 [T, H, D]."""
    totals = [sum(n) for n in zip(*lengths, strict=True)]
    sizes = (totals[0], totals[1], totals[1], totals[0])
    return [normal(n, HEADS, DIM, seed=seed, dtype=torch.bfloat16) for seed, n in enumerate(sizes)]


def ends(lengths: Sequence[tuple[int, int]]) -> dict[str, list[int]]:
    q_lengths, kv_lengths = zip(*lengths, strict=True)
    return {"actual_seq_qlen": list(accumulate(q_lengths)), "actual_seq_kvlen": list(accumulate(kv_lengths))}


def apart(t: Tensor, lengths: Sequence[tuple[int, int]], side: int) -> list[Tensor]:
    """[1, S, H, D] of each sequence."""
    return [part[None] for part in t.split([pair[side] for pair in lengths])]


def forward(
    device: torch.device, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[tuple[int, int]], **more: Any
) -> tuple[Tensor, ...]:
    operands = (t.to(device) for t in (q, k, v))
    named = {"scale": SCALE, **ends(lengths), **more}
    return taken(vendors().npu_fusion_attention, *operands, HEADS, "TND", **named)[:3]


def each(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[tuple[int, int]]) -> list[tuple[Tensor, Tensor, Tensor]]:
    parts = (apart(t, lengths, min(side, 1)) for side, t in enumerate((q, k, v)))
    return [formulas.attention(*operands, SCALE) for operands in zip(*parts, strict=True)]


def layouts(lse_of_each: Sequence[Tensor]) -> dict[str, Tensor]:
    """The logsumexp [1, H, S] of each sequence as flat memory, in every order that was thought of."""
    together = torch.cat([lse[0] for lse in lse_of_each], 1)
    return {
        BLOCKS: torch.cat([lse.flatten() for lse in lse_of_each]),
        ONE_BLOCK: together.flatten(),
        BY_TOKEN: together.T.flatten(),
    }


def memory(device: torch.device) -> Finding:
    return _memory(device)


def memory_by_argument(device: torch.device) -> Finding:
    try:
        return _memory(device, softmax_layout="TND")
    except RefusedCallError as error:
        return Finding("refused", {"error": str(error)})


def _memory(device: torch.device, **more: Any) -> Finding:
    q, k, v, _ = pack(LENGTHS)
    out, largest, total = forward(device, q, k, v, LENGTHS, **more)
    wanted = each(q, k, v, LENGTHS)
    by_sequence = torch.cat([one[0] for one, _, _ in wanted])
    right = nearest(out, {RIGHT: by_sequence}, IN_BF16)
    if right.answer != RIGHT:
        return Finding("the result itself is not right", right.details)
    lse = largest.reshape(-1, 8)[:, 0] + total.reshape(-1, 8)[:, 0].log()
    return nearest(lse, layouts([(m + s.log()) for _, m, s in wanted]), OF_LSE)


def gradient(device: torch.device) -> Finding:
    """With the statistics that ascend.fusion makes of the logsumexp."""
    q, k, v, grad = pack(LENGTHS)
    wanted = each(q, k, v, LENGTHS)
    out = torch.cat([one[0] for one, _, _ in wanted]).bfloat16()
    lse_HT = torch.cat([(m + s.log())[0] for _, m, s in wanted], 1).float()
    largest, total = statistics_of_pack(lse_HT.to(device), [rows for rows, _ in LENGTHS])
    operands = (t.to(device) for t in (q, k, v, grad))
    found = taken(
        torch.ops.npu.npu_fusion_attention_grad, *operands, HEADS, "TND", softmax_max=largest, softmax_sum=total,
        attention_in=out.to(device), scale_value=SCALE, **ends(LENGTHS),
    )[:3]  # fmt: skip
    parts = (apart(t, LENGTHS, side) for t, side in ((grad, 0), (q, 0), (k, 1), (v, 1)))
    by_sequence = [formulas.gradients(*operands, SCALE) for operands in zip(*parts, strict=True)]
    whole = [torch.cat([g[0] for g in gradients]) for gradients in zip(*by_sequence, strict=True)]
    return all_of({f"d{name}": nearest(a, {RIGHT: b}, IN_BF16) for name, a, b in zip("qkv", found, whole, strict=True)})


def many(device: torch.device) -> Finding:
    lengths = [(3, 5)] * MOST_SEQUENCES
    q, k, v, _ = pack(lengths)
    out, *_ = forward(device, q, k, v, lengths)
    batched = (t.view(MOST_SEQUENCES, -1, HEADS, DIM) for t in (q, k, v))
    return nearest(out.view(MOST_SEQUENCES, 3, HEADS, DIM), {RIGHT: formulas.attention(*batched, SCALE)[0]}, IN_BF16)


def items() -> Iterator[Item]:
    call = "npu_fusion_attention(..., 'TND', actual_seq_qlen=..., actual_seq_kvlen=...)"
    yield Item(
        id="packed/statistics",
        question="How do the statistics of a pack lie in memory?",
        why="ascend.fusion, logsumexp_of_pack and statistics_of_pack: documents say [H, T, 8], published kernels write "
        "a block for each sequence",
        calls=(call,),
        expected={BLOCKS: ""},
        otherwise={
            ONE_BLOCK: f"attention/statistics.py, both functions of packs: a single block; {MATH} for packs until then",
            BY_TOKEN: "attention/statistics.py, both functions of packs: index [:, :, 0]",
        },
        unforeseen=f"{MATH} for packs, and report the details",
        ask=memory,
    )
    yield Item(
        id="packed/softmax-layout",
        question="Is softmax_layout='TND' heeded?",
        why="ascend.fusion leaves it out, since a page of CANN calls it reserved on 950 and older versions ignore it",
        calls=(f"{call[:-1]}, softmax_layout='TND')",),
        expected={
            BY_TOKEN: "statistics.py could use it where CANN is recent; it saves a copy of the statistics",
            BLOCKS: "",
            "refused": "",
        },
        otherwise={},
        unforeseen="none: it is not used",
        ask=memory_by_argument,
    )
    yield Item(
        id="packed/gradient",
        question="Is the gradient of a pack right with the logsumexp for the largest logits, and 1 for the sums?",
        why="ascend.fusion keeps the logsumexp only, which is a sixteenth of the two statistics",
        calls=("npu_fusion_attention_grad(..., 'TND')",),
        expected={RIGHT: ""},
        otherwise={"refused": f"fusion.py, packed_gradients: a dense call for each sequence; {MATH} until then"},
        unforeseen=f"if packed/statistics is as expected, the gradient reads another layout: {MATH} in training",
        ask=gradient,
    )
    yield Item(
        id="packed/many-sequences",
        question=f"Are packs of {MOST_SEQUENCES} sequences taken, and right?",
        why="predicates.py, MOST_SEQUENCES: the least that any page says; one says 2000",
        calls=(call,),
        expected={RIGHT: ""},
        otherwise={"refused": "predicates.py, MOST_SEQUENCES: as the error says"},
        unforeseen=f"predicates.py, MOST_SEQUENCES: halve it until it is right; {MATH} for packs until then",
        ask=many,
    )
