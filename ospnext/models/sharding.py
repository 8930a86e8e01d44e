"""A model whose parameters, gradients and optimizer state are divided among all ranks: which of them travel together,
and in which dtype. PyTorch's FSDP2 does the rest; the mesh is made in parallel/fsdp.py.
"""

from __future__ import annotations

import warnings
from functools import partial

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from ospnext.errors import ConfigError
from ospnext.models.loading import keeps_fp32
from ospnext.models.transformer import OSPNextTransformer


def shard(
    model: OSPNextTransformer,
    mesh: DeviceMesh,
    *,
    param_dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype | None = None,
    reshard_after_forward: bool = True,
) -> OSPNextTransformer:
    """Divide the parameters of `model` among the ranks of `mesh`, in place; returns the model. It may be on "meta":
    `load_shards` fills it.

    A block is gathered when it runs, in one collective. Parameters that a half-precision model keeps in fp32
    (`keeps_fp32`: time embedding, modulation, norms) are those of the root, of all blocks together: one collective
    before the first block gathers them, in the dtype in which they are stored. Inputs are not cast: the timestep is not
    rounded. Optimizers made of `model.parameters()` afterwards hold and update shards. Buffers, such as stored HiFloat8
    codes, are whole on each rank.

    Args:
        mesh: of all ranks, from `fsdp_mesh`; independent of the ranks that share a sample.
        param_dtype: of the other parameters as they are gathered and computed with; None is as they are stored.
        reduce_dtype: in which the mean of gradients is taken; None is that of the stored parameters, at least fp32.
        reshard_after_forward: whether a block is let go after its forward and gathered again for its backward.

    Raises:
        ConfigError: the model is sharded already, or compiled.
    """
    if isinstance(model, FSDPModule):
        raise ConfigError("the model is sharded already; build another one to shard it in another way")
    units = _units(model)
    if any(module._compiled_call_impl is not None for module in (model, *units)):
        raise ConfigError("the model is compiled, and compiled blocks are not sharded yet: set compile=off")
    stored = model.patch_embedding.weight.dtype
    reduced = reduce_dtype or torch.promote_types(stored, torch.float32)
    root = MixedPrecisionPolicy(reduce_dtype=reduced, cast_forward_inputs=False)
    others = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduced, cast_forward_inputs=False)
    # The root first, though units usually are: so it may have parameters of modules that are units of their own.
    divide = partial(fully_shard, mesh=mesh, reshard_after_forward=reshard_after_forward)
    divide(model, mp_policy=root, ignored_params=_parameters(model, wide=False))
    of_root = _parameters(model, wide=True)
    for unit in units:
        divide(unit, mp_policy=others, ignored_params=of_root)
    for block in model.blocks:
        register_fsdp_forward_method(block, "project_text")
    register_fsdp_forward_method(model, "encode_text")
    model.compute_dtype = param_dtype
    # It warns of results that are views, for the case that something is then written into them: nothing is.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    return model


def _units(model: OSPNextTransformer) -> list[nn.Module]:
    return [model.patch_embedding, model.text_embedding, *model.blocks, model.head]


def _parameters(model: nn.Module, *, wide: bool) -> set[nn.Parameter]:
    return {parameter for name, parameter in model.named_parameters() if keeps_fp32(name) is wide}
