"""Configuration of a run's length and batches, optimizer, checkpoints and logging."""

from dataclasses import dataclass
from functools import partial
from typing import Literal

from megatron_peft.config.errors import Checked, Requirements, flag, option

# Far above what anybody has trained; beyond them an index of the samples would not fit into memory, or into 64 bits.
MOST_SAMPLES_A_STEP = 2**24
MOST_STEPS = 10**12
MOST_EPOCHS = 10**6
LEARNING_RATE = "learning rate"  # titles of --help
VALIDATION = "validation"
DISTRIBUTED = "distributed"
LENGTH_OF_THE_RUN = "give exactly one of --train-iters, --train-samples and --train-epochs as the length of the run"


@dataclass(frozen=True)
class TrainingConfig(Checked):
    """Length of the run (one of three, or none where nothing is trained), batch sizes, evaluation, ways to stop."""

    micro_batch_size: int = option(1, "samples per forward pass on each data-parallel rank", check="positive")
    global_batch_size: int | None = option(
        None, "samples per step over all ranks (default: --micro-batch-size x data-parallel size)", check="positive"
    )
    train_iters: int | None = option(None, "length of the run in iterations", check="positive")
    train_samples: int | None = option(None, "length of the run in samples", check="positive")
    train_epochs: float | None = option(
        None, "length of the run in passes over the training data; may be a fraction", check="positive"
    )
    eval_interval: int | None = option(1000, "iterations between validations", check="positive", group=VALIDATION)
    eval_iters: int | None = option(
        None,
        "global batches per validation (default: the whole validation set, once; with --mock-data 10)",
        check="not_negative",
        group=VALIDATION,
    )
    early_stopping_patience: int | None = option(
        None, "end the run, saved, after this many validations without a lower loss", check="positive", group=VALIDATION
    )
    seed: int = 1234  # DataConfig explains it: one flag sets both
    check_for_nan_in_loss_and_grad: bool = option(
        True, "stop at a loss or gradient that is not finite, naming iteration and rank"
    )
    exit_interval: int | None = option(None, "save and exit at a multiple of this many iterations", check="positive")
    exit_duration_in_mins: float | None = option(None, "save and exit after this many minutes", check="positive")
    exit_signal_handler: bool = option(True, "save and exit on SIGINT (Ctrl-C), SIGTERM and SIGUSR1")
    manual_gc: bool = option(False, "run Python's garbage collector only when told to, on all ranks at the same step")
    manual_gc_interval: int = option(
        0,
        "iterations between garbage collections with --manual-gc; 0: only before and after validation",
        check="not_negative",
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
        lengths = [n for n in ("train_iters", "train_samples", "train_epochs") if getattr(self, n) is not None]
        require.needs("manual_gc_interval", "manual_gc")
        for name in ("micro_batch_size", "global_batch_size"):
            size = getattr(self, name)
            require(
                size is None or size <= MOST_SAMPLES_A_STEP,
                f"{flag(name)} is {size}; a step takes at most {MOST_SAMPLES_A_STEP:,} samples.",
            )
        for name in ("train_iters", "train_samples", "eval_iters"):
            length = getattr(self, name)
            require(
                length is None or length < MOST_STEPS, f"{flag(name)} is {length}; it must be below {MOST_STEPS:,}."
            )
        require(
            self.train_epochs is None or self.train_epochs < MOST_EPOCHS,
            f"--train-epochs is {self.train_epochs}; it must be below {MOST_EPOCHS:,}.",
        )
        require(len(lengths) <= 1, f"{LENGTH_OF_THE_RUN} (given: {', '.join(map(flag, lengths))}).")


_rate = partial(option, group=LEARNING_RATE)


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
    lr_warmup_fraction: float | None = _rate(None, "warmup as a fraction of the iterations of the decay")
    lr_warmup_init: float = _rate(0.0, "learning rate at the start of the warmup", check="not_negative")
    lr_wsd_decay_iters: int | None = _rate(None, "iterations of the last phase of WSD", check="positive")
    lr_wsd_decay_samples: int | None = _rate(None, "samples of the last phase of WSD", check="positive")
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = _rate(
        "exponential", "shape of the decay in the last phase of WSD"
    )
    weight_decay: float = option(0.01, "decoupled weight decay (AdamW)", check="not_negative")
    decoupled_lr: float | None = _rate(
        None,
        "learning rate of the embedding and the output layer, which only full fine-tuning trains",
        check="positive",
    )
    decoupled_min_lr: float | None = _rate(
        None, "--min-lr of the embedding and the output layer; needs --decoupled-lr", check="not_negative"
    )
    start_weight_decay: float | None = option(
        None, "weight decay at the start, if it increases over the run", check="not_negative"
    )
    end_weight_decay: float | None = option(None, "weight decay at the end, if it increases over the run")
    weight_decay_incr_style: Literal["constant", "linear", "cosine"] = option(
        "constant", "how the weight decay increases"
    )
    adam_beta1: float = option(0.9, "decay rate of Adam's first moment", check="fraction")
    adam_beta2: float = option(0.999, "decay rate of Adam's second moment", check="fraction")
    adam_eps: float = option(1e-8, "term added to Adam's denominator", check="positive")
    sgd_momentum: float = option(0.9, "momentum of SGD", check="fraction")
    clip_grad: float = option(1.0, "largest norm of the global gradient; 0: no clipping", check="not_negative")
    use_distributed_optimizer: bool = option(
        False, "shard the optimizer's state over the data-parallel ranks", group=DISTRIBUTED
    )
    overlap_param_gather: bool = option(
        False, "gather the distributed optimizer's parameters while forward is running", group=DISTRIBUTED
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
        wsd_flags = [n for n in ("lr_wsd_decay_iters", "lr_wsd_decay_samples") if getattr(self, n) is not None]
        start, end = self.start_weight_decay, self.end_weight_decay
        require(self.min_lr <= self.lr, f"--min-lr {self.min_lr} is above --lr {self.lr}.")
        require(self.lr_warmup_init <= self.lr, f"--lr-warmup-init {self.lr_warmup_init} is above --lr {self.lr}.")
        require.needs("decoupled_min_lr", "decoupled_lr")
        require(
            None in (self.decoupled_lr, self.decoupled_min_lr) or self.decoupled_min_lr <= self.decoupled_lr,  # type: ignore[operator]
            f"--decoupled-min-lr {self.decoupled_min_lr} is above --decoupled-lr {self.decoupled_lr}.",
        )
        require(
            self.lr_warmup_fraction is None or not (self.lr_warmup_iters or self.lr_warmup_samples),
            "--lr-warmup-fraction, --lr-warmup-iters and --lr-warmup-samples are mutually exclusive.",
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
        require(
            not (self.override_opt_param_scheduler and self.use_checkpoint_opt_param_scheduler),
            "--override-opt-param-scheduler and --use-checkpoint-opt-param-scheduler are mutually exclusive.",
        )


@dataclass(frozen=True)
class CheckpointConfig(Checked):
    """Where state is written and read. Intervals are iterations."""

    save: str | None = option(None, "folder for checkpoints and metrics", check="not_empty", metavar="PATH")
    load: str | None = option(
        None,
        "folder of checkpoints to resume from (the newest complete one), or one of its iter_ folders",
        check="not_empty",
        metavar="PATH",
    )
    exit_on_missing_checkpoint: bool = option(
        False, "end with an error if --load holds no checkpoint, even if it is the folder of --save"
    )
    save_interval: int | None = option(None, "iterations between checkpoints", check="positive")
    async_save: bool = option(
        False, "keep training while a checkpoint is written (needs memory for a copy of what is saved)"
    )
    keep_last_checkpoints: int | None = option(
        None, "number of newest checkpoints to keep; older ones are removed (default: all are kept)", check="positive"
    )
    keep_best: bool = option(
        False,
        "save at each lowest validation loss; the link `best` in --save names that checkpoint, which is kept. Earlier "
        "best ones stay too, unless --keep-last-checkpoints N removes them: then N newest and the best are left",
    )
    resume: Literal["never", "auto"] = option(
        "never", "auto: resume from --save if it holds a checkpoint of this run, else start (from --load, if given)"
    )
    finetune: bool = option(False, "load parameters only and start at iteration 0")
    no_load_optim: bool = option(False, "do not load the optimizer state")
    no_load_rng: bool = option(False, "do not load the state of the random generators")
    no_save_optim: bool = option(False, "do not save the optimizer state")
    no_save_rng: bool = option(False, "do not save the state of the random generators")

    def check(self, require: Requirements) -> None:
        require.needs("exit_on_missing_checkpoint", "load")
        require.needs("save_interval", "save")
        require.needs("async_save", "save")
        require.needs("keep_last_checkpoints", "save")
        require.needs("keep_best", "save")
        require(
            self.resume == "never" or self.save is not None,
            "--resume auto resumes from the folder of --save: give --save.",
        )


@dataclass(frozen=True)
class LoggingConfig(Checked):
    """What a run prints and records. Intervals are iterations."""

    log_interval: int = option(10, "iterations between log lines", check="positive")
    tensorboard_dir: str | None = option(
        None, "folder for TensorBoard's event files", check="not_empty", metavar="PATH"
    )
    wandb_project: str | None = option(None, "Weights & Biases project")
    wandb_exp_name: str | None = option(
        None, "name of the run at Weights & Biases (default: that of the --save folder)"
    )
    wandb_save_dir: str | None = option(
        None, "folder for Weights & Biases' own files", check="not_empty", metavar="PATH"
    )
    log_throughput: bool = option(
        False,
        "also print and record tokens per second and TFLOP/s of a GPU: per token 4 operations for each weight of a "
        "frozen model's products, 6 in full fine-tuning, and those of attention; recompute does not count",
    )
    peak_tflops: float | None = option(
        None,
        "TFLOP/s that a GPU has at most in the run's precision (H100: 989 in bfloat16), of which MFU is a part; needs "
        "--log-throughput",
        check="positive",
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
        False,
        "also name the rank that took longest for its own work in a step (batches and forward passes), and record its "
        "seconds and the median's",
    )
    record_memory_history: bool = option(
        False, "record CUDA allocations on --profile-ranks, and write them at the end, also after running out of memory"
    )
    memory_snapshot_path: str = option(
        "snapshot.pickle",
        "file of --record-memory-history, for docs.pytorch.org/memory_viz; the rank is added to its name",
        check="not_empty",
        metavar="PATH",
    )
    profile: bool = option(
        False, "profile the steps after --profile-step-start: mark them for Nsight Systems (nsys), which needs a GPU"
    )
    profile_step_start: int = option(10, "number of steps before the first one that is profiled", check="not_negative")
    profile_step_end: int = option(12, "the last step that is profiled", check="positive")
    profile_ranks: tuple[int, ...] = option((0,), "ranks that are profiled")
    use_pytorch_profiler: bool = option(
        False, "with --profile, write a trace by torch's profiler to --tensorboard-dir instead"
    )

    def check(self, require: Requirements) -> None:
        require.needs("use_pytorch_profiler", "profile")
        require.needs("use_pytorch_profiler", "tensorboard_dir")
        require.needs("peak_tflops", "log_throughput")
        require.needs("memory_snapshot_path", "record_memory_history")
        require.needs("profile_step_start", "profile")
        require.needs("profile_step_end", "profile")
        require.needs("profile_ranks", "profile", "record_memory_history")
        require(
            not self.profile or self.profile_step_start < self.profile_step_end,
            f"--profile-step-end {self.profile_step_end} is not above --profile-step-start "
            f"{self.profile_step_start}: no step would be profiled.",
        )
