"""Sharded loading, as the ranks of parallel_training.py run it: values, and the memory that a rank needs for them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from small_models import random_model
from torch.distributed.device_mesh import DeviceMesh

from ospnext.models import QuantPolicy, TransformerConfig, load_transformer, preset, quantize_model, save_transformer
from ospnext.models.loading import check_checkpoint, empty_transformer
from ospnext.models.sharded_loading import load_shards
from ospnext.models.sharding import shard
from ospnext.models.weights.config_files import config_json
from ospnext.models.weights.shapes import parameter_shapes

#: 38 million parameters: 150 MB in fp32, of which a rank of 4 has a quarter.
LARGE = preset("tiny").replace(dim=512, num_heads=8, ffn_dim=4096, num_layers=6, num_full_blocks=0)
HIF8 = QuantPolicy(quant="hif8", quant_attn="hif8")


def write_checkpoints(folder: Path, config: TransformerConfig) -> None:
    """In both namings and of several files, with codes, and a large one."""
    model = random_model(config, dtype=torch.float32)
    save_transformer(model, folder / "official", naming="official", max_shard_size=100_000)
    save_transformer(model.bfloat16(), folder / "diffusers", naming="diffusers", max_shard_size=100_000)
    save_transformer(quantize_model(model, HIF8, store=True), folder / "codes")
    (folder / "large").mkdir()
    zeros = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in parameter_shapes(LARGE).items()}
    save_file(zeros, folder / "large" / "diffusion_pytorch_model.safetensors")
    (folder / "large" / "config.json").write_text(json.dumps(config_json(LARGE, "official")))


def loaded(folder: Path, mesh: DeviceMesh) -> dict[str, Any]:
    """By checkpoint, the tensors that are not those of `load_transformer`."""
    wrong = {}
    for name in ("official", "diffusers", "codes"):
        checked = check_checkpoint(folder / name, dtype=torch.float32)
        model = empty_transformer(checked)
        if name == "official":
            quantize_model(model, HIF8)
        shard(model, mesh, param_dtype=torch.bfloat16)
        load_shards(model, checked)
        expected = load_transformer(folder / name, dtype=torch.float32).state_dict()
        found = {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in model.state_dict().items()}
        wrong[name] = [n for n, t in expected.items() if found[n].dtype != t.dtype or not torch.equal(found[n], t)]
        wrong[name] += [n for n in found if n not in expected]
    return wrong


def memory(folder: Path, mesh: DeviceMesh) -> dict[str, Any]:
    """Bytes by which loading lets a rank grow; on rank 0, also when it loads everything. None where no one can say."""
    checked = check_checkpoint(folder / "large", dtype=torch.float32)
    model = shard(empty_transformer(checked), mesh)
    grown = peak_growth(lambda: load_shards(model, checked))
    shapes = parameter_shapes(LARGE).values()
    return {
        "grown": grown,
        "whole": peak_growth(lambda: load_transformer(folder / "large", dtype=torch.float32))
        if dist.get_rank() == 0
        else None,
        "held": sum(p.to_local().numel() for p in model.parameters()),  # type: ignore[attr-defined]
        "largest": max(torch.Size(shape).numel() for shape in shapes),
    }


def peak_growth(act: Callable[[], Any]) -> int | None:
    """Of resident memory, pages of files among it, over what it was before."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        return None
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    kept = act()
    after = _resident("VmHWM")
    del kept
    return after - before


def _resident(which: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines[which].split()[0])
