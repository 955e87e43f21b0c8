"""What is trained: the sections of a run's model, its layout on processes, and its data."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_peft.config.errors import Requirements, flag, option

FULL_RECOMPUTE_FIELDS = ("recompute_method", "recompute_num_layers", "distribute_saved_activations")


@dataclass(frozen=True)
class ModelConfig:
    """Which base model, and how it runs.

    `shape_flags` holds the shape that the user typed (`num_layers`, `hidden_size`, ...), to be compared with what
    the checkpoint says; `transformer` holds the served fields of megatron-core's TransformerConfig that describe a
    run and not a model (dropouts, recompute, fusions).
    """

    pretrained_checkpoint: str | None = option(
        None, "base model: a Hugging Face folder (config.json and *.safetensors)", metavar="PATH"
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
            require(
                run.get("recompute_num_layers", 1) > 0,
                f"--recompute-num-layers is {run.get('recompute_num_layers')}; it must be above 0.",
            )


@dataclass(frozen=True)
class ParallelConfig:
    """How the model and the batch are split over `world_size` processes."""

    tensor_model_parallel_size: int = option(1, "number of ranks each linear layer is split over", check="positive")
    pipeline_model_parallel_size: int = option(1, "number of pipeline stages", check="positive")
    num_layers_per_virtual_pipeline_stage: int | None = option(
        None, "interleaved schedule: number of layers in a virtual stage", check="positive"
    )
    decoder_first_pipeline_num_layers: int | None = option(
        None, "number of layers in the first pipeline stage, if it differs from the others", check="positive"
    )
    decoder_last_pipeline_num_layers: int | None = option(
        None, "number of layers in the last pipeline stage, if it differs from the others", check="positive"
    )
    sequence_parallel: bool = option(
        False, "split the sequence over the tensor-parallel ranks outside the linear layers"
    )
    distributed_backend: Literal["nccl", "gloo"] | None = option(None, "default: nccl with CUDA, gloo without")
    distributed_timeout_minutes: float = option(
        10, "minutes a rank waits for the others before the run fails", check="positive"
    )
    world_size: int = 1

    def __post_init__(self) -> None:
        tp, pp = self.tensor_model_parallel_size, self.pipeline_model_parallel_size
        uneven = bool(self.decoder_first_pipeline_num_layers or self.decoder_last_pipeline_num_layers)
        with Requirements(self) as require:
            require.fields()
            require(
                tp * pp <= 0 or self.world_size % (tp * pp) == 0,
                f"{self.world_size} processes cannot hold --tensor-model-parallel-size {tp} x "
                f"--pipeline-model-parallel-size {pp} = {tp * pp} ranks per replica: start a multiple of {tp * pp} "
                f"processes (torchrun --nproc-per-node), or lower one of the two.",
            )
            require(
                not self.sequence_parallel or tp > 1,
                "--sequence-parallel splits the sequence over tensor-parallel ranks: it needs "
                "--tensor-model-parallel-size above 1.",
            )
            require(
                self.num_layers_per_virtual_pipeline_stage is None or pp > 1,
                "--num-layers-per-virtual-pipeline-stage interleaves pipeline stages: it needs "
                "--pipeline-model-parallel-size above 1.",
            )
            require(
                not uneven or pp > 1,
                "--decoder-first-pipeline-num-layers and --decoder-last-pipeline-num-layers need "
                "--pipeline-model-parallel-size above 1.",
            )
            require(
                not uneven or self.num_layers_per_virtual_pipeline_stage is None,
                "--num-layers-per-virtual-pipeline-stage needs stages of equal size: leave out "
                "--decoder-first-pipeline-num-layers and --decoder-last-pipeline-num-layers.",
            )

    def num_virtual_stages(self, num_layers: int) -> int | None:
        """Model chunks of one pipeline rank under the interleaved schedule; None for the plain one."""
        chunk = self.num_layers_per_virtual_pipeline_stage
        return None if chunk is None else num_layers // self.pipeline_model_parallel_size // chunk

    @property
    def data_parallel_size(self) -> int:
        """Replicas of the model: ranks that are neither tensor- nor pipeline-parallel."""
        return self.world_size // (self.tensor_model_parallel_size * self.pipeline_model_parallel_size)


JSON_SUFFIXES = (".json", ".jsonl")
MOST_WORKERS = 1024


@dataclass(frozen=True)
class DataConfig:
    """Where the samples come from and how a sample becomes tokens.

    Either `train_data_path` (JSON lines: prompt/completion, messages, text) or `data_path` (Megatron's indexed
    .bin/.idx prefixes, optionally weighted, cut by `split`), never both; neither where nothing is trained.
    """

    train_data_path: tuple[str, ...] = option(
        (),
        "training data: *.json or *.jsonl with prompt and completion, messages or text; or indexed prefixes, each "
        "optionally preceded by its weight",
        metavar="PATH",
    )
    valid_data_path: tuple[str, ...] = option((), "validation data, like --train-data-path", metavar="PATH")
    test_data_path: tuple[str, ...] = option((), "test data, like --train-data-path", metavar="PATH")
    data_path: tuple[str, ...] = option(
        (), "indexed .bin/.idx prefixes, each optionally preceded by its weight, divided by --split", metavar="PATH"
    )
    split: str | None = option(None, "shares of training, validation and test with --data-path, such as 969,30,1")
    data_cache_path: str | None = option(None, "folder for the index files built from indexed data", metavar="PATH")
    seq_length: int = option(1024, "longest sample, in tokens", check="positive")
    overlong: Literal["error", "skip", "truncate"] = option(
        "truncate", "what to do with longer samples; truncate cuts the end of the completion, with a warning"
    )
    pack_sequences: bool = option(False, "pack several samples into one sequence, without attention across them")
    tokenizer_type: Literal["HuggingFaceTokenizer", "SentencePieceTokenizer", "NullTokenizer"] = option(
        "HuggingFaceTokenizer", "kind of tokenizer", group="tokenizer"
    )
    tokenizer_model: str | None = option(
        None,
        "tokenizer folder or SentencePiece model (default: the folder of --pretrained-checkpoint)",
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

    def __post_init__(self) -> None:
        separate = self.train_data_path or self.valid_data_path or self.test_data_path
        with Requirements(self) as require:
            require.fields()
            require(
                self.num_workers <= MOST_WORKERS,
                f"--num-workers is {self.num_workers}; they are processes of each rank, at most {MOST_WORKERS:,}.",
            )
            require(
                not (separate and self.data_path),
                "--data-path (one source cut by --split) and --train-data-path/--valid-data-path/--test-data-path "
                "(a source each) are mutually exclusive.",
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
        """Whether --train-data-path names JSON lines, and not an indexed dataset."""
        return bool(self.train_data_path) and self.train_data_path[0].endswith(JSON_SUFFIXES)


def _is_split(text: str) -> bool:
    """Whether `text` is Megatron's "969, 30, 1": one to three shares, not negative and not all zero."""
    shares = text.split(",")
    try:
        numbers = [float(share) for share in shares]
    except ValueError:
        return False
    return len(shares) <= 3 and min(numbers) >= 0 and sum(numbers) > 0
