"""What is trained: the sections of a run's model and of its data, and how data is looked at before."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_peft.config.errors import Checked, Requirements, flag, option, require
from megatron_peft.config.sources import RECORD_NAMES, is_indexed, kind_of_source, parse_blend, require_one_kind

FULL_RECOMPUTE_FIELDS = ("recompute_method", "recompute_num_layers", "distribute_saved_activations")

RECOMPUTED_MODULES = ("core_attn", "layernorm", "mlp")  # those of a layer without experts


@dataclass(frozen=True)
class ModelConfig:
    """Which base model, and how it runs.

    `shape_flags` holds the shape that the user typed (`num_layers`, `hidden_size`, ...), to be compared with what
    the checkpoint says; `transformer` holds the served fields of megatron-core's TransformerConfig that describe a
    run and not a model (dropouts, recompute, fusions).
    """

    pretrained_checkpoint: str | None = option(
        None,
        "base model: a Hugging Face folder (config.json and *.safetensors), or ORG/NAME of its Hub",
        metavar="PATH",
    )
    shape_flags: Mapping[str, Any] = field(default_factory=dict)
    transformer: Mapping[str, Any] = field(default_factory=dict)
    bf16: bool = option(False, "train in bfloat16, with float32 master parameters", group="mixed precision")
    make_vocab_size_divisible_by: int = option(
        128, "the vocabulary is padded to a multiple of this, per tensor-parallel rank", check="positive"
    )
    transformer_impl: Literal["auto", "local", "transformer_engine"] = option(
        "auto", "where norms and core attention come from; auto: Transformer Engine if it is installed"
    )
    attention_backend: Literal["auto", "flash", "fused", "unfused", "local"] = option(
        "auto",
        "kernel of core attention, where there is a choice; without a GPU, unfused and local materialize the scores",
    )
    recompute_modules: tuple[str, ...] = option(
        (),
        "what --recompute-granularity selective recomputes: core_attn (the default), layernorm (both norms of a "
        "layer), mlp",
        group="activation recompute and fusions",
    )

    def __post_init__(self) -> None:
        run = self.transformer
        full = run.get("recompute_granularity") == "full"
        only_full = [name for name in FULL_RECOMPUTE_FIELDS if run.get(name)]
        with Requirements(self) as require:
            require(
                bool(self.pretrained_checkpoint),
                "no base model: --pretrained-checkpoint takes a Hugging Face folder (config.json and *.safetensors).",
            )
            require.fields()
            for name in ("attention_dropout", "hidden_dropout"):
                require(0 <= run.get(name, 0) < 1, f"{flag(name)} is {run.get(name)}; it is at least 0 and below 1.")
            require(
                not full or {"recompute_method", "recompute_num_layers"} <= run.keys(),
                "--recompute-granularity full needs --recompute-method uniform or block, and --recompute-num-layers N "
                "(uniform: layers per recomputed group; block: recomputed layers per stage).",
            )
            require(
                full or not only_full,
                f"{', '.join(map(flag, only_full))} belong to --recompute-granularity full, which is not given.",
            )
            foreign = [name for name in self.recompute_modules if name not in RECOMPUTED_MODULES]
            require(
                not foreign,
                f"--recompute-modules {' '.join(foreign)}: the layers of these models have "
                f"{', '.join(RECOMPUTED_MODULES)}.",
            )
            require(
                not self.recompute_modules or run.get("recompute_granularity") == "selective",
                "--recompute-modules belongs to --recompute-granularity selective, which is not given.",
            )
            require(
                run.get("recompute_num_layers", 1) > 0,
                f"--recompute-num-layers is {run.get('recompute_num_layers')}; it must be above 0.",
            )


SENTENCEPIECE = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")  # read a .model file
MOST_WORKERS = 1024


def _column(content: str) -> str | None:
    return option(None, f"field of a record that holds the {content}", check="not_empty", metavar="NAME")


@dataclass(frozen=True)
class DataConfig(Checked):
    """Where the samples come from and how a sample becomes tokens.

    Either `train_data_path` (records in JSON or tables, Hub datasets, or indexed prefixes) or `data_path`
    (Megatron's indexed .bin/.idx prefixes, cut by `split`), never both; neither where nothing is trained.
    """

    train_data_path: tuple[str, ...] = option(
        (),
        "training data: *.json, *.jsonl, *.parquet, *.csv, *.arrow, folders saved by datasets, Hugging Face "
        "Hub datasets (ORG/NAME[:SPLIT]), or indexed prefixes, each optionally preceded by its weight",
        metavar="PATH",
    )
    valid_data_path: tuple[str, ...] = option((), "validation data, like --train-data-path", metavar="PATH")
    test_data_path: tuple[str, ...] = option((), "test data, like --train-data-path", metavar="PATH")
    data_path: tuple[str, ...] = option(
        (), "indexed .bin/.idx prefixes, each optionally preceded by its weight, divided by --split", metavar="PATH"
    )
    split: str | None = option(None, "shares of training, validation and test with --data-path, such as 969,30,1")
    mock_data: bool = option(False, "train on generated token ids, to try a layout or its speed without data")
    data_cache_path: str | None = option(
        None, "folder for the index files built from indexed data, and for the tokens of records", metavar="PATH"
    )
    mmap_bin_files: bool = option(True, "map indexed data into memory instead of reading each sample from its file")
    prompt_column: str | None = _column("prompt, which the loss does not count")
    response_column: str | None = _column("answer to the prompt")
    messages_column: str | None = _column("conversation: messages with role and content, or with from and value")
    text_column: str | None = _column("text, all of which the loss counts")
    chat_template: str | None = option(
        None,
        "Jinja template of a conversation: a file, or the text itself (default: the tokenizer's own)",
        group="tokenizer",
        metavar="FILE|TEXT",
    )
    seq_length: int = option(1024, "longest sample, in tokens", check="positive")
    pad_to_seq_length: bool = option(
        False,
        "pad every microbatch to --seq-length (packed: each pack), so that pipeline stages exchange messages of a "
        "known size and never wait for the device",
    )
    overlong: Literal["error", "skip", "truncate"] = option(
        "truncate", "what to do with longer samples; truncate cuts the end of the completion, with a warning"
    )
    pack_sequences: bool = option(False, "pack several samples into one sequence, without attention across them")
    packing: Literal["first-fit-decreasing", "next-fit"] = option(
        "first-fit-decreasing",
        "how --pack-sequences fills sequences: longest samples first, each into the first sequence with room; or in "
        "the order of the epoch",
    )
    tokenizer_type: Literal[
        "HuggingFaceTokenizer",
        "Llama2Tokenizer",
        "SentencePieceTokenizer",
        "GPTSentencePieceTokenizer",
        "NullTokenizer",
    ] = option(
        "HuggingFaceTokenizer",
        "kind of tokenizer; Llama2Tokenizer is a SentencePiece model that puts its BOS token before each text",
        group="tokenizer",
        metavar="TYPE",
    )
    tokenizer_model: str | None = option(
        None,
        "tokenizer folder, ORG/NAME of the Hugging Face Hub, or SentencePiece model (default: the folder of "
        "--pretrained-checkpoint)",
        group="tokenizer",
        metavar="PATH",
    )
    vocab_size: int | None = option(
        None,
        "size of NullTokenizer's vocabulary; with other tokenizers it is compared with the checkpoint",
        check="positive",
        group="tokenizer",
    )
    num_workers: int = option(2, "data-loading processes per rank", check="not_negative")
    seed: int = option(1234, "seed for parameters, dropout and the order of samples")

    def check(self, require: Requirements) -> None:
        separate = self.train_data_path or self.valid_data_path or self.test_data_path
        require(
            self.num_workers <= MOST_WORKERS,
            f"--num-workers is {self.num_workers}; it is the number of processes per rank, at most {MOST_WORKERS:,}.",
        )
        require(
            not (separate and self.data_path),
            "--data-path (one source cut by --split) and --train-data-path/--valid-data-path/--test-data-path "
            "(a source each) are mutually exclusive.",
        )
        require(
            not (self.mock_data and (separate or self.data_path)),
            "--mock-data generates its samples: leave out --data-path and --train-data-path/--valid-data-path/"
            "--test-data-path.",
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
            require.that_holds(lambda name=name: require_one_kind(getattr(self, name), flag(name)))
        require(
            not any(kind_of_source(path) in ("json", "table") for path in self.data_path),
            f"--data-path {' '.join(self.data_path)}: it takes prefixes of indexed data, which --split cuts; give "
            "records to --train-data-path and --valid-data-path.",
        )
        require(
            not self.pack_sequences or self.reads_records or not self.train_data_path + self.data_path,
            "--pack-sequences packs records; an indexed dataset is packed already: leave it out.",
        )
        columns = [name for name in ("messages_column", "text_column") if getattr(self, name)]
        if self.prompt_column or self.response_column:
            columns.insert(0, "prompt_column" if self.prompt_column else "response_column")
        require(
            len(columns) <= 1,
            f"{' and '.join(map(flag, columns))} name columns of different formats, and a file has one: give "
            "--prompt-column with --response-column, or --messages-column, or --text-column.",
        )
        require(
            self.tokenizer_type != "NullTokenizer" or self.vocab_size is not None,
            "--tokenizer-type NullTokenizer needs --vocab-size.",
        )
        require(
            self.tokenizer_type not in SENTENCEPIECE or bool(self.tokenizer_model),
            f"--tokenizer-type {self.tokenizer_type} needs --tokenizer-model FILE.model.",
        )

    @property
    def reads_records(self) -> bool:
        """Whether training reads records, not indexed data."""
        return bool(self.train_data_path) and not is_indexed(self.train_data_path)


def _is_split(text: str) -> bool:
    """Whether `text` is Megatron's "969, 30, 1": one to three shares, not negative and not all zero.

    Quotes around it are skipped, as Megatron does: some of its scripts pass them on.
    """
    shares = text.strip("'\"").split(",")
    try:
        numbers = [float(share) for share in shares]
    except ValueError:
        return False
    return len(shares) <= 3 and min(numbers) >= 0 and sum(numbers) > 0


@dataclass(frozen=True)
class PreviewOptions(Checked):
    """What `megatron-peft data preview` takes besides the flags of a run; `data.preview.Preview` does the work."""

    show_samples: int = option(3, "samples to show token by token", check="not_negative")
    max_tokens: int = option(
        400, "tokens to show of a sample; the middle of a longer one is left out", check="positive"
    )
    sampled_records: int = option(2000, "random records that the figures are estimated from", check="positive")
    exact: bool = option(False, "take the figures from all records")
    color: Literal["auto", "always", "never"] = option("auto", "color what is shown; auto: on a terminal")

    def check(self, require: Requirements) -> None:
        require(self.sampled_records > 1, f"--sampled-records is {self.sampled_records}; it must be above 1.")

    def check_data(self, data: DataConfig) -> None:
        """Raises ConfigurationError for data that cannot be previewed, or not like this; no file is opened."""
        paths = data.train_data_path
        require(bool(paths), "nothing to preview: give --train-data-path FILE.jsonl.")
        prefixes = [
            path for path in parse_blend(paths, "--train-data-path").prefixes if kind_of_source(path) == "indexed"
        ]
        missing = [path for path in prefixes if not Path(f"{path}.idx").exists()]
        require(not missing, f"--train-data-path {' '.join(missing)}: no file of records; {RECORD_NAMES}.")
        require(
            not prefixes,
            f"--train-data-path {' '.join(paths)} names indexed data, whose tokens are cut into sequences without "
            f"regard to records: there is nothing to preview. Give the records that it was made from ({RECORD_NAMES}).",
        )
        require(
            not (self.exact and parse_blend(paths, "--train-data-path").weights),
            "--exact reads each record once, but --train-data-path has weights: leave out one of them.",
        )
