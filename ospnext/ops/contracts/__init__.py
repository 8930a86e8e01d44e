"""Every contract of ospnext by name: one family per file."""

from ospnext.ops.contract import Contract
from ospnext.ops.contracts import (
    attention,
    collective,
    fused,
    fused_quantize,
    hif8_cast,
    linear_gelu,
    native_attention,
    quantize,
    quantized_attention,
    quantized_linear,
    shared_amax,
)

_IN_ORDER = (
    (attention.CONTRACT,),
    collective.CONTRACTS,
    (*hif8_cast.CONTRACTS, *quantize.CONTRACTS, shared_amax.CONTRACT),
    (quantized_linear.CONTRACT, quantized_attention.CONTRACT, native_attention.CONTRACT),
    (*fused.CONTRACTS, *fused_quantize.CONTRACTS, linear_gelu.CONTRACT),
)

#: In the order in which `explain`, reports and docs list them.
CONTRACTS: dict[str, Contract] = {contract.name: contract for some in _IN_ORDER for contract in some}
