"""Programs made by hand whose calls do not fit together are found. `test_order.py` takes those of real schedules."""

from dataclasses import replace

from megatron_peft.rehearsal.deadlock import Problem, check_order
from megatron_peft.rehearsal.program import Call, Computation, EarlyUse, Entry, Mark, Wait
from megatron_peft.rehearsal.schedule import RankGrid, StageProgram, programs_of_ranks


def sums(*axes_and_ranks: tuple[str, tuple[int, ...]], size: int = 8) -> list[Entry]:
    return [Call("all_reduce", axis, ranks, ((size,),), "float32") for axis, ranks in axes_and_ranks]


def message(operation: str, peer: int, batch: int | None = None, handle: int | None = None, size: int = 4) -> Call:
    return Call(operation, "pipeline", (0, 1), ((size,),), "bfloat16", peer, batch, handle)


def test_programs_that_fit_end():
    both = [Computation(), *sums(("tensor", (0, 1))), Mark("update"), *sums(("world", (0, 1)))]
    assert check_order({0: both, 1: both}) is None
    assert check_order({0: [message("send", 1)], 1: [message("recv", 0)]}) is None


def test_a_batch_waits_for_its_messages_together_and_messages_one_by_one_would_not_end():
    batched = {
        0: [message("send", 1, 0, 0), message("recv", 1, 0, 1), Wait(0), Wait(1)],
        1: [message("send", 0, 0, 0), message("recv", 0, 0, 1), Wait(0), Wait(1)],
    }
    assert check_order(batched) is None
    found = check_order({rank: [message("recv", 1 - rank), message("send", 1 - rank)] for rank in (0, 1)})
    assert found is not None and found.kind == "wait" and set(found.ranks) == {0, 1}
    assert "call 0 of rank 0" in found.text and "call 0 of rank 1" in found.text


def test_a_batch_waits_before_the_next_one_and_before_what_follows():
    """Posted together, the two batches of each rank would end."""
    found = check_order({rank: [message("send", 1 - rank, 0), message("recv", 1 - rank, 1)] for rank in (0, 1)})
    assert found is not None and found.kind == "wait" and {*found.ranks} == {0, 1}
    alone = replace(message("send", 1), axis="world"), replace(message("recv", 0), axis="world")
    first, second = [message("recv", 1, 0, 0), Wait(0), alone[0]], [alone[1], message("send", 0, 0, 0), Wait(0)]
    found = check_order({0: first, 1: second})
    assert found is not None and found.kind == "wait" and {*found.ranks} == {0, 1}
    assert check_order({0: first, 1: [*second[1:], alone[1]]}) is None


def test_an_asynchronous_message_waits_where_the_program_does():
    first = [replace(message("recv", 1, handle=0), axis="world"), message("send", 1), Wait(0)]
    second = [message("recv", 0), replace(message("send", 0), axis="world")]
    assert check_order({0: first, 1: second}) is None
    assert check_order({0: [first[0], Wait(0), first[1]], 1: second}) is not None


def test_messages_of_two_ranks_in_a_group_follow_one_another_in_both_directions():
    """NCCL has one stream for them: what is posted first holds up the other, whatever the program waits for."""
    posted = [message(operation, 1, handle=at) for at, operation in enumerate(("recv", "send"))]
    found = check_order({0: posted, 1: [message("recv", 0), message("send", 0)]})
    assert found is not None and found.kind == "wait" and {*found.ranks} == {0, 1}
    assert "call 0 of rank 0" in found.text and "call 0 of rank 1" in found.text
    assert check_order({0: posted, 1: [message("send", 0), message("recv", 0)]}) is None


def test_a_message_of_a_batch_does_not_meet_one_that_is_posted_alone():
    found = check_order({0: [message("send", 1, batch=0)], 1: [message("recv", 0)]})
    assert found is not None and found.kind == "wait" and {*found.ranks} == {0, 1}


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
    for received in (message("recv", 0, size=5), replace(message("recv", 0), dtype="float32")):
        found = check_order({0: [message("send", 1)], 1: [received]})
        assert found is not None and found.kind == "mismatch"
    assert "call 0 of rank 0, send of bfloat16 [4] to rank 1 in group pipeline meets call 0 of rank 1" in found.text
    assert "recv of float32 [4] from rank 0" in found.text


def test_a_call_of_several_tensors_and_its_source_are_told():
    one = Call("broadcast", "data", (0, 1), ((4,), (2, 3), (1,)), "float32", peer=1)
    found = check_order({0: [one], 1: [replace(one, shapes=((4,),))]})
    assert found is not None and found.text == (
        "call 0 of rank 0, broadcast of float32 [4] and [2, 3] ... from rank 1 in group data meets "
        "call 0 of rank 1, broadcast of float32 [4] from rank 1 in group data."
    )


def test_a_rank_that_ends_before_its_partner_has_all_it_needs_is_named():
    found = check_order({0: sums(("tensor", (0, 1))), 1: []})
    assert found == Problem(
        "wait",
        (0, 1),
        "call 0 of rank 0, all_reduce of float32 [8] in group tensor waits for rank 1, which ends without such a call.",
    )
    found = check_order({0: [message("send", 1, handle=0)], 1: []})
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


def test_a_wait_that_is_missing_or_late_is_found():
    [call] = [replace(one, handle=1) for one in sums(("data", (0, 1))) if isinstance(one, Call)]
    begun: list[Entry] = [Mark("validation"), *sums(("tensor", (0, 1))), call]
    sound = [*begun, Wait(1), message("send", 1, handle=0)]
    other = [*begun, Wait(1), message("recv", 0)]
    assert check_order({0: sound, 1: other}, whole_runs=True) is None
    told = "call 1 of rank 1 (validation), all_reduce of float32 [8] in group data"
    left = {0: sound, 1: [*begun, message("recv", 0)]}
    assert check_order(left, whole_runs=True) == Problem("wait", (1,), f"{told}: nobody waits for it.")
    assert check_order(left) is None, "a step may leave a call to the next one"
    early = Problem("wait", (1,), f"{told}: its result is used before it is waited for.")
    assert check_order({0: sound, 1: [*begun, EarlyUse(1), *other[3:]]}) == early


def test_programs_of_four_replicas_become_those_of_two():
    grid, fewer = RankGrid(tensor=1, data=4, pipeline=2), RankGrid(tensor=1, data=2, pipeline=2)
    gradients = [Call("all_reduce", "data", (*range(rank, rank + 4),), ((8,),), "float32") for rank in (0, 4)]
    told = [replace(call, operation="broadcast", peer=call.group[0]) for call in gradients]
    sends = StageProgram(grid, 0, (Call("send", "pipeline", (0, 4), ((4,),), "float32", 4), gradients[0], told[0]))
    receives = StageProgram(grid, 4, (Call("recv", "pipeline", (0, 4), ((4,),), "float32", 0), gradients[1], told[1]))
    programs = programs_of_ranks([sends, receives], fewer)
    calls = {
        rank: [(call.peer, call.group) for call in program if isinstance(call, Call)]
        for rank, program in programs.items()
    }
    assert calls[1] == [(3, (1, 3)), (None, (0, 1)), (0, (0, 1))]
    assert calls[2] == [(0, (0, 2)), (None, (2, 3)), (2, (2, 3))]
    for world in (fewer, grid):
        assert check_order(programs_of_ranks([sends, receives], world)) is None
