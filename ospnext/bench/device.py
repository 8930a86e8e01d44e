"""The device that a command line asks for, made the current one: events and kernels go to the current device, whatever
the tensors are on.
"""

from __future__ import annotations

import torch

from ospnext.errors import ConfigError


def chosen_device(asked: str | None, default: torch.device) -> torch.device:
    """The device that `--device` names, or `default`.

    Raises:
        ConfigError: `asked` is no device, or none that is here.
    """
    if not asked:
        return default
    try:
        device = torch.device(asked)
    except RuntimeError:
        raise ConfigError(f"--device {asked!r} is no device; {_there_are()}") from None
    known = devices()
    if not any(device.type == here.type and device.index in (None, here.index) for here in known):
        raise ConfigError(f"--device {asked}: there is no such device here; {_there_are()}")
    if device.index is not None and device.type != "cpu":
        torch.accelerator.set_device_index(device.index)
    return device


def devices() -> list[torch.device]:
    """Every device of this machine on which PyTorch can compute."""
    found = [torch.device("cpu", 0)]
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if kind is not None:
        found += [torch.device(kind.type, i) for i in range(torch.accelerator.device_count())]
    return found


def device_name(device: torch.device) -> str | None:
    """What the vendor calls this card; None where PyTorch does not say."""
    name = getattr(torch.get_device_module(device), "get_device_name", None)
    return name(device) if name else None


def _there_are() -> str:
    names = ", ".join("cpu" if device.type == "cpu" else str(device) for device in devices())
    return f"devices here: {names}. Give one of them, or leave --device out for the backend's first"
