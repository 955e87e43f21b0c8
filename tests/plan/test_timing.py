"""The replay: times that can be computed by hand."""

from dataclasses import replace
from typing import Any

import pytest

from megatron_peft.plan.cluster import Link, read_cluster
from megatron_peft.plan.timing import EXPOSED, WorkTime, product_seconds, step_time, time_alone, work_time
from megatron_peft.rehearsal.program import Call, Computation, Mark, Product, Wait
from tools.published import made_up_run

# A second for 1 GB within a node, two between nodes; nothing for a launch.
CLUSTER = replace(
    read_cluster("8xh100"), launch_us=0.0, call_us=0.0, node_link=Link(1.0, 0.0), network_link=Link(0.5, 0.0)
)
GB = 10**9


def work(seconds: float) -> WorkTime:
    return WorkTime((("products", seconds),), 0.0)


def message(operation: str, peer: int, num_bytes: int = GB, **fields: Any) -> Call:
    return Call(operation, "pipeline", (), ((num_bytes,),), "int8", peer, **fields)


def summed(group: tuple[int, ...], handle: int | None = None, axis: str = "tensor") -> Call:
    return Call("reduce_scatter", axis, group, ((2 * GB,),), "int8", handle=handle)  # a second for two ranks


@pytest.mark.parametrize(
    ("product", "seconds"),
    [
        # Large: operations over the rate; 2 * 8192^3 = 1,100 GFLOP reach 0.72 of it, 0.86 of that in a long run.
        (Product("mm", 1, 8192, 8192, 8192, "bfloat16"), 2 * 8192**3 / (989e12 * 0.72 * 0.86)),
        (Product("mm", 1, 8192, 8192, 8192, "float32"), 2 * 8192**3 / (67e12 * 0.72 * 0.86)),
        # Narrow, as LoRA's A: the input is read, and that is what it takes.
        (Product("mm", 1, 8192, 16, 16384, "bfloat16"), 2 * (8192 * 16400 + 16384 * 16) / (3350e9 * 0.8)),
        # Causal: half of the square.
        (Product("attention", 64, 8192, 8192, 128, "bfloat16"), 2 * 64 * 8192**2 * 128 / (989e12 * 0.45 * 0.86)),
    ],
)
def test_a_product_takes_its_operations_or_its_bytes(product, seconds):
    assert product_seconds(product, read_cluster("8xh100")) == pytest.approx(seconds)


def test_work_takes_the_sum_of_what_is_in_it():
    product, attention = Product("mm", 1, 512, 512, 512, "bfloat16"), Product("attention", 8, 64, 64, 32, "bfloat16")
    cluster = replace(CLUSTER, launch_us=4.0)
    found = work_time(Computation({product: 3, attention: 2}, GB, 5), cluster)
    seconds = {"products": 3 * product_seconds(product, cluster), "attention": 2 * product_seconds(attention, cluster)}
    assert dict(found.device) == pytest.approx({**seconds, "other operations": 1 / (3350 * 0.8)})
    assert found.host == pytest.approx(20e-6)
    part = found.share(0.25)
    assert part.host == found.host / 4 and part.device[0] == ("products", seconds["products"] / 4)


def test_a_receiver_waits_for_the_sender_and_for_the_message():
    found = step_time({0: [work(3), message("send", 1)], 1: [message("recv", 0), work(1)]}, CLUSTER)
    assert found.seconds == 5
    # The mean of two ranks: the second waits 3 s, the first 1 s at the end; each waits a second for the message.
    assert found.by_kind == {
        **dict.fromkeys(("attention", "other operations", "launches"), 0.0),
        **{"products": 2.0, "bubble": 2.0, EXPOSED + "pipeline": 1.0},
    }
    assert (found.bubble, found.exposed_communication, found.launch_bound) == (0.4, 0.2, 0.0)


def exchanged(*batches: int | None) -> dict[int, Any]:
    """A message each way, between two ranks."""
    [batch] = batches or (None,)
    return {rank: [message(word, 1 - rank, batch=batch) for word in ("send", "recv")] for rank in (0, 1)}


def sent_to_two(*batches: int) -> dict[int, Any]:
    sends = [message("send", peer, batch=batch) for peer, batch in zip((1, 2), batches, strict=True)]
    return {0: sends, **{peer: [message("recv", 0, batch=0)] for peer in (1, 2)}}


A, B = summed((0, 1), 0), summed((0, 1), 1)
SMALL_CALL = Call("all_reduce", "tensor", (0, 1), ((1,),), "int8", handle=0)
OF_THE_WORLD = Call("all_reduce", "world", (0, 1), ((1,),), "int8")
SLOW_HOST = replace(CLUSTER, launch_us=1000.0)


@pytest.mark.parametrize(
    ("ranks", "seconds", "cluster"),
    [
        pytest.param(ranks, seconds, rest[0] if rest else CLUSTER, id=claim)
        for claim, ranks, seconds, *rest in [
            ("other operations take their bytes", {0: [Computation({}, 2 * GB, 1)]}, 2 / (3350 * 0.8)),
            ("an asynchronous call runs beside the computation", dict.fromkeys((0, 1), [A, work(3), Wait(0)]), 3),
            ("a wait is for the latest", dict.fromkeys((0, 1), [A, Wait(0), A, work(0.25), Wait(0)]), 2),
            ("calls of one group follow one another", dict.fromkeys((0, 1), [A, B, Wait(1)]), 2),
            (
                "calls of two groups run at once",
                dict.fromkeys((0, 1), [A, summed((0, 1), 1, axis="data"), Wait(1), Wait(0)]),
                1,
            ),
            ("peers that are left out come at the same time", {0: [work(1), summed((0, 1))]}, 2),
            ("messages of a batch are posted together", exchanged(0), 1),
            ("one batch", sent_to_two(0, 0), 1),
            ("a batch waits for the batch before it", sent_to_two(0, 1), 2),
            ("a call of an earlier step", {0: [Wait(7), work(1)]}, 1),
            ("a device waits for its host", {0: [Computation({}, 0, 100), work(1)]}, 1.1, SLOW_HOST),
            ("launched ahead", {0: [work(1), Computation({}, 0, 100)]}, 1.0, SLOW_HOST),
            ("a launch comes first", {0: [Computation({}, 2 * GB, 1)]}, 0.001 + 2 / (3350 * 0.8), SLOW_HOST),
            ("a call takes the host", {0: [*[SMALL_CALL] * 100, work(1)]}, 1.1, replace(CLUSTER, call_us=1000.0)),
            ("the host reads a sum", {0: [work(1), OF_THE_WORLD, Computation({}, 0, 100)]}, 1.1, SLOW_HOST),
        ]
    ],
)
def test_a_step_takes(ranks, seconds, cluster):
    assert step_time(ranks, cluster).seconds == pytest.approx(seconds)


def test_what_a_device_waits_for_is_told():
    partly = [A, work(0.25), Wait(0), work(1)]
    found = step_time({0: partly, 1: partly}, CLUSTER)
    assert (found.seconds, found.by_kind[EXPOSED + "tensor"]) == (2.0, 0.75)
    found = step_time({0: [work(1), summed((0, 1))], 1: [work(4), summed((0, 1))]}, CLUSTER)
    assert (found.seconds, found.by_kind["bubble"], found.by_kind[EXPOSED + "tensor"]) == (5, 1.5, 1)
    found = step_time({0: [Computation({}, 0, 100), work(1)]}, SLOW_HOST)
    assert found.by_kind["launches"] == pytest.approx(0.1) and found.launch_bound == pytest.approx(0.1 / 1.1)


@pytest.mark.parametrize(("ranks", "told"), [(exchanged(), "0, 1"), ({0: [message("recv", 1)], 1: []}, "0")])
def test_ranks_that_wait_for_ever_are_named(ranks, told):
    with pytest.raises(ValueError, match=f"ranks {told} wait for ever"):
        step_time(ranks, CLUSTER)


def test_a_run_that_overlaps_hides_nine_tenths_of_tensor_parallel_calls():
    """Those that split the sequence; other groups' calls and sums of whole tensors are not hidden."""
    transformer = {"tp_comm_overlap": True}
    run = made_up_run("full", 64, 8, 1, transformer, world_size=8, tensor_model_parallel_size=2, sequence_parallel=True)
    cluster = CLUSTER.of_run(run)
    assert step_time({0: [work(1), summed((0, 1))]}, cluster).seconds == pytest.approx(1.1)
    assert step_time({0: [work(1), summed((0, 1), axis="data")]}, cluster).seconds == pytest.approx(2)
    apart = replace(run, parallel=replace(run.parallel, sequence_parallel=False))
    assert step_time({0: [work(1), summed((0, 1))]}, CLUSTER.of_run(apart)).seconds == pytest.approx(2)


def test_every_doubling_of_the_nodes_costs_half_a_percent():
    run = made_up_run("full", 64, 64, world_size=64)
    one_node = made_up_run("full", 64, 64, world_size=4)
    assert CLUSTER.of_run(one_node).sustained == CLUSTER.sustained
    assert CLUSTER.of_run(run).sustained == pytest.approx(CLUSTER.sustained * 0.995**3)


def test_a_part_that_is_timed_once_takes_what_it_takes_in_the_program():
    part = [Computation({}, 5 * GB, 7), summed((0, 1), 0), Computation({}, GB, 1), Wait(0)]
    times = time_alone(part, 0, CLUSTER)
    assert step_time({0: [times, times]}, CLUSTER).seconds == pytest.approx(step_time({0: part}, CLUSTER).seconds * 2)
    slow = time_alone(part, 0, replace(CLUSTER, launch_us=3.0, call_us=5.0))
    assert slow.host == pytest.approx((8 * 3 + 5) * 1e-6) and slow.device == times.device


def test_spans_say_what_a_device_did_when():
    program = [Mark("forward", 0), work(1), Mark("schedule"), message("send", 1), Mark("backward", 0), work(2)]
    found = step_time({0: program, 1: [message("recv", 0)]}, CLUSTER, keep_spans=True)
    assert [(span.start, span.end, span.phase) for span in found.spans[0]] == [(0, 1, "forward"), (2, 4, "backward")]
