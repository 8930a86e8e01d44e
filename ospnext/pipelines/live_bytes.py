"""Counts the bytes of tensors that live while code runs, on any device and on tensors without values. Measures only."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Inside `with LiveBytes() as live`, `live.peak` is the most that storages made inside have held at one time.

    What was there before does not count, nor does what a kernel allocates and frees inside one operator.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        before = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._see(tensor, before)
        return out

    def _see(self, tensor: Tensor, before: set[int]) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in before or address in self._known:
            return
        self._known.add(address)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, address, storage.nbytes()).atexit = False

    def _forget(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.now -= size
