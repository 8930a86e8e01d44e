"""What a program asks of the device besides operators."""

from __future__ import annotations

import torch
from compared import DEVICE


def check_the_device_surface() -> None:
    from ospnext.ops.device import Device

    device = Device("npu:0")
    assert 2**28 < device.total_memory() == torch.npu.get_device_properties(0).total_memory
    free = device.free_memory()
    assert free is not None
    assert 0 < free <= device.total_memory()
    device.reset_peak_memory()
    before = device.peak_memory()
    block = torch.empty(1 << 24, dtype=torch.uint8, device=DEVICE)
    assert device.peak_memory() - before >= 1 << 24
    in_use = torch.npu.memory_allocated()
    del block
    assert torch.npu.memory_allocated() <= in_use - (1 << 24)
    torch.npu.empty_cache()
    device.synchronize()
    properties = torch.npu.get_device_properties(0)
    assert min(properties.cube_core_num, properties.vector_core_num) > 0
    assert torch.accelerator.current_accelerator().type == DEVICE


def check_devices_streams_and_events() -> None:
    assert torch.npu.device_count() == 8
    assert torch.npu.current_device() == 0
    with torch.npu.device(3):
        assert torch.ones(1, device=DEVICE).device.index == 3
    start, end = (torch.npu.Event(enable_timing=True) for _ in range(2))
    stream = torch.npu.Stream()
    start.record()
    with torch.npu.stream(stream):
        x = torch.randn(200, 200, device=DEVICE)
        for _ in range(20):
            x = x @ x
    x.record_stream(stream)
    torch.npu.current_stream().wait_stream(stream)
    end.record()
    end.synchronize()
    stream.synchronize()
    assert end.query()
    assert 0 < start.elapsed_time(end) < 60_000
