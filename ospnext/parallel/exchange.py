"""The exchange between token and group subsequences (SSP), and the one that puts a sample together at the end. Every
rank's part is static; see placement.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ospnext.errors import ConfigError
from ospnext.ops import hif8_decode, hif8_quantize
from ospnext.ops.collective import all_gather, all_to_all

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

#: How the stream travels: in its own dtype, or as HiFloat8 codes with a scale for each token.
Payload = Literal["plain", "hif8"]


@dataclass(frozen=True, eq=False)
class Exchange:
    """Rows of a stream to the ranks that own them next. The sender's order is applied before, by the operator that
    writes the stream (`gate_residual`).
    """

    send_splits: tuple[int, ...]
    receive_splits: tuple[int, ...]
    arrange: Tensor | None
    group: ProcessGroup | None
    payload: Payload = "plain"

    def __call__(self, x_BNC: Tensor) -> Tensor:
        """[B, n, C] -> [B, n', C]. With one sample and a plain payload nothing is copied on the way.

        Raises:
            ConfigError: gradients are asked of 8 bits.
        """
        x_NBC = x_BNC.transpose(0, 1)
        if self.payload == "plain":
            arrived = self._all_to_all(x_NBC)
        else:
            if torch.is_grad_enabled() and x_BNC.requires_grad:
                raise ConfigError("an exchange in 8 bits has no gradient: take payload 'plain' for training")
            arrived = _unpacked(self._all_to_all(_packed(x_NBC)), x_BNC.dtype)
        if self.arrange is not None:
            arrived = arrived[self.arrange]
        return arrived.transpose(0, 1)

    def _all_to_all(self, x: Tensor) -> Tensor:
        return all_to_all(x, self.send_splits, self.receive_splits, self.group)


def _packed(x_NBC: Tensor) -> Tensor:
    """uint8 [N, B, C + 4]: codes, and the bytes of the scale of each token."""
    codes, scale = hif8_quantize(x_NBC.contiguous(), granularity="row")
    return torch.cat([codes, scale.view(torch.uint8)], dim=-1)


def _unpacked(packed: Tensor, dtype: torch.dtype) -> Tensor:
    codes, scale = packed[..., :-4], packed[..., -4:].contiguous().view(torch.float32)
    return (hif8_decode(codes.contiguous()) * scale).to(dtype)


@dataclass(frozen=True, eq=False)
class Gather:
    """The parts of all ranks on each of them. Parts are padded to the longest; `leave` int64 [N] picks the tokens in
    raster order, and no padding.
    """

    longest: int
    leave: Tensor
    group: ProcessGroup | None

    def __call__(self, x_BNP: Tensor) -> Tensor:
        """[B, n, P] -> [B, N, P]."""
        padded = F.pad(x_BNP.transpose(0, 1), (0, 0, 0, 0, 0, self.longest - x_BNP.shape[1]))
        return all_gather(padded, self.group)[self.leave].transpose(0, 1)
