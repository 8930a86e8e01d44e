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
  ospnext explain quantized_linear --shape 75600,13824,5120 --feature backward
  ospnext explain hif8_quantize --shape 75600,5120 --feature granularity=row --feature scale_mode=pow2
  ospnext explain quantized_attention --tokens 19320
  ospnext explain collective --operation all_to_all --ranks 8 --feature uneven
  ospnext explain collective --ranks 8 --feature ranks_per_device=1   # in a mesh, each rank on its own device

Nothing is run and no kernel is loaded. Exits with 1 if no implementation takes the request."""

#: What --shape says where it is not the shape of the first tensor, and its default.
_SHAPES = {"quantized_linear": ("tokens, output features and input features", "75600,5120,5120")}

#: What the decision alone does not tell.
_NOTES = {
    "quantized_linear": "shape is (tokens, output features, input features); hif8_quantize makes the codes",
    "quantized_attention": "that is hif8_fake_quantize of q, k and v (and of their gradients), then the backend's "
    "attention, as decided here:",
    "native_attention": "that is quantized_attention: hif8_fake_quantize of q, k and v, then the backend's attention, "
    "as decided here:",
}

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("operator", help="an operator, e.g. attention or fused.rope")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="dtype of the tensors (default: bf16)")
    parser.add_argument("--device", help="device type of the tensors (default: where the policy runs models)")
    parser.add_argument("--backend", metavar="NAME", help="wins over OSPNEXT_BACKEND")
    parser.add_argument(
        "--feature",
        action="append",
        default=[],
        metavar="NAME[=VALUE]",
        help="a feature asked for, e.g. backward or scale_mode=pow2; repeatable",
    )
    parser.add_argument("--json", action="store_true", help="print the decision as JSON")
    attention = parser.add_argument_group("attention, quantized_attention and native_attention")
    attention.add_argument("--batch", type=int, default=1, help="sequences (default: 1)")
    attention.add_argument("--tokens", type=int, default=75600, help="longest query sequence (default: 75600)")
    attention.add_argument("--kv-tokens", type=int, help="longest key sequence (default: as --tokens)")
    attention.add_argument("--heads", type=int, default=40, help="(default: 40)")
    attention.add_argument("--head-dim", type=int, default=128, help="(default: 128)")
    others = parser.add_argument_group("fused operators, hif8_* and quantized_linear")
    others.add_argument(
        "--shape",
        help="shape of the first tensor (default: 1,75600,5120); of quantized_linear tokens, output features and input "
        "features (default: 75600,5120,5120)",
    )
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
    from ospnext.ops.policy import COMPOSITE, current_policy
    from ospnext.ops.registry import registry
    from ospnext.ops.select import select

    with use_backend(args.backend):
        contract = _contract(args.operator)
        request = _request(contract, args)
        decision = select(contract, request, current_policy(), registry())
        composed = _parts(contract, request) if decision.chosen_id == COMPOSITE else []
        parts = [select(*part, current_policy(), registry()) for part in composed]
    if args.json:
        found = as_json(decision) | ({"parts": [as_json(part) for part in parts]} if parts else {})
        print(json.dumps(found, indent=2))
    else:
        note = f"\n  {_NOTES[contract.name]}" if parts or contract.name == "quantized_linear" else ""
        print("\n\n".join([as_text(decision) + note, *map(as_text, parts)]))
    return 0 if all(d.chosen for d in (decision, *parts)) else 1


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

    from ospnext.ops.contracts.attention import AttentionRequest
    from ospnext.ops.contracts.native_attention import NativeAttentionRequest
    from ospnext.ops.device import default_device

    device_type = args.device or default_device().type
    dtype, features = getattr(torch, DTYPES[args.dtype]), _features(contract, args.feature)
    if contract.family == "collective":
        return contract.request(device_type, dtype, _operation(args.operation), args.ranks, args.elements, **features)
    if contract.by_ranks:
        return contract.request(device_type, dtype, args.ranks)
    if contract.request not in (AttentionRequest, NativeAttentionRequest):
        return contract.request(device_type, dtype, _shape(args.shape, contract.name), **features)
    kv_tokens = args.tokens if args.kv_tokens is None else args.kv_tokens
    return contract.request(
        device_type, dtype, args.batch, args.tokens, kv_tokens, heads=args.heads, head_dim=args.head_dim, **features
    )


def _parts(contract: Any, request: Any) -> list[tuple[Any, Any]]:
    """The contracts that a composition of others is made of, with what it asks of each."""
    import dataclasses

    from ospnext.ops.contracts import CONTRACTS
    from ospnext.ops.contracts.attention import AttentionRequest
    from ospnext.ops.contracts.quantize import QuantizeRequest

    if contract.name not in ("quantized_attention", "native_attention"):
        return []
    shape = (request.batch, request.q_len, request.heads, request.head_dim)
    round_trip = QuantizeRequest(request.device_type, request.dtype, shape)
    if contract.name == "native_attention":
        scaled = {name: getattr(request, name) for name in ("scale_max", "scale_mode", "given_amax")}
        round_trip = dataclasses.replace(round_trip, **scaled)
        features = {"packed": request.packed, "custom_scale": True}
        sizes = (request.batch, request.q_len, request.kv_len, request.heads, request.head_dim)
        request = AttentionRequest(request.device_type, request.dtype, *sizes, **features)
    return [(CONTRACTS["hif8_fake_quantize"], round_trip), (CONTRACTS["attention"], request)]


def _features(contract: Any, words: list[str]) -> dict[str, Any]:
    """Fields of the request that have a default: NAME for a boolean one, NAME=VALUE for any other."""
    import dataclasses
    from typing import get_type_hints

    from ospnext.config import did_you_mean

    hints = get_type_hints(contract.request)
    kinds = {
        f.name: hints[f.name] for f in dataclasses.fields(contract.request) if f.default is not dataclasses.MISSING
    }
    found: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if name not in kinds:
            known = ", ".join(_known(kind, name) for name, kind in kinds.items()) or "no features"
            raise ConfigError(f"--feature {name}{did_you_mean(name, kinds)}: {contract.name} knows {known}")
        if (kinds[name] is bool) == bool(equals):
            raise ConfigError(f"--feature {word}: give it as {_known(kinds[name], name)}")
        found[name] = True if kinds[name] is bool else _value(kinds[name], word, value)
    return found


def _known(kind: Any, name: str) -> str:
    """How a feature is given: "packed", "scale_mode=amax|pow2", "scale_max=NUMBER", "local_ranks=COUNT"."""
    from typing import get_args

    if int in get_args(kind):
        return f"{name}=COUNT"
    return name if kind is bool else f"{name}={'|'.join(get_args(kind)) or 'NUMBER'}"


def _value(kind: Any, word: str, value: str) -> Any:
    """`value` as one of the choices of a Literal, as a count, or as a number that HiFloat8 can hold."""
    from typing import get_args

    from ospnext.numerics.hif8 import INFO

    choices = get_args(kind)
    if int in choices:
        if not value.isdecimal() or int(value) < 1:
            raise ConfigError(f"--feature {word}: the value is a whole number from 1 on")
        return int(value)
    if choices:
        if value not in choices:
            raise ConfigError(f"--feature {word}: the value is one of {', '.join(choices)}")
        return value
    try:
        number = float(value)
    except ValueError:
        number = 0.0
    if not INFO.smallest_subnormal <= number <= INFO.max:
        raise ConfigError(f"--feature {word}: the value is a number from 2^-22 to 32768, as HiFloat8 holds it")
    return number


def _operation(name: str) -> str:
    from ospnext.config import did_you_mean
    from ospnext.ops.contracts.collective import OPERATIONS

    if name not in OPERATIONS:
        raise ConfigError(
            f"--operation {name!r}{did_you_mean(name, OPERATIONS)}; collective operations: {', '.join(OPERATIONS)}"
        )
    return name


def _shape(text: str | None, operator: str) -> tuple[int, ...]:
    meaning, default = _SHAPES.get(operator, ("the first tensor", "1,75600,5120"))
    try:
        sizes = tuple(int(word) for word in (text or default).split(","))
    except ValueError:
        raise ConfigError(f"--shape {text!r} is not a list of integers such as {default}") from None
    if operator in _SHAPES and len(sizes) != len(default.split(",")):
        raise ConfigError(f"--shape {text}: {operator} takes {meaning}, such as {default}")
    return sizes
