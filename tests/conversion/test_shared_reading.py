"""Ranks that read for one another hold the same bits, read each byte once per group of replicas, and fail together."""

import dataclasses
import json
import os
import shutil
import struct
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from safetensors.torch import load_file, save_file
from torch import nn

from megatron_peft.config import ConfigurationError, ParallelConfig
from megatron_peft.conversion import convert, pretrained
from megatron_peft.conversion.hf_files import ReadCounts
from megatron_peft.conversion.pretrained import base_parameters, load_pretrained
from megatron_peft.models.families import rules_for
from megatron_peft.runtime.launch import start_model_parallel, start_world, stop, stop_model_parallel
from tests.conversion.megatron_folders import ODD, save_random, save_ranks, stage
from tests.ranks import run_ranks

# Four ranks can split its heads; its rows (9) cannot be split evenly.
SHAPE = dataclasses.replace(ODD, hidden_size=9, num_attention_heads=8, num_query_groups=4)
LAYOUTS = {"DP4": (1, 1), "TP2 x DP2": (2, 1), "PP2 x DP2": (1, 2), "TP2 x PP2": (2, 2), "TP4": (4, 1)}
# The others are these without replicas, which share nothing but the order of reading.
QUICK_LAYOUTS = ("DP4", "TP2 x DP2", "PP2 x DP2")
NUM_RANKS = 4


class Read(NamedTuple):
    """Of one rank and one folder: whether the bits are those of reading alone, and the counts of both ways."""

    equal: bool
    together: ReadCounts
    alone: ReadCounts


def in_shards(source: Path, folder: Path, dtype: torch.dtype) -> Path:
    """Tensors of `source`, converted, in three files whose order is not that of the model."""
    folder.mkdir()
    (folder / "config.json").write_text((source / "config.json").read_text())
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(source / "model.safetensors").items()}
    files = {name: f"model-{sum(name.encode()) % 3}.safetensors" for name in tensors}
    for file in set(files.values()):
        save_file({name: tensor for name, tensor in tensors.items() if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """The model as it is, and in each form; Megatron's distributed format in slices of ranks and whole."""
    work = tmp_path_factory.mktemp("shared")
    original, pickled = save_random(work / "original", SHAPE), work / "pickle"
    in_shards(original, work / "shards", torch.bfloat16)
    pickled.mkdir()
    (pickled / "config.json").write_text((original / "config.json").read_text())
    torch.save(load_file(original / "model.safetensors"), pickled / "pytorch_model.bin")
    convert.hf_to_megatron(original, work / "sliced", progress=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert, "MIN_SHARD_BYTES", 2**30)
        convert.hf_to_megatron(original, work / "whole", progress=False)
    save_ranks(original, work / "ranks", tp=2, pp=2)
    return {folder.name: folder for folder in work.iterdir()}


def model_part(tensor_parallel: int, pipeline_parallel: int) -> nn.Module:
    """This rank's parameters, full of NaN."""
    at, of = parallel_state.get_pipeline_model_parallel_rank(), pipeline_parallel
    layers = range(at * SHAPE.num_layers // of, (at + 1) * SHAPE.num_layers // of)
    ends = [end for end, there in (("first", 0), ("last", of - 1)) if at == there]
    return stage(SHAPE, tensor_parallel, layers, ends)


def load_here(folder: Path, layout: tuple[int, int], together: bool) -> tuple[nn.Module, ReadCounts]:
    part = model_part(*layout)
    rank = parallel_state.get_tensor_model_parallel_rank()
    place = {"tensor_parallel_rank": rank, "tensor_parallel_size": layout[0]}
    report = load_pretrained([part], folder, SHAPE, **place, progress=False, together=together)
    return part, report.counts


def at_each(layouts: Iterable[str], compare: Callable[[tuple[int, int]], object]) -> dict[str, object]:
    start_world()
    found = {}
    for name, layout in ((name, LAYOUTS[name]) for name in layouts):
        start_model_parallel(ParallelConfig(*layout, world_size=NUM_RANKS), seed=1)
        found[name] = compare(layout)
        stop_model_parallel()
    stop()
    return found


def read_both_ways(asked: tuple[dict[str, Path], list[str]]) -> dict[str, dict[str, Read]]:
    """Started on ranks: by layout and form."""
    folders, layouts = asked

    def read(folder: Path, layout: tuple[int, int]) -> Read:
        together, shared = load_here(folder, layout, together=True)
        alone, own = load_here(folder, layout, together=False)
        pairs = zip(base_parameters(together), base_parameters(alone), strict=True)
        return Read(all(torch.equal(one, other) for (_, one), (_, other) in pairs), shared, own)

    return at_each(layouts, lambda layout: {form: read(folders[form], layout) for form in FORMS})


@pytest.fixture(scope="module")
def by_rank(folders, request) -> list[dict[str, dict[str, Read]]]:
    """At the layouts that were chosen."""
    specs = [getattr(item, "callspec", None) for item in request.session.items if item.path == request.path]
    chosen = {spec.params["layout"] for spec in specs if spec and "layout" in spec.params}
    return run_ranks(NUM_RANKS, read_both_ways, (folders, [layout for layout in LAYOUTS if layout in chosen]))


DAMAGES: list[Callable[[bytes], bytes]] = [
    lambda whole: whole[:-60],
    lambda whole: whole[:-4] + struct.pack("<f", torch.nan),  # its last number
]


def load_a_file_that_is_damaged(path: Path) -> dict[str, list[str]]:
    """Started on ranks: what each raised for each damage, by layout. The header was checked before."""
    open_weights, whole = pretrained.open_weights, path.read_bytes()

    def told(layout: tuple[int, int], damage: Callable[[bytes], bytes]) -> str:
        def damage_after_the_check(*arguments):
            opened = open_weights(*arguments)
            path.write_bytes(damage(whole))
            return opened

        pretrained.open_weights = damage_after_the_check  # only the first rank opens all files
        with pytest.raises(ConfigurationError) as raised:
            load_here(path.parent, layout, together=True)
        if dist.get_rank() == 0:
            path.write_bytes(whole)
        return str(raised.value)

    return at_each(QUICK_LAYOUTS, lambda layout: [told(layout, damage) for damage in DAMAGES])


def test_a_file_that_is_cut_short_or_holds_nan_ends_all_ranks_with_one_message(folders, tmp_path):
    """Other ranks are in a broadcast or an all-to-all by then."""
    path = in_shards(folders["original"], tmp_path / "torn", torch.float32) / "model-1.safetensors"
    by_rank = run_ranks(NUM_RANKS, load_a_file_that_is_damaged, path)
    by_damage = zip(*(messages for rank in by_rank for messages in rank.values()), strict=True)
    cut, not_finite = map(set, by_damage)
    assert cut == {f"{path} cannot be read: it was cut short while it was read. Copy it again."}
    last = max((start, name) for name, (file, start) in first_bytes(path.parent).items() if file == str(path))[1]
    assert len(not_finite) == 1 and f"{path} holds NaN or infinities in {last}. Copy" in not_finite.pop()


def test_no_more_broadcasts_are_in_flight_than_the_host_has_waited_for(monkeypatch):
    """A collective's `wait` does not stop the host where the device does the waiting."""
    events: list[str] = []
    started = lambda *_: events.append("start") or (lambda: None)  # noqa: E731
    monkeypatch.setattr(pretrained, "start_broadcast_over_data_parallel", started)
    monkeypatch.setattr(pretrained, "wait_for_device", lambda: events.append("done"))
    parameters: Any = [(None, nn.Parameter(torch.zeros(2))) for _ in range(20)]
    nothing: Any = SimpleNamespace(read=lambda *_: None)
    pretrained.fill_parameters(parameters, nothing, 0, 1, (None, None), lambda num_bytes: None)
    in_flight = [events[:at].count("start") - events[:at].count("done") for at in range(len(events))]
    assert events.count("start") == 20 and max(in_flight) == pretrained.MAX_IN_FLIGHT + 1


def first_bytes(folder: Path) -> dict[str, tuple[str, int]]:
    """File and first byte of every tensor, from the headers of a folder's safetensors files."""
    places = {}
    for file in folder.glob("*.safetensors"):
        written = file.read_bytes()
        start = 8 + int.from_bytes(written[:8], "little")
        header = json.loads(written[8:start])
        places |= {name: (str(file), start + one["data_offsets"][0]) for name, one in header.items() if "dtype" in one}
    return places


def test_parameters_are_read_in_the_order_of_their_files_and_not_of_the_model(folders, monkeypatch):
    """Of a parameter that several tensors make, the first one counts: queries, keys and values lie in three files."""
    reads: list[tuple[str, int]] = []
    preadv = os.preadv

    def recorded(file: int, buffers, offset: int) -> int:
        reads.append((os.readlink(f"/proc/self/fd/{file}"), offset))
        return preadv(file, buffers, offset)

    monkeypatch.setattr(os, "preadv", recorded)
    whole = stage(SHAPE, 1, range(SHAPE.num_layers), ["first", "last"])
    settings = {"tensor_parallel_rank": 0, "tensor_parallel_size": 1, "progress": False}
    load_pretrained([whole], folders["shards"], SHAPE, **settings)
    places = first_bytes(folders["shards"])
    by_model = [places[rule.hf_tensors[0].name] for rule in rules_for(SHAPE).values()]
    by_file = sorted(by_model)
    assert len({file for file, _ in by_file}) == 3 and by_model != by_file
    assert [read for read in reads if read in by_model] == by_file


FORMS = ("shards", "pickle", "sliced", "whole", "ranks")
LAYOUT_CASES = [pytest.param(layout, marks=[] if layout in QUICK_LAYOUTS else [pytest.mark.slow]) for layout in LAYOUTS]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", LAYOUT_CASES)
def test_bits_equal_those_of_reading_alone_and_replicas_read_each_byte_of_their_slices_once(layout, form, by_rank):
    tensor_parallel, pipeline_parallel = LAYOUTS[layout]
    num_replicas = NUM_RANKS // (tensor_parallel * pipeline_parallel)
    reads = [rank[layout][form] for rank in by_rank]
    assert all(read.equal for read in reads)
    assert sum(read.together.bytes for read in reads) * num_replicas == sum(read.alone.bytes for read in reads)


@pytest.mark.parametrize("layout", LAYOUT_CASES)
def test_headers_are_read_by_the_first_rank_and_each_rank_opens_a_file_once(layout, by_rank):
    reads = [rank[layout]["shards"] for rank in by_rank]
    assert [read.together.headers for read in reads] == [3, 0, 0, 0]
    assert all(1 <= read.together.opens <= 3 for read in reads)


# Nodes with files of their own.


def on_nodes_of(size: int) -> int:
    """Begin a world in which so many ranks share a node, or with 0 one of which no launcher tells; the rank."""
    start_world()
    rank = dist.get_rank()
    if size:
        os.environ |= {"LOCAL_RANK": str(rank % size), "LOCAL_WORLD_SIZE": str(size), "GROUP_RANK": str(rank // size)}
    return rank


def weight_files_opened(argument: tuple[Path, int]) -> list[str]:
    folder, ranks_on_a_node = argument
    on_nodes_of(ranks_on_a_node)
    opened: list[str] = []
    sys.addaudithook(lambda event, arguments: opened.append(str(arguments[0])) if event == "open" else None)
    pretrained.require_same_model(folder)
    return sorted(Path(path).name for path in opened if path.endswith(".safetensors"))


@pytest.mark.parametrize(("ranks_on_a_node", "leaders"), [(2, [True, False]), (1, [True, True]), (0, [True, True])])
def test_one_rank_of_each_node_opens_the_files_before_they_are_read(folders, ranks_on_a_node, leaders):
    files = sorted(path.name for path in folders["shards"].glob("*.safetensors"))
    opened = run_ranks(2, weight_files_opened, (folders["shards"], ranks_on_a_node))
    assert len(files) == 3 and opened == [files if leads else [] for leads in leaders]


def told_of_a_copy(folder: Path) -> str:
    os.chdir(folder / str(on_nodes_of(1)))
    with pytest.raises(ConfigurationError) as error:
        load_pretrained([], "base", SHAPE, tensor_parallel_rank=0, tensor_parallel_size=1, progress=False)
    return str(error.value)


def test_a_nodes_copy_with_its_tensors_at_other_places_is_refused(folders, tmp_path):
    """The first rank's headers would give this node other bytes."""
    for node in ("0", "1"):
        shutil.copytree(folders["original"], tmp_path / node / "base")
    file = tmp_path / "1" / "base" / "model.safetensors"
    save_file(load_file(file), file, metadata={"format": "pt", "note": "of another length"})
    messages = run_ranks(2, told_of_a_copy, tmp_path)
    assert messages[0] == messages[1] and "another model on rank 1 than on rank 0 (model.safetensors)" in messages[0]
