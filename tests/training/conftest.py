"""A small base model and data on disk, and jobs that train it in the test's own process."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from megatron_peft.runtime.launch import stop_model_parallel
from megatron_peft.training.run import finetune
from tests.benchmarks import gpu_subjects as subjects
from tests.one_rank import one_rank
from tests.tiny_llama import save_llama, save_pairs
from tests.training.layout_runs import Job, build


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> tuple[str, str]:
    """(base model, samples)"""
    folder = tmp_path_factory.mktemp("training")
    base = save_llama(folder / "base", num_hidden_layers=2)
    return str(base), str(save_pairs(folder / "pairs.jsonl"))


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> str:
    """The model of check-gpu."""
    return subjects.save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def job(files) -> Callable[..., Job]:
    """A job of 4 steps of LoRA, with changes of its groups."""

    def make(**groups: Any) -> Job:
        base, data = files
        return Job(**{"name": "job", "base": base, "data": data, "peft": {"lora_rank": 4}, "num_steps": 4, **groups})

    return make


@pytest.fixture(scope="module")
def world():
    with one_rank(with_groups=False):
        yield


@pytest.fixture(scope="module")
def run(job, world) -> Callable[..., None]:
    """Fine-tune a job's configuration, with other fields of the job."""

    def fine_tuned(**fields: Any) -> None:
        try:
            plain = job(logging={"log_interval": 1}, training={"micro_batch_size": 8})
            finetune(replace(plain, **fields).config(1))
        finally:
            stop_model_parallel()

    return fine_tuned


@pytest.fixture(scope="module")
def alone():
    with one_rank():
        yield


@pytest.fixture
def start(job, alone) -> Callable[..., Any]:
    """(state, data) of a job, built in a world of one."""

    def started(**groups: Any) -> Any:
        return build(job(**groups).config(1))

    return started
