"""What only an Ascend device can answer, one family of questions a file. `ospnext conformance device-acceptance` asks.

Every item says which implementation or predicate relies on the answer and what each other answer would change. The
vendor's package is imported when an item is asked, not before."""

from __future__ import annotations

from collections.abc import Iterator

from ospnext.ops.acceptance import Item
from ospnext.ops.registry import DeviceInfo


def items(device: DeviceInfo | None) -> Iterator[Item]:
    """Those that concern `device`, in the order to ask them; without one, those for Ascend 950."""
    from . import attention, casts, division, fused, packs, products, surface

    if device is None or device.capability == "950":
        from . import hif8_attention

        yield from casts.items()
        yield from division.items()
        yield from products.hif8_items()
    else:
        hif8_attention = None
    yield from products.items()
    yield from fused.items()
    yield from attention.items()
    yield from packs.items()
    if hif8_attention is not None:
        yield from hif8_attention.items()
    yield from surface.items()
