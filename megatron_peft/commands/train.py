"""Fine-tune a pretrained model, in full or with adapters, with Megatron's flags."""

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_peft.cli.launch import running_processes, start_processes
from megatron_peft.cli.own_flags import ArgumentParser, add_run_flags
from megatron_peft.cli.parser import parse_arguments, typed_launch
from megatron_peft.cli.run_file import run_file
from megatron_peft.config import RunConfig
from megatron_peft.models.families import read_shape
from megatron_peft.models.shape import ModelShape
from megatron_peft.runtime.exit_signals import EndedBySignal, ends_before_training

PROGRAM, MODULE = "megatron-peft train", "megatron_peft.commands.train"


def add_arguments(parser: ArgumentParser) -> None:
    """Every flag of a run."""
    add_run_flags(parser)


def main(argv: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    """Exit code 2 for whatever the user can put right, 130 for Ctrl-C, 1 for anything else."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        return _train(argv, program)
    except KeyboardInterrupt as interrupt:  # while nothing has begun
        by_signal = interrupt if isinstance(interrupt, EndedBySignal) else None
        if os.environ.get("RANK", "0") == "0":
            print(f"{program}: {by_signal or 'interrupted'}", file=sys.stderr, flush=True)
        os._exit(by_signal.exit_code if by_signal else 128 + signal.SIGINT)


def _train(argv: Sequence[str], program: str) -> int:
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a lost rank is one line of ours, not ninety of C++ frames
    launch = typed_launch(argv)
    ended = start_processes(
        MODULE, argv, launch, program, lambda environ: parse_arguments(argv, environ, shape_of, program)
    )
    if ended is not None:
        return ended
    config = parse_arguments(argv, read_shape=shape_of, program=program)
    with ends_before_training(config.training.exit_signal_handler):
        _run(config, run_file(config, running_processes(os.environ) | launch), program)
    return 0


def _run(config: RunConfig, text: str, program: str) -> None:
    # Imported after the arguments were read: --help and a wrong flag answer at once.
    from megatron_peft.runtime.failure import run_together
    from megatron_peft.runtime.launch import world
    from megatron_peft.runtime.stacks import record_collectives
    from megatron_peft.training.run import finetune

    record_collectives(config.checkpoint.save)
    with world(config.parallel.distributed_backend, config.parallel.distributed_timeout_minutes):
        run_together(lambda: finetune(config, text), program=program)


def shape_of(folder: str) -> ModelShape:
    """Of --pretrained-checkpoint. Without a config.json it may be a checkpoint of Megatron's, which torch must read."""
    if not Path(folder).is_dir() or Path(folder, "config.json").is_file():
        return read_shape(folder)
    from megatron_peft.conversion.pretrained import read_model_shape

    return read_model_shape(folder)


if __name__ == "__main__":
    sys.exit(main())
