"""`ascend.infer_hif8`: npu_fused_infer_attention_score_v2 on HiFloat8, quantized as the vendor says "per block".

Its probabilities become HiFloat8 without a scale: three bits of mantissa down to 1/8 of the largest of a row, two down
to 1/128."""

from __future__ import annotations

import torch
import torch_npu
from torch import Tensor

from .hif8 import NativeAttention, of_blocks

#: Tokens that share a scale of q, of k and of v.
BLOCKS = (128, 256, 256)
#: The number of "per block" among the ways to quantize.
PER_BLOCK = 7


class InferHiF8(NativeAttention):
    def call(self, q: Tensor, k: Tensor, v: Tensor, scales: tuple[Tensor, ...], scale: float) -> Tensor:
        if q.shape[1] == 1:  # documented for two queries and more
            return self.call(q.expand(-1, 2, -1, -1).contiguous(), k, v, scales, scale)[:, :1]
        codes, heads, hifloat8 = (q, k, v), q.shape[2], torch_npu.hifloat8
        of_q, of_k, of_v = (of_blocks(s, c, block) for s, c, block in zip(scales, codes, BLOCKS, strict=True))
        out, _ = torch.ops.npu.npu_fused_infer_attention_score_v2(
            q, k, v, num_query_heads=heads, num_key_value_heads=heads, input_layout="BSND", softmax_scale=scale,
            dequant_scale_query=of_q, dequant_scale_key=of_k, dequant_scale_value=of_v,
            query_quant_mode=PER_BLOCK, key_quant_mode=PER_BLOCK, value_quant_mode=PER_BLOCK,
            query_dtype=hifloat8, key_dtype=hifloat8, value_dtype=hifloat8, out_dtype=torch.bfloat16,
        )  # fmt: skip
        return out


infer_hif8 = InferHiF8()
