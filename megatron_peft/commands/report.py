"""Make tables and plots from the results of `megatron-peft experiment`, next to the paper's numbers.

megatron-peft report FOLDER reads FOLDER/cells and FOLDER/experiment.yaml and writes report.html (one self-contained
page), report.md, table1.csv, table1.tex and the figures as PNG and SVG. The experiment may still be running.
See docs/experiments.md.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_peft.cli.parser import ArgumentParser, add_flags, own_parser, parse_own, settings_of
from megatron_peft.config import ConfigurationError, option, require_packages, required_option


@dataclass(frozen=True)
class ReportSettings:
    """What is reported, and where the report goes."""

    folder: Path = required_option("--output of `megatron-peft experiment`", flags=("folder",), metavar="FOLDER")
    output: Path | None = option(None, "folder for the report and a copy of the cells (default: FOLDER)")
    experiment: Path | None = option(
        None, "the experiment of the cells (default: FOLDER/experiment.yaml)", metavar="FILE.yaml"
    )
    against: str | None = option(
        None, "the method that the others are tested against (default: the first Hybrid)", metavar="METHOD"
    )


def add_arguments(parser: ArgumentParser) -> None:
    """The flags."""
    add_flags(parser, ReportSettings)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 2 when there is nothing to report, or something is wrong with the files."""
    parser = own_parser(__doc__)
    add_arguments(parser)
    settings = settings_of(ReportSettings, parse_own(parser, argv))
    try:
        written = _report(settings, settings.output or settings.folder)
    except ConfigurationError as error:
        print("report: error: " + "\n  - ".join(error.problems), file=sys.stderr)
        return 2
    print("\n".join(map(str, written)))
    return 0


def _report(settings: ReportSettings, output: Path) -> list[Path]:
    require_packages("report", "matplotlib", "scipy")
    from megatron_peft.experiment.report import build_report, write
    from megatron_peft.experiment.results import copy_results, read_results
    from megatron_peft.experiment.tables import check_paper_names, reference_method

    results = read_results(settings.folder, settings.experiment)
    check_paper_names(results)
    report = build_report(results, reference_method(results, settings.against))
    if output.resolve() != settings.folder.resolve():
        copy_results(results, output)
    return write(report, output)
