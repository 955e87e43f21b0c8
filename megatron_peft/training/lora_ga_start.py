"""LoRA-GA's start within a run: which batches it sees, and how far it is."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from rich.console import Console
from rich.progress import Progress
from torch import nn

from megatron_peft.checkpoint.folders import newest_checkpoint
from megatron_peft.config import RunConfig, require
from megatron_peft.data.batches import GlobalBatches, Step
from megatron_peft.lora_ga.initialize import start_from_gradients
from megatron_peft.runtime.launch import checked_together, seed_generators
from megatron_peft.training.start_report import WholeStart, start_table, write_start
from megatron_peft.training.step import finish_with, run_schedule
from megatron_peft.training.summary import say

NUM_PASSES = 2


def first_steps(config: RunConfig, train: GlobalBatches) -> Sequence[Step]:
    """The first --lora-ga-batches global batches of the run, for its start; the run then begins with them again.

    None for other methods, and none on resume: the factors come from the checkpoint.

    Raises:
        ConfigurationError: on every rank: the training data has fewer samples.
    """
    if not config.peft.starts_from_gradients or checked_together(lambda: _resumes(config)):
        return ()
    size, wanted = config.global_batch_size, config.peft.lora_ga_batches
    most = train.samples_per_epoch // size
    require(
        wanted <= most,
        f"--lora-ga-batches {wanted} of --global-batch-size {size} are {wanted * size} samples, but the training data "
        f"has {train.samples_per_epoch}: use {f'at most {most}, or ' if most else ''}a smaller --global-batch-size.",
    )
    return [train.step_at(index * size) for index in range(wanted)]


def start_lora_ga(model_chunks: Sequence[nn.Module], config: RunConfig, steps: Sequence[Step]) -> None:
    """Start the low-rank factors from the gradient over `steps`, and say what it found. A collective.

    The generators of dropout are where they were before it: both passes drop the same, and so does the run's first
    step, as without a start.

    Args:
        model_chunks: bare, with adapters attached and the base loaded.
    """
    tensor_parallel: Any = parallel_state.get_tensor_model_parallel_group()
    data_parallel: Any = parallel_state.get_data_parallel_group()
    passes = iter(range(1, NUM_PASSES + 1))
    with _progress(len(steps)) as advance:

        def replay() -> None:
            number = next(passes)
            seed_generators(config.training.seed)
            finish_with(model_chunks, None)
            for microbatches in steps:
                run_schedule(model_chunks, microbatches, forward_only=False)
                advance(number)

        report = start_from_gradients(
            model_chunks,
            config.peft,
            config.training.seed,
            replay,
            _num_loss_tokens(steps, data_parallel),
            tensor_parallel,
            data_parallel,
        )
    seed_generators(config.training.seed)
    whole = WholeStart(config.peft, report.seconds, _gathered(report.energy))
    path = write_start(whole, config.checkpoint.save) if dist.get_rank() == 0 else None
    say(start_table(whole, path))


def _num_loss_tokens(steps: Sequence[Step], data_parallel: dist.ProcessGroup) -> int:
    """Completion tokens of the global batches, over all replicas."""
    own = sum(microbatch.num_loss_tokens for step in steps for microbatch in step)
    total = torch.tensor(own, device=torch.cuda.current_device())
    dist.all_reduce(total, group=data_parallel)
    return int(total)


def _gathered(energy: dict[str, float]) -> dict[str, float]:
    """By layer of the whole model."""
    gathered: list[dict[str, float]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, energy)
    return {name: value for part in gathered for name, value in part.items()}


@contextmanager
def _progress(num_batches: int) -> Iterator[Callable[[int], None]]:
    """A bar over the batches of all passes at a terminal, else a line a pass; what it yields is told the pass."""
    console = Console()
    bar = Progress(console=console, transient=True, disable=not (console.is_terminal and dist.get_rank() == 0))
    task = bar.add_task("LoRA-GA start", total=NUM_PASSES * num_batches)
    done = 0

    def advance(number: int) -> None:
        nonlocal done
        done += 1
        bar.update(task, completed=done, description=f"LoRA-GA start, pass {number} of {NUM_PASSES}")
        if bar.disable and done == number * num_batches:
            say(f"LoRA-GA start: pass {number} of {NUM_PASSES} over {num_batches} batches done")

    with bar:
        yield advance


def _resumes(config: RunConfig) -> bool:
    folder = config.checkpoint.load
    return folder is not None and newest_checkpoint(Path(folder)) is not None
