"""Programs whose calls do not fit together are found, those of real schedules are not."""

import random
from collections.abc import Iterator

import pytest

from megatron_peft.planning.deadlock import Problem, check_order
from megatron_peft.planning.record import Call, Computation, Entry, Mark, Wait
from megatron_peft.planning.rehearsal import RehearsedRun, rehearse_run
from megatron_peft.planning.schedule import RankGrid, StageProgram, programs_of_ranks
from tests.planning.watched_runs import watched
from tests.tiny_llama import save_llama, save_pairs

Programs = dict[int, list[Entry]]


def sums(*axes_and_ranks: tuple[str, tuple[int, ...]], size: int = 8) -> list[Entry]:
    return [Call("all_reduce", axis, ranks, ((size,),), "float32") for axis, ranks in axes_and_ranks]


def message(operation: str, peer: int, batch: int | None = None, is_async: bool = False, size: int = 4) -> Call:
    return Call(operation, "pipeline", (0, 1), ((size,),), "bfloat16", peer, batch, is_async)


def test_programs_that_fit_end():
    both = [Computation(), *sums(("tensor", (0, 1))), Mark("update"), *sums(("world", (0, 1)))]
    assert check_order({0: both, 1: both}) is None
    assert check_order({0: [message("send", 1)], 1: [message("recv", 0)]}) is None


def test_a_batch_waits_for_its_messages_together_and_messages_one_by_one_would_not_end():
    batched = {
        0: [message("send", 1, 0), message("recv", 1, 0), Wait(0), Wait(1)],
        1: [message("send", 0, 0), message("recv", 0, 0), Wait(0), Wait(1)],
    }
    assert check_order(batched) is None
    found = check_order({rank: [message("recv", 1 - rank), message("send", 1 - rank)] for rank in (0, 1)})
    assert found is not None and found.kind == "wait" and set(found.ranks) == {0, 1}
    assert "call 0 of rank 0" in found.text and "call 0 of rank 1" in found.text


def test_an_asynchronous_message_waits_where_the_program_does():
    first = [message("recv", 1, is_async=True), message("send", 1), Wait(0)]
    assert check_order({0: first, 1: [message("recv", 0), message("send", 0)]}) is None


def test_another_operation_shape_type_or_source_does_not_match():
    one = Call("broadcast", "data", (0, 1), ((4,),), "float32", peer=0)
    others = [
        Call("all_reduce", "data", (0, 1), ((4,),), "float32", peer=0),
        Call("broadcast", "data", (0, 1), ((5,),), "float32", peer=0),
        Call("broadcast", "data", (0, 1), ((4,),), "bfloat16", peer=0),
        Call("broadcast", "data", (0, 1), ((4,),), "float32", peer=1),
    ]
    for other in others:
        found = check_order({0: [one], 1: [other]})
        assert found is not None and found.kind == "mismatch" and set(found.ranks) == {0, 1}
    found = check_order({0: [message("send", 1)], 1: [message("recv", 0, size=5)]})
    assert found is not None and found.kind == "mismatch"


def test_a_rank_that_ends_before_its_partner_has_all_it_needs_is_named():
    found = check_order({0: sums(("tensor", (0, 1))), 1: []})
    assert found == Problem(
        "wait",
        (0, 1),
        "call 0 of rank 0, all_reduce of float32 [8] in group tensor waits for rank 1, which ends without such a call.",
    )
    found = check_order({0: [message("send", 1, is_async=True)], 1: []})
    assert found is not None and found.ranks == (0, 1)


def test_two_stages_with_different_warm_ups_wait_for_one_another():
    """The first warms up with no microbatch and waits for a gradient, the second waits for a second activation."""
    first = [message("send", 1), message("recv", 1), message("send", 1), message("recv", 1)]
    second = [message("recv", 0), message("recv", 0), message("send", 0), message("send", 0)]
    found = check_order({0: first, 1: second})
    assert found is not None and found.kind == "wait" and set(found.ranks) == {0, 1}
    assert check_order({0: [first[0], first[2], first[1], first[3]], 1: second}) is None


def test_groups_in_another_order_wait_in_a_cycle():
    groups = ("tensor", (0, 1)), ("data", (0, 1))
    found = check_order({0: sums(*groups), 1: sums(*reversed(groups))})
    assert found is not None and found.kind == "wait"


def test_programs_of_four_replicas_become_those_of_two():
    grid, fewer = RankGrid(tensor=1, data=4, pipeline=2), RankGrid(tensor=1, data=2, pipeline=2)
    gradients = [Call("all_reduce", "data", grid.group("data", rank), ((8,),), "float32") for rank in (0, 4)]
    sends = StageProgram(grid, 0, (Call("send", "pipeline", (0, 4), ((4,),), "float32", 4), gradients[0]))
    receives = StageProgram(grid, 4, (Call("recv", "pipeline", (0, 4), ((4,),), "float32", 0), gradients[1]))
    programs = programs_of_ranks([sends, receives], fewer)
    assert [(call.peer, call.group) for call in programs[1] if isinstance(call, Call)] == [(3, (1, 3)), (None, (0, 1))]
    assert [(call.peer, call.group) for call in programs[2] if isinstance(call, Call)] == [(0, (0, 2)), (None, (2, 3))]
    assert check_order(programs) is None and check_order(programs_of_ranks([sends, receives], grid)) is None


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RehearsedRun:
    folder = tmp_path_factory.mktemp("order")
    files = str(save_llama(folder / "llama")), str(save_pairs(folder / "pairs.jsonl"))
    [only] = watched(files, 4, ["lora"], ["TP2+SPxPP2 interleaved"])
    of = only.of_rank(0)
    return rehearse_run(of.config, of.shape)


def test_ranks_of_a_real_schedule_never_wait_for_ever(run):
    programs = run.programs()
    assert check_order(programs) is None
    assert all(sum(isinstance(entry, Call) for entry in program) > 100 for program in programs.values())


def test_the_program_put_together_is_the_one_that_was_recorded(run):
    """Here the rehearsed step has all microbatches of the run, so nothing was left to put together anew."""
    programs = run.programs()
    for record in run.records:
        assert record.num_microbatches == run.config.num_microbatches
        assert list(numbered(programs[record.rank])) == list(numbered(record.entries))


def numbered(entries) -> Iterator[Entry]:
    """Calls and waits; batches numbered from 0."""
    batches: dict[int | None, int | None] = {None: None}
    for entry in entries:
        if isinstance(entry, Call):
            batch = batches.setdefault(entry.batch, len(batches) - 1)
            yield Call(**{**vars(entry), "batch": batch})
        elif isinstance(entry, Wait):
            yield entry


def without_call(program: list[Entry], number: int) -> list[Entry]:
    """One call less, and its wait; later ones are counted anew."""
    kept, count = [], -1
    for entry in program:
        count += isinstance(entry, Call)
        if isinstance(entry, Wait):
            if entry.call != number:
                kept.append(Wait(entry.call - (entry.call > number)))
        elif not (isinstance(entry, Call) and count == number):
            kept.append(entry)
    return kept


def test_every_skipped_call_is_found(run):
    draw = random.Random(0)
    for _ in range(60):
        programs = run.programs()
        rank = draw.choice(list(programs))
        calls = [entry for entry in programs[rank] if isinstance(entry, Call)]
        number = draw.randrange(len(calls))
        programs[rank] = without_call(programs[rank], number)
        assert check_order(programs) is not None, (rank, calls[number])


def test_every_swap_of_two_differing_calls_of_a_group_is_found(run):
    draw = random.Random(0)
    for _ in range(60):
        programs = run.programs()
        rank = draw.choice(list(programs))
        first, second = draw.choice(swaps(programs[rank]))
        program = programs[rank]
        program[first], program[second] = program[second], program[first]
        assert check_order(programs) is not None, (rank, program[first], program[second])


def swaps(program: list[Entry]) -> list[tuple[int, int]]:
    """Places of neighboring collectives of one group that are not the same."""
    last: dict[str, int] = {}
    found = []
    for place, entry in enumerate(program):
        if isinstance(entry, Call) and entry.operation not in ("send", "recv"):
            before = program[last[entry.axis]] if entry.axis in last else entry
            if isinstance(before, Call) and (before.operation, before.shapes) != (entry.operation, entry.shapes):
                found.append((last[entry.axis], place))
            last[entry.axis] = place
    return found
