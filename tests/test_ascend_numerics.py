"""The quantize and fused families of the Ascend backend: choices and refusals for each generation of NPU, which need
none, and in processes of their own what npu_numerics.py tests, on the host NPU.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ospnext.backends.ascend.manifest_numeric import NUMERIC
from ospnext.conformance import host_npu
from ospnext.ops.contracts import CONTRACTS
from ospnext.ops.contracts.fused import FusedRequest
from ospnext.ops.contracts.hif8_cast import CastRequest
from ospnext.ops.contracts.quantize import QuantizeRequest
from ospnext.ops.contracts.quantized_linear import QuantizedLinearRequest
from ospnext.ops.policy import Policy
from ospnext.ops.registry import DeviceInfo, Manifest, Probe, Registry
from ospnext.ops.select import Decision, select

MANIFEST = Manifest("ascend", "the families of this file", ("npu",), "none", NUMERIC)
A2, A3, A5 = (DeviceInfo("npu", f"an {chip}", capability=chip) for chip in ("910B", "910C", "950"))


def decide(contract: str, request, device: DeviceInfo = A5) -> Decision:
    class Machine(Registry):
        def probe(self, backend):
            return Probe(device)

    return select(CONTRACTS[contract], request, Policy("ascend"), Machine([MANIFEST]))


CAST = CastRequest("npu", torch.bfloat16, (75_600, 5120))
ROUND_TRIP = QuantizeRequest("npu", torch.bfloat16, (75_600, 5120))
LINEAR = QuantizedLinearRequest("npu", torch.bfloat16, (75_600, 5120, 5120), bias=True)
TOKENS = FusedRequest("npu", torch.bfloat16, (2, 75_600, 5120), backward=True)
HEADS = dataclasses.replace(TOKENS, shape=(2, 75_600, 40, 128))
FP64 = {"dtype": torch.float64}


def but(request, **changes):
    return dataclasses.replace(request, **changes)


@pytest.mark.parametrize(
    ("contract", "request_", "on_950", "on_910"),
    [
        ("hif8_encode", CAST, "ascend.cast", "ascend.torch"),
        ("hif8_encode", but(CAST, saturate=True), "ascend.torch", "ascend.torch"),
        ("hif8_encode", but(CAST, **FP64), "ascend.torch", "ascend.torch"),
        ("hif8_decode", CAST, "ascend.cast", "ascend.torch"),
        ("hif8_quantize", ROUND_TRIP, "ascend.quantize", "ascend.torch"),
        ("hif8_quantize", but(ROUND_TRIP, given_amax=True, scale_mode="pow2"), "ascend.quantize", "ascend.torch"),
        ("hif8_quantize", but(ROUND_TRIP, granularity="channel"), "ascend.quantize", "ascend.torch"),
        ("hif8_quantize", but(ROUND_TRIP, carried=True), None, None),
        ("hif8_fake_quantize", but(ROUND_TRIP, dtype=torch.float32), "ascend.quantize", "ascend.torch"),
        ("quantized_linear", LINEAR, "ascend.hif8", "ascend.qdq"),
        ("quantized_linear", but(LINEAR, backward=True, mixed_bias=True), "ascend.hif8", "ascend.qdq"),
        ("quantized_linear", but(LINEAR, x_granularity="row", weight_granularity="row"), "ascend.hif8", "ascend.qdq"),
        ("quantized_linear", but(LINEAR, accumulate="fast"), "ascend.hif8", "ascend.qdq"),
        ("quantized_linear", but(LINEAR, accumulate="fp64"), "ascend.torch", "ascend.torch"),
        ("quantized_linear", but(LINEAR, shape=(0, 5120, 5120)), "ascend.torch", "ascend.torch"),
        ("quantized_linear", but(LINEAR, shape=(8, 5120, 70_000)), "ascend.qdq", "ascend.qdq"),
        ("quantized_linear", but(LINEAR, carried=True), None, None),
        ("fused.rms_norm", TOKENS, "ascend.npu", "ascend.npu"),
        ("fused.rms_norm", but(TOKENS, **FP64), "ascend.torch", "ascend.torch"),
        ("fused.layer_norm_modulate", but(TOKENS, affine=True, modulated=True), "ascend.npu", "ascend.npu"),
        ("fused.rms_norm_rope", TOKENS, "ascend.npu", "ascend.npu"),
        ("fused.rope", HEADS, "ascend.npu", "ascend.npu"),
        ("fused.rope", but(HEADS, shape=(25, 77, 40, 128)), "ascend.npu", "ascend.npu"),
        ("fused.rope", but(HEADS, shape=(1, 77, 4, 896)), "ascend.npu", "ascend.torch"),
        ("fused.rope", but(HEADS, shape=(1, 77, 4, 1026)), "ascend.torch", "ascend.torch"),
        ("fused.gelu_tanh", TOKENS, "ascend.npu", "ascend.npu"),
        # Made of the backend's other operators, or plain PyTorch.
        ("fused.gate_residual", but(TOKENS, gated=True), "composite", "composite"),
        ("fused.linear_gelu_tanh", but(TOKENS, backward=False), "composite", "composite"),
    ],
)
def test_what_is_chosen(contract, request_, on_950, on_910):
    assert [decide(contract, request_, device).chosen_id for device in (A5, A2, A3)] == [on_950, on_910, on_910]


def test_an_emulation_is_named_as_one():
    (qdq,) = (i for i in NUMERIC if i.id == "ascend.qdq")
    assert "emulates HiF8 in bf16: QDQ" in qdq.note


PLAIN = {
    "hif8_encode": CAST,
    "hif8_decode": CAST,
    "hif8_quantize": ROUND_TRIP,
    "hif8_fake_quantize": ROUND_TRIP,
    "quantized_linear": but(LINEAR, bias=False),
    "fused.rope": HEADS,
}


@pytest.mark.parametrize("implementation", [i for i in NUMERIC if i.refusals], ids=lambda i: f"{i.id}-{i.contract}")
def test_every_refusal_is_given_its_code_and_no_other(implementation):
    """On an NPU the conformance suite does the same for what that NPU takes."""
    plain = PLAIN.get(implementation.contract, TOKENS)

    def codes(request, device):
        decision = decide(implementation.contract, request, device)
        (candidate,) = (c for c in decision.candidates if c.id == implementation.id)
        return {r.code for r in candidate.reasons}

    assert codes(plain, A5) == set()
    for refusal in implementation.refusals:
        request, device = (but(t, **changes) for t, changes in ((plain, refusal.request), (A5, refusal.device)))
        assert refusal.code in codes(request, device), refusal


@pytest.mark.parametrize("soc", ["Ascend950PR_9599", "Ascend910B3"])
def test_on_the_host_npu(soc):
    try:
        environment = host_npu.environment({**os.environ, "HOST_NPU_SOC": soc})
    except host_npu.HostNpuUnavailableError as error:
        pytest.skip(str(error))
    # torch comes first: pytest turns the vendor's warnings into errors, and they are not ours to heed.
    code = "import sys, torch, pytest; sys.exit(pytest.main(sys.argv[1:]))"
    arguments = [
        "-o",
        "filterwarnings=",
        "-q",
        "-p",
        "no:cacheprovider",
        str(Path(__file__).with_name("npu_numerics.py")),
    ]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, f"{done.stdout[-8000:]}\n{done.stderr[-2000:]}"
    assert " passed" in done.stdout
