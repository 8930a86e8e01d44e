"""A program on the CPU and on the device, and errors that must come."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

DEVICE = "npu"


def on_both(program: Callable[..., Any], *shapes: tuple[int, ...], tolerance: float = 0.0) -> None:
    """Equal results and gradients on the CPU and on the device, of one program and the same inputs."""
    inputs = [torch.randn(shape, generator=torch.Generator().manual_seed(n)) for n, shape in enumerate(shapes)]
    outcomes = []
    for device in ("cpu", DEVICE):
        here = [x.to(device, copy=True).requires_grad_() for x in inputs]
        out = program(*here)
        assert out.device.type == device
        out.sum().backward()
        outcomes.append([out.detach().cpu(), *(x.grad.cpu() for x in here)])
    for n, (expected, got) in enumerate(zip(*outcomes, strict=True)):
        torch.testing.assert_close(got, expected, rtol=0, atol=tolerance, msg=lambda text, n=n: f"{n}: {text}")


def raises(kind: type[Exception], *words: str) -> Any:
    class Raises:
        def __enter__(self) -> None: ...

        def __exit__(self, found: Any, error: Any, _: Any) -> bool:
            assert found is not None, f"no {kind.__name__}"
            assert issubclass(found, kind), f"{found.__name__}: {error}"
            assert all(word in str(error) for word in words), str(error)
            return True

    return Raises()
