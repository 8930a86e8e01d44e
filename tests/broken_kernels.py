"""Backends that are broken on purpose, each in one way, and the checks that must find each: so the suite itself
is tested by them.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from dataclasses import dataclass

import broken_attention as attention
import broken_fused as fused
import broken_native_attention as native
import broken_quantize as quantize
import broken_sizes as sizes
import broken_unseen as unseen
import torch

from ospnext.backends.reference import MANIFEST
from ospnext.ops.contract import need
from ospnext.ops.registry import Implementation, Manifest, Refusal


@dataclass(frozen=True)
class Mutant:
    """A broken backend, checks that must find it and checks that must not."""

    manifest: Manifest
    kills: tuple[str, ...]
    spares: tuple[str, ...]
    #: Part of the message of every killing check: it fails for the fault's own reason.
    says: str = ""
    #: "error": the kernel raises.
    status: str = "fail"
    #: What is wrong, in a line.
    fault: str = ""

    @property
    def contract(self) -> str:
        """The contract that the broken implementation is of."""
        return self.manifest.implementations[0].contract

    @property
    def complaint(self) -> str:
        """The report of a user whom this fault hurt."""
        return next(iter(re.findall(r"https://\S+", self.fault)), "")


(SDPA, MATH) = MANIFEST.offers("attention")
_FUSED_FEATURES = frozenset(
    {*("affine", "modulated", "gated", "permuted", "backward"), *("scale_max", "scale_mode", "granularity", "carried")}
)

BEYOND = " times its bound"
OVERWRITTEN = "was written to"


def _backend(name: str, *kernels: Implementation) -> Manifest:
    return dataclasses.replace(MANIFEST, backend=name, implementations=kernels)


def _name(kernel: type) -> str:
    words = re.sub(r"(?<=[a-z])(?=[A-Z\d])|(?<=\d)(?=[A-Z])", "_", kernel.__name__).lower()
    return re.sub(r"\b(\w*)(bf|fp)_(16|32)", r"\1\2\3", words)


def _ids(prefix: str, words: str) -> tuple[str, ...]:
    """Ids separated by blanks, in full or without `prefix`."""
    return tuple(word if "/" in word else prefix + word for word in words.split())


def _is_mutant(kernel: object) -> bool:
    """Whether it is a class that broken_unseen.py itself defines."""
    return isinstance(kernel, type) and kernel.__module__ == unseen.__name__


def _fault(kernel: object) -> str:
    return " ".join((type(kernel).__doc__ or "").split())


# ---- attention

#: Spared by whatever is wrong with every call of a kernel: no kernel is judged here.
NO_KERNEL = "selection/required/predicates-are-pure"
#: Spared by whatever is wrong with a fused kernel.
NO_FUSED = "attention/required/b1-q1-k3-h2-d64-fp32-plain"

#: Sample, query and key sizes of the cases below, short.
VIDEO = "b2-q32-k75600-h1-d128-bf16-backward"
VIDEO_NEEDLE = "b1-q609-k75600-h1-d128-bf16-plain-needle"
TINY, ODD, UNEVEN = "q1-k3-h2-d64", "q113-k113-h2-d64", "q239-k203-h2-d64"


def _of_attention(
    kernel: type[attention.MathAttention], kills: str, spares: str, says: str = BEYOND, status: str = "fail"
) -> tuple[str, Mutant]:
    """`kills` and `spares` are ids without "attention/required/", separated by blanks."""
    name = _name(kernel)
    globals()[name] = kernel()  # where the manifest's target finds it
    manifest = _backend(name, dataclasses.replace(MATH, id=f"{name}.math", target=f"{__name__}:{name}"))
    ids = (_ids("attention/required/", part) for part in (kills, spares))
    return name, Mutant(manifest, *ids, says, status, _fault(globals()[name]))


_A = attention
ATTENTION = (
    # At the length of a video: as few checks as possible, their oracles take half a minute each.
    _of_attention(_A.LostLast16KeysAt75600, VIDEO_NEEDLE, "b1-q26-k1023-h2-d64-bf16-backward-needle"),
    _of_attention(_A.OffsetsWrapAt32Bits, VIDEO, "b2-q128-k512-h2-d64-bf16-plain"),
    _of_attention(_A.Bf16Accumulation, VIDEO, "b1-q1023-k1024-h2-d64-fp32-plain"),
    _of_attention(_A.InvertedMask, f"b2-{TINY}-fp32-mask b2-{ODD}-bf16-mask", f"b1-{TINY}-fp32-plain"),
    _of_attention(_A.DroppedMask, f"b2-{TINY}-fp32-mask b2-{ODD}-bf16-mask", f"b1-{TINY}-fp32-plain"),
    _of_attention(
        _A.MaskIgnoredPastKey512,
        "b2-q704-k704-h2-d64-bf16-mask b2-q704-k704-h2-d64-fp32-mask",
        "b2-q128-k512-h2-d64-bf16-mask",
    ),
    _of_attention(_A.MaskOfOneSample, f"b2-{TINY}-fp32-mask", f"b1-{TINY}-fp32-plain"),
    _of_attention(
        _A.MaskedNanLeaks,
        f"b2-{ODD}-fp32-mask-lse-backward-nan b2-{ODD}-bf16-mask-lse-backward-nan",
        f"b2-{ODD}-fp32-mask-lse-backward",
    ),
    _of_attention(_A.FullyMaskedRowsUniform, f"b2-{TINY}-fp32-mask b2-{ODD}-bf16-mask", f"b1-{TINY}-fp32-plain"),
    _of_attention(
        _A.FullyMaskedRowsNanBackward,
        f"b2-{ODD}-fp32-mask-lse-backward b2-{TINY}-bf16-mask-lse-backward",
        f"b2-{ODD}-fp32-mask b2-{ODD}-fp32-backward",
    ),
    _of_attention(
        _A.NanAt64Mod128,
        "b2-q704-k704-h2-d64-fp32-mask-lse-backward-shifted",
        "b1-q704-k704-h2-d64-fp32-lse-backward-shifted b2-q704-k704-h2-d64-fp32-mask-lse-backward",
    ),
    _of_attention(
        _A.UniformAverage, "packed-uneven-h2-d64-fp32-plain packed-empty-h2-d64-bf16-plain", f"b2-{ODD}-fp32-plain"
    ),
    _of_attention(
        _A.LostLastKey,
        f"b1-{TINY}-bf16-plain b2-{ODD}-fp32-plain b1-q26-k1023-h2-d64-bf16-backward-needle",
        "packed-uneven-h2-d64-fp32-plain",
    ),
    _of_attention(
        _A.PackedIgnoresBoundaries,
        "packed-uneven-h2-d64-fp32-plain packed-empty-h2-d64-bf16-plain",
        "invariant-one-packed-sequence-is-dense-fp32",
    ),
    _of_attention(
        _A.PackedSequencesPast4Lost,
        "model/required/dual_end-k3-fp32-blocks",
        "packed-uneven-h2-d64-fp32-plain",
    ),
    _of_attention(
        _A.EmptySequenceNan,
        "packed-empty-h2-d64-fp32-plain packed-empty-h2-d64-bf16-plain",
        "packed-uneven-h2-d64-fp32-plain",
    ),
    _of_attention(
        _A.ContiguityAssumedOfV,
        f"b2-{ODD}-fp32-backward-transposed b2-{ODD}-fp32-backward-fused_qkv b2-{ODD}-bf16-backward-last_stride "
        f"b2-{ODD}-bf16-backward-broadcast packed-uneven-h2-d64-fp32-lse-backward-transposed",
        f"b2-{ODD}-fp32-backward b2-{ODD}-fp32-backward-offset",
    ),
    _of_attention(
        _A.ContiguityAssumedOfMask,
        f"b2-{ODD}-fp32-mask-lse-backward-last_stride b2-{ODD}-bf16-mask-lse-backward-fused_qkv",
        f"b2-{ODD}-fp32-mask-lse-backward",
    ),
    _of_attention(_A.AlignmentAssumed, f"b2-{ODD}-fp32-backward-offset", f"b2-{ODD}-fp32-backward-transposed"),
    _of_attention(
        _A.ContiguityAssumedOfGrad,
        f"b2-{ODD}-fp32-backward-transposed b2-{ODD}-bf16-backward-expanded_grad",
        f"b2-{ODD}-fp32-backward b2-{ODD}-fp32-backward-offset",
    ),
    _of_attention(_A.InPlaceInput, f"b1-{TINY}-fp32-plain b2-{ODD}-bf16-plain", NO_KERNEL, OVERWRITTEN),
    _of_attention(_A.OutputAliasesInput, f"b1-{TINY}-fp32-plain b2-{ODD}-bf16-plain", NO_KERNEL, OVERWRITTEN),
    _of_attention(_A.OutOfBoundsRead, f"b1-{TINY}-fp32-plain b2-{ODD}-bf16-plain", "packed-uneven-h2-d64-fp32-plain"),
    _of_attention(
        _A.OutOfBoundsWrite,
        f"b1-{TINY}-fp32-plain b2-{ODD}-bf16-plain packed-uneven-h2-d64-fp32-plain",
        NO_KERNEL,
        OVERWRITTEN,
    ),
    _of_attention(
        _A.WrongStrides, f"b2-{ODD}-fp32-plain packed-uneven-h2-d64-fp32-plain", f"b1-{TINY}-fp32-plain", "strides"
    ),
    _of_attention(_A.UnwrittenTail, f"b2-{ODD}-fp32-plain b1-{UNEVEN}-bf16-plain", "b2-q128-k512-h2-d64-fp32-plain"),
    _of_attention(_A.IgnoredScale, f"b1-{TINY}-fp32-scale b2-{ODD}-bf16-scale", f"b1-{TINY}-fp32-plain"),
    _of_attention(_A.ScaleMissingInDk, f"b1-{TINY}-fp32-backward b2-{ODD}-bf16-backward", f"b1-{TINY}-fp32-plain"),
    _of_attention(
        _A.Base2Logsumexp,
        f"b1-{TINY}-fp32-lse b2-{ODD}-bf16-lse invariant-halves-merge-by-logsumexp-fp32",
        f"b2-{ODD}-fp32-backward",
    ),
    _of_attention(_A.Bf16Logsumexp, f"b2-{ODD}-fp32-lse b2-{ODD}-bf16-lse", f"b2-{ODD}-fp32-plain"),
    _of_attention(_A.ResultInFp32, f"b1-{TINY}-bf16-plain", f"b1-{TINY}-fp32-plain", "the contract asks for"),
    _of_attention(
        _A.NoMaxSubtraction,
        "b1-q203-k239-h2-d64-fp32-lse-backward-large b1-q704-k704-h2-d64-bf16-lse-backward-shifted",
        f"b2-{ODD}-fp32-backward",
    ),
    _of_attention(_A.RoundedLogits, "b1-q203-k239-h2-d64-bf16-lse-backward-large", f"b2-{ODD}-fp32-plain"),
    _of_attention(
        _A.Nondeterministic,
        f"b2-{ODD}-fp32-backward-deterministic-repeated b2-{ODD}-bf16-backward-deterministic-repeated",
        f"b2-{ODD}-fp32-backward-deterministic",
        "differs from that of call 0",
    ),
    _of_attention(
        _A.StaleAfterOtherCall,
        f"b2-{ODD}-fp32-backward-interleaved b2-{ODD}-bf16-mask-lse-backward-interleaved "
        "packed-uneven-h2-d64-fp32-lse-backward-interleaved",
        f"b2-{ODD}-fp32-backward",
    ),
    _of_attention(
        _A.RaisesAlways, f"b1-{TINY}-fp32-plain b2-{ODD}-bf16-plain", NO_KERNEL, "FloatingPointError", "error"
    ),
)


_S = sizes
SIZES = (
    _of_attention(
        _S.MaskIgnoredPastKey1024, "b2-q64-k2113-h2-d64-fp32-mask-lse-backward", "b2-q704-k704-h2-d64-fp32-mask"
    ),
    _of_attention(_S.PackedLosesKeysPast256, "packed-many-h2-d64-fp32-plain", "packed-uneven-h2-d64-fp32-plain"),
    _of_attention(_S.HeadsPast8Lost, "b3-q37-k41-h40-d128-fp32-backward", "b1-q257-k257-h3-d128-fp32-lse-backward"),
    _of_attention(_S.SamplesPast2Lost, "b3-q37-k41-h40-d128-fp32-backward", "b2-q128-k512-h2-d64-fp32-plain"),
    _of_attention(
        _S.BackwardLosesQueriesPast1024, "b1-q2113-k64-h1-d64-fp32-backward", "b1-q1023-k1024-h2-d64-fp32-backward"
    ),
    _of_attention(_S.ZeroScaleIsDefault, "b1-q113-k113-h2-d64-fp32-zeroscale", f"b1-{TINY}-fp32-scale"),
    _of_attention(
        _S.GradientsShareMemory, f"b1-{TINY}-fp32-backward", f"b1-{TINY}-fp32-plain", "shares memory with an input or"
    ),
)


# ---- fused


def _of_fused(kernel: fused.Honest, kills: str, spares: str, says: str = BEYOND) -> tuple[str, Mutant]:
    """`kills` and `spares` are ids without "fused.<operator>/optional/", separated by blanks."""
    name = _name(type(kernel))
    if name in _SEVERAL or kernel.operator != type(kernel).operator:
        name = f"{kernel.operator}_{name}"
    globals()[name] = kernel
    contract = f"fused.{kernel.operator}"
    broken = Implementation(f"{name}.kernel", contract, f"{__name__}:{name}", handles=_FUSED_FEATURES)
    ids = (_ids(f"{contract}/optional/", part) for part in (kills, spares))
    honest = (dataclasses.replace(kernel, id=f"{name}.{kernel.id.partition('.')[2]}") for kernel in (SDPA, MATH))
    return name, Mutant(_backend(name, broken, *honest), *ids, says, fault=_fault(kernel))


#: Faults that several operators have, or attention and an operator.
_SEVERAL = ("loses_tokens_past_65535", "wrong_strides", "result_in_fp32")
_F = fused
_LONG = {
    "rms_norm": "",
    "layer_norm_modulate": "-affine-modulated",
    "rope": "",
    "rms_norm_rope": "",
    "gate_residual": "-gated-permuted",
    "gelu_tanh": "",
}
FUSED = (
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
    _of_fused(_F.ScaleOfTheTensor(), "bf16-plain fp32-affine-modulated bf16-affine-modulated-carried", NO_FUSED),
    _of_fused(_F.QuantizesBeforeModulation(), "fp32-modulated fp32-affine-modulated", "bf16-zerorow"),
    _of_fused(_F.ScaleBeforeModulation(), "fp32-modulated bf16-affine-modulated", "fp32-plain bf16-affine"),
    _of_fused(
        _F.CarriedScaleNotDivided(), "bf16-affine-modulated-carried fp32-affine-modulated-carried-224", "bf16-plain"
    ),
    _of_fused(_F.NanOfOneRowInAll(), "bf16-affine-modulated-nan bf16-affine-modulated-inf", "bf16-plain"),
    _of_fused(
        _F.ScaleOfTheFirstRow(),
        "bf16-affine-modulated-tensor fp32-affine-modulated-tensor-carried",
        "bf16-plain fp32-affine-modulated-carried",
    ),
    _of_fused(_F.QuantizedInPlace(), "fp32-plain bf16-affine", NO_FUSED, OVERWRITTEN),
    _of_fused(_F.CarriedForgotten(), "bf16-carried fp32-carried-224", "bf16-plain fp32-pow2"),
    _of_fused(_F.ScaleSettingsForgotten(), "bf16-pow2 fp32-224 fp32-carried-224", "bf16-plain fp32-carried"),
    _of_fused(_F.CodesOfX(), "bf16-plain fp32-carried", NO_FUSED),
    _of_fused(_F.NanIsNotTheLargest(), "bf16-nan fp32-nan bf16-carried-nan", "bf16-plain"),
    _of_fused(_F.ZeroRowHasNoScale(), "bf16-zerorow fp32-zerorow bf16-carried-zerorow", "bf16-plain"),
    *(
        _of_fused(_F.LosesRowsPast65535(name), f"n75600-bf16-{words}", NO_FUSED)
        for name, words in (("layer_norm_modulate_quantize", "affine-modulated"), ("gelu_tanh_quantize", "plain"))
    ),
    *(_of_fused(_F.LosesTokensPast65535(name), f"n75600-bf16{_LONG[name] or '-plain'}", NO_FUSED) for name in _LONG),
)


# ---- quantize

_QUANTIZE_FEATURES = frozenset(
    {
        *("saturate", "scale_max", "scale_mode", "granularity", "given_amax"),
        *("x_granularity", "weight_granularity", "bias", "accumulate", "backward", "grad_scale_max", "mixed_bias"),
        *("packed", "custom_scale"),
    }
)


def _of_quantize(kernel: type, kills: str, spares: str, says: str = BEYOND) -> tuple[str, Mutant]:
    """`kills` and `spares` are ids without "<contract>/required/", separated by blanks. Beside the broken kernel stand
    those of the reference for the other contracts.
    """
    name, contract = _name(kernel), kernel.contract
    globals()[name] = kernel()
    features = _QUANTIZE_FEATURES | getattr(kernel, "features", frozenset())
    broken = Implementation(f"{name}.hif8", contract, f"{__name__}:{name}", handles=features)
    honest = (
        dataclasses.replace(other, id=f"{name}.{other.id.partition('.')[2]}")
        for other in MANIFEST.implementations
        if other.contract != contract
    )
    ids = (_ids(f"{contract}/required/", part) for part in (kills, spares))
    return name, Mutant(_backend(name, broken, *honest), *ids, says, fault=_fault(globals()[name]))


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
    kills, spares = (" ".join(_ids("native_attention/optional/", words)) for words in (kills, spares))
    return _of_quantize(kernel, kills, spares)


_N = native
NATIVE = (
    _of_native(_N.ProbabilitiesInE5m2, "bf16-plain fp32-plain bf16-packed", "bf16-zeroscale bf16-needle"),
    _of_native(_N.ProbabilitiesTruncated, "bf16-plain fp32-plain bf16-packed", "bf16-zeroscale bf16-needle"),
    _of_native(_N.SmallProbabilitiesLost, "fp32-plain fp32-packed bf16-k20160", "bf16-zeroscale bf16-needle"),
    _of_native(_N.ResultClipped, "bf16-needle fp32-needle", "bf16-plain fp32-plain"),
    _of_native(_N.ResultInE5m2, "bf16-plain fp32-packed bf16-large", NO_KERNEL),
    _of_native(_N.KeyScaleForgotten, "bf16-plain bf16-packed bf16-pow2", "bf16-zeroscale"),
    _of_native(_N.ScalesTwiceAsLarge, "bf16-plain bf16-zeroscale fp32-cross", NO_KERNEL),
    _of_native(_N.PlainE4m3, "bf16-pow2", "bf16-plain"),
    _of_native(_N.LongSumsKeep14Bits, "bf16-k20160-offset", "bf16-zeroscale bf16-plain"),
    _of_native(_N.CentreForgotten, "bf16-plain bf16-k20160-offset fp32-packed", NO_KERNEL),
    _of_native(_N.NotQuantized, "bf16-scale fp32-plain bf16-pow2", "bf16-zeroscale"),
    _of_native(_N.PackedAsOne, "bf16-packed fp32-packed-empty", "bf16-plain"),
)


# ---- selection


def code_without_example(request, device):
    yield need(True, "dtype", got=request.dtype, want="any")


def camel_case_code(request, device):
    yield need(request.dtype != torch.float8_e4m3fn, "dType", got=request.dtype, want="a dtype of more than 8 bits")


def impure_predicate(request, device):
    yield need(True, "memory", got=next(_counter), want="any number of bytes")


_counter = itertools.count()


def refuses_nothing(request, device):
    yield need(True, "dtype", got=request.dtype, want="any")


def _of_selection(name: str, fault: str, kills: str, spares: str, says: str, **fields) -> tuple[str, Mutant]:
    ids = (_ids("selection/required/", part) for part in (kills, spares))
    kernel = dataclasses.replace(MATH, id=f"{name}.math", **fields)
    return name, Mutant(_backend(name, kernel), *ids, says, fault=fault)


_NO_FP8 = {"dtype": torch.float8_e4m3fn}
_PURE = "predicates-are-pure"
SELECTION = (
    _of_selection(
        "refuses_nothing",
        "The predicate takes what the manifest says it refuses.",
        "refusals-give-their-code",
        f"codes-have-a-refusal {_PURE}",
        "must be refused with 'dtype'",
        supports=f"{__name__}:refuses_nothing",
        refusals=(Refusal("dtype", _NO_FP8),),
    ),
    _of_selection(
        "code_without_example",
        "The predicate knows a code without an example.",
        "codes-have-a-refusal",
        f"refusals-give-their-code {_PURE}",
        "has no example of it",
        supports=f"{__name__}:code_without_example",
    ),
    _of_selection(
        "camel_case_code",
        "A reason code that is not lower_snake.",
        "codes-have-a-refusal",
        f"refusals-give-their-code {_PURE}",
        "is not lower_snake",
        supports=f"{__name__}:camel_case_code",
        refusals=(Refusal("dType", _NO_FP8),),
    ),
    _of_selection(
        "impure_predicate",
        "The predicate depends on something beside the request and the device.",
        _PURE,
        "unknown-fields-are-refused",
        "in several ways",
        supports=f"{__name__}:impure_predicate",
    ),
    _of_selection(
        "handles_what_does_not_exist",
        "The manifest lists a feature that no request has.",
        "unhandled-features-are-refused",
        f"unknown-fields-are-refused {_PURE}",
        "handles 'causal'",
        handles=MATH.handles | {"causal"},
    ),
)

MUTANTS: dict[str, Mutant] = dict((*ATTENTION, *SIZES, *FUSED, *QUANTIZE, *NATIVE, *SELECTION))
assert len(MUTANTS) == len((*ATTENTION, *SIZES, *FUSED, *QUANTIZE, *NATIVE, *SELECTION))

#: Found by no check so far: broken_unseen.py says why each is there.
UNSEEN: dict[str, Mutant] = dict(
    [
        *(_of_attention(kernel, "", "") for kernel in vars(unseen).values() if _is_mutant(kernel)),
        # Within what plain rounding costs in 16 bits, from which the bounds come.
        _of_fused(_F.RoundsBetweenSteps(), "", ""),
    ]
)
