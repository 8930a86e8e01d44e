"""Fused kernels that are broken on purpose, and the checks that must find each."""

from __future__ import annotations

import dataclasses

import broken_fused as fused
import broken_fused_quantize as fused_quantize
from mutant import BEYOND, OVERWRITTEN, Mutant, backend, fault_of, ids, known, name_of

from ospnext.backends.reference import MANIFEST
from ospnext.ops.registry import Implementation

#: Spared by whatever is wrong with a fused kernel.
NO_FUSED = "attention/required/b1-q1-k3-h2-d64-fp32-plain"
_FEATURES = (
    *("affine", "modulated", "gated", "permuted", "backward"),
    *("scale_max", "scale_mode", "granularity", "carried"),
)


def _of_fused(kernel: fused.Honest, kills: str, spares: str, says: str = BEYOND) -> tuple[str, Mutant]:
    """`kills` and `spares` are ids without "fused.<operator>/optional/", separated by blanks."""
    name = name_of(type(kernel))
    if name in _SEVERAL or kernel.operator != type(kernel).operator:
        name = f"{kernel.operator}_{name}"
    globals()[name] = kernel
    contract = f"fused.{kernel.operator}"
    broken = Implementation(f"{name}.kernel", contract, f"{__name__}:{name}", handles=known(contract, _FEATURES))
    checks = (ids(f"{contract}/optional/", part) for part in (kills, spares))
    attention = MANIFEST.offers("attention")
    honest = (dataclasses.replace(other, id=f"{name}.{other.id.partition('.')[2]}") for other in attention)
    return name, Mutant(backend(name, broken, *honest), *checks, says, fault=fault_of(kernel))


#: Faults that several operators have, or attention and an operator.
_SEVERAL = ("loses_tokens_past_65535", "wrong_strides", "result_in_fp32")
_F, _Q = fused, fused_quantize
_LONG = {
    "rms_norm": "",
    "layer_norm_modulate": "-affine-modulated",
    "rope": "",
    "rms_norm_rope": "",
    "gate_residual": "-gated-permuted",
    "gelu_tanh": "",
}
MUTANTS = (
    _of_fused(_F.WrongRopePairing(), "fp32-plain bf16-plain bf16-backward", NO_FUSED),
    _of_fused(_F.RopeBackwardTurnsForward(), "fp32-backward bf16-backward", "fp32-plain"),
    _of_fused(_F.RmsEpsOutsideRoot(), "small-fp32-backward", "bf16-plain"),
    _of_fused(_F.RmsWeightDropped(), "fp32-plain bf16-plain", NO_FUSED),
    _of_fused(_F.ResultInFp32("rms_norm"), "bf16-plain", "fp32-plain", "the contract asks for"),
    _of_fused(_F.WrongStrides("rms_norm"), "fp32-plain bf16-plain", NO_FUSED, "strides"),
    _of_fused(_F.WeightGradientOfOneSample(), "fp32-backward bf16-backward", "fp32-plain"),
    _of_fused(_F.HalvesTurned(), "fp32-plain bf16-plain bf16-backward", NO_FUSED),
    _of_fused(_F.TurnsWhatIsNotNormed(), "fp32-plain bf16-plain", NO_FUSED),
    _of_fused(_F.TurnsBeforeTheNorm(), "fp32-plain bf16-plain", NO_FUSED),
    _of_fused(_F.NormOfEachHead(), "fp32-plain bf16-plain", NO_FUSED),
    _of_fused(_F.RmsWeightDropped("rms_norm_rope"), "fp32-plain bf16-plain", NO_FUSED),
    _of_fused(_F.WeightGradientOfOneSample("rms_norm_rope"), "fp32-backward bf16-backward", "fp32-plain"),
    _of_fused(_F.RopeBackwardTurnsForward("rms_norm_rope"), "fp32-backward bf16-backward", "fp32-plain"),
    _of_fused(_F.LayerNormUnbiasedVariance(), "fp32-plain fp32-affine-modulated", NO_FUSED),
    _of_fused(_F.LayerNormScaleWithoutOne(), "fp32-modulated bf16-affine-modulated", "fp32-affine"),
    _of_fused(_F.ScaleAndShiftSwapped(), "fp32-modulated bf16-affine-modulated", "fp32-affine"),
    _of_fused(_F.GateDropped(), "fp32-gated bf16-gated-permuted", "fp32-plain"),
    _of_fused(_F.PermutationInverted(), "fp32-permuted bf16-gated-permuted", "fp32-gated"),
    _of_fused(_F.BackwardForgetsPermutation(), "fp32-permuted-backward bf16-gated-permuted-backward", "fp32-permuted"),
    _of_fused(_F.ResidualInPlace(), "fp32-plain bf16-gated-permuted", NO_FUSED, OVERWRITTEN),
    _of_fused(_F.GeluErf(), "fp32-plain", NO_FUSED),
    _of_fused(_F.GeluInPlace(), "fp32-plain bf16-plain", NO_FUSED, OVERWRITTEN),
    _of_fused(_F.BiasLeftOut(), "fp32-plain bf16-plain bf16-aligned", "bf16-m0"),
    _of_fused(_F.GeluErf("linear_gelu_tanh"), "fp32-plain fp32-aligned", "fp32-m0"),
    _of_fused(_F.GeluLeftOut(), "fp32-plain bf16-plain bf16-one", "bf16-m0"),
    _of_fused(_F.LastInputFeaturesLeftOut(), "fp32-plain bf16-plain bf16-one bf16-n75600", "bf16-aligned fp32-aligned"),
    _of_fused(_F.LosesTokensPast65535("linear_gelu_tanh"), "bf16-n75600", "bf16-plain"),
    _of_fused(_Q.ScaleOfTheTensor(), "bf16-plain fp32-affine-modulated bf16-affine-modulated-carried", NO_FUSED),
    _of_fused(_Q.QuantizesBeforeModulation(), "fp32-modulated fp32-affine-modulated", "bf16-zerorow"),
    _of_fused(_Q.ScaleBeforeModulation(), "fp32-modulated bf16-affine-modulated", "fp32-plain bf16-affine"),
    _of_fused(
        _Q.CarriedScaleNotDivided(), "bf16-affine-modulated-carried fp32-affine-modulated-carried-224", "bf16-plain"
    ),
    _of_fused(_Q.NanOfOneRowInAll(), "bf16-affine-modulated-nan bf16-affine-modulated-inf", "bf16-plain"),
    _of_fused(
        _Q.ScaleOfTheFirstRow(),
        "bf16-affine-modulated-tensor fp32-affine-modulated-tensor-carried",
        "bf16-plain fp32-affine-modulated-carried",
    ),
    _of_fused(_Q.QuantizedInPlace(), "fp32-plain bf16-affine", NO_FUSED, OVERWRITTEN),
    _of_fused(_Q.CarriedForgotten(), "bf16-carried fp32-carried-224", "bf16-plain fp32-pow2"),
    _of_fused(_Q.ScaleSettingsForgotten(), "bf16-pow2 fp32-224 fp32-carried-224", "bf16-plain fp32-carried"),
    _of_fused(_Q.CodesOfX(), "bf16-plain fp32-carried", NO_FUSED),
    _of_fused(_Q.NanIsNotTheLargest(), "bf16-nan fp32-nan bf16-carried-nan", "bf16-plain"),
    _of_fused(_Q.ZeroRowHasNoScale(), "bf16-zerorow fp32-zerorow bf16-carried-zerorow", "bf16-plain"),
    *(
        _of_fused(_Q.LosesRowsPast65535(name), f"n75600-bf16-{words}", NO_FUSED)
        for name, words in (("layer_norm_modulate_quantize", "affine-modulated"), ("gelu_tanh_quantize", "plain"))
    ),
    *(_of_fused(_F.LosesTokensPast65535(name), f"n75600-bf16{_LONG[name] or '-plain'}", NO_FUSED) for name in _LONG),
)

#: Within what plain rounding costs in 16 bits, from which the bounds come.
UNSEEN = (_of_fused(_F.RoundsBetweenSteps(), "", ""),)
