"""An experiment as SLURM job arrays: one array per model, since models differ in nodes, and one task per group.

Each task runs `megatron-peft experiment --group`, so a job that is queued again continues from its records. submitit
would pickle a function, and requeues after a time limit or preemption alone, not after a lost node; the script here is
short, and a user can read it.
"""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader

from megatron_peft.config import require
from megatron_peft.experiment.cells import Group
from megatron_peft.experiment.process import command_of
from megatron_peft.experiment.spec import Experiment

SCRIPT = "submit.sh.jinja"
DEFAULTS = {"nodes": 1, "ntasks-per-node": 1, "exclusive": True, "requeue": True, "open-mode": "append"}
SET_BY_SCRIPT = ("array", "job-name", "signal", "output", "parsable")


def render_script(
    experiment: Experiment, groups: Sequence[Group], file: Path, folder: Path, name: str, flags: Sequence[str] = ()
) -> str:
    """Return a shell script that submits these groups.

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
    commands = (shlex.join(command_of(words, ["python"])) for words in experiment.prepare)
    return environment.get_template(SCRIPT).render(
        title=experiment.title.replace("\n", " "),
        name=name,
        count=len(groups),
        folder=shlex.quote(str(folder)),
        experiment=shlex.quote(str(file)),
        flags="".join(f" {flag}" for flag in flags),
        prepare=[re.sub("^python(?= )", '"$PYTHON"', command) for command in commands],
        arrays=arrays,
    )
