"""Measure what the project promises: time of steps, memory, collectives, agreement with transformers, loading, startup.

python tools/bench.py runs every benchmark; python tools/bench.py lora-ratio collectives runs these two. Each prints a
table and writes OUTPUT/NAME.json. docs/benchmarks.md explains the figures.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 1 when a figure misses its target."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="benchmarks of docs/benchmarks.md (all)")
    parser.add_argument("--output", type=Path, default=Path("runs/bench"), help="folder for the results (runs/bench)")
    parser.add_argument("--model", type=Path, default=Path("runs/demo/model"), help="the 135M model (runs/demo/model)")
    parser.add_argument("--turns", type=int, default=15, help="number of measured turns per timed step (15)")
    args = parser.parse_args(argv)
    from megatron_peft.benchmarks.measure import print_table, write_json
    from megatron_peft.benchmarks.registry import BENCHMARKS, Workplace

    unknown = [name for name in args.names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"no benchmark is called {', '.join(unknown)}: there are {', '.join(BENCHMARKS)}.")
    place, missed = Workplace(args.output, args.model, args.turns), False
    for name in args.names or BENCHMARKS:
        figures = BENCHMARKS[name].measure(place)
        write_json(args.output / f"{name}.json", figures)
        print_table(f"{name}: {BENCHMARKS[name].title}", figures)
        missed |= any(figure.reached is False for figure in figures)
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
