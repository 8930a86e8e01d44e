"""`cuda.cudnn_fp8`: HiFloat8 attention on FP8 tensor cores, by cuDNN's FP8 graph. Forward only, on Hopper.

q, k and v are HiFloat8 carried as E4M3; cuDNN rounds probabilities to E4M3 as well, and on Hopper has no other dtype
for the result. Its sums keep few bits: of 20,160 values with a mean of twice their deviation they lose 29 %, of 80,640
55 %. So the mean of each channel of v is taken out and added to the result, which is the same since probabilities add
up to 1."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import cudnn
import torch
from torch import Tensor

from ospnext.numerics import carrier, hif8

from ..kernels.centre import quantize_centred
from ..kernels.widen import widen
from ..quantize import quantize
from .masked import without_zero
from .spans import spans

#: Probabilities relative to the largest of their row, times this, are rounded to E4M3: a power of two, so that the
#: largest is exact, with room above.
P_SCALE = 256.0

#: Operands of the graph by name -> the number it knows them by.
_UIDS = {
    name: number
    for number, name in enumerate(
        (
            *("q", "k", "v", "o", "descale_q", "descale_k", "descale_v"),
            *("descale_s", "scale_s", "scale_o", "amax_s", "amax_o"),
        ),
        start=1,
    )
}


class CudnnFp8:
    """Dense calls as they are; of packed ones a call per sequence, which pays where sequences are few and long."""

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        cu_seqlens_q,
        cu_seqlens_kv,
        max_seqlen_q,
        max_seqlen_kv,
        scale,
        scale_max,
        scale_mode,
        amax,
    ) -> Tensor:
        if not v.numel():
            return torch.zeros_like(q, memory_format=torch.contiguous_format)
        q, scale = without_zero(q, scale)
        settings = {"scale_max": scale_max, "scale_mode": scale_mode, "granularity": "tensor", "carried": True}
        amax = amax or (None, None)
        pairs = [quantize(t.detach(), given, **settings) for t, given in zip((q, k), amax, strict=True)]
        (q8, q_scale), (k8, k_scale) = ((codes, s.reshape(1)) for codes, s in pairs)
        v8, v_scale, centre = quantize_centred(v.detach().reshape(-1, v.shape[-2:].numel()), scale_max, scale_mode)
        v8, v_scale = v8.view(v.shape), v_scale.reshape(1)

        of_result = v_scale * _unit(scale_max)
        scalars = {"descale_q": q_scale, "descale_k": k_scale, "descale_v": v_scale, "scale_o": 1.0 / of_result}
        out8 = torch.empty(q.shape, dtype=carrier.DTYPE, device=q.device)
        without_keys: list[slice] = []
        if cu_seqlens_q is None:
            run_graph(q8, k8, v8, out8, scalars, scale)
        else:
            without_keys = _each(q8, k8, v8, out8, cu_seqlens_q, cu_seqlens_kv, scalars, scale)
        # A scale of q or k that is NaN makes the result NaN, whatever the graph makes of it.
        out = widen(out8, of_result + 0.0 * (q_scale + k_scale), centre, q.dtype)
        for rows in without_keys:
            out[rows] = 0
        return out


@functools.cache
def _unit(scale_max: float) -> float:
    """The scale of the result over that of v. A result is a mean of values and no larger than they are, which carried
    are at most 2^n times the HiFloat8 value of `scale_max`: that becomes the largest number of E4M3, so that nothing is
    clipped and no call needs to know the one before.
    """
    largest = hif8.round_to_grid(
        torch.tensor(scale_max, dtype=torch.float32, device="cpu")
    ).item() * 2.0 ** carrier.shift_for(scale_max)
    return largest / carrier.LARGEST


def _each(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, cu_q: Tensor, cu_kv: Tensor, scalars: Mapping[str, Tensor], scale
) -> list[slice]:
    """Returns the rows that have no keys, and were not written."""
    without_keys = []
    for rows, keys in zip(spans(cu_q), spans(cu_kv), strict=True):
        if rows.start == rows.stop:
            continue
        if keys.start == keys.stop:
            without_keys.append(rows)
            continue
        run_graph(q[None, rows], k[None, keys], v[None, keys], out[None, rows], scalars, scale)
    return without_keys


# ---- the graph


def run_graph(
    q_BSHD: Tensor,
    k_BSHD: Tensor,
    v_BSHD: Tensor,
    out_BSHD: Tensor,
    scalars: Mapping[str, Tensor],
    scale: float,
    p_scale: float = P_SCALE,
) -> None:
    """Write E4M3 numbers of attention among E4M3 numbers, all contiguous in what follows the batch. `scalars` are fp32
    [1] on the device: what q, k and v are to be multiplied by, and by what the result was before it was rounded.
    """
    device = q_BSHD.device
    batch, q_len, heads, head_dim = q_BSHD.shape
    with torch.cuda.device(device):
        handle = _handle(device)
        cudnn.set_stream(handle, torch.cuda.current_stream(device).cuda_stream)
        graph = built(handle, batch, q_len, k_BSHD.shape[1], heads, head_dim, scale)
        amax = torch.empty(2, dtype=torch.float32, device=device)
        operands = {"q": q_BSHD, "k": k_BSHD, "v": v_BSHD, "o": out_BSHD, "amax_s": amax[:1], "amax_o": amax[1:]}
        operands |= {**scalars, "scale_s": _constant(p_scale, device), "descale_s": _constant(1.0 / p_scale, device)}
        workspace = torch.empty(max(1, graph.get_workspace_size()), dtype=torch.uint8, device=device)
        graph.execute({_UIDS[name]: t for name, t in operands.items()}, workspace, handle=handle)


@functools.lru_cache(maxsize=256)
def built(handle: Any, batch: int, q_len: int, kv_len: int, heads: int, head_dim: int, scale: float) -> Any:
    """The graph for one shape and scale: building takes a part of a second, so it is kept."""
    fp8, fp32 = cudnn.data_type.FP8_E4M3, cudnn.data_type.FLOAT
    graph = cudnn.pygraph(
        io_data_type=fp8, intermediate_data_type=fp32, compute_data_type=fp32, handle=handle, name="hif8_attention"
    )

    def layout(length: int) -> dict[str, tuple[int, ...]]:
        """Dimensions are named heads first, and lie in memory tokens first."""
        row = heads * head_dim
        return {"dim": (batch, heads, length, head_dim), "stride": (length * row, head_dim, row, 1)}

    def tensor(name: str, length: int) -> Any:
        return graph.tensor(name=name, uid=_UIDS[name], data_type=fp8, **layout(length))

    def scalar(name: str) -> Any:
        return graph.tensor(name=name, uid=_UIDS[name], data_type=fp32, dim=(1, 1, 1, 1), stride=(1, 1, 1, 1))

    scalars = ("descale_q", "descale_k", "descale_v", "descale_s", "scale_s", "scale_o")
    out, _, amax_s, amax_o = graph.sdpa_fp8(
        q=tensor("q", q_len),
        k=tensor("k", kv_len),
        v=tensor("v", kv_len),
        **{name: scalar(name) for name in scalars},
        attn_scale=scale,
        generate_stats=False,
        name="attention",
    )
    of_out = layout(q_len)
    out.set_uid(_UIDS["o"]).set_output(True).set_data_type(fp8)
    out.set_dim(list(of_out["dim"])).set_stride(list(of_out["stride"]))
    # Read by nobody: that they are outputs keeps the graph on cuDNN's own kernel, the one that was measured.
    for name, found in (("amax_s", amax_s), ("amax_o", amax_o)):
        found.set_uid(_UIDS[name]).set_output(True).set_data_type(fp32)
        found.set_dim([1, 1, 1, 1]).set_stride([1, 1, 1, 1])
    try:
        graph.build([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    except Exception as error:
        shape = f"[{batch}, {q_len} x {kv_len}, {heads}, {head_dim}]"
        error.add_note(f"cuDNN {cudnn.backend_version()} has no FP8 attention for {shape}; quant_attn=hif8 needs none")
        raise
    return graph


@functools.cache
def _handle(device: torch.device) -> Any:
    """cuDNN's handle for the current device, which is `device`."""
    return cudnn.create_handle()


@functools.cache
def _constant(value: float, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # kept for callers of every mode
        return torch.full((1,), value, dtype=torch.float32, device=device)


cudnn_fp8 = CudnnFp8()
