"""Attention kernels that are broken on purpose, and the checks that must find each."""

from __future__ import annotations

import dataclasses

import broken_attention as attention
import broken_sizes as sizes
import broken_unseen as unseen
from mutant import BEYOND, NO_KERNEL, OVERWRITTEN, Mutant, backend, fault_of, ids, name_of

from ospnext.backends.reference import MANIFEST

(_, MATH) = MANIFEST.offers("attention")

#: Sample, query and key sizes of the cases below, short.
VIDEO = "b2-q32-k75600-h1-d128-bf16-backward"
VIDEO_NEEDLE = "b1-q609-k75600-h1-d128-bf16-plain-needle"
TINY, ODD, UNEVEN = "q1-k3-h2-d64", "q113-k113-h2-d64", "q239-k203-h2-d64"


def _of_attention(
    kernel: type[attention.MathAttention], kills: str, spares: str, says: str = BEYOND, status: str = "fail"
) -> tuple[str, Mutant]:
    """`kills` and `spares` are ids without "attention/required/", separated by blanks."""
    name = name_of(kernel)
    globals()[name] = kernel()  # where the manifest's target finds it
    manifest = backend(name, dataclasses.replace(MATH, id=f"{name}.math", target=f"{__name__}:{name}"))
    checks = (ids("attention/required/", part) for part in (kills, spares))
    return name, Mutant(manifest, *checks, says, status, fault_of(globals()[name]))


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

MUTANTS = (*ATTENTION, *SIZES)


def _is_mutant(kernel: object) -> bool:
    """Whether it is a class that broken_unseen.py itself defines."""
    return isinstance(kernel, type) and kernel.__module__ == unseen.__name__


#: Found by no check so far: broken_unseen.py says why each is there.
UNSEEN = tuple(_of_attention(kernel, "", "") for kernel in vars(unseen).values() if _is_mutant(kernel))
