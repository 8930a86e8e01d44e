"""Attention kernels for Ascend that are broken on purpose, and the checks that must find each. Data only: the kernels
are loaded in a process that has the host NPU.
"""

from __future__ import annotations

import dataclasses
import re

from mutant import BEYOND, Mutant, ids

from ospnext.backends.ascend import MANIFEST
from ospnext.ops.registry import Implementation

#: How the operators of the host NPU say no.
REFUSED = "Refused: npu::"


def _of(
    kernel: str, like: str, kills: str, spares: str, says: str = BEYOND, status: str = "fail"
) -> tuple[str, Mutant]:
    """A class of broken_ascend.py in the place of the implementation `like`. `kills` and `spares` are ids without the
    contract and level, separated by blanks.
    """
    name = re.sub(r"(?<=[a-z\d])(?=[A-Z])", "_", kernel).lower()
    honest: Implementation = next(i for i in MANIFEST.implementations if i.id == f"ascend.{like}")
    broken = dataclasses.replace(
        honest,
        id=f"{name}.{like}",
        target=f"broken_ascend:{name}",
        supports="" if like == "quant_fusion" else honest.supports,
    )
    manifest = dataclasses.replace(MANIFEST, backend=name, implementations=(broken,))
    level = "required" if honest.contract == "attention" else "optional"
    checks = (ids(f"{honest.contract}/{level}/", part) for part in (kills, spares))
    return name, Mutant(manifest, *checks, says, status, kernel)


def _refused(kernel: str, like: str, kills: str, spares: str, rule: str) -> tuple[str, Mutant]:
    """The vendor's operator says no, by that rule."""
    return _of(kernel, like, kills, spares, f"{REFUSED}{rule}", "error")


_ODD, _WIDE, _PACK = "q113-k113-h2-d64-fp32", "b2-q704-k704-h2-d64-fp32", "packed-uneven-h2-d64-fp32"
_PLAIN = f"b2-{_ODD}-plain"
_FA, _FAG, _FIA = "npu_fusion_attention: ", "npu_fusion_attention_grad: ", "npu_fused_infer_attention_score_v2: "

MUTANTS = dict(
    (
        _of("InvertedMask", "fusion", f"b2-{_ODD}-mask b2-q1-k3-h2-d64-bf16-mask", _PLAIN),
        _of("MaskIgnoredPastKey512", "fusion", f"{_WIDE}-mask", "b2-q128-k512-h2-d64-fp32-mask"),
        _refused("MaskOfOneRow", "fusion", f"b2-{_ODD}-mask", _PLAIN, f"{_FA}atten_mask has shape"),
        _of("MaskMissingInGradient", "fusion", f"b2-{_ODD}-mask-lse-backward", f"b2-{_ODD}-mask"),
        _of("MaskedValuesMultiplied", "fusion", f"b2-{_ODD}-mask-lse-backward-nan", f"b2-{_ODD}-mask-lse-backward"),
        _of("GradientOfKeyless", "fusion", f"b2-{_ODD}-mask-lse-backward-nan", f"b2-{_ODD}-mask-lse-backward"),
        _of("LogsumexpAsItIs", "fusion", f"b2-{_ODD}-mask-lse-backward", f"b2-{_ODD}-mask b2-{_ODD}-backward"),
        _refused(
            "LeadingZero", "fusion", f"{_PACK}-plain", _PLAIN, f"{_FA}actual_seq_qlen says where each sequence ends"
        ),
        _refused("LengthsForEnds", "fusion", f"{_PACK}-plain", _PLAIN, f"{_FA}actual_seq_qlen does not decrease"),
        _of("StatisticsByToken", "fusion", f"{_PACK}-lse-backward", f"{_PACK}-plain"),
        _of("ScaleForgotten", "fusion", f"{_PLAIN} b1-q1-k3-h2-d64-bf16-scale", "b1-q113-k113-h2-d64-fp32-zeroscale"),
        _of("ScaleForgottenInGradient", "fusion", f"b2-{_ODD}-backward", _PLAIN),
        _of(
            "WrongStrides",
            "fusion",
            f"b2-{_ODD}-backward-fused_qkv b2-{_ODD}-backward-transposed",
            f"b2-{_ODD}-backward",
        ),
        _of("GradientStridesIgnored", "fusion", f"b2-{_ODD}-backward-expanded_grad", f"b2-{_ODD}-backward"),
        _refused("SixteenStatistics", "fusion", f"b2-{_ODD}-backward", _PLAIN, f"{_FAG}softmax_max has shape"),
        _refused("OneBlockSize", "infer_hif8", "bf16-cross", "", f"{_FIA}dequant_scale_query"),
        _of("ScaleOfKeysMissing", "infer_hif8", "bf16-plain", ""),
        _of("MeanOfValuesLost", "infer_hif8", "bf16-k20160-offset", ""),
        _refused("ModeForgotten", "infer_hif8", "bf16-plain", "", _FIA),
    )
)

#: Not broken: they must pass. Paths that no case of the suite reaches by itself.
HONEST = dict(
    (
        _of(
            "KeysPacked",
            "fusion",
            f"b2-{_ODD}-mask b2-{_ODD}-mask-lse-backward b2-{_ODD}-mask-lse-backward-nan "
            f"b2-{_ODD}-mask-lse-backward-fused_qkv b2-q1-k3-h2-d64-bf16-mask-lse-backward "
            "b2-q203-k239-h2-d64-fp32-mask-lse-backward-large",
            "",
        ),
        _of(
            "AnyShape", "quant_fusion", "bf16-plain bf16-cross bf16-heads bf16-d16 bf16-large bf16-pow2 fp32-needle", ""
        ),
    )
)
