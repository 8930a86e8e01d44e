"""Finds the files of a checkpoint and reads tensors from them one at a time. Knows no tensor names and no models."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from ospnext.errors import CheckpointError

CONFIG_NAME = "config.json"
WEIGHTS_STEM = "diffusion_pytorch_model"
INDEX_SUFFIX = ".safetensors.index.json"
PICKLE_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")

_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")
_WRAPPERS = ("state_dict", "model")
_SAFETENSORS_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "U8": "uint8"}


@dataclass(frozen=True)
class StoredTensor:
    """What a file says about one tensor, before its data is read. `dtype` is torch's name where torch has one."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()


class TensorFile(Protocol):
    """One file of named tensors: headers at once, data on demand."""

    path: Path
    tensors: dict[str, StoredTensor]

    def read(self, name: str) -> torch.Tensor:
        """The tensor on the CPU; it may be a view of the file, so copy it before the file can change."""


class SafetensorsFile:
    """A .safetensors file, mapped into memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = safe_open(path, framework="pt", device="cpu")
            self.tensors = {name: self._header(name) for name in self._file.keys()}  # noqa: SIM118 (not a mapping)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(_unreadable(path, error)) from error

    def _header(self, name: str) -> StoredTensor:
        header = self._file.get_slice(name)
        dtype = header.get_dtype()
        return StoredTensor(tuple(header.get_shape()), _SAFETENSORS_DTYPES.get(dtype, dtype))

    def read(self, name: str) -> torch.Tensor:
        return self._file.get_tensor(name)


class PickleFile:
    """A file written by `torch.save`: mapped into memory, and unpickled with nothing but tensors allowed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            content = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{path} holds Python objects besides tensors; ospnext does not unpickle them, because a pickle can "
                "run any code. If you trust it, load it yourself and save its state dict as .safetensors"
            ) from error
        except (RuntimeError, OSError, EOFError) as error:
            raise CheckpointError(_unreadable(path, error)) from error
        self._state = _unwrap(content, path)
        self.tensors = {
            name: StoredTensor(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
            for name, tensor in self._state.items()
        }

    def read(self, name: str) -> torch.Tensor:
        return self._state[name]


@dataclass(frozen=True)
class Checkpoint:
    """The files that make up one set of weights, and the config next to them where there is one."""

    path: Path
    files: tuple[TensorFile, ...]
    config_path: Path | None
    config: Mapping[str, Any] | None

    @property
    def tensors(self) -> dict[str, StoredTensor]:
        return {name: tensor for file in self.files for name, tensor in file.tensors.items()}


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a transformer folder, a diffusers pipeline folder (its `transformer/`), a .safetensors or a torch.save file.

    Reads headers only. Raises CheckpointError for whatever is absent, damaged, ambiguous or of another format.
    """
    path = Path(path)
    if path.is_file():
        files: tuple[TensorFile, ...] = (_open_file(path),)
        # A stray config.json of something else may lie next to a lone file; the folder case below is strict instead.
        config_path = path.parent / CONFIG_NAME
        config = _read_json(config_path) if config_path.is_file() else None
        known = config is not None and _is_transformer_config(config)
        return Checkpoint(path, files, config_path if known else None, config if known else None)
    if not path.is_dir():
        raise CheckpointError(
            f"no checkpoint at {path}: there is no such file or directory. ospnext reads local files only; "
            "download a model first, for example: hf download Wan-AI/Wan2.1-T2V-1.3B-Diffusers --local-dir DIR"
        )
    folder = _transformer_folder(path)
    config_path = folder / CONFIG_NAME
    if not config_path.is_file():
        raise CheckpointError(_no_config(folder))
    config = _read_json(config_path)
    if not _is_transformer_config(config):
        raise CheckpointError(
            f"{config_path} is not the config of a Wan transformer: it has neither 'dim' and 'num_heads' (official) "
            "nor 'num_attention_heads' and 'attention_head_dim' (diffusers); "
            f"its keys are {', '.join(sorted(config)[:10])}"
        )
    files = tuple(_open_file(file) for file in _weight_files(folder))
    _refuse_duplicates(files)
    return Checkpoint(folder, files, config_path, config)


def _is_transformer_config(config: Mapping[str, Any]) -> bool:
    return {"num_attention_heads", "attention_head_dim"} <= config.keys() or {"dim", "num_heads"} <= config.keys()


def _transformer_folder(path: Path) -> Path:
    if not (path / "transformer").is_dir() or (path / CONFIG_NAME).is_file():
        return path
    if (path / "transformer_2").is_dir():
        raise CheckpointError(
            f"{path} holds two transformers (a two-expert Wan2.2 pipeline); ospnext runs models with one. "
            "To load one expert by itself, give its folder"
        )
    return path / "transformer"


def _no_config(folder: Path) -> str:
    weights = sorted(file.name for file in folder.glob("*.safetensors"))
    if weights:
        return (
            f"{folder} has weights ({', '.join(weights[:3])}) but no {CONFIG_NAME}: the copy is incomplete. Put "
            f"{CONFIG_NAME} there, or give the path of a single weight file to infer its sizes from its shapes"
        )
    loose = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLE_SUFFIXES)
    found = f"; to load {loose[0]}, give the path of that file" if loose else ""
    return (
        f"{folder} is no transformer checkpoint: it has neither {CONFIG_NAME} with *.safetensors "
        f"nor a folder transformer/ that has{found}"
    )


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: those its index names, else the one with diffusers' name, else all."""
    preferred = folder / f"{WEIGHTS_STEM}{INDEX_SUFFIX}"
    indexes = [preferred] if preferred.is_file() else sorted(folder.glob(f"*{INDEX_SUFFIX}"))
    if len(indexes) > 1:
        raise CheckpointError(f"{folder} has several index files ({', '.join(i.name for i in indexes)}); keep one")
    if indexes:
        names = _indexed_names(indexes[0])
    elif (folder / f"{WEIGHTS_STEM}.safetensors").is_file():
        names = [f"{WEIGHTS_STEM}.safetensors"]
    else:
        names = sorted(file.name for file in folder.glob("*.safetensors"))
        names += [name for name in _all_shards(names) if name not in names]
    if not names:
        raise CheckpointError(
            f"{folder} has {CONFIG_NAME} but no *.safetensors file. To load a torch.save file, "
            "give the path of that file"
        )
    if absent := [name for name in names if not (folder / name).is_file()]:
        raise CheckpointError(
            f"{folder} lacks {len(absent)} of its {len(names)} weight files: "
            f"{', '.join(absent[:10])}. The copy is incomplete; fetch these files again"
        )
    return [folder / name for name in names]


def _indexed_names(index: Path) -> list[str]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index} has no 'weight_map' from tensor names to file names; fetch the file again")
    names = sorted(set(weight_map.values()))
    if outside := [name for name in names if Path(name).name != name]:
        raise CheckpointError(f"{index} points outside its folder ({outside[0]!r}); shards must lie next to the index")
    return names


def _all_shards(names: list[str]) -> list[str]:
    """Every name of the `x-00001-of-0000N.safetensors` series that `names` belong to."""
    series = {(match["stem"], match["count"]) for name in names if (match := _SHARD.fullmatch(name))}
    return [f"{stem}-{i:05d}-of-{n}.safetensors" for stem, n in sorted(series) for i in range(1, int(n) + 1)]


def is_one_of_many(path: Path) -> bool:
    """True for a file whose name says that it is one shard of several."""
    match = _SHARD.fullmatch(path.name)
    return match is not None and int(match["count"]) > 1


def _refuse_duplicates(files: tuple[TensorFile, ...]) -> None:
    seen: dict[str, Path] = {}
    for file in files:
        for name in file.tensors:
            if name in seen:
                raise CheckpointError(
                    f"{name} is both in {seen[name].name} and in {file.path.name} of {file.path.parent}. "
                    "If these are variants of one model, give the path of one file instead"
                )
            seen[name] = file.path


def _open_file(path: Path) -> TensorFile:
    if path.suffix == ".safetensors":
        return SafetensorsFile(path)
    if path.suffix in PICKLE_SUFFIXES:
        return PickleFile(path)
    known = f".safetensors or {', '.join(PICKLE_SUFFIXES)} (torch.save)"
    raise CheckpointError(f"{path} is of no format ospnext reads: {known}")


def _unreadable(path: Path, error: Exception) -> str:
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        return f"{path} is empty (0 bytes); fetch it again"
    if start.startswith(b"version https://git-lfs"):
        return f"{path} is a Git LFS pointer, not the weights themselves; run 'git lfs pull' in that repository"
    reason = str(error).splitlines()[0][:200]
    return (
        f"{path} ({path.stat().st_size} bytes) cannot be read: it is truncated, damaged or of another format "
        f"({reason}). Compare its size with the source and fetch it again; a file saved by PyTorch before 1.6 "
        "has to be saved again by a newer one"
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); fetch it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, found {type(content).__name__}")
    return content


def _unwrap(content: Any, path: Path) -> dict[str, torch.Tensor]:
    """The state dict itself, from inside {"state_dict": ...} or {"model": ...} if a trainer saved more."""
    if isinstance(content, dict):
        if all(isinstance(value, torch.Tensor) for value in content.values()):
            return content
        for key in _WRAPPERS:
            if isinstance(content.get(key), dict):
                return _unwrap(content[key], path)
    keys = f"keys: {', '.join(map(str, list(content)[:10]))}" if isinstance(content, dict) else type(content).__name__
    raise CheckpointError(
        f"{path} holds no state dict: expected tensors by name, by themselves or under "
        f"{' or '.join(map(repr, _WRAPPERS))}; found {keys}"
    )
