"""A key mask in the vendor's terms: polarity, shape, size and what else a mask leaves to be done. Attention kernels
build no mask themselves.
"""

from __future__ import annotations

from torch import Tensor

#: Bytes of the largest mask that is built, one for each query and key of a sample. Two samples of 75,600 tokens against
#: 512 of text take 77 MB. Beyond it the keys that take part are packed, which costs a copy of them and a wait instead.
MASK_BYTES = 1 << 27

#: "allMask": the mask says all, and pre_tockens and next_tockens say nothing.
SPARSE_MODE = 1
#: Rows without keys are computed as such; their softmax would divide by what is not there otherwise.
INNER_PRECISE = 2


def is_small(batch: int, q_len: int, kv_len: int) -> bool:
    """Whether a mask of [batch, 1, q_len, kv_len] is built."""
    return batch * q_len * kv_len <= MASK_BYTES


def kept(key_mask_BK: Tensor, q_len: int) -> Tensor:
    """bool [B, 1, q_len, K], True = takes part, as PyTorch has it: a smaller one would be expanded for every head."""
    batch, keys = key_mask_BK.shape
    return key_mask_BK[:, None, None].expand(batch, 1, q_len, keys).contiguous()


def left_out(key_mask_BK: Tensor, q_len: int) -> Tensor:
    """bool [B, 1, q_len, K], True = is left out, as atten_mask of the vendor's kernels has it."""
    return kept(~key_mask_BK, q_len)


def blanked(t_BKHD: Tensor, key_mask_BK: Tensor) -> Tensor:
    """Keys or values with zeros where the mask leaves them out: a probability of 0 times NaN would be NaN."""
    return t_BKHD.masked_fill(~key_mask_BK[..., None, None], 0)


def keyless(key_mask_BK: Tensor) -> Tensor:
    """bool [B]: samples without a single key."""
    return ~key_mask_BK.any(dim=1)
