"""Convert JSON lines to Megatron's indexed datasets (.bin and .idx), with the flags of Megatron's own tool.

python tools/preprocess_data.py --input corpus.jsonl --output-prefix corpus --tokenizer-model HF_FOLDER --append-eod
writes corpus_text_document.bin and corpus_text_document.idx; train on them with --data-path corpus_text_document.
"""

import argparse
import glob
import sys
from collections.abc import Sequence

from megatron_peft.config import ConfigurationError, DataConfig

NOT_SERVED = ("split-sentences", "keep-newlines", "partitions", "vocab-file", "merge-file", "lang")


def build_parser() -> argparse.ArgumentParser:
    """Megatron's names and defaults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, help="JSON-lines files, or glob patterns")
    parser.add_argument(
        "--json-keys", nargs="+", default=["text"], help="fields to convert, each to its own dataset (text)"
    )
    parser.add_argument("--output-prefix", required=True, help="writes PREFIX_KEY_document.bin and .idx")
    parser.add_argument(
        "--tokenizer-type",
        default="HuggingFaceTokenizer",
        choices=("HuggingFaceTokenizer", "SentencePieceTokenizer", "NullTokenizer"),
    )
    parser.add_argument("--tokenizer-model", help="a Hugging Face folder or a SentencePiece model")
    parser.add_argument("--vocab-size", type=int, help="vocabulary size of NullTokenizer")
    parser.add_argument("--append-eod", action="store_true", help="append the end-of-document token to each document")
    parser.add_argument("--workers", type=int, default=1, help="number of processes (1)")
    parser.add_argument("--log-interval", type=int, default=1000, help="records between progress lines (1000)")
    parser.add_argument(
        "--keep-sequential-samples",
        action="store_true",
        help="accepted for Megatron's scripts; the order is always kept",
    )
    for name in NOT_SERVED:
        parser.add_argument(f"--{name}", nargs="?", const=True, help=argparse.SUPPRESS)
    return parser


def expand(patterns: Sequence[str]) -> tuple[str, ...]:
    """Files of each pattern, sorted; a pattern that matches nothing stays, and is reported as a missing file."""
    return tuple(path for pattern in patterns for path in (sorted(glob.glob(pattern)) or [pattern]))


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 2 for bad flags and bad input."""
    parser = build_parser()
    args = parser.parse_args(argv)
    for name in NOT_SERVED:
        if getattr(args, name.replace("-", "_")) is not None:
            parser.error(f"--{name} is a flag of Megatron's that this tool does not serve.")
    for name in ("workers", "log_interval"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be above 0.")
    from megatron_peft.data.documents import PreprocessConfig
    from megatron_peft.data.preprocess import preprocess

    try:
        data = DataConfig(
            train_data_path=expand(args.input),
            tokenizer_type=args.tokenizer_type,
            tokenizer_model=args.tokenizer_model,
            vocab_size=args.vocab_size,
        )
        config = PreprocessConfig(
            data, args.output_prefix, tuple(args.json_keys), args.append_eod, args.workers, args.log_interval
        )
        done = preprocess(config)
    except ConfigurationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {done.documents} documents, {done.tokens} tokens: {', '.join(done.prefixes)}")
    if done.empty_documents:
        print(f"{done.empty_documents} empty documents were left out.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
