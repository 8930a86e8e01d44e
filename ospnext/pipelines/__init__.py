"""Text to video: prompts in, frames and MP4 files out. Public names, loaded on first use; each file holds one step."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ospnext.pipelines.output import OSPNextPipelineOutput
    from ospnext.pipelines.prompts import WAN_NEGATIVE_PROMPT
    from ospnext.pipelines.random_checkpoint import write_random_checkpoint
    from ospnext.pipelines.text_encoder import TextEncoder
    from ospnext.pipelines.text_to_video import OSPNextPipeline
    from ospnext.pipelines.vae import VideoAutoencoder
    from ospnext.pipelines.video import to_uint8, write_mp4

# The command line reads configurations and prompts from modules of this package long before it needs torch.
_WHERE = {
    "OSPNextPipeline": "text_to_video",
    "OSPNextPipelineOutput": "output",
    "TextEncoder": "text_encoder",
    "VideoAutoencoder": "vae",
    "WAN_NEGATIVE_PROMPT": "prompts",
    "to_uint8": "video",
    "write_mp4": "video",
    "write_random_checkpoint": "random_checkpoint",
}

__all__ = [
    "WAN_NEGATIVE_PROMPT",
    "OSPNextPipeline",
    "OSPNextPipelineOutput",
    "TextEncoder",
    "VideoAutoencoder",
    "to_uint8",
    "write_mp4",
    "write_random_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'ospnext.pipelines' has no attribute {name!r}")
    return getattr(importlib.import_module(f"ospnext.pipelines.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})
