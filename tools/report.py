"""Make a page of a run, or of an experiment with all of its runs.

python tools/report.py RUN writes RUN/report.html for the --save folder of a run, which may still be running: curves,
lambda by layer, speed, memory, settings. With --samples N the base model and the trained one answer N prompts of the
validation data first; flags for the model's layout may follow, as for tools/generate.py. See docs/watching-a-run.md.

python tools/report.py FOLDER reads FOLDER/cells and FOLDER/experiment.yaml of tools/experiment.py and writes
report.html, report.md, table1.csv, table1.tex and the figures as PNG and SVG. See docs/experiments.md.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_peft.config import ConfigurationError, require, require_packages

PROGRAM = "report.py"
FLAGS: dict[str, dict[str, Any]] = {
    "--output": {"type": Path, "metavar": "DIR", "help": "folder for the report (FOLDER)"},
    "--experiment": {
        "type": Path,
        "metavar": "FILE.yaml",
        "help": "of an experiment: its file (FOLDER/experiment.yaml)",
    },
    "--against": {
        "metavar": "METHOD",
        "help": "of an experiment: the method that the others are tested against (the first Hybrid)",
    },
    "--samples": {
        "type": int,
        "metavar": "N",
        "help": "of a run: answer N validation prompts with the base and the trained model (those of the last call)",
    },
    "--max-new-tokens": {"type": int, "default": 128, "metavar": "N", "help": "tokens per answer, at most (128)"},
}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 2 when there is nothing to report, or something is wrong with the files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="--save of a run, or --output of an experiment")
    for name, settings in FLAGS.items():
        parser.add_argument(name, **settings)
    args, model_flags = parser.parse_known_args(argv)
    if model_flags and args.samples is None:
        parser.error(f"unrecognized arguments: {' '.join(model_flags)}")
    try:
        written = _report(args, model_flags)
    except ConfigurationError as error:
        print("report: error: " + "\n  - ".join(error.problems), file=sys.stderr)
        return 2
    for path in written:
        print(path)
    return 0


def _report(args: argparse.Namespace, model_flags: Sequence[str]) -> list[Path]:
    require_packages("report", "matplotlib", "scipy")
    from megatron_peft.experiment.run_report import is_run

    output = args.output or args.folder
    is_experiment = args.experiment is not None or (args.folder / "cells").is_dir()
    if not is_experiment and is_run(args.folder):
        require(args.against is None, "--against is of an experiment, but this is the folder of a run.")
        return _of_a_run(args, output, model_flags)
    require(args.samples is None, f"--samples is of a run, but {args.folder} is not the --save folder of one.")
    return _of_an_experiment(args.folder, output, args.experiment, args.against)


def _of_a_run(args: argparse.Namespace, output: Path, model_flags: Sequence[str]) -> list[Path]:
    from megatron_peft.experiment.page import HTML, write_page
    from megatron_peft.experiment.run_report import SAMPLES_FILE, build, read_run

    run = read_run(args.folder)  # before anything is answered
    if args.samples is not None:
        from megatron_peft.evaluation.model import run_on_a_model
        from megatron_peft.evaluation.samples import SampleSettings, write_samples

        run_on_a_model(
            lambda config, settings: write_samples(config, settings, args.folder / SAMPLES_FILE),
            lambda: SampleSettings(str(args.folder), args.samples, args.max_new_tokens),
            ["--load", str(args.folder), *model_flags],
            PROGRAM,
        )
        if os.environ.get("RANK", "0") != "0":
            return []  # one rank writes
        run = read_run(args.folder)
    return [write_page(build(run), output / HTML)]


def _of_an_experiment(folder: Path, output: Path, experiment: Path | None, against: str | None) -> list[Path]:
    from megatron_peft.experiment.page import write
    from megatron_peft.experiment.report import build
    from megatron_peft.experiment.results import copy_results, read_results
    from megatron_peft.experiment.tables import check_paper_names, reference_method

    results = read_results(folder, experiment)
    check_paper_names(results)
    report = build(results, reference_method(results, against))
    if output.resolve() != folder.resolve():
        copy_results(results, output)
    return write(report, output)


if __name__ == "__main__":
    sys.exit(main())
