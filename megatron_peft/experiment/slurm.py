"""An experiment as SLURM job arrays: one array a model, since models differ in nodes, and one array task a group.

A group (model, task, method) tunes and then runs its seeds in one allocation, by tools/experiment.py itself; so a job
that is queued again goes on from the files of its cells.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path

from megatron_peft.config import ConfigurationError
from megatron_peft.experiment.cells import Group
from megatron_peft.experiment.spec import Choice, Experiment

DEFAULTS = {"nodes": 1, "ntasks-per-node": 1, "exclusive": True, "requeue": True, "open-mode": "append"}
OURS = ("array", "job-name", "signal", "output", "parsable")  # options that the script sets itself
HEAD = """#!/bin/bash
# {title}
#
# bash {name}
# from the root of a clone submits {count} tasks of job arrays, one array a model. A task tunes one method on one
# benchmark, runs its seeds, and leaves a file for each cell under
#   {folder}
# (tools/report.py shows at any time what is there); submitted again, a task does what is missing. PYTHON names the
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
groups=(
{groups}
)
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR=${{nodes[0]}}
export CUDA_DEVICE_MAX_CONNECTIONS=1 # compute and communication are issued in order, so that they overlap
"$PYTHON" tools/experiment.py {experiment} --output {folder} --group "${{groups[$SLURM_ARRAY_TASK_ID]}}" &
runner=$!
signalled=false
# Time is nearly up: the runner ends its cell, which goes on from its last checkpoint when the job is queued again.
trap 'signalled=true; kill -TERM "$runner" || true' USR1
while kill -0 "$runner" 2>/dev/null; do
    wait "$runner" || true
done
code=0
wait "$runner" || code=$?
if "$signalled" && ((code == 130)); then
    scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID"
    code=0
fi
exit "$code"
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
