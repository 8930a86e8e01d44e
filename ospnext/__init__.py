"""ospnext: text-to-video diffusion transformers on any accelerator.

Public names load on first use, so that `import ospnext` costs nothing and imports no vendor package. Nothing else lives
here."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ospnext.version import __version__

if TYPE_CHECKING:
    from ospnext.models import OSPNextTransformer, QuantPolicy, TransformerConfig, quantize_model
    from ospnext.ops import use_backend
    from ospnext.pipelines import OSPNextPipeline

_WHERE = {
    "OSPNextPipeline": "ospnext.pipelines",
    "OSPNextTransformer": "ospnext.models",
    "QuantPolicy": "ospnext.models",
    "TransformerConfig": "ospnext.models",
    "quantize_model": "ospnext.models",
    "use_backend": "ospnext.ops",
}

__all__ = [
    "OSPNextPipeline",
    "OSPNextTransformer",
    "QuantPolicy",
    "TransformerConfig",
    "__version__",
    "quantize_model",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'ospnext' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})
