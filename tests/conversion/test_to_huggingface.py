"""What comes back from Megatron is what went there, bit for bit; everything else is refused before it is written."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_peft.checkpoint.manifest import write_manifest
from megatron_peft.config import ConfigurationError
from megatron_peft.conversion import to_megatron
from megatron_peft.conversion.to_huggingface import megatron_to_hf
from megatron_peft.conversion.to_megatron import hf_to_megatron
from megatron_peft.models.huggingface import read_shape
from megatron_peft.models.shape import ModelShape
from tests.checkpoint.records import make_record
from tests.conversion.megatron_folders import (
    ODD,
    bloom_shapes,
    equal,
    global_tensors,
    llama_shapes,
    save_distributed,
    save_random,
    save_ranks,
    tensors_of,
)


@pytest.fixture(autouse=True)
def many_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny tensors are cut like large ones."""
    monkeypatch.setattr(to_megatron, "MIN_SHARE_BYTES", 1)


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return save_random(tmp_path_factory.mktemp("hf") / "odd")


def round_trip(shape: ModelShape, dtype: torch.dtype) -> None:
    with tempfile.TemporaryDirectory() as work:
        first = save_random(Path(work, "first"), shape, dtype)
        hf_to_megatron(first, Path(work, "megatron"), progress=False)
        second = megatron_to_hf(Path(work, "megatron"), Path(work, "second"), max_shard_bytes=500, progress=False)
        assert equal(tensors_of(second), tensors_of(first))
        for name in ("config.json", "tokenizer.json"):
            assert (second / name).read_bytes() == (first / name).read_bytes()


@settings(max_examples=8, derandomize=True)
@given(llama_shapes(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_llama_comes_back_bit_for_bit(shape: ModelShape, dtype: torch.dtype) -> None:
    round_trip(shape, dtype)


@settings(max_examples=8, derandomize=True)
@given(bloom_shapes(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_bloom_comes_back_bit_for_bit(shape: ModelShape, dtype: torch.dtype) -> None:
    round_trip(shape, dtype)


@pytest.mark.parametrize(("tp", "pp", "chunks"), [(1, 1, 1), (2, 1, 1), (2, 2, 1), (1, 2, 2)])
def test_ranks_of_old_checkpoints_are_joined(original: Path, tmp_path: Path, tp: int, pp: int, chunks: int) -> None:
    """The shape is read from Megatron-LM's arguments: there is no config.json."""
    ranks = save_ranks(original, tmp_path / "lm" / "iter_0000010", tp, pp, chunks)
    (ranks.parent / "latest_checkpointed_iteration.txt").write_text("10")
    written = megatron_to_hf(ranks.parent, tmp_path / "hf", progress=False)
    assert equal(tensors_of(written), tensors_of(original))
    assert read_shape(written) == dataclasses.replace(ODD)


def test_tied_embeddings_of_old_checkpoints_are_written_once(tmp_path: Path) -> None:
    tied = save_random(tmp_path / "tied", dataclasses.replace(ODD, tied_embeddings=True))
    ranks = save_ranks(tied, tmp_path / "ranks", tp=2, pp=2)
    assert equal(tensors_of(megatron_to_hf(ranks, tmp_path / "hf", progress=False)), tensors_of(tied))


def test_type_is_changed_on_demand_and_config_says_so(original: Path, tmp_path: Path) -> None:
    hf_to_megatron(original, tmp_path / "megatron", progress=False)
    written = megatron_to_hf(tmp_path / "megatron", tmp_path / "hf", dtype=torch.bfloat16, progress=False)
    assert equal(tensors_of(written), {name: t.bfloat16() for name, t in tensors_of(original).items()})
    assert json.loads((written / "config.json").read_text())["dtype"] == "bfloat16"


def save_run(original: Path, folder: Path, tensors: dict[str, torch.Tensor], method: str = "full") -> Path:
    """A --save folder as a run of `method` on `original` leaves it."""
    checkpoint = save_distributed(folder / "iter_0000002", tensors)
    record = make_record(shape=ODD)
    model = dataclasses.replace(record.config.model, pretrained_checkpoint=str(original))
    peft = dataclasses.replace(record.config.peft, method=method)
    config = dataclasses.replace(record.config, model=model, peft=peft)
    (checkpoint / "run_record.json").write_text(dataclasses.replace(record, config=config).to_json())
    (folder / "latest_checkpointed_iteration.txt").write_text("2\n")
    return folder


def test_a_run_of_full_fine_tuning_is_written_with_its_bases_config(original: Path, tmp_path: Path) -> None:
    tensors = global_tensors(original)
    moments = {f"optimizer.exp_avg.{name}": tensor for name, tensor in tensors.items()}
    run = save_run(original, tmp_path / "run", tensors | moments)
    written = megatron_to_hf(run, tmp_path / "hf", progress=False)
    assert equal(tensors_of(written), tensors_of(original))
    assert (written / "tokenizer.json").is_file()


def test_float32_takes_the_copies_of_bf16_training(original: Path, tmp_path: Path) -> None:
    tensors = global_tensors(original)
    masters = {f"optimizer.master.{name}": tensor for name, tensor in tensors.items()}
    run = save_run(original, tmp_path / "run", {n: t.bfloat16() for n, t in tensors.items()} | masters)
    assert equal(
        tensors_of(megatron_to_hf(run, tmp_path / "wide", dtype=torch.float32, progress=False)), tensors_of(original)
    )
    stored = tensors_of(megatron_to_hf(run, tmp_path / "stored", progress=False))
    assert equal(stored, {name: tensor.bfloat16() for name, tensor in tensors_of(original).items()})


def test_a_lost_base_costs_the_tokenizer_only(original: Path, tmp_path: Path, caplog) -> None:
    run = save_run(tmp_path / "gone", tmp_path / "run", global_tensors(original))
    written = megatron_to_hf(run, tmp_path / "hf", progress=False)
    assert equal(tensors_of(written), tensors_of(original))
    assert read_shape(written) == ODD
    assert "no config.json was found" in caplog.text


def test_a_flipped_byte_of_a_run_is_named(original: Path, tmp_path: Path) -> None:
    run = save_run(original, tmp_path / "run", global_tensors(original))
    write_manifest(run / "iter_0000002", {})
    path = run / "iter_0000002" / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ConfigurationError, match="iter_0000002 is damaged: __0_0.distcp has other bytes"):
        megatron_to_hf(run, tmp_path / "hf", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_run_of_adapters_is_refused_with_the_way_out(original: Path, tmp_path: Path) -> None:
    run = save_run(original, tmp_path / "run", {"decoder.layers.0.mlp.linear_fc1.adapter.A": torch.zeros(2)}, "lora")
    with pytest.raises(ConfigurationError, match="holds adapters .*merge"):
        megatron_to_hf(run, tmp_path / "hf", progress=False)
    assert not (tmp_path / "hf").exists()


def test_config_and_weights_that_do_not_match_are_named(original: Path, tmp_path: Path) -> None:
    hf_to_megatron(original, tmp_path / "megatron", progress=False)
    other = save_random(tmp_path / "other", dataclasses.replace(ODD, num_layers=3, ffn_hidden_size=8))
    with pytest.raises(ConfigurationError) as raised:
        megatron_to_hf(tmp_path / "megatron", tmp_path / "hf", pretrained_checkpoint=other, progress=False)
    told = str(raised.value)
    assert "not part of this model: decoder.layers.3." in told
    assert "decoder.layers.0.mlp.linear_fc1.weight [24, 10] instead of [16, 10]" in told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["megatron", "other"]


def test_what_is_there_is_not_overwritten(original: Path, tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    with pytest.raises(ConfigurationError, match="--output .*hf exists already"):
        megatron_to_hf(original, tmp_path / "hf", progress=False)


def test_a_folder_without_megatron_files_is_named(original: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="--input .*odd holds no Megatron checkpoint"):
        megatron_to_hf(original, tmp_path / "hf", progress=False)
