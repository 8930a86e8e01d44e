"""Every contract of ospnext by name: one family per file."""

from ospnext.ops.contract import Contract
from ospnext.ops.contracts import attention, collective, fused, quantize

#: In the order in which `explain`, reports and docs list them.
CONTRACTS: dict[str, Contract] = {
    contract.name: contract
    for contract in (attention.CONTRACT, *collective.CONTRACTS, *quantize.CONTRACTS, *fused.CONTRACTS)
}
