"""Make a page of a run, or of an experiment with all of its runs.

megatron-peft report RUN writes RUN/report.html for the --save folder of a run, which may still be running: curves,
lambda by layer, speed, memory, settings. With --samples N the base model and the trained one answer N prompts of the
validation data first; flags for the model's layout may follow, as for `megatron-peft generate`. See
docs/watching-a-run.md.

megatron-peft report FOLDER reads FOLDER/cells and FOLDER/experiment.yaml of `megatron-peft experiment` and writes
report.html, report.md, table1.csv, table1.tex and the figures as PNG and SVG. See docs/experiments.md.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_peft.cli.launch import start_processes
from megatron_peft.cli.own_flags import ArgumentParser, add_flags, read_own_flags
from megatron_peft.cli.parser import typed_launch
from megatron_peft.config import ConfigurationError, Requirements, option, require, require_packages, required_option

PROGRAM, MODULE = "megatron-peft report", "megatron_peft.commands.report"


@dataclass(frozen=True)
class ReportSettings:
    """What is reported, and where the report goes."""

    folder: Path = required_option("--save of a run, or --output of an experiment", flags=("folder",), metavar="FOLDER")
    output: Path | None = option(None, "folder for the report (default: FOLDER)", metavar="FOLDER")
    experiment: Path | None = option(
        None, "of an experiment: its file (default: FOLDER/experiment.yaml)", metavar="FILE.yaml"
    )
    against: str | None = option(
        None,
        "of an experiment: the method that the others are tested against (default: the first Hybrid)",
        metavar="METHOD",
    )
    samples: int | None = option(
        None,
        "of a run: answer N validation prompts with the base and the trained model (default: show those of the last "
        "call)",
        check="positive",
    )
    max_new_tokens: int = option(128, "of a run: tokens per answer, at most", check="positive")

    def __post_init__(self) -> None:
        with Requirements(self) as unmet:
            unmet.fields()


def add_arguments(parser: ArgumentParser) -> None:
    """The flags; with --samples, those of the model's layout too."""
    add_flags(parser, ReportSettings)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 2 when there is nothing to report, or something is wrong with the files."""
    argv = sys.argv[1:] if argv is None else list(argv)
    read_settings, model_flags = read_own_flags(ReportSettings, argv, __doc__)
    try:
        settings: ReportSettings = read_settings()
        require(
            not model_flags or settings.samples is not None,
            f"unexpected {' '.join(model_flags)}: flags of the model are for --samples.",
        )
        require(settings.folder.is_dir(), f"there is no folder {settings.folder}.")
        require_packages("report", "matplotlib", "scipy")
        ended = start_processes(MODULE, argv, typed_launch(model_flags), PROGRAM, lambda environ: None)
        if ended is not None:
            return ended
        written = _report(settings, model_flags)
    except ConfigurationError as error:
        print(f"{PROGRAM}: error: " + "\n  - ".join(error.problems), file=sys.stderr)
        return 2
    except OSError as error:
        print(
            f"{PROGRAM}: error: {error.filename or 'the report'} cannot be written ({error.strerror}).", file=sys.stderr
        )
        return 2
    for path in written:
        print(path)
    return 0


def _report(settings: ReportSettings, model_flags: Sequence[str]) -> list[Path]:
    from megatron_peft.experiment.run_report import is_run

    folder = settings.folder
    is_experiment = settings.experiment is not None or (folder / "cells").is_dir()
    if not is_experiment and is_run(folder):
        require(settings.against is None, "--against is of an experiment, but this is the folder of a run.")
        return _of_a_run(settings, model_flags)
    require(
        is_experiment,
        f"{folder} holds neither a run (metrics.jsonl, checkpoints) nor an experiment (cells): give the --save folder "
        f"of a run, or the --output folder of megatron-peft experiment.",
    )
    require(settings.samples is None, f"--samples needs the --save folder of a run; {folder} is not one.")
    return _of_an_experiment(settings)


def _of_a_run(settings: ReportSettings, model_flags: Sequence[str]) -> list[Path]:
    from megatron_peft.experiment.page import HTML, write_page
    from megatron_peft.experiment.run_report import SAMPLES_FILE, build_run_report, read_run

    folder = settings.folder
    run = read_run(folder)  # before anything is answered
    if settings.samples is not None:
        from megatron_peft.evaluation.answers import write_samples
        from megatron_peft.evaluation.model import run_on_a_model

        output, longest = folder / SAMPLES_FILE, settings.max_new_tokens
        run_on_a_model(
            lambda config, num_samples: write_samples(config, output, str(folder), num_samples, longest),
            settings.samples,
            ["--load", str(folder), *model_flags],
            PROGRAM,
        )
        if os.environ.get("RANK", "0") != "0":
            return []  # one rank writes
        run = read_run(folder)
    return [write_page(build_run_report(run), (settings.output or folder) / HTML)]


def _of_an_experiment(settings: ReportSettings) -> list[Path]:
    from megatron_peft.experiment import paper
    from megatron_peft.experiment.page import write
    from megatron_peft.experiment.report import build_report
    from megatron_peft.experiment.results import copy_results, read_results
    from megatron_peft.experiment.tables import reference_method

    output = settings.output or settings.folder
    results = read_results(settings.folder, settings.experiment)
    paper.check_names(results)
    report = build_report(results, reference_method(results, settings.against))
    if output.resolve() != settings.folder.resolve():
        copy_results(results, output)
    return write(report, output)


if __name__ == "__main__":
    sys.exit(main())
