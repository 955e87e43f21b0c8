"""The script that submits an experiment, run by bash with stand-ins for SLURM's commands and for python."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from megatron_peft.config import ConfigurationError
from megatron_peft.experiment.process import launcher
from megatron_peft.experiment.slurm import script
from tests.experiment.small_experiment import content, experiment
from tests.time_limits import seconds, wait_until

# Runs the array's tasks one after another, as a scheduler would, or leaves the job for the test to run.
SBATCH = """#!/bin/bash
echo "$@" >>"$RECORD/sbatch"
cat >"$RECORD/job"
[[ -n ${ONLY_SUBMIT:-} ]] && exit
for task in $(seq 0 "$(sed 's/.*--array=0-\\([0-9]*\\).*/\\1/' <<<"$*")"); do
    SLURM_ARRAY_TASK_ID=$task bash "$RECORD/job" || exit
done
"""
SCONTROL = '#!/bin/bash\n[[ $1 == requeue ]] && echo "$2" >>"$RECORD/requeued"\nprintf "n1\\nn2\\n"\n'
PYTHON = """#!/bin/bash
echo "$MASTER_ADDR $*" >>"$RECORD/python"
if [[ -n ${SLOW:-} ]]; then
    trap 'exit 130' TERM
    touch "$RECORD/started"
    for _ in $(seq 100); do sleep 0.1; done
fi
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    commands = tmp_path / "commands"
    commands.mkdir()
    for name, text in {"sbatch": SBATCH, "scontrol": SCONTROL, "fake-python": PYTHON}.items():
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_ARRAY_JOB_ID": "7"}
    path = f"{commands}:{os.environ['PATH']}"
    outside = {name: value for name, value in os.environ.items() if not name.startswith("MASTER_")}
    return {**outside, **slurm, "PATH": path, "PYTHON": "fake-python", "RECORD": str(tmp_path)}


def written(folder: Path, **changes: Any) -> Path:
    found, groups = experiment(folder, **changes)
    path = folder / "submit.sh"
    path.write_text(script(found, groups, Path("small.yaml"), folder / "out put", "submit.sh"))
    return path


def test_each_group_is_one_task_of_its_models_array(tmp_path: Path, environment: dict[str, str]) -> None:
    models = {"tiny": {"slurm": {"time": "1:00:00"}}, "big": {"processes": 16, "slurm": {"nodes": 2}}}
    path = written(tmp_path, models=models, prepare=["python -m make_data"])
    subprocess.run(["bash", str(path)], env=environment, check=True, cwd=tmp_path)
    ran = (tmp_path / "python").read_text().splitlines()
    assert ran[0].split() == ["-m", "make_data"]
    groups = [f"{model},talk,{method}" for model in ("tiny", "big") for method in ("lora", "boft")]
    assert ran[1:] == [
        f"n1 tools/experiment.py small.yaml --output {tmp_path}/out put --group {group}" for group in groups
    ]
    tiny, big = (tmp_path / "sbatch").read_text().splitlines()
    assert "--nodes=1 " in tiny and "--time=1:00:00" in tiny and "--array=0-1" in tiny and "--exclusive" in tiny
    assert "--nodes=2 " in big and "--job-name=small-big" in big


def test_job_whose_time_is_up_stops_its_runner_and_is_queued_again(tmp_path: Path, environment: dict[str, str]) -> None:
    subprocess.run(["bash", str(written(tmp_path))], env={**environment, "ONLY_SUBMIT": "1"}, check=True, cwd=tmp_path)
    environment |= {"SLURM_ARRAY_TASK_ID": "1", "SLOW": "1"}
    with subprocess.Popen(["bash", str(tmp_path / "job")], env=environment, cwd=tmp_path) as job:
        wait_until((tmp_path / "started").exists, "the start of the step")
        job.send_signal(signal.SIGUSR1)
        assert job.wait(seconds(60)) == 0
    assert (tmp_path / "requeued").read_text() == "7_1\n"


def test_shellcheck_is_clean(tmp_path: Path) -> None:
    found = shutil.which("shellcheck", path=sysconfig.get_path("scripts")) or shutil.which("shellcheck")
    if found is None:
        pytest.skip("shellcheck is not installed (pip install -e '.[dev]')")
    checked = subprocess.run([found, str(written(tmp_path))], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"processes": 8, "slurm": {"nodes": 3}}, "8 processes do not divide over slurm.nodes: 3"),
        ({"slurm": {"array": "0-3"}}, "models.tiny.slurm: --array is set by the script itself"),
    ],
)
def test_models_that_do_not_fit_are_told(tmp_path: Path, model: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        written(tmp_path, models={"tiny": {**content()["models"]["tiny"], **model}})


def test_cell_in_an_allocation_is_spread_over_its_nodes() -> None:
    allocation = {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "12345678", "MASTER_ADDR": "n1"}
    words = launcher(16, allocation)
    assert words[:3] == ["srun", "--kill-on-bad-exit=1", "--ntasks-per-node=1"]
    assert words[words.index("--nnodes") + 1] == "2" and words[words.index("--nproc-per-node") + 1] == "8"
    assert words[words.index("--rdzv-endpoint") + 1] == "n1:25678"
    assert "--standalone" in launcher(16, {}) and "srun" not in launcher(1, allocation)
