"""What is trained: the sections of a run's model, its layout on processes, and its data."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_peft.config.errors import Requirements, flag

FULL_RECOMPUTE_FIELDS = ("recompute_method", "recompute_num_layers", "distribute_saved_activations")


@dataclass(frozen=True)
class ModelConfig:
    """Which base model, and how it runs.

    `shape_flags` holds the shape that the user typed (`num_layers`, `hidden_size`, ...), to be compared with what
    the checkpoint says; `transformer` holds the served fields of megatron-core's TransformerConfig that describe a
    run and not a model (dropouts, recompute, fusions).
    """

    pretrained_checkpoint: str | None = None
    shape_flags: Mapping[str, Any] = field(default_factory=dict)
    transformer: Mapping[str, Any] = field(default_factory=dict)
    bf16: bool = False
    make_vocab_size_divisible_by: int = 128
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"  # norms and core attention only

    def __post_init__(self) -> None:
        run = self.transformer
        full = run.get("recompute_granularity") == "full"
        only_full = [name for name in FULL_RECOMPUTE_FIELDS if run.get(name)]
        with Requirements(self) as require:
            require(
                bool(self.pretrained_checkpoint),
                "no base model: --pretrained-checkpoint takes a Hugging Face folder (config.json and *.safetensors).",
            )
            require.positive("make_vocab_size_divisible_by")
            for name in ("attention_dropout", "hidden_dropout"):
                require(0 <= run.get(name, 0) < 1, f"{flag(name)} is {run.get(name)}; it is at least 0 and below 1.")
            require(
                not full or {"recompute_method", "recompute_num_layers"} <= run.keys(),
                "--recompute-granularity full needs --recompute-method uniform or block, and --recompute-num-layers N "
                "(uniform: layers a recomputed unit; block: layers a stage that are recomputed).",
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

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    num_layers_per_virtual_pipeline_stage: int | None = None
    decoder_first_pipeline_num_layers: int | None = None
    decoder_last_pipeline_num_layers: int | None = None
    sequence_parallel: bool = False
    distributed_backend: Literal["nccl", "gloo"] | None = None  # None: nccl with CUDA, else gloo
    distributed_timeout_minutes: float = 10
    world_size: int = 1

    def __post_init__(self) -> None:
        tp, pp = self.tensor_model_parallel_size, self.pipeline_model_parallel_size
        uneven = bool(self.decoder_first_pipeline_num_layers or self.decoder_last_pipeline_num_layers)
        with Requirements(self) as require:
            require.positive(
                "tensor_model_parallel_size",
                "pipeline_model_parallel_size",
                "num_layers_per_virtual_pipeline_stage",
                "decoder_first_pipeline_num_layers",
                "decoder_last_pipeline_num_layers",
                "distributed_timeout_minutes",
            )
            require(
                tp * pp <= 0 or self.world_size % (tp * pp) == 0,
                f"{self.world_size} processes cannot hold --tensor-model-parallel-size {tp} x "
                f"--pipeline-model-parallel-size {pp} = {tp * pp} ranks a replica: start a multiple of {tp * pp} "
                f"(torchrun --nproc-per-node), or lower one of the two.",
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
        return self.world_size // (self.tensor_model_parallel_size * self.pipeline_model_parallel_size)


JSON_SUFFIXES = (".json", ".jsonl")
MOST_WORKERS = 1024


@dataclass(frozen=True)
class DataConfig:
    """Where the samples come from and how a sample becomes tokens.

    Either `train_data_path` (JSON lines: prompt/completion, messages, text) or `data_path` (Megatron's indexed
    .bin/.idx prefixes, optionally weighted, cut by `split`), never both; neither where nothing is trained.
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
