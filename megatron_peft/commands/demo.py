"""Fine-tune a real 135M Llama in two pipeline stages on CPU ranks, score it with and without that, and plot the run.

megatron-peft demo downloads the model and the messages (once), trains, and writes report.json and report.png.
All other flags are passed to `megatron-peft train`, for instance --lr 1e-3.
"""

from dataclasses import dataclass
from pathlib import Path

from megatron_peft.cli.command import Command
from megatron_peft.cli.parser import RunFlags
from megatron_peft.config import PeftConfig, flag, option, require, require_packages
from megatron_peft.demo.data import waiting

ANY_RUN = {"pretrained_checkpoint": "m", "pipeline_model_parallel_size": 2}


@dataclass(frozen=True)
class DemoSettings:
    """What the demo trains, and where everything goes."""

    method: str = option(PeftConfig.method, "--peft-method of the run")
    output: Path = option(Path("runs/demo"), "folder for everything", metavar="FOLDER")


def run(settings: DemoSettings, run_flags: RunFlags) -> int:
    """Exit code 130 when it was interrupted."""
    try:
        # Wrong flags are told before torch is imported.
        typed, launch = run_flags.values["config"], run_flags.launch
        require(not launch, f"{', '.join(map(flag, launch))}: the demo starts a rank for each part of a layout itself.")
        method = typed.get("method", settings.method)
        is_one = method == run_flags.values["command"].get("method", method)
        require(is_one, f"--method {settings.method} contradicts --peft-method {method}: leave one out.")
        run_flags.values["config"] = {**ANY_RUN, "method": method, **typed}
        run_flags.config({"WORLD_SIZE": str(run_flags.replica_size)}, saved=dict)
        with waiting("starting"):
            require_packages("demo", "accelerate", "gguf", "matplotlib", "pandas", "sacrebleu", "scipy")
            from megatron_peft.demo.run import print_report, run_demo

        report = run_demo(settings.output, method, run_flags.words)
    except KeyboardInterrupt:
        return 130
    print_report(report, settings.output)
    return 0


main = Command("demo", __doc__, DemoSettings, run, takes_run_flags=True)
