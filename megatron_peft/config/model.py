"""What is trained: the sections of a run's model and of its data; and how data is looked at."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from megatron_peft.config.errors import Checked, Requirements, flag, option, require
from megatron_peft.config.sources import RECORD_NAMES, is_indexed, kind_of_source, parse_blend, require_one_kind

BLOCK = 64  # input features of a row that share a scale with --base-precision
QUANTIZATION = ("base_precision", "quantize_output_layer")
NO_TRANSFORMER_ENGINE = (
    "--transformer-impl transformer_engine needs a GPU and the package transformer_engine, which is not installed: use "
    "auto or local, or pip install 'transformer-engine[pytorch]' on a machine with a GPU."
)
FULL_RECOMPUTE_FIELDS = ("recompute_method", "recompute_num_layers", "distribute_saved_activations")


@dataclass(frozen=True)
class ModelConfig(Checked):
    """Which base model, and how it runs.

    `shape_flags` holds the shape that the user typed (`num_layers`, `hidden_size`, ...), to be compared with what
    the checkpoint says; `transformer` holds the served fields of megatron-core's TransformerConfig that describe a
    run and not a model (dropouts, recompute, fusions).
    """

    pretrained_checkpoint: str | None = option(
        None, "base model: a Hugging Face folder (config.json, *.safetensors), or ORG/NAME of its Hub", metavar="PATH"
    )
    shape_flags: Mapping[str, Any] = field(default_factory=dict)
    transformer: Mapping[str, Any] = field(default_factory=dict)
    bf16: bool = option(False, "train in bfloat16, with float32 master parameters", group="mixed precision")
    base_precision: Literal["run", "nf4", "fp8"] = option(
        "run",
        "what the base's linear layers are quantized to while they are read: nf4 (four bits, by bitsandbytes) or fp8; "
        "run: they have the precision of the run",
        group="mixed precision",
    )
    quantize_output_layer: bool = option(
        False,
        "quantize the output layer too, by --base-precision; not where it is the embedding's own weight",
        group="mixed precision",
    )
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
    recompute_modules: tuple[Literal["core_attn", "layernorm", "mlp"], ...] = option(
        (),
        "what --recompute-granularity selective recomputes; layernorm: both norms of a layer (default: core_attn)",
        group="activation recompute and fusions",
    )
    cross_entropy_chunk_tokens: int | None = option(
        None,
        "form the loss of a frozen output layer, and its gradient, for N tokens at a time; 0: for all at once, as "
        "always if the output layer is trained (default: as many as have 64 MiB of float32 logits on a rank)",
        check="not_negative",
        group="activation recompute and fusions",
    )

    @property
    def quantization(self) -> dict[str, Any]:
        """The fields that say what the base is rounded to."""
        return {name: getattr(self, name) for name in QUANTIZATION}

    def check(self, require: Requirements) -> None:
        run, granularity = self.transformer, self.transformer.get("recompute_granularity")
        require(
            bool(self.pretrained_checkpoint),
            "no base model: --pretrained-checkpoint takes a Hugging Face folder (config.json and *.safetensors).",
        )
        message = "--quantize-output-layer needs --base-precision nf4 or fp8."
        require(self.base_precision != "run" or not self.quantize_output_layer, message)
        for name in ("attention_dropout", "hidden_dropout"):
            require(0 <= run.get(name, 0) < 1, f"{flag(name)} is {run.get(name)}; it is at least 0 and below 1.")
        is_full = bool(run.get("recompute_method")) and run.get("recompute_num_layers", 0) > 0
        require(
            granularity != "full" or is_full,
            "--recompute-granularity full needs --recompute-method uniform or block, and --recompute-num-layers > 0.",
        )
        only_full = [name for name in FULL_RECOMPUTE_FIELDS if run.get(name)]
        selective = ["recompute_modules"] if self.recompute_modules else []
        for kind, names in (("full", only_full), ("selective", selective)):
            message = f"{', '.join(map(flag, names))}: only with --recompute-granularity {kind}."
            require(granularity == kind or not names, message)


SENTENCEPIECE = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")  # read a .model file
_column = partial(option, None, check="not_empty", metavar="NAME")
_tokenizer = partial(option, group="tokenizer")


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
    split: str | None = option(
        None, "shares of training, validation and test (default: 969,30,1, as Megatron)", needs="data_path|mock_data"
    )
    mock_data: bool = option(False, "train on generated token ids, to try a layout or its speed without data")
    data_cache_path: str | None = option(
        None, "folder for the index files built from indexed data, and for the tokens of records", metavar="PATH"
    )
    mmap_bin_files: bool = option(True, "map indexed data into memory instead of reading each sample from its file")
    prompt_column: str | None = _column("field of a record that holds the prompt, which the loss does not count")
    response_column: str | None = _column("field of a record that holds the answer to the prompt")
    messages_column: str | None = _column(
        "field of a record that holds the conversation: messages with role and content, or with from and value"
    )
    text_column: str | None = _column("field of a record that holds the text, all of which the loss counts")
    chat_template: str | None = _tokenizer(
        None, "Jinja template of a conversation, or a file with it (default: the tokenizer's own)", metavar="FILE|TEXT"
    )
    seq_length: int = option(1024, "longest sample, in tokens", check="positive")
    pad_to_seq_length: bool = option(
        False, "pad every microbatch (or pack) to --seq-length, so that pipeline stages never wait for the device"
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
    ] = _tokenizer(
        "HuggingFaceTokenizer",
        "kind of tokenizer; Llama2Tokenizer is a SentencePiece model that puts its BOS token before each text",
        metavar="TYPE",
    )
    tokenizer_model: str | None = _tokenizer(
        None, "tokenizer folder, ORG/NAME of the Hub or SentencePiece model (default: the base model's)", metavar="PATH"
    )
    vocab_size: int | None = _tokenizer(
        None, "size of NullTokenizer's vocabulary; others' is compared with the checkpoint", check="positive"
    )
    num_workers: int = option(2, "data-loading processes per rank", check="not_negative", most=1024)
    seed: int = option(1234, "seed for parameters, dropout and the order of samples")

    def check(self, require: Requirements) -> None:
        separate = self.train_data_path or self.valid_data_path or self.test_data_path
        require(
            bool(separate) + bool(self.data_path) + self.mock_data <= 1,
            "--data-path (cut by --split), --train-data-path/--valid-data-path/--test-data-path and --mock-data are "
            "mutually exclusive.",
        )
        require(
            self.split is None or _is_split(self.split),
            f"--split {self.split} is not a list of up to three shares, as in 969,30,1.",
        )
        require(
            not any(kind_of_source(path) in ("json", "table") for path in self.data_path),
            f"--data-path {' '.join(self.data_path)} takes prefixes of indexed data; --train-data-path takes records.",
        )
        require(
            not self.pack_sequences or self.reads_records or not self.train_data_path + self.data_path,
            "--pack-sequences packs records; indexed data is packed already: leave it out.",
        )
        columns = (self.prompt_column or self.response_column, self.messages_column, self.text_column)
        require(
            columns.count(None) >= 2,
            "--prompt-column (with --response-column), --messages-column and --text-column name columns of different "
            "formats: give one.",
        )
        require(
            self.tokenizer_type != "NullTokenizer" or self.vocab_size is not None,
            "--tokenizer-type NullTokenizer needs --vocab-size.",
        )
        require(
            self.tokenizer_type not in SENTENCEPIECE or bool(self.tokenizer_model),
            f"--tokenizer-type {self.tokenizer_type} needs --tokenizer-model FILE.model.",
        )
        for name in ("train_data_path", "valid_data_path", "test_data_path"):
            require_one_kind(getattr(self, name), flag(name))

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
    max_tokens: int = option(400, "tokens to show of a sample; the middle of a longer one is cut", check="positive")
    sampled_records: int = option(2000, "random records that the figures are estimated from", check="positive")
    exact: bool = option(False, "take the figures from all records")
    color: Literal["auto", "always", "never"] = option("auto", "color what is shown; auto: on a terminal")

    def check(self, require: Requirements) -> None:
        require(self.sampled_records > 1, f"--sampled-records is {self.sampled_records}; it must be above 1.")

    def check_data(self, data: DataConfig) -> None:
        """Raises ConfigurationError for data that cannot be previewed, or not like this; no file is opened."""
        paths = data.train_data_path
        require(bool(paths), "nothing to preview: give --train-data-path FILE.jsonl.")
        blend = parse_blend(paths, "--train-data-path")
        indexed = [path for path in blend.prefixes if kind_of_source(path) == "indexed"]
        require(
            not indexed,
            f"--train-data-path {' '.join(indexed)}: no file of records; {RECORD_NAMES}. Indexed data is cut into "
            f"sequences without regard to records.",
        )
        require(
            not (self.exact and blend.weights),
            "--exact reads each record once, but --train-data-path has weights: leave out one of them.",
        )
