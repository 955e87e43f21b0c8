"""Fine-tune a pretrained model, in full or with adapters, over tensor-, pipeline- and data-parallel ranks.

megatron-peft train --pretrained-checkpoint FOLDER --train-data-path FILE.jsonl --train-iters N [--save FOLDER]

Flags are Megatron's, with Megatron's meanings; they cannot be abbreviated. --nproc-per-node N starts the processes; or
torchrun does, with pretrain_peft.py, which takes the same flags.
"""

import os
import signal
import sys
from importlib.util import find_spec
from pathlib import Path

from megatron_peft.cli.command import Command, start_ranks
from megatron_peft.cli.config_files import run_file
from megatron_peft.cli.launch import running_processes, tell_loading, with_world_size
from megatron_peft.cli.parser import RunFlags, is_first_rank
from megatron_peft.config import CheckpointConfig, ConfigurationError, RunConfig
from megatron_peft.config.model import NO_TRANSFORMER_ENGINE
from megatron_peft.models.families import read_shape
from megatron_peft.models.shape import ModelShape
from megatron_peft.runtime.exit_signals import EndedBySignal, ends_before_training
from megatron_peft.training.save_folder import require_usable


def run(run_flags: RunFlags) -> int:
    """Exit code 2 for whatever the user can put right, 130 for Ctrl-C, 1 for anything else."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a lost rank is one line of ours, not ninety of C++ frames
    options, program = run_flags.values["program"], run_flags.program
    try:
        # Checked for all processes before any is started.
        wants_engine = run_flags.values["config"].get("transformer_impl") == "transformer_engine"
        if wants_engine and not options.get("dry_run") and find_spec("transformer_engine") is None:
            run_flags.problems.append(NO_TRANSFORMER_ENGINE)
        config = run_flags.config(with_world_size(run_flags.launch, os.environ), shape_of)
        require_usable(config.checkpoint)
        if options.get("dry_run"):
            return _dry_run(config, program, options.get("cluster"))
        ended = start_ranks("train", run_flags)
        if ended is not None:
            return ended
        with ends_before_training(config.training.exit_signal_handler):
            resumed = {"load"} if _resumes_itself(config.checkpoint) else set[str]()
            text = run_file(config, running_processes(os.environ) | run_flags.launch, unset=resumed)
            _run(config, text, program, not options.get("no_plan"))
        return 0
    except KeyboardInterrupt as interrupt:  # while nothing has begun
        by_signal = interrupt if isinstance(interrupt, EndedBySignal) else None
        if is_first_rank():
            print(f"{program}: {by_signal or 'interrupted'}", file=sys.stderr, flush=True)
        os._exit(by_signal.exit_code if by_signal else 128 + signal.SIGINT)


def _resumes_itself(checkpoint: CheckpointConfig) -> bool:
    """Whether --load is in the run's own folder: a run that is repeated elsewhere does not begin there."""
    if not checkpoint.load or not checkpoint.save or checkpoint.finetune:
        return False
    return Path(checkpoint.load).resolve().is_relative_to(Path(checkpoint.save).resolve())


def _run(config: RunConfig, text: str, program: str, shows_plan: bool) -> None:
    # Imported after the arguments were read: --help and a wrong flag answer at once.
    tell_loading()
    import torch

    from megatron_peft.runtime.failure import run_together
    from megatron_peft.runtime.launch import world
    from megatron_peft.training.run import finetune

    planned = None
    if shows_plan and torch.cuda.is_available() and is_first_rank():
        from megatron_peft.rehearsal.rehearsal import start_planned_peak

        planned = start_planned_peak(config, shape_of(str(config.model.pretrained_checkpoint)))
    with world(config.parallel.distributed_backend, config.parallel.distributed_timeout_minutes):
        run_together(lambda: finetune(config, text, planned), program=program)


def _dry_run(config: RunConfig, program: str, cluster: str | None) -> int:
    """Check in this process alone what a run would check, show its plan for --cluster, and write nothing.

    Without --cluster it is planned for this machine's GPUs; without any, there is no plan, which would take minutes and
    be of another machine. A plan that does not fit is no error: another machine than the cluster may be meant.
    """
    if not is_first_rank():
        return 0
    os.environ["WORLD_SIZE"] = "1"
    tell_loading()
    from megatron_peft.models.gpt import require_transformer_engine
    from megatron_peft.plan.cluster import cluster_of_this_machine, read_cluster
    from megatron_peft.plan.plan import make_plan, print_plan, why_not_to_start
    from megatron_peft.runtime.launch import available_backend, start_world, stop
    from megatron_peft.training.run import check_run

    planned_for = read_cluster(cluster) if cluster else cluster_of_this_machine()
    start_world("gloo")
    try:
        shape, train_iters = check_run(config)
    finally:
        stop()
    if cluster is None:  # the run is meant for this machine
        available_backend(config.parallel.distributed_backend)
        try:
            require_transformer_engine(config.model)
        except ConfigurationError as error:
            print(f"{program}: WARNING: on this machine {error}", file=sys.stderr, flush=True)
    if planned_for is None:
        print("not planned: this machine has no GPU. --cluster 8xh100 plans the run for nodes of 8 H100, in minutes.")
        return 0
    plan = make_plan(config, shape, planned_for)
    print_plan(plan, train_iters * config.global_batch_size * config.data.seq_length)
    if warning := why_not_to_start(plan):
        print(f"{program}: WARNING: {warning}", file=sys.stderr, flush=True)
    return 0 if plan.problem is None else 1


def shape_of(folder: str) -> ModelShape:
    """The shape of a model's folder. Without a config.json it may hold a Megatron checkpoint, which torch must read."""
    if not Path(folder).is_dir() or Path(folder, "config.json").is_file():
        return read_shape(folder)
    from megatron_peft.conversion.pretrained import read_model_shape

    return read_model_shape(folder)


main = Command("train", __doc__, None, run, takes_run_flags=True)
