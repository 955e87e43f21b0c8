"""Run a grid of models, tasks, methods and seeds from one YAML file, and resume where an earlier call stopped.

megatron-peft experiment examples/experiments/claim.yaml tunes each method on the validation loss, then runs the
seeds with the best settings and scores them. Each finished cell writes a small JSON file to FOLDER/cells, from which
`megatron-peft report` makes tables and plots. docs/experiments.md describes the YAML file.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_peft.cli.command import Command
from megatron_peft.config import Checked, ConfigurationError, option, require, required_option, writing


@dataclass(frozen=True)
class ExperimentSettings(Checked):
    """Which experiment is run, and how much of it at once."""

    experiment: Path = required_option("the experiment", flags=("experiment",), metavar="EXPERIMENT.yaml")
    output: Path | None = option(None, "folder of the results (default: runs/experiments/NAME)", metavar="FOLDER")
    jobs: int = option(1, "cells run at the same time", check="positive")
    list: bool = option(False, "list finished and unfinished cells without running any")
    keep_checkpoints: bool = option(False, "keep the checkpoints of finished cells")
    group: str | None = option(
        None, "run only this group; other groups may run in parallel", metavar="MODEL,TASK,METHOD"
    )
    emit_slurm: Path | None = option(
        None, "write a script that submits everything to SLURM, without running it", metavar="FILE"
    )


def run(settings: ExperimentSettings) -> int:
    """Exit code 1 when a cell failed, 130 when it was interrupted."""
    from rich.console import Console

    from megatron_peft.experiment.cells import check_flags, groups
    from megatron_peft.experiment.records import read_records
    from megatron_peft.experiment.runner import run_experiment, table
    from megatron_peft.experiment.slurm import render_script
    from megatron_peft.experiment.spec import read_experiment

    experiment = read_experiment(settings.experiment)
    all_groups = groups(experiment)
    try:
        check_flags(all_groups)
    except ConfigurationError as error:
        raise ConfigurationError(*(f"{settings.experiment}: {problem}" for problem in error.problems)) from error
    chosen = [group for group in all_groups if settings.group in (None, group.key)]
    names = "; ".join(group.key for group in all_groups)
    require(bool(chosen), f"--group {settings.group}: there are {names}.")

    folder, file = settings.output or Path("runs/experiments", experiment.name), settings.emit_slurm
    if file is not None:
        flags = ["--jobs", str(settings.jobs)] if settings.jobs > 1 else []
        flags += ["--keep-checkpoints"] if settings.keep_checkpoints else []
        text = render_script(experiment, chosen, settings.experiment, folder, str(file), flags)
        with writing(f"--emit-slurm {file}"):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        print(f"wrote {file}: {len(chosen)} array tasks; bash {file} submits them")
        return 0

    console, whole = Console(highlight=False), True
    try:
        if not settings.list:
            options: dict[str, Any] = {"jobs": settings.jobs, "keep_checkpoints": settings.keep_checkpoints}
            options |= {"console": console, "report": lambda text: console.print(text, markup=False, emoji=False)}
            whole = run_experiment(experiment, folder, chosen, settings.group is None, **options)
    except KeyboardInterrupt:
        print("experiment: stopped; run the same command to continue", file=sys.stderr)
        return 130
    console.print(table(read_records(folder), chosen))
    return 0 if whole else 1


main = Command("experiment", __doc__, ExperimentSettings, run)
