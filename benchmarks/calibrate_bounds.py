"""Which factor over the yardstick's error would kernels that nobody here wrote have needed? The answer fixes
RESULT_FACTOR and GRADIENT_FACTOR in ospnext/ops/tolerance.py.

    python benchmarks/calibrate_bounds.py --seeds 5 > benchmarks/results/bounds_$(hostname).txt

For every kernel that PyTorch has on the device, every dense attention case with a backward pass and every seed: the
smallest f with max|Y-R| <= f max|P-R| + 2 u max|R| and rms(Y-R)/rms(R) <= f rms(P-R)/rms(R) + u. Zero means that the
constant term alone was enough."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ospnext.ops.contract import Case
from ospnext.ops.contracts.attention import CONTRACT
from ospnext.ops.tolerance import UNIT_ROUNDOFF, factor_of, judge

KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
RESULTS = ("out", "dq", "dk", "dv")


def cases(longest: int) -> Iterator[Case]:
    for case in CONTRACT.cases():
        request = case.request
        wide = max(request.q_len, request.kv_len) > longest
        if request.backward and not (request.packed or request.key_mask or case.exact or wide):
            yield case


def run(kernel: SDPBackend, inputs: dict, device: torch.device) -> dict[str, Tensor]:
    leaves = [inputs[name].to(device).requires_grad_() for name in ("q", "k", "v")]
    with sdpa_kernel(kernel):
        out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in leaves), scale=inputs.get("scale"))
        out = out.transpose(1, 2)
        grads = torch.autograd.grad(out, leaves, inputs["grad_out"].to(device))
    return dict(zip(RESULTS, (out.detach(), *grads), strict=True))


def factor_needed(found: Tensor, oracle: Tensor, yardstick: Tensor) -> float:
    verdict = judge(found, oracle, yardstick, factor=1.0)
    if not verdict.finite:
        return float("inf")
    unit, largest = UNIT_ROUNDOFF[found.dtype], oracle.abs().max().item()
    pairs = ((verdict.max_error, verdict.max_bound, 2 * unit * largest), (verdict.rms_error, verdict.rms_bound, unit))
    return max((max(0.0, error - constant) / max(bound - constant, 1e-300)) for error, bound, constant in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default=str(torch.accelerator.current_accelerator() or "cpu"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--longest", type=int, default=100_000, help="leave out cases with more tokens")
    args = parser.parse_args()
    device = torch.device(args.device)
    name = torch.get_device_module(device).get_device_name() if device.type != "cpu" else platform.machine() + " CPU"
    print(f"# {name}, torch {torch.__version__}, {args.seeds} seeds, cases of up to {args.longest} tokens")

    worst: dict[tuple[str, str, str], tuple[float, str]] = {}
    per_case: dict[tuple[str, str], tuple[float, str]] = {}
    refused: dict[tuple[str, str], str] = {}
    for case in cases(args.longest):
        tag = str(case.request.dtype).removeprefix("torch.")
        for seed in range(args.seeds):
            inputs = CONTRACT.inputs(replace(case, id=f"{case.id}#{seed}"))
            inputs["return_lse"] = False
            expected = CONTRACT.expect(inputs)
            assert expected.yardstick is not None
            for kernel, backend in KERNELS.items():
                try:
                    found = run(backend, inputs, device)
                except RuntimeError as error:
                    refused[kernel, tag] = str(error).splitlines()[0][:60]
                    continue
                for result in RESULTS:
                    needed = factor_needed(found[result], expected.oracle[result], expected.yardstick[result])
                    key = (kernel, tag, result)
                    at = (kernel, case.id.removeprefix("attention/"))
                    per_case[at] = max(per_case.get(at, (0.0, "")), (needed / factor_of(result), result))
                    worst[key] = max(worst.get(key, (0.0, "")), (needed, case.id.removeprefix("attention/")))

    print(f"{'kernel':<10} {'dtype':<9} " + "  ".join(f"{r:>5}" for r in RESULTS) + "   case of the largest")
    for kernel, tag in dict.fromkeys(key[:2] for key in worst):
        row = [worst[kernel, tag, result] for result in RESULTS]
        print(f"{kernel:<10} {tag:<9} " + "  ".join(f"{w[0]:5.2f}" for w in row) + f"   {max(row)[1]}")
    print("cases beyond the factors in force:")
    for (kernel, identifier), (needed, result) in sorted(per_case.items(), key=lambda item: -item[1][0]):
        if needed > 1.0:
            print(f"  {needed:8.2f} times  {kernel:<10} {result:<4} {identifier}")
    for (kernel, tag), why in refused.items():
        if not any(key[:2] == (kernel, tag) for key in worst):
            print(f"{kernel:<10} {tag:<9} refused: {why}")


if __name__ == "__main__":
    main()
