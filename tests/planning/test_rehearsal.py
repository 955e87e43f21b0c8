"""A rehearsed rank makes the calls, computes the products and holds the memory of a real one."""

from collections.abc import Sequence
from itertools import zip_longest

import pytest

from megatron_peft.planning.record import RankRecord
from megatron_peft.planning.rehearsal import rehearse
from tests.planning.watched_runs import METHODS, Watched, real_records, watched
from tests.ranks import run_ranks
from tests.tiny_llama import save_llama, save_pairs


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("rehearsal")
    return str(save_llama(folder / "llama")), str(save_pairs(folder / "pairs.jsonl"))


def check_equal(runs: Sequence[Watched]) -> None:
    """The record of every rank of every run, rehearsed and real."""
    size = runs[0].world_size
    real = run_ranks(size, real_records, list(runs))
    places = [(run, rank) for run in runs for rank in range(size)]
    rehearsed = rehearse([run.of_rank(rank) for run, rank in places])
    problems = [
        f"{run.job.name}, rank {rank}: {problem}"
        for (run, rank), found in zip(places, rehearsed, strict=True)
        if (problem := difference(found, real[rank][run.job.name]))
    ]
    assert not problems, "\n".join(problems)


def difference(rehearsed: RankRecord, real: RankRecord) -> str:
    for number, (ours, theirs) in enumerate(zip_longest(rehearsed.calls, real.calls)):
        if ours != theirs:
            return f"call {number}: {ours} rehearsed, {theirs} real"
    if rehearsed.products != real.products:
        return f"products: {rehearsed.products.items() ^ real.products.items()}"
    if rehearsed.peaks["step"] != real.peaks["step"]:
        return f"peak: {rehearsed.peaks['step'].items() ^ real.peaks['step'].items()}"
    return "" if rehearsed.parameters == real.parameters else "parameters"


def test_rehearsed_ranks_are_those_of_two_processes(files):
    check_equal(watched(files, 2, ["lora"]) + watched(files, 2, ["hybrid"], ["TP2+SP"]))


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_rehearsed_ranks_of_every_method_are_those_of_real_processes(files, world_size):
    check_equal(watched(files, world_size, METHODS))
