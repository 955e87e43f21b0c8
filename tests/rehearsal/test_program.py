"""Programs made by hand whose calls do not fit together are found. `test_order.py` takes those of real schedules."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from megatron_peft.rehearsal.program import Call, Computation, EarlyUse, Entry, Mark, RankRecord, Wait, check_order
from megatron_peft.rehearsal.rehearsal import RankGrid, StageProgram, program_of_stage, programs_of_ranks


def sums(*axes_and_ranks: tuple[str, tuple[int, ...]]) -> list[Entry]:
    return [Call("all_reduce", axis, ranks, ((8,),), "float32") for axis, ranks in axes_and_ranks]


def message(operation: str, peer: int, batch: int | None = None, handle: int | None = None, size: int = 4) -> Call:
    return Call(operation, "pipeline", (0, 1), ((size,),), "bfloat16", peer, batch, handle)


def of_two(first: Sequence[Entry], second: Sequence[Entry]) -> str | None:
    """The problem of two ranks, which names both."""
    found = check_order({0: first, 1: second})
    assert found is None or ("rank 0" in found and "rank 1" in found)
    return found


def wait_for_ever(first: Sequence[Entry], second: Sequence[Entry]) -> bool:
    return "wait" in (of_two(first, second) or "")


def test_programs_that_fit_end():
    both = [Computation(), *sums(("tensor", (0, 1))), Mark("update"), *sums(("world", (0, 1)))]
    assert of_two(both, both) is None
    assert of_two([message("send", 1)], [message("recv", 0)]) is None


def test_a_batch_waits_for_its_messages_together_and_messages_one_by_one_would_not_end():
    both = [[message("send", 1 - rank, 0, 0), message("recv", 1 - rank, 0, 1), Wait(0), Wait(1)] for rank in (0, 1)]
    assert of_two(*both) is None
    assert of_two(*([message("send", 1 - rank, 0), message("recv", 1 - rank, 0)] for rank in (0, 1))) is None
    found = of_two(*([message("recv", 1 - rank), message("send", 1 - rank)] for rank in (0, 1)))
    assert found is not None and "wait" in found
    assert "call 0 of rank 0" in found and "call 0 of rank 1" in found


def test_a_batch_waits_before_the_next_one_and_before_what_follows():
    """Posted together, the two batches of each rank would end."""
    assert wait_for_ever(*([message("send", 1 - rank, 0), message("recv", 1 - rank, 1)] for rank in (0, 1)))
    alone = replace(message("send", 1), axis="world"), replace(message("recv", 0), axis="world")
    first, second = [message("recv", 1, 0, 0), Wait(0), alone[0]], [alone[1], message("send", 0, 0, 0), Wait(0)]
    assert wait_for_ever(first, second)
    assert of_two(first, [*second[1:], alone[1]]) is None


def test_an_asynchronous_message_waits_where_the_program_does():
    first = [replace(message("recv", 1, handle=0), axis="world"), message("send", 1), Wait(0)]
    second = [message("recv", 0), replace(message("send", 0), axis="world")]
    assert of_two(first, second) is None
    assert wait_for_ever([first[0], Wait(0), first[1]], second)


def test_messages_of_two_ranks_in_a_group_follow_one_another_in_both_directions():
    """NCCL has one stream for them: what is posted first holds up the other, whatever the program waits for."""
    posted = [message(operation, 1, handle=at) for at, operation in enumerate(("recv", "send"))]
    found = of_two(posted, [message("recv", 0), message("send", 0)])
    assert found is not None and "call 0 of rank 0" in found and "call 0 of rank 1" in found
    assert of_two(posted, [message("send", 0), message("recv", 0)]) is None


def test_a_batch_does_not_meet_a_collective_of_the_same_two_ranks():
    whole = Call("broadcast", "pipeline", (0, 1), ((4,),), "bfloat16", peer=0)
    assert wait_for_ever([whole], [message("recv", 0, batch=0, handle=1), Wait(1)])


def test_a_message_of_a_batch_does_not_meet_one_that_is_posted_alone():
    assert wait_for_ever([message("send", 1, batch=0)], [message("recv", 0)])


def test_another_operation_shape_type_or_source_does_not_match():
    one = Call("broadcast", "data", (0, 1), ((4,),), "float32", peer=0)
    for other in ({"operation": "all_reduce"}, {"shapes": ((5,),)}, {"dtype": "bfloat16"}, {"peer": 1}):
        assert "meets" in (of_two([one], [replace(one, **other)]) or "")
    for received in (message("recv", 0, size=5), replace(message("recv", 0), dtype="float32")):
        found = of_two([message("send", 1)], [received]) or ""
        assert "call 0 of rank 0, send of bfloat16 [4] to rank 1 in group pipeline meets call 0 of rank 1" in found
    assert "recv of float32 [4] from rank 0" in found


def test_a_call_of_several_tensors_and_its_source_are_told():
    one = Call("broadcast", "data", (0, 1), ((4,), (2, 3), (1,)), "float32", peer=1)
    assert of_two([one], [replace(one, shapes=((4,),))]) == (
        "call 0 of rank 0, broadcast of float32 [4] and [2, 3] ... from rank 1 in group data meets "
        "call 0 of rank 1, broadcast of float32 [4] from rank 1 in group data."
    )


def test_a_rank_that_ends_before_its_partner_has_all_it_needs_is_named():
    told = (
        "call 0 of rank 0, all_reduce of float32 [8] in group tensor waits for rank 1, which ends without such a call."
    )
    assert of_two(sums(("tensor", (0, 1))), []) == told
    assert "has no partner" in (of_two([message("send", 1, handle=0)], []) or "")


def test_two_stages_with_different_warm_ups_wait_for_one_another():
    """The first warms up with no microbatch and waits for a gradient, the second waits for a second activation."""
    first = [message("send", 1), message("recv", 1), message("send", 1), message("recv", 1)]
    second = [message("recv", 0), message("recv", 0), message("send", 0), message("send", 0)]
    assert wait_for_ever(first, second)
    assert of_two([first[0], first[2], first[1], first[3]], second) is None


def test_groups_in_another_order_wait_in_a_cycle():
    groups = ("tensor", (0, 1)), ("data", (0, 1))
    assert wait_for_ever(sums(*groups), sums(*reversed(groups)))


def test_a_wait_that_is_missing_or_late_is_found():
    [call] = [replace(one, handle=1) for one in sums(("data", (0, 1))) if isinstance(one, Call)]
    begun: list[Entry] = [Mark("validation"), *sums(("tensor", (0, 1))), call]
    sound = [*begun, Wait(1), message("send", 1, handle=0)]
    received = message("recv", 0)
    assert check_order({0: sound, 1: [*begun, Wait(1), received]}, whole_runs=True) is None
    told = "call 1 of rank 1 (validation), all_reduce of float32 [8] in group data"
    left = {0: sound, 1: [*begun, received]}
    assert check_order(left, whole_runs=True) == f"{told}: nobody waits for it."
    assert check_order(left) is None, "a step may leave a call to the next one"
    early = {0: sound, 1: [*begun, EarlyUse(1), Wait(1), received]}
    assert check_order(early) == f"{told}: its result is used before it is waited for."


@pytest.mark.parametrize("num_microbatches", [1, 2, 3, 4, 7])
def test_a_middle_microbatch_stands_for_those_between_the_first_and_the_last(num_microbatches):
    """Of three that were recorded; the last backward starts the gradients' all-reduce."""
    grid, recorded = RankGrid(tensor=1, data=2, pipeline=1), min(num_microbatches, 3)

    def step(numbers: Sequence[int]) -> list[Entry]:
        """A step whose microbatch n begins, computes and ends as microbatch `numbers[n]` was recorded."""
        phases = [("forward", at, number) for at, number in enumerate(numbers)]
        phases += [("backward", at, number) for at, number in enumerate(numbers)]
        passes = [[Mark(phase, at), named(f"{phase} {number}")] for phase, at, number in phases]
        ends = [[Mark(phase), named(phase)] for phase in ("finish", "update")]
        return [named("begin"), *(entry for each in [*passes, *ends] for entry in each)]

    def named(name: str) -> Call:
        return Call("all_reduce", name, (0, 1), ((8,),), "float32")

    record = RankRecord(0, 0, recorded, tuple(step(range(recorded))), {}, {})
    schedule = [entry for entry in step(range(num_microbatches)) if isinstance(entry, Mark) and entry.phase != "update"]
    found = program_of_stage(record, 0, schedule, grid, num_microbatches)
    middle = [1] * max(num_microbatches - 2, 0)
    assert list(found.entries) == step([0, *middle, recorded - 1][:num_microbatches])


def test_programs_of_four_replicas_become_those_of_two():
    grid, fewer = RankGrid(tensor=1, data=4, pipeline=2), RankGrid(tensor=1, data=2, pipeline=2)
    gradients = [Call("all_reduce", "data", (*range(rank, rank + 4),), ((8,),), "float32") for rank in (0, 4)]
    told = [replace(call, operation="broadcast", peer=call.group[0]) for call in gradients]
    sends = StageProgram(grid, 0, (Call("send", "pipeline", (0, 4), ((4,),), "float32", 4), gradients[0], told[0]))
    receives = StageProgram(grid, 4, (Call("recv", "pipeline", (0, 4), ((4,),), "float32", 0), gradients[1], told[1]))
    calls = {
        rank: [(call.peer, call.group) for call in program if isinstance(call, Call)]
        for rank, program in programs_of_ranks([sends, receives], fewer).items()
    }
    assert calls[1] == [(3, (1, 3)), (None, (0, 1)), (0, (0, 1))]
    assert calls[2] == [(0, (0, 2)), (None, (2, 3)), (2, (2, 3))]
    for world in (fewer, grid):
        assert check_order(programs_of_ranks([sends, receives], world)) is None
