"""The data of a run."""

from dataclasses import dataclass
from typing import Literal

from megatron_peft.config.errors import Requirements, flag

JSON_SUFFIXES = (".json", ".jsonl")
MOST_WORKERS = 1024


@dataclass(frozen=True)
class DataConfig:
    """Where the samples come from and how a sample becomes tokens.

    Either `train_data_path` (JSON lines: prompt/completion, messages, text) or `data_path` (Megatron's indexed
    .bin/.idx prefixes, optionally weighted, cut by `split`), never both.
    """

    train_data_path: tuple[str, ...] = ()
    valid_data_path: tuple[str, ...] = ()
    test_data_path: tuple[str, ...] = ()
    data_path: tuple[str, ...] = ()
    split: str | None = None  # "969, 30, 1" when data_path is given
    data_cache_path: str | None = None
    seq_length: int = 1024
    overlong: Literal["error", "skip", "truncate"] = "truncate"
    pack_sequences: bool = False
    tokenizer_type: Literal["HuggingFaceTokenizer", "SentencePieceTokenizer", "NullTokenizer"] = "HuggingFaceTokenizer"
    tokenizer_model: str | None = None  # default: the pretrained checkpoint's folder
    vocab_size: int | None = None  # NullTokenizer only
    num_workers: int = 2
    seed: int = 1234

    def __post_init__(self) -> None:
        separate = self.train_data_path or self.valid_data_path or self.test_data_path
        with Requirements(self) as require:
            require.positive("seq_length", "vocab_size")
            require.not_negative("num_workers")
            require(
                self.num_workers <= MOST_WORKERS,
                f"--num-workers is {self.num_workers}; they are processes of each rank, at most {MOST_WORKERS:,}.",
            )
            require(
                not (separate and self.data_path),
                "--data-path (one source cut by --split) and --train-data-path/--valid-data-path/--test-data-path "
                "(a source each) exclude one another: give one of the two.",
            )
            require(
                bool(self.data_path or self.train_data_path),
                "no training data: give --train-data-path FILE.jsonl, or --data-path PREFIX of an indexed dataset.",
            )
            require(
                not (self.split and separate),
                "--split cuts the source of --data-path; with --train-data-path each split has a source of its own.",
            )
            require(
                self.split is None or _is_split(self.split),
                f"--split {self.split} is not a list of up to three shares, as in 969,30,1.",
            )
            for name in ("train_data_path", "valid_data_path", "test_data_path"):
                paths = getattr(self, name)
                require(
                    len({path.endswith(JSON_SUFFIXES) for path in paths}) < 2,
                    f"{flag(name)} mixes JSON files with indexed datasets ({' '.join(paths)}): "
                    f"convert the JSON files with tools/preprocess_data.py, or give JSON files only.",
                )
            require(
                not self.pack_sequences or self.reads_json or not self.train_data_path + self.data_path,
                "--pack-sequences packs JSON samples; an indexed dataset is packed already: leave it out.",
            )
            require(
                self.tokenizer_type != "NullTokenizer" or self.vocab_size is not None,
                "--tokenizer-type NullTokenizer needs --vocab-size.",
            )
            require(
                self.tokenizer_type != "SentencePieceTokenizer" or bool(self.tokenizer_model),
                "--tokenizer-type SentencePieceTokenizer needs --tokenizer-model FILE.model.",
            )

    @property
    def reads_json(self) -> bool:
        return bool(self.train_data_path) and self.train_data_path[0].endswith(JSON_SUFFIXES)


def _is_split(text: str) -> bool:
    """Whether `text` is Megatron's "969, 30, 1": one to three shares, not negative and not all zero."""
    shares = text.split(",")
    try:
        numbers = [float(share) for share in shares]
    except ValueError:
        return False
    return len(shares) <= 3 and min(numbers) >= 0 and sum(numbers) > 0
