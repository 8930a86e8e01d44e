"""What only an Ascend device can answer, one family of questions a file. `ospnext conformance device-acceptance` asks.

Every item says which implementation or predicate relies on the answer and what each other answer would change. The
vendor's package is imported when an item is asked, not before."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ospnext.ops.acceptance import Item
from ospnext.ops.registry import DeviceInfo


def items(device: DeviceInfo | None) -> Iterator[Item]:
    """Those that concern `device`, in the order to ask them; without one, those for Ascend 950."""
    from . import attention, casts, division, fused, hif8_attention, packs, products, surface

    newest = device is None or device.capability == "950"
    listed: tuple[tuple[Callable[[], Iterator[Item]], bool], ...] = (
        (casts.items_of_950, newest),
        (division.items_of_950, newest),
        (division.items, True),
        (products.items_of_950, newest),
        (products.items, True),
        (fused.items, True),
        (attention.items, True),
        (attention.items_of_950, newest),
        (attention.items_of_910, not newest),
        (packs.items, True),
        (hif8_attention.items_of_950, newest),
        (surface.items, True),
    )
    for family, concerned in listed:
        if concerned:
            yield from family()
