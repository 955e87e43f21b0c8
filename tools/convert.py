"""Convert weights and adapters between Hugging Face, HF PEFT and Megatron.

python tools/convert.py hf-to-megatron --input HF_FOLDER --output MEGATRON_FOLDER
python tools/convert.py megatron-to-hf --input MEGATRON_FOLDER_OR_RUN --output HF_FOLDER
python tools/convert.py merge          --input RUN --output HF_FOLDER
python tools/convert.py export-adapter --input RUN --output HF_PEFT_FOLDER
python tools/convert.py import-adapter --input HF_PEFT_FOLDER --pretrained-checkpoint HF_FOLDER --output RUN
python tools/convert.py verify         --input FOLDER --reference FOLDER
An existing output is never overwritten. docs/moving-weights.md lists every conversion.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_peft.config import ConfigurationError

TYPES = ("float32", "bfloat16", "float16")


def hf_to_megatron(args: argparse.Namespace) -> int:
    """convert a Hugging Face folder to a Megatron distributed checkpoint"""
    from megatron_peft.conversion.hf_files import type_flag
    from megatron_peft.conversion.to_megatron import hf_to_megatron as convert

    multiple = args.make_vocab_size_divisible_by
    return _wrote(convert(args.input, args.output, dtype=type_flag(args.dtype), make_vocab_size_divisible_by=multiple))


def megatron_to_hf(args: argparse.Namespace) -> int:
    """convert a Megatron checkpoint, or a run of full fine-tuning, to a Hugging Face folder"""
    from megatron_peft.conversion.to_huggingface import megatron_to_hf as convert

    return _write_hf(convert, args)


def merge(args: argparse.Namespace) -> int:
    """merge a run's adapters into their base and write a Hugging Face folder"""
    from megatron_peft.conversion.to_huggingface import merge as convert

    return _write_hf(convert, args)


def _write_hf(convert: Callable[..., object], args: argparse.Namespace) -> int:
    from megatron_peft.conversion.hf_files import type_flag
    from megatron_peft.conversion.writer import parse_bytes

    size, dtype = parse_bytes(args.max_shard_size), type_flag(args.dtype)
    base = args.pretrained_checkpoint
    return _wrote(convert(args.input, args.output, pretrained_checkpoint=base, dtype=dtype, max_shard_bytes=size))


def export_adapter(args: argparse.Namespace) -> int:
    """convert a run's adapters to an adapter of HF PEFT"""
    from megatron_peft.conversion.peft import export_adapter as convert

    return _wrote(convert(args.input, args.output, pretrained_checkpoint=args.pretrained_checkpoint))


def import_adapter(args: argparse.Namespace) -> int:
    """convert an adapter of HF PEFT to a run's adapters, for --load"""
    from megatron_peft.conversion.peft import import_adapter as convert

    return _wrote(convert(args.input, args.output, pretrained_checkpoint=args.pretrained_checkpoint))


def verify(args: argparse.Namespace) -> int:
    """run two models on the same tokens and compare their logits"""
    from megatron_peft.conversion.verify import verify as compare

    found = compare(
        args.input, args.reference, pretrained_checkpoint=args.pretrained_checkpoint, num_tokens=args.num_tokens
    )
    if args.per_layer:
        for number, layer in enumerate(found.layers):
            print(f"layer {number:3}: largest difference {layer.absolute:.3g}, relative {layer.relative:.3g}")
    close = found.logits.relative <= args.tolerance
    print(
        f"logits: largest difference {found.logits.absolute:.3g}, relative {found.logits.relative:.3g} "
        f"({'at most' if close else 'above'} --tolerance {args.tolerance:g}); largest logit {found.logits.scale:.4g}; "
        f"same best token at {found.same_best} of {found.num_positions} positions"
    )
    return 0 if close else 1


def _wrote(output: object) -> int:
    print(f"wrote {output}")
    return 0


@dataclass(frozen=True)
class Command:
    """Its function, and its flags besides --input and --output."""

    run: Callable[[argparse.Namespace], int]
    flags: tuple[str, ...]


FLAGS: dict[str, dict] = {
    "--dtype": {"choices": TYPES, "help": "dtype of the weights (as stored)"},
    "--max-shard-size": {"default": "5GB", "metavar": "SIZE", "help": "largest safetensors file (5GB)"},
    "--make-vocab-size-divisible-by": {
        "type": int,
        "default": 128,
        "metavar": "N",
        "help": "pad the rows of embedding and output layer to a multiple of N (128)",
    },
    "--pretrained-checkpoint": {"metavar": "FOLDER", "help": "base model (the one that the input names)"},
    "--num-tokens": {"type": int, "default": 64, "metavar": "N", "help": "tokens in each of two sequences (64)"},
    "--per-layer": {"action": "store_true", "help": "also print the difference after each layer"},
    "--tolerance": {
        "type": float,
        "default": 1e-4,
        "metavar": "X",
        "help": "exit with 1 if the difference divided by the largest logit is above X (1e-4)",
    },
}
COMMANDS = {
    "hf-to-megatron": Command(hf_to_megatron, ("--dtype", "--make-vocab-size-divisible-by")),
    "megatron-to-hf": Command(megatron_to_hf, ("--pretrained-checkpoint", "--dtype", "--max-shard-size")),
    "merge": Command(merge, ("--pretrained-checkpoint", "--dtype", "--max-shard-size")),
    "export-adapter": Command(export_adapter, ("--pretrained-checkpoint",)),
    "import-adapter": Command(import_adapter, ("--pretrained-checkpoint",)),
    "verify": Command(verify, ("--pretrained-checkpoint", "--num-tokens", "--per-layer", "--tolerance")),
}


def build_parser() -> argparse.ArgumentParser:
    """One subcommand for each line of COMMANDS."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        summary = command.run.__doc__
        one = commands.add_parser(name, help=summary, description=summary)
        one.add_argument("--input", required=True, metavar="FOLDER")
        if name == "verify":
            one.add_argument("--reference", "--output", required=True, metavar="FOLDER")
        else:
            one.add_argument("--output", required=True, metavar="FOLDER", help="must not exist")
        for flag in command.flags:
            one.add_argument(flag, **FLAGS[flag])
        one.set_defaults(run=command.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 2 for bad flags and bad input; 1 if `verify` finds a difference above --tolerance."""
    args = build_parser().parse_args(argv)
    try:
        return args.run(args)
    except ConfigurationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
