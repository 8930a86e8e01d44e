"""The fused family as its definitions in plain PyTorch, for backends whose kernels do not take every call. Without such
kernels none of this is needed: the functions of `ospnext.ops` are the definitions then.
"""

from __future__ import annotations

from ospnext.ops.contracts import CONTRACTS
from ospnext.ops.contracts.fused import Composite


def __getattr__(name: str) -> Composite:
    """The definition of `fused.<name>`."""
    contract = CONTRACTS.get(f"fused.{name}")
    if contract is None:
        raise AttributeError(f"no fused operator is called {name!r}")
    return contract.composite
