"""examples/finetune.sbatch, run by bash with stand-ins for SLURM's commands and for torchrun."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.time_limits import seconds, wait_until

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "finetune.sbatch"

STAND_INS = Path(__file__).parent / "stand_ins"  # they write down in $RECORD what happened


@pytest.fixture
def record(tmp_path: Path) -> Path:
    return tmp_path


def start(record: Path, *flags: str, step_code: int | None = None) -> subprocess.Popen[str]:
    environment = {
        "PATH": f"{STAND_INS}:{Path(sys.executable).parent}:/usr/bin:/bin",
        "RECORD": str(record),
        "CHECKPOINT": "/models/llama",
        "TRAIN_DATA": "train.jsonl",
        "SAVE": str(record / "save"),
        "SLURM_SUBMIT_DIR": str(record),
        **{"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_ID": "4242", "SLURM_NNODES": "2", "SLURM_CPUS_PER_TASK": "4"},
        **({} if step_code is None else {"STEP_CODE": str(step_code)}),
    }
    command = ["bash", str(SCRIPT), "recipe.yaml", *flags]
    return subprocess.Popen(command, cwd=record, env=environment, stdout=subprocess.PIPE, text=True)


@pytest.fixture
def running(record: Path) -> Iterator[subprocess.Popen[str]]:
    """The script with its step started."""
    process = start(record)
    try:
        wait_until((record / "pid").exists, "the start of the step")
        yield process
    finally:
        process.kill()
        process.wait()
    with contextlib.suppress(ProcessLookupError):  # the step has ended, as it should
        os.kill(int((record / "pid").read_text()), signal.SIGKILL)


def finished(record: Path, *flags: str, step_code: int = 0) -> list[str]:
    """What a job whose step ends with `step_code` gave to torchrun. It must not be queued again."""
    assert start(record, *flags, step_code=step_code).wait(timeout=seconds(60)) == step_code
    assert not (record / "scontrol").exists()
    return (record / "arguments").read_text().split("\n")


def test_recipe_and_flags_reach_the_run(record: Path) -> None:
    arguments = finished(record, "--lr", "1e-3")
    program = arguments[arguments.index("pretrain_peft.py") :]
    assert program[1:3] == ["--config", "recipe.yaml"] and program[-2:] == ["--lr", "1e-3"]
    assert arguments[arguments.index("--rdzv-endpoint") + 1].startswith("n1:")
    assert "--load" not in program


def test_a_checkpoint_is_resumed(record: Path) -> None:
    (record / "save").mkdir()
    (record / "save" / "latest_checkpointed_iteration.txt").write_text("50")
    arguments = finished(record)
    assert arguments[arguments.index("--load") + 1] == str(record / "save")


def test_a_failed_step_fails_the_job(record: Path) -> None:
    finished(record, step_code=3)


def test_usr1_saves_then_queues_the_job_again(record: Path, running: subprocess.Popen[str]) -> None:
    running.send_signal(signal.SIGUSR1)
    time.sleep(0.2)
    running.send_signal(signal.SIGUSR1)  # a second one must not end the wait either
    assert running.wait(timeout=seconds(60)) == 0
    assert (record / "saved").exists(), "the script did not wait for the step to save"
    assert (record / "scancel").read_text().split() == ["--signal=USR1", "4242.0"]
    assert (record / "scontrol").read_text().split() == ["requeue", "4242"]
    assert (record / "ignored").read_text() == "True", "USR1 is off in the agent itself"
