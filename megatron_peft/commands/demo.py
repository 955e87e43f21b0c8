"""Fine-tune a real 135M Llama in two pipeline stages on CPU ranks, score it with and without that, and plot the run.

megatron-peft demo downloads the model and the messages (once), trains, and writes report.json and report.png.
All other flags are passed to `megatron-peft train`, for instance --lr 1e-3.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_peft.cli.own_flags import ArgumentParser, add_flags, read_own_flags
from megatron_peft.cli.parser import read_config
from megatron_peft.config import METHODS, ConfigurationError, PeftConfig, option, require, require_packages
from megatron_peft.demo.waiting import waiting

ANY_RUN = "--pretrained-checkpoint m --train-data-path a.jsonl --train-iters 1 --tensor-model-parallel-size 3".split()


@dataclass(frozen=True)
class DemoSettings:
    """What the demo trains, and where everything goes."""

    method: str = option(PeftConfig.method, "--peft-method of the run", metavar="|".join(METHODS))
    output: Path = option(Path("runs/demo"), "folder for everything", metavar="FOLDER")

    def __post_init__(self) -> None:
        require(self.method in METHODS, f"--method is {self.method}; it is one of {', '.join(METHODS)}.")


def add_arguments(parser: ArgumentParser) -> None:
    """The flags; others go to `megatron-peft train`."""
    add_flags(parser, DemoSettings)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 2 when something is wrong (the message says what), 130 when it was interrupted."""
    settings, extra_flags = read_own_flags(DemoSettings, argv, __doc__)
    try:
        made: DemoSettings = settings()
        read_config([*ANY_RUN, *extra_flags], {"WORLD_SIZE": "3"})  # wrong flags are told before anything is imported
        with waiting("starting"):
            require_packages("demo", "accelerate", "gguf", "matplotlib", "sacrebleu", "scipy")
            from megatron_peft.demo.run import print_report, run_demo

        report = run_demo(made.output, made.method, extra_flags)
    except ConfigurationError as error:
        print(f"megatron-peft demo: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print_report(report, made.output)
    return 0
