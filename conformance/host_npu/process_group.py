"""Collectives of the host NPU, under the name that users give: "hccl". The vendor's own process group sees each call
first and refuses what HCCL refuses (over stub libraries it moves nothing); gloo then moves the memory, which is the
host's.

Calls return when they are done, but for send and receive. What is not here raises: no call may pass that moved no
data."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch import Tensor
from torch._C._distributed_c10d import _create_work_from_future
from torch.distributed import ProcessGroup, ReduceOp, Work

from .aliasing import on_host

#: Bits are moved in a type of their size that gloo knows: neither fp8 nor int16 are among its types.
_CARRIER = {1: torch.uint8, 2: torch.float16, 4: torch.int32, 8: torch.int64}
#: The vendor casts these on the device before it reduces, by a route that needs CANN.
_CAST_FIRST = (torch.uint8, torch.bool)


def register() -> None:
    """Put this group in the place of the vendor's. To be called once, after torch_npu is imported."""
    plugins = dist.Backend._plugins
    vendor = plugins["HCCL"]
    plugins["HCCL"] = vendor._replace(creator_fn=functools.partial(HostProcessGroup, vendor.creator_fn))
    plugins["LCCL"] = plugins["LCCL"]._replace(creator_fn=_refuse_lccl)


def _refuse_lccl(*_: Any) -> ProcessGroup:
    raise NotImplementedError("host NPU: the process group 'lccl' is not emulated; use 'hccl'")


class HostProcessGroup(dist.ProcessGroup):
    """A group for tensors of the device, and of the CPU where the group was asked for both ("cpu:gloo,npu:hccl")."""

    def __init__(self, vendor: Callable[..., Any], options: Any, pg_options: Any) -> None:
        super().__init__(options.group_rank, options.group_size)
        self.vendor = vendor(options, pg_options)
        gloo = dist.ProcessGroupGloo._Options()
        gloo._timeout = options.timeout
        gloo._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1", lazy_init=False)]
        self._moving: list[tuple[Work, list[Tensor]]] = []
        store = dist.PrefixStore("host_npu/", options.store)
        self.gloo = dist.ProcessGroupGloo(store, options.group_rank, options.group_size, gloo)

    # ---- what torch.distributed and torch_npu ask of a group

    def getBackendName(self) -> str:
        return "hccl"

    @property
    def pg_name(self) -> str:
        return c10d._world.pg_names[self]

    @property
    def group_name(self) -> str:
        return self.pg_name

    @property
    def supports_splitting(self) -> bool:
        return False

    @property
    def _device_types(self) -> list[torch.device]:
        return [torch.device(pair.split(":")[0]) for pair in c10d._world.pg_backend_config[self].split(",")]

    def _get_backend(self, device: torch.device) -> Any:
        self._require(device)
        return self if device.type == "npu" else self.gloo

    def _set_default_backend(self, *_: Any) -> None:
        """There is one."""

    def get_hccl_comm_name(self, rank: int, init_comm: bool = True) -> str:
        """As the vendor's, whose stub has no communicator to name."""
        return f"host_npu_{self.pg_name}"

    def set_timeout(self, timeout: timedelta) -> None:
        self.gloo.set_timeout(timeout)

    def shutdown(self) -> None:
        self.vendor.shutdown()

    def abort(self) -> None:
        self.vendor.abort()

    # ---- collectives that reduce

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> Work:
        opts = opts or c10d.AllreduceOptions()
        with self._sum_for_mean(tensors, opts):
            if tensors[0].dtype not in _CAST_FIRST:
                self._ask_vendor("allreduce", tensors, opts)
            return _done(self.gloo.allreduce(self._host(tensors), opts), tensors)

    def reduce(self, tensors: list[Tensor], opts: Any) -> Work:
        with self._sum_for_mean(tensors, opts):
            self._ask_vendor("reduce", tensors, opts)
            return _done(self.gloo.reduce(self._host(tensors), opts), tensors)

    def reduce_scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any = None) -> Work:
        opts = opts or c10d.ReduceScatterOptions()
        with self._sum_for_mean(outputs, opts):
            self._ask_vendor("reduce_scatter", outputs, inputs, opts)
            return _done(self.gloo.reduce_scatter(self._host(outputs), self._host(inputs), opts), outputs)

    def reduce_scatter_single(self, output: Tensor, given: Tensor, opts: Any = None) -> Work:
        opts = opts or c10d.ReduceScatterOptions()
        with self._sum_for_mean([output], opts):
            self._ask_vendor("_reduce_scatter_base", output, given, opts)
            return _done(self.gloo._reduce_scatter_base(self._host(output), self._host(given), opts), [output])

    _reduce_scatter_base = reduce_scatter_single

    # ---- collectives that move

    def broadcast(self, tensors: list[Tensor], opts: Any) -> Work:
        self._ask_vendor("broadcast", tensors, opts)
        return _done(self.gloo.broadcast(self._bits(tensors), opts), tensors)

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> Work:
        opts = opts or c10d.AllgatherOptions()
        self._ask_vendor("allgather", outputs, inputs, opts)
        return _done(self.gloo.allgather(self._bits(outputs), self._bits(inputs), opts), outputs[0])

    def all_gather_single(self, output: Tensor, given: Tensor, opts: Any = None) -> Work:
        opts = opts or c10d.AllgatherOptions()
        self._ask_vendor("_allgather_base", output, given, opts)
        return _done(self.gloo._allgather_base(self._bits(output), self._bits(given), opts), [output])

    _allgather_base = all_gather_single

    def all_to_all_single(
        self, output: Tensor, given: Tensor, receive_splits: list[int], send_splits: list[int], opts: Any = None
    ) -> Work:
        opts = opts or c10d.AllToAllOptions()
        self._ask_vendor("alltoall_base", output, given, receive_splits, send_splits, opts)
        out, sent = self._bits(output), self._bits(given)
        return _done(self.gloo.alltoall_base(out, sent, receive_splits, send_splits, opts), [output])

    alltoall_base = all_to_all_single

    def alltoall(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> Work:
        """gloo has only the form of one tensor, so that the parts are put together here."""
        opts = opts or c10d.AllToAllOptions()
        self._ask_vendor("alltoall", outputs, inputs, opts)
        out, parts = self._bits(outputs), self._bits(inputs)
        sent = torch.cat([part.reshape(-1) for part in parts])
        sizes = [part.numel() for part in out]
        received = sent.new_empty(sum(sizes))
        work = _done(self.gloo.alltoall_base(received, sent, sizes, [part.numel() for part in parts], opts), outputs)
        for part, values in zip(out, received.split(sizes), strict=True):
            part.copy_(values.view_as(part))
        return work

    def scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any) -> Work:
        self._ask_vendor("scatter", outputs, inputs, opts)
        return _done(self.gloo.scatter(self._bits(outputs), self._bits(inputs), opts), outputs)

    def send(self, tensors: list[Tensor], to: int, tag: int) -> Work:
        self._ask_vendor("send", tensors, to, tag)
        return self._under_way(self.gloo.send(self._bits(tensors), to, tag), tensors)

    def recv(self, tensors: list[Tensor], source: int, tag: int) -> Work:
        self._ask_vendor("recv", tensors, source, tag)
        return self._under_way(self.gloo.recv(self._bits(tensors), source, tag), tensors)

    def barrier(self, opts: Any = None) -> Work:
        return _done(self.gloo.barrier(), [])

    # ---- several at once

    def allreduce_coalesced(self, tensors: list[Tensor], opts: Any = None) -> Work:
        return [self.allreduce([tensor], opts) for tensor in tensors][-1]

    def all_gather_single_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> Work:
        return [self.all_gather_single(*pair, opts) for pair in zip(outputs, inputs, strict=True)][-1]

    allgather_into_tensor_coalesced = all_gather_single_coalesced

    def reduce_scatter_single_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> Work:
        return [self.reduce_scatter_single(*pair, opts) for pair in zip(outputs, inputs, strict=True)][-1]

    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced

    def _start_coalescing(self, device: torch.device) -> None:
        raise NotImplementedError("host NPU: calls put off until the end of a block (coalescing) are not emulated")

    def batch_isend_irecv(self, operations: list[str], tensors: list[Tensor], peers: list[int]) -> Work:
        raise NotImplementedError("host NPU: batch_isend_irecv is not emulated; use send and recv")

    # ---- behind the calls

    def _require(self, device: torch.device) -> None:
        """As the vendor's group, which has no place for other devices than it was made for."""
        if device.type not in [known.type for known in self._device_types]:
            raise RuntimeError(f"No backend type associated with device type {device.type}")

    def _ask_vendor(self, name: str, tensors: Any, *arguments: Any) -> None:
        """The checks of the vendor's front end. Results that it copies in are overwritten by what gloo brings."""
        if _first(tensors).device.type == "npu":
            getattr(self.vendor, name)(tensors, *arguments).wait()

    def _host(self, tensors: Any) -> Any:
        """CPU tensors on the same memory, of one tensor or nested lists of them."""
        if isinstance(tensors, Tensor):
            self._require(tensors.device)
            return on_host(tensors)
        return [self._host(part) for part in tensors]

    def _bits(self, tensors: Any) -> Any:
        if isinstance(tensors, Tensor):
            host = self._host(tensors)
            return host.view(_CARRIER[host.dtype.itemsize])
        return [self._bits(part) for part in tensors]

    def _under_way(self, work: Work, tensors: list[Tensor]) -> Work:
        """Two ranks may each send first, so that these return at once; until they are done their memory is kept."""
        self._moving = [pair for pair in self._moving if not pair[0].is_completed()]
        self._moving.append((work, tensors))
        return work

    @contextlib.contextmanager
    def _sum_for_mean(self, results: Sequence[Tensor], opts: Any) -> Iterator[None]:
        """gloo has no mean, and the vendor's front end divides what it has not summed: a mean is a sum, divided."""
        if results[0].dtype == torch.int16:
            raise NotImplementedError("host NPU: reductions of int16 are not emulated: gloo has none")
        mean = opts.reduceOp == ReduceOp.AVG
        if mean:
            opts.reduceOp = ReduceOp.SUM
        yield
        if mean:
            for out in self._host(results):
                out /= self.size()


def _first(tensors: Any) -> Tensor:
    return tensors if isinstance(tensors, Tensor) else _first(tensors[0])


def _done(work: Work, results: list[Tensor]) -> Work:
    """Another one that is done as well: gloo's may bring its result again each time that it is waited for."""
    work.wait()
    devices = [results[0].device] if results and results[0].device.type == "npu" else None
    future: torch.futures.Future[list[Tensor]] = torch.futures.Future(devices=devices)
    future.set_result(results)
    return _create_work_from_future(future)
