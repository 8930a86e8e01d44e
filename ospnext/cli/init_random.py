"""`ospnext init-random`: a complete checkpoint folder with random weights."""

from __future__ import annotations

import argparse

HELP = """Write a checkpoint folder in diffusers' layout with random weights: transformer, text encoder, tokenizer, VAE,
scheduler. What it generates looks like noise; it serves to try out an installation, a machine or a script."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", default="tiny", help="size of the transformer (default: tiny)")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="the same seed writes the same weights (default: 0)")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder if it exists")


def run(args: argparse.Namespace) -> int:
    from ospnext.pipelines.random_checkpoint import write_random_checkpoint

    write_random_checkpoint(args.output, preset=args.preset, seed=args.seed, overwrite=args.overwrite)
    print(f"wrote a random {args.preset} checkpoint to {args.output}")
    return 0
