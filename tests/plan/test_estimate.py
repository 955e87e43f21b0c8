"""The formulas of --fit against rehearsals: products, calls and parameters exactly, the peak or a little more, and the
seconds of a step."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

import pytest

from megatron_peft.config import PeftConfig, RunConfig
from megatron_peft.models.shape import ModelShape
from megatron_peft.plan.cluster import read_cluster
from megatron_peft.plan.estimate import StepEstimate
from megatron_peft.plan.footprint import memory, parameters, total
from megatron_peft.plan.pipeline import _program, estimated_time, in_flight
from megatron_peft.plan.timing import step_time
from megatron_peft.rehearsal.asked import Lengths, RankToRehearse
from megatron_peft.rehearsal.record import Call, Computation, Entry, Mark, RankRecord
from megatron_peft.rehearsal.rehearsal import rehearse, rehearse_run
from tools.headlines import MODELS
from tools.published import FULL_RECOMPUTE, LLAMA_8B, LLAMA_405B, made_up_run

SHAPE = ModelShape("llama", 3, 1024, 3072, 16, 8, 64, 4096, 4096)
MLP = {"recompute_granularity": "selective"}
CASES = {
    "lora TP2+SP": ("lora", True, {}),
    "lora TP2": ("lora", False, {}),
    "lora TP2, dropout": ("lora", False, {}),
    "hybrid TP2+SP, dropout": ("hybrid", True, {}),
    "lora TP2+SP, every layer recomputed": ("lora", True, FULL_RECOMPUTE),
    "lora TP2+SP, MLPs recomputed": ("lora", True, MLP),
    "boft TP2+SP": ("boft", True, {}),
    "hybrid TP2": ("hybrid", False, {}),
    "full TP2+SP": ("full", True, {}),
}
QUICK = ("boft TP2+SP",)


def run_of(case: str) -> RunConfig:
    method, sequence_parallel, recompute = CASES[case]
    run = made_up_run(
        method,
        1024,
        2,
        recompute=recompute,
        world_size=2,
        tensor_model_parallel_size=2,
        sequence_parallel=sequence_parallel,
    )
    if case.endswith("dropout"):
        run = replace(run, peft=PeftConfig(method=method, lora_dropout=0.1))
    return replace(run, model=replace(run.model, recompute_modules=("mlp",))) if recompute is MLP else run


@pytest.fixture(scope="module")
def rehearsed(request) -> dict[str, RankRecord]:
    """All cases that were chosen, in processes that are started once."""
    here = [item.callspec.params for item in request.session.items if item.path == request.path]
    chosen = [params["case"] for params in here if "case" in params]
    asked = [RankToRehearse(run, SHAPE, 0, 2, (Lengths.longest(run),), ()) for run in map(run_of, chosen)]
    return dict(zip(chosen, rehearse(asked), strict=True))


def part(entries: Iterable[Entry], phase: str) -> list[Entry]:
    """The first microbatch's."""
    found, is_inside = [], False
    for entry in entries:
        if isinstance(entry, Mark):
            is_inside = (entry.phase, entry.microbatch) == (phase, 0)
        elif is_inside:
            found.append(entry)
    return found


def flops(entries: Sequence[Entry]) -> dict[str, int]:
    """By kind of product."""
    counted: Counter[str] = Counter()
    for entry in entries:
        if isinstance(entry, Computation):
            for product, count in entry.products.items():
                counted[product.kind] += product.flops * count
    return counted


def other_work(entries: Sequence[Entry]) -> tuple[int, int]:
    """Bytes of all but products, and operations launched."""
    works = [entry for entry in entries if isinstance(entry, Computation)]
    return sum(work.num_bytes for work in works), sum(work.num_kernels for work in works)


def calls(entries: Sequence[Entry]) -> Counter[tuple[str, str, int]]:
    """Operation, group and bytes of each."""
    return Counter((entry.operation, entry.axis, entry.num_bytes) for entry in entries if isinstance(entry, Call))


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case in QUICK else [pytest.mark.slow]) for case in CASES]
)
def test_an_estimate_is_what_a_rehearsal_finds(rehearsed, case):
    record, step = rehearsed[case], StepEstimate(run_of(case), SHAPE)
    (chunk,) = step.chunks[0]
    for phase, estimated in (("forward", step.forward_chunk(chunk, 0)), ("backward", step.backward_chunk(chunk, 0))):
        real = part(record.entries, phase)
        assert calls(estimated) == calls(real)
        assert flops(estimated) == pytest.approx(flops(real), rel=2e-3)
        if "dropout" not in case:  # whose time is left out
            off = 0.08 if "recomputed" in case else 0.03
            assert other_work(estimated) == pytest.approx(other_work(real), rel=off)
    counts = parameters(step, step.chunks[0])
    assert counts.frozen == record.parameters["frozen"]
    assert counts.trained + counts.trained_float32 == record.parameters["trained"]
    off = total(memory(step, 0, in_flight(step, 0))) / record.peak("step") - 1
    assert -0.01 <= off <= 0.1, "what --fit calls fitting must fit"


TP2_SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
TP8_PP4 = {"tensor_model_parallel_size": 8, "pipeline_model_parallel_size": 4, "sequence_parallel": True}
INTERLEAVED = {**TP8_PP4, "num_layers_per_virtual_pipeline_stage": 1}
TP2_PP2 = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
MODEL_OF_TIMES = {"8B": LLAMA_8B, "405B": LLAMA_405B, "Bloom": MODELS["BloomZ-7B1"]}
PEFT = {"boft": {"boft_block_size": 8, "boft_factors": 2}, "urnn": {"urnn_block_size": 32}}
PEFT["hybrid"] = PEFT["boft"]
# Model, its layers, method, world, micro-batch, layout, recompute.
TIMES = [
    ("8B", 4, "lora", 1, 2, {}, {}),
    ("8B", 4, "full", 2, 1, {}, {}),
    ("8B", 4, "hybrid", 4, 1, {"tensor_model_parallel_size": 2}, {}),
    ("8B", 4, "lora", 2, 1, TP2_SP, FULL_RECOMPUTE),
    ("8B", 4, "urnn", 2, 2, TP2_SP, {}),
    ("Bloom", 4, "boft", 4, 1, TP2_PP2, {}),
    ("Bloom", 4, "full", 4, 1, TP2_PP2, {}),
    *(("405B", 8, method, 32, 1, TP8_PP4, {}) for method in ("full", "lora", "boft", "urnn", "hybrid")),
    ("405B", 8, "lora", 64, 1, INTERLEAVED, {}),
]


@pytest.mark.parametrize(
    "timed",
    [pytest.param(one, marks=[] if one[:3] == ("Bloom", 4, "boft") else [pytest.mark.slow]) for one in TIMES],
    ids=lambda one: f"{one[2]} of {one[0]} on {one[3]}",
)
def test_the_time_of_an_estimate_is_that_of_the_recorded_schedule(timed):
    model, num_layers, method, world_size, rows, layout, recompute = timed
    shape = replace(MODEL_OF_TIMES[model], num_layers=num_layers)
    run = made_up_run(method, 2048, 4 * world_size, rows, recompute, world_size=world_size, **layout)
    run = replace(run, peft=PeftConfig(method=method, **PEFT.get(method, {})))
    cluster = read_cluster("8xa100")
    stages = rehearse_run(run, shape, peaks=False).stages
    recorded = step_time({stage.rank: stage.entries for stage in stages}, cluster.of_run(run))
    assert estimated_time(StepEstimate(run, shape), cluster).seconds == pytest.approx(recorded.seconds, rel=0.02)


@pytest.mark.parametrize(("method", "stages"), [("full", {0, 3}), ("lora", set())])
def test_only_a_trained_embedding_that_the_head_shares_has_its_gradient_summed(method, stages):
    run = made_up_run(method, 2048, 8, world_size=4, pipeline_model_parallel_size=4)
    step, cluster = StepEstimate(run, replace(SHAPE, num_layers=4, tied_embeddings=True)), read_cluster("8xa100")
    entries = {stage: [*_program(step, stage, cluster)] for stage in range(4)}
    assert {s for s in entries for one in entries[s] if isinstance(one, Call) and one.axis == "embedding"} == stages
