"""The processes of a cell: pretrain_peft.py in its own folder, then the task's score.

They end with the runner, however it ends: a child asks the kernel for a signal at its parent's death, since a cell
that trains on unseen would meet its successor in the same folder.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import megatron_peft
from megatron_peft.experiment.cells import Cell
from megatron_peft.experiment.record import from_lambdas
from megatron_peft.experiment.spec import Score
from megatron_peft.training.metrics import read_metrics

PROGRAM = Path(megatron_peft.__file__).resolve().parent.parent / "pretrain_peft.py"
TRACKER = "latest_checkpointed_iteration.txt"
LOG = "log.txt"
LAMBDA_FILE = "lambda.jsonl"  # of a Hybrid, beside metrics.jsonl
FIRST_PORT, NUM_PORTS = 20000, 10000  # where the nodes of an allocation meet, by the job's number
LAST_WORDS = 400  # characters
SET_PARENT_DEATH_SIGNAL = 1  # of prctl
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONWARNINGS": "ignore"}


def run_folder(folder: Path, cell: Cell) -> Path:
    """Of a cell's checkpoints, metrics, log and score; unlike the files of the cells it can be large."""
    return folder / "runs" / cell.key


def checkpoints(folder: Path, cell: Cell) -> Path:
    return run_folder(folder, cell) / "checkpoints"


def lambdas(folder: Path, cell: Cell) -> Mapping[str, Any]:
    """The field `lambdas` of the cell's record from what its run wrote; empty where it wrote none."""
    path = checkpoints(folder, cell) / LAMBDA_FILE
    records = read_metrics(path) if path.exists() else []
    return from_lambdas(records) if records else {}


def has_checkpoint(folder: Path, cell: Cell) -> bool:
    return (checkpoints(folder, cell) / TRACKER).exists()


def training_command(folder: Path, cell: Cell, program: Sequence[str]) -> list[str]:
    """The cell's run. One that was stopped goes on from its last checkpoint, if that holds the optimizer too."""
    save = checkpoints(folder, cell)
    goes_on = has_checkpoint(folder, cell) and "--no-save-optim" not in cell.flags
    return [
        *launcher(cell.processes),
        *program,
        *cell.flags,
        "--save",
        str(save),
        *(["--load", str(save)] if goes_on else []),
    ]


def score_command(folder: Path, cell: Cell, score: Score) -> list[str]:
    """The task's command for this cell, on as many processes as it was trained with."""
    words: list[str] = []
    places = {"{output}": str(score_file(folder, cell)), "{checkpoints}": str(checkpoints(folder, cell))}
    for word in score.command:
        if word == "{flags}":
            words += cell.flags
            continue
        for place, text in places.items():
            word = word.replace(place, text)
        words.append(word)
    return [*launcher(cell.processes), *words[1:]] if words[0] == "python" else words


def score_file(folder: Path, cell: Cell) -> Path:
    return run_folder(folder, cell) / "score.json"


def launcher(processes: int, environment: Mapping[str, str] = os.environ) -> list[str]:
    """What starts a program on so many processes: python, torchrun, or torchrun on each node of a SLURM allocation."""
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    nodes = int(environment.get("SLURM_JOB_NUM_NODES", 1))
    if processes == 1:
        return [sys.executable]
    if nodes == 1:
        return [*torchrun, "--standalone", "--nproc-per-node", str(processes)]
    job = int(environment["SLURM_JOB_ID"])
    endpoint = f"{environment['MASTER_ADDR']}:{FIRST_PORT + job % NUM_PORTS}"
    meeting = ["--rdzv-id", str(job), "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint]
    layout = ["--nnodes", str(nodes), "--nproc-per-node", str(processes // nodes)]
    return ["srun", "--kill-on-bad-exit=1", "--ntasks-per-node=1", *torchrun, *layout, *meeting]


@dataclass
class Running:
    """A process that was started, its output going to a log file."""

    process: subprocess.Popen[bytes]
    log: Path
    command: tuple[str, ...]
    started_at: str
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def stop(self) -> None:
        """Ask it to end; a training run saves first."""
        if self.process.poll() is None:
            self.process.terminate()

    def last_words(self) -> str:
        """The end of what this process wrote into the log, at most `LAST_WORDS` characters."""
        text = self.log.read_text(encoding="utf-8", errors="replace").rpartition(_heading(self.command))[2]
        return text.strip()[-LAST_WORDS:].strip() or "it said nothing"


def start(command: Sequence[str], log: Path) -> Running:
    """Start `command`; its output is added to `log`, after the command itself."""
    log.parent.mkdir(parents=True, exist_ok=True)
    died_with_us = signal.SIGTERM if "torch.distributed.run" in command else signal.SIGKILL
    parent = os.getpid()
    with log.open("ab") as output:
        output.write(_heading(command).encode())
        output.flush()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**ENVIRONMENT, **os.environ},
            start_new_session=True,  # Ctrl-C reaches the runner alone, which then asks its cells to end
            preexec_fn=lambda: _end_with(parent, died_with_us),
        )
    return Running(process, log, tuple(command), time.strftime("%Y-%m-%dT%H:%M:%S"))


def _heading(command: Sequence[str]) -> str:
    return f"$ {' '.join(command)}\n"


def _end_with(parent: int, signal_number: int) -> None:
    """In the child: have the kernel send the signal when the runner is gone. Linux only; elsewhere nothing happens."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, int(signal_number))
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
