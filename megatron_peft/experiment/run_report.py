"""The report of a single run: one page of its --save folder, whatever the run has written so far."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, fields
from datetime import timedelta
from itertools import pairwise
from math import log10
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import pandas
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_peft.checkpoint.folders import newest_checkpoint
from megatron_peft.checkpoint.run_record import RunRecord, read_record
from megatron_peft.config import ConfigurationError, field_names, require
from megatron_peft.config.errors import flag_of, spelled
from megatron_peft.config.untrusted import parse_json, read_text
from megatron_peft.experiment import plots
from megatron_peft.experiment.plots import AFTER, BEFORE, new_figure, series, style
from megatron_peft.experiment.process import LAMBDA_FILE
from megatron_peft.experiment.report import Report, Section
from megatron_peft.experiment.tables import Table, format_number, make_table
from megatron_peft.training.metrics import METRICS_FILE, read_metrics

SAMPLES_FILE = "samples.jsonl"
SAMPLE_FIELDS = ("prompt", "reference", "before", "after")
VALIDATION = "#d1242f"
SMOOTHED_FROM = 60  # points of a curve; a shorter one is drawn as it is
TEXT_CHARACTERS, TEXT_LINES = 300, 8  # of a prompt or an answer on the page; a model may repeat itself to the end
TITLE_PARTS = 3  # of a path


Lines = Sequence[Mapping[str, Any]]  # of a file of JSON lines


class RunFiles(NamedTuple):
    """What a --save folder holds; `record` is of the newest checkpoint."""

    folder: Path
    metrics: Lines
    lambdas: Lines
    record: RunRecord | None
    samples: Lines


def is_run(folder: Path) -> bool:
    """Whether it is the --save folder of a run."""
    return (folder / METRICS_FILE).is_file() or (folder.is_dir() and newest_checkpoint(folder) is not None)


def read_run(folder: Path) -> RunFiles:
    """Raises ConfigurationError: the folder has no metrics, or one of its files is damaged."""
    path = folder / METRICS_FILE
    require(path.is_file(), f"{folder} has no {METRICS_FILE}: give the --save folder of a run.")
    metrics = read_metrics(path)
    require(bool(metrics), f"{path} is still empty: the run has written no log line.")
    samples = []
    if (path := folder / SAMPLES_FILE).is_file():
        for at, line in enumerate(read_text(path).rstrip("\n").split("\n"), 1):  # texts may have U+2028
            sample = parse_json(line, f"{path}, line {at}")
            if not isinstance(sample, dict) or not all(isinstance(sample.get(name), str) for name in SAMPLE_FIELDS):
                raise ConfigurationError(f"{path}, line {at}: not a sample with {', '.join(SAMPLE_FIELDS)}.")
            samples.append(sample)
    checkpoint = newest_checkpoint(folder)
    return RunFiles(
        folder, metrics, read_metrics(folder / LAMBDA_FILE), read_record(checkpoint) if checkpoint else None, samples
    )


def build_run_report(run: RunFiles) -> Report:
    """The report of a run, titled by the method, the base model and the folder, as far as they are known."""
    title = _last_parts(run.folder)
    if run.record is not None:
        config = run.record.config
        title = f"{config.peft.method} on {_last_parts(Path(str(config.model.pretrained_checkpoint)))}: {title}"
    return Report(title, tuple(_sections(run)))


def _last_parts(path: Path) -> str:
    return str(Path(*[part for part in path.parts if part != path.anchor][-TITLE_PARTS:] or [path.resolve().name]))


def _sections(run: RunFiles) -> Iterator[Section]:
    yield Section("Loss", list(_result(run)), figures={"loss": draw_loss(run.metrics)})
    if run.samples:
        text = (
            f"Greedy answers of the base model and of the trained one to {len(run.samples)} prompts, spread evenly "
            f"over the validation data."
        )
        yield Section("Answers before and after", [text], [samples_table(run.samples)])
    figures = {"optimizer": draw_optimizer(run.metrics)}
    if norms := [record for record in run.metrics if record.get("grad_norm_by_layer")]:
        figures["depth"] = draw_depth(norms)
    yield Section("Learning rate and gradient norm", figures=figures)
    if run.lambdas:
        figures = {"lambda": plots.draw_lambdas("", *plots.read_lines(run.lambdas))}
        yield Section("Lambda by layer", [_lambda_sentence(run.lambdas[-1])], figures=figures)
    yield Section("Speed and memory", [_cost_sentence(run)], figures={"speed": draw_speed(run.metrics)})
    if run.record is not None:
        yield Section("Settings", tables=[settings_table(run.record)])


def _result(run: RunFiles) -> Iterator[str]:
    def count(value: Any) -> str:
        return f"{value:,}" if isinstance(value, int) else "–"

    last, length = run.metrics[-1], planned_iterations(run.record)
    of_all = f" of {count(length)}" if length else ""
    counted = "packs" if run.record and run.record.config.data.pack_sequences else "samples"
    yield (
        f"{count(last['iteration'])}{of_all} iterations, {last.get('epoch', 0):.2f} epochs, "
        f"{count(last.get('consumed_samples'))} {counted}, {count(last.get('consumed_tokens'))} tokens."
    )
    if "interval_steps" in run.metrics[0] and (start := start_iteration(run.metrics)):
        yield f"The run was loaded at iteration {count(start)}: its curves, time and speed here are of those after it."
    iterations, losses = series(run.metrics, "validation_loss")
    if losses:
        lowest = int(np.argmin(losses))
        first = f", {format_number(losses[0])} at iteration {iterations[0]}"
        best = f". The lowest is {format_number(losses[lowest])}, at iteration {iterations[lowest]}"
        others = first + best if len(losses) > 1 else ""
        yield f"Validation loss: **{format_number(losses[-1])}** at iteration {iterations[-1]}{others}."
    iterations, losses = series(run.metrics, "loss")
    if losses:
        first = f", {format_number(losses[0])} at iteration {iterations[0]}" if len(losses) > 1 else ""
        yield f"Training loss: {format_number(losses[-1])} at iteration {iterations[-1]}{first}."


def planned_iterations(record: RunRecord | None) -> int:
    """Iterations of the whole run; 0 if the record does not tell."""
    if record is None:
        return 0
    samples = int((record.schedule or {}).get("wd_incr_steps") or 0)
    return record.config.training.train_iters or samples // record.config.global_batch_size


def start_iteration(metrics: Lines) -> int:
    """Return the iteration at which these lines begin: 0, unless --load named the checkpoint of another folder."""
    first, *others = [line["iteration"] for line in metrics]
    longest = max((now - before for before, now in pairwise([first, *others])), default=first)
    return first - metrics[0].get("interval_steps", min(first, longest))  # lines of older versions lack it


def training_seconds(metrics: Lines) -> float:
    """Return the time of all steps of these lines: each has the mean of those since the line before."""
    lines = pairwise([{"iteration": start_iteration(metrics)}, *metrics])
    return sum((now.get("step_seconds") or 0.0) * (now["iteration"] - before["iteration"]) for before, now in lines)


def _cost_sentence(run: RunFiles) -> str:
    metrics = run.metrics
    seconds = round(training_seconds(metrics))
    clauses = [f"Training took {timedelta(seconds=seconds)}, without validation and saves"]
    speeds, steps, peaks = (
        series(metrics, name)[1] for name in ("tokens_per_second", "step_seconds", "peak_memory_bytes")
    )
    if steps and speeds:
        speed = median(speeds)
        digits = max(int(log10(speed)) - 2, 0) if speed > 0 else 0
        rounded = round(speed / 10**digits) * 10**digits  # three digits of a large number
        clauses.append(f"a step {format_number(median(steps))} s (median), with {rounded:,} tokens per second")
    if peaks:
        clauses.append(f"memory of the process of rank 0 at most {format_number(max(peaks) / 1e9)} GB")
    return "; ".join(clauses) + "."


def _lambda_sentence(last: Mapping[str, Any]) -> str:
    values = [value for value in last["lambda"].values() if value is not None]
    if not values:
        return ""
    mean, low, high = map(format_number, (float(np.mean(values)), min(values), max(values)))
    return (
        f"At iteration {last['iteration']} the share of the low-rank part is {mean} on average over {len(values)} "
        f"layers, from {low} to {high}; the rest is the rotation's."
    )


def samples_table(samples: Lines) -> Table:
    """A row for each prompt; long texts are cut."""

    def cut(text: str) -> str:
        text = text.strip()
        shown = "\n".join(text.splitlines()[:TEXT_LINES])[:TEXT_CHARACTERS]
        return text if shown == text else f"{shown.rstrip()} …"

    rows = [[cut(sample[name]) for name in SAMPLE_FIELDS] for sample in samples]
    return make_table("Answers", ("prompt", "in the data", "before", "after"), rows, text_columns=4, style="prose")


def settings_table(record: RunRecord) -> Table:
    """Every flag of the run that is not at its default."""
    flags: dict[tuple[str, str], None] = {}
    for section in field_names(type(record.config)):
        part = getattr(record.config, section)
        recorded = getattr(part, "recorded_fields", field_names(type(part)))
        for field in fields(part):
            value, default = getattr(part, field.name), None if field.default is MISSING else field.default
            if field.name in recorded and field.metadata and value != default:
                shown = "no" if value is False else spelled("", value).strip() or "yes"
                flags[flag_of(field), shown] = None
    return make_table("Flags that are not at their defaults", ("flag", "value"), [*flags], text_columns=2)


# Figures of a run, by iteration.


def draw_loss(metrics: Lines) -> Figure:
    """The headline: training loss, its running mean where it has many points, and validation loss."""
    figure = new_figure(10, 4.2)
    axes = figure.subplots()
    _draw_smoothed(axes, metrics, "loss", "training")
    iterations, losses = series(metrics, "validation_loss")
    if losses:
        label = f"validation, lowest {format_number(min(losses))}"
        form = plots.measurement_format(losses)
        axes.plot(iterations, losses, form, color=VALIDATION, markersize=4, linewidth=1.4, label=label)
    style(axes, "Loss", "iteration")
    axes.legend(frameon=False)
    return figure


def draw_optimizer(metrics: Lines) -> Figure:
    """Learning rate, and gradient norm before clipping."""
    figure = new_figure(10, 3.4)
    left, right = figure.subplots(1, 2)
    left.plot(*series(metrics, "learning_rate"), color=AFTER, linewidth=1.6)
    style(left, "Learning rate", "iteration")
    left.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    _draw_smoothed(right, metrics, "grad_norm", "")
    style(right, "Gradient norm (before clipping)", "iteration")
    return figure


def draw_depth(metrics: Lines) -> Figure:
    """Gradient norm by layer, of the first, the middle and the last of these records."""
    figure = new_figure(10, 3.4)
    axes = figure.subplots()
    records = metrics[0], metrics[len(metrics) // 2], metrics[-1]
    chosen = {record["iteration"]: record["grad_norm_by_layer"] for record in records}
    for at, (iteration, norms) in enumerate(chosen.items(), start=1):
        layers = [int(layer) for layer in norms]
        values = [np.nan if norm is None else norm for norm in norms.values()]
        axes.plot(layers, values, color=AFTER, alpha=at / len(chosen), linewidth=1.6, label=f"iteration {iteration}")
    style(axes, "Gradient norm by layer (before clipping)", "layer")
    axes.set_yscale("log")
    axes.legend(frameon=False)
    return figure


def draw_speed(metrics: Lines) -> Figure:
    """Tokens per second over all ranks, and memory of rank 0."""
    figure = new_figure(10, 3.4)
    left, right = figure.subplots(1, 2)
    _draw_smoothed(left, metrics, "tokens_per_second", "")
    style(left, "Tokens per second", "iteration")
    for name, label, line in (("memory_bytes", "now", "-"), ("peak_memory_bytes", "peak", "--")):
        iterations, values = series(metrics, name)
        right.plot(iterations, [value / 1e9 for value in values], line, color=AFTER, linewidth=1.6, label=label)
    style(right, "Memory of rank 0 (GB)", "iteration")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.set_ylim(bottom=0)
    return figure


def _draw_smoothed(axes: Axes, metrics: Lines, name: str, label: str) -> None:
    iterations, values = series(metrics, name)
    if len(values) < SMOOTHED_FROM:
        axes.plot(iterations, values, color=AFTER, linewidth=1.6, label=label, marker=plots.marker(values))
        return
    axes.plot(iterations, values, color=BEFORE, linewidth=0.8, alpha=0.6)
    axes.plot(iterations, running_mean(values), color=AFTER, linewidth=1.8, label=label)


def running_mean(values: Sequence[float]) -> list[float]:
    """Return the mean of each point and its neighbors, a twentieth of the curve; fewer at its ends."""
    half = max(len(values) // 40, 1)
    return pandas.Series(values).rolling(2 * half + 1, center=True, min_periods=1).mean().tolist()
