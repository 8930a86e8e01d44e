"""Attention on Ascend: what can be said without the vendor's package, and what its operators say on the host NPU."""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from host_npu_child import on_host_npu
from mutants_of_ascend import HONEST, MUTANTS

from ospnext.backends.ascend import MANIFEST, masks
from ospnext.backends.ascend.attention import packs
from ospnext.backends.ascend.attention.packs import Pack, of_ends
from ospnext.backends.ascend.attention.statistics import (
    logsumexp,
    logsumexp_of_pack,
    statistics,
    statistics_of_pack,
)
from ospnext.backends.ascend.soc import generation
from ospnext.conformance.acceptance.ask import items_of
from ospnext.ops.contract import Reason
from ospnext.ops.contracts.attention import AttentionRequest
from ospnext.ops.contracts.native_attention import NativeAttentionRequest
from ospnext.ops.registry import DeviceInfo, load

TESTS = Path(__file__).parent
BF16 = torch.bfloat16


# ---- chips


@pytest.mark.parametrize(
    ("soc", "expected"),
    [
        ("Ascend910B1", "910B"),
        ("Ascend910B2C", "910B"),
        ("Ascend910B4-1", "910B"),
        ("Ascend910_9362", "910C"),
        ("Ascend910_9392", "910C"),
        ("Ascend950PR_9599", "950"),
        ("Ascend950DT_95A1", "950"),
        # Of the generation before, in spite of the name.
        ("Ascend910B", None),
        ("Ascend910A", None),
        ("Ascend910ProB", None),
        ("Ascend310P3", None),
        ("", None),
    ],
)
def test_a_soc_belongs_to_a_generation(soc, expected):
    assert generation(soc) == expected


# ---- masks


def test_a_mask_is_the_vendors():
    key_mask = torch.tensor([[True, False, True], [False, False, False]])
    mask = masks.left_out(key_mask, 2)
    assert mask.shape == (2, 1, 2, 3) and mask.dtype == torch.bool and mask.is_contiguous()
    assert mask[0, 0].tolist() == [[False, True, False]] * 2  # True = left out
    assert mask[1].all()
    assert torch.equal(masks.kept(key_mask, 2), ~mask)
    assert masks.keyless(key_mask).tolist() == [False, True]


def test_masked_keys_hold_nothing():
    key_mask = torch.tensor([[True, False]])
    blanked = masks.blanked(torch.tensor([1.0, torch.nan]).view(1, 2, 1, 1).expand(1, 2, 3, 4), key_mask)
    assert blanked[0, :, 0, 0].tolist() == [1.0, 0.0]


def test_a_mask_is_built_for_text_and_not_for_a_video():
    assert masks.is_small(2, 75_600, 512)
    assert not masks.is_small(1, 75_600, 75_600)


# ---- packs


def pack(q_lens: tuple[int, ...], kv_lens: tuple[int, ...]) -> Pack:
    return of_ends(*([0, *torch.tensor(lens).cumsum(0).tolist()] for lens in (q_lens, kv_lens)))


def test_ends_have_no_leading_zero():
    found = pack((3, 2, 4), (5, 1, 2))
    assert (found.q.ends, found.kv.ends) == ([3, 5, 9], [5, 6, 8])
    assert found.q.whole and found.kv.whole


def test_empty_sequences_are_taken_out():
    """Without queries, without keys, without either, at the ends and in between."""
    found = pack((0, 3, 0, 2, 4, 0), (1, 5, 0, 0, 2, 3))
    assert (found.q.lengths, found.kv.lengths) == ([3, 4], [5, 2])
    assert (found.q.ends, found.kv.ends) == ([3, 7], [5, 7])
    tokens = torch.arange(9.0)
    taken = found.q.take(tokens)
    assert taken.tolist() == [0, 1, 2, 5, 6, 7, 8]
    assert found.q.put(taken, -1.0).tolist() == [0, 1, 2, -1, -1, 5, 6, 7, 8]
    both = torch.stack([tokens, -tokens])
    assert torch.equal(found.q.put(found.q.take(both, dim=1), 7.0, dim=1)[:, 3:5], torch.full((2, 2), 7.0))


def test_nothing_may_be_left():
    assert len(pack((0, 3), (2, 0))) == 0


def by_data(buffer: torch.Tensor, values: torch.Tensor) -> None:
    buffer.data.copy_(values)


def by_memory(buffer: torch.Tensor, values: torch.Tensor) -> None:
    buffer.numpy()[:] = values.numpy()


def by_collective(buffer: torch.Tensor, values: torch.Tensor) -> None:
    torch.distributed.ProcessGroupGloo(torch.distributed.HashStore(), 0, 1).scatter([buffer], [[values]]).wait()


@pytest.mark.parametrize("write", [by_data, by_memory, by_collective])
def test_cu_seqlens_are_what_they_hold_now(write):
    """A preallocated tensor is filled again by what leaves its version as it is."""
    q, k = torch.empty(5, 1, 8), torch.empty(7, 1, 8)
    cu_q, cu_kv = (torch.tensor(ends, dtype=torch.int32) for ends in ([0, 2, 5], [0, 3, 7]))
    assert packs.pack(q, k, cu_q, cu_kv).q.ends == [2, 5]
    version = cu_q._version
    write(cu_q, torch.tensor([0, 4, 5], dtype=torch.int32))
    assert cu_q._version == version
    assert packs.pack(q, k, cu_q, cu_kv).q.ends == [4, 5]


def test_a_tensor_of_both_sides_is_read_once(monkeypatch):
    reads = []
    to_list = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: reads.append(1) or to_list(self))
    tokens, cu = torch.empty(5, 1, 8), torch.tensor([0, 2, 5], dtype=torch.int32)
    assert packs.pack(tokens, tokens, cu, cu).kv.ends == [2, 5] and len(reads) == 1
    with pytest.raises(ValueError, match=r"cu_seqlens_kv must .* the number of tokens, 7"):
        packs.pack(tokens, torch.empty(7, 1, 8), cu, cu)


@pytest.mark.parametrize("ends", [[0, 2, 4], [1, 2, 5], [0, 4, 3, 5], [0, 2, 6]])
def test_wrong_cu_seqlens_are_refused(ends):
    other = torch.tensor([0, *range(1, len(ends) - 1), 7], dtype=torch.int32)
    with pytest.raises(
        ValueError, match="cu_seqlens_q must start at 0, not decrease and end at the number of tokens, 5"
    ):
        packs.pack(torch.empty(5, 1, 8), torch.empty(7, 1, 8), torch.tensor(ends, dtype=torch.int32), other)


# ---- statistics


def test_a_logsumexp_is_statistics_enough():
    logits = torch.randn(2, 3, 5, 11)
    largest, total = (
        t[..., None].expand(*t.shape, 8) for t in (logits.amax(-1), (logits - logits.amax(-1, True)).exp().sum(-1))
    )
    lse = logsumexp(largest, total)
    torch.testing.assert_close(lse, logits.logsumexp(-1))
    again, ones = statistics(lse)
    assert again.shape == (2, 3, 5, 8) and again.is_contiguous() and torch.equal(ones, torch.ones_like(again))
    torch.testing.assert_close((logits - again[..., :1]).exp() / ones[..., :1], logits.softmax(-1))


@pytest.mark.parametrize("logit", [-torch.inf, torch.finfo(torch.float32).min, -10_000.0, 0.0])
def test_rows_without_keys_get_no_probability(logit):
    """Whatever an operator puts in the place of a masked logit."""
    largest, total = statistics(torch.tensor([[-torch.inf]]))
    assert ((torch.tensor(logit) - largest).exp() / total == 0).all()


def test_statistics_of_a_pack_lie_sequence_by_sequence():
    """Their shape is [T, H, 8], their memory a block [H, S, 8] for each sequence."""
    lengths, heads = [3, 1, 2], 2
    lse_HT = torch.randn(heads, 6)
    in_memory = torch.cat([part.reshape(-1) for part in (lse_HT[:, :3], lse_HT[:, 3:4], lse_HT[:, 4:])])
    largest = in_memory.view(6, heads, 1).expand(6, heads, 8).contiguous()
    assert torch.equal(logsumexp_of_pack(largest, torch.ones_like(largest), lengths), lse_HT)
    assert torch.equal(statistics_of_pack(lse_HT, lengths)[0], largest)


# ---- predicates

TAKEN: dict[str, Any] = {
    "attention": AttentionRequest("npu", BF16, 2, 4096, 512, 40, 128),
    "native_attention": NativeAttentionRequest("npu", BF16, 1, 7200, 512, 40, 128),
}
ATTENTION = [i for i in MANIFEST.implementations if i.contract in TAKEN]
HIF8 = [i for i in ATTENTION if i.contract == "native_attention"]


def device(chip: str, **fields: Any) -> DeviceInfo:
    return DeviceInfo("npu", "made up", 8, 1 << 36, chip, **fields)


def reasons(name: str, chip: str, **fields: Any) -> list[Reason]:
    """Why the implementation `name` refuses a request that differs in `fields` from one that it takes."""
    implementation = next(i for i in ATTENTION if i.id == f"ascend.{name}")
    request = dataclasses.replace(TAKEN[implementation.contract], **fields)
    return [line.reason for line in load(implementation.supports)(request, device(chip)) if not line.met]


@pytest.mark.parametrize("chip", ["910B", "910C", "950"])
@pytest.mark.parametrize("name", ["fusion", "infer", "sdpa", "math"])
def test_every_chip_has_attention(name, chip):
    assert reasons(name, chip) == []


@pytest.mark.parametrize("implementation", HIF8, ids=lambda i: i.id)
def test_only_the_950_multiplies_hifloat8(implementation):
    name = implementation.id.removeprefix("ascend.")
    assert reasons(name, "950") == []
    for chip in ("910B", "910C"):
        (reason,) = reasons(name, chip)
        assert (reason.code, reason.got) == ("soc", chip)


@pytest.mark.parametrize("chip", ["910B", "950"])
@pytest.mark.parametrize("implementation", ATTENTION, ids=lambda i: i.id)
def test_each_refusal_is_refused(implementation, chip):
    """The examples of the manifest, on chips that are not here. The suite checks those of the chip that is."""
    if implementation in HIF8 and chip != "950":
        chip = "950"
    taken = TAKEN[implementation.contract]
    supports = load(implementation.supports)
    known = {line.reason.code for line in supports(taken, device(chip))}
    assert known == {refusal.code for refusal in implementation.refusals}
    for refusal in implementation.refusals:
        request = dataclasses.replace(taken, **refusal.request)
        on = dataclasses.replace(device(chip), **refusal.device)
        assert refusal.code in {line.reason.code for line in supports(request, on) if not line.met}, refusal


@pytest.mark.parametrize(
    ("name", "chip", "fields", "code"),
    [
        ("fusion", "910B", {"dtype": torch.float32}, ""),
        ("fusion", "950", {"head_dim": 24}, ""),
        ("fusion", "950", {"packed": True, "batch": 1024}, ""),
        ("fusion", "950", {"packed": True, "batch": 1025}, "batch"),
        ("fusion", "950", {"q_len": 1_000_001}, "length"),
        # The mask is too large to be built: its keys are packed, as far as a pack goes.
        ("fusion", "950", {"key_mask": True, "q_len": 75_600, "kv_len": 75_600}, ""),
        ("fusion", "950", {"key_mask": True, "q_len": 75_600, "kv_len": 75_600, "batch": 14}, "mask"),
        ("fusion", "950", {"key_mask": True, "q_len": 512, "kv_len": 512, "batch": 2000}, "mask"),
        ("fusion", "950", {"key_mask": True, "q_len": 64, "kv_len": 64, "batch": 2000}, ""),
        ("sdpa", "950", {"key_mask": True, "q_len": 75_600, "kv_len": 75_600}, "mask"),
        ("sdpa", "950", {"dtype": torch.float32, "head_dim": 30}, "alignment"),
        ("infer", "950", {"dtype": torch.float32}, "dtype"),
        ("infer", "910B", {"head_dim": 40}, "alignment"),
        ("infer", "950", {"head_dim": 40}, ""),
        ("infer", "910C", {"head_dim": 96}, ""),
        ("infer", "910C", {"head_dim": 96, "packed": True}, "alignment"),
        ("infer", "910B", {"head_dim": 64, "packed": True, "dtype": torch.float16}, ""),
        ("infer", "910B", {"head_dim": 192}, ""),
        ("infer", "910B", {"head_dim": 192, "packed": True}, "alignment"),
        ("infer", "950", {"head_dim": 96, "packed": True}, ""),
        ("infer_hif8", "950", {"head_dim": 256}, "head_dim"),
        ("infer_hif8", "950", {"packed": True, "batch": 3}, ""),
        ("quant_fusion", "950", {"q_len": 57_600, "kv_len": 57_600, "heads": 5}, ""),
        ("quant_fusion", "950", {"q_len": 57_600, "kv_len": 512}, "shape"),
        ("quant_fusion", "950", {"batch": 2}, "shape"),
    ],
)
def test_limits_are_the_vendors(name, chip, fields, code):
    assert [reason.code for reason in reasons(name, chip, **fields)] == ([code] if code else [])


def test_the_order_is_that_of_the_documents():
    of_attention, of_hif8 = ([i.id for i in MANIFEST.offers(name)] for name in TAKEN)
    assert of_attention == ["ascend.fusion", "ascend.infer", "ascend.sdpa", "ascend.math"]
    assert of_hif8 == ["ascend.quant_fusion", "ascend.infer_hif8"]


# ---- on the host NPU


@cache
def said(script: str, *arguments: str) -> Any:
    """What a script of this folder prints, in a process that has the host NPU."""
    done = on_host_npu(str(TESTS / script), *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def judged() -> dict[str, dict[str, list[str]]]:
    return said("judge_mutants.py", "mutants_of_ascend", "MUTANTS", "HONEST")


@pytest.fixture
def found() -> dict[str, Any]:
    return said("ascend_attention_on_host.py")


@pytest.mark.parametrize("name", MUTANTS)
def test_the_suite_finds(name, judged):
    mutant, results = MUTANTS[name], judged[name]
    for check in mutant.kills:
        status, message = results[check]
        assert status == mutant.status, f"{check} lets it pass"
        assert mutant.says in message, f"{check}: {message}"
    for check in mutant.spares:
        assert results[check][0] == "pass", f"{check} has nothing to do with it: {results[check][1]}"


@pytest.mark.parametrize("name", HONEST)
def test_paths_off_the_suite_pass_it(name, judged):
    assert {check: result for check, result in judged[name].items() if result[0] != "pass"} == {}
    assert judged[name].keys() == {*HONEST[name].kills}


def test_strides_do_not_matter(found):
    assert found["strides"] == []


@pytest.mark.parametrize("name", ["fusion", "sdpa"])
def test_no_mask_for_every_head(name, found):
    expected = {"shape": [2, 1, 37, 53], "dtype": "torch.bool", "left_out": [0, 13]}
    assert found["masks"][name] == expected


def test_a_gradient_may_follow_another_forward(found):
    assert 0 < found["gradient"] < 1e-5


def test_a_pack_has_an_end(found):
    assert "at most 1000000 tokens; got 1200000 queries and 9 keys" in found["tokens"]


def test_the_older_chips_are_asked_what_pages_disagree_about():
    """Which packs the operator for inference takes; a 950 takes all."""
    older = {i.id: i for i in items_of("ascend", device("910B"))}
    assert "infer/packed-head-size" not in {i.id for i in items_of("ascend", device("950"))}
    assert "predicates.py, infer" in older["infer/packed-head-size"].otherwise["refused"]
    code = (
        "import torch; from ospnext.conformance.acceptance.ask import ask, items_of; "
        "from ospnext.ops.registry import registry; chip = registry().probe('ascend').device; "
        "(item,) = (i for i in items_of('ascend', chip) if i.id == 'infer/packed-head-size'); "
        "print(chip.capability, ask(item, torch.device('npu'), chip.name)['verdict'])"
    )
    done = on_host_npu("-c", code, HOST_NPU_SOC="Ascend910B4")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "910B as expected"


def test_fakes_are_ours_where_the_wheel_has_none(found):
    of_wheel, ours = found["fakes"]["wheel"], found["fakes"]["ours"]
    assert of_wheel == ["NameError"], "the wheel has a fake kernel of its own now: drop attention/fakes.py"
    assert ours == ["torch.bfloat16", [1, 7200, 40, 128], [1, 40, 7200, 1]]
