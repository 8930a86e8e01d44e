"""When both branches of guidance share a forward: the rule, and what it is told about a model."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from small_models import SMALL, random_inputs, random_model

from ospnext.diffusion import batches_branches
from ospnext.diffusion.guidance import LAUNCH_BOUND_FLOPS
from ospnext.errors import ConfigError
from ospnext.models import TransformerConfig
from ospnext.models.quantization import QuantPolicy, quantize_model
from ospnext.ops import HiF8Recipe
from ospnext.ops.device import Device
from ospnext.pipelines.branches import batched, block_flops, scales_span_batch

FITTING = {"block_flops": LAUNCH_BOUND_FLOPS / 2, "activations": 10, "free": 10, "scales_span_batch": False}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        ({"block_flops": LAUNCH_BOUND_FLOPS}, False),
        ({"free": 9}, False),
        ({"free": None}, False),
        ({"scales_span_batch": True}, False),
    ],
    ids=["few", "many", "full", "unknown", "shared-scales"],
)
def test_the_rule(change, expected):
    assert batches_branches("auto", **FITTING | change) is expected
    assert batches_branches("on", **FITTING | change) is True
    assert batches_branches("off", **FITTING | change) is False
    with pytest.raises(ConfigError, match="must be one of auto, on, off; got 'maybe'"):
        batches_branches("maybe", **FITTING | change)


def test_videos_keep_the_device_busy_and_previews_do_not():
    """81 frames of 480p against a single frame of it, in the 1.3B model; the 14B one has eight times the work."""
    small, large = TransformerConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30), TransformerConfig()
    preview, video = (1, 30, 52), (21, 30, 52)
    assert block_flops(small, preview, 1) < LAUNCH_BOUND_FLOPS < block_flops(small, video, 1)
    assert block_flops(large, preview, 1) > LAUNCH_BOUND_FLOPS
    assert block_flops(small, preview, 3) == 3 * block_flops(small, preview, 1)


@pytest.mark.parametrize(
    ("policy", "store", "shared"),
    [
        (None, False, False),
        (QuantPolicy("hif8"), True, True),
        (QuantPolicy("hif8"), False, True),
        (QuantPolicy("hif8", recipe=HiF8Recipe(granularity="row")), True, False),
        (QuantPolicy("none", "hif8"), False, True),
        (QuantPolicy("hif8", compat="upstream_bf16"), False, True),
        (QuantPolicy("none", "hif8", compat="upstream_bf16"), False, True),
    ],
    ids=["plain", "stored", "trained", "row", "attention", "upstream", "upstream-attention"],
)
def test_scales_of_a_tensor_are_shared_by_a_batch(policy, store, shared, monkeypatch):
    model = random_model(SMALL.replace(num_layers=2))
    if policy is not None:
        quantize_model(model, policy, store=store)
    assert scales_span_batch(model) is shared
    latents, *_ = random_inputs(model.config, (1, 2, 2))
    assert batched("auto", model, latents) is not shared
    assert batched("on", model, latents)
    for free in (1000, None):
        monkeypatch.setattr(Device, "free_memory", lambda self, free=free: free)
        assert not batched("auto", model, latents)


def test_free_memory_may_be_unknown(monkeypatch):
    """PyTorch has no mem_get_info for some devices, and no /proc/meminfo is there on some systems."""
    device = Device("cpu")
    assert device.free_memory() > 0
    monkeypatch.setattr("ospnext.ops.device._ram", lambda field: 0)
    assert device.free_memory() is None
    device.device, device._module = torch.device("mps"), SimpleNamespace()
    assert device.free_memory() is None
    device._module = SimpleNamespace(mem_get_info=lambda device: (3, 4))
    assert device.free_memory() == 3
