"""HiFloat8 attention on FP8 tensor cores (`cuda.cudnn_fp8`): how far it is from attention on the same values in fp64
and from "qdq", and what it takes beside bf16 attention in the same run.

    python benchmarks/cuda_fp8_attention.py --out benchmarks/results/cuda_fp8_attention.md

Needs one Hopper GPU and nvidia-cudnn-frontend; about a minute. A part that fails is reported, and the next one runs."""

from __future__ import annotations

import argparse
import itertools
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from ospnext import ops
from ospnext.bench.measure import timed
from ospnext.numerics import carrier
from ospnext.ops import HiF8Recipe, use_backend
from ospnext.ops.contracts import CONTRACTS
from ospnext.ops.registry import registry

REPEATS = 3
HEADS, HEAD_DIM = 40, 128
FULL, SPARSE, PACKED, TEXT = 80_640, 20_160, (19_320, 19_320, 18_480, 18_480), 512
NATIVE, QDQ = HiF8Recipe(attention="native"), HiF8Recipe()
#: Scales of probabilities that are compared.
P_SCALES = (64.0, 256.0, 448.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the result here too")
    arguments = parser.parse_args()
    lines = [
        "# HiFloat8 attention on FP8 tensor cores",
        "",
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}; "
        f"median of {REPEATS}.",
        "",
    ]
    for title, head, rows in (
        ("Against the contract", "| case | result | largest error / bound | rms | bound of rms |", contract_rows),
        ("Against fp64 and qdq", "| values | native to qdq | native to fp64 | qdq to fp64 | to none |", value_rows),
        ("Scales inside the graph", "| values | scale of P | scale of the result | native to qdq |", scale_rows),
        ("Time", "| shape | what | ms | TFLOP/s | times bf16 |", time_rows),
    ):
        section = [f"## {title}", "", head, "|" + " --- |" * (head.count("|") - 1)]
        print("\n".join(section), flush=True)
        for row in _surviving(rows):
            print(row, flush=True)
            section.append(row)
        lines += [*section, ""]
    if arguments.out:
        arguments.out.write_text("\n".join(lines))


def _surviving(rows: Callable[[], Iterator[Callable[[], list[str]]]]) -> Iterator[str]:
    """The rows of every part that does not raise."""
    for part in rows():
        try:
            yield from part()
        except Exception as error:
            traceback.print_exc()
            notes = " ".join(getattr(error, "__notes__", ()))
            yield f"| failed: {type(error).__name__}: {str(error)[:200]!r} {notes} |"
        torch.cuda.empty_cache()


def _part(function: Callable[..., list[str]], *arguments: object) -> Callable[[], list[str]]:
    return lambda: function(*arguments)


def randn(*shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device="cuda") * scale).bfloat16()


def native(q: Tensor, k: Tensor, v: Tensor, **pack: object) -> Tensor:
    return ops.quantized_attention(q, k, v, recipe=NATIVE, **pack)


def distance(found: Tensor, wanted: Tensor) -> float:
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


# ---- errors


def contract_rows() -> Iterator[Callable[[], list[str]]]:
    """The bf16 cases of the suite, which judges them the same way."""
    contract = CONTRACTS["native_attention"]
    for case in contract.cases():
        if case.request.dtype == torch.bfloat16:
            yield _part(_one_case, contract, case)


def _one_case(contract, case) -> list[str]:
    named = contract.inputs(case)
    on_device = {name: value.cuda() if isinstance(value, Tensor) else value for name, value in named.items()}
    verdict = contract.expect(named).judge(contract.call(on_device, lambda function: function))["out"]
    outside = f"{verdict.max_error:.2e} / {verdict.max_bound:.2e}"
    words = "within" if verdict.ok else "**outside**" if verdict.finite else "**not finite**"
    name = case.id.rpartition("/")[2]
    return [f"| {name} | {words} | {outside} | {verdict.rms_error:.2e} | {verdict.rms_bound:.2e} |"]


def _values(kind: str, q_len: int, kv_len: int, heads: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """[1, S, H, D]: "plain" has logits of unit variance, "sharp" of 3, "outliers" one channel of v 100 times as large,
    "mean" values that do not cancel.
    """
    q, k, v = (randn(1, n, heads, HEAD_DIM) for n in (q_len, kv_len, kv_len))
    if kind == "sharp":
        q = q * 3
    if kind == "outliers":
        v[..., 5] *= 100
    if kind == "mean":
        v += 2.0
    return q, k, v


def value_rows() -> Iterator[Callable[[], list[str]]]:
    for kind, length in itertools.product(("plain", "sharp", "outliers", "mean"), (4096, SPARSE)):
        yield _part(_against_fp64, kind, length, length)
    yield _part(_against_fp64, "plain", SPARSE, TEXT)
    yield _part(_against_fp64, "mean", 4096, FULL)


def _against_fp64(kind: str, q_len: int, kv_len: int) -> list[str]:
    q, k, v = _values(kind, q_len, kv_len)
    found, exact, plain = native(q, k, v), ops.quantized_attention(q, k, v), ops.attention(q, k, v)
    rows = slice(0, 256)  # fp64 on a GPU is slow: a few queries are enough
    trips = [ops.hif8_fake_quantize(t.float()).double() for t in (q, k, v)]
    wanted = _formula(trips[0][:, rows], *trips[1:])
    numbers = (
        distance(found, exact),
        distance(found[:, rows], wanted),
        distance(exact[:, rows], wanted),
        distance(found, plain),
    )
    cells = " | ".join(f"{number:.2e}" for number in numbers)
    return [f"| {kind}, {q_len} x {kv_len} | {cells} |"]


def _formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    outs = []
    for h in range(q.shape[2]):
        p = (q[0, :, h] @ k[0, :, h].mT * HEAD_DIM**-0.5).softmax(-1)
        outs.append(p @ v[0, :, h])
    return torch.stack(outs, 1)[None]


def scale_rows() -> Iterator[Callable[[], list[str]]]:
    for kind in ("plain", "sharp", "outliers"):
        yield _part(_with_scales, kind)


def _with_scales(kind: str) -> list[str]:
    """By the kernel's own parts: the scale of the result from the range of v, and from the result itself as delayed
    scaling would know it at best.
    """
    from ospnext.backends.cuda.attention import cudnn_fp8 as kernel

    q, k, v = _values(kind, 4096, 4096)
    exact = ops.quantized_attention(q, k, v)
    operands, scales = _carried(q, k, v)
    by_range = scales[2] * kernel._unit(QDQ.scale_max)
    by_result = exact.abs().amax().float().reshape(1) / 400.0
    rows = []
    for p_scale, (name, of_result) in itertools.product(
        P_SCALES, (("range of v", by_range), ("largest result", by_result))
    ):
        out = _graph(kernel, operands, scales, of_result, p_scale)
        found = (out.float() * of_result).bfloat16()
        rows.append(f"| {kind} | {p_scale:.0f} | {name} | {distance(found, exact):.2e} |")
    return rows


def _carried(*tensors: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    pairs = [ops.hif8_quantize(t, carried=True) for t in tensors]
    return [pair.codes for pair in pairs], [pair.scale.reshape(1) for pair in pairs]


def _graph(kernel, operands: list[Tensor], scales: list[Tensor], of_result: Tensor, p_scale: float) -> Tensor:
    scalars = dict(zip(("descale_q", "descale_k", "descale_v"), scales, strict=True)) | {"scale_o": 1.0 / of_result}
    out = torch.empty(operands[0].shape, dtype=carrier.DTYPE, device="cuda")
    kernel.run_graph(*operands, out, scalars, HEAD_DIM**-0.5, p_scale)
    return out


# ---- time


def milliseconds(call: Callable[[], object]) -> float:
    return timed(call, torch.device("cuda"), repeats=REPEATS, warm_up=2).median


def time_rows() -> Iterator[Callable[[], list[str]]]:
    yield _part(_dense_times, "full block, 768P", 1, FULL, FULL)
    yield _part(_dense_times, "sparse block, 768P", 4, SPARSE, SPARSE)
    yield _part(_dense_times, "text, 768P", 1, FULL, TEXT)
    yield _part(_packed_times)


def _dense_times(name: str, batch: int, q_len: int, kv_len: int) -> list[str]:
    from ospnext.backends.cuda.attention import cudnn_fp8 as kernel
    from ospnext.backends.cuda.kernels.centre import quantize_centred
    from ospnext.backends.cuda.kernels.widen import widen

    q, k, v = (randn(batch, n, HEADS, HEAD_DIM) for n in (q_len, kv_len, kv_len))
    flops = 4 * batch * q_len * kv_len * HEADS * HEAD_DIM
    rows = _whole(name, (q, k, v), {}, flops, ops.attention)
    operands, scales = _carried(q, k, v)
    of_result = scales[2] * kernel._unit(QDQ.scale_max)
    out = _graph(kernel, operands, scales, of_result, kernel.P_SCALE)
    centre = torch.zeros(HEADS * HEAD_DIM, device="cuda")
    for what, call in (
        ("quantize q and k", lambda: _carried(q, k)),
        ("centre and quantize v", lambda: quantize_centred(v.flatten(2).flatten(0, 1), 15.0, "amax")),
        ("graph", lambda: _graph(kernel, operands, scales, of_result, kernel.P_SCALE)),
        ("widen the result", lambda: widen(out, of_result, centre, torch.bfloat16)),
    ):
        ms = milliseconds(call)
        rate = f"{flops / ms / 1e9:.0f}" if what == "graph" else ""
        rows.append(f"| {name} | of it: {what} | {ms:.2f} | {rate} | |")
    return rows


def _packed_times() -> list[str]:
    q, k, v = (randn(sum(PACKED), HEADS, HEAD_DIM) for _ in range(3))
    ends = torch.tensor([0, *PACKED], device="cuda").cumsum(0).int()
    pack = {"cu_seqlens_q": ends, "cu_seqlens_kv": ends, "max_seqlen_q": max(PACKED), "max_seqlen_kv": max(PACKED)}
    flops = 4 * sum(n**2 for n in PACKED) * HEADS * HEAD_DIM
    return _whole("sparse block, 720P, packed", (q, k, v), pack, flops, ops.attention_packed)


def _whole(name: str, operands: tuple[Tensor, ...], pack: dict, flops: int, plain: Callable) -> list[str]:
    bf16 = _fastest()
    rows, base = [], 0.0
    with use_backend("cuda", ops={"attention": bf16}):
        for what, call in (
            (f"{bf16}, bf16", lambda: plain(*operands, **pack)),
            (f"qdq with {bf16}", lambda: ops.quantized_attention(*operands, recipe=QDQ, **pack)),
            ("cuda.cudnn_fp8, native", lambda: native(*operands, **pack)),
        ):
            ms = milliseconds(call)
            base = base or ms
            rows.append(f"| {name} | {what} | {ms:.2f} | {flops / ms / 1e9:.0f} | {base / ms:.2f} |")
    return rows


def _fastest() -> str:
    """The first bf16 attention of the backend whose packages are installed."""
    offers = registry().manifests["cuda"].offers("attention")
    return next(i.id for i in offers if not registry().missing_packages(i))


if __name__ == "__main__":
    torch.manual_seed(0)
    with torch.no_grad(), use_backend("cuda"):
        main()
