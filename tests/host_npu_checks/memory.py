"""Tensors of the device: memory, views, strides, `out=`, transfers."""

from __future__ import annotations

import io
import warnings

import torch
from compared import DEVICE, on_both
from torch import Tensor, nn


def check_operands_are_not_copied() -> None:
    from ospnext.conformance.host_npu.aliasing import on_cpu

    x = torch.arange(12.0, device=DEVICE).view(3, 4)
    for view in (x, x.t(), x[1], x[:, 1:3], x[::2, 3]):
        alias = on_cpu(view)
        assert alias.device.type == "cpu"
        assert alias.data_ptr() == view.data_ptr()
        assert alias.stride() == view.stride()
    on_cpu(x)[0, 0] = 7
    assert x[0, 0].item() == 7


def check_views_stay_views() -> None:
    x = torch.arange(6.0, device=DEVICE).view(2, 3)
    x[1].zero_()
    x.t()[0].add_(5)
    x.unsqueeze(0).squeeze().select(1, 1).mul_(2)
    x.expand(1, 2, 3)[0, 0, 2:].fill_(9)
    x.as_strided((2,), (3,), 1).neg_()
    assert x.tolist() == [[5, -2, 9], [5, 0, 0]]
    assert x.view(torch.int32).shape == (2, 3)
    assert x.view(-1).data_ptr() == x.data_ptr()
    assert x.contiguous().data_ptr() == x.data_ptr()
    assert x.t().contiguous().data_ptr() != x.data_ptr()
    assert torch.ops.aten.add_.Tensor(x, x) is x
    with torch.inference_mode():
        y = torch.ones(2, 3, device=DEVICE)
        y.contiguous()[0, 0] = 2
        assert y[0, 0].item() == 2


def check_strides_and_offsets_are_kept() -> None:
    host = torch.arange(24.0).view(2, 3, 4)
    device = host.to(DEVICE)
    for pick in (lambda x: x.transpose(0, 2), lambda x: x[:, 1:, ::2], lambda x: x.permute(2, 0, 1)[1:]):
        assert torch.equal(pick(device).cpu(), pick(host))
        assert pick(device).clone().stride() == pick(host).clone().stride()
        assert torch.equal((pick(device) * 2).cpu(), pick(host) * 2)
        target = torch.zeros(*reversed(pick(host).shape), device=DEVICE).permute(2, 1, 0)
        target.copy_(pick(device))
        assert torch.equal(target.cpu(), pick(host))
    assert torch.equal(host[:, 1].to(DEVICE).cpu(), host[:, 1])
    host.transpose(0, 1).copy_(device.transpose(0, 1) + 1)
    assert torch.equal(host, device.cpu() + 1)


def check_out_arguments() -> None:
    x = torch.arange(3.0, device=DEVICE)
    fits = torch.zeros(3, device=DEVICE)
    place = fits.data_ptr()
    assert torch.add(x, 1, out=fits) is fits
    assert (fits.tolist(), fits.data_ptr()) == ([1, 2, 3], place)
    grown = torch.empty(0, device=DEVICE)
    assert torch.add(x, 1, out=grown).tolist() == [1, 2, 3]
    strided = torch.zeros(3, 2, device=DEVICE)
    torch.add(x, 1, out=strided[:, 1])
    assert strided.tolist() == [[0, 1], [0, 2], [0, 3]]
    torch.add(x, x, out=x)
    assert x.tolist() == [0, 2, 4]
    values, indices = torch.empty(0, device=DEVICE), torch.empty(0, dtype=torch.long, device=DEVICE)
    torch.max(torch.tensor([[1.0, 3.0], [4.0, 2.0]], device=DEVICE), 1, out=(values, indices))
    assert (values.tolist(), indices.tolist()) == ([3, 4], [1, 0])
    counted = torch.empty(2, 3, dtype=torch.long, device=DEVICE)
    assert torch.arange(6, out=counted).tolist() == [[0, 1, 2], [3, 4, 5]]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        wrong = torch.zeros(2, device=DEVICE)
        torch.add(torch.ones(5, device=DEVICE), 1, out=wrong)
    assert wrong.tolist() == [2] * 5
    assert any("resized" in str(w.message) for w in told)


def check_resize_and_set() -> None:
    x = torch.arange(4.0, device=DEVICE)
    assert x.resize_(2).tolist() == [0, 1]
    assert x.resize_(4).tolist() == [0, 1, 2, 3]
    assert x.resize_(2, 4)[0].tolist() == [0, 1, 2, 3]
    y = torch.ones(3, device=DEVICE)
    x.set_(y)
    y.mul_(2)
    assert x.tolist() == [2, 2, 2]
    x.data = torch.zeros(1, device=DEVICE)
    assert x.tolist() == [0]
    empty = torch.empty(0, 3, device=DEVICE)
    assert (empty + 1).shape == (0, 3)
    assert torch.cat([empty, torch.ones(1, 3, device=DEVICE)]).tolist() == [[1, 1, 1]]


def check_lists_of_tensors() -> None:
    xs = [torch.full((n,), float(n), device=DEVICE) for n in (1, 2)]
    assert [x.tolist() for x in torch._foreach_add(xs, 1)] == [[2], [3, 3]]
    torch._foreach_mul_(xs, [2.0, 3.0])
    assert [x.tolist() for x in xs] == [[2], [6, 6]]
    assert [part.tolist() for part in torch.arange(4, device=DEVICE).chunk(2)] == [[0, 1], [2, 3]]
    assert [x.tolist() for x in torch.where(torch.tensor([0, 1, 1], device=DEVICE))] == [[1, 2]]


def check_conjugates_and_negatives() -> None:
    z = torch.complex(torch.arange(3.0), torch.ones(3)).to(DEVICE)
    assert torch.equal(z.conj().cpu(), z.cpu().conj())
    assert torch.equal(z.conj().imag.cpu(), -torch.ones(3))
    assert torch.equal((z.conj() * z).cpu(), z.cpu().conj() * z.cpu())

    def rotated(x: Tensor, angle: Tensor) -> Tensor:
        return torch.view_as_real(torch.view_as_complex(x) * torch.polar(torch.ones_like(angle), angle))

    on_both(rotated, (5, 2), (5,))


def check_transfers() -> None:
    x = torch.arange(3.0)
    assert x.pin_memory().is_pinned()
    assert x.pin_memory().to(DEVICE, non_blocking=True).cpu().tolist() == [0, 1, 2]
    assert x.npu().is_npu
    assert x.npu().to("npu:0") is not None
    far = x.to("npu:1")
    assert (str(far.device), far.to("npu:0").tolist()) == ("npu:1", [0, 1, 2])
    assert torch.zeros_like(far, device="cpu").device.type == "cpu"
    assert torch.ones_like(far, device="cpu").device.type == "cpu"
    assert torch.zeros_like(far).device == far.device
    assert far.new_ones(2, device="meta").device.type == "meta"
    assert torch.tensor([1, 2], device=DEVICE)[torch.tensor([1])].tolist() == [2]
    with torch.device(DEVICE):
        assert (nn.Linear(3, 4)(torch.randn(2, 3)) + torch.arange(4)).device.type == DEVICE


def check_save_and_load() -> None:
    file = io.BytesIO()
    torch.save({"x": torch.arange(3.0, device=DEVICE), "h": torch.ones(2, dtype=torch.bfloat16, device=DEVICE)}, file)
    for place in (None, "cpu"):
        file.seek(0)
        loaded = torch.load(file, map_location=place)
        assert loaded["x"].device.type == (place or DEVICE)
        assert loaded["x"].tolist() == [0, 1, 2]
        assert loaded["h"].dtype == torch.bfloat16
