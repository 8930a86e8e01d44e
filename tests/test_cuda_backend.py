"""What of the cuda backend can be judged without a GPU: choices and refusals, masks as packing, FP8 as a carrier.

Kernels are judged by the conformance suite, on a GPU."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ospnext.backends.cuda import MANIFEST
from ospnext.backends.cuda.attention.masked import Packs
from ospnext.backends.cuda.attention.operands import aligned
from ospnext.backends.reference.attention import math
from ospnext.numerics import hif8
from ospnext.numerics.carrier import shift_for, table
from ospnext.ops.contracts import CONTRACTS
from ospnext.ops.contracts.attention import AttentionRequest
from ospnext.ops.contracts.collective import CollectiveRequest
from ospnext.ops.contracts.fused import FusedRequest
from ospnext.ops.contracts.native_attention import NativeAttentionRequest
from ospnext.ops.contracts.quantize import QuantizeRequest
from ospnext.ops.contracts.quantized_linear import QuantizedLinearRequest
from ospnext.ops.policy import Policy
from ospnext.ops.registry import DeviceInfo, Probe, Registry
from ospnext.ops.select import Decision, select

HOPPER = DeviceInfo("cuda", "a Hopper card", 8, capability=(9, 0))
AMPERE = DeviceInfo("cuda", "an Ampere card", 1, capability=(8, 0))


def decide(contract: str, request, device: DeviceInfo = HOPPER, missing: tuple[str, ...] = ()) -> Decision:
    """On a machine with `device`, where all packages but `missing` are installed."""

    class Machine(Registry):
        def probe(self, backend):
            return Probe(device)

        def missing_packages(self, implementation):
            return tuple(name for name in implementation.requires if name in missing)

    return select(CONTRACTS[contract], request, Policy("cuda"), Machine([MANIFEST]))


DENSE = AttentionRequest("cuda", torch.bfloat16, 1, 75_600, 75_600, 40, 128)
LINEAR = QuantizedLinearRequest("cuda", torch.bfloat16, (75_600, 5120, 5120), bias=True)
ROWS = dataclasses.replace(LINEAR, x_granularity="row", weight_granularity="row")
ROUND_TRIP = QuantizeRequest("cuda", torch.bfloat16, (75_600, 5120))
HIDDEN = FusedRequest("cuda", torch.bfloat16, (1, 75_600, 5120))
NATIVE = NativeAttentionRequest("cuda", torch.bfloat16, 1, 64, 64, 40, 128)
MESHED = CollectiveRequest("cuda", torch.bfloat16, "all_to_all", 16, 64, ranks_per_device=1)
NO_PACKAGES = ("flash_attn.cute", "flash_attn_interface", "flash_attn.flash_attn_interface")


@pytest.mark.parametrize(
    ("contract", "request_", "device", "missing", "chosen"),
    [
        ("attention", DENSE, HOPPER, (), "cuda.fa4"),
        ("attention", DENSE, HOPPER, NO_PACKAGES, "cuda.cudnn"),
        ("attention", dataclasses.replace(DENSE, backward=True), HOPPER, NO_PACKAGES, "cuda.flash"),
        ("attention", dataclasses.replace(DENSE, head_dim=80, backward=True), HOPPER, (), "cuda.fa3"),
        ("attention", dataclasses.replace(DENSE, head_dim=80), HOPPER, (), "cuda.fa4"),
        ("attention", dataclasses.replace(DENSE, key_mask=True), HOPPER, NO_PACKAGES, "cuda.flash"),
        ("attention", DENSE, AMPERE, (), "cuda.cudnn"),
        ("attention", dataclasses.replace(DENSE, dtype=torch.float32), HOPPER, (), "cuda.math"),
        ("attention", dataclasses.replace(DENSE, head_dim=20), HOPPER, (), "cuda.math"),
        ("quantized_linear", LINEAR, HOPPER, (), "cuda.fp8_carrier"),
        ("quantized_linear", LINEAR, AMPERE, (), "cuda.bf16_grid"),
        ("quantized_linear", ROWS, HOPPER, (), "cuda.fp8_carrier"),
        (
            "quantized_linear",
            dataclasses.replace(ROWS, carried=True, accumulate="fast"),
            HOPPER,
            (),
            "cuda.fp8_carrier",
        ),
        ("quantized_linear", dataclasses.replace(ROWS, carried=True), AMPERE, (), "cuda.bf16_grid"),
        ("quantized_linear", dataclasses.replace(LINEAR, backward=True), HOPPER, (), "cuda.fp8_carrier"),
        ("quantized_linear", dataclasses.replace(ROWS, backward=True), HOPPER, (), "cuda.bf16_grid"),
        ("quantized_linear", dataclasses.replace(LINEAR, mixed_bias=True), HOPPER, (), "cuda.bf16_grid"),
        ("quantized_linear", dataclasses.replace(LINEAR, dtype=torch.float32), HOPPER, (), "cuda.bf16_grid"),
        ("quantized_linear", dataclasses.replace(LINEAR, accumulate="fp64"), HOPPER, (), "cuda.torch"),
        ("quantized_linear", LINEAR, HOPPER, ("triton",), "cuda.torch"),
        ("hif8_quantize", ROUND_TRIP, HOPPER, (), "cuda.triton"),
        ("hif8_quantize", dataclasses.replace(ROUND_TRIP, granularity="row", carried=True), HOPPER, (), "cuda.triton"),
        ("hif8_quantize", dataclasses.replace(ROUND_TRIP, granularity="channel"), HOPPER, (), "cuda.torch"),
        ("fused.linear_gelu_tanh", HIDDEN, HOPPER, (), "cuda.cublas"),
        ("fused.linear_gelu_tanh", HIDDEN, AMPERE, ("triton",), "cuda.cublas"),
        ("fused.linear_gelu_tanh", dataclasses.replace(HIDDEN, dtype=torch.float32), HOPPER, (), "cuda.torch"),
        ("fused.linear_gelu_tanh", dataclasses.replace(HIDDEN, shape=(0, 5120)), HOPPER, (), "cuda.torch"),
        ("fused.rms_norm_rope", HIDDEN, HOPPER, (), "cuda.triton"),
        ("fused.rms_norm_rope", HIDDEN, HOPPER, ("triton",), "cuda.torch"),
        ("native_attention", NATIVE, HOPPER, (), "cuda.cudnn_fp8"),
        ("collective", CollectiveRequest("cuda", torch.bfloat16, "all_to_all", 8, 64), HOPPER, (), "cuda.nccl"),
        (
            "collective",
            CollectiveRequest("cuda", torch.bfloat16, "all_to_all", 16, 64, local_ranks=8),
            HOPPER,
            (),
            "cuda.nccl",
        ),
        ("collective", CollectiveRequest("cuda", torch.bfloat16, "all_to_all", 2, 64), AMPERE, (), "cuda.host"),
        *(
            ("collective", dataclasses.replace(MESHED, ranks_per_device=most), device, (), chosen)
            for most, device, chosen in ((1, AMPERE, "cuda.nccl"), (2, AMPERE, "cuda.host"), (2, HOPPER, "cuda.host"))
        ),
    ],
)
def test_what_is_chosen(contract, request_, device, missing, chosen):
    assert decide(contract, request_, device, missing).chosen_id == chosen


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (
            CollectiveRequest("cuda", torch.bfloat16, "all_reduce", 2, 64),
            "ranks: got 2 ranks, and 1 GPU that this one sees, want a GPU for each rank; if each sees only its own, a "
            "mesh, for which they tell each other which it is",
        ),
        (
            dataclasses.replace(MESHED, ranks_per_device=2),
            "ranks: got 2 ranks on one GPU, want one rank on each GPU",
        ),
    ],
)
def test_ranks_without_a_gpu_each_are_told_why_not_nccl(request_, reason):
    (nccl,) = (c for c in decide("collective", request_, AMPERE).candidates if c.id == "cuda.nccl")
    assert [str(r) for r in nccl.reasons] == [reason]


PLAIN = {
    "attention": dataclasses.replace(DENSE, q_len=64, kv_len=64),
    "quantized_linear": dataclasses.replace(LINEAR, bias=False),
    "native_attention": NATIVE,
    "hif8_quantize": ROUND_TRIP,
    "hif8_fake_quantize": ROUND_TRIP,
    "collective": CollectiveRequest("cuda", torch.bfloat16, "all_reduce", 2, 64),
}
PLAIN |= {
    name: contract.request("cuda", torch.bfloat16, (2, 203, 96))
    for name, contract in CONTRACTS.items()
    if name.startswith("fused.")
}


@pytest.mark.parametrize("implementation", [i for i in MANIFEST.implementations if i.refusals], ids=lambda i: i.id)
def test_every_refusal_is_given_its_code_and_no_other(implementation):
    """On a GPU the conformance suite does the same for what that GPU takes."""
    plain = PLAIN[implementation.contract]

    def codes(request, device):
        decision = decide(implementation.contract, request, device)
        (candidate,) = (c for c in decision.candidates if c.id == implementation.id)
        return {r.code for r in candidate.reasons}

    assert codes(plain, HOPPER) == set()
    for refusal in implementation.refusals:
        request, device = (dataclasses.replace(t, **c) for t, c in ((plain, refusal.request), (HOPPER, refusal.device)))
        assert refusal.code in codes(request, device), refusal


# ---- a mask as packing


class Plain(Packs):
    """The formula of the reference in the place of a fused kernel, which knows no masks."""

    def attend(self, q, k, v, cu_q, cu_kv, longest, scale, need_lse):
        return math.forward(q, k, v, **_pack(cu_q, cu_kv, longest), scale=scale, need_lse=need_lse)

    def gradients(self, grad_out, q, k, v, out, lse, cu_q, cu_kv, longest, scale):
        return math.backward(grad_out, q, k, v, out, lse, **_pack(cu_q, cu_kv, longest), scale=scale)


def _pack(cu_q, cu_kv, longest):
    return {
        "key_mask": None,
        "cu_seqlens_q": cu_q,
        "cu_seqlens_kv": cu_kv,
        "max_seqlen_q": longest[0],
        "max_seqlen_kv": longest[1],
    }


@pytest.mark.parametrize("scale", [0.3, 0.0])
def test_a_mask_as_packing_is_a_mask(scale):
    generator = torch.Generator().manual_seed(0)
    q, grad = (torch.randn(3, 5, 2, 8, generator=generator) for _ in range(2))
    k, v = (torch.randn(3, 7, 2, 8, generator=generator) for _ in range(2))
    mask = torch.rand(3, 7, generator=generator) < 0.5
    mask[0], mask[1, 3] = False, True  # a sample without any key
    k, v = (t.where(mask[..., None, None], torch.nan) for t in (k, v))
    named = _pack(None, None, (0, 0)) | {"key_mask": mask, "scale": scale}
    expected = math.forward(q, k, v, **named, need_lse=True)
    found = Plain().forward(q, k, v, **named, need_lse=True)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    for one, other in zip(
        Plain().backward(grad, q, k, v, *found, **named), math.backward(grad, q, k, v, *expected, **named), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_operands_are_copied_only_where_a_kernel_would_read_astray():
    x = torch.zeros(2, 6, 4, 16, dtype=torch.bfloat16)
    fused = torch.zeros(2, 6, 3, 4, 16, dtype=torch.bfloat16)[:, :, 2]
    for fits in (x, x.transpose(1, 2), fused, x[:, :1].expand(2, 6, 4, 16)):
        assert aligned(fits).data_ptr() == fits.data_ptr() and aligned(fits).stride() == fits.stride()
    shifted = torch.zeros(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape)
    for astray in (x.transpose(2, 3), x[..., ::2], shifted, torch.zeros(2, 6, 4, 20, dtype=x.dtype)[..., :16]):
        copy = aligned(astray)
        assert copy.is_contiguous() and copy.data_ptr() % 16 == 0 and copy.equal(astray)


# ---- E4M3 as a carrier


@pytest.mark.parametrize(("scale_max", "shift", "exact_from"), [(15.0, 4, 2.0**-12), (224.0, 1, 2.0**-9)])
def test_which_values_e4m3_carries_exactly(scale_max, shift, exact_from):
    assert shift_for(scale_max) == shift
    values = hif8.decode(torch.arange(256, dtype=torch.uint8)).double()
    carried = table(torch.device("cpu"), shift).view(torch.float8_e4m3fn).double() / 2**shift
    within = values.abs() <= scale_max
    exact = within & ((values.abs() >= exact_from) | (values == 0))
    assert exact.sum() > 100 and carried[exact].equal(values[exact])
    below = within & ~exact
    half_a_step = 2.0**-10 / 2**shift  # of E4M3's subnormal numbers
    assert (carried[below] - values[below]).abs().max() <= half_a_step
    beyond = ~(values.abs() * 2**shift <= 448)  # NaN and Inf, too
    assert carried[beyond].isnan().all()
