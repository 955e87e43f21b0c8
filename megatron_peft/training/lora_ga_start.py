"""LoRA-GA's start within a run: which batches it sees, and how far it is."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from rich.console import Console
from rich.progress import Progress
from torch import nn

from megatron_peft.checkpoint.folders import newest_checkpoint, write_atomically
from megatron_peft.config import PeftConfig, RunConfig, require
from megatron_peft.data.batches import GlobalBatches, Step
from megatron_peft.lora_ga.initialize import init_from_gradients
from megatron_peft.runtime.launch import checked_together, seed_generators
from megatron_peft.training.step import finish_with, run_schedule
from megatron_peft.training.terminal import say

START_FILE = "lora_ga_start.json"


@dataclass(frozen=True)
class WholeStart:
    """Of the whole model.

    Args:
        peft: of the run.
        seconds: wall time of the start.
        energy: part of the gradient's squared norm in its r leading directions, by global name of the layer.
    """

    peft: PeftConfig
    seconds: float
    energy: Mapping[str, float]


def start_table(start: WholeStart, path: Path | None) -> str:
    """Mean, lowest and highest energy of each kind of layer.

    Args:
        path: where each layer's number is, if it was written.
    """
    kinds = sorted({_kind(name) for name in start.energy})
    lines = [
        f"LoRA-GA start ({start.peft.lora_ga_init}) took {start.seconds:.1f} s; part of the gradient's squared norm in "
        f"rank {start.peft.lora_rank}:",
        *(_line(kind, {n: v for n, v in start.energy.items() if _kind(n) == kind}) for kind in kinds),
        *([f"  each layer's: {path}"] if path else []),
    ]
    return "\n".join(lines)


def write_start(start: WholeStart, save: str | None) -> Path | None:
    """Write START_FILE beside metrics.jsonl. Returns its path; None without --save or where it cannot be written."""
    if save is None:
        return None
    path = Path(save) / START_FILE
    record = {
        "lora_ga_init": start.peft.lora_ga_init,
        "lora_ga_batches": start.peft.lora_ga_batches,
        "lora_rank": start.peft.lora_rank,
        "seconds": start.seconds,
        "energy": {name: start.energy[name] for name in sorted(start.energy, key=_place)},
    }
    try:
        write_atomically(path, json.dumps(record, indent=2) + "\n")
    except OSError:  # a full disk: the run's first checkpoint says so
        return None
    return path


def _line(kind: str, energy: Mapping[str, float]) -> str:
    lowest, highest = min(energy, key=energy.__getitem__), max(energy, key=energy.__getitem__)
    mean = sum(energy.values()) / len(energy)
    return (
        f"  {kind:<12} {len(energy):4d} layers   mean {mean:.3f}   lowest {energy[lowest]:.3f} (layer "
        f"{_layer(lowest)})   highest {energy[highest]:.3f} (layer {_layer(highest)})"
    )


def _kind(name: str) -> str:
    return name.rpartition(".")[2]


def _layer(name: str) -> int:
    return int(name.split(".")[2])


def _place(name: str) -> tuple[int, str]:
    return _layer(name), name


NUM_PASSES = 2


def first_steps(config: RunConfig, train: GlobalBatches) -> Sequence[Step]:
    """The first --lora-ga-batches global batches of the run, for its start; the run then begins with them again.

    None for other methods, and none on resume: the factors come from the checkpoint.

    Raises:
        ConfigurationError: on every rank: the training data has fewer samples.
    """
    if not config.peft.spec.starts_from_gradients or checked_together(lambda: _resumes(config)):
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

        report = init_from_gradients(
            model_chunks,
            config.peft.lora_rank,
            config.peft.lora_ga_init,
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
