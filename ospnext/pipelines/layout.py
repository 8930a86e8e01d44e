"""Where the parts of a text-to-video checkpoint lie, in diffusers' layout or in that of official Wan. Loads nothing."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ospnext.errors import CheckpointError
from ospnext.pipelines.strict_load import read_json

Part = Literal["transformer", "text_encoder", "vae"]

T5_FILE, VAE_FILE, TOKENIZER_FOLDER = "models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth", "google/umt5-xxl"
_WEIGHTS = "*.safetensors"


@dataclass(frozen=True)
class Layout:
    """Paths of the parts: folders, but `text_encoder` and `vae` are files in the official layout."""

    kind: Literal["diffusers", "official"]
    transformer: Path
    text_encoder: Path
    tokenizer: Path
    vae: Path
    scheduler_config: Path | None


def detect_layout(path: str | Path, needed: Collection[Part]) -> Layout:
    """The layout of the checkpoint at `path`, with every needed part present; otherwise CheckpointError."""
    root = Path(path).expanduser()
    if not root.is_dir():
        raise CheckpointError(
            f"{root} is not a directory. ospnext reads local checkpoints; download one first, for example with "
            "'hf download Wan-AI/Wan2.1-T2V-1.3B-Diffusers --local-dir DIR'"
        )
    if (root / "model_index.json").is_file() or (root / "transformer").is_dir():
        layout = _diffusers(root)
        wanted = _diffusers_files(layout)
    elif (root / "config.json").is_file() or (root / T5_FILE).is_file() or (root / VAE_FILE).is_file():
        layout = Layout("official", root, root / T5_FILE, root / TOKENIZER_FOLDER, root / VAE_FILE, None)
        wanted = _official_files(layout)
    else:
        raise CheckpointError(
            f"{root} is not a text-to-video checkpoint: it has neither model_index.json nor a transformer folder "
            f"(diffusers layout), nor config.json (official Wan layout). {_found(root)}"
        )
    absent = [(part, pattern) for part in needed for pattern in wanted[part] if not _exists(pattern)]
    missing = [f"{part}: {pattern.relative_to(root)}" for part, pattern in absent]
    if missing:
        raise CheckpointError(
            f"{root} looks like the {layout.kind} layout but lacks {'; '.join(missing)}. {_found(root)} "
            "Complete the download, or pass the part itself: from_pretrained(path, text_encoder=..., vae=...)"
        )
    return layout


def _diffusers(root: Path) -> Layout:
    index = root / "model_index.json"
    if index.is_file():
        _check_model_index(read_json(index), index)
    scheduler = root / "scheduler" / "scheduler_config.json"
    return Layout(
        "diffusers",
        transformer=root / "transformer",
        text_encoder=root / "text_encoder",
        tokenizer=root / "tokenizer",
        vae=root / "vae",
        scheduler_config=scheduler if scheduler.is_file() else None,
    )


def _check_model_index(index: dict, source: Path) -> None:
    """Refuse pipelines that share the layout but not the meaning: image-to-video, and Wan2.2 with two transformers."""
    kind = index.get("_class_name")
    if kind != "WanPipeline":
        raise CheckpointError(f"{source} describes a {kind!r}; ospnext runs 'WanPipeline' checkpoints")
    two_stage = index.get("boundary_ratio") is not None or any(index.get("transformer_2") or ())
    if two_stage or index.get("expand_timesteps"):
        raise CheckpointError(
            f"{source} describes a Wan2.2 pipeline; ospnext runs Wan2.1 and OSP-Next models, which have one transformer"
        )


def _diffusers_files(layout: Layout) -> dict[Part, list[Path]]:
    return {
        "transformer": [layout.transformer / "config.json", layout.transformer / _WEIGHTS],
        "text_encoder": [
            layout.text_encoder / "config.json",
            layout.text_encoder / _WEIGHTS,
            layout.tokenizer / "tokenizer_config.json",
        ],
        "vae": [layout.vae / "config.json", layout.vae / _WEIGHTS],
    }


def _official_files(layout: Layout) -> dict[Part, list[Path]]:
    return {
        "transformer": [layout.transformer / "config.json", layout.transformer / _WEIGHTS],
        "text_encoder": [layout.text_encoder, layout.tokenizer / "tokenizer_config.json"],
        "vae": [layout.vae],
    }


def _exists(pattern: Path) -> bool:
    return any(pattern.parent.glob(pattern.name))


def _found(root: Path) -> str:
    names = sorted(path.name + "/" * path.is_dir() for path in root.iterdir())
    return f"Found: {', '.join(names[:20]) or 'nothing'}{', ...' if len(names) > 20 else ''}."
