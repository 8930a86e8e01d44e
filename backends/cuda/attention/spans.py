"""Where packed sequences lie, known to the host: read from the device once for each tensor that says so."""

from __future__ import annotations

import itertools

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

#: cu_seqlens -> (its version, the spans it held then). A model keeps its cu_seqlens, so that only first calls wait.
_known: WeakIdKeyDictionary = WeakIdKeyDictionary()


def spans(cu_seqlens: Tensor) -> list[slice]:
    """The slice of each sequence. Waits for the device, unless this very tensor was read and not written since; writes
    that PyTorch does not count, through `.data` or by a collective, are not seen.
    """
    if cu_seqlens.is_inference():  # counts no versions: whether it was written cannot be told
        return _read(cu_seqlens)
    found = _known.get(cu_seqlens)
    if found is None or found[0] != cu_seqlens._version:
        found = _known[cu_seqlens] = (cu_seqlens._version, _read(cu_seqlens))
    return found[1]


def _read(cu_seqlens: Tensor) -> list[slice]:
    return [slice(*ends) for ends in itertools.pairwise(cu_seqlens.tolist())]
