"""Worlds of one and of two; checks whose outcome all ranks share."""

import gc
import os
import socket
import threading
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_peft.config import ConfigurationError, ParallelConfig
from megatron_peft.parallel.collectives import gathered_by_first_rank
from megatron_peft.runtime import cpu
from megatron_peft.runtime.launch import (
    available_backend,
    checked_together,
    device_setter,
    from_rank,
    start_model_parallel,
    start_world,
    stop_model_parallel,
    world,
)
from tests.one_rank import one_rank
from tests.ranks import run_ranks


def test_a_thread_gets_the_device_of_the_thread_that_started_it(monkeypatch):
    set_by: list[tuple[str, int]] = []
    device_setter()()  # without CUDA nothing happens
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3 if threading.current_thread().name == "main" else 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda at: set_by.append((threading.current_thread().name, at)))
    monkeypatch.setattr(threading.current_thread(), "name", "main")
    thread = threading.Thread(target=device_setter(), name="writer")
    thread.start()
    thread.join()
    assert set_by == [("writer", 3)]


@pytest.mark.parametrize("backend", [None, "gloo"])
def test_nccl_alone_is_bound_to_the_device_of_this_rank(monkeypatch, backend):
    joined: list[dict[str, Any]] = []
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda at: joined.append({"device": at}))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: joined[0]["device"])
    monkeypatch.setattr(dist, "init_process_group", lambda **words: joined.append(words))
    start_world(backend)
    assert joined[1]["device_id"] == (None if backend else torch.device("cuda", 3))


def test_nccl_without_a_gpu_is_gloo_with_a_note_of_the_first_rank(monkeypatch, capsys):
    for rank, told in (("0", "note: --distributed-backend nccl needs a GPU"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        assert available_backend("nccl") == "gloo"
        err = capsys.readouterr().err
        assert err.startswith(told) and bool(err) == bool(told)
    assert [available_backend(name) for name in ("gloo", None)] == ["gloo", "gloo"] and not capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [available_backend(name) for name in ("nccl", "gloo", None)] == ["nccl", "gloo", "nccl"]


@pytest.mark.usefixtures("no_launcher")
def test_groups_of_a_world_that_is_bound_to_a_device_connect_when_they_are_used():
    """torch would split each off the world's, in a call of all ranks, and send single messages one after the other."""
    with world():
        everyone: Any = dist.group.WORLD
        everyone.bound_device_id = device = torch.device("cuda", 3)
        start_model_parallel(ParallelConfig(), seed=1)
        group: Any = parallel_state.get_tensor_model_parallel_group()
        assert group.bound_device_id is None and everyone.bound_device_id == device


def checks_of_a_rank(_: None) -> dict[str, Any]:
    start_world()
    complaints = {"one": "rank 1 lacks a file." * dist.get_rank(), "same": "no such folder."}
    complaints["different"] = f"rank {dist.get_rank()} lacks a file."
    with mock.patch.object(dist, "all_gather_object", side_effect=AssertionError("there is no message to gather")):
        result = checked_together(dist.get_rank)
    found = {"result": result, **{case: _told(it) for case, it in complaints.items()}}
    found["unexpected"] = [_unexpected(collective) for collective in COLLECTIVES_WITH_AN_ERROR]
    start_model_parallel(ParallelConfig(tensor_model_parallel_size=2, world_size=2), seed=1)
    found["common"] = torch.rand(2).tolist()
    with tensor_parallel.get_cuda_rng_tracker().fork():
        found["own"] = torch.rand(2).tolist()
    return found


def _divide_on_rank_1() -> None:
    if dist.get_rank() == 1:
        _ = 1 // 0


COLLECTIVES_WITH_AN_ERROR = {
    "checked_together": lambda: checked_together(_divide_on_rank_1),
    "from_rank": lambda: from_rank(1, _divide_on_rank_1),
    "gathered_by_first_rank": lambda: gathered_by_first_rank(_divide_on_rank_1, list),
}


def _unexpected(collective: str) -> str:
    """The error that a collective raises on this rank if a function has an unexpected one on rank 1."""
    with pytest.raises(Exception) as error:  # noqa: B017, PT011 - it is returned
        COLLECTIVES_WITH_AN_ERROR[collective]()
    return f"{error.type.__name__}: {error.value}"


def _told(complaint: str) -> str:
    """What `checked_together` makes of this rank's complaint, "" for none."""

    def check() -> None:
        if complaint:
            raise ConfigurationError(complaint)

    with pytest.raises(ConfigurationError) as error:
        checked_together(check)
    return str(error.value)


LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def no_launcher(monkeypatch):
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.gpu("world")
@pytest.mark.usefixtures("no_launcher")
def test_without_a_launcher_a_process_is_a_world_of_one(figure):
    before, has_gpu = dict(os.environ), torch.cuda.is_available()
    with world():
        assert (dist.get_rank(), dist.get_world_size()) == (0, 1)
        is_expected = dist.get_backend() == ("nccl" if has_gpu else "gloo")
        figure("another backend than expected", float(not is_expected), 0.0, note=dist.get_backend())
        figure("CUDA calls redirected on a GPU, or not on a CPU", float(cpu._installed == has_gpu), 0.0)
        ones, group = torch.ones(3, device=torch.cuda.current_device()), dist.new_group([0])
        for one in (None, group):
            dist.all_reduce(ones, group=one)
        figure("a sum over one rank changes it", float((ones - 1).abs().max()), 0.0)
        start_model_parallel(ParallelConfig(), seed=1)
        assert parallel_state.get_tensor_model_parallel_world_size() == 1
        assert dict(os.environ) == before
    assert not dist.is_initialized() and not parallel_state.model_parallel_is_initialized()


@pytest.mark.usefixtures("no_launcher")
def test_layouts_of_one_world_leave_nothing_behind(request):
    """gloo's threads above all: a process that tried many layouts would end with a thousand of them."""
    gc.disable()  # what is as large as a model is seldom collected
    request.addfinalizer(gc.enable)
    with world():
        num_threads = []
        for _ in range(3):
            start_model_parallel(ParallelConfig(), seed=1)
            group = parallel_state.get_tensor_model_parallel_group()
            model: list[object] = [group]  # as a model does, which refers to itself
            model.append(model)
            del model
            stop_model_parallel()
            with pytest.raises(ValueError, match="not initialized"):
                dist.get_backend(group)
            num_threads.append(len(os.listdir("/proc/self/task")))
        assert num_threads[-1] == num_threads[1]
        assert not parallel_state.model_parallel_is_initialized()
        dist.barrier()  # the world itself is still there


def test_worlds_of_one_follow_one_another_whatever_the_port_is_used_for(monkeypatch):
    with socket.socket() as other:
        other.bind(("localhost", 0))
        other.listen()
        for name, value in zip(LAUNCHERS, ("0", "1", "0", "localhost", str(other.getsockname()[1])), strict=True):
            monkeypatch.setenv(name, value)
        for number in range(3):
            with world(timeout_minutes=0.1):
                assert checked_together(lambda: number) == number  # noqa: B023 - called at once
                assert dist.get_world_size(dist.new_group()) == 1


def test_the_generators_follow_the_runs_seed():
    draws = []
    for seed in (1, 1, 2):
        with one_rank(seed):
            draws.append(torch.rand(3).tolist())
    assert draws[0] == draws[1] != draws[2]


def test_two_ranks_have_a_common_generator_and_their_own_and_share_failed_checks():
    first, second = run_ranks(2, checks_of_a_rank)
    assert first["common"] == second["common"]
    assert len({tuple(draw) for draw in (first["own"], second["own"], first["common"])}) == 3
    assert (first["result"], second["result"]) == (0, 1), "a check that passes returns each rank's own result"
    for case, message in (
        ("one", "rank 1 lacks a file."),
        ("same", "no such folder."),
        ("different", "rank 0 lacks a file.\nrank 1 lacks a file."),
    ):
        assert (first[case], second[case]) == (message, message), "one message everywhere"
    own_error = "ZeroDivisionError: integer division or modulo by zero"
    assert first["unexpected"] == [f"FailedOnAnotherRank: rank 1: {own_error}"] * len(COLLECTIVES_WITH_AN_ERROR)
    assert second["unexpected"] == [own_error] * len(COLLECTIVES_WITH_AN_ERROR)


def test_a_check_needs_no_device_of_cuda_in_a_world_of_gloo(monkeypatch):
    """Another program's loop has not replaced torch's functions for GPUs as `start_world` does."""
    with one_rank():
        monkeypatch.setattr(torch.cuda, "current_device", mock.Mock(side_effect=RuntimeError("no CUDA")))
        assert checked_together(lambda: 7) == 7


def test_other_errors_of_a_check_are_not_swallowed():
    with one_rank(), pytest.raises(ZeroDivisionError):
        checked_together(lambda: 1 / 0)
