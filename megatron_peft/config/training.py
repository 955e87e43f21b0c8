"""Configuration of a run's layout on processes, its length and batches, optimizer, checkpoints and logging."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from megatron_peft.config.errors import Checked, Requirements, flag, option

UNEVEN_STAGES = ("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers")
ACCOUNTED_STAGES = ("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split")
CHUNK, LAYOUT = "num_layers_per_virtual_pipeline_stage", "pipeline_model_parallel_layout"


@dataclass(frozen=True)
class ParallelConfig(Checked):
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
    account_for_embedding_in_pipeline_split: bool = option(
        False, "count the embedding as a layer when layers are divided among pipeline stages"
    )
    account_for_loss_in_pipeline_split: bool = option(
        False, "count the output layer and the loss as a layer when layers are divided among pipeline stages"
    )
    pipeline_model_parallel_layout: str | None = option(
        None,
        "what each pipeline stage holds, in order: E embedding, t layer, L loss; | between stages, *N repeats, ( ) "
        "groups, as in 'Ettt|(tttt|)*14tttL'; N times as many stages as --pipeline-model-parallel-size interleave",
        check="not_empty",
        metavar="LAYOUT",
    )
    sequence_parallel: bool = option(
        False,
        "split the sequence over the tensor-parallel ranks outside the linear layers; no effect with one such rank",
    )
    distributed_backend: Literal["nccl", "gloo"] | None = option(
        None, "default: nccl with CUDA, else gloo; without CUDA nccl falls back to gloo"
    )
    distributed_timeout_minutes: float = option(10, "minutes a rank waits for the others at most", check="positive")
    distributed_timeout_seconds_after_init: int | None = option(
        None, "seconds that a rank waits after the first iteration: more than a save takes", check="positive"
    )
    world_size: int = 1

    @property
    def seconds_to_wait(self) -> float:
        """How long a rank waits for the others in training."""
        return self.distributed_timeout_seconds_after_init or 60 * self.distributed_timeout_minutes

    def check(self, require: Requirements) -> None:
        tp, pp = self.tensor_model_parallel_size, self.pipeline_model_parallel_size
        require(
            tp * pp <= 0 or self.world_size % (tp * pp) == 0,
            f"{self.world_size} processes cannot hold --tensor-model-parallel-size {tp} x "
            f"--pipeline-model-parallel-size {pp} ranks: start a multiple of {tp * pp}, or lower one of the two.",
        )
        require(
            not self.sequence_parallel or tp > 1, "--sequence-parallel: only with --tensor-model-parallel-size above 1."
        )
        uneven, divided = self._given(*UNEVEN_STAGES), self._given(CHUNK, *ACCOUNTED_STAGES)
        ways = [way for way in (uneven, divided, self._given(LAYOUT)) if way]
        named = ", ".join(flag(name) for way in ways for name in way)
        require(pp > 1 or not ways, f"{named}: only with --pipeline-model-parallel-size above 1.")
        require(len(ways) <= 1, f"{named}: mutually exclusive ways to divide layers among pipeline stages.")
        layout = self.pipeline_model_parallel_layout
        if layout is None:
            return
        is_short, shown = len(layout) <= 1000 and not re.search(r"\d{4}", layout), f"{flag(LAYOUT)} {layout[:80]}"
        stages = stages_of_layout(layout) if is_short else []
        require(
            re.fullmatch(r"E[t|]*L", "|".join(stages)) is not None,
            f"{shown} must hold E (embedding), t (layer) and L (loss) in this order, with | between stages, as in "
            f"'Ettt|(tttt|)*14tttL', and repeat less than 1,000 times.",
        )
        require(
            pp <= 0 or len(stages) % pp == 0,
            f"{shown} has {len(stages)} stages, which --pipeline-model-parallel-size {pp} does not divide.",
        )

    def _given(self, *names: str) -> list[str]:
        return [name for name in names if getattr(self, name)]

    @property
    def is_interleaved(self) -> bool:
        """Whether a pipeline rank holds several chunks of the model."""
        if layout := self.pipeline_model_parallel_layout:
            return len(stages_of_layout(layout)) > self.pipeline_model_parallel_size
        return self.num_layers_per_virtual_pipeline_stage is not None

    def num_divided(self, num_layers: int) -> int:
        """Layers to divide among the stages, with the embedding and the loss where they count as one."""
        return num_layers + len(self._given(*ACCOUNTED_STAGES))

    def num_virtual_stages(self, num_layers: int) -> int | None:
        """Model chunks of one pipeline rank under the interleaved schedule; None for the plain one."""
        if not self.is_interleaved:
            return None
        pp, layout = self.pipeline_model_parallel_size, self.pipeline_model_parallel_layout
        if layout:
            return len(stages_of_layout(layout)) // pp
        return self.num_divided(num_layers) // pp // (self.num_layers_per_virtual_pipeline_stage or 1)

    @property
    def data_parallel_size(self) -> int:
        """Replicas of the model: ranks that are neither tensor- nor pipeline-parallel."""
        return self.world_size // (self.tensor_model_parallel_size * self.pipeline_model_parallel_size)


def stages_of_layout(layout: str) -> list[str]:
    """What each stage of a --pipeline-model-parallel-layout holds: `E|(tt|)*2L` -> ["E", "tt", "tt", "L"].

    As megatron-core reads it, which would have to import torch for that.
    """
    unrolled = layout.replace(",", "")
    for repeated in (r"\(([^)]+)\)\*(\d+)", r"(.)\*(\d+)"):
        unrolled = re.sub(repeated, lambda match: match[1] * int(match[2]), unrolled)
    return unrolled.split("|")


LENGTHS = ("train_iters", "train_samples", "train_epochs")
ONE_LENGTH = "give exactly one of --train-iters, --train-samples and --train-epochs as the length of the run"

# Titles of --help, and settings that several fields share. The limits are far above what anybody has trained.
DISTRIBUTED = "distributed"
_length = partial(option, None, check="positive", most=10**12)
_batch = partial(option, check="positive", most=2**24)
_path = partial(option, None, check="not_empty", metavar="PATH")
_rate = partial(option, group="learning rate")
_validation = partial(option, group="validation")


@dataclass(frozen=True)
class TrainingConfig(Checked):
    """Length of the run (one of three, or none where nothing is trained), batch sizes, evaluation, ways to stop."""

    micro_batch_size: int = _batch(1, "samples per forward pass on each data-parallel rank")
    global_batch_size: int | None = _batch(
        None, "samples per step over all ranks (default: --micro-batch-size x data-parallel size)"
    )
    train_iters: int | None = _length("length of the run in iterations")
    train_samples: int | None = _length("length of the run in samples")
    train_epochs: float | None = _length("length of the run in epochs, or a part of one", most=10**6)
    eval_interval: int | None = _validation(1000, "iterations between validations", check="positive")
    eval_iters: int | None = _validation(
        None, "global batches per validation (default: all, once; with --mock-data 10)", check="not_negative"
    )
    early_stopping_patience: int | None = _validation(
        None, "end the run, saved, after this many validations without a lower loss", check="positive"
    )
    seed: int = 1234  # DataConfig explains it: one flag sets both
    check_for_nan_in_loss_and_grad: bool = option(True, "stop at a loss or gradient that is not finite, and say where")
    exit_interval: int | None = option(None, "save and exit at a multiple of this many iterations", check="positive")
    exit_duration_in_mins: float | None = option(None, "save and exit after this many minutes", check="positive")
    exit_signal_handler: bool = option(True, "save and exit on SIGINT (Ctrl-C), SIGTERM and SIGUSR1")
    manual_gc: bool = option(False, "run Python's garbage collector only when told to, on all ranks at the same step")
    manual_gc_interval: int = option(
        0, "iterations between collections; 0: only around validation", check="not_negative", needs="manual_gc"
    )
    manual_gc_eval: bool = option(True, "with --manual-gc, collect garbage before and after validation")
    empty_unused_memory_level: int = option(
        0, "give unused GPU memory back at each step: 1 before the update, 2 also after it", check="not_negative"
    )
    overlap_grad_reduce: bool = option(
        False, "reduce gradients over the data-parallel ranks while backward is running", group=DISTRIBUTED
    )
    grad_reduce_in_bf16: bool = option(
        False, "with --bf16, accumulate and reduce gradients in bfloat16 instead of float32", group=DISTRIBUTED
    )

    def check(self, require: Requirements) -> None:
        given = [name for name in LENGTHS if getattr(self, name) is not None]
        require(len(given) <= 1, f"{ONE_LENGTH} (given: {', '.join(map(flag, given))}).")


def missing_for_training(values: Mapping[str, Any]) -> list[str]:
    """Messages for what training requires, and inference and conversion do not, given a run's fields by name."""
    problems = []
    if not any(map(values.get, ("data_path", "train_data_path", "mock_data"))):
        problems.append("no training data: give --train-data-path FILE.jsonl, or --data-path PREFIX of indexed data.")
    if all(values.get(name) is None for name in LENGTHS):
        problems.append(f"{ONE_LENGTH} (none given).")
    return problems


@dataclass(frozen=True)
class OptimizerSettings(Checked):
    """AdamW or SGD, its learning-rate schedule and its sharding. Units: rates per step, decay per unit of rate."""

    optimizer: Literal["adam", "sgd"] = option("adam", "adam means AdamW")
    lr: float = _rate(1e-4, "peak learning rate, reached after the warmup", check="positive")
    min_lr: float = _rate(0.0, "learning rate at the end of the decay", check="not_negative")
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = _rate(
        "linear", "shape of the learning-rate decay"
    )
    lr_decay_iters: int | None = _rate(None, "iterations of the decay (default: --train-iters)", check="positive")
    lr_decay_samples: int | None = _rate(None, "samples of the decay (default: --train-samples)", check="positive")
    lr_warmup_iters: int = _rate(0, "iterations of linear warmup", check="not_negative")
    lr_warmup_samples: int = _rate(0, "samples of linear warmup", check="not_negative")
    lr_warmup_fraction: float | None = _rate(None, "warmup as a fraction of the decay", check="fraction")
    lr_warmup_init: float = _rate(0.0, "learning rate at the start of the warmup", check="not_negative")
    lr_wsd_decay_iters: int | None = _rate(None, "iterations of the last phase of WSD", check="positive")
    lr_wsd_decay_samples: int | None = _rate(None, "samples of the last phase of WSD", check="positive")
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = _rate(
        "exponential", "shape of the decay in the last phase of WSD"
    )
    weight_decay: float = option(0.01, "decoupled weight decay (AdamW)", check="not_negative")
    decoupled_lr: float | None = _rate(
        None, "learning rate of the embedding and the output layer, in full fine-tuning", check="positive"
    )
    decoupled_min_lr: float | None = _rate(
        None, "--min-lr of the embedding and the output layer", check="not_negative", needs="decoupled_lr"
    )
    start_weight_decay: float | None = option(None, "weight decay at the start, if it increases", check="not_negative")
    end_weight_decay: float | None = option(None, "weight decay at the end, if it increases")
    weight_decay_incr_style: Literal["constant", "linear", "cosine"] = option("constant", "how weight decay increases")
    adam_beta1: float = option(0.9, "decay rate of Adam's first moment", check="fraction")
    adam_beta2: float = option(0.999, "decay rate of Adam's second moment", check="fraction")
    adam_eps: float = option(1e-8, "term added to Adam's denominator", check="positive")
    sgd_momentum: float = option(0.9, "momentum of SGD", check="fraction")
    clip_grad: float = option(1.0, "largest norm of the global gradient; 0: no clipping", check="not_negative")
    use_distributed_optimizer: bool = option(
        False, "shard the optimizer's state over the data-parallel ranks", group=DISTRIBUTED
    )
    overlap_param_gather: bool = option(
        False, "gather sharded parameters during forward", needs="use_distributed_optimizer", group=DISTRIBUTED
    )
    override_opt_param_scheduler: bool = _rate(
        False,
        "take the schedule from these flags, not from the loaded checkpoint",
        flags=("--override-opt-param-scheduler", "--override-opt_param-scheduler"),
    )
    use_checkpoint_opt_param_scheduler: bool = _rate(
        False,
        "take the schedule from the loaded checkpoint, not from these flags",
        flags=("--use-checkpoint-opt-param-scheduler", "--use-checkpoint-opt_param-scheduler"),
    )

    def check(self, require: Requirements) -> None:
        rising = [(low, "lr") for low in ("min_lr", "lr_warmup_init")]
        rising += [(low, "decoupled_lr") for low in ("decoupled_min_lr", "lr_warmup_init")]
        for low, high in rising:
            least, most = getattr(self, low), getattr(self, high)
            is_rate = most is not None and most > 0  # else its own check has failed
            require(not is_rate or least is None or least <= most, f"{flag(low)} {least} is above {flag(high)} {most}.")
        require(
            self.lr_warmup_fraction is None or not (self.lr_warmup_iters or self.lr_warmup_samples),
            "--lr-warmup-fraction, --lr-warmup-iters and --lr-warmup-samples are mutually exclusive.",
        )
        last_phases = [length for length in (self.lr_wsd_decay_iters, self.lr_wsd_decay_samples) if length is not None]
        require(
            len(last_phases) == (self.lr_decay_style == "WSD"),
            f"--lr-decay-style WSD, and no other style, needs the length of its last phase: --lr-wsd-decay-iters (with "
            f"--train-samples: --lr-wsd-decay-samples). It is {self.lr_decay_style}.",
        )
        style, start, end = self.weight_decay_incr_style, self.start_weight_decay, self.end_weight_decay
        require(
            start is end is None if style == "constant" else None not in (start, end) and start <= end,  # type: ignore[operator]
            f"--weight-decay-incr-style linear and cosine need --start-weight-decay at most --end-weight-decay, and "
            f"constant has neither (given: {style}, {start} and {end}).",
        )
        require(
            not self.use_distributed_optimizer or self.optimizer == "adam",
            f"--use-distributed-optimizer shards Adam only: leave it out with --optimizer {self.optimizer}.",
        )
        require(
            not (self.override_opt_param_scheduler and self.use_checkpoint_opt_param_scheduler),
            "--override-opt-param-scheduler and --use-checkpoint-opt-param-scheduler are mutually exclusive.",
        )


_of_sync = partial(option, group="serving engine")


@dataclass(frozen=True)
class CheckpointConfig(Checked):
    """Where state is written and read. Intervals are iterations."""

    save: str | None = _path("folder for checkpoints and metrics")
    load: str | None = _path("folder of checkpoints to resume (the newest complete one), or one of its iter_ folders")
    exit_on_missing_checkpoint: bool = option(
        False, "end with an error if --load holds no checkpoint, even if it is the folder of --save", needs="load"
    )
    save_interval: int | None = option(None, "iterations between checkpoints", check="positive", needs="save")
    async_save: bool = option(
        False, "keep training while a checkpoint is written (needs memory for a copy of what is saved)", needs="save"
    )
    keep_last_checkpoints: int | None = option(
        None, "newest checkpoints to keep; older ones are removed (default: all)", check="positive", needs="save"
    )
    keep_best: bool = option(
        False, "save at each lowest validation loss, as `best`, which --keep-last-checkpoints keeps", needs="save"
    )
    resume: Literal["never", "auto"] = option(
        "never", "auto: resume from --save if it holds a checkpoint, else start (from --load, if given)", needs="save"
    )
    finetune: bool = option(False, "load parameters only and start at iteration 0")
    no_load_optim: bool = option(False, "do not load the optimizer state")
    no_load_rng: bool = option(False, "do not load the state of the random generators")
    allow_other_base_precision: bool = option(False, "load adapters that were trained with another --base-precision")
    no_save_optim: bool = option(False, "do not save the optimizer state")
    no_save_rng: bool = option(False, "do not save the state of the random generators")
    sync_server: str | None = _of_sync(
        None,
        "a running vllm serve, as http://localhost:8000, which gets the adapters while they are trained",
        check="address",
        metavar="URL",
    )
    sync_interval: int = _of_sync(
        100,
        "steps between two versions that the server gets; the last step is one too, unless the run was asked to stop",
        check="positive",
        needs="sync_server",
    )
    sync_name: str | None = _of_sync(
        None,
        "name of a version for clients, before -ITERATION (default: the --save folder's name)",
        check="plain_name",
        needs="sync_server",
    )
    sync_folder: str | None = _of_sync(
        None,
        "folder of the exported versions, which the server has to see too (default: served in the folder of --save)",
        needs="sync_server",
        metavar="FOLDER",
    )
    sync_skip: tuple[Literal["binding", "numbers"], ...] = _of_sync(
        (), "do not check what the engine binds, or do not compare log-probabilities", needs="sync_server"
    )
    sync_tolerance: float = _of_sync(
        1e-3,
        "refuse a version whose log-probability of a token differs from our own by more, in nats, on average; a "
        "server in bfloat16 wants 0.05",
        check="not_negative",
        needs="sync_server",
    )
    sync_engine_python: str = _of_sync(
        ".venv-vllm/bin/python", "the Python of the engine's environment", needs="sync_server", metavar="FILE"
    )

    def check(self, require: Requirements) -> None:
        is_placed = self.sync_server is None or self.save is not None or self.sync_folder is not None
        require(is_placed, "--sync-server needs --save or --sync-folder, where the versions lie.")


@dataclass(frozen=True)
class LoggingConfig(Checked):
    """What a run prints and records. Intervals are iterations."""

    log_interval: int = option(10, "iterations between log lines", check="positive")
    tensorboard_dir: str | None = _path("folder for TensorBoard's event files")
    wandb_project: str | None = option(None, "Weights & Biases project")
    wandb_exp_name: str | None = option(None, "name of the run there (default: that of the --save folder)")
    wandb_save_dir: str | None = _path("folder for Weights & Biases' own files")
    log_throughput: bool = option(
        False,
        "also print and record tokens per second and TFLOP/s of a GPU: per token 4 operations for each weight of a "
        "frozen model's products, 6 in full fine-tuning, and those of attention; recompute does not count",
    )
    peak_tflops: float | None = option(
        None, "for MFU: a GPU's peak in this precision (H100: 989 in bf16)", check="positive", needs="log_throughput"
    )
    log_grad_norm_by_layer: bool = option(
        False, "also record the gradient norm of each transformer layer, before clipping, at log intervals"
    )
    log_validation_items: bool = option(
        False, "also record the loss of each validation and test sample, in validation_items.jsonl and test_items.jsonl"
    )
    log_energy: bool = option(False, "also record joules per step over all GPUs; needs the package nvidia-ml-py")
    timing_log_level: Literal["0", "1", "2"] = option(
        "0",
        "also print and record seconds of the phases of a step: 1 for those that it has once, 2 also for those of each "
        "microbatch; the host then waits for the device at each",
    )
    log_straggler: bool = option(
        False, "also name the rank that took longest for its own work in a step, with its seconds and the median's"
    )
    record_memory_history: bool = option(
        False, "record CUDA allocations on --profile-ranks, and write them at the end, also after running out of memory"
    )
    memory_snapshot_path: str = option(
        "snapshot.pickle",
        "file of --record-memory-history, for docs.pytorch.org/memory_viz; the rank is added to its name",
        check="not_empty",
        needs="record_memory_history",
        metavar="PATH",
    )
    profile: bool = option(
        False, "profile the steps after --profile-step-start: mark them for Nsight Systems (nsys), which needs a GPU"
    )
    profile_step_start: int = option(10, "steps before the first one profiled", check="not_negative", needs="profile")
    profile_step_end: int = option(12, "the last step that is profiled", check="positive", needs="profile")
    profile_ranks: tuple[int, ...] = option((0,), "ranks that are profiled", needs="profile|record_memory_history")
    use_pytorch_profiler: bool = option(
        False, "write a trace by torch's profiler to --tensorboard-dir instead", needs="profile tensorboard_dir"
    )
