"""Chunks are filled from a folder at any layout; what does not fit is named before a weight changes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from megatron_peft.config import ConfigurationError, ModelConfig, ParallelConfig
from megatron_peft.conversion import progress as progress_bar
from megatron_peft.conversion.families import rules_for
from megatron_peft.conversion.loader import LoadReport, base_parameters, load_pretrained
from megatron_peft.models.gpt import build_model_chunks
from megatron_peft.models.huggingface import read_shape
from megatron_peft.models.shape import ModelShape
from megatron_peft.runtime.launch import start_model_parallel, start_world, stop

ENDS = {"first": ("embedding",), "last": ("decoder.final_layernorm", "output_layer")}


def stage(shape: ModelShape, size: int, layers: Iterable[int], ends: Iterable[str] = ("first", "last")) -> nn.Module:
    """Stand-in of a GPTModel chunk on one of `size` ranks: the parameters of these layers and ends, full of NaN."""
    chunk = nn.Module()
    local = {f"decoder.layers.{number}.": f"decoder.layers.{index}." for index, number in enumerate(layers)}
    prefixes = local | {name: name for end in ends for name in ENDS[end]}
    for name, rule in rules_for(shape).items():
        prefix = next((p for p in prefixes if name.startswith(p)), None)
        if prefix is not None:
            put(chunk, prefixes[prefix] + name.removeprefix(prefix), torch.full(rule.local_shape(size), torch.nan))
    for index, number in enumerate(layers):
        chunk.get_submodule(f"decoder.layers.{index}").layer_number = number + 1
    return chunk


def put(module: nn.Module, name: str, tensor: Tensor) -> None:
    *path, last = name.split(".")
    for step in path:
        if not hasattr(module, step):
            module.add_module(step, nn.Module())
        module = getattr(module, step)
    module.register_parameter(last, nn.Parameter(tensor))


def load(chunks: list[nn.Module], folder: Path, rank: int = 0, size: int = 1, progress: bool = False) -> LoadReport:
    return load_pretrained(
        chunks,
        folder,
        read_shape(folder),
        tensor_parallel_rank=rank,
        tensor_parallel_size=size,
        progress=progress,
    )


def num_bytes(chunks: list[nn.Module]) -> int:
    return sum(p.numel() * p.element_size() for chunk in chunks for p in chunk.parameters())


@pytest.mark.parametrize("kind", ["single", "sharded", "torch"])
def test_layout_does_not_change_what_is_loaded(
    kind: str, saved_folders: dict[str, Path], odd_llama: LlamaForCausalLM
) -> None:
    """Two tensor-parallel ranks, three chunks over two stages, put together again and turned back."""
    folder = saved_folders[kind]
    shape = read_shape(folder)
    shards: dict[str, list[Tensor]] = {}
    for rank in range(2):
        first = [stage(shape, 2, [0], ["first"]), stage(shape, 2, [2], ["last"])]
        for chunks in (first, [stage(shape, 2, [1], [])]):
            load(chunks, folder, rank, size=2)
            for name, parameter in (pair for chunk in chunks for pair in base_parameters(chunk)):
                shards.setdefault(name, []).append(parameter.detach())
    written = {n: t for name, rule in rules_for(shape).items() for n, t in rule.write(shards[name]).items()}
    state = odd_llama.state_dict()
    assert written.keys() == state.keys()
    assert all(torch.equal(written[name], state[name]) for name in state)


@pytest.mark.parametrize(("rank", "size"), [(0, 1), (0, 2), (1, 2)])
def test_a_rank_reads_its_own_slices_only(rank: int, size: int, saved_folders: dict[str, Path]) -> None:
    shape = read_shape(saved_folders["sharded"])
    chunks = [stage(shape, size, range(3))]
    report = load(chunks, saved_folders["sharded"], rank, size)
    padding = 2 * (rank + 1 == size == 2) * shape.hidden_size * 4  # 101 rows are 51 and 50 and a row of zeros
    assert report.bytes_read == num_bytes(chunks) - padding
    assert report.num_tensors == 3 + 3 * 10
    assert report.seconds > 0


def test_tied_output_layer_of_the_last_stage_is_the_embedding(saved_folders: dict[str, Path]) -> None:
    shape = read_shape(saved_folders["tied"])
    last = stage(shape, 1, [2], ["last"])
    first = stage(shape, 1, [0, 1], ["first"])
    load([first], saved_folders["tied"])
    load([last], saved_folders["tied"])
    assert torch.equal(last.output_layer.weight, first.embedding.word_embeddings.weight)
    assert not last.output_layer.weight.isnan().any()


def test_weights_are_converted_in_place(saved_folders: dict[str, Path], odd_llama: LlamaForCausalLM) -> None:
    chunk = stage(read_shape(saved_folders["single"]), 1, range(3)).bfloat16()
    before = dict(chunk.named_parameters())
    load([chunk], saved_folders["single"])
    assert all(parameter is before[name] for name, parameter in chunk.named_parameters())
    assert torch.equal(chunk.output_layer.weight, odd_llama.lm_head.weight.bfloat16())
    assert chunk.output_layer.weight.requires_grad


def test_adapters_are_left_alone(saved_folders: dict[str, Path]) -> None:
    chunk = stage(read_shape(saved_folders["single"]), 1, range(3))
    put(chunk, "decoder.layers.0.mlp.linear_fc1.adapter.A", torch.full((2, 2), 5.0))
    load([chunk], saved_folders["single"])
    assert torch.equal(chunk.get_parameter("decoder.layers.0.mlp.linear_fc1.adapter.A"), torch.full((2, 2), 5.0))


def test_parameter_without_a_rule_is_named(saved_folders: dict[str, Path]) -> None:
    chunk = stage(read_shape(saved_folders["single"]), 1, range(3))
    put(chunk, "decoder.layers.0.mlp.linear_fc3.weight", torch.zeros(2, 3))
    with pytest.raises(ConfigurationError, match=r"decoder.layers.0.mlp.linear_fc3.weight \[2, 3\] is part of the"):
        load([chunk], saved_folders["single"])


def test_model_of_another_shape_is_named(saved_folders: dict[str, Path]) -> None:
    shape = replace(read_shape(saved_folders["single"]), ffn_hidden_size=70)
    chunk = stage(shape, 1, range(3))
    with pytest.raises(ConfigurationError, match=r"linear_fc1.weight is \[140, 96\] on a rank, but .* \[144, 96\]"):
        load([chunk], saved_folders["single"])


def test_layer_beyond_the_checkpoint_is_named(saved_folders: dict[str, Path]) -> None:
    shape = replace(read_shape(saved_folders["single"]), num_layers=4)
    with pytest.raises(ConfigurationError, match="decoder.layers.3.input_layernorm.* no tensor of the checkpoint"):
        load([stage(shape, 1, range(4))], saved_folders["single"])


def test_nothing_is_read_when_a_tensor_is_missing(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("torch")
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    del state["model.layers.2.mlp.up_proj.weight"]
    torch.save(state, folder / "pytorch_model.bin")
    chunk = stage(read_shape(folder), 1, [0], ["first"])
    with pytest.raises(ConfigurationError, match="1 missing: model.layers.2.mlp.up_proj.weight"):
        load([chunk], folder)
    assert all(parameter.isnan().all() for parameter in chunk.parameters())


@pytest.mark.parametrize(
    ("terminal", "progress", "shown"), [(True, True, True), (True, False, False), (False, True, False)]
)
def test_bar_is_shown_at_a_terminal_only(
    terminal: bool,
    progress: bool,
    shown: bool,
    saved_folders: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(progress_bar, "Console", lambda stderr: Console(stderr=stderr, force_terminal=terminal))
    load([stage(read_shape(saved_folders["single"]), 1, range(3))], saved_folders["single"], progress=progress)
    printed = capsys.readouterr()
    assert "Loading weights" in printed.err if shown else printed.err == ""
    assert printed.out == ""


@pytest.fixture
def alone() -> Iterator[ParallelConfig]:
    """A world of one process."""
    layout = ParallelConfig()
    start_world(layout)
    start_model_parallel(layout, seed=1)
    yield layout
    stop()


@pytest.mark.parametrize("kind", ["single", "tied"])
def test_logits_equal_those_of_transformers(
    kind: str,
    alone: ParallelConfig,
    saved_folders: dict[str, Path],
    odd_llama: LlamaForCausalLM,
    tied_llama: LlamaForCausalLM,
) -> None:
    """A real GPTModel: grouped queries, biases, head_dim, llama3 frequencies beyond the trained length."""
    folder, reference = saved_folders[kind], {"single": odd_llama, "tied": tied_llama}[kind]
    tokens = torch.randint(0, 101, (2, 48), generator=torch.Generator().manual_seed(0))
    chunks = build_model_chunks(read_shape(folder), ModelConfig(pretrained_checkpoint=str(folder)), alone)
    load(chunks, folder)
    with torch.no_grad():
        logits = chunks[0].eval()(tokens, torch.arange(48).expand(2, -1), None)
        expected = reference(tokens).logits
    assert expected.abs().max() > 1
    torch.testing.assert_close(logits[..., :101], expected, rtol=0, atol=1e-4)
