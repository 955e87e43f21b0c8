"""The log of a run."""

from dataclasses import dataclass

from megatron_peft.config.errors import Requirements


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
