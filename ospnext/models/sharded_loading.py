"""Weights of a sharded model: it is built on "meta", sharded, and each rank then reads its rows from the files. Files
are found and checked in loading.py; what a rank holds is decided in sharding.py.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ospnext.errors import CheckpointError
from ospnext.models.loading import CheckedCheckpoint
from ospnext.models.weights.checkpoint_files import TensorFile

logger = logging.getLogger("ospnext")

_SHOWN = 10


@torch.no_grad()
def load_shards(model: nn.Module, checked: CheckedCheckpoint, *, device: torch.device | str = "cpu") -> None:
    """Give `model`, on "meta", its values on `device`, in the dtypes that it has. No collective is called.

    Of a sharded parameter only the rows of this rank are read: memory on the host grows by what one tensor has of
    them, and on `device` by the shard.

    Raises:
        CheckpointError: the model has other tensors than the checkpoint, because it was changed after
            `empty_transformer`. Nothing was allocated.
    """
    _require_same(model, checked)
    model.to_empty(device=device)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for file in checked.checkpoint.files:
        for stored in file.tensors:
            _fill(tensors[checked.keys.official[stored]], file, stored)
    logger.info("loaded shards of %s", checked.report)


def _fill(tensor: Tensor, file: TensorFile, stored: str) -> None:
    held, first = _held(tensor)
    if held.numel():
        held.copy_(file.read(stored)[first : first + len(held)])


def _held(tensor: Tensor) -> tuple[Tensor, int]:
    """What this rank has of a tensor, and which row of it is the first."""
    if not isinstance(tensor, DTensor):
        return tensor, 0
    first, coordinates = 0, tensor.device_mesh.get_coordinate()
    assert coordinates is not None  # every rank is in the mesh
    for placement, ranks, coordinate in zip(tensor.placements, tensor.device_mesh.shape, coordinates, strict=True):
        if placement.is_shard(0):
            first = -(-len(tensor) // ranks) * coordinate  # as torch.chunk divides rows
        elif not placement.is_replicate():
            raise NotImplementedError(f"reading the part of a rank that holds {placement} of a tensor")
    return tensor.to_local(), first


def _require_same(model: nn.Module, checked: CheckedCheckpoint) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    stored = checked.checkpoint.tensors
    found = {ours: stored[name].shape for name, ours in checked.keys.official.items()}
    if differ := sorted(name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name)):
        listed = [f"{name} (model {shapes.get(name)}, checkpoint {found.get(name)})" for name in differ[:_SHOWN]]
        raise CheckpointError(
            f"{len(differ)} tensors of the model are not those of {checked.report.path}: {', '.join(listed)}"
            f"{', ...' if len(differ) > _SHOWN else ''}. Between empty_transformer and load_shards a model may be "
            "sharded and its linears may quantize in each call, but not store codes"
        )
