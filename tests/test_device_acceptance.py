"""`ospnext conformance device-acceptance`: the checklist without a device, all of it on the host NPU, devices that
answer otherwise, and items that end their process."""

from __future__ import annotations

import json
import os
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from host_npu_child import host_npu_variables, on_host_npu

from ospnext.cli import main
from ospnext.cli.doctor import as_text, examine
from ospnext.conformance.acceptance import run as running
from ospnext.conformance.acceptance.ask import ask, items_of
from ospnext.conformance.acceptance.run import Acceptance, succeeded
from ospnext.conformance.host_npu import SENTENCE
from ospnext.errors import BackendUnavailableError
from ospnext.ops.acceptance import REFUSED, CannotAskError, Finding, Item, RefusedCallError
from ospnext.ops.policy import policy_from_env
from ospnext.ops.registry import DeviceInfo, registry

ROOT = Path(__file__).parents[1]
ASCEND = items_of("ascend", None)
COMMAND = ["conformance", "device-acceptance", "--backend", "ascend"]
#: What an emulation cannot answer.
HARDWARE_ONLY = {"fp64/operators", "quant_fusion/shapes"}


def made_up(answer: object = "yes", **more: object) -> Item:
    """An item whose answer is `answer`, or which raises it."""

    def answered(device: torch.device) -> Finding:
        if isinstance(answer, Exception):
            raise answer
        return Finding(str(answer), {"number": float("nan")})

    words = {"id": "a/b", "question": "Is it?", "why": "w", "calls": ("c",), "expected": {"yes": ""}}
    return Item(**words | {"otherwise": {"no": "file.py"}, "unforeseen": "think", "ask": answered} | more)


# ---- without a device


def test_the_checklist_needs_neither_a_device_nor_the_wheel(capsys):
    assert main([*COMMAND, "--dry-run"]) == 0
    text = capsys.readouterr().out
    for item in ASCEND:
        assert f"{item.id}   (" in text and item.question in text and item.unforeseen in text
    assert text.startswith(f"{len(ASCEND)} questions for a device of ascend, in this order; about ")
    assert "torch_npu" not in sys.modules or os.environ.get("HOST_NPU_SOC")
    assert main([*COMMAND, "--dry-run", "--item", "cast/*"]) == 0
    assert capsys.readouterr().out.startswith("2 questions")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([*COMMAND, "--item", "cats/*"], "--item cats/*: ascend has no such item"),
        (
            [*COMMAND[:-1], "cuda"],
            "--backend cuda has no items to ask a device (Manifest.acceptance); with items: ascend",
        ),
        (COMMAND[:2], "required: --backend"),
    ],
)
def test_what_is_asked_for_must_exist(words, told, capsys):
    assert main(words) == 2
    assert told in capsys.readouterr().err


def texts(item: Item) -> str:
    return " ".join([*item.expected.values(), *item.otherwise.values(), item.unforeseen])


@pytest.mark.parametrize("item", ASCEND, ids=lambda item: item.id)
def test_an_item_says_what_follows_from_each_answer(item):
    assert re.fullmatch(r"[a-z0-9_]+/[a-z0-9-]+", item.id)
    assert item.question.endswith("?") and item.why and item.calls and item.expected and item.unforeseen
    assert not item.expected.keys() & item.otherwise.keys()
    for setting in re.findall(r"OSPNEXT_OPS=([^\s;]+?)(?=[,.;:]?(?:\s|$))", texts(item)):
        policy_from_env({"OSPNEXT_OPS": setting, "OSPNEXT_BACKEND": "ascend"}, registry())
    for name in re.findall(r"[\w/]+\.(?:py|md)", f"{texts(item)} {item.why}"):
        places = [*ROOT.glob(f"backends/ascend/**/{name}"), *ROOT.glob(f"ospnext/**/{name}"), *ROOT.glob(name)]
        assert places, name


def test_the_page_of_the_backend_lists_every_item():
    page = (ROOT / "docs" / "ascend.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if re.match(r"\| `[a-z0-9_]+/", line)]
    assert rows == [f"| `{item.id}` | {item.question} | {item.why} |" for item in ASCEND]
    assert f"{len(ASCEND)} questions" in page


def test_ids_are_told_apart_and_older_generations_are_not_asked_for_hif8():
    assert max(Counter(item.id for item in ASCEND).values()) == 1
    older = {item.id for item in items_of("ascend", DeviceInfo("npu", "an A2", capability="910B"))}
    left_out = {item.id.split("/")[0] for item in ASCEND if item.id not in older}
    assert left_out >= {"cast", "quantize", "quant_matmul", "infer", "infer_hif8", "quant_fusion"}
    assert "fusion/mask" in older and "mm/fp32-result" in older


@pytest.mark.parametrize(
    ("item", "emulation", "verdict", "answer", "follows"),
    [
        (made_up(), "", "as expected", "yes", ""),
        (made_up("no"), "", "differs", "no", "file.py"),
        (made_up("maybe"), "", "differs", "maybe", "think"),
        (made_up(RefusedCallError("aclnn says no")), "", "differs", "refused", "think"),
        (made_up(RefusedCallError("aclnn says no"), expected={"refused": ""}), "", "as expected", "refused", ""),
        (made_up(hardware_only="r"), "", "as expected", "yes", ""),
        (made_up(hardware_only="r"), "a device by hand", "could not run", "", ""),
        (made_up(CannotAskError("one NPU")), "", "could not run", "", ""),
        (made_up(ValueError("a bug")), "", "could not run", "", ""),
    ],
)
def test_a_verdict_follows_from_the_answer(item, emulation, verdict, answer, follows):
    record = ask(item, torch.device("cpu"), emulation)
    assert (record["verdict"], record["answer"], record["follows"]) == (verdict, answer, follows)
    json.dumps(record, allow_nan=False)
    failed = verdict == "differs" or "a bug" in record["error"]
    assert succeeded({"items": [record]}) == (not failed)


def test_a_machine_without_an_npu_is_told_what_it_can_do_all_the_same():
    if registry().probe("ascend").available:
        pytest.skip("this machine has an NPU, which the test needs to be absent")
    with pytest.raises(BackendUnavailableError, match=r"--host-npu` judges it(.|\n)*`--dry-run` prints the questions"):
        Acceptance("ascend")
    assert "    without it `ospnext conformance run --backend ascend --host-npu` judges it" in as_text(examine())


# ---- on the host NPU


@pytest.fixture(scope="module")
def on_host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run, by the command."""
    host_npu_variables()
    out = tmp_path_factory.mktemp("acceptance")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        assert main([*COMMAND, "--host-npu", "--out", str(out)]) == 0, (out / "acceptance.json").read_text()
    return out


def test_an_emulated_device_answers_as_documented_and_says_what_it_is(on_host):
    found = json.loads((on_host / "acceptance.json").read_text())
    assert [record["id"] for record in found["items"]] == [item.id for item in ASCEND]
    verdicts = {record["id"]: record["verdict"] for record in found["items"]}
    assert {identifier for identifier, v in verdicts.items() if v != "as expected"} == HARDWARE_ONLY
    assert {verdicts[identifier] for identifier in HARDWARE_ONLY} == {"could not run"}
    assert all(r["error"].startswith("not asked of an emulated device: ") for r in found["items"] if r["excused"])
    assert found["device"]["emulation"] == SENTENCE
    head = (on_host / "acceptance.md").read_text().splitlines()[2]
    assert head.startswith(f"**This run is emulated: answers come from an emulation, not from a device** ({SENTENCE})")


def test_no_answer_is_listed_that_a_part_of_its_item_cannot_give(on_host):
    """Parts of an item answer together where all give the same answer: each has to know every one of them."""
    found = json.loads((on_host / "acceptance.json").read_text())
    seen = set()
    for record in found["items"]:
        listed = {*record["expected"], *record["otherwise"]} - {REFUSED}
        for name, part in record["details"].items():
            if isinstance(part, dict) and "answer" in part:
                (known,) = (set(value) for value in part.values() if isinstance(value, dict))
                assert listed <= known, (record["id"], name, listed - known)
                seen.add(record["id"])
    assert seen >= {"gelu/tanh", "cast/to-hif8", "quant_matmul/one-scale-each", "fusion/head-size", "packed/gradient"}


#: Item -> (what it answers, a word of what is to be changed) where that answer is broken.
WANTED = {
    "cast/to-hif8": ("saturates: NaN 0, Inf 32768", "OSPNEXT_OPS=hif8_encode=ascend.torch"),
    "quantize/codes": ("none of these", "hif8_quantize=ascend.cast"),
    "division/quantize": ("none of these", "swap the two in manifest_numeric.py"),
    "quant_matmul/transposed-views": ("refused", "_dense: copy every operand"),
    "fusion/mask": ("kept", "masks.py, left_out"),
    "packed/statistics": ("one block [H, T, 8]", "statistics.py"),
    "rotary/interleave": ("the other way", "hand over -sin"),
}


def test_a_device_that_answers_otherwise_is_told_so():
    done = on_host_npu(str(Path(__file__).with_name("broken_device_answers.py")))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    allowed = found.pop("quant_matmul/one-scale-each")
    assert (allowed["verdict"], allowed["answer"]) == ("as expected", "in fp32")
    assert "need not be expanded" in allowed["follows"]
    assert found.keys() == WANTED.keys()
    for identifier, (answer, change) in WANTED.items():
        record = found[identifier]
        assert record["verdict"] == "differs", (identifier, record)
        assert answer in record["answer"] and change in record["follows"], (identifier, record)


# ---- items that end their process

DANGEROUS = """
import os, time
from ospnext.ops.acceptance import Finding, Item
from ospnext.ops.registry import DeviceInfo, Manifest, Probe

MANIFEST = Manifest("danger", "made up", ("cpu",), "danger:probe", acceptance="danger:items")

def probe():
    return Probe(DeviceInfo("cpu", "a dangerous device"))

def found(device):
    print("a vendor's library says hello")
    return Finding("yes")

def items(device):
    acts = {"fine": found, "dies": lambda device: os._exit(3), "again": found, "hangs": lambda device: time.sleep(60)}
    for name, act in acts.items():
        yield Item("a/" + name, "Is it?", "w", ("c",), {"yes": ""}, {}, "think", act, seconds=0.1)
"""


def test_an_item_that_ends_its_process_ends_no_other(tmp_path, monkeypatch):
    (tmp_path / "danger.py").write_text(DANGEROUS)
    info = tmp_path / "danger-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: danger\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[ospnext.backends]\ndanger = danger:MANIFEST\n")
    monkeypatch.setattr(running, "LEAST_LIMIT", 1.0)
    variables = {name: value for name, value in os.environ.items() if not name.startswith("OSPNEXT_")}
    acceptance = Acceptance("danger", variables={**variables, "PYTHONPATH": str(tmp_path)}, out=tmp_path / "out")
    records = {record["id"]: record for record in acceptance.run()}
    assert [record["answer"] for record in records.values()] == ["yes", "", "yes", ""]
    assert records["a/dies"]["error"] == "the process died with exit code 3"
    assert records["a/hangs"]["error"] == "no answer in 1 s: the process was ended"
    found = json.loads((tmp_path / "out" / "acceptance.json").read_text())
    assert found["summary"] == {"as expected": 2, "could not run": 2} and not succeeded(found)
    assert (
        "| `a/dies` | Is it? | could not run | the process died with exit code 3 |"
        in (tmp_path / "out" / "acceptance.md").read_text()
    )


# ---- devices that are lost

SCRIPTED = """
import json, os, sys, time

def say(**words):
    print(json.dumps(words), flush=True)

with open(os.environ["STARTS"], "a") as starts:
    starts.write("x")
began = len(open(os.environ["STARTS"]).read())
if 1 < began <= 1 + int(os.environ["DEAD_STARTS"]):
    time.sleep(60)
common = {"why": "w", "question": "Is it?", "calls": [], "expected": {"refused": ""}, "otherwise": {},
          "unforeseen": "u", "estimated_seconds": 0.1, "hardware_only": ""}
items = [{"id": f"a/{n}", **common} for n in range(5)]
say(items=items, environment={"packages": {}, "variables": {}},
    device={"name": "made up", "count": 1, "memory": 0, "emulation": "", "versions": {}})
for line in sys.stdin:
    lost = line.strip() == "a/0"
    say(id=line.strip(), **common, verdict="as expected", answer="refused", follows="", error="", excused=False,
        seconds=0.0, details={"error": "said the device"}, lost=lost)
"""


@pytest.fixture
def scripted(tmp_path, monkeypatch):
    """Records of a run whose first item loses the device; the given number of starts after it hang."""
    (tmp_path / "scripted_worker.py").write_text(SCRIPTED)
    monkeypatch.setattr(running, "WORKER", "scripted_worker")

    def run(dead_starts: int) -> tuple[list[dict], int]:
        starts = tmp_path / "starts"
        variables = {"PYTHONPATH": str(tmp_path), "STARTS": str(starts), "DEAD_STARTS": str(dead_starts)}
        acceptance = Acceptance("danger", variables={**os.environ, **variables})
        monkeypatch.setattr(running, "START_LIMIT", 1.0)
        return list(acceptance.run()), len(starts.read_text())

    return run


def test_an_item_that_loses_the_device_has_no_answer(scripted):
    (first, *others), starts = scripted(dead_starts=0)
    assert (first["verdict"], first["answer"], first["excused"]) == ("could not run", "", False)
    assert "the device took no more work after it" in first["error"] and "'refused'" in first["error"]
    assert first["details"] == {"error": "said the device"}
    assert {record["verdict"] for record in others} == {"as expected"} and starts == 2


@pytest.mark.parametrize(("dead_starts", "answered"), [(1, 3), (60, 0)])
def test_a_device_that_does_not_come_back_is_waited_for_twice(scripted, dead_starts, answered):
    records, starts = scripted(dead_starts)
    assert sum(record["answer"] == "refused" for record in records) == answered
    assert starts == 3
    missed = [record for record in records[1:] if record["verdict"] == "could not run"]
    assert all(
        "the device does not come back: the process that asks the device did not start: no answer in 1 s"
        in record["error"]
        for record in missed
    )
    assert [record["seconds"] for record in missed] == [0] * len(missed)
