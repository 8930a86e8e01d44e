"""What cuDNN's FP8 attention loses in long sums, and what is left of that without the mean of v.

    python benchmarks/fp8_long_sums.py --out benchmarks/results/fp8_long_sums.md

128 queries, 4 heads of 128 channels, against fp64 on the same rounded operands. Needs one Hopper GPU and
nvidia-cudnn-frontend; half a minute."""

from __future__ import annotations

import argparse
import itertools
import math
from pathlib import Path

import torch
from torch import Tensor

from ospnext.backends.cuda.attention import cudnn_fp8
from ospnext.backends.cuda.kernels.centre import quantize_centred
from ospnext.backends.cuda.quantize import quantize
from ospnext.numerics import carrier

KEYS, MEANS, SHARPNESS = (1024, 4096, 20_160, 80_640), (0.0, 0.5, 2.0), (1.0, 3.0)
HEADS, DIM, QUERIES = 4, 128, 128
HEAD = "| keys | mean of v in deviations | deviation of q | as cuDNN adds | of it in the mean | without the mean of v |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the result here too")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    lines = [
        "# Long sums on FP8 tensor cores",
        "",
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}. "
        "Relative errors.",
        "",
        HEAD,
        "|" + " --- |" * (HEAD.count("|") - 1),
        *(row(*sizes) for sizes in itertools.product(KEYS, MEANS, SHARPNESS)),
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


def row(keys: int, mean: float, sharpness: float) -> str:
    q = torch.randn(1, QUERIES, HEADS, DIM, device="cuda").bfloat16() * sharpness
    k, v = (torch.randn(1, keys, HEADS, DIM, device="cuda").bfloat16() for _ in range(2))
    v = v + mean
    (q8, q_by), (k8, k_by), (v8, v_by) = (_carried(t) for t in (q, k, v))
    exact = _attention(*(codes.double() * by.double() for codes, by in ((q8, q_by), (k8, k_by), (v8, v_by))))
    found = _by_cudnn((q8, k8, v8), (q_by, k_by, v_by))
    rest, rest_by, centre = quantize_centred(v.flatten(2)[0], 15.0, "amax")
    rest = rest.view(v.shape)
    centre = centre.view(HEADS, DIM).double()
    of_rest = _attention(q8.double() * q_by.double(), k8.double() * k_by.double(), rest.double() * rest_by.double())
    centred = _by_cudnn((q8, k8, rest), (q_by, k_by, rest_by)) + centre
    lost = (found - exact).mean().abs() / exact.mean().abs()
    errors = (_error(found, exact), lost.item(), _error(centred, of_rest + centre))
    return f"| {keys} | {mean} | {sharpness} | " + " | ".join(f"{error:.1e}" for error in errors) + " |"


def _carried(x: Tensor) -> tuple[Tensor, Tensor]:
    return quantize(x, None, scale_max=15.0, scale_mode="amax", granularity="tensor", carried=True)


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return (torch.softmax(q @ k.mT / math.sqrt(DIM), -1) @ v).transpose(1, 2)


def _by_cudnn(operands: tuple[Tensor, ...], scales: tuple[Tensor, ...]) -> Tensor:
    by = [scale.reshape(1) for scale in scales]
    of_result = by[2] * cudnn_fp8._unit(15.0)
    out = torch.empty(operands[0].shape, dtype=carrier.DTYPE, device="cuda")
    scalars = dict(zip(("descale_q", "descale_k", "descale_v"), by, strict=True)) | {"scale_o": 1 / of_result}
    cudnn_fp8.run_graph(*operands, out, scalars, DIM**-0.5)
    return out.double() * of_result.double()


def _error(found: Tensor, exact: Tensor) -> float:
    return ((found - exact).norm() / exact.norm()).item()


if __name__ == "__main__":
    main()
