"""A quantized base is read by rows, and its codes are those of the whole matrices, whatever the layout."""

import json
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import bitsandbytes.functional as bnb
import pytest
import torch
import torch.distributed as dist
import transformers
from megatron.core import parallel_state
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_peft.adapters.quantized_weight import QuantizedWeight
from megatron_peft.config import ConfigurationError, ModelConfig, ParallelConfig
from megatron_peft.conversion import pretrained
from megatron_peft.conversion.convert import hf_to_megatron
from megatron_peft.conversion.megatron_files import OUTPUT
from megatron_peft.conversion.nf4_files import STATE
from megatron_peft.conversion.pretrained import base_parameters, load_pretrained, open_weights, read_trained_values
from megatron_peft.models.families import read_shape, rules_for
from megatron_peft.models.gpt import build_model_chunks
from megatron_peft.models.rules import Columns
from megatron_peft.models.shape import ModelShape
from megatron_peft.runtime.launch import start_model_parallel, start_world, stop
from tests.conversion.megatron_folders import global_tensors, save_distributed, save_random, stage
from tests.one_rank import one_rank
from tests.ranks import run_ranks
from tests.tiny_llama import save_llama

# Heads and MLP of whole blocks on two, three and four ranks; head_dim is not hidden / heads.
MORE_ROWS = 4  # of each rank's output layer than its vocabulary needs: of four ranks the last has padding alone
SHAPE = ModelShape("llama", 1, 192, 768, 12, 12, 64, 23, 64)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("bases")
    original = save_random(place / "hugging face", SHAPE)
    distributed = save_distributed(place / "megatron", global_tensors(original))
    (distributed / "config.json").write_bytes((original / "config.json").read_bytes())
    return {"hugging face": original, "megatron": distributed}


AT_ONCE = pretrained.QUANTIZED_AT_ONCE


@pytest.fixture(autouse=True)
def world(monkeypatch):
    monkeypatch.setattr(pretrained, "QUANTIZED_AT_ONCE", 50 * SHAPE.hidden_size)  # no divisor of any number of rows
    with one_rank():
        yield


def is_quantized(name: str) -> bool:
    return ".linear_" in name or name == OUTPUT


def quantized_stage(size: int, precision: str, shape: ModelShape) -> nn.Module:
    chunk = stage(shape, size, range(shape.num_layers))
    for name, parameter in list(chunk.named_parameters()):
        if is_quantized(name):
            rows = len(parameter) + MORE_ROWS * (name == OUTPUT)
            weight: Any = nn.Parameter(torch.empty(rows, parameter.shape[1], device="meta"), requires_grad=False)
            weight.quantized = QuantizedWeight(precision, weight.shape, torch.float32)
            weight.quantized.codes.view(torch.uint8).fill_(1)
            weight.quantized.scales.fill_(1.0)
            chunk.get_submodule(name.removesuffix(".weight")).weight = weight
    return chunk


def codes_of_whole(folder: Path, size: int, precision: str, shape: ModelShape = SHAPE) -> dict[str, list[Tensor]]:
    """Codes and scales of each linear layer, put together from the ranks' shares."""
    shares: dict[str, list[Any]] = {}
    for rank in range(size):
        chunk = quantized_stage(size, precision, shape)
        load_pretrained([chunk], folder, shape, tensor_parallel_rank=rank, tensor_parallel_size=size, progress=False)
        for name, parameter in base_parameters(chunk):
            shares.setdefault(name, []).append(parameter)
    rules = rules_for(shape)
    return {
        name: [
            put_together(rules[name], [getattr(one.quantized, part) for one in of_ranks])
            for part in ("codes", "scales")
        ]
        for name, of_ranks in shares.items()
        if is_quantized(name)
    }


def put_together(rule: Any, shares: list[Tensor]) -> Tensor:
    if isinstance(rule, Columns):
        return torch.cat([share.view(torch.uint8) for share in shares], 1)
    if rule.name == OUTPUT:  # its padding is zeros
        whole, num_rows = torch.cat([share.view(torch.uint8) for share in shares]), rule.hf_tensors[0].shape[0]
        assert len(whole) >= num_rows + MORE_ROWS and not whole[num_rows:].any()
        return whole[:num_rows]
    parts = 2 if rule.name.endswith("fc1.weight") else 1  # gate and up
    return torch.cat([share.view(torch.uint8).chunk(parts)[part] for part in range(parts) for share in shares])


@pytest.mark.parametrize("source", ["hugging face", "megatron"])
def test_codes_are_those_of_bitsandbytes_at_any_tensor_parallel_size(folders, source):
    whole = {name: x for name, x in global_tensors(folders["hugging face"]).items() if is_quantized(name)}
    whole[OUTPUT] = whole[OUTPUT][: SHAPE.vocab_size]
    for size in (1, 2, 3, 4):
        found = codes_of_whole(folders[source], size, "nf4")
        assert found.keys() == whole.keys()
        for name, (codes, scales) in found.items():
            expected, state = bnb.quantize_4bit(whole[name], blocksize=64, quant_type="nf4")
            assert torch.equal(codes.flatten(), expected.flatten()), (name, size)
            assert torch.equal(scales.view(torch.float32).flatten(), state.absmax), (name, size)


def test_fp8_codes_at_any_tensor_parallel_size(folders):
    alone = codes_of_whole(folders["hugging face"], 1, "fp8")
    for size in (2, 3, 4):
        found = codes_of_whole(folders["hugging face"], size, "fp8")
        assert found.keys() == alone.keys()
        assert all(torch.equal(*pair) for name in alone for pair in zip(found[name], alone[name], strict=True)), size


class Largest(TorchDispatchMode):
    """Remembers the largest float32 tensor that had memory, and how often one of PADDED numbers was made."""

    size, num_large = 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, tuple | list) else (found,):
            if isinstance(tensor, Tensor) and tensor.dtype == torch.float32 and not tensor.is_meta:
                size = tensor.untyped_storage().nbytes() // tensor.itemsize
                self.size = max(self.size, size)
                self.num_large += size == PADDED and "empty" in str(function)
        return found


PADDED = 128 * SHAPE.hidden_size  # of the embedding and of the output layer


@pytest.mark.parametrize("precision", ["nf4", "fp8"])
def test_no_weight_is_ever_there_in_full_precision(folders, precision):
    base = folders["hugging face"]
    with Largest() as largest:
        config = ModelConfig(str(base), base_precision=precision, quantize_output_layer=True)
        chunks = build_model_chunks(SHAPE, config, ParallelConfig())
        load_pretrained(chunks, base, SHAPE, tensor_parallel_rank=0, tensor_parallel_size=1, progress=False)
    assert largest.size <= max(PADDED, pretrained.QUANTIZED_AT_ONCE) and largest.num_large == 1, "the embedding"
    assert 4 * AT_ONCE <= 16e6, "of the 400 MB that loading may take beyond the model"
    logits = chunks[0](torch.tensor([[1, 2]]), torch.tensor([[0, 1]]), None)
    assert logits[..., : SHAPE.vocab_size].isfinite().all()


# A folder of bitsandbytes' own.


@pytest.fixture(scope="module", params=[False, True], ids=["plain scales", "quantized scales"])
def nf4_folder(request, tmp_path_factory) -> Path:
    """A small Llama that transformers has quantized and saved; the second with its output layer.

    With a block of zeros, large blocks and small ones: quantized scales of the small ones are below 0.
    """
    place = tmp_path_factory.mktemp("nf4")
    sizes = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 1, "num_attention_heads": 12}
    base = save_llama(
        place / "base", **sizes, num_key_value_heads=12, head_dim=64, attention_bias=False, mlp_bias=False
    )
    weights = load_file(base / "model.safetensors")
    for name in (name for name in weights if name.endswith("_proj.weight")):
        weights[name][3, :64] = 0
        weights[name][5] *= 20
        weights[name][:, 64:128] *= 0.02
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    how = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=request.param,
        llm_int8_skip_modules=["none"] if request.param else None,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, quantization_config=how)
    model.save_pretrained(place / "nf4")
    return place / "nf4"


def test_a_folder_of_bitsandbytes_is_read_bit_for_bit_at_any_tensor_parallel_size(nf4_folder):
    shape = read_shape(nf4_folder)
    stored = load_file(nf4_folder / "model.safetensors")
    has_output = stored["lm_head.weight"].dtype == torch.uint8
    num_below_0 = 0
    for size in (1, 2, 3, 4):
        found = codes_of_whole(nf4_folder, size, "nf4", shape)
        for name, module, rows in (
            ("self_attention.linear_proj", "self_attn.o_proj", slice(None)),
            ("mlp.linear_fc2", "mlp.down_proj", slice(None)),
            ("mlp.linear_fc1", "mlp.gate_proj", slice(0, 768)),
            ("mlp.linear_fc1", "mlp.up_proj", slice(768, None)),
            *([("output", "lm_head", slice(None))] if has_output else []),
        ):
            of_layer = name != "output"
            codes, scales = (part[rows] for part in found[f"decoder.layers.0.{name}.weight" if of_layer else OUTPUT])
            prefix = f"model.layers.0.{module}.weight" if of_layer else "lm_head.weight"
            beside = {key.removeprefix(f"{prefix}."): x for key, x in stored.items() if key.startswith(f"{prefix}.")}
            state = bnb.QuantState.from_dict({**beside}, device=torch.device("cpu"))
            absmax = state.absmax
            if state.nested:
                absmax = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
                num_below_0 += int((absmax < 0).sum())
            assert torch.equal(codes.flatten(), stored[prefix].flatten()), (name, size)
            assert torch.equal(scales.view(torch.float32).flatten(), absmax), (name, size)
    assert (num_below_0 > 0) == has_output, "scales that were quantized"


def test_a_folder_of_bitsandbytes_is_read_in_fp8_too(nf4_folder):
    stored = load_file(nf4_folder / "model.safetensors")
    codes, scales = codes_of_whole(nf4_folder, 1, "fp8", read_shape(nf4_folder))[
        "decoder.layers.0.mlp.linear_fc2.weight"
    ]
    prefix = "model.layers.0.mlp.down_proj.weight"
    beside = {key.removeprefix(f"{prefix}."): x for key, x in stored.items() if key.startswith(f"{prefix}.")}
    values = bnb.dequantize_4bit(stored[prefix], bnb.QuantState.from_dict(beside, device=torch.device("cpu"))).float()
    blocks = codes.view(torch.float8_e4m3fn).float().unflatten(-1, (-1, 64)) * scales.view(torch.float32)[..., None]
    apart = (blocks.flatten(-2) - values).abs()
    assert (apart <= values.abs() / 16 + values.abs().max() / 4096).all() and values.abs().max() > 0


def _say(tensors: dict[str, Tensor], name: str, **changes: Any) -> None:
    state = json.loads(bytes(tensors[name + STATE].tolist())) | changes
    tensors[name + STATE] = torch.tensor([*json.dumps(state).encode()], dtype=torch.uint8)


def _pack_in_bf16(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name] = tensors[name].flatten().view(torch.bfloat16).view(-1, 1)


OF_QUANTIZED_SCALES = {"nested_blocksize": 128, "nested_dtype": "bfloat16", "nested_offset": "0"}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        *(
            (partial(_say, **{key: value}), f"has {key}( {value})?, which is not read")
            for key, value in OF_QUANTIZED_SCALES.items()
        ),
        (lambda tensors, name: tensors.pop(f"{name}.absmax"), "missing or of the wrong size: .*absmax"),
        (
            lambda tensors, name: _say(tensors, name, blocksize=128),
            "has blocksize 128, which is not read: blocks of 64 .* Quantize the model so, or take the one that it",
        ),
        (_pack_in_bf16, "codes packed as BF16, which is not read: .* bnb_4bit_quant_storage uint8"),
        (lambda tensors, name: _say(tensors, name, quant_type="fp4"), "has quant_type fp4"),
        (lambda tensors, name: _say(tensors, name, shape=[1, -64]), "is not of a matrix in blocks of 64"),
    ],
)
def test_a_folder_of_bitsandbytes_that_is_damaged_or_of_another_form_is_refused(nf4_folder, tmp_path, change, told):
    tensors, name = load_file(nf4_folder / "model.safetensors"), "model.layers.0.mlp.down_proj.weight"
    if (tensors[f"{name}.absmax"].dtype == torch.uint8) != ("nested" in told):
        pytest.skip("of the other kind of scales")
    change(tensors, name)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((nf4_folder / "config.json").read_bytes())
    with pytest.raises(ConfigurationError, match=told):
        codes_of_whole(tmp_path, 1, "nf4", read_shape(tmp_path))


OTHERS: list[tuple[str, dict[str, Any]]] = [
    *((method, {"bits": 4, "load_in_8bit": True}) for method in ("gptq", "awq", "fp8", "bitsandbytes")),
    ("bitsandbytes", {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}),
]


@pytest.mark.parametrize(("method", "how"), OTHERS)
def test_other_quantizations_are_refused_by_name_with_the_way_out(nf4_folder, tmp_path, method, how):
    config = json.loads((nf4_folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, **how}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigurationError, match=f"{method}.*Take the model that they were made from, with --base-pr"):
        read_shape(tmp_path)


def test_an_output_layer_that_it_holds_in_codes_is_read_as_their_numbers(nf4_folder):
    """Without --quantize-output-layer too."""
    shape, stored = read_shape(nf4_folder), load_file(nf4_folder / "model.safetensors")
    chunk = stage(shape, 1, range(1))
    load_pretrained([chunk], nf4_folder, shape, tensor_parallel_rank=0, tensor_parallel_size=1, progress=False)
    weight = dict(base_parameters(chunk))[OUTPUT]
    beside = {key.removeprefix("lm_head.weight."): x for key, x in stored.items() if key.startswith("lm_head.weight.")}
    expected = stored["lm_head.weight"]
    if beside:
        expected = bnb.dequantize_4bit(expected, bnb.QuantState.from_dict(beside, device=torch.device("cpu")))
    assert torch.equal(weight, expected.view(weight.shape)) and weight.any()


def test_what_is_made_of_it_says_nothing_of_a_quantization(nf4_folder, tmp_path):
    """Megatron's format holds the numbers that the codes stand for."""
    shape = read_shape(nf4_folder)
    hf_to_megatron(nf4_folder, tmp_path / "megatron", progress=False)
    assert "quantization_config" not in json.loads((tmp_path / "megatron" / "config.json").read_text())
    there, again = stage(shape, 1, range(1)), stage(shape, 1, range(1))
    for chunk, folder in ((there, nf4_folder), (again, tmp_path / "megatron")):
        load_pretrained([chunk], folder, shape, tensor_parallel_rank=0, tensor_parallel_size=1, progress=False)
    pairs = zip(there.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(*pair) and pair[0].any() for pair in pairs)


def load_at_tp2(folder: Path, precision: str, together: bool) -> dict[str, QuantizedWeight]:
    shape, rank = read_shape(folder), parallel_state.get_tensor_model_parallel_rank()
    chunk = quantized_stage(2, precision, shape)
    place = {"tensor_parallel_rank": rank, "tensor_parallel_size": 2}
    load_pretrained([chunk], folder, shape, **place, progress=False, together=together)
    return {name: weight.quantized for name, weight in base_parameters(chunk) if is_quantized(name)}


def load_together(folder: Path) -> tuple[dict[str, list[str]], str]:
    """Started on two ranks that read for one another.

    Returns the names of weights whose codes and scales equal those of reading alone, by precision; and the error
    raised on this rank if quantizing fails on the second one.
    """
    pretrained.QUANTIZED_AT_ONCE = 191 * 768  # of the 192 rows of linear_proj and linear_fc2: the last range has one
    start_world()
    start_model_parallel(ParallelConfig(2, world_size=2), seed=1)
    same = {}
    for precision in ("nf4", "fp8"):
        found, alone = (load_at_tp2(folder, precision, together) for together in (True, False))
        same[precision] = [
            name
            for name, weight in found.items()
            if all(torch.equal(getattr(weight, part), getattr(alone[name], part)) for part in ("codes", "scales"))
        ]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError) as error:
        if dist.get_rank() == 1:
            patch.setattr(QuantizedWeight, "fill_rows", mock.Mock(side_effect=RuntimeError("out of memory")))
        load_at_tp2(folder, "fp8", together=True)
    stop()
    return same, f"{error.type.__name__}: {error.value}"


@pytest.fixture(scope="module")
def loaded_together(nf4_folder) -> Callable[[], list[tuple[dict[str, list[str]], str]]]:
    return cache(lambda: run_ranks(2, load_together, nf4_folder))


@pytest.mark.parametrize("precision", ["nf4", "fp8"])
def test_load_together_gives_the_same_codes_where_a_rank_has_no_rows(loaded_together, precision):
    assert [len(same[precision]) for same, _ in loaded_together()] == [5, 5]


def test_load_together_raises_on_all_ranks_if_one_fails(loaded_together):
    assert [error for _, error in loaded_together()] == [
        "FailedOnAnotherRank: rank 1: RuntimeError: out of memory",
        "RuntimeError: out of memory",
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merge_starts_from_what_a_run_on_its_codes_computes_with(nf4_folder, dtype):
    shape, stored = read_shape(nf4_folder), load_file(nf4_folder / "model.safetensors")
    rules, weights = open_weights(nf4_folder, shape)
    values = read_trained_values(rules["decoder.layers.0.mlp.linear_fc2.weight"], weights, "nf4", dtype)
    prefix = "model.layers.0.mlp.down_proj.weight"
    beside = {key.removeprefix(f"{prefix}."): x for key, x in stored.items() if key.startswith(f"{prefix}.")}
    state = bnb.QuantState.from_dict(beside, device=torch.device("cpu"))
    state.dtype = dtype
    assert torch.equal(values, bnb.dequantize_4bit(stored[prefix], state))
