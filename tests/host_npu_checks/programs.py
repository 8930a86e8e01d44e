"""Whole programs: operators with gradients, training, autocast, checkpoints, compiled functions."""

from __future__ import annotations

import copy
from unittest import mock

import torch
import torch.nn.functional as F
from compared import DEVICE, on_both
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def check_operators_compute_as_on_the_cpu() -> None:
    on_both(F.linear, (2, 3, 5), (4, 5), (4,))
    for shapes in [((3, 4), (4, 5)), ((2, 3, 4), (4, 5)), ((4,), (4,)), ((3, 4), (4,)), ((4,), (2, 4, 3))]:
        on_both(torch.matmul, *shapes, tolerance=1e-5)  # the vendor's gradient sums in an order of its own
    on_both(torch.matmul, (2, 1, 3, 4), (5, 4, 6), tolerance=1e-5)
    on_both(lambda x, w: F.conv3d(x, w, padding=1), (1, 2, 4, 6, 6), (3, 2, 3, 3, 3))
    on_both(lambda x, w, b: F.layer_norm(x, (8,), w, b), (3, 8), (8,), (8,), tolerance=2.0**-20)  # in fp32, but ours
    on_both(lambda x, w: F.rms_norm(x, (8,), w, 1e-6), (3, 8), (8,))
    on_both(lambda x: F.softmax(x, -1).pow(2) + F.log_softmax(x, 0), (3, 8))
    on_both(lambda x: F.gelu(x, approximate="tanh") + F.silu(x), (3, 8))
    on_both(lambda q, k: torch.einsum("bnhd,bmhd->bhnm", q, k), (2, 3, 2, 4), (2, 5, 2, 4))
    on_both(lambda x: x.gather(1, x.argsort(1)) + x.sort(0).values, (3, 8))
    on_both(lambda x: F.pad(x, (1, 2)).roll(1, 0).flip(1)[:, [0, 3]].cumsum(0), (3, 8))
    on_both(lambda x: x.masked_fill(x > 0, 2).var(0) + x.amax(0) + x.repeat_interleave(2, 0).mean(0), (3, 8))


def check_a_training_step() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 4))
    x = torch.randn(5, 8)
    weights = []
    for device in ("cpu", DEVICE):
        here = copy.deepcopy(model).to(device)
        optimizer = torch.optim.AdamW(here.parameters(), lr=1e-2, foreach=True)
        for _ in range(3):
            optimizer.zero_grad()
            F.mse_loss(here(x.to(device)), torch.ones(5, 4, device=device)).backward()
            nn.utils.clip_grad_norm_(here.parameters(), 1.0)
            optimizer.step()
        weights.append([p.detach().cpu() for p in here.parameters()])
    for expected, got in zip(*weights, strict=True):
        torch.testing.assert_close(got, expected)


def check_autocast() -> None:
    x, w = torch.randn(2, 4, device=DEVICE), torch.randn(3, 4, device=DEVICE, requires_grad=True)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        y = F.linear(x, w)
        assert y.dtype == torch.bfloat16
        assert F.layer_norm(y, (3,)).dtype == torch.float32
    y.sum().backward()
    assert w.grad.dtype == torch.float32


def check_checkpointing_repeats_its_random_numbers() -> None:
    layer = nn.Linear(64, 64).to(DEVICE)
    for reentrant in (False, True):
        grads = []
        for recompute in (False, True):
            torch.manual_seed(1)
            x = torch.ones(4, 64, device=DEVICE, requires_grad=True)

            def block(t: Tensor) -> Tensor:
                return F.dropout(layer(t), 0.5).tanh()

            out = checkpoint(block, x, use_reentrant=reentrant) if recompute else block(x)
            (out * torch.rand(4, 64, device=DEVICE)).sum().backward()
            grads.append(x.grad)
        assert torch.equal(*grads), f"reentrant={reentrant}"


def check_compiled_functions() -> None:
    for backend in ("eager", "aot_eager"):
        program = torch.compile(lambda x, w: F.gelu(x @ w).sum(1) * 2, backend=backend, fullgraph=True)
        on_both(program, (3, 4), (4, 5))


def check_fp64_is_demoted_where_the_vendor_does() -> None:
    x = torch.ones(2, device=DEVICE)
    assert x.double().dtype == torch.float32, "torch_npu's own conversion changed"
    assert x.cpu().double().dtype == torch.float64


def check_sdpa_goes_to_the_vendors_attention() -> None:
    from ospnext.conformance.host_npu.kernel import Kernel

    q = torch.randn(1, 2, 16, 32, dtype=torch.bfloat16, device=DEVICE)
    run, called = Kernel.__call__, []

    def noted(kernel: Kernel, *args: object, **kwargs: object) -> object:
        called.append(kernel.name)
        return run(kernel, *args, **kwargs)

    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        called.clear()
        with mode(), mock.patch.object(Kernel, "__call__", noted):
            F.scaled_dot_product_attention(q, q, q)
        assert "npu::npu_fusion_attention" in called, called
