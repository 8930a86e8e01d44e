"""npu_fusion_attention_v3 and its gradient: the form of npu_fusion_attention that graphs can take and that torch's SDPA
becomes on the generations before Ascend 950. Dense calls only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import attention
from .masks import UNLIMITED
from .rules import is_950, require, require_absent

FORWARD, BACKWARD = "npu_fusion_attention_v3", "npu_fusion_attention_grad_v3"


def npu_fusion_attention_v3(
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
    actual_seq_qlen: Tensor | None = None,
    actual_seq_kvlen: Tensor | None = None,
    sparse_mode: int = 0,
    gen_mask_parallel: bool = True,
    sync: bool = False,
    softmax_layout: str = "",
    sink: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """As npu_fusion_attention, but seed and offset are tensors [1], and there is no last number."""
    require(FORWARD, not is_950(), "Ascend 950 does not have it")
    require_absent(FORWARD, actual_seq_qlen=actual_seq_qlen, actual_seq_kvlen=actual_seq_kvlen)
    *tensors, seed, offset, _ = attention.npu_fusion_attention(
        query,
        key,
        value,
        head_num,
        input_layout,
        pse,
        padding_mask,
        atten_mask,
        scale,
        keep_prob,
        pre_tockens,
        next_tockens,
        inner_precise,
        prefix,
        sparse_mode=sparse_mode,
        softmax_layout=softmax_layout,
        sink=sink,
    )
    return (*tensors, torch.tensor([seed]), torch.tensor([offset]))


def npu_fusion_attention_grad_v3(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dy: Tensor,
    head_num: int,
    input_layout: str,
    *,
    seed: Tensor | None = None,
    offset: Tensor | None = None,
    prefix: Sequence[int] | None = None,
    actual_seq_qlen: Tensor | None = None,
    actual_seq_kvlen: Tensor | None = None,
    **named: Any,
) -> tuple[Tensor, ...]:
    """As npu_fusion_attention_grad; without pse its gradient is an empty tensor."""
    require(BACKWARD, not is_950(), "Ascend 950 does not have it")
    require_absent(BACKWARD, prefix=prefix, actual_seq_qlen=actual_seq_qlen, actual_seq_kvlen=actual_seq_kvlen)
    dq, dk, dv, _, of_sink = attention.npu_fusion_attention_grad(query, key, value, dy, head_num, input_layout, **named)
    return dq, dk, dv, query.new_empty(0), of_sink


KERNELS: dict[str, Callable] = {FORWARD: npu_fusion_attention_v3, BACKWARD: npu_fusion_attention_grad_v3}
