"""Wall seconds from starting `pretrain_peft.py` to the end of its first step."""

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from megatron_peft.benchmark.figures import Figure
from megatron_peft.benchmarks.subjects import Setting

PROGRAM = Path(__file__).parents[2] / "pretrain_peft.py"
SECONDS_ALLOWED = 20.0
NUM_SAMPLES = 16
FIRST_LINE = "iteration "


class ProgramFailed(RuntimeError):
    """The program ended before its first step; the text is what it printed."""


def startup_figures(setting: Setting) -> list[Figure]:
    """LoRA on the model of `setting`, one process, two iterations of two short samples."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryDirectory() as folder:
        data = _save_samples(Path(folder, "train.jsonl"))
        seconds = seconds_to_first_step(_command(setting, data))
    cpu_seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before.ru_utime
    note = f"to the line of the first iteration; both iterations took {cpu_seconds:.1f} CPU s in all"
    return [Figure("startup to the end of the first step", seconds, SECONDS_ALLOWED, "s", note)]


def _save_samples(path: Path) -> Path:
    lines = [json.dumps({"prompt": f"What follows {n}?", "completion": f" {n + 1}"}) for n in range(NUM_SAMPLES)]
    path.write_text("\n".join(lines) + "\n")
    return path


def _command(setting: Setting, data: Path) -> list[str]:
    flags = {
        "--pretrained-checkpoint": setting.checkpoint,
        "--peft-method": "lora",
        "--train-data-path": data,
        "--seq-length": setting.positions,
        "--micro-batch-size": 2,
        "--train-iters": 2,
        "--log-interval": 1,
        "--lr": 1e-4,
    }
    return [sys.executable, "-W", "ignore", str(PROGRAM), *(str(word) for pair in flags.items() for word in pair)]


def seconds_to_first_step(command: list[str]) -> float:
    """Wall seconds from starting `command` to its line of the first iteration.

    Raises:
        ProgramFailed: it ended before.
    """
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    with process, process.stdout:
        printed = list(_until_first_step(process.stdout))
        seconds = time.perf_counter() - start
        process.stdout.read()
    if not printed or not printed[-1].startswith(FIRST_LINE):
        raise ProgramFailed("".join(printed))
    return seconds


def _until_first_step(lines: Iterator[str]) -> Iterator[str]:
    for line in lines:
        yield line
        if line.startswith(FIRST_LINE):
            return
