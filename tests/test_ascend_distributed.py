"""Several ranks on the host NPU: what torchrun starts, collective cases of the suite, and what HCCL is not asked."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from host_npu_child import on_host_npu

from ospnext.backends.ascend import communicator
from ospnext.backends.ascend.predicates_collective import hccl
from ospnext.ops.contracts.collective import CONTRACT, CollectiveRequest
from ospnext.ops.registry import DeviceInfo

SCRIPT = Path(__file__).with_name("ascend_ranks.py")
NPUS = DeviceInfo("npu", "Ascend950PR_9599", count=8, capability="950")


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    """Of every check of the script, on two ranks."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = on_host_npu(*launcher, str(SCRIPT))
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("check", re.findall(r"^def check_(\w+)", SCRIPT.read_text(encoding="utf-8"), re.MULTILINE))
def test_on_two_ranks(check: str, outcomes: dict[str, str]) -> None:
    assert outcomes[f"check_{check}"] == ""


def test_three_ranks_pass_the_suite(tmp_path: Path) -> None:
    words = ("conformance", "run", "--backend", "ascend", "--case", "collective/required/*-r3-*", "--out", tmp_path)
    done = on_host_npu("-c", "import sys; from ospnext.cli import main; sys.exit(main())", *map(str, words))
    assert done.returncode == 0, done.stdout + done.stderr
    cases = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["cases"]
    found = Counter((case["implementation"], case["status"]) for case in cases)
    every = sum("-r3-" in case.id for case in CONTRACT.cases())
    assert found == {("ascend.hccl", "pass"): every, ("ascend.host", "pass"): every}


@pytest.mark.parametrize(
    ("operation", "dtype", "ranks", "codes"),
    [
        ("all_to_all", torch.uint8, 8, []),
        ("all_gather", torch.float64, 2, []),
        ("all_to_all", torch.float8_e4m3fn, 2, ["dtype"]),
        ("all_reduce", torch.float64, 2, ["dtype"]),
        ("reduce_scatter", torch.bfloat16, 2, []),
        ("broadcast", torch.float32, 9, ["ranks"]),
    ],
)
def test_what_hccl_is_not_asked(operation, dtype, ranks, codes) -> None:
    request = CollectiveRequest("npu", dtype, operation, ranks, elements=8)
    assert [need.reason.code for need in hccl(request, NPUS) if not need.met] == codes


def test_ranks_on_other_hosts_need_no_npu_of_this_one() -> None:
    request = CollectiveRequest("npu", torch.float32, "all_gather", 16, elements=8, local_ranks=8)
    assert all(need.met for need in hccl(request, NPUS))


@pytest.mark.parametrize(("most", "codes"), [(1, []), (2, ["ranks"])])
def test_what_ranks_have_told_each_other_decides(most, codes) -> None:
    """Whether this one sees a single NPU, or all of them."""
    request = CollectiveRequest("npu", torch.float32, "all_gather", 8, elements=8, ranks_per_device=most)
    for device in (NPUS, dataclasses.replace(NPUS, count=1)):
        assert [need.reason.code for need in hccl(request, device) if not need.met] == codes


@pytest.mark.parametrize("shown", ["2,5", "3,3"])
def test_ranks_that_are_each_shown_one_npu(shown: str) -> None:
    """They get HCCL, unless it is the same one."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = on_host_npu(*launcher, str(SCRIPT.with_name("ascend_shown_ranks.py")), shown)
    assert done.returncode == 0, done.stdout + done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    apart = shown == "2,5"
    for number, one in zip(shown.split(","), sorted(found, key=lambda one: one["rank"]), strict=True):
        assert one["visible"] == 1
        assert one["device"].startswith(f"npu {number} of ")
        assert (one["before"], one["sum"]) == ("ascend.host", 3.0)
        assert one["chosen"] == ("ascend.hccl" if apart else "ascend.host")
    assert done.stderr.count("got 2 ranks on one NPU") == (0 if apart else 1)


@pytest.mark.parametrize("name", ["", "x" * 128])
def test_a_communicator_without_a_usable_name_is_an_error(name, monkeypatch) -> None:
    backend = SimpleNamespace(get_hccl_comm_name=lambda rank: name)
    group = SimpleNamespace(_get_backend=lambda device: backend)
    monkeypatch.setattr(communicator.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(communicator.torch, "device", str)  # a PyTorch without torch_npu knows no such device
    with pytest.raises(ValueError, match="operators take names of 1 to 127 characters"):
        communicator.communicator_name(group)
