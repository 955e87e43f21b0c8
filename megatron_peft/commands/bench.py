"""Measure step time, memory, collectives, agreement with transformers, loading and startup.

megatron-peft bench runs every benchmark; megatron-peft bench logits collectives runs these two. Each prints a table
and writes OUTPUT/NAME.json. docs/benchmarks.md explains the figures.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from megatron_peft import benchmarks
from megatron_peft.cli.command import Command
from megatron_peft.config import Checked, ConfigurationError, option, require


@dataclass(frozen=True)
class BenchSettings(Checked):
    """Which benchmarks are run, and on what."""

    names: tuple[str, ...] = option(
        (), "benchmarks of docs/benchmarks.md (default: all)", flags=("names",), metavar="NAME"
    )
    output: Path = option(Path("runs/bench"), "folder for the results", metavar="FOLDER")
    model: Path = option(Path("runs/demo/model"), "the 135M model, which the demo makes", metavar="FOLDER")
    turns: int = option(9, "number of measured turns per timed step", check="positive")


def run(settings: BenchSettings) -> int:
    """Exit code 1 when a figure misses its target."""
    named = benchmarks.BENCHMARKS
    unknown = [name for name in settings.names if name not in named]
    require(not unknown, f"no benchmark is called {', '.join(unknown)}: there are {', '.join(named)}.")
    import megatron_peft.runtime.no_gpu  # noqa: F401  # before torch
    from megatron_peft.benchmarks.measure import print_table, write_json

    missed = False
    for name in settings.names or named:
        try:
            figures = named[name].figures(settings.output, settings.model, settings.turns)
        except ConfigurationError as error:  # as that there is no vLLM
            if settings.names:
                raise
            print(f"{name}: not measured: {error}", file=sys.stderr)
            missed = True
            continue
        write_json(settings.output / f"{name}.json", figures)
        print_table(f"{name}: {named[name].title}", figures)
        missed |= any(figure.reached is False for figure in figures)
    return int(missed)


main = Command("bench", __doc__, BenchSettings, run)
