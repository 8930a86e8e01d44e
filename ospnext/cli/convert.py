"""`ospnext convert`: a transformer checkpoint in another naming, dtype or sharding."""

from __future__ import annotations

import argparse
import re

from ospnext.config import checked, parse_overrides
from ospnext.errors import ConfigError

HELP = """Rewrite a transformer checkpoint: official Wan or diffusers names, another dtype, other shard sizes. Reads
folders and files of either naming, safetensors or .pth, one shard in memory at a time.

key=value changes the config.json that is written, for example to mark a dense checkpoint as sparse:
  ospnext convert Wan2.1-T2V-14B sparse-init --to diffusers \\
    skiparse_model_type=dual_end sparse_ratio=2 num_full_blocks=8"""

_UNITS = {"": 1}
for _power, _prefix in enumerate("kmgt", 1):
    _UNITS |= {f"{_prefix}b": 1000**_power, f"{_prefix}ib": 1024**_power}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="checkpoint folder or file")
    parser.add_argument("destination", metavar="DESTINATION", help="folder to write")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes of the transformer config")
    parser.add_argument("--to", required=True, choices=("diffusers", "official"), help="naming of the tensors")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: as stored")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="e.g. 500MB or 2GiB (default: 5GB)")


def run(args: argparse.Namespace) -> int:
    max_shard_size = parse_size(args.max_shard_size)
    from ospnext.models.config import TransformerConfig

    overrides = checked(TransformerConfig, parse_overrides(args.overrides), "command line")
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
    )
    print(f"read {report}")
    print(f"wrote {args.to} names to {args.destination}")
    return 0


def parse_size(text: str) -> int:
    """Bytes of `5GB` (5 * 1000**3), `5GiB` (5 * 1024**3) or `1000`."""
    match = re.fullmatch(r"(\d+)\s*([kmgt]i?b|)", text.strip().lower())
    size = int(match[1]) * _UNITS[match[2]] if match else 0
    if size < 1:
        raise ConfigError(f"--max-shard-size {text!r} is not a size such as 500MB, 5GB or 2GiB")
    return size
