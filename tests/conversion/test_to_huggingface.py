"""What comes back from Megatron is what went there, bit for bit; everything else is refused before it is written."""

import dataclasses
import json
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from megatron_peft.checkpoint.folders import write_manifest
from megatron_peft.config import ConfigurationError
from megatron_peft.conversion.convert import hf_to_megatron, megatron_to_hf
from megatron_peft.models.families import read_shape
from megatron_peft.models.shape import ModelShape
from tests.conversion.megatron_folders import (
    ODD,
    bloom_shapes,
    equal,
    flip_a_byte,
    global_tensors,
    llama_shapes,
    save_random,
    save_ranks,
    save_run,
    tensors_of,
)


def round_trip(shape: ModelShape, dtype: torch.dtype) -> None:
    with tempfile.TemporaryDirectory() as work:
        first = save_random(Path(work, "first"), shape, dtype)
        hf_to_megatron(first, Path(work, "megatron"), progress=False)
        second = megatron_to_hf(Path(work, "megatron"), Path(work, "second"), max_shard_bytes=500, progress=False)
        assert equal(tensors_of(second), tensors_of(first))
        for name in ("config.json", "tokenizer.json"):
            assert (second / name).read_bytes() == (first / name).read_bytes()


rounds = settings(max_examples=8, derandomize=True)
types = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@rounds
@given(llama_shapes(), types)
def test_llama_comes_back_bit_for_bit(shape, dtype):
    round_trip(shape, dtype)


@rounds
@given(bloom_shapes(), types)
def test_bloom_comes_back_bit_for_bit(shape, dtype):
    round_trip(shape, dtype)


@pytest.mark.parametrize(
    ("tp", "pp", "chunks", "tied"),
    [(1, 1, 1, False), (2, 1, 1, False), (2, 2, 1, False), (1, 2, 2, False), (2, 2, 1, True)],
)
def test_ranks_of_old_checkpoints_are_joined(tmp_path, tp, pp, chunks, tied):
    """The shape is read from Megatron-LM's arguments: there is no config.json."""
    original = save_random(tmp_path / "first", dataclasses.replace(ODD, tied_embeddings=tied))
    ranks = save_ranks(original, tmp_path / "lm" / "iter_0000010", tp, pp, chunks)
    (ranks.parent / "latest_checkpointed_iteration.txt").write_text("10")
    written = megatron_to_hf(ranks.parent, tmp_path / "hf", progress=False)
    assert equal(tensors_of(written), tensors_of(original))
    assert read_shape(written) == read_shape(original)


def test_a_type_too_narrow_for_a_value_is_refused_and_nothing_is_left(original, tmp_path):
    large = Path(shutil.copytree(original, tmp_path / "large"))
    tensors = tensors_of(original)
    tensors["model.norm.weight"][-1] = 1e5
    save_file(tensors, large / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigurationError, match="decoder.final_layernorm.weight would hold .* in float16: give a wid"):
        hf_to_megatron(large, tmp_path / "megatron", dtype=torch.float16, progress=False)
    hf_to_megatron(large, tmp_path / "megatron", progress=False)
    with pytest.raises(ConfigurationError, match="model.norm.weight would hold NaN or infinities in float16"):
        megatron_to_hf(tmp_path / "megatron", tmp_path / "hf", dtype=torch.float16, progress=False)
    assert {path.name for path in tmp_path.iterdir()} == {"large", "megatron"}


def test_a_run_of_full_fine_tuning_is_written_with_its_bases_config(original, tmp_path):
    tensors = global_tensors(original)
    moments = {f"optimizer.exp_avg.{name}": tensor for name, tensor in tensors.items()}
    run = save_run(original, tmp_path / "run", tensors | moments)
    written = megatron_to_hf(run, tmp_path / "hf", progress=False)
    assert equal(tensors_of(written), tensors_of(original))
    assert (written / "tokenizer.json").read_bytes() == (original / "tokenizer.json").read_bytes()
    given = Path(shutil.copytree(original, tmp_path / "given"))
    (given / "tokenizer.json").write_text("given")
    written = megatron_to_hf(run, tmp_path / "again", pretrained_checkpoint=given, progress=False)
    assert (written / "tokenizer.json").read_text() == "given"


def test_float32_takes_the_copies_of_bf16_training(original, tmp_path):
    tensors = global_tensors(original)
    masters = {f"optimizer.master.{name}": tensor for name, tensor in tensors.items()}
    run = save_run(original, tmp_path / "run", {n: t.bfloat16() for n, t in tensors.items()} | masters)
    for dtype, stored in ((torch.float32, "float32"), (torch.float16, "float16"), (None, "bfloat16")):
        written = megatron_to_hf(run, tmp_path / str(dtype), dtype=dtype, progress=False)
        rounded = torch.float32 if dtype == torch.float32 else torch.bfloat16
        expected = {name: t.to(rounded).to(getattr(torch, stored)) for name, t in tensors_of(original).items()}
        assert equal(tensors_of(written), expected)
        assert json.loads((written / "config.json").read_text())["dtype"] == stored


def test_a_lost_base_costs_the_tokenizer_only(original, tmp_path, caplog):
    run = save_run(tmp_path / "gone", tmp_path / "run", global_tensors(original))
    written = megatron_to_hf(run, tmp_path / "hf", progress=False)
    assert equal(tensors_of(written), tensors_of(original))
    assert read_shape(written) == ODD
    assert "no config.json was found" in caplog.text


def test_a_flipped_byte_of_a_run_is_named(original, tmp_path):
    run = save_run(original, tmp_path / "run", global_tensors(original))
    write_manifest(run / "iter_0000002", {})
    flip_a_byte(run / "iter_0000002" / "__0_0.distcp")
    with pytest.raises(ConfigurationError, match="iter_0000002 is damaged: __0_0.distcp does not match"):
        megatron_to_hf(run, tmp_path / "hf", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_what_cannot_be_written_is_refused_with_the_way_out(original, tmp_path):
    run = save_run(original, tmp_path / "run", {"decoder.layers.0.mlp.linear_fc1.adapter.A": torch.zeros(2)}, "lora")
    for output, told in ((tmp_path / "hf", "holds adapters .*merge"), (run, "--output .*run exists already")):
        with pytest.raises(ConfigurationError, match=told):
            megatron_to_hf(run, output, progress=False)
    assert not (tmp_path / "hf").exists()
