"""Convert weights and adapters between Hugging Face, HF PEFT and Megatron.

python tools/convert.py hf-to-megatron --input HF_FOLDER --output MEGATRON_FOLDER
python tools/convert.py megatron-to-hf --input MEGATRON_FOLDER_OR_RUN --output HF_FOLDER
python tools/convert.py merge          --input RUN --output HF_FOLDER
python tools/convert.py export-adapter --input RUN --output HF_PEFT_FOLDER [--as-lora]
python tools/convert.py import-adapter --input HF_PEFT_FOLDER --pretrained-checkpoint HF_FOLDER --output RUN
python tools/convert.py verify         --input FOLDER --reference FOLDER
An existing output is never overwritten. docs/moving-weights.md lists every conversion.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_peft.config import ConfigurationError, flag, require

TYPES = ("float32", "bfloat16", "float16")
AS_LORA = ("tolerance", "max_rank", "num_tokens")


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


def _write_hf(convert: Callable[..., Path], args: argparse.Namespace) -> int:
    from megatron_peft.conversion.hf_files import type_flag
    from megatron_peft.conversion.writer import parse_bytes

    size, dtype = parse_bytes(args.max_shard_size), type_flag(args.dtype)
    own = {"pretrained_checkpoint": args.pretrained_checkpoint, "license": args.license}
    return _wrote(convert(args.input, args.output, dtype=dtype, max_shard_bytes=size, **own))


def export_adapter(args: argparse.Namespace) -> int:
    """convert a run's adapters, or with --as-lora any run, to an adapter of HF PEFT"""
    limits = {name: getattr(args, name) for name in AS_LORA if getattr(args, name) is not None}
    require(args.as_lora or not limits, f"{', '.join(map(flag, limits))}: give --as-lora too, or leave it out.")
    own = {"pretrained_checkpoint": args.pretrained_checkpoint, "license": args.license}
    if args.as_lora:
        from megatron_peft.conversion.as_lora import export_as_lora

        return _wrote(export_as_lora(args.input, args.output, **own, **limits))
    from megatron_peft.conversion.peft import export_adapter as convert

    return _wrote(convert(args.input, args.output, **own))


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


def _wrote(output: Path) -> int:
    from megatron_peft.conversion.model_card import CARD, serving_lines

    print(f"wrote {output}")
    if (output / CARD).is_file():
        print(f"\n{serving_lines(output)}")
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
    "--as-lora": {
        "action": "store_true",
        "help": "approximate the change of the weights by a LoRA, whatever the method; full fine-tuning too",
    },
    "export-adapter --tolerance": {
        "type": float,
        "metavar": "X",
        "help": "with --as-lora: the smallest rank whose relative Frobenius error is at most X, in each module (0.05)",
    },
    "--max-rank": {"type": int, "metavar": "R", "help": "with --as-lora: largest rank (256)"},
    "export-adapter --num-tokens": {
        "type": int,
        "metavar": "N",
        "help": "with --as-lora: compare logits on two sequences of N random tokens, with the model in memory; 0: do "
        "not (64)",
    },
    "--license": {"metavar": "NAME", "help": "license of the model card, like apache-2.0 (that of the base's card)"},
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
    "megatron-to-hf": Command(megatron_to_hf, ("--pretrained-checkpoint", "--dtype", "--max-shard-size", "--license")),
    "merge": Command(merge, ("--pretrained-checkpoint", "--dtype", "--max-shard-size", "--license")),
    "export-adapter": Command(
        export_adapter,
        ("--pretrained-checkpoint", "--as-lora", "--tolerance", "--max-rank", "--num-tokens", "--license"),
    ),
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
        for own in command.flags:
            one.add_argument(own, **FLAGS.get(f"{name} {own}", FLAGS.get(own, {})))
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
