"""Kernels of the Ascend backend that call the vendor's operators wrongly on purpose, each in one way, and the checks
that must find each. Needs an NPU, or the host NPU: npu_numerics.py runs them.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
import torch_npu
from mutant import BEYOND, Mutant, fault_of, ids, known, name_of

from ospnext.backends.ascend import MANIFEST, fused, quantize, quantized_linear
from ospnext.numerics.scaling import scale_shape
from ospnext.ops.registry import Implementation

_FEATURES = (
    *("scale_max", "scale_mode", "granularity", "given_amax", "affine", "modulated", "backward"),
    *("x_granularity", "weight_granularity", "bias", "mixed_bias", "accumulate", "grad_scale_max"),
)


class Altered:
    """`kernel`, where each call of `operator` is made by `call` instead."""

    kernel: Any
    operator: str

    def call(self, honest: Any, *args: Any, **named: Any) -> Any:
        return honest(*args, **named)

    def __call__(self, *args: Any, **named: Any) -> Any:
        with self._altered():
            return type(self).kernel(*args, **named)

    def forward(self, *args: Any, **named: Any) -> Any:
        with self._altered():
            return type(self).kernel.forward(*args, **named)

    def backward(self, *args: Any, **named: Any) -> Any:
        with self._altered():
            return type(self).kernel.backward(*args, **named)

    @contextlib.contextmanager
    def _altered(self) -> Iterator[None]:
        honest = getattr(torch_npu, self.operator)
        setattr(torch_npu, self.operator, lambda *args, **named: self.call(honest, *args, **named))
        try:
            yield
        finally:
            setattr(torch_npu, self.operator, honest)


# ---- quantize


class DynamicQuant(Altered):
    """npu_dynamic_quant as it is: a scale by the reciprocal, 0 for zeros, and codes that hide what is not finite."""

    contract = "hif8_quantize"
    operator = "npu_dynamic_quant"

    @staticmethod
    def kernel(x, amax, *, scale_max, scale_mode, granularity):
        mode = {"tensor": "pertensor", "row": "pertoken", "channel": "perchannel"}[granularity]
        codes, scale = torch_npu.npu_dynamic_quant(
            x, dst_type=quantize.HIFLOAT8, quant_mode=mode, dst_type_max=scale_max
        )
        return codes, scale.view(scale_shape(x.shape, granularity))


class DstTypeMaxZero(DynamicQuant):
    """dst_type_max is left at 0, by which the largest magnitude becomes 32768."""

    def call(self, honest, x, *, dst_type_max, **named):
        return honest(x, dst_type_max=0.0, **named)


class RowsAndChannelsSwapped(DynamicQuant):
    """Each channel has a scale where each row was to have one."""

    def call(self, honest, x, *, quant_mode, **named):
        return honest(x, quant_mode={"pertoken": "perchannel"}.get(quant_mode, quant_mode), **named)


class Divides(Altered):
    contract = "hif8_quantize"
    kernel = staticmethod(quantize.quantize)
    operator = "npu_quantize"


class MultipliesByScales(Divides):
    """div_mode is False, as in the vendor's other quantizer."""

    def call(self, honest, x, scales, zero_points, dtype, axis, div_mode):
        return honest(x, scales, zero_points, dtype, -1, False)


class GradientsAt15(Divides):
    """The gradient is scaled as activations are."""

    def __call__(self, x, amax, *, scale_max, **how):
        return super().__call__(x, amax, scale_max=15.0, **how)


# ---- quantized_linear


class Products(Altered):
    contract = "quantized_linear"
    kernel = quantized_linear.native
    operator = "npu_quant_matmul"


class BiasBeforeScales(Products):
    """The bias is given to the operator, which adds it before the scales."""

    def forward(self, x_codes, x_scale, weight_codes, weight_scale, bias, **how):
        self.bias = None if bias is None else bias.float()
        return super().forward(x_codes, x_scale, weight_codes, weight_scale, None, **how)

    def call(self, honest, *args, **named):
        return honest(*args, bias=self.__dict__.pop("bias", None), **named)


class ScalesSwapped(Products):
    """The scales of x are given for those of the weight, and the other way round."""

    def call(self, honest, x1, x2, scale, *, pertoken_scale, **named):
        return honest(x1, x2, pertoken_scale, pertoken_scale=scale, **named)


class OneScaleForEach(Products):
    """Scales per tensor are given as they are, and the operator cuts their product to 11 bits."""

    def call(self, honest, x1, x2, scale, *, pertoken_scale, **named):
        return honest(x1, x2, scale[:1], pertoken_scale=pertoken_scale[:1], **named)


class WeightNotTransposed(Products):
    """The weight is handed on as it lies in memory, [N, K]."""

    def forward(self, x_codes, x_scale, weight_codes, *rest, **how):
        return super().forward(x_codes, x_scale, weight_codes.T, *rest, **how)


class AnyStrides(Products):
    """Codes are handed on with whatever strides they have."""

    def forward(self, x_codes, x_scale, weight_codes, *rest, **how):
        self.given = x_codes, weight_codes
        return super().forward(x_codes, x_scale, weight_codes, *rest, **how)

    def call(self, honest, x1, x2, *args, **named):
        if given := self.__dict__.pop("given", None):
            x1, x2 = given[0].view(-1, given[0].shape[-1]), given[1].T
        return honest(x1, x2, *args, **named)


class OutputDtypeLeftOut(Products):
    """Without output_dtype the operator gives int8."""

    def call(self, honest, *args, output_dtype, **named):
        return honest(*args, **named)


class OperandNotHiF8(Products):
    """x2_dtype is left out: uint8 is not said to be HiFloat8."""

    def call(self, honest, *args, x2_dtype, **named):
        return honest(*args, **named)


class GradientNotTransposed(Products):
    """dweight is x^T g."""

    def backward(self, grad_codes, grad_scale, x_codes, x_scale, *rest, dtypes, **how):
        dx, _, dbias = super().backward(grad_codes, grad_scale, x_codes, x_scale, *rest, dtypes=dtypes, **how)
        flat = (t.reshape(-1, t.shape[-1]) for t in (grad_codes, x_codes))
        grad, x = flat
        return dx, quantized_linear.native.product(x.T, x_scale, grad, grad_scale, dtypes[1]), dbias


# ---- fused


class Turned(Altered):
    contract = "fused.rope"
    kernel = fused.rope
    operator = "npu_rotary_mul"


class RopeOfHalves(Turned):
    """rotary_mode is left at "half": channel i is paired with i + D/2."""

    def call(self, honest, x, cos, sin, mode):
        return honest(x, cos, sin)


class AnglesOfHalves(Turned):
    """cos and sin are repeated as the other pairing wants them, one block after the other."""

    def call(self, honest, x, cos, sin, mode):
        cos, sin = (torch.cat((t[..., ::2], t[..., ::2]), -1) for t in (cos, sin))
        return honest(x, cos, sin, mode)


class GradientTurnsForward(Turned):
    """The gradient is turned by the angle and not back."""

    def backward(self, grad, x, cos, sin):
        return super().backward(grad, x, cos, -sin)


class EpsLeftOut(Altered):
    """epsilon is the operator's own."""

    contract = "fused.rms_norm"
    kernel = fused.rms_norm
    operator = "npu_rms_norm"

    def call(self, honest, x, gamma, eps):
        return honest(x, gamma, 1e-5)


class ApproximateLeftOut(Altered):
    """GELU by the error function, the operator's default."""

    contract = "fused.gelu_tanh"
    kernel = fused.gelu_tanh
    operator = "npu_gelu"

    def call(self, honest, x, *, approximate):
        return honest(x)


class GradientOfAnotherGelu(Altered):
    """The gradient is that of the error function's GELU."""

    contract = "fused.gelu_tanh"
    kernel = fused.gelu_tanh
    operator = "npu_gelu_backward"

    def call(self, honest, grad, x, *, approximate):
        return honest(grad, x)


# ---- and what must find them


def _of(kernel: type[Altered], kills: str, spares: str, says: str = BEYOND, status: str = "fail") -> tuple[str, Mutant]:
    """`kills` and `spares` are ids without "<contract>/<level>/". Beside the broken kernel stand the honest ones of the
    other contracts.
    """
    name, contract = name_of(kernel), kernel.contract
    globals()[name] = kernel()
    broken = Implementation(f"{name}.kernel", contract, f"{__name__}:{name}", handles=known(contract, _FEATURES))
    honest = (
        dataclasses.replace(other, id=f"{name}.{other.id.partition('.')[2]}")
        for other in MANIFEST.implementations
        if other.contract != contract
    )
    manifest = dataclasses.replace(MANIFEST, backend=name, implementations=(broken, *honest))
    level = "optional" if contract.startswith("fused.") else "required"
    checks = (ids(f"{contract}/{level}/", part) for part in (kills, spares))
    return name, Mutant(manifest, *checks, says, status, fault_of(globals()[name]))


#: By an operator, or by autograd.
_REFUSED = {"status": "error"}
#: Spared by whatever is wrong elsewhere.
_CAST = "hif8_encode/required/bf16-plain"
_FOUND = (
    _of(
        DynamicQuant,
        "bf16-zero bf16-zerorow bf16-row bf16-nan bf16-inf hif8_quantize/optional/bf16-division",
        _CAST,
    ),
    _of(DstTypeMaxZero, "bf16-tensor bf16-row bf16-channel fp16-tensor bf16-tensor-224", _CAST, "codes is"),
    _of(RowsAndChannelsSwapped, "bf16-row", _CAST, "invalid for input", **_REFUSED),
    _of(MultipliesByScales, "fp32-tensor bf16-tensor fp32-tensor-pow2", "bf16-0x7", "codes is"),
    _of(
        GradientsAt15,
        "bf16-tensor-224 fp32-tensor-224 quantized_linear/required/bf16-backward",
        "bf16-tensor quantized_linear/required/bf16-plain",
    ),
    _of(BiasBeforeScales, "fp32-backward bf16-stored bf16-m1-backward", "fp32-plain bf16-exact-backward"),
    _of(ScalesSwapped, "bf16-row fp32-stored-row bf16-plain", _CAST, "M 106 and N 71", **_REFUSED),
    _of(OneScaleForEach, "fp32-plain fp32-backward", "bf16-pow2-backward"),
    _of(WeightNotTransposed, "fp32-plain bf16-aligned-plain", "fp32-k1-n1-backward", "x1 has as many", **_REFUSED),
    _of(AnyStrides, "bf16-stored-last_stride fp32-stored-last_stride", "bf16-stored", "is contiguous", **_REFUSED),
    _of(OutputDtypeLeftOut, "fp32-plain bf16-row", _CAST, "output_dtype", **_REFUSED),
    _of(OperandNotHiF8, "fp32-plain bf16-row", _CAST, "x2_dtype", **_REFUSED),
    _of(GradientNotTransposed, "fp32-backward bf16-backward", "fp32-plain", "invalid gradient", **_REFUSED),
    _of(RopeOfHalves, "fp32-plain bf16-plain bf16-backward", "fused.rms_norm/optional/fp32-plain"),
    _of(AnglesOfHalves, "fp32-plain bf16-plain bf16-backward", "fused.rms_norm/optional/fp32-plain"),
    _of(GradientTurnsForward, "fp32-backward bf16-backward", "fp32-plain"),
    _of(EpsLeftOut, "small-fp32-backward", "bf16-plain"),
    _of(ApproximateLeftOut, "fp32-plain", "fused.rms_norm/optional/fp32-plain"),
    _of(GradientOfAnotherGelu, "fp32-backward", "fp32-plain"),
)
MUTANTS = dict(_FOUND)
assert len(MUTANTS) == len(_FOUND)
