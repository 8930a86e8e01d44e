"""Ranks that each see one GPU tell each other which it is, and exchange as the devices that they hold allow."""

from __future__ import annotations

import socket
from types import SimpleNamespace

import devices_of_ranks
import pytest
import torch
from fake_backends import backend
from rank_processes import results, run_ranks

from ospnext.ops import device
from ospnext.ops.device import Device, device_of_rank
from ospnext.ops.rank_devices import ranks_per_device
from ospnext.ops.registry import DeviceInfo, Probe, Registry, replace_registry

NCCL, HOST = "cuda.nccl", "cuda.host"
APART, SHARED, UNTOLD = (1, NCCL), (2, HOST), (None, HOST)


# ---- among ranks


def test_ranks_that_see_their_own_device_only_get_the_transport_of_devices() -> None:
    for before, after, _ in results(run_ranks(devices_of_ranks.told, 3, ["cuda a", "cuda b", "cuda c"])):
        assert (before, after) == (UNTOLD, APART)


def test_ranks_that_share_a_device_go_through_the_host() -> None:
    """In those groups that hold it twice, and on all ranks of these."""
    groups = [[0, 1], [1, 2], [0, 3], [0, 1, 2]]
    found = results(run_ranks(devices_of_ranks.told, 4, ["cuda a", "cuda b", "cuda a", "cuda c"], groups))
    assert [after for _, after, _ in found] == [SHARED] * 4
    assert [of_groups for _, _, of_groups in found] == [
        [APART, APART, SHARED],
        [APART, APART, SHARED],
        [APART, SHARED],
        [APART],
    ]


@pytest.mark.parametrize(
    ("hosts", "indices", "numbers", "expected"),
    [
        ("aabb", [0, 1, 0, 1], [(), (), (), ()], APART),  # each sees all devices of its host
        ("aabb", [0, 0, 0, 0], [(0,), (1,), (0,), (1,)], APART),  # its own
        ("aabb", [0, 0, 0, 0], [(), (), (), ()], SHARED),
        ("aabb", [0, 1, 0, 0], [(2, 3), (2, 3), (3,), (3,)], SHARED),
        ("abcd", [0, 0, 0, 0], [(), (), (), ()], APART),
    ],
)
def test_hosts_may_number_their_devices_alike(hosts, indices, numbers, expected) -> None:
    assert results(run_ranks(devices_of_ranks.on_hosts, 4, hosts, indices, numbers)) == [expected] * 4


@pytest.mark.parametrize(("then", "now"), [("ab", "cc"), ("aa", "bc")])
def test_a_second_set_up_knows_nothing_of_the_first(then: str, now: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    expected = {"ab": APART, "bc": APART, "aa": SHARED, "cc": SHARED}
    for found in results(run_ranks(devices_of_ranks.set_up_twice, 2, port, list(then), list(now))):
        assert found == (expected[then], UNTOLD, expected[now])


def test_a_command_whose_ranks_need_a_device_each_names_those_that_share() -> None:
    assert results(run_ranks(devices_of_ranks.required, 2, ["cuda a", "cuda b"])) == [None, None]
    held = ["cuda a", "cuda b", "cuda a", "cuda b", "cuda c"]
    (text,) = set(results(run_ranks(devices_of_ranks.required, 5, held)))
    assert text.startswith(
        "ConfigError: each rank needs a device of its own, but there are ranks 0, 2 on cuda a; ranks 1, 3 on cuda b: "
    )


# ---- when a mesh is made


def test_a_mesh_tells_devices_and_has_nothing_to_warn_of() -> None:
    found = results(run_ranks(devices_of_ranks.meshed, 4, {"cfg": 2, "ssp": 2}, list("abcd")))
    assert found == [([], APART)] * 4


def test_a_mesh_that_exchanges_through_the_host_says_so_once() -> None:
    """Here ranks of the second replica do."""
    first, *others = results(run_ranks(devices_of_ranks.meshed, 4, {"dp": 2, "ssp": 2}, list("abcc")))
    ((said,), found) = first
    assert found == APART
    assert others == [([], APART), ([], SHARED), ([], SHARED)]
    assert said == (
        "ranks exchange tensors by cuda.host (gloo through the host: any number of ranks can share a GPU) instead of "
        "cuda.nccl (ranks: got 2 ranks on one GPU, want one rank on each GPU). ranks 2, 3 on c: choose another device "
        "for each before the mesh is made"
    )


def test_ranks_that_make_videos_of_their_own_may_share_a_device() -> None:
    """They exchange nothing."""
    assert [said for said, _ in results(run_ranks(devices_of_ranks.meshed, 2, {"dp": 2}, list("aa")))] == [[], []]


# ---- a process


def on_device(monkeypatch, *, count=2, numbers=(), uuids=None):
    """Devices of a type that no backend here has, in this process; the registry that has them."""
    module = SimpleNamespace(
        current_device=lambda: 0,
        device_count=lambda: count,
        set_device=lambda device: None,
        get_device_properties=lambda index: SimpleNamespace(**({} if uuids is None else {"uuid": uuids[index]})),
    )
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    monkeypatch.setattr(device, "_host", lambda: "node7 (started 1)")

    class Known(Registry):
        def probe(self, backend):
            return Probe(DeviceInfo("xpu", "a device", count, numbers=numbers))

    return Known([backend("acme", device_types=("xpu",))])


@pytest.mark.parametrize(
    ("index", "numbers", "uuids", "expected"),
    [
        ("xpu:1", (), ["5c1f", "77aa"], "xpu 77aa"),
        ("xpu", (3, 5), ["5c1f", "77aa"], "xpu 3 (5c1f) of node7 (started 1)"),
        ("xpu", (3, 5), None, "xpu 3 of node7 (started 1)"),
        ("xpu:1", (3, 5), ["0000-00", "0000-00"], "xpu 5 of node7 (started 1)"),
        ("xpu:1", (3,), None, "xpu 1 of node7 (started 1)"),
        ("xpu:1", (), None, "xpu 1 of node7 (started 1)"),
    ],
)
def test_a_device_is_its_number_on_its_host_or_its_uuid(monkeypatch, index, numbers, uuids, expected) -> None:
    before = replace_registry(on_device(monkeypatch, numbers=numbers, uuids=uuids))
    try:
        assert Device(index).identity() == expected
    finally:
        replace_registry(before)


def test_a_cpu_is_its_host() -> None:
    assert Device("cpu").identity().startswith(f"cpu of {socket.gethostname()}")


def test_a_rank_that_sees_fewer_devices_than_there_are_ranks_takes_one_of_them(monkeypatch) -> None:
    on_device(monkeypatch, count=1)
    assert device_of_rank(torch.device("xpu"), 3) == torch.device("xpu", 0)
    on_device(monkeypatch, count=2)
    assert device_of_rank(torch.device("xpu"), 3) == torch.device("xpu", 1)


def test_nobody_has_told_where_there_is_no_group() -> None:
    assert ranks_per_device("cuda", None) is None
