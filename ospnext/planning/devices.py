"""What is known of devices that a plan is for: figures of devices.yaml, each with its source. No device is asked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from ospnext.config import did_you_mean, read_yaml, resolve
from ospnext.errors import ConfigError

KNOWN = Path(__file__).with_name("devices.yaml")


@dataclass(frozen=True)
class Figure:
    """A number, and how it is known: by a measurement of this project, by the vendor, or not at all."""

    value: float
    how: Literal["measured", "published", "assumed"]
    source: str


@dataclass(frozen=True)
class Device:
    """Rates are 1e12 operations a second of linears (with what is elementwise around them) and of attention, in bf16
    and in HiFloat8, of which `reached` are. GB/s are 1e9 bytes a second that one device sends, while it receives as
    many, to those of its node of `per_node` (link) and to others (network). Latencies are those of one exchange.
    """

    name: str
    memory_gb: Figure
    linear_tflops: Figure
    linear_hif8_tflops: Figure
    attention_tflops: Figure
    attention_hif8_tflops: Figure
    reached: Figure
    per_node: Figure
    link_gbs: Figure
    link_reached: Figure
    link_latency_us: Figure
    network_gbs: Figure
    network_reached: Figure
    network_latency_us: Figure

    @property
    def figures(self) -> Iterator[tuple[str, Figure]]:
        """Every figure by its name."""
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Figure):
                yield field.name, value

    @property
    def measured(self) -> bool:
        """Whether the rates that a device computes at were measured; no link was."""
        return all(getattr(self, name).how == "measured" for name in ("linear_tflops", "attention_tflops", "reached"))

    def linear_rate(self, quantized: bool) -> float:
        """Operations a second."""
        return 1e12 * self.reached.value * (self.linear_hif8_tflops if quantized else self.linear_tflops).value

    def attention_rate(self, quantized: bool) -> float:
        """Operations a second; `quantized` where the products are those of 8-bit operands."""
        return 1e12 * self.reached.value * (self.attention_hif8_tflops if quantized else self.attention_tflops).value

    @property
    def memory(self) -> float:
        """Bytes."""
        return 1e9 * self.memory_gb.value


def known_devices(more: Path | None = None) -> dict[str, Device]:
    """By name, with those of another file.

    Raises:
        ConfigError: a figure is missing, unknown or not positive.
    """
    found: dict[str, Device] = {}
    for path in filter(None, (KNOWN, more)):
        for name, values in read_yaml(path).items():
            if not isinstance(values, dict):
                raise ConfigError(f"{path}: {name!r} must be a section with the figures of a device")
            device = resolve(Device, (f"{path}: {name}", values))
            for figure, known in device.figures:
                if not known.value > 0:
                    raise ConfigError(f"{path}: {name}.{figure} must be positive, found {known.value:g}")
            if device.per_node.value != int(device.per_node.value):
                raise ConfigError(f"{path}: {name}.per_node must be a whole number, found {device.per_node.value:g}")
            found[str(name)] = device
    return found


def device(name: str, more: Path | None = None) -> Device:
    """Raises ConfigError: there is none of this name."""
    known = known_devices(more)
    if name not in known:
        raise ConfigError(
            f"unknown device {name!r}{did_you_mean(name, known)}; devices: {', '.join(known)}. A file with figures of "
            "others can be given with --devices"
        )
    return known[name]
