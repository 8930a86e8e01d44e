"""The exchange between token and group subsequences (SSP), and the one that puts a sample together at the end. Every
rank's part is static; see placement.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from ospnext.ops.collective import all_gather, all_to_all

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True, eq=False)
class Exchange:
    """Rows of a stream to the ranks that own them next. The sender's order is applied before, by the operator that
    writes the stream (`gate_residual`).
    """

    send_splits: tuple[int, ...]
    receive_splits: tuple[int, ...]
    arrange: Tensor | None
    group: ProcessGroup | None

    def __call__(self, x_BNC: Tensor) -> Tensor:
        """[B, n, C] -> [B, n', C]. With one sample nothing is copied on the way."""
        arrived = all_to_all(x_BNC.transpose(0, 1), self.send_splits, self.receive_splits, self.group)
        if self.arrange is not None:
            arrived = arrived[self.arrange]
        return arrived.transpose(0, 1)


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
