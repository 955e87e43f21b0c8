"""--pretrained-checkpoint opens every form of a base model at any layout, and what does not fit is named first. Ranks
that read for one another hold the same bits, read each byte once per group of replicas, and fail together."""

import dataclasses
import json
import os
import shutil
import struct
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from megatron_peft.checkpoint import run_record
from megatron_peft.checkpoint.folders import write_manifest
from megatron_peft.config import ConfigurationError, ParallelConfig
from megatron_peft.conversion import convert, pretrained
from megatron_peft.conversion.hf_files import ReadCounts
from megatron_peft.conversion.pretrained import LoadReport, base_parameters, load_pretrained, read_model_shape
from megatron_peft.models.families import read_shape, rules_for
from megatron_peft.models.shape import ModelShape
from megatron_peft.runtime.launch import start_model_parallel, start_world, stop, stop_model_parallel
from tests.checkpoint.runs import attempt
from tests.conversion import megatron_folders as made
from tests.conversion.megatron_folders import ODD, global_tensors, save_random, save_ranks, save_run, stage
from tests.one_rank import one_rank
from tests.ranks import run_ranks


def load(chunk: nn.Module, folder: Path, shape: ModelShape, rank=0, size=1, **settings: bool) -> LoadReport:
    place = {"tensor_parallel_rank": rank, "tensor_parallel_size": size}
    return load_pretrained([chunk], folder, shape, **place, **{"progress": False, **settings})


@pytest.fixture(scope="module")
def shape(saved_folders):
    return read_shape(saved_folders["single"])


@pytest.mark.parametrize("kind", ["single", "sharded", "torch"])
def test_layout_does_not_change_what_is_loaded(kind, shape, saved_folders, odd_llama):
    """Two tensor-parallel ranks, three chunks over two stages, put together again and turned back."""
    shards: dict[str, list[Tensor]] = {}
    for rank in range(2):
        for chunk in (stage(shape, 2, [0], ["first"]), stage(shape, 2, [1], []), stage(shape, 2, [2], ["last"])):
            load(chunk, saved_folders[kind], shape, rank, size=2)
            for name, parameter in base_parameters(chunk):
                shards.setdefault(name, []).append(parameter.detach())
    written = {n: t for name, rule in rules_for(shape).items() for n, t in rule.write(shards[name]).items()}
    state = odd_llama.state_dict()
    assert written.keys() == state.keys()
    assert all(torch.equal(written[name], state[name]) for name in state)


def test_weights_are_converted_in_place_and_adapters_are_left_alone(shape, saved_folders, odd_llama):
    chunk = stage(shape, 1, range(3)).bfloat16()
    made.put(chunk, "decoder.layers.0.mlp.linear_fc1.adapter.A", torch.full((2, 2), 5.0))
    before = dict(chunk.named_parameters())
    load(chunk, saved_folders["single"], shape)
    assert all(parameter is before[name] for name, parameter in chunk.named_parameters())
    assert torch.equal(chunk.output_layer.weight, odd_llama.lm_head.weight.bfloat16())
    assert chunk.output_layer.weight.requires_grad
    assert torch.equal(chunk.get_parameter("decoder.layers.0.mlp.linear_fc1.adapter.A"), torch.full((2, 2), 5.0))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, r"mlp.linear_fc3.weight \[2, 3\] is part of the"),
        ({"ffn_hidden_size": 70}, r"linear_fc1.weight is \[140, 96\] on a rank, but .* \[144, 96\]"),
        ({"vocab_size": 99}, r"word_embeddings.weight is \[99, 96\] on a rank, but .* \[101, 96\]"),
        ({"num_layers": 4}, "decoder.layers.3.input_layernorm.* no tensor of the checkpoint"),
    ],
    ids=["no rule", "another shape", "a smaller vocabulary", "a layer too many"],
)
def test_a_model_that_does_not_fit_is_named(changes, told, shape, saved_folders):
    other = dataclasses.replace(shape, **changes)
    chunk = stage(other, 1, range(other.num_layers))
    if not changes:
        made.put(chunk, "decoder.layers.0.mlp.linear_fc3.weight", torch.zeros(2, 3))
    with pytest.raises(ConfigurationError, match=told):
        load(chunk, saved_folders["single"], shape)


def test_nothing_is_read_when_a_tensor_is_missing(shape, copy_of):
    folder = copy_of("torch")
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    del state["model.layers.2.mlp.up_proj.weight"]
    torch.save(state, folder / "pytorch_model.bin")
    chunk = stage(shape, 1, [0], ["first"])
    with pytest.raises(ConfigurationError, match="1 missing: model.layers.2.mlp.up_proj.weight"):
        load(chunk, folder, shape)
    assert all(parameter.isnan().all() for parameter in chunk.parameters())


@pytest.mark.parametrize(("terminal", "progress"), [(True, True), (True, False), (False, True)])
def test_bar_is_shown_at_a_terminal_only(terminal, progress, shape, saved_folders, monkeypatch, capsys):
    console = partial(Console, force_terminal=terminal)
    monkeypatch.setattr("megatron_peft.runtime.progress.Console", console)
    load(stage(shape, 1, range(3)), saved_folders["single"], shape, progress=progress)
    printed = capsys.readouterr()
    assert "Loading weights" in printed.err if terminal and progress else printed.err == ""
    assert printed.out == ""


# Four ranks can split its heads; its rows (9) cannot be split evenly.
SHAPE = dataclasses.replace(ODD, hidden_size=9, num_attention_heads=8, num_query_groups=4)
SHAPES = {"odd": SHAPE, "tied": dataclasses.replace(SHAPE, tied_embeddings=True)}


def in_shards(source: Path, folder: Path, dtype: torch.dtype) -> None:
    """Tensors of `source`, converted, in three files whose order is not that of the model."""
    folder.mkdir()
    shutil.copy(source / "config.json", folder)
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(source / "model.safetensors").items()}
    files = {name: f"model-{sum(name.encode()) % 3}.safetensors" for name in tensors}
    for file in set(files.values()):
        save_file({name: tensor for name, tensor in tensors.items() if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Both models in each form; the odd one also as a pickle, in shards, and in Megatron's format in whole tensors."""
    work = tmp_path_factory.mktemp("forms")
    for name, shape in SHAPES.items():
        original = save_random(work / name, shape)
        convert.hf_to_megatron(original, work / f"{name} distributed", progress=False)
        save_ranks(original, work / f"{name} ranks", tp=2, pp=2)
        save_run(original, work / f"{name} run", global_tensors(original), shape=shape)
    original, pickled = work / "odd", work / "pickle"
    in_shards(original, work / "shards", torch.bfloat16)
    in_shards(original, work / "torn", torch.float32)
    pickled.mkdir()
    shutil.copy(original / "config.json", pickled)
    torch.save(load_file(original / "model.safetensors"), pickled / "pytorch_model.bin")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert, "MIN_SHARD_BYTES", 2**30)
        convert.hf_to_megatron(original, work / "whole", progress=False)
    return {folder.name: folder for folder in work.iterdir()}


@pytest.mark.parametrize("form", ["distributed", "ranks", "run"])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(("size", "rank"), [(1, 0), (2, 0), (2, 1)])
def test_every_form_fills_every_rank_alike(form, name, size, rank, folders):
    """Two stages; the last one of the tied model has an output layer of its own."""
    for layers, end in (([0, 1], "first"), ([2, 3], "last")):
        expected, found = (stage(SHAPES[name], size, layers, [end]) for _ in range(2))
        load(expected, folders[name], SHAPES[name], rank, size)
        load(found, folders[f"{name} {form}"], SHAPES[name], rank, size)
        for (key, parameter), (_, other) in zip(base_parameters(found), base_parameters(expected), strict=True):
            assert torch.equal(parameter, other), key


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_reads_its_own_shares_only(rank, folders):
    chunk = stage(SHAPE, 2, range(4))
    for name in ("embedding.word_embeddings", "output_layer"):
        chunk.get_submodule(name).weight = nn.Parameter(torch.full((64, 9), torch.nan))  # 128 padded rows
    report = load(chunk, folders["odd distributed"], SHAPE, rank, 2)
    assert report.counts.bytes == sum(p.numel() * p.element_size() for p in chunk.parameters())
    assert report.seconds > 0


def test_shape_is_read_from_every_form(folders):
    for name in SHAPES:
        for form in ("", " distributed", " ranks", " run"):
            assert read_model_shape(folders[name + form]) == SHAPES[name]


def test_a_config_beside_old_ranks_is_believed(folders, tmp_path):
    save_ranks(folders["odd"], tmp_path / "iter_0000010", tp=1, pp=1, vocab_size=None)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("10")
    with pytest.raises(ConfigurationError, match="vocabulary padded to 128 rows .*config.json"):
        read_model_shape(tmp_path)
    shutil.copy(folders["odd"] / "config.json", tmp_path)
    assert read_model_shape(tmp_path) == SHAPE


def test_a_run_of_adapters_is_no_base(folders, tmp_path):
    key = "decoder.layers.0.mlp.linear_fc1.adapter.A"
    run = save_run(folders["odd"], tmp_path / "run", {key: torch.zeros(2)}, "lora")
    with pytest.raises(ConfigurationError, match=f"holds adapters \\({key}, ...\\) and no base model: .*merge"):
        load(stage(SHAPE, 1, range(4)), run, SHAPE)


def test_a_flipped_byte_of_a_run_that_is_a_base_is_named(folders, tmp_path):
    base = Path(shutil.copytree(folders["odd run"], tmp_path / "run"))
    checkpoint = base / "iter_0000002"
    write_manifest(checkpoint, {})
    with one_rank():
        load(stage(SHAPE, 1, [0, 1], ["first"]), base, SHAPE)
        made.flip_a_byte(checkpoint / "__0_0.distcp")
        with pytest.raises(ConfigurationError, match="iter_0000002 is damaged: __0_0.distcp does not match"):
            load(stage(SHAPE, 1, [0, 1], ["first"]), base, SHAPE)


# Ranks that read for one another.

LAYOUTS = {"DP4": (1, 1), "TP2 x DP2": (2, 1), "PP2 x DP2": (1, 2), "TP2 x PP2": (2, 2), "TP4": (4, 1)}
# The others are these without replicas, which share nothing but the order of reading.
QUICK_LAYOUTS = ("DP4", "TP2 x DP2", "PP2 x DP2")
FORMS = ("shards", "pickle", "odd distributed", "whole", "odd ranks")
NUM_RANKS = 4
DAMAGES: list[Callable[[bytes], bytes]] = [
    lambda whole: whole[:-60],
    lambda whole: whole[:-4] + struct.pack("<f", torch.nan),  # its last number
]


class Read(NamedTuple):
    """Of one rank and one folder: whether the bits are those of reading alone, and the counts of both ways."""

    equal: bool
    together: ReadCounts
    alone: ReadCounts


class Found(NamedTuple):
    """Of one rank and one layout: a Read of each form, and what was told of each damage to a file."""

    reads: dict[str, Read]
    told: list[str]


def load_here(folder: Path, layout: tuple[int, int], together: bool) -> tuple[nn.Module, ReadCounts]:
    """This rank's parameters, and what it read of them."""
    (tensor_parallel, of), at = layout, parallel_state.get_pipeline_model_parallel_rank()
    layers = range(at * SHAPE.num_layers // of, (at + 1) * SHAPE.num_layers // of)
    ends = [end for end, there in (("first", 0), ("last", of - 1)) if at == there]
    part, rank = stage(SHAPE, tensor_parallel, layers, ends), parallel_state.get_tensor_model_parallel_rank()
    return part, load(part, folder, SHAPE, rank, tensor_parallel, together=together).counts


def read_both_ways(folder: Path, layout: tuple[int, int]) -> Read:
    together, shared = load_here(folder, layout, together=True)
    alone, own = load_here(folder, layout, together=False)
    pairs = zip(base_parameters(together), base_parameters(alone), strict=True)
    return Read(all(torch.equal(one, other) for (_, one), (_, other) in pairs), shared, own)


def told_of_damage(path: Path, layout: tuple[int, int]) -> list[str]:
    """What is raised of a file that is damaged after its header was checked."""
    open_weights, whole, told = pretrained.open_weights, path.read_bytes(), []
    for damage in DAMAGES:

        def damage_after_the_check(*arguments):
            opened = open_weights(*arguments)
            path.write_bytes(damage(whole))  # noqa: B023
            return opened

        pretrained.open_weights = damage_after_the_check  # only the first rank opens all files
        told.append(attempt(lambda: load_here(path.parent, layout, together=True)))
        pretrained.open_weights = open_weights
        if dist.get_rank() == 0:
            path.write_bytes(whole)
    return told


def read_at_each(asked: tuple[dict[str, Path], list[str]]) -> dict[str, Found]:
    """Started on ranks: by layout."""
    (folders, layouts), found = asked, {}
    start_world()
    for name in layouts:
        layout = LAYOUTS[name]
        start_model_parallel(ParallelConfig(*layout, world_size=NUM_RANKS), seed=1)
        reads = {form: read_both_ways(folders[form], layout) for form in FORMS}
        found[name] = Found(reads, told_of_damage(folders["torn"] / "model-1.safetensors", layout))
        stop_model_parallel()
    stop()
    return found


@pytest.fixture(scope="module")
def by_rank(folders, request) -> list[dict[str, Found]]:
    """At the quick layouts, and at others that were chosen."""
    specs = [getattr(item, "callspec", None) for item in request.session.items if item.path == request.path]
    chosen = {*QUICK_LAYOUTS, *(spec.params["layout"] for spec in specs if spec and "layout" in spec.params)}
    return run_ranks(NUM_RANKS, read_at_each, (folders, [layout for layout in LAYOUTS if layout in chosen]))


LAYOUT_CASES = [pytest.param(layout, marks=[] if layout in QUICK_LAYOUTS else [pytest.mark.slow]) for layout in LAYOUTS]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", LAYOUT_CASES)
def test_bits_equal_those_of_reading_alone_and_replicas_read_each_byte_of_their_slices_once(layout, form, by_rank):
    tensor_parallel, pipeline_parallel = LAYOUTS[layout]
    num_replicas = NUM_RANKS // (tensor_parallel * pipeline_parallel)
    reads = [rank[layout].reads[form] for rank in by_rank]
    assert all(read.equal for read in reads)
    assert sum(read.together.bytes for read in reads) * num_replicas == sum(read.alone.bytes for read in reads)


@pytest.mark.parametrize("layout", LAYOUT_CASES)
def test_headers_are_read_by_the_first_rank_and_each_rank_opens_a_file_once(layout, by_rank):
    reads = [rank[layout].reads["shards"] for rank in by_rank]
    assert [read.together.headers for read in reads] == [3, 0, 0, 0]
    assert all(1 <= read.together.opens <= 3 for read in reads)


def test_a_file_that_is_cut_short_or_holds_nan_ends_all_ranks_with_one_message(folders, by_rank):
    """Other ranks are in a broadcast or an all-to-all by then."""
    path = folders["torn"] / "model-1.safetensors"
    cut, not_finite = map(set, zip(*(found.told for rank in by_rank for found in rank.values()), strict=True))
    error = f"ConfigurationError: {path}"
    assert cut == {f"{error} cannot be read: it was cut short while it was read. Copy it again."}
    last = max((start, name) for name, (file, start) in first_bytes(path.parent).items() if file == str(path))[1]
    assert len(not_finite) == 1 and f"{error} holds NaN or infinities in {last}. Copy" in not_finite.pop()


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
    load(whole, folders["shards"], SHAPE)
    places = first_bytes(folders["shards"])
    by_model = [places[rule.hf_tensors[0].name] for rule in rules_for(SHAPE).values()]
    by_file = sorted(by_model)
    assert len({file for file, _ in by_file}) == 3 and by_model != by_file
    assert [read for read in reads if read in by_model] == by_file


def test_no_more_broadcasts_are_in_flight_than_the_host_has_waited_for(monkeypatch):
    """A collective's `wait` does not stop the host where the device does the waiting."""
    events: list[str] = []
    started = lambda *_: events.append("start") or (lambda: None)  # noqa: E731
    monkeypatch.setattr(pretrained, "start_broadcast", started)
    monkeypatch.setattr(pretrained, "wait_for_device", lambda: events.append("done"))
    parameters: Any = [(None, nn.Parameter(torch.zeros(2))) for _ in range(20)]
    nothing: Any = SimpleNamespace(read=lambda *_: None)
    pretrained.fill_parameters(parameters, nothing, 0, 1, (None, None), lambda num_bytes: None)
    in_flight = [events[:at].count("start") - events[:at].count("done") for at in range(len(events))]
    assert events.count("start") == 20 and max(in_flight) == pretrained.MAX_IN_FLIGHT + 1


# Nodes with files of their own.


def on_nodes_of_their_own(folders: tuple[Path, Path]) -> tuple[dict[int, list[str]], str]:
    """Started on two ranks: which weight files a rank opens to compare nodes, by the number of ranks on a node (0: no
    launcher tells of nodes); and what it is told where each node has a copy of its own."""
    folder, copies = folders
    start_world()
    rank, opened, files = dist.get_rank(), [], {}
    sys.addaudithook(lambda event, arguments: opened.append(str(arguments[0])) if event == "open" else None)
    for size in (0, 2, 1):
        if size:
            places = {"LOCAL_RANK": rank % size, "LOCAL_WORLD_SIZE": size, "GROUP_RANK": rank // size}
            os.environ |= {name: str(place) for name, place in places.items()}
        opened.clear(), run_record.fingerprint_of.cache_clear()
        pretrained.require_same_model(folder)
        files[size] = sorted(Path(path).name for path in opened if path.endswith(".safetensors"))
    os.chdir(copies / str(rank))
    return files, attempt(lambda: load(nn.Module(), Path("base"), SHAPE))


def test_one_rank_of_each_node_opens_the_files_and_a_copy_with_its_tensors_at_other_places_is_refused(
    folders, tmp_path
):
    """The first rank's headers would give such a node other bytes."""
    for node in ("0", "1"):
        shutil.copytree(folders["odd"], tmp_path / node / "base")
    file = tmp_path / "1" / "base" / "model.safetensors"
    save_file(load_file(file), file, metadata={"format": "pt", "note": "of another length"})
    ranks = run_ranks(2, on_nodes_of_their_own, (folders["shards"], tmp_path))
    every = sorted(path.name for path in folders["shards"].glob("*.safetensors"))
    assert len(every) == 3 and [opened for opened, _ in ranks] == [
        {0: every, 2: every, 1: every},
        {0: every, 2: [], 1: every},
    ]
    (_, told), (_, also) = ranks
    assert told == also and "another model on rank 1 than on rank 0 (model.safetensors)" in told
