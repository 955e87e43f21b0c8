"""What a run asks of its hosts is counted as it is, and ranks that are not there ask what real ones would."""

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_peft.benchmarks import scale
from megatron_peft.benchmarks.absent_ranks import Grid, Moved
from megatron_peft.benchmarks.measure import Costs, Meter
from megatron_peft.benchmarks.scale import Phases
from megatron_peft.checkpoint.tensors import Written, WrittenSlice
from megatron_peft.config import RunConfig
from megatron_peft.runtime.launch import start_world, stop_model_parallel
from tests.ranks import run_ranks
from tests.tiny_llama import save_llama
from tests.training.layout_runs import Job


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scale")
    save_llama(folder / "base")
    # Records of one length: the shares of absent ranks begin as far apart as those of the others.
    (folder / "pairs.jsonl").write_text('{"prompt": "1 2 3", "completion": " 4 5"}\n' * 32)
    return folder


def config_of(files: Path, grid: Grid, name: str, **peft: Any) -> RunConfig:
    job = Job(
        *("", str(files / "base"), str(files / "pairs.jsonl")),
        parallel={"tensor_model_parallel_size": grid.tensor},
        peft=peft,
        checkpoint={"save": str(files / name / "save")},
        logging={"log_straggler": True},
        num_steps=4,
    )
    (files / name).mkdir()
    return job.config(grid.world_size)


def on_real_ranks(config: RunConfig) -> Phases:
    """Started on ranks."""
    start_world()
    with Meter() as meter:
        scale.run_phases(config, meter)
        stop_model_parallel()
        scale.run_phases(replace(config, checkpoint=replace(config.checkpoint, load=config.checkpoint.save)), meter)
    return meter.phases


@pytest.fixture(scope="module")
def real(files: Path) -> dict[int, list[Phases]]:
    """By number of replicas, the phases of each rank."""
    grids = [Grid(2, 2, 1), Grid(2, 4, 1)]
    return {
        grid.data: run_ranks(grid.world_size, on_real_ranks, config_of(files, grid, f"real {grid.data}"))
        for grid in grids
    }


def test_twice_the_replicas_ask_for_twice_as_much_and_not_for_four_times(real: dict[int, list[Phases]]) -> None:
    assert [*real[2][1]] == ["start", "save", "background save", "log line", "resume", "long log"]
    assert {*real[2][0]} - {*real[2][1]} == {"save of a full index", "read of a full index"}
    for phase in real[2][1]:
        of_two, of_four = ([one[phase] for one in real[replicas]] for replicas in (2, 4))
        assert max(one.gathers for one in of_two) == max(one.gathers for one in of_four), phase
        assert sum(one.opened for one in of_four) <= 2 * sum(one.opened for one in of_two), phase
        if phase not in ("background save", "log line"):  # no bytes but the meter's own
            assert sum(one.read_bytes for one in of_four) <= 2.1 * sum(one.read_bytes for one in of_two), phase
        for rank, one in enumerate(of_two):
            assert of_four[rank].object_bytes <= 2 * one.object_bytes, phase


@pytest.mark.slow
def test_a_resume_reads_each_byte_of_a_checkpoint_once_from_the_disk(files: Path, tmp_path: Path) -> None:
    """A rank reads its files to verify them, and again to load them: then the host has them in memory."""
    save_llama(tmp_path / "base", hidden_size=192, intermediate_size=512)
    (tmp_path / "pairs.jsonl").symlink_to(files / "pairs.jsonl")
    config = config_of(tmp_path, Grid(2, 2, 1), "full", method="full")
    by_rank = run_ranks(4, on_real_ranks, config)
    num_bytes = sum(path.stat().st_size for path in (tmp_path / "full" / "save" / "iter_0000001").iterdir())
    from_disk = sum(phases["resume"].disk_bytes for phases in by_rank)
    if not from_disk:
        pytest.skip("no disk: the files are in memory alone")
    assert 0.9 * num_bytes < from_disk < 1.1 * num_bytes


def added_in_the_background(phases: Phases) -> int:
    """Descriptors that an asynchronous save takes; the first rank of a real world is the host of its store too."""
    return phases["background save"].descriptors - phases["save"].descriptors


def test_an_asynchronous_save_takes_as_many_descriptors_whatever_the_number_of_ranks(real) -> None:
    assert {added_in_the_background(phases) for ranks in real.values() for phases in ranks[1:]} == {1}


@pytest.mark.slow
def test_absent_ranks_cost_what_real_ones_cost(files: Path, real: dict[int, list[Phases]]) -> None:
    grid = Grid(2, 4, 1)
    assert grid.running() == (0, 1, 2, 3, 4, 5)
    simulated = scale.phases_of(grid, config_of(files, grid, "fake 4"))  # as many letters as "real 4"
    for found, true in ((simulated[rank], real[4][rank]) for rank in (0, 3)):
        for phase, costs in found.items():
            assert costs.gathers == true[phase].gathers, phase
            assert costs.object_bytes == pytest.approx(true[phase].object_bytes, rel=0.02), phase
            assert costs.opened == pytest.approx(true[phase].opened, abs=4), phase  # a resume is that of new processes
        assert found["save"].opened == true["save"].opened
        assert found["save"].read_bytes == pytest.approx(true["save"].read_bytes, rel=0.1)
    assert added_in_the_background(simulated[3]) == added_in_the_background(real[4][3])


def test_a_pickle_moves_as_far_as_its_neighbour_is_away() -> None:
    def given(tensor: int, stage: int) -> Any:
        size = torch.Size([200 * tensor, 7])
        names = {f"rng.tp{tensor}of8-pp{stage}of16": size, "crc": f"0000000{tensor}", "random": "tmpx" + "abcd"[stage]}
        return names, f"__{tensor + 8 * stage}_0.distcp", f"tokens-{stage:05}.arrow", np.arange(3) + 1000 * stage

    moved = Moved(pickle.dumps(given(1, 0), 0), {0: pickle.dumps(given(2, 0), 0), 2: pickle.dumps(given(1, 1), 0)})
    names, *others, array = moved.at({0: 4, 2: 3})
    true_names, *true_others, true_array = given(5, 3)
    assert names == true_names | {"crc": "00000001", "random": "tmpxa"}  # a checksum and a random name say no rank
    assert others == true_others and array.tolist() == true_array.tolist()
    assert Moved(pickle.dumps([1], 0), {0: pickle.dumps([2, 3], 0)}).at({0: 4}) == [1]


@pytest.mark.parametrize("grid, num_running", [(Grid(8, 1, 16), 5), (Grid(8, 8, 16), 12), (Grid(8, 128, 16), 12)])
def test_every_absent_rank_is_like_a_running_one(grid: Grid, num_running: int) -> None:
    running = grid.running()
    assert len(running) == num_running and running[0] == 0
    for rank in range(0, grid.world_size, 37):
        anchor = grid.anchor(rank)
        assert anchor in running
        for axis, (at, from_) in enumerate(zip(grid.place(rank), grid.place(anchor), strict=True)):
            assert at == from_ or grid.neighbours(anchor)[axis] in running


def test_figures_name_the_first_rank_another_and_all() -> None:
    first, other = Costs(2.9, 15, 18_800, 155), Costs(0.2, 15, 659, 5, descriptors=300)
    save, most = scale.figures_of(Grid(8, 1, 16), {0: {"save": first}, 1: {"save": other}})
    assert (save.name, save.measured, save.target, save.reached) == ("128 ranks, save", 2.9, 2.0, False)
    assert save.note.startswith("cpu seconds 2.9 | 0.2 | 28.3; gathers 15 | 15 | 1,920; object bytes 1.88e+04 | 659 |")
    assert "opened 155 | 5 | 790" in save.note
    assert (most.measured, most.target, most.reached) == (300, 256, False)
    (save, _) = scale.figures_of(Grid(8, 128, 16), {0: {"save": first}, 9: {"save": other}})
    assert save.target is None


def test_an_optimizers_states_are_cut_over_the_replicas_and_parameters_are_not(monkeypatch) -> None:
    names = ("w", "optimizer.exp_avg.w")
    slices = [WrittenSlice(name, torch.float32, (6, 2), (2, 0), (2, 2), "__0_0.distcp", 0, 16) for name in names]
    rest = [part._replace(offset=(at, 0)) for part in slices for at in (0, 4)]
    found: list[Written] = []
    monkeypatch.setattr(scale, "complete_files", lambda folder, by_rank: found.extend(by_rank))
    monkeypatch.setattr(scale, "read_metadata", lambda folder: None)
    with Meter() as meter:
        scale._write_index([Written(slices, {}), Written(rest, {})], 3, meter)
    offsets = {
        name: sorted(one.offset[0] for each in found for one in each.slices if one.key == name) for name in names
    }
    assert offsets == {"w": [0, 2, 4], "optimizer.exp_avg.w": [0, 2, 4, 6, 8, 10, 12, 14, 16]}
    assert {one.global_shape for each in found for one in each.slices} == {(6, 2), (18, 2)}
