"""Progress of a run: at a terminal short lines above a live bar; in a file one of Megatron's lines per log interval."""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from rich import progress as bars
from rich.console import Console
from rich.table import Column

from megatron_peft.adapters.attach import huggingface_modules
from megatron_peft.checkpoint.state import TrainingState
from megatron_peft.config import PeftConfig, RunConfig
from megatron_peft.data.samples import SampleOrder

# (field of the record, label, format); a field that the record lacks is left out
Fields = tuple[tuple[str, str, Callable[[Any], str]], ...]
LINE_FIELDS: Fields = (
    ("consumed_samples", "consumed samples", lambda n: f"{n:12d}"),
    ("step_seconds", "elapsed time per iteration (ms)", lambda s: f"{1000 * s:.1f}"),
    ("learning_rate", "learning rate", lambda x: f"{x:.6E}"),
    ("loss", "loss", lambda x: f"{x:.6E}"),
    ("grad_norm", "grad norm", lambda x: f"{x:.3f}"),
    ("tokens_per_second", "tokens per second", lambda x: f"{x:.1f}"),
    ("tflops_per_gpu", "throughput per GPU (TFLOP/s/GPU)", lambda x: f"{x:.1f}"),  # Megatron's words
    ("mfu", "MFU", lambda x: f"{x:.1%}"),
    ("joules_per_step", "energy per iteration (J)", lambda x: f"{x:.1f}"),
    ("timer_seconds", "slowest rank (ms)", lambda times: ", ".join(f"{k} {1000 * s:.1f}" for k, s in times.items())),
    (
        "slowest_rank",
        "slowest rank",
        lambda r: f"{r['rank']} ({r['host']}) {1000 * r['seconds']:.1f} ms, median {1000 * r['median_seconds']:.1f} ms",
    ),
    ("validation_loss", "validation loss", lambda x: f"{x:.6E}"),
)
SHORT_FIELDS: Fields = (  # at a terminal, as many as fit its width
    ("loss", "loss", lambda x: f"{x:.3f}"),
    ("validation_loss", "valid", lambda x: f"{x:.3f}"),
    ("grad_norm", "norm", lambda x: f"{x:.2f}"),
    ("learning_rate", "lr", lambda x: f"{x:.2e}"),
    ("tokens_per_second", "tok/s", lambda x: f"{x:.0f}"),
    ("step_seconds", "s/step", lambda x: f"{x:.2f}"),
    ("tflops_per_gpu", "TFLOP/s/GPU", lambda x: f"{x:.1f}"),
    ("mfu", "MFU", lambda x: f"{x:.1%}"),
)
OWN_LINES = tuple(field for field in LINE_FIELDS if field[0] in ("timer_seconds", "slowest_rank"))  # at a terminal
SECONDS_WITHOUT_A_LINE = 3
LARGE_BATCH = 256  # samples; a guess: the source that docs/methods.md names says "beyond some point"


class _Console(Console):
    """A console whose reader may leave (`| head`): rich would then end this process at once, and alone."""

    is_closed = False

    def on_broken_pipe(self) -> None:
        """Write nothing more. The run ends after this step, so that it can save."""
        self.is_closed = True
        self.file = open(os.devnull, "w")


class Progress:
    """Reports the iterations from `start_iteration` to `total_iterations`, if it is `enabled`; a context manager."""

    def __init__(
        self, total_iterations: int, start_iteration: int = 0, enabled: bool = True, console: Console | None = None
    ) -> None:
        self._total, self._start = total_iterations, start_iteration
        self._enabled = enabled
        self._console = console or _Console()
        self._bar: bars.Progress | None = None
        self._told_at = time.monotonic()

    @property
    def is_closed(self) -> bool:
        """True once the reader of the output has left."""
        return isinstance(self._console, _Console) and self._console.is_closed

    def __enter__(self) -> "Progress":
        self._started_at = time.monotonic()
        if self._enabled and self._console.is_terminal:
            whole = Column(no_wrap=True)
            self._bar = bars.Progress(  # takes what the words beside it leave of the terminal's width
                bars.BarColumn(bar_width=None, table_column=Column(ratio=1)),
                bars.TextColumn("{task.completed}/{task.total}", table_column=whole),
                bars.TimeElapsedColumn(table_column=whole),
                bars.TextColumn("{task.fields[eta]}", table_column=whole),
                bars.TextColumn("{task.fields[loss]}", table_column=whole),
                console=self._console,
                expand=True,
            )
            self._task = self._bar.add_task("training", total=self._total, completed=self._start, eta="", loss="")
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def advance(self, iteration: int) -> None:
        """Move the bar to `iteration`; print nothing."""
        if self._bar is not None:
            self._bar.update(self._task, completed=iteration, eta=f"ETA {self._time_left(iteration)}")

    def update(self, record: Mapping[str, Any], only_in_bar: bool = False) -> None:
        """Print a line with the metrics of a log interval, or at a terminal show the loss `only_in_bar`."""
        if self._bar is None:
            start = f"iteration {record['iteration']:8d}/{self._total:8d}"
            left = f"ETA: {self._time_left(record['iteration'])}"
            self.message(" | ".join([start, *_formatted(record, LINE_FIELDS, ": "), left]))
            return
        if "loss" in record:
            self._bar.update(self._task, loss=f"loss {record['loss']:.3f}")
        if not only_in_bar:
            line = f"{record['iteration']:{len(str(self._total))}d}/{self._total}"
            for field in _formatted(record, SHORT_FIELDS, " "):
                if len(line) + 2 + len(field) <= self._console.width:
                    line = f"{line}  {field}"
            self.message("\n".join([line, *_formatted(record, OWN_LINES, ": ")]))

    def track(self, batches: Iterable[Any], what: str, total: int | None) -> Iterator[Any]:
        """The batches; meanwhile a second bar shows how many are done, or in a file a line every three seconds."""
        task = self._bar.add_task(what, total=total, eta=what, loss="") if self._bar else None
        try:
            for done, batch in enumerate(batches):
                if self._bar and task is not None:
                    self._bar.update(task, completed=done)
                elif time.monotonic() - self._told_at >= SECONDS_WITHOUT_A_LINE:
                    self.message(f"{what}: {done} of {total} batches")
                yield batch
        finally:
            if self._bar and task is not None:
                self._bar.remove_task(task)

    def message(self, text: str) -> None:
        """Print a line (above the bar)."""
        if self._enabled:
            self._console.print(text, soft_wrap=True, markup=False, highlight=False)
            self._console.file.flush()  # people read log files during the run
            self._told_at = time.monotonic()

    def _time_left(self, iteration: int) -> timedelta:
        """An estimate from the mean time of an iteration so far, with saves and validations."""
        done = max(iteration - self._start, 1)
        return timedelta(seconds=round((time.monotonic() - self._started_at) / done * (self._total - iteration)))


def _formatted(record: Mapping[str, Any], fields: Fields, separator: str) -> list[str]:
    return [f"{label}{separator}{show(record[name])}" for name, label, show in fields if record.get(name) is not None]


def numbers_of_parameters(model_chunks: Sequence[torch.nn.Module]) -> dict[str, int]:
    """Numbers on this rank, and on its stage: split parameters count on every tensor-parallel rank, others once."""
    numbers: dict[str, int] = dict.fromkeys(("trained", "frozen", "trained of stage", "frozen of stage"), 0)
    size = parallel_state.get_tensor_model_parallel_world_size()
    for parameter in (parameter for chunk in model_chunks for parameter in chunk.parameters()):
        kind = "trained" if parameter.requires_grad else "frozen"
        numbers[kind] += parameter.numel()
        if not getattr(parameter, "shared", False):  # a tied output layer on the last stage
            is_split = getattr(parameter, "tensor_model_parallel", False)
            numbers[f"{kind} of stage"] += parameter.numel() * (size if is_split else 1)
    return numbers


def count_parameters(model_chunks: Sequence[torch.nn.Module]) -> tuple[int, int]:
    """(trainable, all) parameters of the whole model, each global parameter counted once. A collective."""
    numbers = numbers_of_parameters(model_chunks)
    of_stage = numbers["trained of stage"], numbers["frozen of stage"]
    counts = torch.tensor(of_stage, dtype=torch.int64, device=torch.cuda.current_device())
    group: Any = parallel_state.get_pipeline_model_parallel_group()
    dist.all_reduce(counts, group=group)
    trainable, frozen = counts.tolist()
    return trainable, trainable + frozen


def unused_flags_notes(peft: PeftConfig) -> list[str]:
    """A line for each flag that was set and that the method does not read."""
    return [f"note: {flag} has no effect with {peft.spec.describe(peft)}" for flag in peft.unused_flags]


def training_summary(config: RunConfig, adapted: Sequence[str], model_chunks: Sequence[torch.nn.Module]) -> str:
    """What is trained; a few lines for the terminal. A collective. `adapted`: global names of all adapted layers."""
    lines = [f"--peft-method {config.peft.method}: {_modules(config, adapted, huggingface_modules(model_chunks))}"]
    if config.peft.spec.replaces_base(config.peft):
        lines.append(
            "WARNING: the pretrained weights of these layers are DISCARDED and replaced by new ones: the model does "
            "not start from the pretrained one."
        )
    lines += unused_flags_notes(config.peft)
    trainable, total = count_parameters(model_chunks)
    lines.append(f"trainable parameters: {trainable:,} of {total:,} ({100 * trainable / max(total, 1):.3f}%)")
    return "\n".join(lines)


def large_batch_warning(config: RunConfig, order: SampleOrder) -> str:
    """A warning of low-rank factors with many samples a step, of which a pack holds several; else nothing."""
    num_samples = round(config.global_batch_size * order.num_samples / order.epoch_length(0))
    if num_samples < LARGE_BATCH or "lora_rank" not in config.peft.spec.fields(config.peft):
        return ""
    return (
        f"WARNING: --global-batch-size {config.global_batch_size} is {num_samples} samples: large batches may cost "
        f"low-rank factors more than full fine-tuning, whatever their rank: compare with a smaller one and more steps "
        f"(docs/methods.md, Rates, batches and ranks)."
    )


def _modules(config: RunConfig, adapted: Sequence[str], megatron_names: Mapping[str, str]) -> str:
    if not config.peft.trains_adapters:
        return "every parameter of the model"
    kinds = Counter(name.rpartition(".")[2] for name in adapted)
    listed = ", ".join(f"{kind} ({count})" for kind, count in sorted(kinds.items()))
    fused = [
        f"{name} is part of {megatron_names[name]}, which is adapted as a whole"
        for name in config.peft.target_modules
        if name in megatron_names and list(megatron_names.values()).count(megatron_names[name]) > 1
    ]
    return f"{len(adapted)} layers: {listed}" + "".join(f"\nnote: {line}" for line in fused)


def resume_summary(checkpoint: Path, state: TrainingState, train_iters: int, epoch: float) -> str:
    """The checkpoint that was loaded into `state`, its place in the data, and what is left; a line for the terminal."""
    position = state.position
    if state.config.checkpoint.finetune:
        return f"loaded the parameters of {checkpoint} (--finetune): the run starts at iteration 0 of {train_iters}"
    left = max(train_iters - position.iteration, 0)
    return (
        f"resumed from {checkpoint}: iteration {position.iteration} of {train_iters}, "
        f"{position.consumed_samples:,} samples (epoch {epoch:.2f}); {left} iterations left"
    )


def print_rank_0(text: str) -> None:
    """Print on rank 0."""
    if dist.get_rank() == 0:
        print(text, flush=True)
