"""The processes of a cell, here or in a SLURM job: the training in its own folder, then the command of the score.

They end with the runner, however it ends; a cell that trained on would share its folder with the next attempt.
"""

# Not by submitit: its local jobs survive a runner that is killed, and on SLURM it queues a job again after a time limit
# or a preemption alone, not after a lost node; a job is a pickled function rather than a script that a user can read.

import ctypes
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, PackageLoader

from megatron_peft.checkpoint.folders import tracker_text
from megatron_peft.config import ConfigurationError, require
from megatron_peft.experiment.cells import Cell, Group
from megatron_peft.experiment.spec import Experiment, ScoreSpec

PROGRAM = ("-m", "megatron_peft", "train")
LOG = "log.txt"
FLAGS = "flags.json"  # that a cell's run began with
LAMBDA_FILE = "lambda.jsonl"  # of a Hybrid, beside metrics.jsonl
FIRST_PORT, NUM_PORTS = 20000, 10000  # where the nodes of an allocation meet, by the job's number
LAST_WORDS = 400  # characters
SET_PARENT_DEATH_SIGNAL = 1  # of prctl
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONWARNINGS": "ignore"}
# A run that is stopped saves first, within the five minutes that the script has SLURM give it: torchrun's own patience
# with its ranks is 30 s.
ENVIRONMENT["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = "240"
PATIENCE_SECONDS = 270


def run_folder(folder: Path, cell: Cell) -> Path:
    """The folder of a cell's checkpoints, metrics, log and score; unlike the cells' records it can be large."""
    return folder / "runs" / cell.key


def checkpoints_folder(folder: Path, cell: Cell) -> Path:
    """--save of the cell's run."""
    return run_folder(folder, cell) / "checkpoints"


def score_file(folder: Path, cell: Cell) -> Path:
    """Where the score's command writes its JSON file."""
    return run_folder(folder, cell) / "score.json"


def has_checkpoint(folder: Path, cell: Cell, iteration: int | None = None) -> bool:
    """Whether the cell's run can be resumed, and its newest checkpoint is of `iteration`."""
    named = tracker_text(checkpoints_folder(folder, cell))
    return named != "" if iteration is None else named == str(iteration)


def began_with(folder: Path, flags: str) -> bool:
    """Whether what a cell's run has left in its folder is of these flags."""
    path = folder / FLAGS
    return path.is_file() and path.read_text(encoding="utf-8") == flags


def training_command(folder: Path, cell: Cell, program: Sequence[str]) -> list[str]:
    """The cell's run. If it was stopped, it continues from its last checkpoint that has the optimizer's state."""
    save = str(checkpoints_folder(folder, cell))
    resumes = has_checkpoint(folder, cell) and "--no-save-optim" not in cell.flags
    return [*launcher(cell.processes), *program, *cell.flags, "--save", save, *(["--load", save] if resumes else [])]


def score_command(folder: Path, cell: Cell, score: ScoreSpec) -> list[str]:
    """The task's command for this cell, on as many processes as its training."""
    output, checkpoints = str(score_file(folder, cell)), str(checkpoints_folder(folder, cell))
    words: list[str] = []
    for word in score.command:
        filled = word.replace("{output}", output).replace("{checkpoints}", checkpoints)
        words += cell.flags if word == "{flags}" else [filled.replace("{flags}", shlex.join(cell.flags))]
    return command_of(words, launcher(cell.processes))


def command_of(words: Sequence[str], python: Sequence[str]) -> list[str]:
    """The command of these words, with `python` for python, and for megatron-peft, which need not be on PATH."""
    program, *rest = words
    if program == "megatron-peft":
        return [*python, "-m", "megatron_peft", *rest]
    return [*python, *rest] if program == "python" else [*words]


def launcher(processes: int, environment: Mapping[str, str] = os.environ) -> list[str]:
    """The launcher for so many processes: python, torchrun, or torchrun on each node of a SLURM allocation."""
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
    """A process whose output goes to a log file."""

    process: subprocess.Popen[bytes]
    log: Path
    heading: str  # of its part of the log
    started_at: str = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%S"))
    started: float = field(default_factory=time.monotonic)
    cpu_seconds: float | None = None  # of the process and of those that it waited for, once it has ended

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def has_ended(self) -> bool:
        before = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
        if self.process.poll() is not None and self.cpu_seconds is None:
            self.cpu_seconds = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - before
        return self.cpu_seconds is not None

    def words(self) -> str:
        """This process's part of the log."""
        return self.log.read_text(encoding="utf-8", errors="replace").rpartition(self.heading)[2]

    def last_words(self) -> str:
        """The last `LAST_WORDS` characters of it."""
        return self.words().strip()[-LAST_WORDS:].strip() or "it wrote nothing"


def start(command: Sequence[str], log: Path) -> Running:
    """Start `command`; the command itself and its output are appended to `log`.

    Raises ConfigurationError: there is no such program.
    """
    parent, heading = os.getpid(), f"$ {' '.join(command)}\n"
    # torchrun ends its ranks on SIGTERM; a process alone can be killed at any instant.
    end_signal = signal.SIGTERM if "torch.distributed.run" in command else signal.SIGKILL

    def end_with_parent() -> None:
        """Have the kernel send the signal to this child when the runner dies. Linux only."""
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, int(end_signal))
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
    return Running(process, log, heading)


# An experiment as SLURM job arrays: one array per model, since models differ in nodes, and one array task per group.
# The same program runs a group in one allocation, so a job that is queued again continues from its records.

SCRIPT = "submit.sh.jinja"
DEFAULTS = {"nodes": 1, "ntasks-per-node": 1, "exclusive": True, "requeue": True, "open-mode": "append"}
SET_BY_SCRIPT = ("array", "job-name", "signal", "output", "parsable")


def script(
    experiment: Experiment, groups: Sequence[Group], file: Path, folder: Path, name: str, flags: Sequence[str] = ()
) -> str:
    """The text of a shell script that submits these groups.

    Args: file: the experiment's, as the nodes see it; folder: of the results; name: of the script; flags: of each task.

    Raises ConfigurationError: a model's processes do not divide over its nodes, or an option is the script's own.
    """
    arrays = []
    for model in experiment.models:
        keys = [shlex.quote(group.key) for group in groups if group.model == model]
        if not keys:
            continue
        options = {**DEFAULTS, **model.slurm}
        for flag in SET_BY_SCRIPT:
            require(flag not in options, f"models.{model.name}.slurm: --{flag} is set by the script itself.")
        nodes = options["nodes"]
        require(
            isinstance(nodes, int) and model.processes % nodes == 0,
            f"models.{model.name}: {model.processes} processes do not divide over slurm.nodes: {nodes}; the nodes hold "
            f"the same number each.",
        )
        options |= {"job-name": f"{experiment.name}-{model.name}", "array": f"0-{len(keys) - 1}"}
        options |= {"signal": "B:USR1@300", "output": f"{folder}/slurm/%x-%a.out"}
        given = {flag: value for flag, value in options.items() if value is not False and value is not None}
        words = [f"--{flag}" if value is True else f"--{flag}={value}" for flag, value in given.items()]
        arrays.append((shlex.join(words), keys))
    environment = Environment(
        loader=PackageLoader("megatron_peft.experiment", "."), trim_blocks=True, keep_trailing_newline=True
    )
    return environment.get_template(SCRIPT).render(
        title=experiment.title.replace("\n", " "),
        name=name,
        count=len(groups),
        folder=shlex.quote(str(folder)),
        experiment=shlex.quote(str(file)),
        flags="".join(f" {flag}" for flag in flags),
        prepare=[
            re.sub("^python(?= )", '"$PYTHON"', shlex.join(command_of(words, ["python"])))
            for words in experiment.prepare
        ],
        arrays=arrays,
    )
