"""How it is trained: the sections of a run's length and batches, its optimizer, checkpoints and log."""

from dataclasses import dataclass
from typing import Literal

from megatron_peft.config.errors import Requirements, flag

# Far above what anybody has trained; beyond them an index of the samples would not fit into memory, or into 64 bits.
MOST_SAMPLES_A_STEP = 2**24
MOST_STEPS = 10**12
MOST_EPOCHS = 10**6
LENGTH_OF_THE_RUN = "the length of the run: give exactly one of --train-iters, --train-samples, --train-epochs"


@dataclass(frozen=True)
class TrainingConfig:
    """Length of the run (one of three, or none where nothing is trained), batch sizes, evaluation, ways to stop."""

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
    exit_signal_handler: bool = True  # SIGINT, SIGTERM and SIGUSR1 save and exit
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
            require(
                len(lengths) <= 1,
                f"{LENGTH_OF_THE_RUN} (given: {', '.join(map(flag, lengths))}).",
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
            require.not_empty("save", "load")
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
            require.not_empty("tensorboard_dir", "wandb_save_dir")
            require.needs("wandb_project", "wandb_exp_name")
