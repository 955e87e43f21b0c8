"""Arrays that grow with the records are made and held once a node, in files that go with the run."""

import errno
import os
import subprocess
import sys
import threading
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from megatron_peft.config import ConfigurationError
from megatron_peft.data import node_files
from megatron_peft.data.node_files import NodeFiles
from megatron_peft.data.samples import PackedOrder, SampleOrder
from megatron_peft.runtime.launch import gather_over_world, start_world
from tests.ranks import run_ranks


def start_two_nodes() -> int:
    """A world of four ranks on two nodes, as torchrun tells it. Returns this rank's node."""
    rank = int(os.environ["RANK"])
    os.environ |= {"LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": str(rank % 2), "GROUP_RANK": str(rank // 2)}
    start_world()
    return rank // 2


def orders_on_a_rank(_: None) -> tuple[list[int], int, int]:
    start_two_nodes()
    made, node = Counter[int](), NodeFiles()
    plain = SampleOrder._permutation

    def permutation(order: SampleOrder, epoch: int) -> np.ndarray:
        made[epoch] += 1
        return plain(order, epoch)

    SampleOrder._permutation = permutation
    lengths = np.random.RandomState(0).randint(1, 9, 200)
    order = PackedOrder(SampleOrder(200, 7, True, partial(node.kept, "train")), lengths, 16)
    threads = [threading.Thread(target=order.samples_at, args=(0,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    dist.barrier()  # what a slower rank asks for anew is made anew
    size = order.epoch_length(0)
    drawn = []
    for epoch in range(3):
        drawn += [int(i) for position in range(epoch * size, (epoch + 1) * size) for i in order.samples_at(position)]
        dist.barrier()  # a rank that is two epochs behind would make its own anew
    kept = {path.name for path in node.folder.iterdir()}
    assert {"train-order-2", "train-packs-2", "train-packs-1"} <= kept and "train-packs-0" not in kept
    of_all = sum((Counter(one) for one in gather_over_world(dict(made))), Counter[int]())
    return drawn, of_all[0], of_all[2]


def test_an_epoch_is_ordered_once_a_node_whatever_ranks_and_threads_ask_for_it():
    found = run_ranks(4, orders_on_a_rank)
    lengths = np.random.RandomState(0).randint(1, 9, 200)
    alone = PackedOrder(SampleOrder(200, 7, True), lengths, 16)
    drawn = [int(i) for position in range(3 * alone.epoch_length(0)) for i in alone.samples_at(position)]
    assert all(one == (drawn, 2, 2) for one in found)


def test_an_order_has_its_name_when_all_of_it_is_written():
    node, there = NodeFiles(), []

    class Order:
        def tofile(self, file: Any) -> None:
            np.arange(3, dtype=np.int32).tofile(file)
            there.append((node.folder / "train-order-0").exists())

    made: list[Any] = [Order()]
    assert node.kept("train", "order", 0, np.int32, lambda: made).tolist() == [0, 1, 2] and there == [False]


def test_an_order_that_cannot_be_written_is_in_memory_and_nothing_of_it_is_left(monkeypatch, caplog):
    node = NodeFiles()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "rename", full)
    order = SampleOrder(8, 1234, True, partial(node.kept, "train"))
    assert order.permutation(0).tolist() == [4, 5, 3, 1, 2, 0, 6, 7]
    assert [path.name for path in node.folder.iterdir()] == ["train-order.lock"]
    assert "each rank keeps arrays of the samples in its own memory" in caplog.text


def test_folders_of_killed_processes_are_removed_and_those_of_others_stay(monkeypatch, tmp_path):
    monkeypatch.setattr(node_files.tempfile, "tempdir", str(tmp_path))
    ours = NodeFiles()
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        ended.wait()
    name = ours.folder.name.rpartition(f"-{os.getpid()}-")[0]
    (killed := tmp_path / f"{name}-{ended.pid}-abc").mkdir()
    (elsewhere := tmp_path / f"megatron_peft-of.another.node-{ended.pid}-abc").mkdir()
    NodeFiles()
    assert ours.folder.is_dir() and elsewhere.is_dir() and not killed.exists()


def test_a_node_without_room_is_told_with_the_variable_that_names_another_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(node_files.tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(ConfigurationError, match="cannot be kept in .*nowhere .*give TMPDIR a folder of this node"):
        NodeFiles()


def folder_on_a_rank(_: None) -> Path:
    start_two_nodes()
    return NodeFiles().folder


def test_ranks_of_a_node_share_a_folder_that_goes_with_the_run() -> None:
    first, second, *others = run_ranks(4, folder_on_a_rank)
    assert first == second != others[0] == others[1] and not any(map(os.path.exists, (first, *others)))
