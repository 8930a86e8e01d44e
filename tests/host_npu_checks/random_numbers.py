"""Random numbers: seeds repeat, draws advance, states can be saved."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from compared import DEVICE


def check_seeds_repeat_and_draws_advance() -> None:
    def draws() -> list[list[float]]:
        return [torch.randn(3, device=DEVICE).tolist() for _ in range(2)]

    for seed in (torch.manual_seed, torch.npu.manual_seed, torch.npu.manual_seed_all):
        seed(5)
        first = draws()
        seed(5)
        assert draws() == first
        assert first[0] != first[1]
        seed(6)
        assert draws()[0] not in first
    torch.manual_seed(5)
    assert torch.randn(3).tolist() != first[0], "the device draws what the CPU draws"
    torch.manual_seed(5)
    on_cpu_alone = torch.randn(3).tolist()
    torch.manual_seed(5)
    draws()
    F.dropout(torch.ones(9, device=DEVICE))
    assert torch.randn(3).tolist() == on_cpu_alone, "draws of the device move the CPU's generator"


def check_generators() -> None:
    ours, other = (torch.Generator(DEVICE).manual_seed(seed) for seed in (1, 2))
    first = torch.randn(4, device=DEVICE, generator=ours)
    second = torch.randn(4, device=DEVICE, generator=ours)
    assert not torch.equal(first, second)
    assert not torch.equal(first, torch.randn(4, device=DEVICE, generator=other))
    again = torch.Generator(DEVICE).manual_seed(1)
    assert torch.equal(torch.randn(4, device=DEVICE, generator=again), first)
    state = again.get_state()
    assert torch.equal(torch.randn(4, device=DEVICE, generator=again), second)
    again.set_state(state)
    assert torch.equal(torch.randn(4, device=DEVICE, generator=again), second)
    for draw in (torch.rand, torch.randperm):
        again.manual_seed(3)
        one = draw(50, device=DEVICE, generator=again)
        assert not torch.equal(one, draw(50, device=DEVICE, generator=again))
        again.manual_seed(3)
        assert torch.equal(one, draw(50, device=DEVICE, generator=again))
    on_other_device = torch.randn(4, device="npu:1", generator=torch.Generator("npu:1").manual_seed(1))
    assert torch.equal(on_other_device.cpu(), first.cpu())


def check_numbers_are_spread_as_asked() -> None:
    torch.manual_seed(0)
    x = torch.cat([torch.randn(1000, device=DEVICE) for _ in range(20)])
    assert abs(x.mean()) < 0.03
    assert abs(x.std() - 1) < 0.03
    assert x.unique().numel() > 19_000
    kept = F.dropout(torch.ones(10_000, device=DEVICE), 0.25) != 0
    assert abs(kept.float().mean() - 0.75) < 0.02


def check_states_are_saved_and_forked() -> None:
    torch.manual_seed(0)
    state = torch.npu.get_rng_state()
    first = torch.rand(3, device=DEVICE)
    torch.npu.set_rng_state(state)
    assert torch.equal(torch.rand(3, device=DEVICE), first)
    torch.npu.set_rng_state(state)
    with torch.random.fork_rng(devices=[0], device_type=DEVICE):
        torch.rand(5, device=DEVICE)
    assert torch.equal(torch.rand(3, device=DEVICE), first)
