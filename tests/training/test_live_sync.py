"""--sync-server: what is given is what a checkpoint of that step holds, at any layout; and a run never ends for it."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.utils._pytree import tree_leaves

from megatron_peft.checkpoint.save import draft_checkpoint
from megatron_peft.config import ConfigurationError
from megatron_peft.conversion.lora_approximation import approximate
from megatron_peft.conversion.peft_export import in_own_form
from megatron_peft.conversion.trained_adapters import TrainedAdapters, gathered_adapters, open_run
from megatron_peft.data.samples import PackedOrder
from megatron_peft.models.families import read_shape
from megatron_peft.parallel.collectives import awaited_from_first_rank
from megatron_peft.runtime.launch import start_world
from megatron_peft.serving.sync import Sync, started_sync
from megatron_peft.training import live_sync as module
from megatron_peft.training.live_sync import LiveSync
from megatron_peft.training.step import train_step
from tests.one_rank import one_rank
from tests.ranks import run_ranks
from tests.tiny_llama import save_llama, save_pairs
from tests.training.layout_runs import Job, built, merged
from tests.training.test_layout import INTERLEAVED, OVERLAPPED, PADDED, PP2, RECOMPUTE, RUNS, SP, TP2

NUM_STEPS = 3
CASES: dict[int, list[tuple[str, dict[str, Any]]]] = {
    2: [
        ("lora", {"parallel": TP2}),
        ("hybrid", {"parallel": SP}),
        ("lora", {"parallel": PP2}),
        ("lora-packed", {"parallel": INTERLEAVED, **PADDED}),
        ("lora", OVERLAPPED),
    ],
    4: [("hybrid", {"parallel": {**TP2, **PP2}, "transformer": RECOMPUTE})],
}
METHODS = ("lora", "hybrid", "lora-packed")
SAVED = {"no_save_optim": True, "no_save_rng": True}
Given = tuple[float | None, dict[str, Tensor]]
Found = tuple[Given, dict[str, Tensor], list[bool], list[str]]


def job_of(method: str, layout: dict[str, Any], files: tuple[str, str], folder: Path) -> Job:
    server = {"sync_server": "http://localhost:1", "sync_interval": NUM_STEPS, "save": str(folder), **SAVED}
    return Job(method, *files, **merged({"parallel": {}}, RUNS[method], layout, {"checkpoint": server}))


def tensors_of(run: TrainedAdapters, base: str) -> dict[str, Tensor]:
    """In the form that is served: as they are, or as a LoRA."""
    if run.record.config.peft.method == "lora":
        return dict(in_own_form(run).tensors())
    lora = approximate(run, Path(base), 1e-6, 512, progress=False)
    return {f"{one.module}": one.factors.B @ one.factors.A for one in lora.modules}


def given_and_saved(jobs: list[Job]) -> list[Found | None]:
    """Of each job what is given after its last step and what a checkpoint of that step holds, on the first rank."""
    start_world()
    return [given_by(job) for job in jobs]


@contextmanager
def objects_without_tensors() -> Iterator[None]:
    """Refuse pickled tensors of other ranks: with NCCL an object is in the GPU memory of every rank that gets it."""
    unpickled, received = distributed_c10d._tensor_to_object, list[Any]()

    def note(*arguments: Any) -> Any:
        received.append(unpickled(*arguments))
        return received[-1]

    with mock.patch.object(distributed_c10d, "_tensor_to_object", note):
        yield
    assert received and not any(isinstance(leaf, Tensor) for leaf in tree_leaves(received))


def given_by(job: Job) -> Found | None:
    given = list[Given]()

    class Recorded(Sync):
        def start(self) -> None:
            pass

        def give(self, run: Any, own: float | None, asked: Any) -> str:
            given.append((own, tensors_of(run, job.base)))
            return f"gave {run.record.position['iteration']}"

    module.started_sync = lambda settings, peft, shape, base, run, **_: Recorded(settings, Path(str(base)), run)
    awaits = mock.patch.object(module, "awaited_from_first_rank", side_effect=awaited_from_first_rank)
    try:
        with awaits as awaited, built(job) as (state, data):
            live, told = LiveSync(state.config, read_shape(job.base), data), list[str]()
            is_packed = [isinstance(batches.order, PackedOrder) for batches in (live._batches, data.train)]
            steps = iter(data.train)
            is_split = dist.get_world_size() > 1
            for step in range(NUM_STEPS):
                train_step(state, next(steps))
                state.position.iteration += 1
                with objects_without_tensors() if is_split and step == NUM_STEPS - 1 else nullcontext():
                    told.append(live.after_step(state, False))
            checkpoint = draft_checkpoint(state).complete()
        assert awaited.call_count == 1, "the others wait longer than a collective may"
    finally:
        module.started_sync = started_sync
    if not given:
        return None
    return given[0], tensors_of(open_run(checkpoint.parent), job.base), is_packed, told


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("files")
    base = save_llama(folder / "base", intermediate_size=64)
    return str(base), str(save_pairs(folder / "pairs.jsonl"))


@pytest.fixture(scope="module")
def alone(files, tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("alone")
    with one_rank(with_groups=False):
        return {method: given_by(job_of(method, {}, files, folder / method)) for method in METHODS}


@pytest.mark.parametrize("num_ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_what_is_given_is_what_a_checkpoint_holds_and_the_number_is_that_of_one_process(
    num_ranks, alone, files, tmp_path
):
    cases = CASES[num_ranks]
    jobs = [job_of(method, layout, files, tmp_path / f"{at}") for at, (method, layout) in enumerate(cases)]
    first, *others = run_ranks(num_ranks, given_and_saved, jobs)
    assert all(one is None for of_rank in others for one in of_rank)
    for case, ((own, tensors), saved, is_packed, told) in zip(cases, first, strict=True):
        assert told == ["", "", f"gave {NUM_STEPS}"]
        assert is_packed == [case[0] == "lora-packed"] * 2
        (own_alone, alone_tensors), *_ = alone[case[0]]
        assert own == pytest.approx(own_alone, abs=1e-5), case
        assert tensors.keys() == saved.keys() == alone_tensors.keys()
        for key, tensor in tensors.items():
            assert torch.equal(tensor, saved[key]), (case, key)
            torch.testing.assert_close(tensor, alone_tensors[key], rtol=1e-4, atol=1e-5)


def test_adapters_of_a_run_that_has_diverged_are_not_given(files, tmp_path):
    with one_rank(with_groups=False), built(job_of("lora", {}, files, tmp_path)) as (state, _):
        trained = (one for one in state.model_chunks[0].parameters() if one.requires_grad)
        next(trained).data.fill_(torch.nan)
        run = gathered_adapters(state)
        assert run is not None
        with pytest.raises(ConfigurationError, match="decoder.* holds NaN or infinities: training has diverged"):
            dict(in_own_form(run).tensors())
