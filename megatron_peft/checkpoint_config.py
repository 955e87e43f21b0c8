"""The checkpoints of a run."""

from dataclasses import dataclass

from megatron_peft.config.errors import Requirements


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
            for name in ("save", "load"):
                require(
                    getattr(self, name) != "",
                    f"--{name} has an empty value (an unset variable of the shell?): give a folder, or leave it out.",
                )
            require.positive("save_interval", "keep_last_checkpoints")
            require.needs("save_interval", "save")
            require.needs("async_save", "save")
            require.needs("keep_last_checkpoints", "save")
