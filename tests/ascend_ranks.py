"""What `torchrun --nproc-per-node 2 ascend_ranks.py` does on the host NPU: collectives as users call them, what is
refused, and FSDP2. Rank 0 prints a line of JSON: the name of each check -> what went wrong, or nothing."""

from __future__ import annotations

import json
import os
import traceback
import warnings

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ospnext import ops
from ospnext.backends.ascend.communicator import communicator_name
from ospnext.conformance.models import SPARSE, Subject, random_inputs, random_weights
from ospnext.models import OSPNextTransformer
from ospnext.ops.collective_watch import watch
from ospnext.ops.group_store import meet
from ospnext.ops.tolerance import Verdict, judge

RANK = int(os.environ["RANK"])
DEVICE = torch.device("npu", RANK)
SUBJECT = Subject(SPARSE, torch.float32)


def values(*numbers: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(numbers, dtype=dtype, device=DEVICE)


def equal(found: Tensor, *expected: float) -> None:
    assert found.device == DEVICE, found.device
    assert found.tolist() == list(expected), found.tolist()


def refuses(kind: type[Exception], words: str, call, *arguments, **options) -> None:
    try:
        call(*arguments, **options)
    except kind as error:
        assert words in str(error), str(error)
    else:
        raise AssertionError(f"{call.__name__} was not refused; it should say {words!r}")


def check_mesh() -> None:
    """Without a word on backends, as in any training script."""
    assert not dist.is_initialized()
    mesh = init_device_mesh("npu", (2,), mesh_dim_names=("dp",))
    assert mesh.get_local_rank() == RANK == torch.accelerator.current_device_index()
    assert dist.get_backend_config() == "npu:hccl"
    both = dist.new_group(backend="cpu:gloo,npu:hccl")
    for device in ("cpu", DEVICE):
        x = torch.ones(1, device=device)
        dist.all_reduce(x, group=both)
        assert x.item() == 2


def check_meeting() -> None:
    """Ranks tell each other by the store of a group that torch_npu has made, which does not know it."""
    assert dist.group.WORLD is not None and dist.group.WORLD.get_group_store() is None
    assert meet("meeting", str(RANK), None, 30.0) == ["0", "1"]
    with watch(30.0):
        x = ops.collective.all_reduce(torch.ones(1, device=DEVICE))
    equal(x, 2)


def check_reductions() -> None:
    for op, expected in (("SUM", (3, 21)), ("AVG", (1.5, 10.5)), ("MAX", (2, 20)), ("MIN", (1, 1))):
        x = values(RANK + 1, 20 if RANK else 1)
        dist.all_reduce(x, getattr(dist.ReduceOp, op))
        equal(x, *expected)
    x = values(1, 255, dtype=torch.uint8)  # which HCCL casts before it reduces
    dist.all_reduce(x, dist.ReduceOp.MAX)
    equal(x, 1, 255)
    out = values(0)
    for op, expected in (("SUM", (3, 21)), ("AVG", (1.5, 10.5)), ("MAX", (2, 11))):
        dist.reduce_scatter(out, [values(1 + RANK), values(10 + RANK)], getattr(dist.ReduceOp, op))
        equal(out, expected[RANK])
        dist.reduce_scatter_tensor(out, values(1 + RANK, 10 + RANK), getattr(dist.ReduceOp, op))
        equal(out, expected[RANK])
    x = values(RANK + 1)
    dist.reduce(x, 1)
    assert not RANK or x.item() == 3


def check_movements() -> None:
    """Bits of any type, whatever gloo calls them."""
    for dtype in (torch.float8_e4m3fn, torch.int16, torch.bool, torch.bfloat16, torch.float64):
        mine = torch.tensor([0, 1, 0] if RANK else [1, 0, 0], device=DEVICE).to(dtype)
        parts = [torch.empty_like(mine) for _ in range(2)]
        dist.all_gather(parts, mine)
        assert [part.float().tolist() for part in parts] == [[1, 0, 0], [0, 1, 0]], (dtype, parts)
    given = [values(10), values(11)] if RANK else [values(0, 0), values(1)]
    parts = [torch.empty(2 - max(RANK, source), device=DEVICE) for source in range(2)]
    dist.all_to_all(parts, given)
    assert [part.tolist() for part in parts] == ([[1], [11]] if RANK else [[0, 0], [10]])
    out = values(0)
    dist.scatter(out, None if RANK else [values(5), values(6)])
    equal(out, 5 + RANK)
    parts = None if RANK else [values(0), values(0)]
    dist.gather(values(RANK + 1), parts)
    assert RANK or [part.item() for part in parts] == [1, 2]


def check_objects() -> None:
    found = [None, None]
    dist.all_gather_object(found, {"rank": RANK})
    assert found == [{"rank": 0}, {"rank": 1}]


def check_both_send_first() -> None:
    mine, theirs = values(RANK + 1, 7), values(0, 0)
    works = [dist.isend(mine, 1 - RANK), dist.irecv(theirs, 1 - RANK)]
    del mine
    for work in works:
        work.wait()
    equal(theirs, 2 - RANK, 7)


def check_functional() -> None:
    x = values(*(RANK * 10 + i for i in range(4))).requires_grad_()
    out = functional.all_to_all_single_autograd(x, None, None, dist.group.WORLD)
    equal(out, 2 * RANK, 2 * RANK + 1, 10 + 2 * RANK, 11 + 2 * RANK)
    out.square().sum().backward()
    equal(x.grad, *(2 * v for v in x.tolist()))
    gathered = functional.all_gather_into_tensor_coalesced([values(RANK), values(5 + RANK)], dist.group.WORLD)
    assert [part.tolist() for part in gathered] == [[0, 1], [5, 6]]


def check_refusals() -> None:
    """The vendor's own words, of its real front end; then what is not emulated, and what this backend asks for."""
    x = torch.ones(4, 4, device=DEVICE)
    refuses(RuntimeError, "Unsupported data type", dist.all_reduce, x.to(torch.float8_e4m3fn))
    refuses(RuntimeError, "Unsupported data type", dist.reduce_scatter, x[0, :2].byte(), [x[0, :2].byte()] * 2)
    refuses(RuntimeError, "ReduceOp.BAND", dist.all_reduce, x.int(), dist.ReduceOp.BAND)
    refuses(RuntimeError, "Tensors must be contiguous", dist.all_reduce, x[:, :2])
    refuses(RuntimeError, "No backend type associated with device type cpu", dist.all_reduce, torch.ones(1))
    refuses(NotImplementedError, "reductions of int16 are not emulated", dist.all_reduce, x.short())
    refuses(NotImplementedError, "lccl", dist.new_group, backend="lccl")
    exchange = [dist.P2POp(dist.isend, x, 1 - RANK), dist.P2POp(dist.irecv, x.clone(), 1 - RANK)]
    refuses(NotImplementedError, "batch_isend_irecv", dist.batch_isend_irecv, exchange)


def check_communicator_name() -> None:
    first, second = communicator_name(), communicator_name(dist.new_group(backend="hccl"))
    assert first != second and 0 < len(first) < 128
    refuses(ValueError, "backend 'hccl' or 'cpu:gloo,npu:hccl'", communicator_name, dist.new_group(backend="gloo"))


def check_ddp() -> None:
    """It takes the result from the future of the collective."""
    x = torch.arange(6.0).view(2, 3)
    found = []
    for device, mine in ((DEVICE, slice(RANK, RANK + 1)), (torch.device("cpu"), slice(None))):
        linear = torch.nn.Linear(3, 2, bias=False)
        torch.nn.init.constant_(linear.weight, 0.5)
        linear = linear.to(device)
        model = torch.nn.parallel.DistributedDataParallel(linear) if device == DEVICE else linear
        model(x[mine].to(device)).square().mean().backward()
        found.append(linear.weight.grad.cpu())
    assert torch.equal(*found), found


def trained(backend: str, device: torch.device, dtype: torch.dtype, shard: bool = False) -> dict[str, Tensor]:
    """Parameters after three steps of SGD; sharded, each rank sees one of the two samples. Adam would not notice
    gradients that are all twice as large."""
    with ops.use_backend(backend, fallback=()):
        model = OSPNextTransformer(SUBJECT.config)
        weights = {name: value.clone().to(device, dtype) for name, value in random_weights(SUBJECT).items()}
        model.load_state_dict(weights, assign=True)
        if shard:
            mesh = init_device_mesh("npu", (2,))
            for block in model.blocks:
                fully_shard(block.self_attn, mesh=mesh)
                fully_shard(block.ffn, mesh=mesh)
            fully_shard(model, mesh=mesh)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        mine = slice(RANK, RANK + 1) if shard else slice(None)
        latents, timestep, text = (t[mine].to(device) for t in random_inputs(SUBJECT))
        for _ in range(3):
            model(latents.to(dtype), timestep, text.to(dtype)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return {name: (p.full_tensor() if shard else p).detach().cpu() for name, p in model.named_parameters()}


def check_fsdp2() -> None:
    """Sharded over two NPUs, training is the fp64 training of one process up to what fp32 costs on one CPU."""
    found = trained("ascend", DEVICE, torch.float32, shard=True)
    if RANK:
        return
    cpu = torch.device("cpu")
    oracle, yardstick = (trained("reference", cpu, dtype) for dtype in (torch.float64, torch.float32))
    before = random_weights(SUBJECT)

    def change(after: dict[str, Tensor]) -> Tensor:
        return torch.cat([(after[name].double() - before[name].double()).flatten() for name in before])

    verdict: Verdict = judge(change(found).float(), change(oracle), change(yardstick).float())
    assert verdict.ok, verdict


def main() -> None:
    warnings.simplefilter("ignore")
    outcomes = {}
    for name, check in [pair for pair in globals().items() if pair[0].startswith("check_")]:
        try:
            check()
            outcomes[name] = ""
        except Exception:
            outcomes[name] = traceback.format_exc()
    everyone: list = [None, None]
    dist.all_gather_object(everyone, outcomes)
    if RANK == 0:
        print(json.dumps({name: "\n".join(filter(None, (ranks[name] for ranks in everyone))) for name in outcomes}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
