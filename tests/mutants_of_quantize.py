"""Kernels of the quantize family that are broken on purpose, and the checks that must find each."""

from __future__ import annotations

import dataclasses

import broken_native_attention as native
import broken_quantize as quantize
from mutant import BEYOND, NO_KERNEL, OVERWRITTEN, Mutant, backend, fault_of, ids, known, name_of

from ospnext.backends.reference import MANIFEST
from ospnext.ops.registry import Implementation

_FEATURES = (
    *("saturate", "scale_max", "scale_mode", "granularity", "given_amax"),
    *("x_granularity", "weight_granularity", "bias", "accumulate", "backward", "grad_scale_max", "mixed_bias"),
    *("packed", "custom_scale"),
)


def _of_quantize(kernel: type, kills: str, spares: str, says: str = BEYOND) -> tuple[str, Mutant]:
    """`kills` and `spares` are ids without "<contract>/required/", separated by blanks. Beside the broken kernel stand
    those of the reference for the other contracts.
    """
    name, contract = name_of(kernel), kernel.contract
    globals()[name] = kernel()
    features = known(contract, {*_FEATURES, *getattr(kernel, "features", ())})
    broken = Implementation(f"{name}.hif8", contract, f"{__name__}:{name}", handles=features)
    honest = (
        dataclasses.replace(other, id=f"{name}.{other.id.partition('.')[2]}")
        for other in MANIFEST.implementations
        if other.contract != contract
    )
    checks = (ids(f"{contract}/required/", part) for part in (kills, spares))
    return name, Mutant(backend(name, broken, *honest), *checks, says, fault=fault_of(globals()[name]))


_Q = quantize
_CARRIED = "hif8_quantize/optional/bf16-carried hif8_quantize/optional/fp32-carried-row"
QUANTIZE = (
    _of_quantize(_Q.TiesToEven, "bf16-all fp16-all fp32-boundaries", "bf16-scalar"),
    _of_quantize(_Q.TiesTowardsZero, "bf16-all fp32-boundaries", "bf16-scalar"),
    _of_quantize(_Q.NoOverflow, "bf16-all fp32-boundaries", "bf16-all-saturate fp16-all-saturate"),
    _of_quantize(_Q.SaturateDropped, "bf16-all-saturate fp32-boundaries-saturate", "bf16-all fp32-boundaries"),
    _of_quantize(_Q.FlushMissing, "bf16-all fp32-boundaries", "fp32-scalar"),
    _of_quantize(_Q.HalfOfTheSmallestFlushed, "bf16-all fp16-all fp32-boundaries", "fp32-plain"),
    _of_quantize(_Q.NegativeZeroKept, "bf16-all fp32-boundaries", "fp32-scalar"),
    _of_quantize(_Q.NanBecomesInfinite, "bf16-all fp16-all fp32-boundaries", "fp32-plain"),
    _of_quantize(_Q.RoundsTwice, "fp32-boundaries fp64-boundaries", "bf16-all"),
    _of_quantize(_Q.LastElementsLost, "bf16-n4194305 bf16-plain fp32-1", "bf16-all"),
    _of_quantize(_Q.InfinityIsAValue, "bf16-all fp32-all", "bf16-0x5"),
    _of_quantize(_Q.NanIsNegativeZero, "bf16-all fp32-all", "fp32-plain"),
    _of_quantize(_Q.SubnormalsTwiceAsLarge, "fp16-all fp32-plain", "bf16-0x5"),
    _of_quantize(
        _Q.RankLocalAmax,
        "bf16-given fp32-given-row bf16-overflow",
        "bf16-tensor fp32-row",
        "",
    ),
    _of_quantize(_Q.OneScaleForAll, "bf16-row fp32-channel bf16-zerorow", "bf16-tensor", ""),
    _of_quantize(_Q.LargestNotMagnitude, "fp32-row bf16-channel", "bf16-zero", ""),
    _of_quantize(_Q.ScaleInBf16, "bf16-row fp32-tensor-224", "bf16-tensor-pow2", ""),
    _of_quantize(_Q.PowerOfTwoBelow, "bf16-tensor-pow2 fp32-tensor-pow2 bf16-row-pow2", "bf16-tensor", ""),
    _of_quantize(_Q.ZeroHasNoScale, "bf16-zero bf16-zerorow bf16-0x7", "bf16-tensor", "scale is"),
    _of_quantize(_Q.NanSurvivesAlone, "bf16-nan fp32-nan-row fp32-inf-channel", "bf16-tensor", ""),
    _of_quantize(_Q.ScaleIgnored, "bf16-tensor fp32-row", "bf16-zero", "codes is"),
    _of_quantize(_Q.ScaleAppliedTwice, "bf16-tensor fp32-row", "bf16-zero", "codes is"),
    _of_quantize(_Q.ReciprocalProduct, "hif8_quantize/optional/bf16-division", "fp32-tensor bf16-ties", "codes is"),
    _of_quantize(_Q.CarriedScaleKept, _CARRIED, "bf16-tensor", "scale is"),
    _of_quantize(_Q.CarriedUnshifted, _CARRIED, "bf16-tensor", "codes is"),
    _of_quantize(_Q.NotScaledBack, "bf16-tensor fp32-row", "hif8_encode/required/bf16-scalar"),
    _of_quantize(_Q.NotRounded, "bf16-tensor fp32-row fp32-ties", "hif8_encode/required/bf16-scalar"),
    _of_quantize(_Q.RankLocalRoundTrip, "bf16-given fp32-given hif8_shared_amax/required/r2-bf16", "bf16-tensor"),
    _of_quantize(_Q.ScaleOfXIgnored, "fp32-plain bf16-backward fp32-row", "fp32-scalenan bf16-exact-backward"),
    _of_quantize(_Q.ScaleOfWeightIgnored, "fp32-plain bf16-stored fp32-scale0", "bf16-exact-backward"),
    _of_quantize(_Q.ScalesAppliedTwice, "fp32-plain bf16-row", "bf16-exact-backward"),
    _of_quantize(_Q.BiasBeforeScales, "fp32-backward bf16-stored", "fp32-plain bf16-exact-backward"),
    _of_quantize(_Q.BiasDropped, "fp32-backward bf16-stored fp32-k0", "fp32-plain"),
    _of_quantize(_Q.SumsInBf16, "fp32-plain fp32-k13824", "fp32-k1-n1-backward"),
    _of_quantize(_Q.SumsKeep14Bits, "fp32-k13824 bf16-aligned-k13824", "fp32-k1-n1-backward bf16-tiles-backward"),
    _of_quantize(_Q.LastFeaturesNotAdded, "fp32-plain bf16-backward", "bf16-tiles-backward"),
    _of_quantize(_Q.LastTokensLost, "fp32-plain bf16-m1-backward", "bf16-tiles-backward"),
    _of_quantize(_Q.OneScalePerTensor, "fp32-row bf16-stored-row", "bf16-backward"),
    _of_quantize(_Q.NanInWeightsLost, "fp32-scalenan", "fp32-stored"),
    _of_quantize(_Q.NeverFp64, "fp32-accumulate64-k13824", "fp32-k13824"),
    _of_quantize(_Q.GradientNotScaled, "fp32-backward bf16-stored-backward", "bf16-exact-backward fp32-plain"),
    _of_quantize(_Q.WeightGradientOfHalfTheTokens, "fp32-backward bf16-exact-backward", "fp32-plain"),
    _of_quantize(_Q.BiasGradientNotScaled, "fp32-backward bf16-backward", "fp32-rawbias-backward"),
    _of_quantize(_Q.WeightGradientInTheDtypeOfX, "bf16-fp32weight-backward", "bf16-backward"),
    _of_quantize(_Q.CodesWritten, "bf16-stored fp32-stored-row", "fp32-plain", OVERWRITTEN),
)


# ---- attention on 8-bit operands


def _of_native(kernel: type, kills: str, spares: str) -> tuple[str, Mutant]:
    """`kills` and `spares` are ids without "native_attention/optional/", separated by blanks."""
    kills, spares = (" ".join(ids("native_attention/optional/", words)) for words in (kills, spares))
    return _of_quantize(kernel, kills, spares)


_N = native
NATIVE = (
    _of_native(_N.ProbabilitiesInE5m2, "bf16-plain fp32-plain bf16-packed", "bf16-zeroscale bf16-needle"),
    _of_native(_N.ProbabilitiesTruncated, "bf16-plain fp32-plain bf16-packed", "bf16-zeroscale bf16-needle"),
    _of_native(_N.SmallProbabilitiesLost, "fp32-plain fp32-packed bf16-k20160", "bf16-zeroscale bf16-needle"),
    _of_native(_N.ResultClipped, "bf16-needle fp32-needle", "bf16-plain fp32-plain"),
    _of_native(_N.ResultInE5m2, "bf16-plain fp32-packed bf16-large", NO_KERNEL),
    _of_native(_N.KeyScaleForgotten, "bf16-plain bf16-packed bf16-pow2", "bf16-zeroscale"),
    _of_native(_N.ScalesTwiceAsLarge, "bf16-plain bf16-packed fp32-cross", "bf16-zeroscale"),
    _of_native(_N.PlainE4m3, "bf16-pow2", "bf16-plain"),
    _of_native(_N.MeanKept, "bf16-k20160-offset bf16-plain fp32-large", NO_KERNEL),
    _of_native(_N.SumsKeep9Bits, "bf16-k20160", "bf16-plain bf16-needle"),
    _of_native(_N.CentreForgotten, "bf16-plain bf16-k20160-offset fp32-packed", NO_KERNEL),
    _of_native(_N.NotQuantized, "bf16-scale fp32-plain bf16-pow2", "bf16-zeroscale"),
    _of_native(_N.PackedAsOne, "bf16-packed fp32-packed-empty", "bf16-plain"),
)

MUTANTS = (*QUANTIZE, *NATIVE)
