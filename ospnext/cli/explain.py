"""`ospnext explain OPERATOR`: which kernel would take a request under the policy in force, and why not the others."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ospnext.errors import ConfigError

HELP = """Say which implementation would take a request, and what became of every other one.

  ospnext explain attention --tokens 75600 --heads 40 --head-dim 128 --dtype bf16
  ospnext explain attention --tokens 19320 --kv-tokens 512 --feature key_mask --feature logsumexp
  ospnext explain fused.rms_norm --shape 1,75600,5120
  ospnext explain collective --operation all_to_all --ranks 8 --feature uneven

Nothing is run and no kernel is loaded. Exits with 1 if no implementation takes the request."""

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("operator", help="an operator, e.g. attention or fused.rope")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="dtype of the tensors (default: bf16)")
    parser.add_argument("--device", help="device type of the tensors (default: where the policy runs models)")
    parser.add_argument("--backend", metavar="NAME", help="wins over OSPNEXT_BACKEND")
    parser.add_argument(
        "--feature", action="append", default=[], metavar="NAME", help="a feature asked for; repeatable"
    )
    parser.add_argument("--json", action="store_true", help="print the decision as JSON")
    attention = parser.add_argument_group("attention")
    attention.add_argument("--batch", type=int, default=1, help="sequences (default: 1)")
    attention.add_argument("--tokens", type=int, default=75600, help="longest query sequence (default: 75600)")
    attention.add_argument("--kv-tokens", type=int, help="longest key sequence (default: as --tokens)")
    attention.add_argument("--heads", type=int, default=40, help="(default: 40)")
    attention.add_argument("--head-dim", type=int, default=128, help="(default: 128)")
    fused = parser.add_argument_group("fused operators")
    fused.add_argument("--shape", default="1,75600,5120", help="shape of the first tensor (default: 1,75600,5120)")
    collective = parser.add_argument_group("collective")
    collective.add_argument("--operation", default="all_to_all", metavar="NAME", help="(default: all_to_all)")
    collective.add_argument("--ranks", type=int, default=8, help="processes that take part (default: 8)")
    collective.add_argument(
        "--elements",
        type=int,
        default=48_384_000,
        help="what each contributes (default: 48384000, 1/8 of 75600 x 5120)",
    )


def run(args: argparse.Namespace) -> int:
    from ospnext.ops import use_backend
    from ospnext.ops.explain import as_json, as_text
    from ospnext.ops.policy import current_policy
    from ospnext.ops.registry import registry
    from ospnext.ops.select import select

    with use_backend(args.backend):
        contract = _contract(args.operator)
        decision = select(contract, _request(contract, args), current_policy(), registry())
    print(json.dumps(as_json(decision), indent=2) if args.json else as_text(decision))
    return 0 if decision.chosen else 1


def _contract(name: str) -> Any:
    from ospnext.config import did_you_mean
    from ospnext.ops.contracts import CONTRACTS

    if name not in CONTRACTS:
        raise ConfigError(
            f"unknown operator {name!r}{did_you_mean(name, CONTRACTS)}; operators: {', '.join(CONTRACTS)}"
        )
    return CONTRACTS[name]


def _request(contract: Any, args: argparse.Namespace) -> Any:
    import torch

    from ospnext.ops.device import default_device

    device_type = args.device or default_device().type
    dtype, features = getattr(torch, DTYPES[args.dtype]), _features(contract, args.feature)
    if contract.family == "collective":
        return contract.request(device_type, dtype, _operation(args.operation), args.ranks, args.elements, **features)
    if contract.family != "attention":
        return contract.request(device_type, dtype, _shape(args.shape), **features)
    kv_tokens = args.tokens if args.kv_tokens is None else args.kv_tokens
    return contract.request(
        device_type, dtype, args.batch, args.tokens, kv_tokens, heads=args.heads, head_dim=args.head_dim, **features
    )


def _features(contract: Any, names: list[str]) -> dict[str, bool]:
    import dataclasses

    from ospnext.config import did_you_mean

    known = [f.name for f in dataclasses.fields(contract.request) if f.default is False]
    for name in names:
        if name not in known:
            raise ConfigError(f"--feature {name}{did_you_mean(name, known)}: {contract.name} knows {', '.join(known)}")
    return dict.fromkeys(names, True)


def _operation(name: str) -> str:
    from ospnext.config import did_you_mean
    from ospnext.ops.contracts.collective import OPERATIONS

    if name not in OPERATIONS:
        raise ConfigError(
            f"--operation {name!r}{did_you_mean(name, OPERATIONS)}; collective operations: {', '.join(OPERATIONS)}"
        )
    return name


def _shape(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError:
        raise ConfigError(f"--shape {text!r} is not a list of integers such as 1,75600,5120") from None
