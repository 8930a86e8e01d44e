"""What Acme promises beyond the contract: heads of 8 channels."""

import torch

from ospnext.ops.contract import Case
from ospnext.ops.contracts.attention import AttentionRequest


def cases():
    request = AttentionRequest("cpu", torch.bfloat16, 1, 33, 65, 2, 8)
    yield Case("attention/extension/acme-q33-k65-d8-bf16", "extension", request)
