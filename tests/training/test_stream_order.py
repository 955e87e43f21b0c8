"""Every asynchronous collective and message is waited for before its result is read or its buffer is used again."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from tabulate import tabulate

from megatron_peft.certify.runs import Curve
from megatron_peft.parallel import collectives
from megatron_peft.runtime.launch import start_world
from tests.ranks import run_ranks
from tests.tiny_llama import save_llama
from tests.training.layout_runs import Job, merged, run_each
from tests.training.stream_order import in_stream_order
from tests.training.test_layout import LAYOUTS, METHODS, OVERLAPPED, PP2, REFUSED, SP

# megatron-core's interleaved schedule drops the handle of the last activation that the first stage sends in a step.
# NCCL's group keeps a tensor until it is sent, from torch 2.8 on, and the next stage waits for it: no harm is done.
DROPPED = "nobody waits: isend at p2p_communication.py"
NUM_STEPS = 2
# Dropout is off in all of them, as it is where layouts are compared.
WORLDS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP2+SP": (2, LAYOUTS["TP2+SP"]),
    "PP2 interleaved": (2, LAYOUTS["PP2 interleaved, padded"]),
    "DP2 overlapped": (2, LAYOUTS["DP2 overlapped"]),
    "TP2+SP x PP2 x DP2 overlapped": (8, merged({"parallel": {**SP, **PP2}}, OVERLAPPED)),
}
OVERLAPS = ("DP2 overlapped", "TP2+SP x PP2 x DP2 overlapped")


@dataclass(frozen=True)
class Found:
    """Of a variant on a rank: whether all its numbers are the plain run's, its asynchronous calls, what is wrong."""

    is_same: bool
    num_calls: int
    problems: list[str]


def compared(asked: tuple[list[Job], Sequence[str]]) -> list[dict[str, Found]]:
    """Each job as it is and in stream order, where in turn waits for these operations are taken away ("": none)."""
    start_world()
    jobs, taken_away = asked
    plain, found = run_each(jobs), []
    for operation in taken_away:
        if operation == "ours":
            collectives._finished = lambda work, result: result
        found.append({job.name: _in_stream_order(job, operation, plain[job.name].curve) for job in jobs})
    return found


def _in_stream_order(job: Job, operation: str, plain: Curve) -> Found:
    with in_stream_order([operation]) as report:
        is_same = run_each([job])[job.name].curve == plain
    return Found(is_same, len(report.calls), report.end())


def variants(files: tuple[str, str], layout: str) -> list[Job]:
    refused = {method for method, other in REFUSED if other == "DP2 overlapped"} if layout in OVERLAPS else set()
    chosen = {name: groups for name, groups in METHODS.items() if name not in refused}
    few = {"training": {"global_batch_size": 8, "eval_iters": 1}}
    return [
        Job(name, *files, num_steps=NUM_STEPS, **merged(groups, WORLDS[layout][1], few))
        for name, groups in chosen.items()
    ]


@pytest.fixture(scope="module")
def four_layers(files, tmp_path_factory) -> tuple[str, str]:
    return str(save_llama(tmp_path_factory.mktemp("stream") / "base")), files[1]


def test_adapters_wait_for_their_sums_and_a_wait_that_is_missing_is_seen(files):
    jobs = [without_checks(job) for job in variants(files, "TP2+SP") if job.name == "lora"]
    for whole, broken in run_ranks(2, compared, (jobs, ("", "ours"))):
        assert whole["lora"].is_same and whole["lora"].num_calls > 20 and not whole["lora"].problems
        assert not broken["lora"].is_same and any("nobody waits" in one for one in broken["lora"].problems)


def without_checks(job: Job) -> Job:
    return replace(job, training={**job.training, "check_for_nan_in_loss_and_grad": False})


@pytest.mark.slow
@pytest.mark.parametrize("layout", WORLDS)
def test_every_method_trains_the_same_in_stream_order(four_layers, capsys, layout):
    by_rank = [found for (found,) in run_ranks(WORLDS[layout][0], compared, (variants(four_layers, layout), [""]), 600)]
    rows = [
        (
            name,
            all(rank[name].is_same for rank in by_rank),
            sum(rank[name].num_calls for rank in by_rank),
            [problem for rank in by_rank for problem in rank[name].problems if problem != DROPPED],
        )
        for name in by_rank[0]
    ]
    dropped = {rank["lora"].problems.count(DROPPED) for rank in by_rank}
    with capsys.disabled():
        table = [(name, "yes" if same else "NO", calls, len(problems)) for name, same, calls, problems in rows]
        print("\n" + tabulate(table, [layout, "same numbers", "asynchronous calls", "problems"]))
    assert all(same and calls and not problems for _, same, calls, problems in rows), rows
    assert dropped == ({0, NUM_STEPS} if layout == "PP2 interleaved" else {0})


TAKEN_AWAY = {
    "TP2+SP": ("all_gather_into_tensor", "reduce_scatter_tensor", "ours"),
    "PP2 interleaved": ("irecv", "isend"),
    "DP2 overlapped": ("all_gather_into_tensor", "reduce_scatter_tensor"),
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", TAKEN_AWAY)
def test_each_wait_that_is_taken_away_is_reported(four_layers, layout):
    jobs = [without_checks(job) for job in variants(four_layers, layout) if job.name == "lora"]
    for found in run_ranks(2, compared, (jobs, TAKEN_AWAY[layout])):
        for operation, broken in zip(TAKEN_AWAY[layout], found, strict=True):
            at_most = NUM_STEPS if operation == "isend" else 0  # of the unbroken run
            assert sum("nobody waits" in one for one in broken["lora"].problems) > at_most, operation
            # A message that is sent from a buffer does not change when nobody waits for it.
            assert operation == "isend" or not broken["lora"].is_same, operation
