"""--pretrained-checkpoint opens every form of a base model at any layout, and what does not fit is named first."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from megatron_peft.checkpoint.folders import write_manifest
from megatron_peft.config import ConfigurationError
from megatron_peft.conversion import writer as progress_bar
from megatron_peft.conversion.convert import hf_to_megatron
from megatron_peft.conversion.pretrained import LoadReport, base_parameters, load_pretrained, read_model_shape
from megatron_peft.models.families import read_shape, rules_for
from megatron_peft.models.shape import ModelShape
from tests.conversion import megatron_folders as made
from tests.conversion.megatron_folders import ODD, global_tensors, save_random, save_ranks, save_run, stage
from tests.one_rank import one_rank


def load(chunk: nn.Module, folder: Path, shape: ModelShape, rank=0, size=1, progress=False) -> LoadReport:
    place = {"tensor_parallel_rank": rank, "tensor_parallel_size": size}
    return load_pretrained([chunk], folder, shape, **place, progress=progress)


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
    monkeypatch.setattr(progress_bar, "Console", lambda stderr: Console(stderr=stderr, force_terminal=terminal))
    load(stage(shape, 1, range(3)), saved_folders["single"], shape, progress=progress)
    printed = capsys.readouterr()
    assert "Loading weights" in printed.err if terminal and progress else printed.err == ""
    assert printed.out == ""


SHAPES = {"odd": ODD, "tied": dataclasses.replace(ODD, tied_embeddings=True)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    work, found = tmp_path_factory.mktemp("forms"), {}
    for name, shape in SHAPES.items():
        original = found[name] = save_random(work / name, shape)
        found[f"{name} distributed"] = hf_to_megatron(original, work / f"{name}-megatron", progress=False)
        found[f"{name} ranks"] = save_ranks(original, work / f"{name}-ranks", tp=2, pp=2)
        found[f"{name} run"] = save_run(original, work / f"{name}-run", global_tensors(original))
    return found


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
    chunk = stage(ODD, 2, range(4))
    for name in ("embedding.word_embeddings", "output_layer"):
        chunk.get_submodule(name).weight = nn.Parameter(torch.full((64, 10), torch.nan))  # 128 padded rows
    report = load(chunk, folders["odd distributed"], ODD, rank, 2)
    assert report.counts.bytes == sum(p.numel() * p.element_size() for p in chunk.parameters())
    assert report.num_tensors == len(rules_for(ODD)) and report.seconds > 0


def test_shape_is_read_from_every_form(folders):
    for form in ("odd", "odd distributed", "odd ranks", "odd run", "tied", "tied distributed", "tied ranks"):
        assert read_model_shape(folders[form]) == SHAPES[form.partition(" ")[0]]


def test_a_config_beside_old_ranks_is_believed(folders, tmp_path):
    save_ranks(folders["odd"], tmp_path / "iter_0000010", tp=1, pp=1, vocab_size=None)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("10")
    with pytest.raises(ConfigurationError, match="vocabulary padded to 128 rows .*config.json"):
        read_model_shape(tmp_path)
    shutil.copy(folders["odd"] / "config.json", tmp_path)
    assert read_model_shape(tmp_path) == ODD


def test_a_run_of_adapters_is_no_base(folders, tmp_path):
    key = "decoder.layers.0.mlp.linear_fc1.adapter.A"
    run = save_run(folders["odd"], tmp_path / "run", {key: torch.zeros(2)}, "lora")
    with pytest.raises(ConfigurationError, match=f"holds adapters \\({key}, ...\\) and no base model: .*merge"):
        load(stage(ODD, 1, range(4)), run, ODD)


def test_a_flipped_byte_of_a_run_that_is_a_base_is_named(folders, tmp_path):
    base = Path(shutil.copytree(folders["odd run"], tmp_path / "run"))
    checkpoint = base / "iter_0000002"
    write_manifest(checkpoint, {})
    with one_rank():
        load(stage(ODD, 1, [0, 1], ["first"]), base, ODD)
        made.flip_a_byte(checkpoint / "__0_0.distcp")
        with pytest.raises(ConfigurationError, match="iter_0000002 is damaged: __0_0.distcp does not match"):
            load(stage(ODD, 1, [0, 1], ["first"]), base, ODD)
