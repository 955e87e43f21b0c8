"""The commands of a cell: its training in a directory of its own, then the command of the score."""

import ctypes
import os
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from pathlib import Path

from megatron_peft.checkpoint.folders import tracker_text
from megatron_peft.config import ConfigurationError, require
from megatron_peft.experiment.cells import Cell
from megatron_peft.experiment.spec import ScoreSpec

PROGRAM = ("-m", "megatron_peft", "train")
LOG = "log.txt"
FLAGS = "flags.json"  # that a cell's run began with
LAMBDA_FILE = "lambda.jsonl"  # of a Hybrid, beside metrics.jsonl
FIRST_PORT, NUM_PORTS = 20000, 10000  # where the nodes of an allocation meet, by the job's number
MAX_CHARACTERS = 400  # of a log's end
PR_SET_PDEATHSIG = 1  # of prctl
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONWARNINGS": "ignore"}
# A run that is stopped saves first, within the five minutes that the script has SLURM give it: torchrun's own timeout
# for its ranks is 30 s.
ENVIRONMENT["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = "240"
TIMEOUT_S = 270


def run_folder(folder: Path, cell: Cell) -> Path:
    """Return the directory of a cell's checkpoints, metrics, log and score; unlike the records it can be large."""
    return folder / "runs" / cell.key


def checkpoints_folder(folder: Path, cell: Cell) -> Path:
    """Return --save of the cell's run."""
    return run_folder(folder, cell) / "checkpoints"


def score_file(folder: Path, cell: Cell) -> Path:
    """Return the path of the JSON file that the score's command writes."""
    return run_folder(folder, cell) / "score.json"


def has_checkpoint(folder: Path, cell: Cell, iteration: int | None = None) -> bool:
    """Return True if the cell's run can be resumed, and its newest checkpoint is of `iteration`."""
    named = tracker_text(checkpoints_folder(folder, cell))
    return named != "" if iteration is None else named == str(iteration)


def training_command(folder: Path, cell: Cell, program: Sequence[str]) -> list[str]:
    """Return the cell's run. A stopped one continues from its last checkpoint that has the optimizer's state."""
    save = str(checkpoints_folder(folder, cell))
    resumes = has_checkpoint(folder, cell) and "--no-save-optim" not in cell.flags
    return [*launcher(cell.processes), *program, *cell.flags, "--save", save, *(["--load", save] if resumes else [])]


def score_command(folder: Path, cell: Cell, score: ScoreSpec) -> list[str]:
    """Return the task's command for this cell, on as many processes as its training."""
    output, checkpoints = str(score_file(folder, cell)), str(checkpoints_folder(folder, cell))
    words: list[str] = []
    for word in score.command:
        filled = word.replace("{output}", output).replace("{checkpoints}", checkpoints)
        words += cell.flags if word == "{flags}" else [filled.replace("{flags}", shlex.join(cell.flags))]
    return command_of(words, launcher(cell.processes))


def command_of(words: Sequence[str], python: Sequence[str]) -> list[str]:
    """Return the words, with `python` for python, and for megatron-peft, which need not be on PATH."""
    program, *rest = words
    if program == "megatron-peft":
        return [*python, "-m", "megatron_peft", *rest]
    return [*python, *rest] if program == "python" else [*words]


def launcher(processes: int, environment: Mapping[str, str] = os.environ) -> list[str]:
    """Return the launcher for so many processes: python, torchrun, or torchrun on each node of a SLURM allocation."""
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    nodes = int(environment.get("SLURM_JOB_NUM_NODES", 1))
    if processes == 1:
        return [sys.executable]
    if nodes == 1:
        return [*torchrun, "--standalone", "--nproc-per-node", str(processes)]
    require(
        "MASTER_ADDR" in environment and processes % nodes == 0,
        f"{processes} processes on the {nodes} nodes of this allocation: their number must be a multiple of that of "
        "the nodes, and MASTER_ADDR the first node's name, as the script of --emit-slurm sets it.",
    )
    job = int(environment["SLURM_JOB_ID"])
    start = int(environment.get("SLURM_RESTART_COUNT", 0))
    endpoint = f"{environment['MASTER_ADDR']}:{FIRST_PORT + (job + 7 * start) % NUM_PORTS}"
    meeting = ["--rdzv-id", f"{job}-{start}", "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint]
    layout = ["--nnodes", str(nodes), "--nproc-per-node", str(processes // nodes)]
    # When one node's torchrun has ended, the others have a minute to end by themselves, with their ranks' exit code.
    return ["srun", "--kill-on-bad-exit=0", "--wait=60", "--ntasks-per-node=1", *torchrun, *layout, *meeting]


@dataclass
class Running:
    """A process whose output goes to a log file. `ended`: its pid, status and usage, of it and of its own children."""

    process: subprocess.Popen[bytes]
    log: Path
    heading: str  # of its part of the log
    ended: Future[tuple[int, int, resource.struct_rusage]]
    started_at: str = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%S"))
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    @property
    def cpu_seconds(self) -> float:
        usage = self.ended.result()[2]
        return usage.ru_utime + usage.ru_stime

    def wait(self) -> int:
        """Return the exit code; that of a signal is negative."""
        self.process.returncode = os.waitstatus_to_exitcode(self.ended.result()[1])
        return self.process.returncode

    def output(self) -> str:
        """Return this process's part of the log."""
        return self.log.read_text(encoding="utf-8", errors="replace").rpartition(self.heading)[2]

    def output_end(self) -> str:
        return self.output().strip()[-MAX_CHARACTERS:].strip() or "it wrote nothing"


def start(command: Sequence[str], log: Path, pool: Executor) -> Running:
    """Start `command`, for whose end a thread of `pool` waits; the command and its output are appended to `log`.

    It ends with the runner, even one that is killed: training on, it would share its directory with the next attempt.

    Raises ConfigurationError: there is no such program.
    """
    parent, heading = os.getpid(), f"$ {' '.join(command)}\n"
    # torchrun ends its ranks on SIGTERM; a process alone can be killed at any instant.
    end_signal = signal.SIGTERM if "torch.distributed.run" in command else signal.SIGKILL

    def end_with_parent() -> None:
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(end_signal))
            if os.getppid() != parent:
                os.kill(os.getpid(), signal.SIGKILL)

    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        output.write(heading.encode())
        output.flush()
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**ENVIRONMENT, **os.environ},
                start_new_session=True,  # Ctrl-C reaches the runner alone, which then stops its cells
                preexec_fn=end_with_parent,
            )
        except OSError as error:
            raise ConfigurationError(f"{command[0]} cannot be started ({error.strerror}).") from error
    return Running(process, log, heading, pool.submit(os.wait4, process.pid, 0))
