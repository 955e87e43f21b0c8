"""Convert JSON lines to Megatron's indexed datasets (.bin and .idx), with the flags of Megatron's own tool.

megatron-peft data preprocess --input corpus.jsonl --output-prefix corpus --tokenizer-model HF_FOLDER --append-eod
writes corpus_text_document.bin and corpus_text_document.idx; train on them with --data-path corpus_text_document.
"""

import glob
from dataclasses import dataclass
from typing import Literal

from megatron_peft.cli.command import Command
from megatron_peft.config import Checked, DataConfig, option, required_option


@dataclass(frozen=True)
class PreprocessSettings(Checked):
    """Megatron's names and defaults."""

    input: tuple[str, ...] = required_option("JSON-lines files, or glob patterns", metavar="FILE")
    output_prefix: str = required_option("writes PREFIX_KEY_document.bin and .idx", metavar="PREFIX")
    json_keys: tuple[str, ...] = option(("text",), "fields to convert, each to its own dataset", metavar="KEY")
    tokenizer_type: Literal["HuggingFaceTokenizer", "SentencePieceTokenizer", "NullTokenizer"] = option(
        "HuggingFaceTokenizer", "what --tokenizer-model holds"
    )
    tokenizer_model: str | None = option(None, "a Hugging Face folder or a SentencePiece model", metavar="PATH")
    vocab_size: int | None = option(None, "vocabulary size of NullTokenizer", check="positive")
    append_eod: bool = option(False, "append the end-of-document token to each document")
    workers: int = option(1, "number of processes", check="positive")
    log_interval: int = option(1000, "records between progress lines", check="positive")
    keep_sequential_samples: bool = option(False, "accepted for Megatron's scripts; the order is always kept")


def run(settings: PreprocessSettings) -> int:
    """Write the datasets."""
    # A pattern that matches nothing stays, and is reported as a missing file.
    files = tuple(path for pattern in settings.input for path in (sorted(glob.glob(pattern)) or [pattern]))
    data = DataConfig(
        train_data_path=files,
        tokenizer_type=settings.tokenizer_type,
        tokenizer_model=settings.tokenizer_model,
        vocab_size=settings.vocab_size,
    )
    from megatron_peft.data.preprocess import PreprocessConfig, preprocess

    config = PreprocessConfig(
        *(data, settings.output_prefix, settings.json_keys),
        append_eod=settings.append_eod,
        workers=settings.workers,
        log_interval=settings.log_interval,
    )
    done = preprocess(config)
    print(f"wrote {done.documents} documents, {done.tokens} tokens: {', '.join(done.prefixes)}")
    if done.empty_documents:
        print(f"{done.empty_documents} empty documents were left out.")
    return 0


main = Command("data preprocess", __doc__, PreprocessSettings, run)
