"""`ospnext convert`: a transformer checkpoint in another naming, dtype or sharding, or quantized."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING

from ospnext.config import checked, parse_overrides
from ospnext.errors import ConfigError

if TYPE_CHECKING:
    from ospnext.models.quant_policy import QuantPolicy

HELP = """Rewrite a transformer checkpoint: official Wan or diffusers names, another dtype, other shard sizes. Reads
folders and files of either naming, safetensors or .pth, one shard in memory at a time.

key=value changes the config.json that is written, for example to mark a dense checkpoint as sparse:
  ospnext convert Wan2.1-T2V-14B sparse-init --to diffusers \\
    skiparse_model_type=dual_end sparse_ratio=2 num_full_blocks=8

--quant hif8 stores the weights of linears inside blocks as HiFloat8 codes, one byte each, which halves the size of a
bfloat16 checkpoint. ospnext loads it as it is; other libraries do not, and it cannot be trained or quantized again:
  ospnext convert trained quantized --to diffusers --dtype bfloat16 --quant hif8 --quant-blocks 2-37"""

_QUANT_OPTIONS = ("linears", "blocks", "attn", "granularity", "scale_mode")

_DTYPE_HELP = """default: as stored. With --quant, weights are rounded to this dtype before they are quantized, as those
of a loaded model would be. HiFloat8 codes that are stored already stay as they are"""

_UNITS = {"": 1}
for _power, _prefix in enumerate("kmgt", 1):
    _UNITS |= {f"{_prefix}b": 1000**_power, f"{_prefix}ib": 1024**_power}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="checkpoint folder or file")
    parser.add_argument("destination", metavar="DESTINATION", help="folder to write")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes of the transformer config")
    parser.add_argument("--to", required=True, choices=("diffusers", "official"), help="naming of the tensors")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help=_DTYPE_HELP)
    parser.add_argument("--quant", choices=("hif8",), help="store weights of linears as HiFloat8 codes")
    parser.add_argument("--quant-linears", metavar="NAMES", help="of a block, e.g. ffn.0,ffn.2 (default: all ten)")
    parser.add_argument("--quant-blocks", metavar="BLOCKS", help="e.g. 2-37 or 0,4-9 (default: all)")
    parser.add_argument("--quant-attn", choices=("none", "hif8"), help="attention of these blocks (default: none)")
    parser.add_argument("--quant-granularity", choices=("tensor", "row"), help="one scale per (default: tensor)")
    parser.add_argument("--quant-scale-mode", choices=("amax", "pow2"), help="default: amax")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="e.g. 500MB or 2GiB (default: 5GB)")


def run(args: argparse.Namespace) -> int:
    max_shard_size = parse_size(args.max_shard_size)
    from ospnext.models.config import TransformerConfig

    overrides = checked(TransformerConfig, parse_overrides(args.overrides), "command line")
    quant = quant_policy(args)
    import torch

    from ospnext.models.convert import convert

    dtype = getattr(torch, args.dtype) if args.dtype else None
    report = convert(
        args.source,
        args.destination,
        naming=args.to,
        dtype=dtype,
        config_overrides=overrides,
        max_shard_size=max_shard_size,
        quant=quant,
    )
    print(f"read {report}")
    codes = "" if quant is None else ", weights of linears as HiF8 codes,"
    print(f"wrote {args.to} names{codes} to {args.destination}")
    return 0


def quant_policy(args: argparse.Namespace) -> QuantPolicy | None:
    """The policy that the --quant options describe; None without --quant."""
    given = {name: value for name in _QUANT_OPTIONS if (value := getattr(args, f"quant_{name}")) is not None}
    if args.quant is None:
        if given:
            option = f"--quant-{next(iter(given)).replace('_', '-')}"
            raise ConfigError(f"{option} says how to quantize, but nothing says to: add --quant hif8, or leave it out")
        return None
    from ospnext.models.quant_policy import QuantPolicy
    from ospnext.ops import HiF8Recipe

    recipe = HiF8Recipe(**{name: given.pop(name) for name in ("granularity", "scale_mode") if name in given})
    if "linears" in given:
        given["linears"] = tuple(word.strip() for word in given["linears"].split(","))
    if "attn" in given:
        given["quant_attn"] = given.pop("attn")
    return QuantPolicy(quant=args.quant, recipe=recipe, **given)


def parse_size(text: str) -> int:
    """Bytes of `5GB` (5 * 1000**3), `5GiB` (5 * 1024**3) or `1000`."""
    match = re.fullmatch(r"(\d+)\s*([kmgt]i?b|)", text.strip().lower())
    size = int(match[1]) * _UNITS[match[2]] if match else 0
    if size < 1:
        raise ConfigError(f"--max-shard-size {text!r} is not a size such as 500MB, 5GB or 2GiB")
    return size
