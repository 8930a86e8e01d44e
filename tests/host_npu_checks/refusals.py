"""What the device refuses, and that no kernel of the vendor is left that would need a real one."""

from __future__ import annotations

import torch
from compared import DEVICE, raises


def check_operands_of_two_places_are_refused() -> None:
    x = torch.ones(2, device=DEVICE)
    with raises(RuntimeError, "same device", "aten::add.Tensor", "other"):
        x + torch.ones(2)
    with raises(RuntimeError, "same device", "aten::cat"):
        torch.cat([x, torch.ones(2)])
    with raises(RuntimeError, "same device"):
        torch.mm(torch.ones(2, 2), torch.ones(2, 2, device=DEVICE))
    assert (x + torch.tensor(2.0)).tolist() == [3, 3]


def check_what_is_not_emulated_says_its_name() -> None:
    import torch_npu

    with raises(NotImplementedError, "npu::npu_ciou"):
        torch_npu.npu_ciou(*torch.rand(2, 4, 4, device=DEVICE), trans=True, is_cross=False)
    with raises(NotImplementedError, "aten::_masked_scale"):
        torch.ops.aten._masked_scale(torch.ones(2, device=DEVICE), torch.ones(2, device=DEVICE).byte(), 1.0)


def check_every_kernel_is_replaced() -> None:
    """Of torch_npu's kernels for its device only those that were chosen stay."""
    from ospnext.conformance.host_npu import device

    names = [name for name, _ in device._registered(device.KEY)]
    ours = torch._C._dispatch_get_registrations_for_dispatch_key
    assert len(names) > 1400
    assert set(names) <= {*ours(device.KEY)}
    for name, op in device._registered(device.KEY):
        kept = device._kernel(name, op, device.kernels()) is None
        dumped = torch._C._dispatch_dump(name)
        line = next(line for line in dumped.splitlines() if line.startswith("PrivateUse1:"))
        assert kept != ("registered at" in line and "torch_npu" not in line), f"{name}: {line}"
