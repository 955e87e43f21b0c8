"""The processes of a cell, here or in a SLURM job: the training in its own folder, then the command of the score.

They end with the runner, however it ends; a cell that trained on would share its folder with the next attempt.
"""

import ctypes
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_peft.config import ConfigurationError
from megatron_peft.experiment.cells import Cell, Group
from megatron_peft.experiment.record import from_lambdas
from megatron_peft.experiment.spec import Choice, Experiment, ScoreSpec
from megatron_peft.training.metrics import read_metrics

PROGRAM = ("-m", "megatron_peft", "train")
TRACKER = "latest_checkpointed_iteration.txt"
LOG = "log.txt"
LAMBDA_FILE = "lambda.jsonl"  # of a Hybrid, beside metrics.jsonl
FIRST_PORT, NUM_PORTS = 20000, 10000  # where the nodes of an allocation meet, by the job's number
LAST_WORDS = 400  # characters
SET_PARENT_DEATH_SIGNAL = 1  # of prctl
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONWARNINGS": "ignore"}


def run_folder(folder: Path, cell: Cell) -> Path:
    """The folder of a cell's checkpoints, metrics, log and score; unlike the cells' records it can be large."""
    return folder / "runs" / cell.key


def checkpoints_folder(folder: Path, cell: Cell) -> Path:
    """--save of the cell's run."""
    return run_folder(folder, cell) / "checkpoints"


def lambdas(folder: Path, cell: Cell) -> Mapping[str, Any]:
    """The field `lambdas` of the cell's record, from its lambda.jsonl; empty if there is none."""
    path = checkpoints_folder(folder, cell) / LAMBDA_FILE
    records = read_metrics(path) if path.exists() else []
    return from_lambdas(records) if records else {}


def has_checkpoint(folder: Path, cell: Cell) -> bool:
    """Whether the cell's run can be resumed."""
    return (checkpoints_folder(folder, cell) / TRACKER).exists()


def training_command(folder: Path, cell: Cell, program: Sequence[str]) -> list[str]:
    """The cell's run. One that was stopped continues from its last checkpoint, if that has the optimizer's state."""
    save = checkpoints_folder(folder, cell)
    goes_on = has_checkpoint(folder, cell) and "--no-save-optim" not in cell.flags
    return [
        *launcher(cell.processes),
        *program,
        *cell.flags,
        "--save",
        str(save),
        *(["--load", str(save)] if goes_on else []),
    ]


def score_command(folder: Path, cell: Cell, score: ScoreSpec) -> list[str]:
    """The task's command for this cell, on as many processes as its training."""
    words: list[str] = []
    places = {"{output}": str(score_file(folder, cell)), "{checkpoints}": str(checkpoints_folder(folder, cell))}
    for word in score.command:
        if word == "{flags}":
            words += cell.flags
            continue
        for place, text in places.items():
            word = word.replace(place, text)
        words.append(word)
    return [*launcher(cell.processes), *words[1:]] if words[0] == "python" else words


def score_file(folder: Path, cell: Cell) -> Path:
    """Where the score's command writes its JSON file."""
    return run_folder(folder, cell) / "score.json"


def launcher(processes: int, environment: Mapping[str, str] = os.environ) -> list[str]:
    """The launcher for so many processes: python, torchrun, or torchrun on each node of a SLURM allocation."""
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    nodes = int(environment.get("SLURM_JOB_NUM_NODES", 1))
    if processes == 1:
        return [sys.executable]
    if nodes == 1:
        return [*torchrun, "--standalone", "--nproc-per-node", str(processes)]
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
    command: tuple[str, ...]
    started_at: str
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Since its start."""
        return time.monotonic() - self.started

    def stop(self) -> None:
        """Send SIGTERM; a training run saves and ends."""
        if self.process.poll() is None:
            self.process.terminate()

    def last_words(self) -> str:
        """The last `LAST_WORDS` characters of this process's log."""
        text = self.log.read_text(encoding="utf-8", errors="replace").rpartition(_heading(self.command))[2]
        return text.strip()[-LAST_WORDS:].strip() or "it wrote nothing"


def start(command: Sequence[str], log: Path) -> Running:
    """Start `command`; the command itself and its output are appended to `log`."""
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
            start_new_session=True,  # Ctrl-C reaches the runner alone, which then stops its cells
            preexec_fn=lambda: _end_with(parent, died_with_us),
        )
    return Running(process, log, tuple(command), time.strftime("%Y-%m-%dT%H:%M:%S"))


def _heading(command: Sequence[str]) -> str:
    return f"$ {' '.join(command)}\n"


def _end_with(parent: int, signal_number: int) -> None:
    """In the child: have the kernel send the signal when the runner dies. Linux only."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, int(signal_number))
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


# An experiment as SLURM job arrays: one array per model, since models differ in nodes, and one array task per group.
# The same program runs a group in one allocation, so a job that is queued again continues from its records.

DEFAULTS = {"nodes": 1, "ntasks-per-node": 1, "exclusive": True, "requeue": True, "open-mode": "append"}
OURS = ("array", "job-name", "signal", "output", "parsable")  # options that the script sets itself
HEAD = """#!/bin/bash
# {title}
#
# bash {name}
# from the root of a clone submits {count} tasks of job arrays, one array a model. A task tunes one method on one
# benchmark, runs its seeds, and leaves a file for each cell under
#   {folder}
# (megatron-peft report shows at any time what is there); submitted again, a task does what is missing. PYTHON names the
# interpreter that the nodes use.
set -euo pipefail
export PYTHON=${{PYTHON:-python}}
mkdir -p {folder}/slurm
"""
JOB = """
sbatch {options} <<'JOB'
#!/bin/bash
set -euo pipefail
cd "${{REPOSITORY:-$SLURM_SUBMIT_DIR}}"
source examples/requeue.sh
groups=(
{groups}
)
group=${{groups[$SLURM_ARRAY_TASK_ID]}}
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR=${{MASTER_ADDR:-${{nodes[0]}}}}
export CUDA_DEVICE_MAX_CONNECTIONS=1 # compute and communication are issued in order, so that they overlap

# Which cells have a record or a score, and how far their runs have got.
progress() {{
    local of_group=${{group//[\\/ ]/_}},
    {{
        find {folder}/cells {folder}/runs -path "*/$of_group*" '(' -path '*/cells/*.json' -o -name score.json ')' | sort
        cat {folder}/runs/"$of_group"*/checkpoints/latest_checkpointed_iteration.txt
    }} 2>/dev/null | cksum
}}

# The runner ends its cell, which goes on from its last checkpoint when the job is queued again.
ask_to_stop() {{
    kill -TERM "$1" 2>/dev/null || true
}}

run_and_requeue {folder}/slurm "$PYTHON" -m megatron_peft experiment {experiment} --output {folder} --group "$group"
JOB
"""


def script(experiment: Experiment, groups: Sequence[Group], file: Path, folder: Path, name: str) -> str:
    """The text of a shell script that submits all of the experiment.

    Args:
        file: the experiment's file, as the nodes see it; folder: of the results; name: of the script.

    Raises:
        ConfigurationError: a model's processes do not divide over its nodes, or an option is the script's own.
    """
    places = {"folder": shlex.quote(str(folder)), "experiment": shlex.quote(str(file))}
    head = HEAD.format(title=experiment.title.replace("\n", " "), name=name, count=len(groups), **places)
    prepare = [shlex.join(command).replace("python ", '"$PYTHON" ', 1) for command in experiment.prepare]
    jobs = [
        JOB.format(
            options=_options(model, [group for group in groups if group.model == model], experiment.name, folder),
            groups="\n".join(f"    {shlex.quote(group.key)}" for group in groups if group.model == model),
            **places,
        )
        for model in experiment.models
    ]
    return "\n".join([head, *prepare]) + "".join(jobs)


def _options(model: Choice, groups: Sequence[Group], name: str, folder: Path) -> str:
    options = {**DEFAULTS, **model.slurm}
    _check(model, options)
    ours = {
        "job-name": f"{name}-{model.name}",
        "array": f"0-{len(groups) - 1}",
        "signal": "B:USR1@300",
        "output": f"{folder}/slurm/%x-%a.out",
    }
    words = [f"--{flag}" if value is True else f"--{flag}={value}" for flag, value in {**options, **ours}.items()]
    return " ".join(shlex.quote(word) for word in words if not word.endswith(("=False", "=None")))


def _check(model: Choice, options: dict[str, object]) -> None:
    for flag in OURS:
        if flag in options:
            raise ConfigurationError(f"models.{model.name}.slurm: --{flag} is set by the script itself.")
    nodes = options["nodes"]
    if not isinstance(nodes, int) or model.processes % nodes:
        raise ConfigurationError(
            f"models.{model.name}: {model.processes} processes do not divide over slurm.nodes: {nodes}; the nodes "
            f"hold the same number each."
        )
