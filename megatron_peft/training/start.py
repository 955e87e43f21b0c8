"""LoRA-GA's start within a run: which batches it sees, and what it says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from torch import nn

from megatron_peft.checkpoint.folders import newest_checkpoint
from megatron_peft.config import RunConfig, require
from megatron_peft.data.batches import GlobalBatches, Step
from megatron_peft.lora_ga.initialize import start_from_gradients
from megatron_peft.runtime.launch import checked_together
from megatron_peft.training.step import finish_with, run_schedule
from megatron_peft.training.summary import say


def first_steps(config: RunConfig, train: GlobalBatches) -> Sequence[Step]:
    """The first --lora-ga-batches global batches of the run, for its start; the run then begins with them again.

    None for other methods, and none on resume: the factors come from the checkpoint.

    Raises:
        ConfigurationError: on every rank: the training data has fewer samples.
    """
    if not config.peft.starts_from_gradients or checked_together(lambda: _resumes(config)):
        return ()
    size, wanted = config.global_batch_size, config.peft.lora_ga_batches
    require(
        wanted * size <= train.samples_per_epoch,
        f"--lora-ga-batches {wanted} of --global-batch-size {size} are {wanted * size} samples, but the training data "
        f"has {train.samples_per_epoch}: use at most {train.samples_per_epoch // size}.",
    )
    return [train.step_at(index * size) for index in range(wanted)]


def start_lora_ga(model_chunks: Sequence[nn.Module], config: RunConfig, steps: Sequence[Step]) -> None:
    """Start the low-rank factors from the gradient over `steps`, and say what it found. A collective.

    Args:
        model_chunks: bare, with adapters attached and the base loaded.
    """
    passes = 0

    def replay() -> None:
        nonlocal passes
        passes += 1
        finish_with(model_chunks, None)
        for index, microbatches in enumerate(steps):
            run_schedule(model_chunks, microbatches, forward_only=False)
            say(f"LoRA-GA start: pass {passes} of 2, batch {index + 1} of {len(steps)}")

    tensor_parallel: Any = parallel_state.get_tensor_model_parallel_group()
    data_parallel: Any = parallel_state.get_data_parallel_group()
    report = start_from_gradients(
        model_chunks,
        config.peft,
        config.training.seed,
        replay,
        tensor_parallel,
        data_parallel,
    )
    gathered: list[dict[str, float]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, report.energy)
    energy = {name: value for part in gathered for name, value in part.items()}
    say(f"LoRA-GA start took {report.seconds:.1f} s; part of the gradient's energy in rank {config.peft.lora_rank}:")
    for name, value in sorted(energy.items(), key=_by_layer):
        say(f"  {name}: {value:.3f}")


def _by_layer(item: tuple[str, float]) -> tuple[int, str]:
    return int(item[0].split(".")[2]), item[0]


def _resumes(config: RunConfig) -> bool:
    folder = config.checkpoint.load
    return folder is not None and newest_checkpoint(Path(folder)) is not None
