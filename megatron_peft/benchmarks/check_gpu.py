"""Run the tests of the lines with pytest, print a table of what each line records, and write all of it as JSON."""

import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megatron_peft.benchmarks import LINES, SIZES_VARIABLE
from megatron_peft.benchmarks.measure import Figure, print_table

PROVES_NOTHING = (
    "There is no GPU here: the same checks run on the CPU at small sizes. This proves nothing about CUDA, only that "
    "the checks themselves work."
)
MISSED = "missed: "  # how the failure of a test begins whose figures say what it is; tests/conftest.py
GONE = "CUDA is gone"
Verdict = Literal["pass", "FAIL", "error", "not run"]


@dataclass
class LineOutcome:
    """What came of a line.

    figures: all that its tests recorded; a test that raised is one that has failed, and its note says why.
    error: what kept the line from being measured to its end.
    """

    name: str
    seconds: float = 0.0
    figures: list[Figure] = field(default_factory=list)
    error: str = ""

    @property
    def verdict(self) -> Verdict:
        """Not run: CUDA was gone by then."""
        if self.error:
            return "not run" if self.error == GONE and not self.figures else "error"
        return "FAIL" if any(figure.reached is False for figure in self.figures) else "pass"


class LinesPlugin:
    """Keeps the tests of these lines, line by line, and what they record in the fixture `figure`.

    A test that records nothing and passes is a figure too. Once the device no longer answers, nothing more is run.
    """

    def __init__(self, files: Mapping[str, Sequence[Path]], console: Console) -> None:
        self.outcomes = {name: LineOutcome(name) for name in files}
        self.files, self.console = files, console
        self._lines: dict[str, LineOutcome] = {}  # by test

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that cannot be imported is an error of its lines."""
        for name, outcome in self.outcomes.items() if report.failed else ():
            if report.nodeid.endswith(tuple(path.name for path in self.files[name])):
                outcome.error = report.longreprtext[-400:]

    @pytest.hookimpl(trylast=True)  # after pytest's own choice by marks
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """The tests of these lines, in the order of the lines."""
        marked = [(mark.args[0], item) for item in items for mark in item.iter_markers("gpu")]
        items[:] = [item for name in self.outcomes for line, item in marked if line == name]
        self._lines = {item.nodeid: self.outcomes[line] for line, item in marked if line in self.outcomes}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
        """Print a line's table after its last test."""
        done = yield
        outcome = self._lines[item.nodeid]
        if not device_answers():
            outcome.error = item.session.shouldstop = GONE
        if item.session.shouldstop or nextitem is None or self._lines[nextitem.nodeid] is not outcome:
            title = f"{outcome.name}: {LINES[outcome.name].title} ({outcome.seconds:.1f} s)"
            print_table(title, outcome.figures, self.console)
        return done

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Called for the start, the call and the end of a test."""
        outcome = self._lines[report.nodeid]
        outcome.seconds += report.duration
        recorded: list[tuple[str, Any]] = report.user_properties
        figures = [Figure(**values) for kind, values in recorded if kind == "figure" and report.when == "call"]
        crash: Any = getattr(report.longrepr, "reprcrash", None)
        why = crash.message if crash else report.longreprtext
        # `test_a_b[c]` is shown as `a b: c`.
        name, _, parameters = report.nodeid.rpartition("::test_")[2].partition("[")
        shown = ": ".join(filter(None, [name.replace("_", " "), parameters.removesuffix("]")]))
        if report.failed and MISSED not in why:
            figures.append(Figure(shown, math.inf, 0.0, note=why[:400]))
        elif report.passed and report.when == "call" and not figures:
            figures.append(Figure(shown, 0.0, 0.0, note="passed"))
        outcome.figures += figures


def device_answers() -> bool:
    """Whether CUDA works: after an illegal access every call fails, in this process for good."""
    try:
        return not torch.cuda.is_available() or torch.cuda.synchronize() is None
    except RuntimeError:
        return False


def check(root: Path, names: Sequence[str], output: Path, is_tiny: bool = False) -> bool:
    """Run these lines' tests of the checkout at `root`, print them, and write `output`. Whether all passed."""
    console, is_gpu = Console(), torch.cuda.is_available()
    os.environ[SIZES_VARIABLE] = "tiny" if is_tiny else "gpu" if is_gpu else "cpu"
    if not is_gpu:
        console.print(PROVES_NOTHING)
    outcomes = run_lines({name: files_of(name, root) for name in names}, root, console)
    console.print(_summary(outcomes))
    if not is_gpu:
        console.print(PROVES_NOTHING)
    _write(output, outcomes, is_gpu)
    return all(outcome.verdict == "pass" for outcome in outcomes)


def files_of(name: str, root: Path) -> list[Path]:
    """The files of the checkout with tests of this line."""
    mark = f'pytest.mark.gpu("{name}")'
    return [path for path in sorted((root / "tests").rglob("test_*.py")) if mark in path.read_text(encoding="utf-8")]


def run_lines(files: Mapping[str, Sequence[Path]], root: Path, console: Console) -> list[LineOutcome]:
    """Each line in turn, by its files with tests. One that fails stops no other, unless CUDA is gone."""
    plugin = LinesPlugin(files, console)
    settings = ["--config-file", str(root / "pyproject.toml"), "-o", "addopts=--strict-markers --import-mode=importlib"]
    unused = [f"no:{name}" for name in ("terminalreporter", "cacheprovider", "unraisableexception")]
    without = [word for name in unused for word in ("-p", name)]
    paths = dict.fromkeys(str(path) for of_line in files.values() for path in of_line)
    pytest.main(["-m", "gpu", "--continue-on-collection-errors", *settings, *without, *paths], plugins=[plugin])
    for outcome in plugin.outcomes.values():
        if not outcome.figures:
            outcome.error = outcome.error or GONE * (not device_answers()) or "none of its tests ran"
        if outcome.error:
            console.print(f"[red]{outcome.name}: {escape(outcome.error)}[/red]")
    return [*plugin.outcomes.values()]


def _summary(outcomes: Sequence[LineOutcome]) -> Table:
    table = Table(title="check-gpu", title_justify="left")
    for header in ("line", "", "seconds", "row of docs/untested-on-cuda.md", "what failed"):
        table.add_column(header, overflow="fold")
    for line in outcomes:
        color = "green" if line.verdict == "pass" else "red"
        missed = [figure.name for figure in line.figures if figure.reached is False]
        failed = escape("; ".join([*missed, *[line.error] * bool(line.error)]))
        rows = "; ".join(LINES[line.name].settles)
        table.add_row(line.name, f"[{color}]{line.verdict}[/{color}]", f"{line.seconds:.1f}", rows, failed)
    return table


def _write(path: Path, outcomes: Sequence[LineOutcome], is_gpu: bool) -> None:
    """An object: the device, and for each line its verdict, figures and rows."""
    device = torch.cuda.get_device_name(0) if is_gpu else "cpu"
    lines = []
    for outcome in outcomes:
        values = dataclasses.asdict(outcome)
        for figure in values["figures"]:
            if not math.isfinite(figure["measured"]):  # JSON has no other numbers
                figure["measured"] = None
        settles = LINES[outcome.name].settles
        lines.append({"name": outcome.name, "verdict": outcome.verdict, **values, "settles": settles})
    content = {"device": device, "proves_something_about_cuda": is_gpu, "lines": lines}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")
