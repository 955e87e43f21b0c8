"""Make tables and plots from the results of tools/experiment.py, next to the paper's numbers.

python tools/report.py FOLDER reads FOLDER/cells and FOLDER/experiment.yaml and writes report.html (one self-contained
page), report.md, table1.csv, table1.tex and the figures as PNG and SVG. The experiment may still be running.
See docs/experiments.md.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_peft.config import ConfigurationError, require_packages

FLAGS: dict[str, dict[str, Any]] = {
    "--output": {"type": Path, "metavar": "DIR", "help": "folder for the report and a copy of the cells (FOLDER)"},
    "--experiment": {
        "type": Path,
        "metavar": "FILE.yaml",
        "help": "the experiment of the cells (FOLDER/experiment.yaml)",
    },
    "--against": {"metavar": "METHOD", "help": "the method that the others are tested against (the first Hybrid)"},
}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 2 when there is nothing to report, or something is wrong with the files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="--output of tools/experiment.py")
    for name, settings in FLAGS.items():
        parser.add_argument(name, **settings)
    args = parser.parse_args(argv)
    try:
        written = _report(args.folder, args.output or args.folder, args.experiment, args.against)
    except ConfigurationError as error:
        print("report: error: " + "\n  - ".join(error.problems), file=sys.stderr)
        return 2
    print("\n".join(map(str, written)))
    return 0


def _report(folder: Path, output: Path, experiment: Path | None, against: str | None) -> list[Path]:
    require_packages("report", "matplotlib", "scipy")
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
