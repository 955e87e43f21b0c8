"""A quantized base is read by rows, and its codes are those of the whole matrices, whatever the layout."""

from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_peft.adapters.quantized_weight import QuantizedWeight
from megatron_peft.config import ModelConfig, ParallelConfig
from megatron_peft.conversion import pretrained
from megatron_peft.conversion.pretrained import base_parameters, load_pretrained
from megatron_peft.models.families import rules_for
from megatron_peft.models.gpt import build_model_chunks
from megatron_peft.models.rules import Columns
from megatron_peft.models.shape import ModelShape
from tests.conversion.megatron_folders import global_tensors, save_distributed, save_random, stage
from tests.one_rank import one_rank

# Heads and MLP of whole blocks on two, three and four ranks; head_dim is not hidden / heads.
SHAPE = ModelShape("llama", 1, 192, 768, 12, 12, 64, 23, 64)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("bases")
    original = save_random(place / "hugging face", SHAPE)
    distributed = save_distributed(place / "megatron", global_tensors(original))
    (distributed / "config.json").write_bytes((original / "config.json").read_bytes())
    return {"hugging face": original, "megatron": distributed}


@pytest.fixture(autouse=True)
def world(monkeypatch):
    monkeypatch.setattr(pretrained, "QUANTIZED_AT_ONCE", 50 * SHAPE.hidden_size)  # no divisor of any number of rows
    with one_rank():
        yield


def quantized_stage(size: int, precision: str) -> nn.Module:
    chunk = stage(SHAPE, size, range(SHAPE.num_layers))
    for name, parameter in list(chunk.named_parameters()):
        if ".linear_" in name:
            weight: Any = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
            weight.quantized = QuantizedWeight(precision, parameter.shape, torch.float32)
            chunk.get_submodule(name.removesuffix(".weight")).weight = weight
    return chunk


def codes_of_whole(folder: Path, size: int, precision: str) -> dict[str, list[Tensor]]:
    """Codes and scales of each linear layer, put together from the ranks' shares."""
    shares: dict[str, list[Any]] = {}
    for rank in range(size):
        chunk = quantized_stage(size, precision)
        load_pretrained([chunk], folder, SHAPE, tensor_parallel_rank=rank, tensor_parallel_size=size, progress=False)
        for name, parameter in base_parameters(chunk):
            shares.setdefault(name, []).append(parameter)
    rules = rules_for(SHAPE)
    return {
        name: [
            put_together(rules[name], [getattr(one.quantized, part) for one in of_ranks])
            for part in ("codes", "scales")
        ]
        for name, of_ranks in shares.items()
        if ".linear_" in name
    }


def put_together(rule: Any, shares: list[Tensor]) -> Tensor:
    if isinstance(rule, Columns):
        return torch.cat([share.view(torch.uint8) for share in shares], 1)
    parts = 2 if rule.name.endswith("fc1.weight") else 1  # gate and up
    return torch.cat([share.view(torch.uint8).chunk(parts)[part] for part in range(parts) for share in shares])


@pytest.mark.parametrize("source", ["hugging face", "megatron"])
def test_codes_are_those_of_bitsandbytes_at_any_tensor_parallel_size(folders, source):
    whole = {name: x for name, x in global_tensors(folders["hugging face"]).items() if ".linear_" in name}
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
        assert all(map(torch.equal, found[name], alone[name]) for name in alone)


class Largest(TorchDispatchMode):
    """Remembers the largest float32 tensor that had memory."""

    size = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, tuple | list) else (found,):
            if isinstance(tensor, Tensor) and tensor.dtype == torch.float32 and not tensor.is_meta:
                self.size = max(self.size, tensor.untyped_storage().nbytes() // tensor.itemsize)
        return found


@pytest.mark.parametrize("precision", ["nf4", "fp8"])
def test_no_weight_is_ever_there_in_full_precision(folders, precision):
    base = folders["hugging face"]
    with Largest() as largest:
        chunks = build_model_chunks(SHAPE, ModelConfig(str(base), base_precision=precision), ParallelConfig())
        load_pretrained(chunks, base, SHAPE, tensor_parallel_rank=0, tensor_parallel_size=1, progress=False)
    assert largest.size <= max(128 * SHAPE.hidden_size, pretrained.QUANTIZED_AT_ONCE)  # the padded vocabulary
    logits = chunks[0](torch.tensor([[1, 2]]), torch.tensor([[0, 1]]), None)
    assert logits[..., : SHAPE.vocab_size].isfinite().all()
