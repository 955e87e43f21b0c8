"""Every asynchronous collective and message is waited for before its result is read or its buffer is used again.

On a GPU an asynchronous collective runs beside the program until somebody waits for it. gloo is often done by the time
that the result is read, so a wait that is missing, or a buffer that is used too early, goes unnoticed on a CPU. Here
results are poisoned until they are waited for, and buffers are watched from the call to the wait.
"""

import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.distributed import param_and_grad_buffer
from torch import Tensor

from megatron_peft.certify.runs import Curve
from megatron_peft.parallel import collectives
from megatron_peft.runtime.launch import start_world
from tests.ranks import run_ranks
from tests.tiny_llama import save_llama
from tests.training.layout_runs import Job, merged, run_each
from tests.training.test_layout import LAYOUTS, METHODS, OVERLAPPED, PP2, REFUSED, SP

IN_PLACE = ("all_reduce", "broadcast")
OUT_OF_PLACE = ("all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single")
MESSAGES = ("isend", "irecv", "batch_isend_irecv", "P2POp")
POISON = {torch.uint8: 0xA5, torch.int32: -987654, torch.int64: -987654}


class Call:
    """An asynchronous one, in place of torch's `Work`.

    writes: (where its result appears at `wait`, the result). reads: what it may read until then.
    message: gloo's own work, for messages, which block where they are waited for.
    """

    def __init__(
        self,
        name: str,
        report: "Report",
        writes: Sequence[tuple[Tensor, Tensor]],
        reads: Sequence[Tensor],
        message: Any = None,
    ) -> None:
        self.name = f"{name} at {_place()}"
        self._report, self._writes, self._message = report, writes, message
        self._is_forgotten = name in report.forgotten
        self.is_done = False
        for target, _ in writes:
            target.detach().fill_(POISON.get(target.dtype, float("nan")))
        self._watched = [(tensor, _bits(tensor)) for tensor in (*reads, *(target for target, _ in writes))]
        report.calls.append(self)

    def wait(self, *_: Any) -> bool:
        if self.is_done or self._is_forgotten:
            return True
        self.is_done = True
        if self._message is not None:
            self._message.wait()
        if not all(torch.equal(_bits(tensor), before) for tensor, before in self._watched):
            self._report.problems.append(f"written before its wait: {self.name}")
        for target, result in self._writes:
            target.detach().copy_(result)
        self._watched, self._writes = [], []
        return True

    def is_completed(self) -> bool:
        self._report.problems.append(f"asked whether it is done, which depends on the time: {self.name}")
        return self.is_done


@dataclass
class Report:
    """All asynchronous calls so far, and what is wrong; `forgotten` names operations whose waits are taken away."""

    forgotten: frozenset[str] = frozenset()
    calls: list[Call] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def end(self) -> list[str]:
        """All problems, with the calls that nobody has waited for."""
        return [*self.problems, *(f"nobody waits: {call.name}" for call in self.calls if not call.is_done)]


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().clone().flatten().view(torch.uint8)


def _place() -> str:
    frames = [one for one in traceback.extract_stack() if "/torch/" not in one.filename and one.filename != __file__]
    return frames[-1].filename.rpartition("/")[2]


@contextmanager
def in_stream_order(forgotten: Sequence[str] = ()) -> Iterator[Report]:
    """Meanwhile torch's functions, and the names that megatron-core's and our modules have for them, are these."""
    report = Report(frozenset(forgotten))
    real = {name: getattr(dist, name) for name in (*IN_PLACE, *OUT_OF_PLACE, *MESSAGES)}
    stand_ins = _stand_ins(real, report)
    changed = []
    for module in list(sys.modules.values()):
        if module is dist or getattr(module, "__name__", "").startswith(("megatron.core", "megatron_peft")):
            for name, value in list(vars(module).items()):
                for found in (key for key, one in real.items() if one is value):
                    changed.append((module, name, value))
                    setattr(module, name, stand_ins[found])
    changed.append((param_and_grad_buffer, "_coalescing_manager", param_and_grad_buffer._coalescing_manager))
    param_and_grad_buffer._coalescing_manager = stand_ins["coalescing"]
    try:
        yield report
    finally:
        for module, name, value in changed:
            setattr(module, name, value)


def _stand_ins(real: dict[str, Any], report: Report) -> dict[str, Any]:
    together: list[list[Call]] = []  # the calls of each open coalescing manager, which are asynchronous without a word

    def asynchronous(call: Call) -> Call:
        if together:
            together[-1].append(call)
        return call

    def in_place(name: str) -> Callable[..., Any]:
        def collective(tensor: Tensor, *args: Any, async_op: bool = False, **kwargs: Any) -> Any:
            if not (async_op or together):
                return real[name](tensor, *args, **kwargs)
            result = tensor.detach().clone()
            real[name](result, *args, **kwargs)
            return asynchronous(Call(name, report, [(tensor, result)], []))

        return collective

    def out_of_place(name: str) -> Callable[..., Any]:
        def collective(output: Tensor, input: Tensor, *args: Any, async_op: bool = False, **kwargs: Any) -> Any:
            if not (output.is_contiguous() and input.is_contiguous()):
                report.problems.append(f"not contiguous: {name} at {_place()}")
            if not (async_op or together):
                return real[name](output, input, *args, **kwargs)
            result, given = torch.empty_like(output), input.detach().clone()
            real[name](result, given, *args, **kwargs)
            # A shard of the output may be the input: its own place is right from the start.
            is_shard = input.untyped_storage().data_ptr() == output.untyped_storage().data_ptr()
            call = Call(name, report, [(output, result)], [] if is_shard else [input])
            return asynchronous(call)

        return collective

    def isend(tensor: Tensor, *args: Any, **kwargs: Any) -> Call:
        return Call("isend", report, [], [tensor], real["isend"](tensor.detach().clone(), *args, **kwargs))

    def irecv(tensor: Tensor, *args: Any, **kwargs: Any) -> Call:
        result = torch.empty_like(tensor)
        return Call("irecv", report, [(tensor, result)], [], real["irecv"](result, *args, **kwargs))

    def batch(operations: Sequence[tuple[Any, ...]]) -> list[Call]:
        return [operation(*words) for operation, *words in operations]

    @contextmanager
    def coalescing(group: Any = None, device: Any = None, async_ops: bool = False) -> Iterator[Any]:
        together.append([])
        calls = together[-1]
        try:
            yield _Calls(calls)
        finally:
            together.pop()
        if not async_ops:
            _Calls(calls).wait()

    return {
        **{name: in_place(name) for name in IN_PLACE},
        **{name: out_of_place(name) for name in OUT_OF_PLACE},
        **{"isend": isend, "irecv": irecv, "batch_isend_irecv": batch, "coalescing": coalescing},
        "P2POp": lambda operation, tensor, peer=None, group=None: (operation, tensor, peer, group),
    }


@dataclass
class _Calls:
    calls: list[Call]

    def wait(self) -> None:
        for call in self.calls:
            call.wait()


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
def test_every_method_trains_the_same_in_stream_order(four_layers, layout):
    by_rank = [found for (found,) in run_ranks(WORLDS[layout][0], compared, (variants(four_layers, layout), [""]), 600)]
    for name in by_rank[0]:
        ranks = [rank[name] for rank in by_rank]
        assert all(rank.is_same for rank in ranks) and any(rank.num_calls for rank in ranks), name
        assert {problem for rank in ranks for problem in rank.problems} <= {DROPPED}, name
    dropped = {rank["lora"].problems.count(DROPPED) for rank in by_rank}
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
