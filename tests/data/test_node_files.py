"""What grows with the records is read once over all ranks and held once a node, in files that go with the run."""

import errno
import os
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from megatron_peft.config import ConfigurationError, DataConfig, ParallelConfig, RunConfig, TrainingConfig
from megatron_peft.data import files, node_files
from megatron_peft.data.build import build_data
from megatron_peft.data.files import RecordFiles
from megatron_peft.data.node_files import NodeFiles, read_once
from megatron_peft.data.samples import PackedOrder, SampleOrder
from megatron_peft.data.tokenizers import NullTokenizer
from megatron_peft.runtime.launch import (
    checked_together,
    gather_over_world,
    place_on_node,
    start_model_parallel,
    start_world,
)
from tests.checkpoint.runs import make_config
from tests.ranks import run_ranks

FLAG = "--train-data-path"
LINES = [f'{{"text": "{i} {i}"}}' for i in range(40)]


def start_two_nodes() -> int:
    """A world of four ranks on two nodes, as torchrun tells it. Returns this rank's node."""
    rank = int(os.environ["RANK"])
    os.environ |= {"LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": str(rank % 2), "GROUP_RANK": str(rank // 2)}
    start_world()
    return rank // 2


def arrays_on_a_rank(_: None) -> list[Any]:
    start_two_nodes()
    rank, node = dist.get_rank(), NodeFiles()
    node_files._GATHERED_BYTES = 64  # several rounds
    everyone = node.gathered(np.arange(10 * rank, 10 * rank + 5 * rank, dtype=np.int32), range(4))
    two = [0, 3] if rank in (0, 3) else [1, 2]
    some = node.gathered(np.full(rank + 1, rank, dtype=np.int64), two)
    nothing = node.gathered(np.zeros(0, dtype=np.int32), range(4))
    arrays = [array.tolist() for array in (everyone, some, nothing)]
    dist.barrier()  # the first rank that ends takes the folder with it
    return [*arrays, str(node.folder), np.asarray(everyone).flags.writeable]


def test_arrays_of_all_ranks_are_one_file_of_a_node_and_the_ranks_map_it():
    found = run_ranks(4, arrays_on_a_rank)
    assert all(one[0] == [*range(10, 15), *range(20, 30), *range(30, 45)] and one[2] == [] for one in found)
    assert [one[1] for one in found] == [[0] + [3] * 4, [1] * 2 + [2] * 3, [1] * 2 + [2] * 3, [0] + [3] * 4]
    folders = [one[3] for one in found]
    assert folders[0] == folders[1] != folders[2] == folders[3]
    assert not any(map(os.path.exists, folders)), "they go with the run"
    assert not any(one[4] for one in found)


def nodes_on_a_rank(_: None) -> str:
    host = f"node.{os.environ['RANK']}"
    os.uname = lambda: type("Host", (), {"nodename": host})  # type: ignore[assignment]
    start_world()
    mapped = NodeFiles().gathered(np.arange(3), range(2))
    return f"{place_on_node().node} {len(mapped)} {mapped.filename}"


def test_hosts_are_told_apart_where_the_launcher_does_not_tell_nodes(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    first, second = (told.split() for told in run_ranks(2, nodes_on_a_rank))
    assert (first[:2], second[:2]) == (["node-0", "6"], ["node-1", "6"]) and first[2] != second[2]


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
    assert "each rank keeps the order of samples in its own memory" in caplog.text


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


def recorded_scans(monkeypatch: pytest.MonkeyPatch) -> list[files.Scan]:
    """Filled from now on by each part that this process scans."""
    scanned: list[files.Scan] = []
    plain = files.scan

    def scan(path: Path, part: range) -> Any:
        found = plain(path, part)
        scanned.append(found[0])
        return found

    for module in (files, node_files):
        monkeypatch.setattr(module, "scan", scan)
    return scanned


def data_on_a_rank(config: RunConfig) -> tuple[list[tuple[int, int]], list[list[int]]]:
    start_two_nodes()
    start_model_parallel(config.parallel, seed=1)
    replica = dist.get_rank() // 2
    with pytest.MonkeyPatch.context() as patch:
        scanned = recorded_scans(patch)
        built = build_data(config, NullTokenizer(99), data_parallel_rank=replica, data_parallel_size=2, num_ids=100)
    tokens = [batch.tokens.tolist() for first in (0, 4) for batch in built.train.step_at(first)]
    return [(part.begin, part.end) for part in scanned], tokens


def test_a_file_is_scanned_once_by_all_ranks_of_tp2_x_dp2(write_lines):
    train, valid = write_lines(LINES, "train.jsonl"), write_lines(LINES[:20], "valid.jsonl")
    config = replace(
        make_config(),
        parallel=ParallelConfig(tensor_model_parallel_size=2, world_size=4),
        data=DataConfig(seq_length=8, train_data_path=(train,), valid_data_path=(valid,)),
        training=TrainingConfig(train_iters=2, global_batch_size=4),
    )
    found = run_ranks(4, data_on_a_rank, config)
    for number, path in enumerate((train, valid)):
        parts = [scanned[number] for scanned, _ in found]
        assert [begin for begin, _ in parts[1:]] == [end for _, end in parts[:-1]]
        assert (parts[0][0], parts[-1][1]) == (0, os.path.getsize(path))
        assert max(end - begin for begin, end in parts) < os.path.getsize(path) / 3
    assert all(len(scanned) == 2 for scanned, _ in found)
    tokens = [of_rank for _, of_rank in found]
    assert tokens[0] == tokens[1] != tokens[2] == tokens[3]


def started(path: str, cache: Path | None) -> int:
    """Scans of all ranks at a start; what they know is what one process reads."""
    with pytest.MonkeyPatch.context() as patch:
        scanned = recorded_scans(patch)
        known = read_once([path], FLAG, NodeFiles(), cache)
        records = checked_together(lambda: RecordFiles([path], FLAG, known))
        num_scans = sum(gather_over_world(len(scanned)))
    alone = RecordFiles([path], FLAG)
    assert records.digest == alone.digest
    assert [records.place(i) for i in range(40)] == [alone.place(i) for i in range(40)]
    assert [records[i] for i in range(40)] == [alone[i] for i in range(40)]
    dist.barrier()
    return num_scans


def starts_on_a_rank(work: tuple[list[str], Path]) -> dict[str, Any]:
    copies, root = work
    node, path = start_two_nodes(), copies[0]
    node_files.SETTLED_SECONDS = 3600
    found: dict[str, Any] = {"of a new file": (started(path, root / "new"), list((root / "new").iterdir()))}
    node_files.SETTLED_SECONDS = 0
    found["first"] = started(path, root / "c"), started(path, root / "c")
    (index,) = (root / "c").glob("*/lines.int64")
    content = index.read_bytes()
    dist.barrier()
    if dist.get_rank() == 0:
        index.write_bytes(content[:8] + b"\1" + content[9:])
    dist.barrier()
    found["damaged"] = started(path, root / "c"), started(path, root / "c"), index.read_bytes() == content
    if dist.get_rank() == 0:
        before = os.stat(path)
        Path(path).write_text(Path(path).read_text().replace("7 7", "8 8"))  # as long, and its time is put back
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    dist.barrier()
    found["changed"] = started(path, root / "c"), started(path, root / "c")
    found["copies"] = started(copies[1 + node], root / "d"), len(list((root / "d").iterdir()))
    return found


def test_an_index_is_taken_until_it_is_damaged_or_its_file_changes_and_each_copy_has_its_own(write_lines, tmp_path):
    names = ("data.jsonl", "a.jsonl", "b.jsonl")
    copies = [write_lines([*LINES[:10], "", *LINES[10:]], name) for name in names]
    found = run_ranks(4, starts_on_a_rank, (copies, tmp_path))
    assert (
        found
        == [
            {
                "of a new file": (4, []),  # within SETTLED_SECONDS it may change unnoticed
                "first": (4, 0),
                "damaged": (4, 0, True),
                "changed": (4, 0),
                "copies": (4, 2),
            }
        ]
        * 4
    )


def faults_on_a_rank(work: dict[str, list[str]]) -> dict[str, str]:
    node = start_two_nodes()
    files.MAX_LINE_BYTES = node_files.scan.__globals__["MAX_LINE_BYTES"] = 60
    told = {}
    for name, paths in work.items():
        try:
            read_once([paths[node % len(paths)]], FLAG, NodeFiles(), None)
        except ConfigurationError as error:
            told[name] = str(error)
    return told


def test_what_is_wrong_with_a_file_ends_all_ranks_with_one_message(write_lines, tmp_path):
    long = write_lines([*LINES[:30], "", '{"text": "%s"}' % ("x" * 200), *LINES[30:]], "long.jsonl")
    good = write_lines(LINES, "good.jsonl")
    work = {"long": [long], "missing": [good, str(tmp_path / "none.jsonl")], "other": [good, long]}
    found = run_ranks(4, faults_on_a_rank, work)
    assert [one == found[0] for one in found] == [True] * 4
    for name in ("long", "other"):
        assert found[0][name].startswith(f"{long}, line 32 is too long, and the limit of a line is")
    assert "none.jsonl cannot be read: No such file" in found[0]["missing"]
