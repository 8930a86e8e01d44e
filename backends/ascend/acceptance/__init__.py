"""What only an Ascend device can answer, one family of questions a file. `ospnext conformance device-acceptance` asks.

Every item says which implementation or predicate relies on the answer and what each other answer would change. The
vendor's package is imported when an item is asked, not before."""

from __future__ import annotations

from collections.abc import Iterator

from ospnext.ops.acceptance import Item
from ospnext.ops.registry import DeviceInfo


def items(device: DeviceInfo | None) -> Iterator[Item]:
    """Those that concern `device`, in the order to ask them; without one, those for Ascend 950."""
    from . import attention, casts, division, fused, hif8_attention, packs, products, surface

    hif8 = device is None or device.capability == "950"
    if hif8:
        yield from casts.items()
        yield from division.hif8_items()
        yield from products.hif8_items()
    for family in (division, products, fused, attention, packs):
        yield from family.items()
    if hif8:
        yield from hif8_attention.items()
    yield from surface.items()
