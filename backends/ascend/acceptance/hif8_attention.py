"""Attention on HiFloat8 codes: scales of blocks, and how probabilities are rounded."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ospnext.numerics import hif8
from ospnext.ops.acceptance import Finding, Item, RefusedCallError

from ..predicates import QUANT_FUSION_SHAPES
from . import formulas
from .calls import nearest, normal, taken, vendors

SCALE = 0.125
P_SCALE = hif8.INFO.max_of_3_bits
AS_DOCUMENTED = "as documented"
BLOCKS_OF_512 = "scales are of 512 tokens each"
UNSCALED, TIMES, OVER, UNROUNDED = (
    "HiF8, without a scale",
    "HiF8 of 15 times them",
    "HiF8 of a 15th of them",
    "not rounded",
)
#: Rounding of the result is 2^-9; a wrong scale is off by a factor, another rounding of probabilities by 1e-2 and more.
SAME_SCALES, SAME_ROUNDING = 2.0**-3, 2.0**-7
COMPOSED = "OSPNEXT_OPS=native_attention=composite, which is 8 bits for q, k and v and bf16 inside"


class Operands:
    """Codes of q, k and v [B, S, H, D] with another scale for each block, and what they stand for.

    Key 0 has the largest logit of every row, so that a kernel which goes over the keys in blocks has the largest from
    the first block on; its value is 0."""

    def __init__(self, shape: Sequence[int], blocks: Sequence[int]) -> None:
        batch, q_len, kv_len, heads, dim = shape
        x = [0.7 * normal(batch, n, heads, dim, seed=seed) for seed, n in enumerate((q_len, kv_len, kv_len))]
        x[0][..., 0], x[1][..., 0], x[1][:, 0, :, 0], x[2][:, 0] = 4.0, 0.0, 12.0, 0.0
        self.scales = []
        for seed, (t, block) in enumerate(zip(x, blocks, strict=True)):
            count = (batch, heads, -(-t.shape[1] // block), 1)
            steps = torch.randint(-2, 2, count, generator=torch.Generator().manual_seed(seed))
            self.scales.append(2.0**steps)
        self._of_tokens = [
            s.repeat_interleave(block, 2)[:, :, : t.shape[1]].transpose(1, 2)
            for s, block, t in zip(self.scales, blocks, x, strict=True)
        ]
        self.codes = [hif8.encode(t / s) for t, s in zip(x, self._of_tokens, strict=True)]

    def by_rounding(self, rows: slice = slice(None)) -> dict[str, Tensor]:
        """The result [B, rows, H, D] under each way of rounding probabilities."""
        every = slice(None)
        q, k, v = (
            hif8.decode(codes[:, part]) * scale[:, part]
            for codes, scale, part in zip(self.codes, self._of_tokens, (rows, every, every), strict=True)
        )
        ways = {UNSCALED: 1.0, TIMES: P_SCALE, OVER: 1 / P_SCALE}
        results = {
            words: formulas.attention(q, k, v, SCALE, rounded=functools.partial(_round_trip, factor))[0]
            for words, factor in ways.items()
        }
        return {**results, UNROUNDED: formulas.attention(q, k, v, SCALE)[0]}


def _round_trip(factor: float, p: Tensor) -> Tensor:
    return hif8.round_to_grid(p * factor) / factor


def infer(device: torch.device, *shape: int) -> tuple[Tensor, Operands]:
    """(the result, what was handed over)."""
    from ..attention.infer_hif8 import BLOCKS, PER_BLOCK

    npu, operands, heads = vendors(), Operands(shape, BLOCKS), shape[3]
    codes = (t.to(device) for t in operands.codes)
    names = ("dequant_scale_query", "dequant_scale_key", "dequant_scale_value")
    scales = {name: t.to(device) for name, t in zip(names, operands.scales, strict=True)}
    modes = dict.fromkeys(("query_quant_mode", "key_quant_mode", "value_quant_mode"), PER_BLOCK)
    dtypes = dict.fromkeys(("query_dtype", "key_dtype", "value_dtype"), npu.hifloat8)
    out, _ = taken(
        npu.npu_fused_infer_attention_score_v2, *codes, num_query_heads=heads, num_key_value_heads=heads,
        input_layout="BSND", softmax_scale=SCALE, out_dtype=torch.bfloat16, **scales, **modes, **dtypes,
    )  # fmt: skip
    return out, operands


def infer_scales(device: torch.device) -> Finding:
    out, operands = infer(device, 2, 300, 700, 2, 64)
    return nearest(out, {AS_DOCUMENTED: operands.by_rounding()[UNROUNDED]}, SAME_SCALES)


def infer_probabilities(device: torch.device) -> Finding:
    out, operands = infer(device, 2, 300, 700, 2, 64)
    return nearest(out, operands.by_rounding(), SAME_ROUNDING)


def infer_one_query(device: torch.device) -> Finding:
    out, operands = infer(device, 1, 1, 700, 2, 64)
    return nearest(out, {"taken": operands.by_rounding()[UNROUNDED]}, SAME_SCALES)


def fusion(device: torch.device, operands: Operands, **more: Any) -> Tensor:
    from ..attention import fakes  # noqa: F401  (the vendor's own raise NameError)

    npu = vendors()
    codes = (t.to(device) for t in operands.codes)
    names = ("d_scale_q", "d_scale_k", "d_scale_v")
    scales = {name: t.to(device) for name, t in zip(names, operands.scales, strict=True)}
    p_scale = torch.full((1,), P_SCALE, device=device)
    named = {"scale": SCALE, "query_dtype": npu.hifloat8, "p_scale": p_scale, **scales, **more}
    heads = operands.codes[0].shape[2]
    return taken(npu.npu_quant_fusion_attention, *codes, heads, "BSND", **named)[0]


@functools.cache
def _documented_shape(device: torch.device) -> tuple[str, Tensor, dict[str, Tensor], dict[str, str]]:
    """(whose scales were taken, some rows of the result, those rows under each way of rounding, what was said of
    scales that were not taken)."""
    from ..attention.quant_fusion import BLOCKS

    rows = slice(0, None, 113)
    shape = QUANT_FUSION_SHAPES[-1]
    refusals: dict[str, str] = {}
    for words, blocks in ((AS_DOCUMENTED, BLOCKS), (BLOCKS_OF_512, (512, 512, 512))):
        operands = Operands(shape, blocks)
        try:
            out = fusion(device, operands)
        except RefusedCallError as error:
            refusals[f"refusal of scales {words}"] = str(error)
            continue
        return words, out[:, rows], operands.by_rounding(rows), refusals
    raise RefusedCallError("; ".join(f"{what}: {text}" for what, text in refusals.items()))


def fusion_scales(device: torch.device) -> Finding:
    words, out, by, refusals = _documented_shape(device)
    found = nearest(out, {words: by[UNROUNDED]}, SAME_SCALES)
    return Finding(found.answer, {**found.details, **refusals})


def fusion_probabilities(device: torch.device) -> Finding:
    _, out, by, refusals = _documented_shape(device)
    found = nearest(out, by, SAME_ROUNDING)
    return Finding(found.answer, {**found.details, **refusals})


def fusion_other_shape(device: torch.device) -> Finding:
    from ..attention.quant_fusion import BLOCKS

    operands = Operands((1, 256, 512, 2, 128), BLOCKS)
    return nearest(fusion(device, operands), {"taken": operands.by_rounding()[UNROUNDED]}, SAME_SCALES)


def items_of_950() -> Iterator[Item]:
    infer_call = "npu_fused_infer_attention_score_v2(uint8, ..., *_dtype=290, *_quant_mode=7, dequant_scale_*=...)"
    fusion_call = "npu_quant_fusion_attention(uint8, ..., query_dtype=290, d_scale_*=..., p_scale=15)"
    yield Item(
        id="infer_hif8/scales",
        question="Does mode 7 take one scale for 128 queries, 256 keys and 256 values, [B, H, blocks, 1]?",
        why="ascend.infer_hif8; torch_npu's page calls the dtype arguments reserved, CANN's describes the mode for 950",
        calls=(infer_call,),
        expected={AS_DOCUMENTED: ""},
        otherwise={
            "refused": f"attention/infer_hif8.py, BLOCKS as the error says, or no ascend.infer_hif8; {COMPOSED}"
        },
        unforeseen=f"attention/infer_hif8.py, BLOCKS; until then {COMPOSED}",
        ask=infer_scales,
    )
    yield Item(
        id="infer_hif8/probabilities",
        question="How are probabilities rounded in that mode?",
        why="ascend.infer_hif8: the bound of its contract follows from HiF8 without a scale",
        calls=(infer_call,),
        expected={UNSCALED: "", UNROUNDED: "say in its note that P is not rounded", TIMES: "say so in its note"},
        otherwise={OVER: "as for HiF8 without a scale, with larger errors: see native_attention_bounds.py"},
        unforeseen=f"conformance run --case 'native_attention/*' says whether the bound holds; until then {COMPOSED}",
        ask=infer_probabilities,
    )
    yield Item(
        id="infer_hif8/one-query",
        question="Is a single query taken in that mode?",
        why="ascend.infer_hif8 hands it over twice, since older pages ask for two",
        calls=(infer_call,),
        expected={"refused": "", "taken": "attention/infer_hif8.py: the case of one query can go"},
        otherwise={},
        unforeseen="none: it is handed over twice",
        ask=infer_one_query,
    )
    yield Item(
        id="quant_fusion/scales",
        question="Does npu_quant_fusion_attention take one scale for 128 queries, 256 keys and 512 values?",
        why="ascend.quant_fusion; CANN's page says so, the vendor's own test has 512 for all three",
        calls=(fusion_call,),
        expected={AS_DOCUMENTED: ""},
        otherwise={
            BLOCKS_OF_512: "attention/quant_fusion.py, BLOCKS = (512, 512, 512)",
            "refused": "attention/quant_fusion.py, BLOCKS: as the error says; until then "
            "OSPNEXT_OPS=native_attention=ascend.infer_hif8",
        },
        unforeseen="attention/quant_fusion.py, BLOCKS; until then OSPNEXT_OPS=native_attention=ascend.infer_hif8",
        ask=fusion_scales,
        seconds=15,
    )
    yield Item(
        id="quant_fusion/p-scale",
        question="Is p_scale what probabilities are multiplied by before they become HiF8?",
        why="ascend.quant_fusion hands over 15, so that probabilities down to 2^-7 keep three bits",
        calls=(fusion_call,),
        expected={TIMES: ""},
        otherwise={
            OVER: "attention/quant_fusion.py, P_SCALE = 1 / 15",
            UNSCALED: "attention/quant_fusion.py: P_SCALE does nothing; say so",
            UNROUNDED: "say in its note that P is not rounded",
        },
        unforeseen="conformance run --case 'native_attention/*' says whether the bound holds; until then "
        "OSPNEXT_OPS=native_attention=ascend.infer_hif8",
        ask=fusion_probabilities,
        seconds=15,
    )
    yield Item(
        id="quant_fusion/shapes",
        question="Does npu_quant_fusion_attention refuse all shapes but the two that CANN's sources list?",
        why="predicates.py, QUANT_FUSION_SHAPES",
        calls=(fusion_call,),
        expected={
            "refused": "",
            "taken": "predicates.py, quant_fusion: bounds in the place of two shapes, then conformance run --case "
            "'native_attention/*'",
        },
        otherwise={},
        unforeseen="none: other shapes are not handed over",
        ask=fusion_other_shape,
        hardware_only="the emulated operator takes any shape",
    )
