"""Reading weights into library models so that nothing stays uninitialised. Knows no particular model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ospnext.errors import CheckpointError
from ospnext.models.weights.checkpoint_files import PickleFile, SafetensorsFile, TensorFile

Model = TypeVar("Model", bound=nn.Module)


def build_and_load(
    build: Callable[[], Model],
    weights: Mapping[str, Tensor],
    source: Path,
    *,
    dtype: torch.dtype | None,
    device: torch.device | str,
) -> Model:
    """`build()` without memory, then take exactly `weights`: every key and shape must match, else CheckpointError.

    Each tensor is copied once, from the file to `device`: a view of the file would change with the file.
    """
    with torch.device("meta"):
        model = build()
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    _check(expected, weights, source)
    model.load_state_dict({name: tensor.to(device, dtype, copy=True) for name, tensor in weights.items()}, assign=True)
    unset = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    if unset:
        raise CheckpointError(f"{source} gives no values for {_listing(unset)}, which this library version wants")
    return model.requires_grad_(False).eval()


def _check(expected: Mapping[str, torch.Size], weights: Mapping[str, Tensor], source: Path) -> None:
    reshaped = [
        f"{name} is {list(weights[name].shape)}, not {list(shape)}"
        for name, shape in expected.items()
        if name in weights and weights[name].shape != shape
    ]
    faults = {
        "missing": [name for name in expected if name not in weights],
        "unexpected": [name for name in weights if name not in expected],
        "of another shape": reshaped,
    }
    if any(faults.values()):
        found = "; ".join(f"{len(names)} {kind}: {_listing(names)}" for kind, names in faults.items() if names)
        raise CheckpointError(f"the weights in {source} do not fit the model: {found}")


def _listing(names: list[str], limit: int = 8) -> str:
    return ", ".join(names[:limit]) + (f", ... ({len(names) - limit} more)" if len(names) > limit else "")


def read_safetensors(directory: Path, stem: str) -> dict[str, Tensor]:
    """Weights in `stem.safetensors`, or in the shards that `stem.safetensors.index.json` lists; memory-mapped."""
    index = directory / f"{stem}.safetensors.index.json"
    names = sorted(set(read_json(index)["weight_map"].values())) if index.is_file() else [f"{stem}.safetensors"]
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        present = sorted(path.name for path in directory.iterdir()) if directory.is_dir() else "no such directory"
        raise CheckpointError(f"{directory} lacks {_listing(missing)}; found: {present}")
    return {name: tensor for file in names for name, tensor in _tensors(SafetensorsFile(directory / file))}


def read_pth(path: Path) -> dict[str, Tensor]:
    """Weights in a file written by torch.save. Nothing but tensors is unpickled, and they are memory-mapped."""
    return dict(_tensors(PickleFile(path)))


def _tensors(file: TensorFile) -> Iterator[tuple[str, Tensor]]:
    return ((name, file.read(name)) for name in file.tensors)


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, found {type(content).__name__}")
    return content
