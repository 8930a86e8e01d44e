"""The model level of the suite: the reference backend passes with room to spare, and broken models fail by name."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ospnext.conformance import models, oracle_sparse
from ospnext.conformance.check import Target
from ospnext.models import layout
from ospnext.ops import fused
from ospnext.sparse import SkiparsePlan

CHECKS = {check.id: check for check in models.checks()}
REFERENCE = Target("reference", torch.device("cpu"))


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors are tiny: on a busy machine, threads that wait for each other take ten times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def failures(identifier: str) -> list[str]:
    verdicts = CHECKS[f"model/required/{identifier}"].run(REFERENCE)
    return [name for name, verdict in verdicts.items() if not verdict.ok]


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_reference_backend_passes(check):
    verdicts = check.run(REFERENCE)
    assert verdicts
    assert {name: verdict.ratio for name, verdict in verdicts.items() if not verdict.ratio < 1} == {}


def test_every_layer_is_judged():
    sparse = CHECKS["model/required/dual_end-k2-fp32-blocks"].run(REFERENCE)
    kinds = ("full", "full", "token", "group", "token", "group", "full", "full")
    assert list(sparse) == [*(f"block{i}-{kind}" for i, kind in enumerate(kinds)), "velocity"]
    gradients = CHECKS["model/required/dual_end-k2-fp32-backward"].run(REFERENCE)
    assert {"dlatents", "dtext", "dblocks.3.self_attn.q.weight", "dhead.modulation"} <= gradients.keys()
    samples = CHECKS["model/required/dual_end-k2-fp32-sampling"].run(REFERENCE)
    assert list(samples) == ["latents1", "latents2", "latents3", "latents4"]


def test_subsequences_differ_in_length():
    """So the packed kernel runs, and the oracle has pads that it must ignore."""
    for k in (2, 3):
        part = oracle_sparse.pad(torch.ones(1, *models.GRID), k)
        for kind in ("token", "group"):
            assert len(set(oracle_sparse.split(kind, part, k).sum((1, 2, 3)).tolist())) > 1


@pytest.mark.parametrize("shape", ["dual_end-k2", "dual_end-k3"])
def test_a_reversed_switch_is_found_where_the_stream_changes_its_order(shape, monkeypatch):
    correct = SkiparsePlan.switch
    monkeypatch.setattr(SkiparsePlan, "switch", lambda plan, source, target: correct(plan, target, source))
    # The block that writes the stream in the next one's order: blocks 5 to 7 stay in the group order.
    assert failures(f"{shape}-fp32-blocks") == ["block2-token", "block3-group", "block4-token", "velocity"]


@pytest.mark.parametrize("tag", ["fp32", "bf16"])
def test_rotary_tables_in_raster_order_are_found_in_the_first_block(tag, monkeypatch):
    correct = layout.rope_tables
    monkeypatch.setattr(
        layout, "rope_tables", lambda grid, raster, *rest: correct(grid, torch.arange(len(raster)), *rest)
    )
    assert failures(f"dual_end-k2-{tag}-blocks")[0] == "block0-full"
    assert failures("full-fp32-blocks") == []  # there the two orders are one


@pytest.mark.parametrize("tag", ["fp32", "bf16"])
def test_a_rope_of_half_split_pairs_is_found_everywhere(tag, monkeypatch):
    contract = fused._CONTRACTS["rms_norm_rope"]
    broken = dataclasses.replace(contract.composite, forward=rms_norm_rope_of_halves)
    monkeypatch.setitem(fused._CONTRACTS, "rms_norm_rope", dataclasses.replace(contract, composite=broken))
    found = failures(f"dual_end-k2-{tag}-blocks")
    assert len(found) == 9
    assert failures(f"dual_end-k2-{tag}-sampling") == ["latents1", "latents2", "latents3", "latents4"]
    assert {"dblocks.0.self_attn.q.weight", "dlatents"} <= set(failures(f"dual_end-k2-{tag}-backward"))


def rms_norm_rope_of_halves(x_BNC: Tensor, weight: Tensor, cos_NP: Tensor, sin_NP: Tensor, eps: float) -> Tensor:
    """Channel i of a head is paired with i + D/2, as other models do it."""
    normed_BNHD = F.rms_norm(x_BNC.float(), weight.shape, weight.float(), eps).unflatten(-1, (-1, 2 * cos_NP.shape[1]))
    first, second = normed_BNHD.chunk(2, dim=-1)
    cos, sin = cos_NP[:, None], sin_NP[:, None]
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1).to(x_BNC.dtype)
