"""A rehearsed rank makes the calls, computes the products and holds the memory of a real one."""

import math
import os
import pickle
import resource
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest

from megatron_peft.certify.certify import save_model
from megatron_peft.rehearsal import rehearsal
from megatron_peft.rehearsal.program import PHASES, Call, Mark, RankRecord
from megatron_peft.rehearsal.rehearsal import kept_processes, rehearse
from megatron_peft.rehearsal.rehearsed_rank import rehearse_rank
from megatron_peft.rehearsal.requests import RankToRehearse, enough_microbatches
from megatron_peft.runtime.progress import no_progress
from tests.plan.recorded import products
from tests.ranks import run_ranks
from tests.rehearsal.watched_runs import LAYOUTS, METHODS, SHAPE, Watched, profiled_peaks, real_records, watched
from tests.time_limits import seconds
from tools.published import LLAMA_405B, made_up_run

MESSAGES_UNDER_WAY = 4
HEADERS = 2**15  # bytes of the messages with the files' headers, if gloo's threads have not let go of them
NOT_OVERLAPPED = ("lora bounded", "projection", "riemannian")  # a step's end needs whole parameters: refused


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A model, and data that nobody reads."""
    folder = tmp_path_factory.mktemp("rehearsal")
    save_model(SHAPE, folder / "llama")
    return str(folder / "llama"), "not-read.jsonl"


@pytest.fixture(scope="module")
def runs(files) -> dict[str, RankToRehearse]:
    """Those of the quick tests; of the pipeline one with as many microbatches as are enough, and one with more."""
    alone = {method: watched(files, 1, [method], ["alone"])[0].of_rank(0) for method in ("hybrid", "full", "lora")}
    many = replace(watched(files, 2, ["lora"], ["PP2 interleaved"])[0].of_rank(0), num_microbatches=6)
    enough = enough_microbatches(many.config, many.stage, 100)
    assert enough < 6
    interleaved = {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1}
    full = made_up_run("full", 64, 4, world_size=4, **interleaved)
    of_full = RankToRehearse.of(full, SHAPE, 2, peaks=False)
    return {
        **alone,
        "many": many,
        "few": replace(many, num_microbatches=enough, num_waiting=6 - enough),
        "of full": of_full,
    }


@pytest.fixture(scope="module")
def records(runs) -> dict[str, RankRecord]:
    """Rehearsed in the same processes."""
    return dict(zip(runs, rehearse([*runs.values()]), strict=True))


def check_equal(runs: Sequence[Watched], rehearsed: Sequence[RankRecord] = ()) -> None:
    """The record of every rank of every run, rehearsed and real."""
    size = runs[0].world_size
    real = run_ranks(size, real_records, list(runs))
    places = [(run, rank) for run in runs for rank in range(size)]
    rehearsed = rehearsed or rehearse([run.of_rank(rank) for run, rank in places])
    problems = [
        f"{run.job.name}, rank {rank}: {problem}"
        for (run, rank), found in zip(places, rehearsed, strict=True)
        if (problem := difference(found, real[rank][run.job.name]) or of_loading(run, found, real[rank][run.job.name]))
    ]
    assert not problems, "\n".join(problems)
    assert all(any(products(ranks[run.job.name].entries) for ranks in real) for run in runs)


def difference(rehearsed: RankRecord, real: RankRecord) -> str:
    for number, (ours, theirs) in enumerate(zip_longest(*map(calls_in_order, (rehearsed, real)))):
        if ours != theirs:
            return f"call {number}: {ours} rehearsed, {theirs} real"
    computed, theirs = products(rehearsed.entries), products(real.entries)
    if computed != theirs:
        return f"products: {computed.items() ^ theirs.items()}"
    if rehearsed.peaks.keys() != real.peaks.keys():
        return f"phases: {[*rehearsed.peaks]} rehearsed, {[*real.peaks]} real"
    # A real peak moves with the moment at which gloo's threads let go of what they have sent: of two moments that hold
    # almost as much, it may then be the other, with other parts. On a busy machine several messages are under way.
    sent = [call.num_bytes for call in rehearsed.calls if call.operation == "send"]
    under_way = MESSAGES_UNDER_WAY * max(sent, default=0)
    for phase in rehearsed.peaks.keys() - {"loading"}:
        ours, theirs = rehearsed.peaks[phase], real.peaks[phase]
        if any(ours.get(part) != theirs.get(part) for part in ("weights", "gradients", "optimizer")):
            return f"peak, {phase}: {ours.items() ^ theirs.items()}"
        excess = real.peak(phase) - rehearsed.peak(phase)
        if not -1e-3 <= excess / rehearsed.peak(phase) <= 1e-3 + under_way / rehearsed.peak(phase):
            return f"peak, {phase}: {rehearsed.peak(phase)} rehearsed, {real.peak(phase)} real"
    return "" if rehearsed.parameters == real.parameters else "parameters"


def calls_in_order(record: RankRecord) -> list[Call]:
    """With handles in the order of the calls: a real run has made others before."""
    numbers = {call.handle: number for number, call in enumerate(record.calls)}
    return [replace(call, handle=numbers[call.handle] if call.is_async else None) for call in record.calls]


def of_loading(run: Watched, rehearsed: RankRecord, real: RankRecord) -> str:
    """Only a real run reads: it holds one tensor of the file beside the weights, at most the rank's slice of the
    largest one, in the file's float32, and in the weights' type where that is another, its two extremes, and what the
    first rank has sent and gloo has not let go of."""
    of = run.of_rank(rehearsed.rank)
    vocabulary = of.shape.padded_vocab_size(128, of.config.parallel.tensor_model_parallel_size) * of.shape.hidden_size
    largest = vocabulary // of.config.parallel.tensor_model_parallel_size * (6 if of.config.model.bf16 else 4) + 8
    largest += HEADERS if rehearsed.rank == 0 and run.world_size > 1 else 0
    ours, theirs = rehearsed.peaks["loading"], real.peaks["loading"]
    is_same = {**theirs, "temporary": 0} == {**ours, "temporary": 0}
    read = real.peak("loading") - rehearsed.peak("loading")
    return (
        "" if is_same and 0 < read <= largest else f"loading: {ours} rehearsed, {theirs} real, at most {largest} more"
    )


def test_a_rehearsed_process_is_a_real_one(files, records):
    check_equal(watched(files, 1, ["hybrid"], ["alone"]), [records["hybrid"]])


def test_products_are_those_of_the_closed_form(runs, records):
    """6 operations a token for each trained weight, 4 for each frozen one and 6 for each of an adapter."""
    of, found = runs["full"], [records["full"], records["lora"]]
    shape, rows, length = of.shape, of.lengths.rows, of.lengths.positions
    h, f, d = shape.hidden_size, shape.ffn_hidden_size, shape.kv_channels
    q, kv = shape.num_attention_heads * d, shape.num_query_groups * d
    linears = {"qkv": (h, q + 2 * kv), "proj": (q, h), "fc1": (h, 2 * f), "fc2": (f, h)}
    weights = sum(into * out for into, out in linears.values())
    head = h * shape.padded_vocab_size(128, 1)
    adapters = sum(4 * (into + out) for into, out in linears.values())  # of rank 4
    tokens, layers = rows * length * of.num_microbatches, shape.num_layers
    # Nothing needs the gradient of the first layer's input.
    unneeded = h * (q + 2 * kv) + 4 * h
    assert flops(found[0], "mm") == 6 * tokens * (layers * weights + head)
    assert flops(found[1], "mm") == tokens * (4 * (layers * weights + head) + 6 * layers * adapters - 2 * unneeded)
    square = 2 * rows * shape.num_attention_heads * length**2 * d * layers * of.num_microbatches
    for record in found:
        assert flops(record, "attention") == 2 * square
        assert flops(record, "attention backward") == 5 * square


def flops(record: RankRecord, kind: str) -> int:
    return sum(product.flops * count for product, count in products(record.entries).items() if product.kind == kind)


def test_more_microbatches_hold_no_more_memory(records):
    """As many as `enough_microbatches` says are enough."""
    assert records["few"].peaks["step"] == records["many"].peaks["step"]


@pytest.mark.slow
def test_more_microbatches_of_a_plain_pipeline_hold_no_more_memory(files):
    of = watched(files, 2, ["lora"], ["PP2"])[0].of_rank(0)
    few, many = rehearse([replace(of, num_microbatches=3, num_waiting=5), replace(of, num_microbatches=8)])
    assert enough_microbatches(of.config, of.stage, 100) == 3 and few.peaks["step"] == many.peaks["step"]


def test_what_is_left_of_a_step_waits_on_the_device(files):
    of = watched(files, 2, ["lora"], ["PP2"])[0].of_rank(0)
    config = replace(of.config, training=replace(of.config.training, global_batch_size=256))
    asked = RankToRehearse.of(config, of.shape, 0)
    assert 0 < asked.num_microbatches < config.num_microbatches
    assert asked.num_microbatches + asked.num_waiting == config.num_microbatches


def test_the_planned_peak_of_a_run_is_that_of_its_fullest_phase(runs, monkeypatch):
    for fullest in PHASES:
        peaks = {phase: {"weights": 5, "temporary": 4 if phase == fullest else 1} for phase in PHASES}
        record = RankRecord(0, 0, 1, (), {}, peaks)
        monkeypatch.setattr(rehearsal, "rehearse", lambda asked, record=record: [record])
        planned = rehearsal.start_planned_peak(runs["lora"].config, SHAPE)
        while (found := planned()) is None:
            time.sleep(0.01)
        assert found == 9, fullest


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_rehearsed_ranks_of_every_method_are_those_of_real_processes(files, world_size, method):
    layouts = [name for name in LAYOUTS[world_size] if name != "DP2 overlap bf16" or method not in NOT_OVERLAPPED]
    check_equal(watched(files, world_size, [method], layouts))


@pytest.mark.slow
def test_live_storages_are_what_the_profiler_sees_allocated(files):
    folder = Path(files[0]).with_name("larger")  # oneDNN's own memory is a smaller part of it
    save_model(replace(SHAPE, hidden_size=384, ffn_hidden_size=1024, num_query_groups=6, kv_channels=64), folder)
    larger = str(folder), files[1]
    runs = watched(larger, 1, ["full", "lora", "hybrid"]) + watched(larger, 1, ["boft"], ["alone"])
    [peaks] = run_ranks(1, profiled_peaks, runs)
    assert len(peaks) == 10
    for name, (ours, profilers) in peaks.items():
        assert ours == pytest.approx(profilers, rel=1e-3), name


def test_full_fine_tuning_gathers_the_first_chunks_before_its_first_input_comes(records):
    """Else the first microbatch would wait for a gather in every chunk of every stage."""
    entries = records["of full"].entries
    before = [one.operation for one in entries[: entries.index(Mark("forward", 0))] if isinstance(one, Call)]
    assert before.count("all_gather") >= 2 and before.index("all_gather") < before.index("recv")


def of_largest(rank: int) -> RankToRehearse:
    """Of a run on 128 GPUs without virtual stages, which multiply what a rank must be rehearsed for."""
    ends = {"account_for_embedding_in_pipeline_split": True, "account_for_loss_in_pipeline_split": True}
    layout = {"tensor_model_parallel_size": 8, "pipeline_model_parallel_size": 16, "sequence_parallel": True, **ends}
    return RankToRehearse.of(made_up_run("lora", 4096, 128, world_size=128, **layout), LLAMA_405B, rank)


def used(rank: int) -> tuple[float, float]:
    """CPU seconds and gibibytes of a process that rehearses a rank of the largest run."""
    rehearse_rank(of_largest(rank))
    found = resource.getrusage(resource.RUSAGE_SELF)
    return found.ru_utime + found.ru_stime, found.ru_maxrss / 2**20


@pytest.mark.slow
def test_three_kinds_of_ranks_of_llama_405b_take_90_cpu_seconds_and_a_gibibyte():
    found = [run_ranks(1, used, rank)[0] for rank in (0, 64, 120)]  # the first, a middle and the last stage
    assert sum(cpu for cpu, _ in found) <= seconds(90)
    assert max(gibibytes for _, gibibytes in found) <= 1


def answers(*calls: Callable[[], Any]) -> list[Any]:
    return rehearsal._in_processes(calls, no_progress)


def end_with(code: int) -> None:
    print("last words", flush=True)
    os._exit(code)


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_kept_processes_answer_again_and_none_is_left_at_the_end_or_after_an_error():
    with kept_processes():
        first = answers(os.getpid, os.getpid, os.getpid)
        with kept_processes():
            assert {*answers(os.getpid), *answers(os.getpid, os.getpid)} <= {*first}
        assert os.getpid() not in first and all(map(is_alive, first))
        with pytest.raises(RuntimeError, match=r"^a rehearsed rank failed \(1\):\n(.|\n)*math domain error"):
            answers(partial(math.sqrt, -1.0), os.getpid)
        with pytest.raises(RuntimeError, match=r"^a rehearsed rank failed \(3\):\nlast words"):
            answers(partial(end_with, 3))
        with pytest.raises(RuntimeError, match=r"^a rehearsed rank failed \(1\):\n(.|\n)*EOFError"):
            answers(partial(pickle.loads, b""))
        [idle] = answers(os.getpid)
        os.kill(idle, signal.SIGKILL)
        while is_alive(idle):
            time.sleep(0.01)
        with pytest.raises(RuntimeError, match=r"^a rehearsed rank failed \(-9\)"):
            answers(partial(time.sleep, 0))
        second = answers(os.getpid)
    assert not any(map(is_alive, {*first, *second, *answers(os.getpid)}))
    assert rehearsal._kept is None
