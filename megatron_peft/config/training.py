"""Configuration of a run's length and batches, optimizer, checkpoints and logging."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from megatron_peft.config.errors import Checked, Requirements, flag, option

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
        for low, high in (("min_lr", "lr"), ("lr_warmup_init", "lr"), ("decoupled_min_lr", "decoupled_lr")):
            least, most = getattr(self, low), getattr(self, high)
            require(None in (least, most) or least <= most, f"{flag(low)} {least} is above {flag(high)} {most}.")
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
    no_save_optim: bool = option(False, "do not save the optimizer state")
    no_save_rng: bool = option(False, "do not save the state of the random generators")


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
