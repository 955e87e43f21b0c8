"""Garbage collection at agreed steps, and which steps of which ranks are profiled."""

import gc
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from megatron_peft.config import LoggingConfig, TrainingConfig
from megatron_peft.training import upkeep
from megatron_peft.training.upkeep import Upkeep


def run(monkeypatch: pytest.MonkeyPatch, rank: int, training: dict, logging: dict, num_steps: int) -> list:
    """What happens in a run, in order: steps by number, collections, and starts and stops of CUDA's profiler."""
    happened = []
    monkeypatch.setattr(dist, "get_rank", lambda: rank)
    monkeypatch.setattr(upkeep.gc, "collect", lambda generation=2: happened.append(f"collect {generation}"))
    runtime = SimpleNamespace(
        cudaProfilerStart=lambda: happened.append("start"), cudaProfilerStop=lambda: happened.append("stop")
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "check_error", lambda result: None)
    monkeypatch.setattr(torch.autograd.profiler, "emit_nvtx", lambda record_shapes: nullcontext())
    config = SimpleNamespace(training=TrainingConfig(**training), logging=LoggingConfig(**logging))
    with Upkeep(config) as tended:  # pyright: ignore[reportArgumentType]
        happened.append(gc.isenabled())
        for finished in range(num_steps):
            tended.before_step(finished)
            happened.append(finished + 1)
            tended.after_step(finished + 1)
        with tended.around_validation():
            happened.append("validation")
    assert gc.isenabled()
    return happened


@pytest.mark.parametrize(
    ("training", "expected"),
    [
        ({}, [True, 1, 2, 3, "validation"]),
        ({"manual_gc": True}, ["collect 2", False, 1, 2, 3, "collect 2", "validation", "collect 0"]),
        (
            {"manual_gc": True, "manual_gc_interval": 2, "manual_gc_eval": False},
            ["collect 2", False, 1, 2, "collect 2", 3, "validation"],
        ),
    ],
)
def test_garbage_is_collected_when_it_is_asked_for(training, expected, monkeypatch):
    assert run(monkeypatch, 0, training, {}, num_steps=3) == expected


@pytest.mark.parametrize(
    ("rank", "num_steps", "expected"),
    [
        (1, 5, [1, 2, "start", 3, 4, "stop", 5, "validation"]),
        (0, 5, [1, 2, 3, 4, 5, "validation"]),
        (3, 3, [1, 2, "start", 3, "validation", "stop"]),  # a run that ends within them
    ],
)
def test_nsight_sees_the_steps_between_start_and_end_on_the_ranks_that_are_named(
    rank, num_steps, expected, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    logging = {"profile": True, "profile_step_start": 2, "profile_step_end": 4, "profile_ranks": (1, 3)}
    happened = run(monkeypatch, rank, {}, logging, num_steps)
    assert happened == [True, *expected]


def test_memorys_history_is_written_on_the_ranks_that_are_named_also_after_an_error(tmp_path, monkeypatch, caplog):
    logging = {"record_memory_history": True, "memory_snapshot_path": str(tmp_path / "new" / "s.pickle")}
    run(monkeypatch, 3, {}, {**logging, "profile_ranks": (1, 3)}, num_steps=1)
    assert "--record-memory-history needs a GPU" in caplog.text
    happened = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **told: happened.append(told))
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: happened.append(path))
    run(monkeypatch, 0, {}, {**logging, "profile_ranks": (1, 3)}, num_steps=1)
    assert happened == []
    monkeypatch.setattr(dist, "get_rank", lambda: 3)
    config = SimpleNamespace(training=TrainingConfig(), logging=LoggingConfig(**logging, profile_ranks=(1, 3)))
    with pytest.raises(MemoryError), Upkeep(config):  # pyright: ignore[reportArgumentType]
        raise MemoryError
    expected = str(tmp_path / "new" / "s.rank3.pickle")
    assert happened == [{"max_entries": upkeep.MOST_ALLOCATIONS}, expected, {"enabled": None}]
    assert (tmp_path / "new").is_dir()
