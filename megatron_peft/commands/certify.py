"""Prove, on this machine, that a run's layout trains the model that one process would.

megatron-peft certify --world-size 128 --output certificate.json FLAGS OF THE RUN

All flags of `megatron-peft train`; --pretrained-checkpoint may be a folder with a config.json alone, or that file. A
small model of the run's own shape is trained for real in its layout (at most 4 tensor-parallel ranks x 4 stages x 2
replicas, which share this machine's cores) and in one process; losses, gradients, trained tensors, checkpoints and
conversions are compared. If the run has more tensor-parallel ranks, a small model is trained on as many too. Takes
minutes. Exit code 1: something differs, and is named; 3: undecided, an error kept something from being compared. See
docs/certify.md.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from megatron_peft.cli.command import Command
from megatron_peft.cli.launch import tell_loading
from megatron_peft.cli.parser import RunFlags, is_first_rank
from megatron_peft.config import Checked, Requirements, option
from megatron_peft.config.evaluation import EngineName, engine_python
from megatron_peft.models.families import read_shape, read_shape_of_file
from megatron_peft.models.shape import ModelShape

EXIT_CODES = {"CERTIFIED": 0, "REFUSED": 1, "UNDECIDED": 3}


@dataclass(frozen=True)
class CertifySettings(Checked):
    """The run's processes, and where the certificate goes."""

    world_size: int | None = option(
        None,
        "processes of the run (default: those of torchrun or of --nproc-per-node, else one replica)",
        check="positive",
    )
    output: Path | None = option(
        None, "file for the certificate, as JSON; it must not exist", check="in_a_folder", metavar="FILE"
    )

    engine: EngineName | None = option(
        None, "serve what the small run is converted to with this engine too, merged and as a LoRA"
    )
    engine_python: Path = engine_python()

    def check(self, require: Requirements) -> None:
        path = self.output
        require(path is None or not path.exists(), f"--output {path} exists already: give a file that does not.")


def run(settings: CertifySettings, run_flags: RunFlags) -> int:
    """Exit code 0: certified, 1: refused, 3: undecided."""
    size = settings.world_size or os.environ.get("WORLD_SIZE") or run_flags.num_processes
    config = run_flags.config({"WORLD_SIZE": str(size)}, shape_of_model, saved=dict)
    if not is_first_rank():  # under torchrun the first rank does all of it
        return 0

    # Imported after the arguments were read: --help and a wrong flag answer at once. GPUs are hidden before torch asks.
    tell_loading()
    import megatron_peft.runtime.no_gpu  # noqa: F401
    from megatron_peft.certify.certify import certify, print_certificate, write_certificate

    engine = settings.engine_python if settings.engine else None
    certificate = certify(config, shape_of_model(str(config.model.pretrained_checkpoint)), engine)
    print_certificate(certificate)
    if settings.output is not None:
        write_certificate(certificate, settings.output)
    return EXIT_CODES[certificate.verdict]


def shape_of_model(model: str) -> ModelShape:
    """The shape of a model: of its folder, or of its config.json under any name."""
    path = Path(model)
    return read_shape_of_file(path) if path.is_file() else read_shape(path)


main = Command("certify", __doc__, CertifySettings, run, takes_run_flags=True)
