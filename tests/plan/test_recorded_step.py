"""Steps put together from recorded layers against rehearsals: products, calls, parameters, the peak and seconds."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from megatron_peft.config import PeftConfig, RunConfig
from megatron_peft.models.loss import ChunkedLossModel
from megatron_peft.models.shape import ModelShape
from megatron_peft.plan.cluster import read_cluster
from megatron_peft.plan.recorded_step import _Program, estimated_time, total
from megatron_peft.plan.timing import step_time
from megatron_peft.rehearsal.program import Call, Computation, Entry, Mark, Parameters, RankRecord, RecordedLayers, Wait
from megatron_peft.rehearsal.recorder import Recorder
from megatron_peft.rehearsal.rehearsal import rehearse, rehearse_run
from megatron_peft.rehearsal.rehearsed_rank import recorded_layers
from megatron_peft.rehearsal.requests import LayersToRecord, Lengths, RankToRehearse
from megatron_peft.runtime.fake_ranks import replaced
from tests.plan.recorded import products, step_of
from tests.ranks import run_ranks
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
    "lora TP2+SP, some layers": ("lora", True, {}),
    "hybrid TP2+SP, some layers recomputed": ("hybrid", True, FULL_RECOMPUTE),
}
SOME_LAYERS = ("decoder.layers.1.mlp.linear_fc2", "decoder.layers.2.self_attention.*")
QUICK = ("boft TP2+SP", "lora TP2+SP, some layers")


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
    if "some layers" in case:
        run = replace(run, peft=replace(run.peft, target_modules=SOME_LAYERS))
    return replace(run, model=replace(run.model, recompute_modules=("mlp",))) if recompute is MLP else run


@pytest.fixture(scope="module")
def rehearsed(request) -> dict[str, RankRecord]:
    """All cases that were chosen, in processes that are started once."""
    here = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    chosen = [params["case"] for params in here if params.get("case") in CASES]
    asked = [RankToRehearse(run, SHAPE, 0, 2, Lengths.longest(run), False) for run in map(run_of, chosen)]
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
def test_joined_passes_are_what_a_rehearsal_finds(rehearsed, case):
    record, step = rehearsed[case], step_of(run_of(case), SHAPE)
    (chunk,) = step.chunks[0]
    for phase in ("forward", "backward"):
        joined, real = step.entries(phase, step.segments(chunk), 0), part(record.entries, phase)
        assert calls(joined) == calls(real)
        assert products(joined) == products(real)
        assert other_work(joined) == pytest.approx(other_work(real), rel=0.01)
    counts = step.parameters(step.chunks[0])
    assert counts.num_trained == record.parameters["trained"]
    held, real_held = step.memory(0), record.peaks["step"]
    for kind in ("weights", "gradients", "optimizer"):
        assert held[kind] == pytest.approx(real_held[kind], rel=1e-3)
    assert -0.01 <= total(held) / record.peak("step") - 1 <= 0.03, "what --fit calls fitting must fit"


def test_of_the_losses_chunks_those_of_a_new_size_run_and_all_are_recorded():
    """Chunks of 146 and 147 tokens of 1,024, with calls of two ranks, in two microbatches."""
    run = run_of("lora TP2+SP")
    run = replace(run, model=replace(run.model, cross_entropy_chunk_tokens=150))
    [(every, num_every), (once, num_once)] = run_ranks(1, recorded_both_ways, LayersToRecord.of(run, SHAPE))[0]
    assert (num_every, num_once) == (2 * 7, 2)
    assert vars(once) == vars(every), "passes with their peaks"
    assert sum(isinstance(entry, Call) for entry in once.passes["forward", "head"].entries) > 20


def recorded_both_ways(asked: LayersToRecord) -> list[tuple[RecordedLayers, int]]:
    """The layers, and how many chunks of the loss ran: all, and as a recorder leaves out those that it knows."""
    ran: list[int] = []
    loss_of_chunk = ChunkedLossModel._loss_of_chunk

    def counted(*args: Any) -> Any:
        ran[-1] += 1
        return loss_of_chunk(*args)

    found = []
    for once in (lambda _, function: function, Recorder.once_a_shape):
        ran.append(0)
        with replaced(ChunkedLossModel, "_loss_of_chunk", counted), replaced(Recorder, "once_a_shape", once):
            found.append((recorded_layers(asked), ran[-1]))
    return found


def test_what_microbatches_share_are_the_tables_of_rotations():
    """And not less by the microbatch that was there while they were made."""
    sines_and_cosines = 2 * 1024 * SHAPE.kv_channels * 4
    assert step_of(run_of(QUICK[0]), SHAPE).layers.cached == pytest.approx(sines_and_cosines, rel=1e-3)


def test_parameters_of_segments_add_up_to_those_of_the_recorded_model():
    """The largest is one of them."""
    parts = Parameters(8, 2, trained=4, largest=3), Parameters(16, trained=5, trained_float32=7, largest=7)
    assert Parameters.sum(parts) == Parameters(24, 2, trained=9, trained_float32=7, largest=7)
    assert Parameters.sum(parts).num_trained == 16 and Parameters.sum([]) == Parameters()


@pytest.mark.slow
def test_a_quantized_output_layer_saves_its_bytes_in_the_plan():
    """Of the peak too: the loss makes some rows of it dense at a time."""
    model = {"base_precision": "fp8", "quantize_output_layer": True}
    shape, run = replace(LLAMA_8B, num_layers=3), made_up_run("lora", 4096, 1)
    layers, both = (
        step_of(replace(run, model=replace(run.model, **changes)), shape)
        for changes in (model | {"quantize_output_layer": False}, model)
    )
    saved = 128256 * shape.hidden_size * (2 - 1 - 4 / 64)
    assert layers.memory(0)["weights"] - both.memory(0)["weights"] == saved
    assert total(layers.memory(0)) - total(both.memory(0)) == pytest.approx(saved, rel=1e-3)


def test_one_layer_of_each_kind_is_recorded():
    run = replace(made_up_run("lora", 512, 8), peft=PeftConfig(method="lora", target_modules=SOME_LAYERS))
    asked = LayersToRecord.of(run, replace(SHAPE, num_layers=100))
    assert asked.layers[:2] == ("before", "first") and len(asked.layers) == asked.shape.num_layers == 5
    whole = LayersToRecord.of(made_up_run("full", 512, 8), replace(SHAPE, num_layers=100))
    assert whole.layers[0] == "first" and len(whole.layers) == 2


def test_a_pass_waits_for_its_calls_before_the_next_one_has_the_same_handles():
    """Both layers are the same record."""
    step = step_of(run_of("lora TP2+SP"), SHAPE)
    handles = [
        (type(entry), entry.handle)
        for entry in step.entries("forward", step.segments(step.chunks[0][0]), 0)
        if isinstance(entry, Wait) or (isinstance(entry, Call) and entry.is_async)
    ]
    under_way: set[Any] = set()
    for kind, handle in handles:
        assert (handle in under_way) == (kind is Wait)
        under_way ^= {handle}
    assert not under_way and len(handles) > len({*handles}) > 2


def test_ranks_of_another_stage_make_the_same_calls_in_their_own_group():
    run = made_up_run("lora", 1024, 4, 1, {}, world_size=4, sequence_parallel=True, **TP2_PP2)
    step = step_of(run, replace(SHAPE, num_layers=4))
    groups = [
        {one.group for one in step.entries("backward", step.segments(chunk), stage) if isinstance(one, Call)}
        for stage, [chunk] in enumerate(step.chunks)
    ]
    assert groups == [{(0, 1)}, {(2, 3)}]


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
def test_time_and_peaks_are_those_of_a_rehearsal(timed):
    model, num_layers, method, world_size, rows, layout, recompute = timed
    shape = replace(MODEL_OF_TIMES[model], num_layers=num_layers)
    run = made_up_run(method, 2048, 4 * world_size, rows, recompute, world_size=world_size, **layout)
    run = replace(run, peft=PeftConfig(method=method, **PEFT.get(method, {})))
    cluster = read_cluster("8xa100")
    real, step = rehearse_run(run, shape), step_of(run, shape)
    seconds = step_time({stage.rank: stage.entries for stage in real.stages}, cluster.of_run(run)).seconds
    assert estimated_time(step, cluster).seconds == pytest.approx(seconds, rel=0.01)
    for record in real.records:
        assert total(step.memory(record.stage)) == pytest.approx(record.peak("step"), rel=0.025)


@pytest.mark.parametrize(("method", "stages"), [("full", {0, 3}), ("lora", set())])
def test_only_a_trained_embedding_that_the_head_shares_has_its_gradient_summed(method, stages):
    run = made_up_run(method, 2048, 8, world_size=4, pipeline_model_parallel_size=4)
    step, cluster = step_of(run, replace(SHAPE, num_layers=4, tied_embeddings=True)), read_cluster("8xa100")
    entries = {stage: [*_Program(step, stage, cluster)] for stage in range(4)}
    assert {s for s in entries for one in entries[s] if isinstance(one, Call) and one.axis == "embedding"} == stages


def test_replicas_and_tensor_parallel_ranks_send_what_a_rehearsal_sends():
    """An interleaved Hybrid, whose parameters are of two types, and both overlaps, of the first chunk alone."""
    run = made_up_run(
        "hybrid",
        256,
        8,
        1,
        {},
        world_size=8,
        sequence_parallel=True,
        num_layers_per_virtual_pipeline_stage=1,
        **TP2_PP2,
    )
    run = replace(
        run,
        peft=PeftConfig(method="hybrid", **PEFT["hybrid"]),
        training=replace(run.training, overlap_grad_reduce=True),
        optimizer=replace(run.optimizer, use_distributed_optimizer=True, overlap_param_gather=True),
    )
    shape = replace(SHAPE, num_layers=4, vocab_size=512)
    real = rehearse_run(run, shape, peaks=False).stages[0].entries
    mine = [*_Program(step_of(run, shape), 0, read_cluster("8xa100"))]
    for operation in ("all_gather", "reduce_scatter"):
        sent, expected = (
            [one.num_bytes for one in calls_of(entries) if one.axis.startswith("data") and one.operation == operation]
            for entries in (mine, real)
        )
        assert sum(sent) == sum(expected) and len(sent) == 2
    summed, expected = ([one for one in calls_of(entries) if one.axis == "tensor"][-1:] for entries in (mine, real))
    assert [(one.operation, one.num_bytes) for one in summed] == [(one.operation, one.num_bytes) for one in expected]


def calls_of(entries: Iterable[Entry]) -> list[Call]:
    return [one for one in entries if isinstance(one, Call)]


@pytest.mark.parametrize(("replicas", "smallest"), [(2, 40e6), (64, 64e6)])
def test_buckets_of_gradients_are_as_large_as_megatron_core_makes_them(replicas, smallest):
    """Of the first chunk: those of the others have one each."""
    several = {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 8}
    run = made_up_run("full", 512, 128, world_size=2 * replicas, **several)
    run = replace(run, training=replace(run.training, overlap_grad_reduce=True))
    [embedding, *layers], [second] = _Program(step_of(run, LLAMA_8B), 0, read_cluster("8xa100")).buckets
    sizes = {bucket.num_trained for bucket, _ in layers}
    assert all(smallest <= size < 2 * smallest for size in sizes) and embedding[0].num_trained == 128256 * 4096
    assert second[1] == 1 and second[0].num_trained > 2 * smallest


@pytest.mark.parametrize("fixed", [0.0, 1.0])
def test_kernels_of_what_is_built_once_grow_with_the_layers_that_build_their_own(fixed):
    step = step_of(made_up_run("boft", 512, 1), replace(SHAPE, num_layers=8))
    step.layers = replace(step.layers, fixed_kernels={"begin": fixed})
    recorded = [one.num_kernels for one in step.layers.passes["begin", ""].entries if isinstance(one, Computation)]
    built = [one.num_kernels for one in step.built_once(0, "begin") if isinstance(one, Computation)]
    num_recorded = sum(segment not in ("embedding", "head") for segment in step.layers.parameters)
    assert built == [number if fixed else number * 8 // num_recorded for number in recorded] and sum(recorded) > 10


@pytest.mark.parametrize("num_microbatches", [2, 4])
def test_stages_exchange_the_messages_of_megatrons_schedule_and_tell_sizes_first(num_microbatches):
    """Microbatches of many lengths, fewer and more than there are stages; a model whose kernels take no time."""
    run = made_up_run("lora", 64, num_microbatches, world_size=3, pipeline_model_parallel_size=3)
    run = replace(run, data=replace(run.data, pad_to_seq_length=False))
    shape, cluster = replace(SHAPE, hidden_size=96, ffn_hidden_size=160, vocab_size=512), read_cluster("8xa100")
    real, step = rehearse_run(run, shape, peaks=False), step_of(run, shape)
    for stage, program in enumerate(real.stages):
        mine = [*_Program(step, stage, cluster)]
        assert messages_of(mine) == messages_of(program.entries)
    seconds = step_time({stage.rank: stage.entries for stage in real.stages}, cluster.of_run(run)).seconds
    assert estimated_time(step, cluster).seconds == pytest.approx(seconds, rel=0.02)


def messages_of(entries: Iterable[Entry]) -> list[tuple[str, int | None, bool]]:
    """Operation, partner, and whether it tells a size."""
    return [
        (one.operation, one.peer, one.dtype == "int64")
        for one in entries
        if isinstance(one, Call) and one.operation in ("send", "recv")
    ]
