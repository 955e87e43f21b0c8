"""Small models in every form that weights come in, made of random numbers and the rules alone."""

import argparse
import io
import random
import signal
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as torch_checkpoint
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from megatron_peft.checkpoint.folders import MANIFEST, RECORD, TRACKER, write_manifest
from megatron_peft.checkpoint.safe_pickle import read_metadata
from megatron_peft.config import LINEAR_MODULES
from megatron_peft.conversion.hf_files import open_source, write_config
from megatron_peft.conversion.pretrained import base_parameters, owned_rules
from megatron_peft.models.families import config_of_shape, read_shape, rules_for
from megatron_peft.models.rules import expected_tensors
from megatron_peft.models.shape import ModelShape
from tests.checkpoint.runs import make_config, make_record

# Two key-value heads, head_dim not hidden / heads, every bias, a prime vocabulary.
ODD = ModelShape("llama", 4, 10, 12, 6, 2, 4, 23, 64, linear_biases=frozenset(LINEAR_MODULES))


def save_random(folder: Path, shape: ModelShape = ODD, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    draw = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randn(size, generator=draw).to(dtype) for name, size in expected_tensors(rules_for(shape)).items()
    }
    folder.mkdir(parents=True)
    write_config(folder, config_of_shape(shape) | {"dtype": str(dtype).removeprefix("torch.")})
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


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


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a Hugging Face folder, of one file or of several."""
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def equal(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    """The same names, types and bits."""
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


def global_tensors(folder: Path, padded_vocab_size: int = 128) -> dict[str, Tensor]:
    """The parameters of a Hugging Face folder as Megatron has them on one rank, by name."""
    shape, source = read_shape(folder), open_source(folder)
    tensors = {}
    for name, rule in owned_rules(rules_for(shape), shape).items():
        rows, *columns = rule.local_shape(1)
        rows = padded_vocab_size if type(rule).__name__ == "VocabularyRows" else rows
        tensors[name] = torch.empty(rows, *columns)
        rule.read(tensors[name], source, 0, 1)
    return tensors


def save_distributed(folder: Path, tensors: dict[str, Tensor]) -> Path:
    """What torch makes of these tensors: a distributed checkpoint without anything beside it."""
    torch_checkpoint.save(tensors, checkpoint_id=folder, no_dist=True)
    return folder


def save_ranks(source: Path, folder: Path, tp: int, pp: int, chunks: int = 1, **arguments: Any) -> Path:
    """A checkpoint of Megatron-LM of old: a file for each rank, with the objects that it keeps beside the weights."""
    shape = read_shape(source)
    layers = shape.num_layers // (pp * chunks)
    for stage in range(pp):
        for rank in range(tp):
            models = [_stage(source, shape, rank, tp, chunk * pp + stage, layers) for chunk in range(chunks)]
            place = folder / (f"mp_rank_{rank:02d}_{stage:03d}" if pp > 1 else f"mp_rank_{rank:02d}")
            place.mkdir(parents=True)
            named = {f"model{i}": m for i, m in enumerate(models)} if chunks > 1 else {"model": models[0]}
            torch.save({**named, **_beside(shape, arguments)}, place / "model_optim_rng.pt")
    return folder


def _stage(source: Path, shape: ModelShape, rank: int, tp: int, chunk: int, layers: int) -> dict[str, Any]:
    """A chunk's parameters on a rank; layers are numbered within it. Copies of the embedding belong to both ends."""
    numbers, rules, weights = range(chunk * layers, (chunk + 1) * layers), rules_for(shape), open_source(source)
    ends = ["first"] * (numbers.start == 0) + ["last"] * (numbers.stop == shape.num_layers)
    module = stage(shape, tp, numbers, ends)
    for name, parameter in base_parameters(module):
        rules[name].read(parameter, weights, rank, tp)
    state = {name: parameter.data for name, parameter in module.named_parameters()}
    return state | {"decoder.layers.0.self_attention.core_attention._extra_state": None}


def save_run(original: Path, folder: Path, tensors: dict[str, Tensor], method="full", shape: ModelShape = ODD) -> Path:
    """A --save folder as a run of `method` on `original` leaves it."""
    checkpoint = save_distributed(folder / "iter_0000002", tensors)
    config = make_config(model={"pretrained_checkpoint": str(original)}, peft={"method": method})
    (checkpoint / RECORD).write_text(make_record(shape=shape, config=config).to_json())
    (folder / TRACKER).write_text("2\n")
    return folder


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def hold_nan(checkpoint: Path, key: str) -> Path:
    """Make the last value of the first slice whose key begins so NaN, with a manifest that fits; its file."""
    places = read_metadata(checkpoint).storage_data
    place = next(place for index, place in sorted(places.items(), key=str) if index.fqn.startswith(key))
    path, (start, length) = checkpoint / place.relative_path, (place.offset, place.length)
    content = bytearray(path.read_bytes())
    values = torch.load(io.BytesIO(content[start : start + length])).contiguous()
    at = content.index(values.numpy().tobytes(), start)
    values.view(-1)[-1] = torch.nan
    content[at : at + values.nbytes] = values.numpy().tobytes()
    path.write_bytes(content)
    (checkpoint / MANIFEST).unlink(missing_ok=True)
    write_manifest(checkpoint, {})
    return path


SAME_NAMES = (
    "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels vocab_size "
    "max_position_embeddings norm_epsilon rotary_base"
)


def megatron_arguments(shape: ModelShape) -> dict[str, Any]:
    """What Megatron-LM's arguments say of a Llama."""
    return {name: getattr(shape, name) for name in SAME_NAMES.split()} | {
        "group_query_attention": True,
        "padded_vocab_size": 128,
        "rotary_percent": 1.0,
        "add_bias_linear": bool(shape.linear_biases),
        "untie_embeddings_and_output_weights": not shape.tied_embeddings,
        "swiglu": True,
        "normalization": "RMSNorm",
        "position_embedding_type": "rope",
    }


def _beside(shape: ModelShape, changes: dict[str, Any]) -> dict[str, Any]:
    objects = {"params_dtype": torch.float32, "exit_signal": signal.SIGTERM}
    arguments = argparse.Namespace(**megatron_arguments(shape) | objects | changes)
    generators = {"random_rng_state": random.getstate(), "np_rng_state": np.random.get_state()}
    return {"args": arguments, "checkpoint_version": 3.0, "iteration": 10, "rng_state": [generators]}


@st.composite
def llama_shapes(draw: st.DrawFn, size: int = 1) -> ModelShape:
    """Odd Llamas and Qwen3s that a tensor-parallel size divides."""
    layers, hidden, vocabulary = draw(st.integers(1, 3)), draw(st.integers(1, 9)), draw(st.integers(1, 140))
    features, groups = size * draw(st.integers(1, 9)), size * draw(st.integers(1, 3))
    heads, head_dim = groups * draw(st.integers(1, 3)), draw(st.sampled_from([2, 4, 6]))
    biases = draw(st.sampled_from([ODD.linear_biases, frozenset(), frozenset({"linear_qkv", "linear_proj"})]))
    sizes = (layers, hidden, features, heads, groups, head_dim, vocabulary, 64)
    family = draw(st.sampled_from(["llama", "qwen3"]))
    biases &= ODD.linear_biases if family == "llama" else {"linear_qkv", "linear_proj"}
    kinds = {"linear_biases": biases, "tied_embeddings": draw(st.booleans()), "qk_layernorm": family == "qwen3"}
    return ModelShape(family, *sizes, **kinds)


@st.composite
def bloom_shapes(draw: st.DrawFn, size: int = 1) -> ModelShape:
    """Odd Blooms that a tensor-parallel size divides."""
    heads, head_dim = size * draw(st.integers(1, 5)), draw(st.integers(1, 5))
    layers, hidden, vocabulary = draw(st.integers(1, 3)), heads * head_dim, draw(st.integers(1, 140))
    return ModelShape(
        "bloom", layers, hidden, 4 * hidden, heads, heads, head_dim, vocabulary, 64,
        normalization="LayerNorm", activation="gelu_tanh", gated_linear_unit=False, linear_biases=ODD.linear_biases,
        tied_embeddings=draw(st.booleans()), position_embedding="alibi", embedding_layernorm=True,
    )  # fmt: skip
