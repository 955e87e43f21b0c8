"""No rank of a real schedule waits for ever, whatever the method and the layout; what is broken in one is found."""

import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from graphlib import CycleError, TopologicalSorter
from typing import Any

import pytest
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_peft.config import ParallelConfig, RunConfig, make_run
from megatron_peft.models.gpt import transformer_config
from megatron_peft.models.kernels import Training
from megatron_peft.models.shape import ModelShape
from megatron_peft.rehearsal import rehearsal
from megatron_peft.rehearsal.program import MESSAGES, Call, Entry, Wait, check_order
from megatron_peft.rehearsal.rehearsal import RankGrid, RehearsedRun, StageProgram, order_problem, schedules_of_stages
from megatron_peft.rehearsal.requests import chunks_of_stages
from megatron_peft.runtime.fake_ranks import fake_world
from megatron_peft.runtime.launch import model_parallel
from tests.rehearsal.planted_calls import BETWEEN_STAGES, IN_TENSOR_AND_DATA, SOUND, with_planted
from tests.rehearsal.watched_runs import METHODS, SHAPE
from tools.published import made_up_run

Programs = dict[int, list[Entry]]


def layout(world_size: int, num_layers: int, num_microbatches: int, tp: int, pp: int, **fields: Any) -> tuple[Any, ...]:
    """A model's number of layers, a step's number of microbatches, and fields of the run."""
    sizes = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp, "world_size": world_size}
    return num_layers, num_microbatches, sizes | fields


SP, PADDED = {"sequence_parallel": True}, {"pad_to_seq_length": True}
INTERLEAVED = {"num_layers_per_virtual_pipeline_stage": 1, **PADDED, **SP}
OVERLAP = dict.fromkeys(("use_distributed_optimizer", "overlap_grad_reduce", "overlap_param_gather"), True)
ENDS_COUNT = dict.fromkeys(("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split"), True)
FOUR_STAGES = {"pipeline_model_parallel_layout": "E|t|t|t|t|t|t|L"}
LAYOUTS = {
    # For every method. Together: with and without sequence parallelism, interleaving, overlap, packs, microbatches of
    # one length and of many, stages that hold more than others or no layer at all.
    "packed, first stage longer": layout(4, 3, 5, 2, 2, decoder_first_pipeline_num_layers=2, pack_sequences=True),
    "interleaved, overlapped, padded": layout(8, 4, 6, 2, 2, bf16=True, **INTERLEAVED, **OVERLAP),
    "ends count as layers": layout(4, 2, 6, 1, 4, **ENDS_COUNT),
    "layout": layout(2, 2, 4, 1, 2, pipeline_model_parallel_layout="E|t|t|L"),
    # For some. Of four stages the next is not the previous one: messages to both take one group, posted alone or in
    # batches.
    "one length": layout(8, 4, 4, 2, 2, **INTERLEAVED),
    "four stages": layout(4, 6, 8, 1, 4, **FOUR_STAGES),
    "batched": layout(4, 6, 8, 1, 4, transformer={"overlap_p2p_comm": False}, **FOUR_STAGES, **PADDED),
    "last stage longer": layout(4, 3, 3, 2, 2, decoder_last_pipeline_num_layers=2, **SP),
    "one microbatch": layout(4, 2, 1, 1, 4, **ENDS_COUNT),
    "two stages": layout(2, 2, 6, 1, 2),
    # For faults.
    "tensor and data": layout(4, 2, 2, 2, 1, use_distributed_optimizer=True, **SP),
    "stages and data": layout(4, 2, 2, 1, 2, **PADDED),
    "tensor alone": layout(2, 1, 1, 2, 1),
}
METHODS_OF_ALL = [*METHODS][:6]
LAYOUTS_OF_ALL = [*LAYOUTS][:4]


def asked(method: str, layout: str, num_microbatches: int = 0) -> tuple[RunConfig, ModelShape]:
    """With so many microbatches in a step, if it is given."""
    num_layers, number, fields = LAYOUTS[layout]
    grid = fields["tensor_model_parallel_size"] * fields["pipeline_model_parallel_size"]
    base = {"pretrained_checkpoint": "not read", "train_data_path": ("not.jsonl",), "train_iters": 1, "seq_length": 32}
    batch = (num_microbatches or number) * (fields["world_size"] // grid)
    return make_run(**base, global_batch_size=batch, **METHODS[method], **fields), replace(SHAPE, num_layers=num_layers)


@cache
def rehearsed(method: str, layout: str) -> RehearsedRun:
    return rehearsal.rehearse_run(*asked(method, layout), peaks=False)


def programs_with(
    run: RehearsedRun, schedules: Sequence[Sequence[Entry]], num_microbatches: int
) -> dict[int, Iterator[Entry]]:
    """Of every rank, with the recorded layers in other schedules of the stages."""
    records = {record.rank: record for record in run.records}
    of_stage = partial(rehearsal.program_of_stage, grid=run.grid, num_microbatches=num_microbatches)
    stages = [
        of_stage(records[run.grid.rank(0, 0, run.alike[stage])], stage, schedule)
        for stage, schedule in enumerate(schedules)
    ]
    return rehearsal.programs_of_ranks(stages, run.grid)


# Numbers of layers, and how they are divided among four stages.
DIVISIONS: list[tuple[int, dict[str, Any]]] = [
    (16, {}),
    (16, {"num_layers_per_virtual_pipeline_stage": 2}),
    (22, {"num_layers_per_virtual_pipeline_stage": 3, **ENDS_COUNT}),
    (12, {"decoder_first_pipeline_num_layers": 3}),
    (16, {"decoder_first_pipeline_num_layers": 3, "decoder_last_pipeline_num_layers": 5}),
    (10, {"pipeline_model_parallel_layout": "E|ttt|t|tt|t|t|t|tL"}),
]


def of_megatron_core(run: RunConfig, shape: ModelShape) -> list[list[tuple[int, ...]]]:
    """The layers of each chunk of each stage."""
    core = transformer_config(shape, run.model.bf16, run.model.transformer, run.parallel, Training.of(run))
    num_chunks, found = run.parallel.num_virtual_stages(shape.num_layers), []
    for stage in range(4):
        with fake_world(stage, 4), model_parallel(ParallelConfig(1, 4, world_size=4), 1, num_chunks):
            places = [(core, chunk, stage) for chunk in (range(num_chunks) if num_chunks else [None])]
            begins = [get_transformer_layer_offset(*place) for place in places]
            sizes = [get_num_layers_to_build(*place) for place in places]
        found.append([tuple(range(at, at + size)) for at, size in zip(begins, sizes, strict=True)])
    return found


@pytest.mark.parametrize(("num_layers", "fields"), DIVISIONS)
def test_stages_hold_the_layers_that_megatron_core_gives_them(num_layers, fields):
    run = made_up_run("lora", 64, 4, world_size=4, pipeline_model_parallel_size=4, **fields)
    ours = chunks_of_stages(run.parallel, num_layers)
    expected = of_megatron_core(run, replace(SHAPE, num_layers=num_layers))
    assert [[chunk.layers for chunk in chunks] for chunks in ours] == expected
    in_order = [chunk for chunks in zip(*ours, strict=True) for chunk in chunks]
    assert [layer for chunk in in_order for layer in chunk.layers] == [*range(num_layers)]
    assert [chunk.embedding for chunk in in_order] == [True, *[False] * (len(in_order) - 1)]
    assert [chunk.head for chunk in in_order] == [*[False] * (len(in_order) - 1), True]


# No false alarm.


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS_OF_ALL)
@pytest.mark.parametrize("method", METHODS_OF_ALL)
def test_no_rank_of_any_method_waits_for_ever(method, layout):
    """With as many microbatches as were rehearsed; with fewer, as many and more than the stages warm up with."""
    run = rehearsed(method, layout)
    assert check_order(run.programs()) is None
    pp, is_interleaved = run.grid.pipeline, run.config.parallel.is_interleaved
    numbers = (pp, 2 * pp, 5 * pp) if is_interleaved else (2, pp + 1, 3 * pp)
    for number in numbers:
        stages = schedules_of_stages(*asked("lora", layout, number))
        assert check_order(programs_with(run, stages, number)) is None, number


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "layout"),
    [("lora-ga", "four stages"), ("lora", "batched"), ("full", "last stage longer"), ("hybrid", "one microbatch")],
)
def test_no_rank_waits_for_ever_in_other_layouts(method, layout):
    assert check_order(rehearsed(method, layout).programs()) is None


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS_OF_ALL)
@pytest.mark.parametrize("method", METHODS_OF_ALL)
def test_no_call_of_any_rank_of_a_whole_run_is_alone(method, layout):
    assert order_problem(rehearsed(method, layout)) is None


# Faults that are planted in the ranks of a run, from the model to a checkpoint.


def planted(name: str, monkeypatch: pytest.MonkeyPatch, layout: str = "", method: str = "lora-ga") -> Any:
    """The first problem of a whole run; its step alone is sound."""
    config, shape = asked(method, layout or ("stages and data" if name in BETWEEN_STAGES else "tensor and data"))
    grid, usual = RankGrid.of(config.parallel), rehearsal._in_processes
    run = RehearsedRun(config, shape, (), (StageProgram(grid, 0, ()),) * grid.pipeline, ())
    monkeypatch.setattr(
        rehearsal,
        "_in_processes",
        lambda calls, watch: usual([partial(with_planted, name, call) for call in calls], watch),
    )
    return order_problem(run)


def test_a_call_that_only_one_tensor_parallel_rank_makes_in_validation_is_found(monkeypatch):
    found = planted("validation: one tensor-parallel rank makes a call", monkeypatch, "tensor alone", "full")
    assert found is not None and "rank 0" in found and "rank 1 (validation), all_reduce of" in found


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_TENSOR_AND_DATA | BETWEEN_STAGES)
def test_a_planted_call_of_some_ranks_is_found_and_named(name, monkeypatch):
    found = planted(name, monkeypatch)
    assert found is not None
    phase = {"the model": "", "saving": "(saving)"}
    # The code of a validation finds the losses at the start too, which come first where adapters are trained.
    phase |= dict.fromkeys(("LoRA-GA's start", "losses at the start", "validation"), "(start)")
    expected = "(start)" if name.startswith("a message") else phase.get(name.partition(":")[0], "(step)")
    assert expected in found and "of rank " in found


@pytest.mark.slow
@pytest.mark.parametrize("name", SOUND)
def test_ranks_may_do_what_others_of_their_class_do_not_if_their_partners_do_so_too(name, monkeypatch):
    assert planted(name, monkeypatch) is None


# Programs that are broken on purpose.


def written_out(method: str, layout: str) -> Programs:
    return {rank: list(program) for rank, program in rehearsed(method, layout).programs().items()}


# One is broken in `make test`.
BROKEN = [
    ("lora", "one length"),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (
            ("hybrid", "interleaved, overlapped, padded"),
            ("boft", "packed, first stage longer"),
            ("full", "ends count as layers"),
            ("lora-ga", "four stages"),
            ("lora", "batched"),
        )
    ),
]


@pytest.mark.parametrize(("method", "layout"), BROKEN)
def test_every_skipped_call_is_found(method, layout):
    programs, draw = written_out(method, layout), random.Random(0)
    for _ in range(60):
        rank = draw.choice(list(programs))
        number = draw.randrange(sum(isinstance(entry, Call) for entry in programs[rank]))
        found = check_order({**programs, rank: without_call(programs[rank], number)})
        assert found is not None, (rank, number)


@pytest.mark.parametrize(("method", "layout"), BROKEN)
def test_every_swap_of_two_differing_calls_of_a_group_is_found(method, layout):
    """Of collectives, of messages, of one of each, however far apart.

    A swap that cannot be noticed is none: every other rank meets the same calls in the same order as before, and none
    waits in a cycle. So it is with two messages of one batch, with messages of two other ranks that lie side by side,
    and with one that has time before its partner waits for it. Those must raise no alarm.
    """
    programs, draw, num_found = written_out(method, layout), random.Random(0), 0
    before = {rank: channels(program) for rank, program in programs.items()}
    while num_found < 60:
        rank = draw.choice(list(programs))
        swap = two_differing_calls(programs[rank], draw)
        changed = {**programs, rank: with_swapped(programs[rank], *swap)}
        is_noticed = channels(changed[rank]) != before[rank] or waits_in_a_cycle(changed)
        assert (check_order(changed) is not None) == is_noticed, (rank, *(programs[rank][place] for place in swap))
        num_found += is_noticed


def without_call(program: Sequence[Entry], number: int) -> list[Entry]:
    """One call less, and its wait."""
    kept: list[Entry] = []
    count, left_out = -1, None
    for entry in program:
        count += isinstance(entry, Call)
        if isinstance(entry, Call) and count == number:
            left_out = entry.handle
        elif isinstance(entry, Wait) and entry.handle == left_out:
            left_out = None
        else:
            kept.append(entry)
    return kept


def two_differing_calls(program: Sequence[Entry], draw: random.Random) -> tuple[int, int]:
    """Places of two calls of one group that are not the same."""
    by_group: dict[str, list[tuple[int, Any]]] = defaultdict(list)
    for place, entry in enumerate(program):
        if isinstance(entry, Call):
            by_group[entry.axis].append((place, meaning(entry)))
    groups = [calls for calls in by_group.values() if len({meaning for _, meaning in calls}) > 1]
    while True:
        (first, one), (second, other) = draw.sample(draw.choice(groups), 2)
        if one != other:
            return first, second


def with_swapped(program: Sequence[Entry], first: int, second: int) -> list[Entry]:
    """Each call where the other was: waited for where that was, and a message in its batch."""
    changed = list(program)
    for place, other in ((first, second), (second, first)):
        there, call = program[place], program[other]
        assert isinstance(there, Call) and isinstance(call, Call)
        are_messages = there.operation in MESSAGES and call.operation in MESSAGES
        changed[place] = replace(call, batch=there.batch if are_messages else call.batch, handle=there.handle)
    return changed


def meaning(call: Call) -> Any:
    return call.operation, call.shapes, call.dtype, call.peer


def channel(call: Call, rank: int) -> Any:
    """Calls of one are matched in order. Two ranks of a group have one for messages; for batches, one each way."""
    if call.operation not in MESSAGES:
        return call.axis, call.group
    ends = (rank, call.peer) if call.operation == "send" else (call.peer, rank)
    return call.axis, call.group, frozenset(ends) if call.batch is None else ends


def channels(program: Sequence[Entry]) -> dict[Any, list[Any]]:
    """What a rank does in each."""
    found: dict[Any, list[Any]] = defaultdict(list)
    for entry in program:
        if isinstance(entry, Call):
            found[channel(entry, -1)].append(meaning(entry))
    return dict(found)


def waits_in_a_cycle(programs: Programs) -> bool:
    """Whether some call comes only after itself, where every channel has its calls in order.

    A call comes after all that its rank has waited for, and what is waited for ends after its partners have come.
    """
    nodes: dict[Any, int] = {}  # of a call by channel, number and rank: when its rank issues it
    waits: dict[tuple[int, int], list[Any]] = defaultdict(list)  # what a rank waits for before its next one
    for rank, program in programs.items():
        counts: dict[Any, int] = defaultdict(int)
        calls: dict[Any, Any] = {}  # by handle
        time, batch = 0, None
        for entry in program:
            if isinstance(entry, Call):
                time += entry.batch is None or entry.batch != batch
                batch = entry.batch
                key = channel(entry, rank)
                calls[entry.handle] = key, counts[key]
                nodes[key, counts[key], rank] = time
                if entry.operation not in MESSAGES or entry.batch is not None or not entry.is_async:
                    waits[rank, time].append((key, counts[key]))
                counts[key] += 1
            elif isinstance(entry, Wait):
                time, batch = time + 1, None
                waits[rank, time].append(calls[entry.handle])
    of_call: dict[Any, list[tuple[int, int]]] = defaultdict(list)
    for (*call, rank), time in nodes.items():
        of_call[tuple(call)].append((rank, time))
    graph: dict[tuple[int, int], set[tuple[int, int]]] = defaultdict(set)
    for rank in programs:
        for time in range(max((time for one, time in waits if one == rank), default=0) + 1):
            graph[rank, time + 1] = {(rank, time), *(node for call in waits[rank, time] for node in of_call[call])}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError:
        return True
    return False


def test_stages_that_warm_up_for_two_real_schedules_wait_for_one_another():
    """The first of four stages follows the schedule of the first of two, with two microbatches fewer under way."""
    real = (schedules_of_stages(*asked("lora", layout)) for layout in ("ends count as layers", "two stages"))
    programs, of_two = (
        {stage: [one for one in entries if isinstance(one, Call | Wait)] for stage, entries in enumerate(stages)}
        for stages in real
    )
    assert check_order(programs) is None and check_order(of_two) is None
    first = [replace(entry, group=tuple(programs)) if isinstance(entry, Call) else entry for entry in of_two[0]]
    problem = check_order({**programs, 0: first})
    assert problem is not None and problem.startswith("ranks wait for one another: call ")
    assert "of rank 0, " in problem and "of rank 1, " in problem and "of rank 2, " not in problem


def test_the_program_put_together_is_the_one_that_was_recorded():
    """Here the rehearsed step has all microbatches of the run, so nothing was left to put together anew."""
    run = rehearsed("lora", "one length")
    programs = run.programs()
    for record in run.records:
        assert record.num_microbatches == run.config.num_microbatches
        assert list(numbered(programs[record.rank])) == list(numbered(record.entries))


def numbered(entries: Iterable[Entry]) -> Iterator[Entry]:
    """Calls and waits; batches and handles numbered from 0."""
    batches: dict[int | None, int | None] = {None: None}
    handles: dict[Any, int] = {}
    for entry in entries:
        if isinstance(entry, Call):
            batch = batches.setdefault(entry.batch, len(batches) - 1)
            handle = handles.setdefault(entry.handle, len(handles)) if entry.is_async else None
            yield replace(entry, batch=batch, handle=handle)
        elif isinstance(entry, Wait):
            yield Wait(handles.get(entry.handle, -1))
