"""examples/finetune.sbatch, run by bash with stand-ins for SLURM's commands and python; tests/slurm has a real one.

What is not Python is linted by shellcheck and hadolint, wheels of the lint extra; without them these tests skip.
"""

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.time_limits import seconds, wait_until

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "finetune.sbatch"

STAND_INS = Path(__file__).parent / "stand_ins"  # they write down in $RECORD what happened


SHELL_FILES = [*(ROOT / "examples").glob("*.sh"), *(ROOT / "examples").glob("*.sbatch"), ROOT / ".ci" / "run"]
SHELL_FILES += [ROOT / "tools" / name for name in ("image.sh", "lock.sh")]
SHELL_FILES += [STAND_INS / name for name in ("scancel", "scontrol", "srun")]
COMMANDS = [*(["shellcheck", "--external-sources", str(path)] for path in SHELL_FILES)]
COMMANDS.append(["hadolint", str(ROOT / "Dockerfile")])


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: Path(command[-1]).name)
def test_linters_of_what_is_not_python_find_nothing(command: list[str]) -> None:
    program = shutil.which(command[0], path=sysconfig.get_path("scripts")) or shutil.which(command[0])
    if program is None:
        pytest.skip(f"{command[0]} is not installed (make lint)")
    done = subprocess.run([program, *command[1:]], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout


@pytest.fixture
def record(tmp_path: Path) -> Path:
    return tmp_path


def start(record: Path, *flags: str, step_code: int | None = None, **others: str) -> subprocess.Popen[str]:
    environment = {
        "PATH": f"{STAND_INS}:{Path(sys.executable).parent}:/usr/bin:/bin",
        "RECORD": str(record),
        "CHECKPOINT": "/models/llama",
        "TRAIN_DATA": "train.jsonl",
        "SAVE": str(record / "save"),
        "REPOSITORY": str(ROOT),
        **{"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_ID": "4242", "SLURM_NNODES": "2", "SLURM_CPUS_PER_TASK": "4"},
        **({} if step_code is None else {"STEP_CODE": str(step_code)}),
        **others,
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


def finished(record: Path, *flags: str, step_code: int = 0, **others: str) -> list[str]:
    """What a job whose step ends with `step_code` was called with. It must not be queued again."""
    assert start(record, *flags, step_code=step_code, **others).wait(timeout=seconds(60)) == step_code
    assert not (record / "scontrol").exists()
    return (record / "arguments").read_text().split("\n")


def test_recipe_and_flags_reach_the_run_and_wrong_flags_fail_the_job_at_once(record: Path) -> None:
    arguments = finished(record, "--lr", "1e-3", step_code=2)
    program = arguments[arguments.index("pretrain_peft.py") :]
    assert program[program.index("--config") + 1] == "recipe.yaml" and program[-2:] == ["--lr", "1e-3"]
    assert arguments[arguments.index("--rdzv-endpoint") + 1].startswith("n1:")
    assert program[program.index("--resume") + 1] == "auto"


def test_a_rank_may_open_as_many_files_as_the_node_allows(record: Path) -> None:
    usual, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (usual - 1, most))
    try:
        finished(record)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (usual, most))
    assert (record / "open_files").read_text() == f"{most} {most}"


@pytest.mark.parametrize("given", [None, "backend:native"])
def test_ranks_allocate_in_segments_that_grow_unless_told_otherwise(record: Path, given: str | None) -> None:
    finished(record, **({} if given is None else {"PYTORCH_CUDA_ALLOC_CONF": given}))
    environment = (record / "environment").read_text().splitlines()
    assert f"PYTORCH_CUDA_ALLOC_CONF={given or 'expandable_segments:True'}" in environment


def requeues(record: Path, restarts: int, **others: str) -> int:
    """How often a job whose step fails, at the start after so many, was queued again in all."""
    process = start(record, step_code=3, SLURM_RESTART_COUNT=str(restarts), **others)
    assert process.wait(timeout=seconds(60)) == 3
    found = (record / "scontrol").read_text().splitlines() if (record / "scontrol").exists() else []
    assert set(found) <= {"requeue 4242"}
    return len(found)


def test_a_failed_step_is_tried_again_as_long_as_there_are_newer_checkpoints(record: Path) -> None:
    assert [requeues(record, number, MAX_REQUEUES="2") for number in range(3)] == [1, 2, 2]
    tracker = record / "save" / "latest_checkpointed_iteration.txt"
    for iteration in range(4):  # a start that got further
        tracker.write_text(str(iteration))
        assert requeues(record, 3 + iteration, MAX_REQUEUES="2") == 3 + iteration
    assert [requeues(record, number, MAX_REQUEUES="2") for number in (7, 8)] == [7, 7]


def test_starts_that_slurm_itself_has_caused_count(record: Path) -> None:
    """It queues a job again that has lost the node of its script, which then has no last word."""
    (record / "save").mkdir()
    (record / "save" / ".starts.4242").write_text("2 the start\n")
    process = start(record, step_code=0, SLURM_RESTART_COUNT="5", MAX_REQUEUES="2")
    assert process.wait(timeout=seconds(60)) == 1 and not (record / "arguments").exists()


def test_usr1_saves_then_queues_the_job_again(record: Path, running: subprocess.Popen[str]) -> None:
    running.send_signal(signal.SIGUSR1)
    time.sleep(0.2)
    running.send_signal(signal.SIGUSR1)  # a second one must not end the wait either
    assert running.wait(timeout=seconds(60)) == 0
    assert (record / "saved").exists(), "the script did not wait for the step to save"
    assert (record / "scancel").read_text().split() == ["--signal=USR1", "4242.0"]
    assert (record / "scontrol").read_text().split() == ["requeue", "4242"]
    assert (record / "save" / ".starts.4242").read_text() == "0 the start\n"
    assert (record / "ignored").read_text() == "True", "USR1 is off in the launcher itself"
