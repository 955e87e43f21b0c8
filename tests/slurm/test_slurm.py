"""Faults on a real SLURM of two nodes: `make test-slurm`. One cluster serves all tests; it leaves /etc/slurm alone."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.evaluation.local_tasks import write_tasks
from tests.evaluation.worded_llama import WORDS, save_worded_llama, save_worded_pairs
from tests.slurm.cluster import Cluster, missing_programs
from tests.time_limits import seconds, wait_until
from tests.tiny_llama import save_llama

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(seconds(1500))]
ROOT = Path(__file__).parents[2]
SYSTEM_FOLDERS = [*map(Path, ("/etc/slurm", "/etc/munge", "/run/slurm", "/run/slurmctld", "/var/spool/slurmctld"))]
NUM_PREEMPTIONS, NUM_LOST_NODES = 20, 5
ENDS = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
STEPS_OF_A_LIFE = 4  # at least, before it is disturbed
SAME = ("iteration", "loss", "grad_norm", "learning_rate", "consumed_samples", "consumed_tokens", "validation_loss")
# Instead of the script's own: these nodes have no GPUs.
OPTIONS = ["--nodes=2", "--gpus-per-node=0", "--cpus-per-task=1", "--time=30"]
RECIPE = {
    **{"seq-length": 24, "micro-batch-size": 1, "global-batch-size": 2, "tensor-model-parallel-size": 2},
    **{"peft-method": "lora", "lora-rank": 4, "lora-dropout": 0.1, "lr": 1e-3, "lr-decay-style": "constant"},
    **{"log-interval": 1, "save-interval": 5, "keep-last-checkpoints": 2},
    **{"distributed-timeout-minutes": 2, "distributed-timeout-seconds-after-init": 60},
}


@dataclass(frozen=True)
class Site:
    """A cluster with a model, data and a recipe."""

    cluster: Cluster
    folder: Path

    def finetune(self, save: Path, *flags: str, options: list[str] | None = None, **environment: str) -> int:
        """Submit examples/finetune.sbatch; the job's number."""
        words = [*OPTIONS, *(options or []), f"--output={self.folder}/{save.name}-%j.out"]
        script = [str(ROOT / "examples" / "finetune.sbatch"), str(self.folder / "recipe.yaml"), *flags]
        return self.cluster.sbatch(*words, *script, SAVE=str(save), **{**self.environment, **environment})

    @property
    def environment(self) -> dict[str, str]:
        """What a user exports before sbatch."""
        return {
            "REPOSITORY": str(ROOT),
            "PYTHON": sys.executable,
            "CHECKPOINT": str(self.folder / "model"),
            "TRAIN_DATA": str(self.folder / "pairs.jsonl"),
            "GPUS_PER_NODE": "1",
            "OMP_NUM_THREADS": "1",
            "ASK_AGAIN_SECONDS": "2",
            "MASTER_ADDR": "127.0.0.1",  # n1 is no host's name
        }

    def until_end(self, job: int | str, limit: float = 300) -> str:
        return self.cluster.wait_for_state(job, ENDS, limit)


def _contents(folders: list[Path]) -> dict[str, tuple[int, float]]:
    files = [path for folder in folders if folder.exists() for path in [folder, *folder.rglob("*")]]
    return {str(path): (path.stat().st_size, path.stat().st_mtime) for path in files}


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    if missing := missing_programs():
        pytest.fail(f"SLURM is not installed ({', '.join(missing)} missing): make test-slurm installs it, as root")
    if os.getuid() != 0:
        pytest.fail("nodes start steps for their users, which takes root: run make test-slurm as root")
    # Not pytest's own folder: it keeps the last three, and other tests on this machine would remove this one.
    with tempfile.TemporaryDirectory(prefix="megatron-peft-slurm-", ignore_cleanup_errors=True) as folder:
        yield from _site(Path(folder))


def _site(folder: Path) -> Iterator[Site]:
    before = _contents(SYSTEM_FOLDERS)
    save_worded_llama(folder / "model")
    save_llama(folder / "model", num_hidden_layers=2)  # with the other's tokenizer
    save_worded_pairs(folder / "pairs.jsonl")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    with Cluster(folder / "cluster") as cluster:
        yield Site(cluster, folder)
    assert _contents(SYSTEM_FOLDERS) == before, "the system's own configuration was touched"


def records_of(save: Path) -> list[dict[str, Any]]:
    """What is compared, of metrics.jsonl; the last line may be half written."""
    path = save / "metrics.jsonl"
    found = []
    with suppress(ValueError):
        for line in path.read_text().splitlines() if path.exists() else []:
            found.append(json.loads(line))
    return [{name: record[name] for name in SAME if name in record} for record in found]


def iteration_of(save: Path) -> int:
    records = records_of(save)
    return records[-1]["iteration"] if records else 0


def wait_for(site: Site, job: int, condition: Callable[[], bool], limit: float) -> None:
    """A job that waits to be queued again is helped on, and one that ends first is an error."""
    end = time.monotonic() + seconds(limit)
    while not condition():
        is_late, state = time.monotonic() > end, site.cluster.state(job)
        assert not is_late and state not in ENDS, f"{site.cluster.job(job)}\n{site.cluster.output(job)[-3000:]}"
        site.cluster.start_now(job)
        time.sleep(0.1)


def wait_for_iteration(site: Site, job: int, save: Path, iteration: int) -> None:
    wait_for(site, job, lambda: iteration_of(save) >= iteration, 180)


def wait_for_restart(site: Site, job: int, number: int, limit: float = 120) -> None:
    """Until it was queued again for the `number`-th time and runs."""
    cluster = site.cluster
    wait_for(site, job, lambda: cluster.restarts(job) >= number and cluster.state(job) == "RUNNING", limit)


def wait_for_requeue(site: Site, job: int | str, number: int, limit: float = 180) -> None:
    wait_until(lambda: site.cluster.restarts(job) >= number, f"requeue {number} of job {job}", limit)


def step_has_begun(site: Site, job: int) -> bool:
    return bool(site.cluster.run("squeue", "--noheader", "--steps", f"{job}.0", check=False))


LONG = ("--train-iters", "100000", "--eval-interval", "100")


def test_losses_after_twenty_preemptions_and_five_lost_nodes_are_those_of_an_undisturbed_run(site: Site) -> None:
    """Bit for bit, and each step once. Every tenth is a job with a higher priority, the others a signal.

    The undisturbed run is the second, as long as the first has got, so that the speed of the machine does not matter.
    """
    cluster, save, quiet = site.cluster, site.folder / "disturbed", site.folder / "quiet"
    job = site.finetune(save, *LONG)
    preemptions = lost = 0
    for number in range(NUM_PREEMPTIONS + NUM_LOST_NODES):
        wait_for_iteration(site, job, save, iteration_of(save) + STEPS_OF_A_LIFE)
        if number % 5 == 4:
            node = ("n2", "n1")[lost % 2]  # the second holds the batch script
            cluster.kill_node(node)
            lost += 1
            wait_for_requeue(site, job, number + 1)
            cluster.start_node(node)  # it comes back
        elif number % 10 == 3:
            other = cluster.sbatch("--partition=high", "--nodes=2", "--output=/dev/null", "--wrap=sleep 1")
            preemptions += 1
            assert cluster.wait_for_state(other, ("COMPLETED",)) == "COMPLETED"
        else:
            cluster.run("scancel", "--batch", "--signal=USR1", str(job))
            preemptions += 1
        wait_for_restart(site, job, number + 1)
        print(f"{number + 1}: {preemptions} preemptions, {lost} lost nodes, iteration {iteration_of(save)}", flush=True)
    wait_for_iteration(site, job, save, iteration_of(save) + STEPS_OF_A_LIFE)
    cluster.run("scancel", str(job))
    assert site.until_end(job) == "CANCELLED" and (preemptions, lost) == (NUM_PREEMPTIONS, NUM_LOST_NODES)
    assert cluster.restarts(job) == NUM_PREEMPTIONS + NUM_LOST_NODES, "a cancelled job is not queued again"
    disturbed = records_of(save)
    alone = site.finetune(quiet, "--train-iters", str(len(disturbed)), *LONG[2:])
    assert site.until_end(alone, 600) == "COMPLETED", cluster.output(alone)
    assert [record["iteration"] for record in disturbed] == [*range(1, len(disturbed) + 1)]
    assert without_last_validation(disturbed) == without_last_validation(records_of(quiet))
    assert not (quiet / "stacks").exists() and not list(quiet.glob(".starts.*")), "nothing is left of a run that ended"


def without_last_validation(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A run validates after its last step, wherever that is."""
    last = {name: value for name, value in records[-1].items() if name != "validation_loss"}
    return [*records[:-1], last]


def test_a_signal_before_training_ends_the_start_at_once_and_loses_nothing(site: Site) -> None:
    save = site.folder / "early"
    job = site.finetune(save, "--train-iters", "20")
    site.cluster.wait_for_state(job, ("RUNNING",))
    wait_until(lambda: step_has_begun(site, job), "the job's step")
    site.cluster.run("scancel", "--batch", "--signal=USR1", str(job))
    wait_for_restart(site, job, 1)
    assert iteration_of(save) == 0, "it came too late for this test"
    assert site.until_end(job) == "COMPLETED", site.cluster.output(job)
    told = site.cluster.output(job)
    assert told.count("SIGUSR1 while no step was running: the run ends, and nothing is lost") == 1, told
    assert "Traceback" not in told and [record["iteration"] for record in records_of(save)] == [*range(1, 21)]


def test_a_time_limit_saves_and_requeues_and_a_cancelled_job_stays_so(site: Site) -> None:
    """SLURM's limits are whole minutes, and its signals up to half a minute early."""
    save = site.folder / "limited"
    job = site.finetune(save, *LONG, options=[f"--time={ceil(seconds(120) / 60)}", "--signal=B:USR1@30"])
    wait_for_restart(site, job, 1, 240)
    saved = int((save / "latest_checkpointed_iteration.txt").read_text())
    assert saved == iteration_of(save) > 0, "it was asked to save, and lost no step"
    wait_for_iteration(site, job, save, saved + STEPS_OF_A_LIFE)
    site.cluster.run("scancel", str(job))
    assert site.until_end(job) == "CANCELLED"
    time.sleep(5)
    assert (site.cluster.state(job), site.cluster.restarts(job)) == ("CANCELLED", 1), site.cluster.output(job)


def test_a_run_that_hangs_at_its_time_limit_is_queued_again(site: Site, tmp_path: Path) -> None:
    python = program(tmp_path, "trap '' USR1 TERM; while true; do sleep 1; done")
    job = site.finetune(site.folder / "hung", options=["--time=1", "--signal=B:USR1@10"], PYTHON=python)
    wait_for_requeue(site, job, 1, 180)
    site.cluster.run("scancel", str(job))
    assert "DUE TO TIME LIMIT" in site.cluster.output(job), site.cluster.output(job)


def program(folder: Path, text: str) -> str:
    """A script in python's place."""
    path = folder / "python"
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_requeues_without_progress_are_counted_and_a_wrong_flag_causes_none(site: Site, tmp_path: Path) -> None:
    stuck = site.finetune(site.folder / "stuck", PYTHON=program(tmp_path, "echo started; exit 1"), MAX_REQUEUES="2")
    assert site.until_end(stuck) == "FAILED"
    told = site.cluster.output(stuck)
    assert site.cluster.restarts(stuck) == 2 and told.count("started") == 2 * 3, told
    assert "2 requeues in a row have not got beyond the start (MAX_REQUEUES=2)" in told
    wrong = site.finetune(site.folder / "wrong", "--lr", "-1")
    assert site.until_end(wrong) == "FAILED" and site.cluster.restarts(wrong) == 0, site.cluster.output(wrong)
    assert "--lr is -1" in site.cluster.output(wrong)


def has_run(runs: Path, method: str) -> bool:
    return any(iteration_of(save) > 10 for save in runs.glob(f"*{method}*/checkpoints"))


def num_answers(output: Path) -> int:
    """Of an evaluation that is not done yet."""
    requests = output.with_suffix(".requests.jsonl")
    return requests.read_text().count("\n") if requests.exists() else 0


def test_an_array_of_an_experiment_goes_on_after_a_signal_and_a_lost_node(site: Site) -> None:
    cluster, folder = site.cluster, site.folder / "experiment"
    flags = {name: value for name, value in RECIPE.items() if name not in ("lr", "peft-method", "lora-rank")}
    pairs, rates = str(site.folder / "pairs.jsonl"), {"lr": [1e-3, 2e-3]}
    blocks = {"boft-block-size": 2, "boft-factors": 2}
    nodes = {"slurm": {"nodes": 2, "time": "20", "cpus-per-task": 1}}
    content = {
        "title": "Two methods",
        "flags": {**flags, "train-iters": 150},
        "models": {"tiny": {"flags": {"pretrained-checkpoint": str(site.folder / "model")}, "processes": 2, **nodes}},
        "tasks": {"pairs": {"flags": {"train-data-path": pairs, "valid-data-path": pairs}}},
        "methods": {"lora": {"grid": rates}, "boft": {"flags": blocks, "grid": rates}},
        "seeds": [1],
        "tuning_seed": 1,
    }
    (site.folder / "two.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    script = site.folder / "submit.sh"
    words = ["-m", "megatron_peft", "experiment", str(site.folder / "two.yaml"), "--output", str(folder)]
    subprocess.run([sys.executable, *words, "--emit-slurm", str(script)], check=True, cwd=ROOT)
    jobs = cluster.run("bash", str(script), **{**site.environment, "SBATCH_OUTPUT": ""})
    array = int(re.findall(r"\d+", jobs)[-1])

    first, second = f"{array}_0", f"{array}_1"
    running = folder / "runs"
    cluster.wait_for_state(first, ("RUNNING",))
    wait_until(lambda: has_run(running, "lora"), "a run", 120)
    cluster.run("scancel", "--batch", "--signal=USR1", first)
    wait_for_requeue(site, first, 1)
    wait_until(lambda: has_run(running, "boft"), "the other task", 180)
    cluster.kill_node("n2")
    wait_for_requeue(site, second, 1)
    cluster.start_node("n2")
    for task in (first, second):
        assert site.until_end(task, 400) == "COMPLETED", cluster.job(task)
    records = [json.loads(path.read_text()) for path in (folder / "cells").glob("*.json")]
    assert len(records) == 4 and {record["status"] for record in records} == {"trained"}


def test_an_evaluation_goes_on_where_it_was_preempted(site: Site) -> None:
    cluster, folder = site.cluster, site.folder
    tasks = write_tasks(folder / "tasks", WORDS[:50], num_questions=400)
    words = ["--pretrained-checkpoint", str(folder / "model"), "--tasks", "tiny_answers", "--include-path", str(tasks)]
    words += ["--tensor-model-parallel-size", "2", "--seq-length", "128", "--batch-size", "2", "--log-samples"]
    scores: list[dict[str, Any]] = []
    for name in ("evaluated", "preempted"):
        output = folder / f"{name}.json"
        options = [*OPTIONS, f"--output={folder}/{name}-%j.out", str(ROOT / "examples" / "evaluate.sbatch")]
        job = cluster.sbatch(*options, *words, OUTPUT=str(output), **site.environment)
        if name == "preempted":
            cluster.wait_for_state(job, ("RUNNING",))
            wait_until(lambda output=output: num_answers(output) > 20, "answers", 120)
            cluster.run("scancel", "--batch", "--signal=USR1", str(job))
            wait_for_restart(site, job, 1)
        assert site.until_end(job) == "COMPLETED", cluster.output(job)
        scores.append(json.loads(output.read_text())["results"])
        shutil.copy(output, folder / f"{name}.kept.json")
    assert scores[0] == scores[1]
