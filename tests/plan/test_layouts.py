"""Estimates from the model's shape, and --fit: what divides, what fits, what is fastest."""

import time
from collections import Counter, defaultdict
from dataclasses import replace
from functools import partial

import pytest
from rich.console import Console

from megatron_peft.cli.parser import read_config
from megatron_peft.config import ConfigurationError, OptimizerSettings, RunConfig
from megatron_peft.models.shape import ModelShape
from megatron_peft.plan import layouts
from megatron_peft.plan.cluster import read_cluster
from megatron_peft.plan.layouts import fit, fit_tables, longest_sequence
from megatron_peft.plan.recorded_step import RecordedStep, estimated_time, total, turns
from megatron_peft.plan.timing import PlannedSpeed, time_table
from megatron_peft.rehearsal.program import Mark
from megatron_peft.rehearsal.requests import LayersToRecord, alike_stages
from megatron_peft.training.watchers import ModelFlops
from tests.plan.recorded import recorded, step_of
from tools.published import FULL_RECOMPUTE, LLAMA_8B, LLAMA_70B, LLAMA_405B, made_up_run, published, run_of

SMALL = ModelShape("llama", 8, 1024, 4096, 16, 8, 64, 32000, 8192)
A100 = read_cluster("8xa100")
fit_small = partial(fit, shape=SMALL, cluster=A100)


@pytest.fixture(autouse=True)
def one_recording(request, monkeypatch):
    """Every way to compute a layer has the same record: what a search does with it is tested, not the record."""
    if "every_recording" not in request.fixturenames:
        alike = recorded([LayersToRecord.of(made_up_run("lora", 512, 8), SMALL)])
        monkeypatch.setattr(layouts, "record_layers", lambda asked, watch, known: alike * len(asked))


def step_alike(run: RunConfig, shape: ModelShape) -> RecordedStep:
    """With `one_recording`'s record."""
    return RecordedStep(run, shape, recorded([LayersToRecord.of(made_up_run("lora", 512, 8), SMALL)])[0])


@pytest.fixture
def every_recording(monkeypatch):
    """In `one_recording`'s place."""
    monkeypatch.setattr(layouts, "record_layers", recorded)


def llama_3() -> RunConfig:
    """The layout of Llama 3 405B's pretraining, on a replica."""
    [layout] = [one for one in published()["layouts"] if one["model"] == "llama-405b"]
    return run_of(layout, 128, 128)


@pytest.mark.parametrize("num_chunks", [1, 2])
@pytest.mark.parametrize("stage", range(4))
def test_a_schedule_runs_every_microbatch_forward_and_then_backward(stage, num_chunks):
    order = turns(stage, 4, num_chunks, 8)
    assert len(order) == len(set(order)) == 2 * 8 * num_chunks
    for turn in order:
        if turn.phase == "forward":
            assert order.index(turn) < order.index(Mark("backward", turn.microbatch, turn.chunk))


def test_as_many_microbatches_as_stages_warm_up_as_more_do():
    phases = [turn.phase for turn in turns(3, num_stages=4, num_chunks=2, num_microbatches=4)]
    assert phases == ["forward"] * 4 + ["forward", "backward"] * 4 + ["backward"] * 4


def test_the_second_stage_of_the_largest_recipe_holds_141_chunks_of_microbatches():
    live = most = 0
    for turn in turns(1, 16, 8, 128):
        live += 1 if turn.phase == "forward" else -1
        most = max(most, live)
    assert most == 2 * 14 + 7 * 16 + 1


def test_a_stage_holds_its_chunks_of_all_microbatches_in_flight():
    """Beside what is there all the time, and what a pass takes for a moment."""
    step = step_alike(llama_3(), LLAMA_405B)
    lefts = {step.passes(1)["forward", chunk][0] for chunk in range(8)}
    assert len(lefts) == 1 and step.memory(1)["activations"] == 141 * lefts.pop()


def test_parameters_are_those_of_the_model():
    shapes = {8_030_261_248: LLAMA_8B, 70_553_706_496: LLAMA_70B, 405_853_388_800: LLAMA_405B}
    run = made_up_run("full", 1024, 8)
    every = recorded([LayersToRecord.of(run, shape) for shape in shapes.values()])
    steps = [RecordedStep(run, shape, layers) for shape, layers in zip(shapes.values(), every, strict=True)]
    assert [step.parameters(step.chunks[0]).trained for step in steps] == [*shapes]


def test_a_pipeline_without_messages_has_the_bubble_of_1f1b():
    """p - 1 of m + p - 1: with 4 equal stages and 8 microbatches 3 / 11."""
    cluster = replace(
        A100, launch_us=0.0, call_us=0.0, network_link=replace(A100.node_link, gb_per_second=1e9, latency_us=0.0)
    )
    cluster = replace(cluster, node_link=cluster.network_link)
    run = made_up_run("lora", 1024, 8, world_size=4, pipeline_model_parallel_size=4)
    step = step_of(run, replace(LLAMA_8B, vocab_size=128, num_layers=160))
    assert estimated_time(step, cluster).bubble == pytest.approx(3 / 11, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora", "boft", "urnn", "hybrid"])
def test_layouts_fit_and_are_ranked(method, every_recording):
    found = fit_small(made_up_run(method, 2048, 32), world_size=8)
    seconds = [one.speed.time.seconds for one in found]
    assert len(found) == 10 and seconds == sorted(seconds)
    assert all(total(one.memory) <= A100.usable_bytes for one in found)
    for one in found:
        kinds = one.speed.time.by_kind
        assert sum(kinds.values()) == pytest.approx(one.speed.time.seconds)
    console = Console(width=80, record=True)
    console.print(*fit_tables(found, "layouts", 1e9), time_table(found[0].speed))
    told = console.export_text()
    assert "…" not in told and f"{found[9].speed.hours(1e9):,.1f}" in told and f"{found[9].speed.mfu:.1%}" in told


@pytest.mark.slow
def test_of_layouts_that_divide_the_layers_in_other_ways_alone_the_fastest_is_given(every_recording):
    found = fit(made_up_run("lora", 4096, 64), LLAMA_70B, 32, A100)
    shown = [
        (one.run.parallel.tensor_model_parallel_size, one.run.parallel.pipeline_model_parallel_size)
        + (one.run.parallel.sequence_parallel, one.run.training.micro_batch_size, one.recompute)
        for one in found
    ]
    assert len(shown) == len(set(shown)) == 10
    interleaved = next(one for one in found if one.run.parallel.is_interleaved)
    for chunk in (None, 1, 2, 5):
        run = replace(
            interleaved.run,
            parallel=replace(
                interleaved.run.parallel,
                num_layers_per_virtual_pipeline_stage=chunk,
                account_for_embedding_in_pipeline_split=False,
                account_for_loss_in_pipeline_split=False,
            ),
        )
        if interleaved.speed.num_layers // run.parallel.pipeline_model_parallel_size % (chunk or 1) == 0:
            assert estimated_time(step_of(run, LLAMA_70B), A100).seconds >= interleaved.speed.time.seconds * 0.999


def test_the_flags_of_a_layout_give_that_layout():
    run = made_up_run("lora", 2048, 32)
    for one in fit(run, LLAMA_8B, 16, A100, 40):
        words = ["--pretrained-checkpoint", "x", "--mock-data", "--train-iters", "1", "--seq-length", "2048"]
        words += ["--global-batch-size", "32", "--bf16", "--pad-to-seq-length", *one.flags]
        typed = read_config(words, {"WORLD_SIZE": "16"})
        assert typed.parallel == one.run.parallel and typed.model.transformer == one.run.model.transformer
        assert typed.training.micro_batch_size == one.run.training.micro_batch_size
        assert typed.optimizer.use_distributed_optimizer == one.run.optimizer.use_distributed_optimizer
        assert one.as_dict()["peak_bytes"] == total(one.memory)


def test_flags_of_the_run_that_a_layout_does_without_are_named():
    """Pasted behind them, its own flags would leave them in force."""
    run = made_up_run(
        *("lora", 2048, 32, 1, FULL_RECOMPUTE),
        world_size=2,
        pipeline_model_parallel_size=2,
        decoder_first_pipeline_num_layers=3,
    )
    best = fit_small(run, world_size=1, num_layouts=1)[0]
    recompute = ["--recompute-granularity", "--recompute-method", "--recompute-num-layers"]
    assert best.flags_to_leave_out(run) == ["--decoder-first-pipeline-num-layers", *recompute]
    assert best.flags_to_leave_out(best.run) == []


@pytest.fixture
def replay_all(monkeypatch):
    """Every layout that fits is replayed and given, not only the first in closed form and one of each division."""
    monkeypatch.setattr(layouts, "NUM_REPLAYED", 10**6)
    monkeypatch.setattr(layouts, "_but_for_division", id)


def test_every_layout_that_divides_is_looked_at(replay_all):
    """SMALL's 8 layers, and 10 with both ends, on 4 GPUs with 8 samples a step."""
    chunks = {4: (None, 1, 2), 5: (None, 1), 2: (None, 1)}  # layers of a stage -> of a virtual stage
    ends = {1: ((8, False),), 2: ((4, False), (5, True)), 4: ((2, False),)}
    layouts_that_divide = {
        (tp, pp, has_ends, chunk, sequence, rows, recompute, dp > 1)
        for tp, pp, dp in ((1, 1, 4), (1, 2, 2), (1, 4, 1), (2, 1, 2), (2, 2, 1), (4, 1, 1))
        for num_layers, has_ends in ends[pp]
        for chunk in (chunks[num_layers] if pp > 1 else (None,))
        for sequence in ((False, True) if tp > 1 else (False,))
        for rows in (1, 2, 4, 8)
        if 8 % (rows * dp) == 0 and (chunk is None or 8 // (rows * dp) % pp == 0)
        for recompute in ("none", "modules", "full")
    }
    found = fit_small(made_up_run("lora", 512, 8), world_size=4, num_layouts=10**6)
    told = []
    for one in found:
        parallel = one.run.parallel
        assert parallel.account_for_embedding_in_pipeline_split == parallel.account_for_loss_in_pipeline_split
        sizes = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
        pipeline = parallel.account_for_loss_in_pipeline_split, parallel.num_layers_per_virtual_pipeline_stage
        step = one.run.training.micro_batch_size, one.recompute, one.run.optimizer.use_distributed_optimizer
        told.append((*sizes, *pipeline, parallel.sequence_parallel, *step))
    assert len(told) == len(set(told)) == len(layouts_that_divide) and {*told} == layouts_that_divide


@pytest.mark.slow
@pytest.mark.parametrize(("method", "length", "world_size"), [("lora", 512, 4), ("hybrid", 2048, 8), ("full", 2048, 8)])
def test_the_fastest_layout_is_among_those_that_are_replayed(method, length, world_size, request, every_recording):
    run = made_up_run(method, length, 8)
    some = fit_small(run, world_size=world_size)
    request.getfixturevalue("replay_all")
    assert fit_small(run, world_size=world_size)[0].run == some[0].run


@pytest.mark.parametrize(
    ("optimizer", "reduced_in_bf16", "gradients", "kept"),
    [
        ({}, False, 4, 12),  # masters and two moments
        ({"use_distributed_optimizer": True}, True, 2, 3),  # a quarter of them
        ({"optimizer": "sgd", "sgd_momentum": 0.0}, False, 4, 4),
        ({"optimizer": "sgd", "sgd_momentum": 0.9}, False, 4, 8),
    ],
)
def test_bytes_of_a_trained_parameter(optimizer, reduced_in_bf16, gradients, kept):
    run = made_up_run("full", 512, 8, world_size=4)
    run = replace(
        run,
        training=replace(run.training, grad_reduce_in_bf16=reduced_in_bf16),
        optimizer=OptimizerSettings(**optimizer),
    )
    step = step_of(run, SMALL)
    count = step.parameters(step.chunks[0]).trained
    found = step.held(0)
    assert (found["weights"], found["gradients"], found["optimizer"]) == (2 * count, gradients * count, kept * count)


@pytest.mark.slow
def test_less_memory_asks_for_more_recompute_or_more_stages(every_recording):
    small = replace(A100, memory_gib=20.0)
    found = fit(made_up_run("lora", 8192, 16), LLAMA_8B, 8, small)
    best = fit(made_up_run("lora", 8192, 16), LLAMA_8B, 8, A100)
    assert all(total(one.memory) <= small.usable_bytes for one in found)
    assert best[0].speed.tokens_per_second >= found[0].speed.tokens_per_second


@pytest.mark.parametrize(
    ("run", "world_size", "shape", "told"),
    [
        (made_up_run("full", 2048, 64), 8, LLAMA_405B, "nothing fits 8 GPUs with 1.0 GiB each to use. TP 1, PP 8"),
        (made_up_run("lora", 2048, 7), 11, SMALL, "no layout of 11 GPUs divides the model (8 layers, 16 heads"),
        (made_up_run("lora", 2048, 8, world_size=8), 8, SMALL, None),
    ],
)
def test_why_nothing_fits_is_said(run, world_size, shape, told):
    if told is None:
        run, told = replace(run, training=replace(run.training, global_batch_size=None)), "give --global-batch-size"
    with pytest.raises(ConfigurationError) as caught:
        fit(run, shape, world_size, replace(A100, memory_gib=7.0))
    assert told in str(caught.value)


def test_no_layout_cuts_a_block_of_a_quantized_base():
    """Four heads of 32 features are two blocks."""
    run, shape = made_up_run("lora", 512, 8), replace(SMALL, num_attention_heads=4, num_query_groups=4, kv_channels=32)
    for precision, most in (("run", 4), ("nf4", 2)):
        asked = replace(run, model=replace(run.model, base_precision=precision))
        found = fit(asked, shape, 4, A100, num_layouts=10**6)
        assert max(one.run.parallel.tensor_model_parallel_size for one in found) == most


def test_a_layout_that_fills_a_gpu_exactly_fits_and_of_two_as_fast_the_smaller_is_better(monkeypatch):
    run = made_up_run("lora", 2048, 8)
    monkeypatch.setattr(RecordedStep, "memory", lambda step, stage: {"weights": A100.usable_bytes})
    found = fit_small(run, world_size=2)
    smaller = replace(found[0], memory={"weights": A100.usable_bytes - 1})
    assert min((found[0], smaller), key=layouts._slowness) is smaller


def test_the_layout_that_the_run_asks_for_changes_nothing():
    """Pipelines of uneven stages and activations that ranks share too."""
    plain = made_up_run("lora", 2048, 8)
    uneven = {"pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": "Ettttt|tttL"}
    shared = {**FULL_RECOMPUTE, "distribute_saved_activations": True}
    asked = made_up_run("lora", 2048, 8, 1, shared, world_size=4, tensor_model_parallel_size=2, **uneven)
    assert [one.flags for one in fit_small(asked, world_size=2)] == [
        one.flags for one in fit_small(plain, world_size=2)
    ]


def test_layouts_whose_outer_stages_alone_fit_are_none(monkeypatch, replay_all):
    """A stage that is neither of the first two nor the last holds most where its layers alone are adapted."""
    run = made_up_run("lora", 2048, 8)
    run = replace(run, peft=replace(run.peft, target_modules=("decoder.layers.5.*",)))
    adapted = [recorded([LayersToRecord.of(run, SMALL)])[0]]
    monkeypatch.setattr(layouts, "record_layers", lambda asked, *_: adapted * len(asked))
    sizes = {True: {"weights": 2**37}, False: {"weights": 2**30}}
    monkeypatch.setattr(RecordedStep, "memory", lambda step, stage: sizes[1 < stage < step.pp - 1])
    found = fit_small(run, world_size=8, num_layouts=100)
    assert {one.run.parallel.pipeline_model_parallel_size for one in found} == {1, 2}
    monkeypatch.setattr(RecordedStep, "memory", lambda step, stage: {"weights": 2**40})
    with pytest.raises(ConfigurationError, match="nothing fits 8 GPUs .* comes nearest and takes 1024.0 GiB"):
        fit_small(run, world_size=8)


@pytest.mark.parametrize(("targets", "stages"), [("linear_qkv", [0, 1, 3]), ("decoder.layers.[45].*", [0, 1, 2, 3])])
def test_one_stage_of_each_content_is_looked_at(targets, stages):
    run = made_up_run("lora", 512, 8, world_size=4, pipeline_model_parallel_size=4)
    run = replace(run, peft=replace(run.peft, target_modules=(targets,)))
    assert sorted({*alike_stages(run, SMALL)}) == stages


@pytest.mark.parametrize(("world_size", "sizes"), [(6, {1, 3}), (12, {1}), (24, {1})])
def test_no_tensor_parallel_group_crosses_nodes(world_size, sizes):
    """Nodes of 8; three and nine divide the heads."""
    shape = replace(SMALL, hidden_size=576, ffn_hidden_size=1536, num_attention_heads=9, num_query_groups=3)
    found = layouts._parallel_layouts(made_up_run("lora", 512, 24), shape, world_size, A100)
    assert {parallel.tensor_model_parallel_size for parallel in found} == sizes


def test_an_adapter_that_a_layout_would_cut_is_not_proposed():
    """Blocks of 512 features: 1,024 hidden over two ranks, at most."""
    run = made_up_run("urnn", 2048, 32)
    run = replace(run, peft=replace(run.peft, urnn_block_size=512, rotation_side="input"))
    found = fit_small(run, world_size=8, num_layouts=100)
    assert {one.run.parallel.tensor_model_parallel_size for one in found} <= {1, 2}


@pytest.fixture
def asked_for(monkeypatch) -> list[RunConfig]:
    """The runs whose layers a search has recorded: each that differs once."""
    found, usual = [], layouts.record_layers

    def record(asked, *others):
        found.extend({repr(one): one.run for one in asked}.values())
        return usual(asked, *others)

    monkeypatch.setattr(layouts, "record_layers", record)
    return found


def recomputes(runs: list[RunConfig]) -> Counter[str | None]:
    return Counter(run.model.transformer.get("recompute_granularity") for run in runs)


def test_a_search_of_the_largest_model_takes_seconds_and_records_recompute_where_it_may_be_among_the_fastest(asked_for):
    begin = time.process_time()
    found = fit(made_up_run("lora", 4096, 128), LLAMA_405B, 128, A100)
    assert time.process_time() - begin < 60 and len(found) == 10
    counted = recomputes(asked_for)
    assert counted[None] == 28 and 0 < counted["selective"] < 28 and 0 < counted["full"] < 28


def test_larger_micro_batches_are_recorded_where_smaller_ones_fit(asked_for, monkeypatch):
    monkeypatch.setattr(RecordedStep, "memory", lambda step, stage: {"weights": 2**40})
    with pytest.raises(ConfigurationError, match="nothing fits"):
        fit_small(made_up_run("lora", 512, 8), world_size=8)
    assert {run.training.micro_batch_size for run in asked_for} == {1}


def test_recompute_is_looked_at_where_a_layout_may_be_as_fast_as_the_last_that_is_replayed(asked_for, monkeypatch):
    """Here only the fastest are replayed."""
    monkeypatch.setattr(layouts, "NUM_REPLAYED", 1)
    fit_small(made_up_run("lora", 512, 8), world_size=4)
    counted = recomputes(asked_for)
    assert 0 < counted["selective"] == counted["full"] < counted[None]


@pytest.mark.parametrize(("tied", "number"), [(False, 20), (True, 28)])
def test_layouts_whose_layers_compute_the_same_are_recorded_once(tied, number):
    """Tied ends are apart where a pipeline has several stages."""
    shape = replace(SMALL, tied_embeddings=tied)
    laid_out = layouts._layouts(made_up_run("lora", 512, 8), shape, 4, A100)
    assert len({repr(LayersToRecord.of(run, shape)) for run in laid_out}) == number


@pytest.mark.parametrize("overlaps", [False, True])
def test_adam_takes_two_tensors_as_large_as_the_largest_trained_one(overlaps):
    """A replica of several updates its part: of all buckets together, or of each where their sums overlap."""
    table = LLAMA_8B.vocab_size * LLAMA_8B.hidden_size
    own = step_of(made_up_run("full", 512, 8), LLAMA_8B)
    assert own.memory(0)["temporary"] == 2 * 4 * table and own.memory(0)["activations"] == 0
    run = made_up_run("full", 512, 8, world_size=2)
    run = replace(
        run,
        training=replace(run.training, overlap_grad_reduce=overlaps),
        optimizer=replace(run.optimizer, use_distributed_optimizer=True, overlap_param_gather=overlaps),
    )
    assert step_of(run, LLAMA_8B)._bytes_of_update(0) == 2 * 4 * table // (2 if overlaps else 1)


def test_the_interleaved_schedule_asks_for_the_next_input_before_a_turn():
    """Stages of one layer, of 4 layers in 4 stages or of 8 in two rounds of them."""
    plain = made_up_run("lora", 512, 8, world_size=4, pipeline_model_parallel_size=4)
    parallel = replace(plain.parallel, num_layers_per_virtual_pipeline_stage=1)
    interleaved = step_alike(replace(plain, parallel=parallel), SMALL).passes(1)
    alone, size = step_alike(plain, replace(SMALL, num_layers=4)), 512 * 1024 * 2
    for phase in ("forward", "backward"):
        assert interleaved[phase, 0][1] == alone.passes(1)[phase, 0][1] + size and alone.message_bytes == size


def test_layouts_that_differ_in_recompute_are_ranked_apart(monkeypatch):
    monkeypatch.setattr(layouts, "NUM_REPLAYED", 10**6)
    found = fit_small(made_up_run("lora", 512, 8), world_size=2, num_layouts=10**6)
    recomputes = defaultdict(set)
    for one in found:
        recomputes[one.run.parallel, one.run.training.micro_batch_size].add(one.recompute)
    assert recomputes and all(one == {*layouts.RECOMPUTES} for one in recomputes.values())


def test_hours_follow_from_tokens():
    run = made_up_run("lora", 512, 32, world_size=8)
    speed = PlannedSpeed.of(run, SMALL, A100, estimated_time(step_alike(run, SMALL), A100))
    assert speed.hours(3600 * speed.tokens_per_second) == pytest.approx(1)
    assert speed.tokens == 32 * 512
    flops = ModelFlops.of(SMALL, is_frozen=True).count(speed.tokens, speed.tokens * 513 // 2)
    assert speed.mfu == pytest.approx(flops / speed.time.seconds / 8 / 1e12 / A100.bf16_tflops)
    precise = PlannedSpeed.of(replace(run, model=replace(run.model, bf16=False)), SMALL, A100, speed.time)
    assert precise.mfu == pytest.approx(speed.mfu * A100.bf16_tflops / A100.fp32_tflops)


def test_the_longest_sequence_is_the_last_that_fits_of_the_model_s_positions(every_recording):
    """Boundaries included: a GPU that a length fills exactly holds it; the model's last positions count as one step."""
    run, shape = made_up_run("lora", 4096, 8), replace(SMALL, max_position_embeddings=200)
    lengths = (64, 128, 192, 200)
    of_length = {length: replace(run, data=replace(run.data, seq_length=length)) for length in lengths}
    peaks = {length: total(step_of(one, shape).memory(0)) for length, one in of_length.items()}
    assert [*peaks.values()] == sorted({*peaks.values()})

    def found(usable: int) -> tuple[int, int]:
        cluster = replace(A100, memory_gib=usable / 2**30, reserved_gib=0.0)
        assert cluster.usable_bytes == usable
        return longest_sequence(run, shape, cluster)

    assert [found(peaks[length]) for length in lengths] == [*peaks.items()]
    assert found(peaks[200] + 1) == (200, peaks[200])
    assert found(peaks[192] - 1) == (128, peaks[128])
    assert found(peaks[64] - 1) == (0, peaks[64])


def test_the_longest_sequence_divides_over_the_tensor_parallel_ranks(monkeypatch):
    monkeypatch.setattr(layouts, "record_layers", lambda asked, watch: recorded(alike))
    alike = [LayersToRecord.of(made_up_run("lora", 512, 8), SMALL)]
    three = {"tensor_model_parallel_size": 3, "sequence_parallel": True}
    run, shape = made_up_run("lora", 510, 8, world_size=3, **three), replace(SMALL, max_position_embeddings=1000)
    assert longest_sequence(run, shape, A100)[0] == 999
