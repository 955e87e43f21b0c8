"""Run a grid of models, tasks, methods and seeds from one YAML file, and go on where an earlier call was stopped.

python tools/experiment.py examples/experiments/methods_demo.yaml tunes each method on the validation loss, then runs
the seeds with the best settings and scores them. Each finished cell leaves a small JSON file under FOLDER/cells;
tools/report.py makes tables and plots of them. docs/experiments.md describes the file.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_peft.config import ConfigurationError


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 2 when something is wrong with the file, 1 when a cell failed, 130 when it was interrupted."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("experiment", type=Path, metavar="EXPERIMENT.yaml")
    parser.add_argument("--output", type=Path, help="folder of the results (runs/experiments/NAME)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="cells at a time (1)")
    parser.add_argument("--list", action="store_true", help="show what is done and what is not, and run nothing")
    parser.add_argument("--keep-checkpoints", action="store_true", help="do not remove those of cells that are through")
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error(f"--jobs {args.jobs}: give at least 1.")
    try:
        return _run(args.experiment, args.output, args.jobs, args.list, args.keep_checkpoints)
    except ConfigurationError as error:
        print("experiment: error: " + "\n  - ".join(error.problems), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("experiment: stopped; the same command goes on from here", file=sys.stderr)
        return 130


def _run(path: Path, output: Path | None, jobs: int, only_list: bool, keep_checkpoints: bool) -> int:
    from megatron_peft.experiment.board import Board, table
    from megatron_peft.experiment.cells import groups
    from megatron_peft.experiment.flag_check import check_flags
    from megatron_peft.experiment.runner import run_experiment
    from megatron_peft.experiment.spec import default_folder
    from megatron_peft.experiment.spec_file import read_experiment

    experiment = read_experiment(path)
    folder, parts = output or default_folder(experiment), groups(experiment)
    check_flags(parts)
    board, whole = Board(folder, parts), True
    if not only_list:
        settings = {"jobs": jobs, "keep_checkpoints": keep_checkpoints}
        with board:
            whole = run_experiment(experiment, folder, parts, report=board.report, refresh=board.refresh, **settings)
    board.console.print(table(folder, parts))
    return 0 if whole else 1


if __name__ == "__main__":
    sys.exit(main())
