"""Run the lines one after another, print each table, and write what was found as JSON."""

import dataclasses
import json
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megatron_peft.benchmarks.check_gpu import LINES, function_of
from megatron_peft.benchmarks.check_gpu.measure import device_answers
from megatron_peft.benchmarks.check_gpu.subjects import CPU, GPU, TINY, CheckPlace, Sizes
from megatron_peft.benchmarks.check_gpu.training import record_losses
from megatron_peft.benchmarks.measure import Figure, print_table
from megatron_peft.config import ParallelConfig
from megatron_peft.config.untrusted import read_json_object
from megatron_peft.runtime.launch import start_model_parallel, start_world, stop

LOSSES = Path(__file__).with_name("losses.json")
PROVES_NOTHING = (
    "There is no GPU here: the same checks run on the CPU at small sizes. This proves nothing about CUDA, only that "
    "the checks themselves work."
)
Verdict = Literal["pass", "FAIL", "error", "not run"]


@dataclass(frozen=True)
class LineOutcome:
    """What came of a line.

    Args:
        verdict: error: it raised, and `error` says what; not run: CUDA was gone by then.
        seconds: of wall time.
        figures: all that were measured, also by a line that raised.
    """

    name: str
    verdict: Verdict
    seconds: float = 0.0
    figures: tuple[Figure, ...] = ()
    error: str = ""


def check(names: Sequence[str], output: Path, is_tiny: bool = False) -> bool:
    """Run these lines in a world of this process alone, print them, and write `output`. Whether all passed."""
    console = Console()
    start_world()
    start_model_parallel(ParallelConfig(), seed=1)
    is_gpu = torch.cuda.is_available()
    if not is_gpu:
        console.print(PROVES_NOTHING)
    try:
        with tempfile.TemporaryDirectory() as folder:
            recorded: dict[str, Any] = read_json_object(LOSSES)["losses"]
            outcomes = run_lines(names, CheckPlace(Path(folder), _sizes(is_gpu, is_tiny), recorded), console)
    finally:
        stop()
    console.print(_summary(outcomes))
    if not is_gpu:
        console.print(PROVES_NOTHING)
    _write(output, outcomes, is_gpu)
    return all(one.verdict == "pass" for one in outcomes)


def _sizes(is_gpu: bool, is_tiny: bool) -> Sizes:
    if is_tiny:
        return TINY
    return GPU if is_gpu else CPU


def run_lines(names: Sequence[str], place: CheckPlace, console: Console) -> list[LineOutcome]:
    """Each line in turn. One that fails or raises does not keep the others from running, unless CUDA is gone."""
    outcomes: list[LineOutcome] = []
    for name in names:
        outcome = _run_line(name, place) if device_answers() else LineOutcome(name, "not run", error="CUDA is gone")
        outcomes.append(outcome)
        print_table(f"{name}: {LINES[name].title} ({outcome.seconds:.1f} s)", outcome.figures, console)
        if outcome.error:
            console.print(f"[red]{name}: {escape(outcome.error)}[/red]")
    return outcomes


def _run_line(name: str, place: CheckPlace) -> LineOutcome:
    start, figures, error = time.monotonic(), [], ""
    module = import_module(f"{__package__}.{LINES[name].module}")
    try:
        for figure in getattr(module, function_of(name))(place):
            figures.append(figure)
    except Exception as raised:  # whatever it is, the other lines have their own say
        error = f"{type(raised).__name__}: {raised}"
    missed = any(one.reached is False for one in figures)
    verdict: Verdict = "error" if error else "FAIL" if missed else "pass"
    return LineOutcome(name, verdict, time.monotonic() - start, tuple(figures), error)


def _summary(outcomes: Sequence[LineOutcome]) -> Table:
    table = Table(title="check-gpu", title_justify="left")
    for header in ("line", "", "seconds", "row of docs/untested-on-cuda.md", "what failed"):
        table.add_column(header, overflow="fold")
    for one in outcomes:
        color = "green" if one.verdict == "pass" else "red"
        missed = [figure.name for figure in one.figures if figure.reached is False]
        failed = escape("; ".join([*missed, *[one.error] * bool(one.error)]))
        rows = "; ".join(LINES[one.name].settles)
        table.add_row(one.name, f"[{color}]{one.verdict}[/{color}]", f"{one.seconds:.1f}", rows, failed)
    return table


def _write(path: Path, outcomes: Sequence[LineOutcome], is_gpu: bool) -> None:
    """One object: the device, and for each line its verdict, figures and rows."""
    device = torch.cuda.get_device_name(0) if is_gpu else "cpu"
    lines = [{**dataclasses.asdict(one), "settles": LINES[one.name].settles} for one in outcomes]
    for line in lines:
        line["figures"] = [{**one, "measured": _finite(one["measured"])} for one in line["figures"]]
    found = {"device": device, "proves_something_about_cuda": is_gpu, "lines": lines}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=2) + "\n")


def _finite(number: float) -> float | None:  # JSON has no other numbers
    return number if math.isfinite(number) else None


def record(path: Path = LOSSES) -> None:
    """Write the CPU's losses anew. Only for a change that is meant to change them."""
    start_world()
    start_model_parallel(ParallelConfig(), seed=1)
    with tempfile.TemporaryDirectory() as folder:
        losses = record_losses(CheckPlace(Path(folder), CPU))
    stop()
    words = "ten losses of the CPU by method: float32, padded; megatron-peft check-gpu --record-losses writes them"
    rows = ",\n".join(f'    "{method}": {json.dumps(values)}' for method, values in losses.items())
    path.write_text(f'{{\n  "about": "{words}",\n  "losses": {{\n{rows}\n  }}\n}}\n')
