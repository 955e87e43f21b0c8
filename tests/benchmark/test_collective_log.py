"""Collectives are seen however they are issued. The process group is torch's fake one of two ranks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import _CopyToModelParallelRegion
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_peft.benchmark.collective_log import SCALARS, Collective, CollectiveLog


@pytest.fixture
def pair() -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_bytes_are_those_of_the_whole_tensor(pair: dist.ProcessGroup) -> None:
    whole, part = torch.zeros(8, 4), torch.zeros(4, 4)
    with CollectiveLog() as log:
        dist.all_gather_into_tensor(whole, part, group=pair)
        dist.reduce_scatter_tensor(part, whole, group=pair)
        dist.all_reduce(part, group=pair)
    assert [(call.num_bytes, call.elements, call.width) for call in log.calls] == [
        (128, 32, 4),
        (128, 32, 4),
        (64, 16, 4),
    ]
    assert ["gather" in log.calls[0].name, "scatter" in log.calls[1].name, "allreduce" in log.calls[2].name] == [
        True
    ] * 3


def test_asynchronous_calls_count_once(pair: dist.ProcessGroup) -> None:
    with CollectiveLog() as log:
        work = dist.all_reduce(torch.zeros(16), group=pair, async_op=True)
        assert work is not None
        work.wait()
    assert len(log.calls) == 1


def test_calls_of_a_backward_pass_count(pair: dist.ProcessGroup) -> None:
    x = torch.ones(4, 4, requires_grad=True)
    y = _CopyToModelParallelRegion.apply(x, pair).sum()
    with CollectiveLog() as log:
        y.backward()
    assert len(log.calls) == 1


def test_groups_of_one_do_not_count(pair: dist.ProcessGroup) -> None:
    alone = dist.new_group([0])
    with CollectiveLog() as log:
        dist.all_reduce(torch.zeros(16), group=alone)
    assert log.calls == []


@pytest.mark.parametrize(("elements", "is_scalar"), [(1, True), (SCALARS, True), (SCALARS + 1, False)])
def test_a_few_numbers_are_told_apart(elements: int, is_scalar: bool) -> None:
    assert Collective("allreduce_", elements, 4 * elements, 1).is_scalar is is_scalar
