"""Command lines of a cell's processes, and the script that submits an experiment. Kills are in test_runner.py.

The script is run by bash with stand-ins for SLURM's commands and for python.
"""

import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_peft.checkpoint.folders import TRACKER
from megatron_peft.config import ConfigurationError
from megatron_peft.experiment import process
from megatron_peft.experiment.cells import Cell
from megatron_peft.experiment.process import command_of
from megatron_peft.experiment.slurm import render_script
from megatron_peft.experiment.spec import ScoreSpec
from tests.experiment.small_experiment import content, experiment
from tests.time_limits import seconds, wait_until

CELL = Cell("tiny", "talk", "lora", {"lr": "0.1"}, 1, ("--lr", "0.1"))

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
    slurm = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_ID": "8", "SLURM_ARRAY_JOB_ID": "7"}
    paths = {
        "REPOSITORY": str(Path(__file__).parents[2]),
        "PATH": f"{commands}:{os.environ['PATH']}",
        "PYTHON": "fake-python",
        "RECORD": str(tmp_path),
    }
    return {**{name: os.environ[name] for name in os.environ if not name.startswith("MASTER_")}, **slurm, **paths}


def written(folder: Path, **changes: Any) -> Path:
    found, groups = experiment(folder, **changes)
    path = folder / "submit.sh"
    path.write_text(render_script(found, groups, Path("small.yaml"), folder / "out put", "submit.sh"))
    return path


def test_each_group_is_one_task_of_its_models_array(tmp_path: Path, environment: dict[str, str]) -> None:
    models = {"tiny": {"slurm": {"time": "1:00:00"}}, "big": {"processes": 16, "slurm": {"nodes": 2}}}
    path = written(tmp_path, models=models, prepare=["python -m make_data"])
    subprocess.run(["bash", str(path)], env=environment, check=True, cwd=tmp_path)
    ran = (tmp_path / "python").read_text().splitlines()
    assert ran[0].split() == ["-m", "make_data"]
    groups = [f"{model},talk,{method}" for model in ("tiny", "big") for method in ("lora", "boft")]
    assert ran[1:] == [
        f"n1 -m megatron_peft experiment small.yaml --output {tmp_path}/out put --group {group}" for group in groups
    ]
    tiny, big = (tmp_path / "sbatch").read_text().splitlines()
    assert "--nodes=1 " in tiny and "--time=1:00:00" in tiny and "--array=0-1" in tiny and "--exclusive" in tiny
    assert "--nodes=2 " in big and "--job-name=small-big" in big


def test_data_are_prepared_with_the_programs_own_python(tmp_path: Path, environment: dict[str, str]) -> None:
    path = written(tmp_path, prepare=["megatron-peft data prepare sst2", "echo megatron-peft"])
    subprocess.run(["bash", str(path)], env=environment, check=True, cwd=tmp_path)
    assert (tmp_path / "python").read_text().splitlines()[0].split()[
        -5:
    ] == "-m megatron_peft data prepare sst2".split()
    assert command_of(("megatron-peft", "x"), ["py"]) == ["py", "-m", "megatron_peft", "x"]
    assert command_of(("python", "x"), ["py"]) == ["py", "x"] and command_of(("x", "python"), ["py"]) == ["x", "python"]


def test_a_stopped_run_has_the_time_that_slurm_leaves_it_to_save() -> None:
    assert int(process.ENVIRONMENT["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < process.TIMEOUT_S < 300


def test_a_group_alone_is_submitted_with_the_flags_of_the_call(tmp_path: Path, environment: dict[str, str]) -> None:
    models: dict[str, Any] = {"tiny": {}, "big": {"processes": 16, "slurm": {"nodes": 2}}}
    found, groups = experiment(tmp_path, models=models, prepare=["echo /usr/bin/python x"])
    path = tmp_path / "submit.sh"
    path.write_text(render_script(found, groups[:1], Path("small.yaml"), Path("out"), "submit.sh", ["--jobs", "2"]))
    told = subprocess.check_output(["bash", str(path)], env=environment, cwd=tmp_path, text=True)
    assert told == "/usr/bin/python x\n" and len((tmp_path / "sbatch").read_text().splitlines()) == 1
    command = "-m megatron_peft experiment small.yaml --output out --group tiny,talk,lora --jobs 2"
    assert (tmp_path / "python").read_text() == f"n1 {command}\n"


def test_job_whose_time_is_up_stops_its_runner_and_is_queued_again(tmp_path: Path, environment: dict[str, str]) -> None:
    subprocess.run(["bash", str(written(tmp_path))], env={**environment, "ONLY_SUBMIT": "1"}, check=True, cwd=tmp_path)
    environment |= {"SLURM_ARRAY_TASK_ID": "1", "SLOW": "1"}
    with subprocess.Popen(["bash", str(tmp_path / "job")], env=environment, cwd=tmp_path) as job:
        wait_until((tmp_path / "started").exists, "the start of the step")
        job.send_signal(signal.SIGUSR1)
        assert job.wait(seconds(60)) == 130
    assert (tmp_path / "requeued").read_text() == "7_1\n"


def test_shellcheck_is_clean(tmp_path: Path) -> None:
    found = shutil.which("shellcheck", path=sysconfig.get_path("scripts")) or shutil.which("shellcheck")
    if found is None:
        pytest.skip("shellcheck is not installed (make lint)")
    checked = subprocess.run([found, str(written(tmp_path))], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"processes": 8, "slurm": {"nodes": 3}}, "8 processes do not divide over slurm.nodes: 3"),
        ({"slurm": {"array": "0-3"}}, "models.tiny.slurm: --array is set by the script itself"),
    ],
)
def test_models_that_do_not_fit_are_errors(tmp_path: Path, model: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        written(tmp_path, models={"tiny": {**content()["models"]["tiny"], **model}})


def test_launcher_uses_the_machine_or_spreads_a_cell_over_the_nodes_of_its_job() -> None:
    allocation = {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "12345678", "MASTER_ADDR": "n1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    assert process.launcher(1, allocation) == [sys.executable]
    assert process.launcher(3, {}) == process.launcher(3, {"SLURM_JOB_NUM_NODES": "1"}) == torchrun
    words = process.launcher(16, allocation)
    assert words[:3] == ["srun", "--kill-on-bad-exit=0", "--wait=60"] and "--standalone" not in words
    given = dict(zip(words, words[1:], strict=False))
    assert given["--nnodes"] == "2" and given["--nproc-per-node"] == "8"
    assert given["--rdzv-endpoint"] == "n1:25678", "a port of the job's own"
    del allocation["MASTER_ADDR"]
    for processes in (16, 3):
        with pytest.raises(ConfigurationError, match=f"{processes} processes on the 2 nodes .* MASTER_ADDR"):
            process.launcher(processes, allocation)


def test_a_program_that_is_not_there_is_an_error_and_our_own_need_not_be_on_the_path(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no-such-program cannot be started .No such file"):
        process.start(["no-such-program"], tmp_path / "log.txt", ThreadPoolExecutor(1))
    words = process.score_command(tmp_path, CELL, ScoreSpec(("megatron-peft", "evaluate", "--limit", "3"), {}))
    assert words == [sys.executable, "-m", "megatron_peft", "evaluate", "--limit", "3"]


def test_a_stopped_cell_continues_with_an_optimizers_state_and_a_score_gets_its_places_and_flags(tmp_path: Path):
    saved = process.checkpoints_folder(tmp_path, CELL)
    expected = [sys.executable, "train.py", "--lr", "0.1", "--save", str(saved)]
    assert process.training_command(tmp_path, CELL, ["train.py"]) == expected
    saved.mkdir(parents=True)
    (saved / TRACKER).write_text("5")
    assert process.training_command(tmp_path, CELL, ["train.py"]) == [*expected, "--load", str(saved)]
    assert "--load" not in process.training_command(tmp_path, replace(CELL, flags=("--no-save-optim",)), ["train.py"])
    score = ScoreSpec(("python", "score.py", "--out={output}", "{checkpoints}", "{flags}", "run {flags}; x"), {})
    places = f"--out={process.score_file(tmp_path, CELL)}", str(process.checkpoints_folder(tmp_path, CELL))
    expected = [sys.executable, "score.py", *places, "--lr", "0.1", "run --lr 0.1; x"]
    assert process.score_command(tmp_path, CELL, score) == expected


def test_last_words_are_those_of_the_last_command(tmp_path: Path) -> None:
    for command, words in ((["echo", "1"], "1"), (["echo", "2"], "2"), (["true"], "it wrote nothing")):
        running = process.start(command, tmp_path / "runs" / "log.txt", ThreadPoolExecutor(1))
        assert running.wait() == 0 and running.cpu_seconds < 10
        assert running.output_end() == words
