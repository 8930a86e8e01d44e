"""What `torchrun --nproc-per-node 2 ascend_shown_ranks.py N,N` does on the host NPU: each rank is shown one NPU, by its
number on the host, and makes a mesh. Each prints a line of JSON with what it got."""

from __future__ import annotations

import json
import os
import sys

RANK = int(os.environ["RANK"])
os.environ["ASCEND_RT_VISIBLE_DEVICES"] = sys.argv[1].split(",")[RANK]

import torch  # noqa: E402 (what it sees is read when it is imported)
import torch.distributed as dist  # noqa: E402

from ospnext.ops import select  # noqa: E402
from ospnext.ops.collective import all_reduce  # noqa: E402
from ospnext.ops.device import Device, device_of_rank  # noqa: E402
from ospnext.parallel.config import ParallelConfig  # noqa: E402
from ospnext.parallel.mesh import make_mesh, transports  # noqa: E402


def main() -> None:
    chosen: list[str | None] = []
    select.observers.append(lambda decision: chosen.append(decision.chosen_id))
    device = device_of_rank(torch.device("npu"), RANK)
    dist.init_process_group("gloo")
    untold = dist.new_group(backend=transports("npu"))
    all_reduce(torch.ones(1, device=device), group=untold)
    mesh = make_mesh(ParallelConfig(ssp=2), "npu", 60)
    total = all_reduce(torch.full((1,), RANK + 1.0, device=device), group=mesh.replica)
    found = {"rank": RANK, "visible": torch.npu.device_count(), "device": Device("npu").identity()}
    line = json.dumps(found | {"before": chosen[0], "chosen": chosen[-1], "sum": total.item()})
    os.write(1, f"{line}\n".encode())  # at once: ranks share the pipe
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
