"""Fine-tune a real 135M Llama on three tensor-parallel CPU ranks, score it before and after, and plot the run.

python tools/demo.py downloads the model and the messages (once), trains, and writes report.json and report.png.
All other flags are passed to pretrain_peft.py, for instance --lr 1e-3.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_peft.config import METHODS, ConfigurationError, require_packages


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 2 when something is wrong (the message says what), 130 when it was interrupted."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--method", default="lora", choices=METHODS, help="--peft-method of the run (lora)")
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder for everything (runs/demo)")
    args, extra_flags = parser.parse_known_args(argv)
    try:
        require_packages("demo", "matplotlib", "sacrebleu")
        from megatron_peft.demo.run import print_report, run_demo

        report = run_demo(args.output, args.method, extra_flags)
    except ConfigurationError as error:
        print(f"demo: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print_report(report, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
