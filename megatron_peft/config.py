"""Typed configuration: frozen dataclasses that validate themselves.

Field names are Megatron's argument names (underscores for dashes), so an error can always name the flag.
Nothing here imports torch or megatron-core. `megatron_peft.arguments` is the only place that builds these from a
command line; tests and tools build them directly.

Every `__post_init__` raises one `ConfigurationError` that holds all problems of its group, each with the flag, the
numbers and the way out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from megatron_peft.config_error import ConfigurationError as ConfigurationError
from megatron_peft.config_error import Requirements
from megatron_peft.config_error import flag as flag
from megatron_peft.config_error import require as require
from megatron_peft.peft_config import LINEAR_MODULES as LINEAR_MODULES
from megatron_peft.peft_config import PEFT_METHODS as PEFT_METHODS
from megatron_peft.peft_config import PeftConfig as PeftConfig

FULL_RECOMPUTE_FIELDS = ("recompute_method", "recompute_num_layers", "distribute_saved_activations")
JSON_SUFFIXES = (".json", ".jsonl")


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

    @property
    def data_parallel_size(self) -> int:
        return self.world_size // (self.tensor_model_parallel_size * self.pipeline_model_parallel_size)


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


@dataclass(frozen=True)
class TrainingConfig:
    """Length of the run, batch sizes, evaluation and the ways to stop."""

    micro_batch_size: int = 1
    global_batch_size: int | None = None  # default: micro_batch_size x data-parallel size
    train_iters: int | None = None
    train_samples: int | None = None
    train_epochs: float | None = None  # resolves to iterations when the dataset's length is known
    eval_interval: int | None = 1000
    eval_iters: int | None = None  # iterations of global_batch_size samples; None: the whole validation set, once
    seed: int = 1234
    check_for_nan_in_loss_and_grad: bool = True
    exit_interval: int | None = None
    exit_duration_in_mins: float | None = None
    exit_signal_handler: bool = True  # SIGTERM and SIGUSR1 save and exit
    overlap_grad_reduce: bool = False

    def __post_init__(self) -> None:
        lengths = [n for n in ("train_iters", "train_samples", "train_epochs") if getattr(self, n) is not None]
        with Requirements(self) as require:
            require.positive(
                "micro_batch_size",
                "global_batch_size",
                "train_iters",
                "train_samples",
                "train_epochs",
                "eval_interval",
                "exit_interval",
                "exit_duration_in_mins",
            )
            require.not_negative("eval_iters")
            require(
                len(lengths) == 1,
                "the length of the run: give exactly one of --train-iters, --train-samples, --train-epochs"
                + (f" (given: {', '.join(map(flag, lengths))})." if lengths else " (none given)."),
            )


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW or SGD, its learning-rate schedule and its sharding. Units: rates per step, decay per unit of rate."""

    optimizer: Literal["adam", "sgd"] = "adam"
    lr: float = 1e-4
    min_lr: float = 0.0
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = "linear"
    lr_decay_iters: int | None = None
    lr_decay_samples: int | None = None
    lr_warmup_iters: int = 0
    lr_warmup_samples: int = 0
    lr_warmup_fraction: float | None = None
    lr_warmup_init: float = 0.0
    lr_wsd_decay_iters: int | None = None
    lr_wsd_decay_samples: int | None = None
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = "exponential"
    weight_decay: float = 0.01
    start_weight_decay: float | None = None
    end_weight_decay: float | None = None
    weight_decay_incr_style: Literal["constant", "linear", "cosine"] = "constant"
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_eps: float = 1e-8
    sgd_momentum: float = 0.9
    clip_grad: float = 1.0
    use_distributed_optimizer: bool = False
    overlap_param_gather: bool = False
    override_opt_param_scheduler: bool = False
    use_checkpoint_opt_param_scheduler: bool = False

    def __post_init__(self) -> None:
        wsd_flags = [n for n in ("lr_wsd_decay_iters", "lr_wsd_decay_samples") if getattr(self, n) is not None]
        start, end = self.start_weight_decay, self.end_weight_decay
        with Requirements(self) as require:
            require.positive("lr", "lr_decay_iters", "lr_decay_samples", "lr_wsd_decay_iters", "lr_wsd_decay_samples")
            require.positive("adam_eps")
            require.not_negative("min_lr", "lr_warmup_iters", "lr_warmup_samples", "lr_warmup_init", "weight_decay")
            require.not_negative("start_weight_decay", "clip_grad")
            require.fraction("adam_beta1", "adam_beta2", "sgd_momentum")
            require(self.min_lr <= self.lr, f"--min-lr {self.min_lr} is above --lr {self.lr}.")
            require(self.lr_warmup_init <= self.lr, f"--lr-warmup-init {self.lr_warmup_init} is above --lr {self.lr}.")
            require(
                self.lr_warmup_fraction is None or not (self.lr_warmup_iters or self.lr_warmup_samples),
                "--lr-warmup-fraction excludes --lr-warmup-iters and --lr-warmup-samples: give one.",
            )
            require(
                self.lr_warmup_fraction is None or 0 <= self.lr_warmup_fraction < 1,
                f"--lr-warmup-fraction is {self.lr_warmup_fraction}; it is a part of the decay: at least 0, below 1.",
            )
            require(
                self.lr_decay_style != "WSD" or len(wsd_flags) == 1,
                "--lr-decay-style WSD needs the length of its last phase: give --lr-wsd-decay-iters (or, with "
                "--train-samples, --lr-wsd-decay-samples).",
            )
            require(
                self.lr_decay_style == "WSD" or not wsd_flags,
                f"{', '.join(map(flag, wsd_flags))} belong to --lr-decay-style WSD, but it is {self.lr_decay_style}.",
            )
            constant = self.weight_decay_incr_style == "constant"
            require(
                not constant or start is end is None,
                "--start-weight-decay and --end-weight-decay need --weight-decay-incr-style linear or cosine.",
            )
            require(
                constant or (start is not None and end is not None and start <= end),
                f"--weight-decay-incr-style {self.weight_decay_incr_style} needs --start-weight-decay at most "
                f"--end-weight-decay (given: {start} and {end}).",
            )
            require.needs("overlap_param_gather", "use_distributed_optimizer")
            require(
                not self.use_distributed_optimizer or self.optimizer == "adam",
                f"--use-distributed-optimizer shards Adam only: leave it out with --optimizer {self.optimizer}.",
            )
            require.at_most_one("override_opt_param_scheduler", "use_checkpoint_opt_param_scheduler")


@dataclass(frozen=True)
class CheckpointConfig:
    """Where state is written and read. Intervals are iterations."""

    save: str | None = None
    load: str | None = None
    save_interval: int | None = None
    async_save: bool = False  # copy, go on, and write in the background
    keep_last_checkpoints: int | None = None  # None: all
    finetune: bool = False  # load parameters only, start at iteration 0
    no_load_optim: bool = False
    no_load_rng: bool = False
    no_save_optim: bool = False
    no_save_rng: bool = False

    def __post_init__(self) -> None:
        with Requirements(self) as require:
            require.positive("save_interval", "keep_last_checkpoints")
            require.needs("save_interval", "save")
            require.needs("async_save", "save")
            require.needs("keep_last_checkpoints", "save")


@dataclass(frozen=True)
class LoggingConfig:
    """What a run prints and records. Intervals are iterations."""

    log_interval: int = 10
    tensorboard_dir: str | None = None
    wandb_project: str | None = None
    wandb_exp_name: str | None = None
    wandb_save_dir: str | None = None

    def __post_init__(self) -> None:
        with Requirements(self) as require:
            require.positive("log_interval")
            require.needs("wandb_project", "wandb_exp_name")


@dataclass(frozen=True)
class RunConfig:
    """Everything a run needs. Checks here are those that span two groups."""

    parallel: ParallelConfig
    model: ModelConfig
    peft: PeftConfig
    data: DataConfig
    training: TrainingConfig
    optimizer: OptimizerSettings = OptimizerSettings()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()

    def __post_init__(self) -> None:
        with Requirements(self) as require:
            self._check_batches(require)
            self._check_schedule(require)
            self._check_memory_savers(require)
            self._check_method(require)

    def _check_batches(self, require: Requirements) -> None:
        replicas, pp = self.parallel.data_parallel_size, self.parallel.pipeline_model_parallel_size
        step = self.training.micro_batch_size * replicas
        below = self.global_batch_size // step * step
        require(
            self.global_batch_size % step == 0,
            f"--global-batch-size {self.global_batch_size} is not a multiple of --micro-batch-size "
            f"{self.training.micro_batch_size} x {replicas} data-parallel ranks = {step}: "
            f"use {' or '.join(str(batch) for batch in (below, below + step) if batch)}.",
        )
        interleaved = self.parallel.num_layers_per_virtual_pipeline_stage is not None
        require(
            not interleaved or self.num_microbatches % pp == 0,
            f"the interleaved schedule needs a multiple of --pipeline-model-parallel-size {pp} microbatches a step, "
            f"but --global-batch-size {self.global_batch_size} gives {self.num_microbatches}.",
        )

    def _check_schedule(self, require: Requirements) -> None:
        """Lengths of the schedule count what the length of the run counts, and the warmup ends before the decay."""
        by_samples = self.training.train_samples is not None
        unit, other = ("samples", "iters") if by_samples else ("iters", "samples")
        for stem in ("lr_decay_", "lr_warmup_", "lr_wsd_decay_"):
            require(
                not getattr(self.optimizer, stem + other),
                f"{flag(stem + other)} does not fit a run whose length is given "
                f"{'by' if by_samples else 'without'} --train-samples: use {flag(stem + unit)}.",
            )
        warmup = getattr(self.optimizer, "lr_warmup_" + unit)
        decay = getattr(self.optimizer, "lr_decay_" + unit) or getattr(self.training, "train_" + unit)
        require(
            decay is None or warmup < decay,
            f"{flag('lr_warmup_' + unit)} {warmup} leaves nothing to decay: it must be below the {decay} {unit} of "
            f"{flag('lr_decay_' + unit)} (default: {flag('train_' + unit)}).",
        )

    def _check_memory_savers(self, require: Requirements) -> None:
        tp, sequence_parallel = self.parallel.tensor_model_parallel_size, self.parallel.sequence_parallel
        require(
            not sequence_parallel or self.data.seq_length % tp == 0,
            f"--seq-length {self.data.seq_length} is not a multiple of --tensor-model-parallel-size {tp}, which "
            f"--sequence-parallel needs: use {self.data.seq_length // tp * tp or tp}.",
        )
        require(
            not self.model.transformer.get("distribute_saved_activations") or (tp > 1 and not sequence_parallel),
            "--distribute-saved-activations splits them over tensor-parallel ranks: it needs "
            "--tensor-model-parallel-size above 1, and no --sequence-parallel (which has split them already).",
        )
        require(
            not self.optimizer.overlap_param_gather or self.training.overlap_grad_reduce,
            "--overlap-param-gather needs --overlap-grad-reduce.",
        )
        require(
            self.peft.lora_max_norm_ratio is None or not self.optimizer.overlap_param_gather,
            "--lora-max-norm-ratio scales whole parameters after a step, which --overlap-param-gather has not gathered "
            "by then: leave out one of them.",
        )

    def _check_method(self, require: Requirements) -> None:
        require(
            not (self.peft.leaves_the_optimizer and self.optimizer.overlap_param_gather),
            "--boft-parametrization projection and --urnn-update riemannian end a step on whole parameters, which "
            "--overlap-param-gather has not gathered by then: leave it out, or use cayley or structured.",
        )
        require(
            self.peft.hybrid_merge_interval is None or not self.optimizer.overlap_param_gather,
            "--hybrid-merge-interval folds parameters in as a step ends, which --overlap-param-gather has not gathered "
            "by then: leave out one of them.",
        )
        require(
            self.peft.hybrid_merge_interval is None or not self.model.bf16,
            "--hybrid-merge-interval folds changes into weights that have to be kept in float32, which --bf16 does "
            "not: leave out one of them.",
        )

    @property
    def global_batch_size(self) -> int:
        """Samples a step over all ranks."""
        return self.training.global_batch_size or self.training.micro_batch_size * self.parallel.data_parallel_size

    @property
    def num_microbatches(self) -> int:
        """Microbatches a step on each rank."""
        return self.global_batch_size // (self.training.micro_batch_size * self.parallel.data_parallel_size)


def _is_split(text: str) -> bool:
    """Whether `text` is Megatron's "969, 30, 1": one to three shares, not negative and not all zero."""
    shares = text.split(",")
    try:
        numbers = [float(share) for share in shares]
    except ValueError:
        return False
    return len(shares) <= 3 and min(numbers) >= 0 and sum(numbers) > 0


def field_names(config_class: type) -> tuple[str, ...]:
    """The field names of a dataclass, in order."""
    return tuple(f.name for f in fields(config_class))
