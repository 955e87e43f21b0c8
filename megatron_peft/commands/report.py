"""Make a page of a run, or of an experiment with all of its runs, and print a summary of it.

megatron-peft report RUN writes RUN/report.html for the --save folder of a run, which may still be running: curves,
lambda by layer, speed, memory, settings. With --samples N the base model and the trained one answer N prompts of the
validation data first; flags for the model's layout may follow, as for `megatron-peft generate`. See
docs/watching-a-run.md.

megatron-peft report FOLDER reads FOLDER/cells and FOLDER/experiment.yaml of `megatron-peft experiment` and writes
report.html, report.md, table1.csv, table1.tex and the figures as PNG and SVG. See docs/experiments.md.
"""

from dataclasses import dataclass
from pathlib import Path

from megatron_peft.cli.command import Command, start_ranks
from megatron_peft.cli.parser import RunFlags, is_first_rank
from megatron_peft.config import Checked, ConfigurationError, option, require, required_option, writing
from megatron_peft.config.errors import require_packages


@dataclass(frozen=True)
class ReportSettings(Checked):
    """What is reported, and where the report goes."""

    folder: Path = required_option("--save of a run, or --output of an experiment", flags=("folder",), metavar="FOLDER")
    output: Path | None = option(None, "folder for the report (default: FOLDER)", metavar="FOLDER")
    experiment: Path | None = option(
        None, "of an experiment: its file (default: FOLDER/experiment.yaml)", metavar="FILE.yaml"
    )
    against: str | None = option(
        None,
        "of an experiment: the method that the others are tested against (default: the plain Hybrid, else the first)",
        metavar="METHOD",
    )
    samples: int | None = option(
        None,
        "of a run: answer N validation prompts with the base and the trained model (default: show those of the last "
        "call)",
        check="positive",
    )
    max_new_tokens: int = option(128, "of a run: tokens per answer, at most", check="positive")


def run(settings: ReportSettings, run_flags: RunFlags) -> int:
    """Write the report; print a summary of it and the names of its files."""
    with writing():
        if run_flags.problems:
            raise ConfigurationError(*run_flags.problems)
        require(
            not run_flags.words or settings.samples is not None,
            f"unexpected {' '.join(run_flags.words)}: flags of the model are for --samples.",
        )
        require(settings.folder.is_dir(), f"there is no folder {settings.folder}.")
        require_packages("report", "matplotlib", "pandas", "scipy")
        ended = start_ranks("report", run_flags)
        if ended is not None:
            return ended
        lines = _report(settings, run_flags)
    for line in lines:
        print(line)
    return 0


def _report(settings: ReportSettings, run_flags: RunFlags) -> list[str | Path]:
    """Write what FOLDER asks for; returns the summary and the files that were written."""
    from megatron_peft.experiment.report import HTML, build_report, summary, write, write_page
    from megatron_peft.experiment.results import is_experiment_folder
    from megatron_peft.experiment.run_report import SAMPLES_FILE, build_run_report, is_run, read_run

    folder, output = settings.folder, settings.output or settings.folder
    is_experiment = settings.experiment is not None or is_experiment_folder(folder)
    if is_experiment or not is_run(folder):
        require(
            is_experiment,
            f"{folder} holds neither a run (metrics.jsonl, checkpoints) nor an experiment (cells): give the --save "
            f"folder of a run, or the --output folder of megatron-peft experiment.",
        )
        require(settings.samples is None, f"--samples needs the --save folder of a run; {folder} is not one.")
        from megatron_peft.experiment.results import copy_results, read_results
        from megatron_peft.experiment.tables import reference_method

        results = read_results(folder, settings.experiment)
        report = build_report(results, reference_method(results, settings.against))
        if output.resolve() != folder.resolve():
            copy_results(results, output)
        return [f"{summary(report)}\n", *write(report, output)]

    require(settings.against is None, "--against is of an experiment, but this is the folder of a run.")
    run = read_run(folder)  # before anything is answered
    if settings.samples is not None:
        from megatron_peft.evaluation.answers import write_samples
        from megatron_peft.evaluation.model import run_on_a_model

        samples, longest = folder / SAMPLES_FILE, settings.max_new_tokens
        run_on_a_model(
            lambda config, num_samples: write_samples(config, samples, str(folder), num_samples, longest),
            settings.samples,
            RunFlags(["--load", str(folder), *run_flags.words], program=run_flags.program),
        )
        if not is_first_rank():
            return []  # one rank writes
        run = read_run(folder)
    report = build_run_report(run)
    return [summary(report), write_page(report, output / HTML)]


main = Command("report", __doc__, ReportSettings, run, takes_run_flags=True)
