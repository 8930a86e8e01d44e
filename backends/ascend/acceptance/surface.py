"""What is no operator of a contract: fp64, memory, and 8-bit codes between two NPUs."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ospnext.ops.acceptance import CannotAskError, Finding, Item, RefusedCallError
from ospnext.ops.device import Device

from . import ranks
from .calls import taken

MIB = 1 << 20
RANKS = 2
LIMIT = 180.0
_NO_FP64 = (
    "manifest_numeric.py: supports= of every ascend.torch refuses fp64, with a Refusal 'dtype'; where arange, exp, cos "
    "or sin is wrong, models/transformer.py: the embedding of timesteps on the CPU"
)


def fp64(device: torch.device) -> Finding:
    """What ascend.torch and the timestep embedding do, on numbers that fp32 does not hold."""
    x = torch.tensor([1 + 2.0**-40, 3 - 2.0**-45], dtype=torch.float64)
    moved = x.to(device)
    if moved.dtype != torch.float64 or not moved.cpu().equal(x):
        return Finding("becomes fp32", {"dtype": str(moved.dtype)})
    operators: dict[str, Callable[[Tensor], Tensor]] = {
        "add": lambda t: t + t,
        "mul": lambda t: t * t,
        "div": lambda t: 1 / t,
        "bits": lambda t: t.view(torch.int64) >> 3,
        "arange": lambda t: torch.arange(128, dtype=torch.float64, device=t.device) / 128,
        "exp": torch.exp,
        "cos": torch.cos,
        "sin": torch.sin,
    }
    wrong = {}
    for name, operator in operators.items():
        try:
            found, wanted = taken(operator, moved), operator(x)
        except RefusedCallError as error:
            wrong[name] = str(error)
            continue
        if found.dtype != wanted.dtype or not torch.allclose(found, wanted, rtol=1e-14, atol=0):
            wrong[name] = f"{found.dtype} {found[:2].tolist()}, not {wanted[:2].tolist()}"
    return Finding("not computed in fp64" if wrong else "computed in fp64", {"wrong": wrong})


def memory(device: torch.device) -> Finding:
    surface = Device(device)
    surface.synchronize()
    surface.reset_peak_memory()
    before, total, free = surface.peak_memory(), surface.total_memory(), surface.free_memory()
    held = torch.zeros(64 * MIB, dtype=torch.uint8, device=device)
    surface.synchronize()
    risen = surface.peak_memory() - before
    details = {"bytes": held.numel(), "peak rose by": risen, "total": total, "free": free}
    known = free is not None and 0 < free <= total
    return Finding("as asked for" if known and 64 * MIB <= risen <= 66 * MIB else "something else", details)


def exchange(device: torch.device) -> Finding:
    """Two processes, an NPU each, exchange uneven parts of HiF8 codes; each checks what it got."""
    count = torch.get_device_module(device).device_count()
    if count < RANKS:
        raise CannotAskError(f"takes {RANKS} NPUs, and {count} is visible")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = f"from {__name__} import serve; import sys; serve(*map(int, sys.argv[1:]))"
    details = ranks.failures([[sys.executable, "-c", code, str(rank), str(port)] for rank in range(RANKS)], LIMIT)
    return Finding("refused or wrong" if details else "every byte arrives", details)


def serve(rank: int, port: int) -> None:
    """A rank of `exchange`: it sends 3 rows to the first and 5 to the second, and fails unless it receives the same."""
    import torch.distributed as dist

    device = torch.device("npu", rank)
    torch.get_device_module(device).set_device(device)
    dist.init_process_group("hccl", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    parts = [3, 5]
    sent = (torch.arange(8 * 256, dtype=torch.int32) * (rank + 1) % 256).to(torch.uint8).view(8, 256)
    out = torch.zeros(parts[rank] * RANKS, 256, dtype=torch.uint8, device=device)
    dist.all_to_all_single(out, sent.to(device), [parts[rank]] * RANKS, parts)
    all_sent = [
        (torch.arange(8 * 256, dtype=torch.int32) * (r + 1) % 256).to(torch.uint8).view(8, 256) for r in range(RANKS)
    ]
    wanted = torch.cat([t.split(parts)[rank] for t in all_sent])
    assert out.cpu().equal(wanted), f"{int((out.cpu() != wanted).sum())} bytes differ"
    dist.destroy_process_group()


def items() -> Iterator[Item]:
    yield Item(
        id="collective/uint8",
        question="Does HCCL exchange uint8 between two NPUs, in uneven parts?",
        why="ascend.hccl: HiF8 codes travel as uint8, at half the volume of bf16",
        calls=("all_to_all_single of uint8 on 'hccl'",),
        expected={"every byte arrives": ""},
        otherwise={
            "refused or wrong": "collective.py: view codes as int8, or take uint8 out of predicates_collective.py; "
            "OSPNEXT_OPS=collective=ascend.host until then"
        },
        unforeseen="OSPNEXT_OPS=collective=ascend.host",
        ask=exchange,
        seconds=60,
    )
    yield Item(
        id="memory/surface",
        question="Do the peak, the total and the free memory of torch.npu mean what the core takes them for?",
        why="ospnext.ops.device.Device: plans of memory, batching of prompts, bench and tune",
        calls=("torch.npu.max_memory_allocated, reset_peak_memory_stats, mem_get_info, get_device_properties",),
        expected={"as asked for": ""},
        otherwise={},
        unforeseen="give --batch and tiling by hand, and tell which number of the details is wrong",
        ask=memory,
    )
    yield Item(
        id="fp64/operators",
        question="Does the device compute in fp64 with plain PyTorch operators?",
        why="ascend.torch (hif8_encode and others) takes fp64, and models/transformer.py embeds timesteps in it on "
        "the device, while torch_npu turns x.double() into fp32",
        calls=("aten::add, mul, div, view, __rshift__, arange, exp, cos, sin on fp64",),
        expected={"computed in fp64": ""},
        otherwise=dict.fromkeys(("becomes fp32", "not computed in fp64"), _NO_FP64),
        unforeseen=_NO_FP64,
        ask=fp64,
        hardware_only="aten operators compute on the CPU there, which has fp64",
    )
