"""What items of the Ascend backend answer, with made-up operators on the CPU: refusals, faults, and answers between the
ones that are foreseen."""

from __future__ import annotations

import sys
import time
from types import SimpleNamespace

import pytest
import torch

from ospnext.backends.ascend.acceptance import division, fused, hif8_attention, ranks, surface
from ospnext.backends.ascend.acceptance.calls import NONE, taken
from ospnext.conformance.acceptance.ask import ask, items_of
from ospnext.conformance.host_npu import front_end
from ospnext.numerics import hif8
from ospnext.ops.acceptance import RefusedCallError

CPU = torch.device("cpu")
ITEMS = {item.id: item for item in items_of("ascend", None)}


def raising(text: str):
    def operator(*args, **named):
        raise RuntimeError(text)

    return operator


# ---- what is a refusal


@pytest.mark.parametrize(
    "text",
    [
        "npu_rms_norm:torch_npu/RmsNorm.cpp:61 NPU function error: call aclnnRmsNorm failed, error "
        "code is 161002\n[ERROR] (PID:7) ERR00100 PTA call acl api failed.\nEZ1001: dtype of gamma is not supported",
        "EZ3003: No supported Ops kernel and engine are found for [X], optype [X]: AIcoreEngine does not support it",
        "x1 must be contiguous",
    ],
)
def test_a_device_that_does_not_take_a_call_refuses_it(text):
    with pytest.raises(RefusedCallError, match=r"161002.*gamma|AIcoreEngine|contiguous"):
        taken(raising(text))


@pytest.mark.parametrize(
    "text",
    [
        "ACL stream synchronize failed, error code:507015\nEZ9999: Inner Error!",
        "call aclnnRmsNorm failed, error code is 507015: AI Core execution is abnormal",
        "NPU function error\n\n\n\n\n[Error]: The aicore execution is abnormal.",
        "[Error]: The vector core execution is abnormal.",
        "the task timed out",
        "HCCL timeout",
    ],
)
def test_work_that_fails_is_no_refusal(text):
    with pytest.raises(RuntimeError) as raised:
        taken(raising(text))
    assert type(raised.value) is RuntimeError and str(raised.value) == text


@pytest.mark.parametrize(
    "call",
    [
        lambda: taken(torch.ops.aten.mul.Tensor, torch.ones(1), torch.ones(1), 3, 4),
        lambda: taken(torch.ops.aten.mul.Tensor, torch.ones(1), torch.ones(1), mode=3),
        lambda: taken(torch.ops.aten.mul.Tensor, torch.ones(1)),
        lambda: taken(torch.ops.aten.sum.dim_IntList, torch.ones(1), "rows"),
    ],
    ids=["too many", "unknown", "missing", "type"],
)
def test_a_call_that_does_not_fit_the_schema_is_no_refusal(call):
    with pytest.raises(RuntimeError) as raised:
        call()
    assert not isinstance(raised.value, RefusedCallError)


def test_an_item_that_expects_a_refusal_does_not_take_a_fault_for_one(monkeypatch):
    item = ITEMS["rotary/angles"]
    assert "refused" in item.expected
    for text, verdict in (("cos must be bf16", "as expected"), ("error code is 507015", "could not run")):
        monkeypatch.setattr(fused, "vendors", lambda text=text: SimpleNamespace(npu_rotary_mul=raising(text)))
        record = ask(item, CPU)
        assert record["verdict"] == verdict
        assert text in (record["error"] or record["details"]["error"])


@pytest.fixture
def blocks(monkeypatch):
    """`fusion` takes scales of the given number of tokens only. The vendor's package, which the module of the operator
    imports, is not needed for that."""
    operator = "ospnext.backends.ascend.attention.quant_fusion"
    monkeypatch.setitem(sys.modules, operator, SimpleNamespace(BLOCKS=(128, 256, 512)))
    kept = hif8_attention._documented_shape.__wrapped__
    monkeypatch.setattr(hif8_attention, "_documented_shape", kept)
    monkeypatch.setattr(hif8_attention, "QUANT_FUSION_SHAPES", ((1, 600, 700, 1, 16),))

    def take(only: int | None) -> None:
        def fusion(device, operands):
            count = operands.scales[0].shape[2]
            if only is None or count != -(-600 // only):
                raise RefusedCallError(f"{count} scales of q are not taken")
            return operands.by_rounding()[hif8_attention.TIMES]

        monkeypatch.setattr(hif8_attention, "fusion", fusion)

    return take


@pytest.mark.parametrize("item", ["quant_fusion/scales", "quant_fusion/p-scale"])
def test_the_first_of_two_refusals_is_kept(item, blocks):
    blocks(512)
    record = ask(ITEMS[item], CPU)
    assert (
        record["answer"]
        == {
            "quant_fusion/scales": hif8_attention.BLOCKS_OF_512,
            "quant_fusion/p-scale": hif8_attention.TIMES,
        }[item]
    )
    assert record["details"]["refusal of scales as documented"] == "5 scales of q are not taken"


def test_both_refusals_are_kept(blocks):
    blocks(None)
    record = ask(ITEMS["quant_fusion/scales"], CPU)
    assert record["answer"] == "refused"
    assert "as documented: 5 scales" in record["details"]["error"]
    assert "512 tokens each: 2 scales" in record["details"]["error"]


# ---- quotients at halves


def quantizing(monkeypatch, at_halves):
    """npu_quantize whose codes are right but for quotients that are a half."""

    def npu_quantize(x, scale, zero_points, dtype, axis, div_mode):
        quotient = x / scale[:, None]
        return torch.where(torch.isin(quotient, division.halves()), at_halves(quotient), hif8.encode(quotient))

    monkeypatch.setattr(division, "vendors", lambda: SimpleNamespace(hifloat8=290, npu_quantize=npu_quantize))
    return ask(ITEMS["division/quantize"], CPU)


def below(quotient):
    return hif8.encode(torch.nextafter(quotient, torch.zeros_like(quotient)))


@pytest.mark.parametrize(
    ("at_halves", "answer"),
    [
        (hif8.encode, division.RIGHT),
        (below, division.OFF_BY_A_UNIT),
        (lambda q: torch.where(torch.arange(len(q))[:, None] % 2 == 0, hif8.encode(q), below(q)), "off by a unit"),
        (lambda q: torch.zeros_like(q, dtype=torch.uint8), NONE),
        (lambda q: hif8.encode(2 * q), NONE),
        (lambda q: below(q) - 1, NONE),
    ],
    ids=["right", "below", "some below", "zeros", "twice", "two below"],
)
def test_codes_at_halves_are_off_by_a_unit_or_wrong(monkeypatch, at_halves, answer):
    record = quantizing(monkeypatch, at_halves)
    assert record["answer"].startswith(answer)
    assert record["verdict"] == ("differs" if answer == NONE else "as expected")


# ---- the other formula of GELU


@pytest.mark.parametrize(
    ("of_fp32", "of_bf16", "answer"),
    [("tanh", "tanh", "tanh"), ("none", "none", "erf"), ("tanh", "none", "fp32: tanh; bf16: erf")],
)
def test_gelu_says_which_formula_it_is(monkeypatch, of_fp32, of_bf16, answer):
    def npu_gelu(x, approximate):
        how = of_fp32 if x.dtype == torch.float32 else of_bf16
        return torch.nn.functional.gelu(x.double(), approximate=how).to(x.dtype)

    monkeypatch.setattr(fused, "vendors", lambda: SimpleNamespace(npu_gelu=npu_gelu))
    assert ask(ITEMS["gelu/tanh"], CPU)["answer"] == answer


# ---- sums of gradients


@pytest.mark.parametrize(("kept_in", "answer"), [(torch.float32, "right"), (torch.bfloat16, f"dweight: {NONE}")])
def test_gradients_of_fp32_weights_are_sums_in_fp32(monkeypatch, kept_in, answer):
    def backward(*arguments):
        dx, dweight, dbias = front_end.native_layer_norm_backward(*arguments)
        return dx, dweight.to(kept_in).float(), dbias

    monkeypatch.setattr(torch.ops.aten, "native_layer_norm_backward", backward)
    assert ask(ITEMS["layer_norm/fp32-weight"], CPU)["answer"].endswith(answer)


@pytest.mark.parametrize(
    ("dtype", "shape"), [(torch.float32, (7,)), (torch.float64, (5, 7)), (torch.float32, (3, 5, 7))]
)
@pytest.mark.parametrize("mask", [(True, True, True), (True, False, False), (False, True, True)])
@pytest.mark.parametrize("affine", [True, False])
def test_the_emulated_gradient_of_layer_norm_is_that_of_pytorch(dtype, shape, mask, affine):
    generator = torch.Generator().manual_seed(0)
    x, grad = torch.randn(2, 3, 5, 7, generator=generator, dtype=dtype).mul(2).add(1).chunk(2)
    weight, bias = (torch.randn(2, *shape, generator=generator, dtype=dtype)) if affine else (None, None)
    _, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, 1e-2)
    mask = [mask[0], mask[1] and affine, mask[2] and affine]
    arguments = (grad, x, shape, mean, rstd, weight, bias, mask)
    found = front_end.native_layer_norm_backward(*arguments)
    for one, other in zip(found, torch.ops.aten.native_layer_norm_backward(*arguments), strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other)


# ---- two ranks


def ranks_of(*codes: str) -> list[list[str]]:
    return [[sys.executable, "-c", code] for code in codes]


REFUSED = "print('HCCL does not take uint8'); raise SystemExit(1)"
HANGS = "import time; print('waits', flush=True); time.sleep(60)"


@pytest.mark.parametrize("codes", [(REFUSED, HANGS), (HANGS, REFUSED)], ids=["first", "second"])
def test_a_rank_that_is_refused_ends_the_one_that_waits(codes):
    started = time.monotonic()
    found = ranks.failures(ranks_of(*codes), 50.0)
    refused = codes.index(REFUSED)
    assert found[f"rank {refused}, exit code 1"] == "HCCL does not take uint8"
    assert f"rank {1 - refused}, was still at work" in found
    assert time.monotonic() - started < 30


def test_ranks_that_hang_are_ended_with_what_they_printed():
    with pytest.raises(RuntimeError, match=r"not all 2 ranks ended in 3 s\. .*rank 1, was still at work: waits"):
        ranks.failures(ranks_of("pass", HANGS), 3.0)
    assert ranks.failures(ranks_of("print('x' * 1_000_000)", "pass"), 50.0) == {}


@pytest.mark.parametrize(
    ("said", "verdict"),
    [({"rank 0, exit code 1": "no uint8"}, "differs"), ({}, "as expected")],
    ids=["refused", "fine"],
)
def test_an_exchange_keeps_what_its_ranks_say(monkeypatch, said, verdict):
    monkeypatch.setattr(torch.cpu, "device_count", lambda: 2)
    monkeypatch.setattr(surface.ranks, "failures", lambda commands, limit: said)
    record = ask(ITEMS["collective/uint8"], CPU)
    assert (record["verdict"], record["details"]) == (verdict, said)
