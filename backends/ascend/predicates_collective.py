"""What the collectives of Ascend cannot take, as reasons. Pure functions of the request and the device."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ospnext.ops.contract import Need, need
from ospnext.ops.contracts.collective import CollectiveRequest, each_has_a_device
from ospnext.ops.registry import DeviceInfo

#: As documented for HcclAllReduce and HcclReduceScatter. Later chips reduce fp64 as well, though not between machines.
_REDUCED = (torch.float32, torch.bfloat16, torch.float16, torch.int16, torch.int32, torch.int64)
#: As documented for HcclAllGather, HcclAlltoAllV and HcclBroadcast on every generation; bool travels as uint8.
_MOVED = (*_REDUCED, torch.float64, torch.uint8, torch.int8, torch.bool)


def hccl(request: CollectiveRequest, device: DeviceInfo) -> Iterator[Need]:
    """HCCL refuses two ranks on one NPU; each may see its own alone."""
    yield each_has_a_device(request, device, "NPU")
    if request.operation in ("all_reduce", "reduce_scatter"):
        yield need(request.dtype in _REDUCED, "dtype", got=request.dtype, want="fp32, bf16, fp16 or int16 to int64")
    else:
        yield need(request.dtype in _MOVED, "dtype", got=request.dtype, want="fp64 to fp16, bf16, bool or an integer")
