"""The length of a run, and its batches."""

from dataclasses import dataclass

from megatron_peft.config.errors import Requirements, flag

# Far above what anybody has trained; beyond them an index of the samples would not fit into memory, or into 64 bits.
MOST_SAMPLES_A_STEP = 2**24
MOST_STEPS = 10**12
MOST_EPOCHS = 10**6


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
                len(lengths) == 1,
                "the length of the run: give exactly one of --train-iters, --train-samples, --train-epochs"
                + (f" (given: {', '.join(map(flag, lengths))})." if lengths else " (none given)."),
            )
