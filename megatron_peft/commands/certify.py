"""Prove, on this machine, that a run's layout trains the model that one process would.

megatron-peft certify --world-size 128 --output certificate.json FLAGS OF THE RUN

All flags of `megatron-peft train`; --pretrained-checkpoint may be a folder with a config.json alone, or that file. A
small model of the run's own shape is trained for real in its layout (at most 4 tensor-parallel ranks x 4 stages x 2
replicas, which share this machine's cores) and in one process; losses, gradients, trained tensors, checkpoints and
conversions are compared. If the run has more tensor-parallel ranks, a small model is trained on as many too. Takes
minutes. Exit code 1: something differs, and is named; 3: undecided, an error kept something from being compared. See
docs/planning.md.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_peft.cli.launch import tell_loading
from megatron_peft.cli.own_flags import ArgumentParser, add_flags, add_run_flags, read_own_flags
from megatron_peft.cli.parser import exit_with_error, read_config, typed_values, unknown_flags
from megatron_peft.commands.preview import ranks_of_a_replica
from megatron_peft.config import ConfigurationError, Requirements, option
from megatron_peft.models.families import read_shape, read_shape_of_file
from megatron_peft.models.shape import ModelShape

PROGRAM = "megatron-peft certify"
EXIT_CODES = {"CERTIFIED": 0, "REFUSED": 1, "UNDECIDED": 3}


@dataclass(frozen=True)
class CertifySettings:
    """The run's processes, and where the certificate goes."""

    world_size: int | None = option(
        None, "processes of the run (default: those of torchrun, else one replica)", check="positive"
    )
    output: Path | None = option(None, "file for the certificate, as JSON; it must not exist", metavar="FILE")

    def __post_init__(self) -> None:
        with Requirements(self) as unmet:
            unmet.fields()
            path = self.output
            unmet(path is None or not path.exists(), f"--output {path} exists already: give a file that does not.")
            unmet(
                path is None or path.parent.is_dir(),
                f"--output {path}: there is no folder {path and path.parent}; make it first.",
            )


def add_arguments(parser: ArgumentParser) -> None:
    """Its own flags, and those of `megatron-peft train`."""
    add_flags(parser, CertifySettings)
    add_run_flags(parser)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0: certified, 1: refused, 2: whatever the user can put right, 3: undecided."""
    read_settings, flags = read_own_flags(CertifySettings, argv, __doc__)
    try:
        if unknown := unknown_flags(flags):
            raise ConfigurationError(*unknown)
        settings: CertifySettings = read_settings()
        typed = typed_values(flags)
        size = settings.world_size or os.environ.get("WORLD_SIZE") or ranks_of_a_replica(typed)
        # Neither data nor a length is needed, and nothing is saved.
        environ, saved = {"WORLD_SIZE": str(size)}, {"save": "never written"}
        config = read_config(flags, environ, shape_of_model, saved=lambda values: saved)
    except ConfigurationError as error:
        exit_with_error(error, program=PROGRAM)
    if os.environ.get("RANK", "0") != "0":  # under torchrun the first rank does all of it
        return 0

    # Imported after the arguments were read: --help and a wrong flag answer at once. GPUs are hidden before torch asks.
    tell_loading()
    import megatron_peft.runtime.no_gpu  # noqa: F401
    from megatron_peft.certify.certify import certify, print_certificate, write_certificate

    try:
        certificate = certify(config, shape_of_model(str(config.model.pretrained_checkpoint)))
        print_certificate(certificate)
        if settings.output is not None:
            write_certificate(certificate, settings.output)
    except ConfigurationError as error:
        exit_with_error(error, program=PROGRAM)
    return EXIT_CODES[certificate.verdict]


def shape_of_model(model: str) -> ModelShape:
    """Of a model's folder, or of its config.json under any name."""
    path = Path(model)
    return read_shape_of_file(path) if path.is_file() else read_shape(path)


if __name__ == "__main__":
    sys.exit(main())
