"""Settle on one GPU, in about ten minutes, what was only counted or emulated without one.

megatron-peft check-gpu runs every line; megatron-peft check-gpu versions layers runs these two. It prints a table for
each, and writes all of it as JSON. docs/untested-on-cuda.md says what each line settles. Without a GPU the same checks
run on the CPU at small sizes, and prove nothing about CUDA.
"""

import os
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from megatron_peft.benchmarks import LINES
from megatron_peft.cli.command import Command
from megatron_peft.config import option, require


@dataclass(frozen=True)
class CheckGpuSettings:
    """Which lines are run, and where the result goes."""

    names: tuple[str, ...] = option(
        (), "lines of docs/untested-on-cuda.md (default: all)", flags=("names",), metavar="LINE"
    )
    output: Path = option(Path("runs/check-gpu.json"), "file for the result", metavar="FILE")
    tiny: bool = option(False, "the smallest sizes, and two methods only: whether the checks run at all")
    record_losses: bool = option(
        False,
        "write the CPU's losses, with which devices are compared, anew into tests/; needs a machine without a GPU",
    )


def run(settings: CheckGpuSettings) -> int:
    """Exit code 1 when a line fails."""
    unknown = [name for name in settings.names if name not in LINES]
    require(not unknown, f"no line is called {', '.join(unknown)}: there are {', '.join(LINES)}.")
    world_size = os.environ.get("WORLD_SIZE", "1")
    require(world_size == "1", f"WORLD_SIZE is {world_size}: check-gpu is one process; start it without torchrun.")
    root = Path(__file__).parents[2]
    missing = [f"{root / 'tests'} is not there"] * (not (root / "tests" / "conftest.py").is_file())
    missing += [f"{name} is not installed" for name in ("pytest", "hypothesis") if find_spec(name) is None]
    require(
        not missing,
        f"check-gpu runs tests of this project, but {' and '.join(missing)}. Run it in a checkout of the project, "
        "installed with `pip install --editable '.[test]'`; there `make check-gpu` installs what it needs.",
    )
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it once: the same bits at each call
    import torch

    from megatron_peft.benchmarks.check_gpu import check

    if settings.record_losses:
        message = "--record-losses is for the CPU, and there is a GPU here: set CUDA_VISIBLE_DEVICES='' to hide it."
        require(not torch.cuda.is_available(), message)
        return subprocess.run([sys.executable, "-m", "tests.benchmarks.gpu_subjects"], cwd=root).returncode
    return int(not check(root, settings.names or tuple(LINES), settings.output, settings.tiny))


main = Command("check-gpu", __doc__, CheckGpuSettings, run)
