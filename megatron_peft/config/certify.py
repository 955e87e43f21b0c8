"""What `megatron-peft certify` takes besides the flags of a run."""

from dataclasses import dataclass
from pathlib import Path

from megatron_peft.config.errors import Requirements, option


@dataclass(frozen=True)
class CertifySettings:
    """The run's processes, and where the certificate goes."""

    world_size: int | None = option(
        None, "processes of the run (default: those of torchrun, else one replica)", check="positive"
    )
    output: str | None = option(
        None, "file for the certificate, as JSON; it must not exist", check="not_empty", metavar="FILE"
    )

    def __post_init__(self) -> None:
        with Requirements(self) as require:
            require.fields()
            if not self.output:
                return
            path = Path(self.output)
            require(not path.exists(), f"--output {path} exists already: give a file that does not.")
            require(
                path.parent.is_dir(),
                f"--output {path}: there is no folder {path.parent}: make it, or give another file.",
            )
