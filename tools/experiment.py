"""Run a grid of models, tasks, methods and seeds from one YAML file, and resume where an earlier call stopped.

python tools/experiment.py examples/experiments/paper_small.yaml tunes each method on the validation loss, then runs the
seeds with the best settings and scores them. Each finished cell writes a small JSON file to FOLDER/cells, from which
tools/report.py makes tables and plots. docs/experiments.md describes the YAML file.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_peft.config import ConfigurationError

if TYPE_CHECKING:
    from megatron_peft.experiment.cells import Group
    from megatron_peft.experiment.spec import Experiment


FLAGS: dict[str, dict[str, Any]] = {
    "--output": {"type": Path, "metavar": "FOLDER", "help": "folder of the results (runs/experiments/NAME)"},
    "--jobs": {"type": int, "default": 1, "metavar": "N", "help": "cells run at the same time (1)"},
    "--list": {"action": "store_true", "help": "list finished and unfinished cells without running any"},
    "--keep-checkpoints": {"action": "store_true", "help": "keep the checkpoints of finished cells"},
    "--group": {"metavar": "MODEL,TASK,METHOD", "help": "run only this group; other groups may run in parallel"},
    "--emit-slurm": {
        "type": Path,
        "metavar": "FILE",
        "help": "write a script that submits everything to SLURM, without running it",
    },
}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 2 when something is wrong with the file, 1 when a cell failed, 130 when it was interrupted."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("experiment", type=Path, metavar="EXPERIMENT.yaml")
    for name, settings in FLAGS.items():
        parser.add_argument(name, **settings)
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error(f"--jobs {args.jobs}: give at least 1.")
    try:
        return _emit(args) if args.emit_slurm else _run(args)
    except ConfigurationError as error:
        print("experiment: error: " + "\n  - ".join(error.problems), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("experiment: stopped; run the same command to continue", file=sys.stderr)
        return 130


def _read(args: argparse.Namespace) -> tuple[Experiment, Path, list[Group]]:
    """The experiment, the folder of its results and its groups, with all flags checked."""
    from megatron_peft.experiment.cells import check_flags, group_named, groups
    from megatron_peft.experiment.spec import default_folder, read_experiment

    experiment = read_experiment(args.experiment)
    found = groups(experiment)
    check_flags(found)
    chosen = [group_named(found, args.group)] if args.group else found
    return experiment, args.output or default_folder(experiment), chosen


def _run(args: argparse.Namespace) -> int:
    from megatron_peft.experiment.runner import Board, run_experiment, run_group, table

    experiment, folder, groups = _read(args)
    board, whole = Board(folder, groups), True
    if not args.list:
        settings: dict[str, Any] = {"jobs": args.jobs, "keep_checkpoints": args.keep_checkpoints}
        settings |= {"report": board.report, "refresh": board.refresh}
        with board:
            if args.group:
                whole = run_group(experiment, folder, groups[0], **settings)
            else:
                whole = run_experiment(experiment, folder, groups, **settings)
    board.console.print(table(folder, groups))
    return 0 if whole else 1


def _emit(args: argparse.Namespace) -> int:
    from megatron_peft.experiment.process import script

    experiment, folder, groups = _read(args)
    text = script(experiment, groups, args.experiment, folder, str(args.emit_slurm))
    try:
        args.emit_slurm.parent.mkdir(parents=True, exist_ok=True)
        args.emit_slurm.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"--emit-slurm {args.emit_slurm} cannot be written: {error.strerror}.") from error
    print(f"wrote {args.emit_slurm}: {len(groups)} array tasks; bash {args.emit_slurm} submits them")
    return 0


if __name__ == "__main__":
    sys.exit(main())
