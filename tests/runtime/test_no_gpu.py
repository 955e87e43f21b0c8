"""On a machine with GPUs, what computes on the CPU by design sees none of them. They are simulated."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_peft.benchmarks import SIZES_VARIABLE
from megatron_peft.models.families import config_of_shape
from megatron_peft.models.shape import ModelShape
from megatron_peft.runtime import ranks
from tests.time_limits import seconds

LLAMA = ModelShape("llama", 16, 2048, 8192, 32, 8, 64, 128256, 131072)
SIMULATED = Path(__file__).parents[1] / "simulated_gpus"


def with_gpus() -> dict[str, str]:
    """The environment of a process that finds eight of them."""
    environment = {**os.environ, "PYTHONPATH": f"{SIMULATED}{os.pathsep}{os.environ['PYTHONPATH']}"}
    environment.pop("CUDA_VISIBLE_DEVICES", None)  # which the tests set
    return environment


@pytest.mark.parametrize("words", [[], pytest.param(["rehearse"], marks=pytest.mark.slow)], ids=" ".join)
def test_rehearsals_and_ranks_of_certificates_and_benchmarks_do_not_see_the_gpus(words):
    command = [sys.executable, str(SIMULATED / "program.py"), *words]
    done = subprocess.run(command, env=with_gpus(), capture_output=True, text=True, timeout=seconds(120))
    assert done.returncode == 0, done.stderr
    [[is_simulated, is_available, has_engine, backend]] = json.loads(done.stdout.splitlines()[-1])
    assert is_simulated and not is_available and not has_engine and backend == "gloo"


@pytest.mark.parametrize("sizes", [{}, {SIZES_VARIABLE: "gpu"}], ids=["tests", "check-gpu"])
def test_tests_see_the_gpus_for_check_gpu_alone(sizes):
    code = "import tests.conftest, os, sys; print(os.environ.get('CUDA_VISIBLE_DEVICES'), 'torch' in sys.modules)"
    words, environment = [sys.executable, "-c", code], {**with_gpus(), **sizes}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=seconds(60))
    assert done.stdout == ("None False\n" if sizes else " False\n"), done.stderr


@pytest.mark.slow
def test_a_run_is_certified_on_a_machine_with_gpus(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config_of_shape(LLAMA)))
    flags = f"--world-size 2 --tensor-model-parallel-size 2 --pretrained-checkpoint {tmp_path} --train-iters 10"
    words = [sys.executable, "-m", "megatron_peft", "certify", *flags.split(), "--train-data-path", "not-read.jsonl"]
    done = subprocess.run(words, env=with_gpus(), capture_output=True, text=True, timeout=seconds(600))
    assert done.returncode == 0 and "CERTIFIED" in done.stdout, done.stdout + done.stderr


def test_the_first_to_name_what_the_server_imports_decides(monkeypatch):
    """In tests: else a rehearsal would have the server import what a plug-in's process must import itself."""
    named: list[list[str]] = []
    monkeypatch.setattr(ranks, "_preloaded", [])
    monkeypatch.setattr(ranks, "_server", SimpleNamespace(set_forkserver_preload=named.append))
    monkeypatch.setattr(ranks.os, "environ", {})
    for modules in (["first"], ["second"]):
        ranks.preload(modules)
    assert named == [[ranks.NO_GPU, "first"]]
