"""Fine-tune a pretrained model, in full or with adapters, with Megatron's flags."""

import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from megatron_peft.cli.command import ArgumentParser, add_run_flags
from megatron_peft.cli.launch import planned_world_size, running_processes, start_processes, tell_loading
from megatron_peft.cli.parser import RunFlags, exit_with_error, read_flags
from megatron_peft.cli.run_file import run_file
from megatron_peft.config import ConfigurationError, RunConfig
from megatron_peft.models.families import read_shape
from megatron_peft.models.shape import ModelShape
from megatron_peft.runtime.exit_signals import EndedBySignal, ends_before_training

PROGRAM = "megatron-peft train"


def add_arguments(parser: ArgumentParser) -> None:
    """Every flag of a run."""
    add_run_flags(parser)


def main(argv: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    """Exit code 2 for whatever the user can put right, 130 for Ctrl-C, 1 for anything else."""
    argv = sys.argv[1:] if argv is None else list(argv)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a lost rank is one line of ours, not ninety of C++ frames
    try:
        run_flags = read_flags(argv, program=program)
        asked = run_flags.values["program"]
        if asked.get("dry_run"):
            return _dry_run(run_flags, program, asked.get("cluster"))

        def config_in(environ: Mapping[str, str]) -> RunConfig:
            return run_flags.config_or_exit(environ, shape_of, program)

        ended = start_processes("megatron_peft", ["train", *argv], run_flags.launch, program, config_in)
        if ended is not None:
            return ended
        config = config_in(os.environ)
        with ends_before_training(config.training.exit_signal_handler):
            text = run_file(config, running_processes(os.environ) | run_flags.launch)
            _run(config, text, program, not asked.get("no_plan"))
        return 0
    except ConfigurationError as error:
        exit_with_error(error, program=program)
    except KeyboardInterrupt as interrupt:  # while nothing has begun
        by_signal = interrupt if isinstance(interrupt, EndedBySignal) else None
        if os.environ.get("RANK", "0") == "0":
            print(f"{program}: {by_signal or 'interrupted'}", file=sys.stderr, flush=True)
        os._exit(by_signal.exit_code if by_signal else 128 + signal.SIGINT)


def _run(config: RunConfig, text: str, program: str, shows_plan: bool) -> None:
    # Imported after the arguments were read: --help and a wrong flag answer at once.
    tell_loading()
    from megatron_peft.runtime.failure import record_collectives, run_together
    from megatron_peft.runtime.launch import world
    from megatron_peft.training.run import finetune

    planned = _planned_peak(config) if shows_plan else None
    record_collectives(config.checkpoint.save)
    with world(config.parallel.distributed_backend, config.parallel.distributed_timeout_minutes):
        run_together(lambda: finetune(config, text, planned), program=program)


def _dry_run(run_flags: RunFlags, program: str, cluster: str | None) -> int:
    """Check in this process alone what a run would check, show its plan for --cluster, and write nothing.

    Without --cluster it is planned for this machine's GPUs; without any, there is no plan, which would take minutes and
    be of another machine. A plan that does not fit is no error: another machine than the cluster may be meant.
    """
    if os.environ.get("RANK", "0") != "0":
        return 0
    size = planned_world_size(run_flags.launch, os.environ)
    config = run_flags.config_or_exit({**os.environ, "WORLD_SIZE": str(size)}, shape_of, program)
    os.environ["WORLD_SIZE"] = "1"

    tell_loading()
    from megatron_peft.plan.cluster import cluster_of_this_machine, read_cluster
    from megatron_peft.plan.plan import make_plan, print_plan, why_not_to_start
    from megatron_peft.runtime.launch import start_world, stop
    from megatron_peft.training.run import check_run

    planned_for = read_cluster(cluster) if cluster else cluster_of_this_machine()
    start_world("gloo")
    try:
        shape = check_run(config)
    finally:
        stop()
    if planned_for is None:
        print("not planned: this machine has no GPU. --cluster 8xh100 plans the run for nodes of 8 H100, in minutes.")
        return 0
    plan = make_plan(config, shape, planned_for)
    print_plan(plan)
    if warning := why_not_to_start(plan):
        print(f"{program}: WARNING: {warning}", file=sys.stderr, flush=True)
    return 0 if plan.problem is None else 1


def _planned_peak(config: RunConfig) -> Callable[[], int | str | None] | None:
    """A function that gives the planned peak of rank 0 on a GPU: bytes, None while it is rehearsed, or an error."""
    import torch

    if not torch.cuda.is_available() or os.environ.get("RANK", "0") != "0":
        return None
    from megatron_peft.rehearsal.rehearsal import start_planned_peak

    return start_planned_peak(config, shape_of(str(config.model.pretrained_checkpoint)))


def shape_of(folder: str) -> ModelShape:
    """The shape of a model's folder. Without a config.json it may hold a Megatron checkpoint, which torch must read."""
    if not Path(folder).is_dir() or Path(folder, "config.json").is_file():
        return read_shape(folder)
    from megatron_peft.conversion.pretrained import read_model_shape

    return read_model_shape(folder)
