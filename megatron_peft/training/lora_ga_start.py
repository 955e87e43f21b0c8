"""LoRA-GA's initialization within a run: its batches, progress bar and report."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from rich.console import Console
from rich.progress import track
from torch import nn

from megatron_peft.checkpoint.folders import newest_checkpoint, write_atomically
from megatron_peft.config import PeftConfig, RunConfig, require
from megatron_peft.data.batches import GlobalBatches, Step
from megatron_peft.lora_ga.initialize import init_from_gradients
from megatron_peft.runtime.launch import checked_together, gather_over_world, seed_generators
from megatron_peft.training.step import finish_with, run_schedule
from megatron_peft.training.terminal import print_rank_0

START_FILE = "lora_ga_start.json"
NUM_PASSES = 2
POSITIONS_THAT_FIT = 256


def start_table(peft: PeftConfig, seconds: float, energy: Mapping[str, float], path: Path | None) -> str:
    """Mean, lowest and highest energy of each kind of layer, for the terminal.

    Args:
        seconds: wall time of the start.
        energy: share of the gradient's squared norm in its r leading directions, by global name of the layer.
        path: the file with each layer's number, if it was written.
    """
    lines = [
        f"LoRA-GA start ({peft.lora_ga_init}) took {seconds:.1f} s; the gradient's squared norm in rank "
        f"{peft.lora_rank}:",
        f"  {'':<12} layers   mean   lowest (layer)   highest (layer)",
    ]
    for kind in sorted({name.rpartition(".")[2] for name in energy}):
        values = {_layer(name): value for name, value in energy.items() if name.endswith(f".{kind}")}
        lowest, highest = min(values, key=values.__getitem__), max(values, key=values.__getitem__)
        lines.append(
            f"  {kind:<12} {len(values):6d}  {sum(values.values()) / len(values):.3f}   {values[lowest]:.3f} "
            f"{f'({lowest})':<8}   {values[highest]:.3f} {f'({highest})':<9}".rstrip()
        )
    if path is not None:
        lines.append(f"  each layer: {path}")
    return "\n".join(lines)


def write_start(peft: PeftConfig, seconds: float, energy: Mapping[str, float], save: str | None) -> Path | None:
    """Write START_FILE beside metrics.jsonl. Returns its path, or None without --save or if it cannot be written."""
    if save is None:
        return None
    path = Path(save) / START_FILE
    record = {
        "lora_ga_init": peft.lora_ga_init,
        "lora_ga_batches": peft.lora_ga_batches,
        "lora_rank": peft.lora_rank,
        "seconds": seconds,
        "energy": {name: energy[name] for name in sorted(energy, key=lambda name: (_layer(name), name))},
    }
    try:
        write_atomically(path, json.dumps(record, indent=2) + "\n")
    except OSError:  # a full disk: the run's first checkpoint will report it
        return None
    return path


def _layer(name: str) -> int:
    return int(name.split(".")[2])


def first_steps(config: RunConfig, train: GlobalBatches) -> Sequence[Step]:
    """The run's first --lora-ga-batches global batches, which it will also train on; empty for other methods.

    The gradient is a sum over their tokens, so the microbatches are others than in training: samples of like lengths
    share one. A product of few tokens takes up to three times as long a token.

    Raises:
        ConfigurationError: on every rank: the training data has fewer samples.
    """
    if not config.peft.spec.starts_from_gradients:
        return ()
    folder = config.checkpoint.load
    if checked_together(lambda: folder is not None and newest_checkpoint(Path(folder)) is not None):
        return ()  # a resumed run takes the factors from its checkpoint
    size, wanted = config.global_batch_size, config.peft.lora_ga_batches
    num_samples = train.order.epoch_length(0)
    most = num_samples // size
    require(
        wanted <= most,
        f"--lora-ga-batches {wanted} of --global-batch-size {size} are {wanted * size} samples, but the training data "
        f"has {num_samples}: use {f'at most {most}, or ' if most else ''}a smaller --global-batch-size.",
    )
    stages = config.parallel.pipeline_model_parallel_size if config.parallel.is_interleaved else 1
    # No more memory than the longest samples take in training. Where these are short there is room for more: nothing
    # has gradients or moments yet. (Not with --pad-to-seq-length, where the stages expect messages of one size.)
    most_positions = config.training.micro_batch_size * config.data.seq_length
    most_positions = max(most_positions, 0 if config.data.pad_to_seq_length else POSITIONS_THAT_FIT)
    microbatches = train.in_few_microbatches(wanted, most_positions, stages)
    a_step = len(train.layout.microbatches(0))
    return [microbatches[first : first + a_step] for first in range(0, len(microbatches), a_step)]


def start_lora_ga(model_chunks: Sequence[nn.Module], config: RunConfig, steps: Sequence[Step]) -> None:
    """Initialize the low-rank factors from the gradient over `steps`, and report it. A collective.

    Args:
        model_chunks: bare, with adapters attached and the base loaded.
    """
    tensor_parallel: Any = parallel_state.get_tensor_model_parallel_group()
    data_parallel: Any = parallel_state.get_data_parallel_group()
    # completion tokens of the global batches, over all replicas
    own_tokens = sum(microbatch.num_loss_tokens for step in steps for microbatch in step)
    total = torch.tensor(own_tokens, device=torch.cuda.current_device())
    dist.all_reduce(total, group=data_parallel)
    passes = iter(range(1, NUM_PASSES + 1))
    has_bar = Console().is_terminal and dist.get_rank() == 0

    def replay() -> None:
        # The same dropout in both passes, so that they see one gradient.
        seed_generators(config.training.seed)
        finish_with(model_chunks, None)  # no sums of gradients: the sketches are summed instead
        which = f"pass {next(passes)} of {NUM_PASSES}"
        for microbatches in track(steps, f"LoRA-GA start, {which}", transient=True, disable=not has_bar):
            run_schedule(model_chunks, microbatches, forward_only=False)
        if not has_bar:
            print_rank_0(f"LoRA-GA start: {which} over {config.peft.lora_ga_batches} batches done")

    report = init_from_gradients(
        model_chunks,
        config.peft.lora_rank,
        config.peft.lora_ga_init,
        config.training.seed,
        replay,
        int(total),
        tensor_parallel,
        data_parallel,
    )
    seed_generators(config.training.seed)  # the run's dropout is that of a run without this start
    energy = {name: value for of_rank in gather_over_world(report.energy) for name, value in of_rank.items()}
    if dist.get_rank() == 0:
        path = write_start(config.peft, report.seconds, energy, config.checkpoint.save)
        print_rank_0(start_table(config.peft, report.seconds, energy, path))
