"""Whole models between Hugging Face and Megatron, and merged with adapters: what comes back is what went there, bit for
bit; everything else is refused before it is written."""

import dataclasses
import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_peft.checkpoint.folders import OPTIMIZER_FILE, write_manifest
from megatron_peft.checkpoint.run_record import find_checkpoint, read_record
from megatron_peft.checkpoint.safe_pickle import read_metadata
from megatron_peft.checkpoint.tensors import load_parameters, sharded_parameters
from megatron_peft.config import ConfigurationError
from megatron_peft.conversion import convert
from megatron_peft.conversion.convert import ShardSlice, hf_to_megatron, megatron_to_hf, merge
from megatron_peft.conversion.hf_files import Source
from megatron_peft.conversion.megatron_files import open_distributed
from megatron_peft.conversion.peft_export import export_adapter
from megatron_peft.conversion.pretrained import load_pretrained
from megatron_peft.models.families import read_shape
from megatron_peft.models.shape import ModelShape
from tests.conversion.adapter_runs import RUNS, copy_run, trained_on, with_config
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
from tests.data.tiny_tokenizers import save_tokenizer
from tests.one_rank import one_rank
from tests.tiny_gpt import SIZES, tiny_gpt

ROOT = Path(__file__).parents[2]


@pytest.fixture
def spoilt(original, tmp_path) -> Path:
    """A copy of the odd Llama that may be changed."""
    return Path(shutil.copytree(original, tmp_path / "odd"))


# To Megatron: what megatron-core itself would have saved, and never whole in memory.


@pytest.mark.parametrize("changes", [{}, {"tied_embeddings": True}, {"linear_biases": ODD.linear_biases}])
def test_megatron_core_reads_its_own_keys_and_shapes(changes, tmp_path):
    shape = ModelShape(**SIZES | changes)
    original = save_random(tmp_path / "hf", shape)
    folder = hf_to_megatron(original, tmp_path / "megatron", progress=False)
    with one_rank():
        loaded, expected = tiny_gpt(changes), tiny_gpt(changes)
        entries = sharded_parameters([loaded], only_adapters=False)
        assert {entry.key for entry in entries} == read_metadata(folder).state_dict_metadata.keys()
        load_parameters(entries, folder)
        load_pretrained([expected], original, shape, tensor_parallel_rank=0, tensor_parallel_size=1, progress=False)
        for (name, parameter), other in zip(loaded.named_parameters(), expected.parameters(), strict=True):
            assert torch.equal(parameter, other), name
    assert torch.serialization.get_crc32_options(), "a setting of torch that is another one while files are written"


def test_a_tensor_is_written_as_shards_that_ranks_read_and_each_is_held_alone(original, tmp_path, monkeypatch):
    made: list[Tensor] = []
    read = ShardSlice.read

    def watched(part: ShardSlice, source: Source) -> Tensor:
        held = sum(values.untyped_storage().nbytes() > 0 for values in made)
        assert held == 0, f"{held} slices are held"
        values = read(part, source)
        assert values.untyped_storage().nbytes() == values.nbytes, "torch's writer clones a part of a storage"
        made.append(values)
        return values

    monkeypatch.setattr(ShardSlice, "read", watched)
    stored = open_distributed(hf_to_megatron(original, tmp_path / "megatron", progress=False))
    assert len(made) > 60
    made.clear()
    assert len(stored["decoder.layers.0.self_attention.linear_qkv.weight"].slices) == 2  # key-value heads
    assert len(stored["decoder.layers.0.mlp.linear_fc1.weight"].slices) == 2 * 4  # gate and up, 12 rows each
    assert [box.shape for box in stored["decoder.layers.0.mlp.linear_fc2.weight"].slices] == [(10, 3)] * 4
    assert len(stored["embedding.word_embeddings.weight"].slices) == 8
    assert len(stored["decoder.final_layernorm.weight"].slices) == 1
    monkeypatch.setattr(convert, "MIN_SHARD_BYTES", 2**20)
    stored = open_distributed(hf_to_megatron(original, tmp_path / "uncut", progress=False))
    assert len(stored["embedding.word_embeddings.weight"].slices) == 1


def test_nothing_in_a_folder_depends_on_where_or_when_it_was_written(original, tmp_path):
    first, second = (hf_to_megatron(original, tmp_path / name, progress=False) for name in ("first", "second"))
    names = {path.name for path in first.iterdir()}
    assert names >= {".metadata", "__0_0.distcp", "common.pt", "config.json", "metadata.json"}
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)


def test_vocabulary_is_padded_with_zeros(original, tmp_path):
    folder = hf_to_megatron(original, tmp_path / "megatron", make_vocab_size_divisible_by=16, progress=False)
    stored = open_distributed(folder)["embedding.word_embeddings.weight"]
    embedding = torch.full((32, 10), torch.nan)
    stored.fill(embedding, (0, 0))
    assert stored.shape == (32, 10)
    assert torch.equal(embedding[:23], tensors_of(original)["model.embed_tokens.weight"])
    assert embedding[23:].eq(0).all()


def test_type_is_changed_on_demand_and_fused_tensors_of_two_types_take_the_wider(spoilt, tmp_path):
    tensors = tensors_of(spoilt)
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].bfloat16()
    save_file(tensors, spoilt / "model.safetensors")
    stored = open_distributed(hf_to_megatron(spoilt, tmp_path / "megatron", progress=False))
    assert stored["decoder.layers.0.mlp.linear_fc1.weight"].dtype == torch.float32
    folder = hf_to_megatron(spoilt, tmp_path / "narrow", dtype=torch.bfloat16, progress=False)
    assert {tensor.dtype for tensor in open_distributed(folder).values()} == {torch.bfloat16}
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


def test_what_cannot_go_to_megatron_is_named_and_leaves_nothing_behind(spoilt, tmp_path):
    converted = hf_to_megatron(spoilt, tmp_path / "megatron", progress=False)
    tensors, lost = tensors_of(spoilt), "model.layers.3.mlp.up_proj.weight"
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, spoilt / "model.safetensors")
    for folder, divisor, told in (
        (spoilt, 0, "--make-vocab-size-divisible-by 0"),
        (spoilt, 128, f"1 missing: {lost}"),
        (converted, 128, f"--input {converted} is already in Megatron's format"),
        (tmp_path, 128, f"--input {tmp_path} is not a folder with a config.json: .* ORG/NAME of the Hub"),
    ):
        with pytest.raises(ConfigurationError, match=told):
            hf_to_megatron(folder, tmp_path / "new", make_vocab_size_divisible_by=divisor, progress=False)
    assert {path.name for path in tmp_path.iterdir()} == {"odd", "megatron"}


# To Hugging Face.


@pytest.mark.parametrize("shapes", [llama_shapes, bloom_shapes])
@settings(max_examples=5, derandomize=True)
@given(st.data(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_a_model_comes_back_bit_for_bit(shapes, data, dtype):
    with tempfile.TemporaryDirectory() as work:
        first = save_random(Path(work, "first"), data.draw(shapes()), dtype)
        hf_to_megatron(first, Path(work, "megatron"), progress=False)
        second = megatron_to_hf(Path(work, "megatron"), Path(work, "second"), max_shard_bytes=500, progress=False)
        assert equal(tensors_of(second), tensors_of(first))
        for name in ("config.json", "tokenizer.json"):
            assert (second / name).read_bytes() == (first / name).read_bytes()


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


def test_megatron_to_hf_writes_files_of_the_given_size(original, tmp_path):
    folder = hf_to_megatron(original, tmp_path / "megatron", progress=False)
    for size, count in ((10**9, 1), (1, len(tensors_of(original)))):  # a tensor is never cut
        written = megatron_to_hf(folder, tmp_path / str(count), max_shard_bytes=size, progress=False)
        assert len(list(written.glob("*.safetensors"))) == count


def test_an_output_layer_of_its_own_is_not_lost_where_a_config_calls_it_tied(original, tmp_path):
    folder = hf_to_megatron(original, tmp_path / "megatron", progress=False)
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": True}))
    with pytest.raises(ConfigurationError, match="output_layer.weight of its own, which is not the embedding"):
        megatron_to_hf(folder, tmp_path / "hf", progress=False)


def test_a_type_too_narrow_for_a_value_is_refused_and_nothing_is_left(spoilt, tmp_path):
    tensors = tensors_of(spoilt)
    tensors["model.norm.weight"][-1] = 1e5
    save_file(tensors, spoilt / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigurationError, match="decoder.final_layernorm.weight would hold .* in float16: give a wid"):
        hf_to_megatron(spoilt, tmp_path / "megatron", dtype=torch.float16, progress=False)
    hf_to_megatron(spoilt, tmp_path / "megatron", progress=False)
    with pytest.raises(ConfigurationError, match="model.norm.weight would hold NaN or infinities in float16"):
        megatron_to_hf(tmp_path / "megatron", tmp_path / "hf", dtype=torch.float16, progress=False)
    assert {path.name for path in tmp_path.iterdir()} == {"odd", "megatron"}


def test_a_run_of_full_fine_tuning_is_written_with_its_bases_config(original, spoilt, tmp_path, caplog):
    """Or with that of --pretrained-checkpoint; a lost base costs the tokenizer only."""
    tensors = global_tensors(original)
    moments = {f"optimizer.exp_avg.{name}": tensor for name, tensor in tensors.items()}
    run = save_run(original, tmp_path / "run", tensors | moments)
    written = megatron_to_hf(run, tmp_path / "hf", progress=False)
    assert equal(tensors_of(written), tensors_of(original))
    assert (written / "tokenizer.json").read_bytes() == (original / "tokenizer.json").read_bytes()
    (spoilt / "tokenizer.json").write_text("given")
    written = megatron_to_hf(run, tmp_path / "again", pretrained_checkpoint=spoilt, progress=False)
    assert (written / "tokenizer.json").read_text() == "given" and "no config.json" not in caplog.text
    written = megatron_to_hf(save_run(tmp_path / "gone", tmp_path / "lost", tensors), tmp_path / "bare", progress=False)
    assert equal(tensors_of(written), tensors_of(original)) and read_shape(written) == ODD
    assert "no config.json was found" in caplog.text


def test_config_and_tokenizer_are_those_nearest_to_the_weights_unless_given(original, spoilt, tmp_path):
    run = save_run(original, tmp_path / "run", global_tensors(original))
    checkpoint = run / "iter_0000002"
    for place in (spoilt, checkpoint, run):
        shutil.copy(original / "config.json", place)
        (place / "tokenizer.json").write_text(place.name)

    def tokenizer(name: str, **given: Any) -> str:  # of `run`
        return (megatron_to_hf(run, tmp_path / name, progress=False, **given) / "tokenizer.json").read_text()

    assert tokenizer("given", pretrained_checkpoint=spoilt) == spoilt.name
    assert tokenizer("of the checkpoint") == checkpoint.name
    (checkpoint / "config.json").unlink()
    assert tokenizer("of the run") == run.name
    (run / "config.json").unlink()
    run = save_run(run, tmp_path / "on a run", global_tensors(original))
    assert tokenizer("of the base of its base") == (original / "tokenizer.json").read_text()


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


def test_a_flipped_byte_of_a_run_is_named(original, tmp_path):
    run = save_run(original, tmp_path / "run", global_tensors(original))
    write_manifest(run / "iter_0000002", {})
    flip_a_byte(run / "iter_0000002" / "__0_0.distcp")
    with pytest.raises(ConfigurationError, match="iter_0000002 is damaged: __0_0.distcp does not match"):
        megatron_to_hf(run, tmp_path / "hf", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_file_of_the_optimizer_alone_is_read_for_float32_copies_only(original, tmp_path):
    run = save_run(original, tmp_path / "run", global_tensors(original))
    spoilt = run / "iter_0000002" / f"__0{OPTIMIZER_FILE}0.distcp"
    spoilt.write_bytes(b"moments")
    write_manifest(run / "iter_0000002", {})
    flip_a_byte(spoilt)
    assert megatron_to_hf(run, tmp_path / "hf", progress=False).is_dir()
    with pytest.raises(ConfigurationError, match=f"damaged: {spoilt.name} does not match"):
        megatron_to_hf(run, tmp_path / "float32", dtype=torch.float32, progress=False)


def test_what_cannot_be_written_is_refused_with_the_way_out(original, tmp_path):
    run = save_run(original, tmp_path / "run", {"decoder.layers.0.mlp.linear_fc1.adapter.A": torch.zeros(2)}, "lora")
    for output, told in ((tmp_path / "hf", "holds adapters .*merge"), (run, "--output .*run exists already")):
        with pytest.raises(ConfigurationError, match=told):
            megatron_to_hf(run, output, progress=False)
    assert not (tmp_path / "hf").exists()


# Merged with a run's adapters; folded rotations are those of training.


@pytest.mark.parametrize("run", RUNS)
def test_merged_folder_computes_what_the_adapted_model_does(run, moved, merged, apart):
    assert apart(merged(run), moved.run(run)).absolute < 1e-4
    assert apart(merged(run), moved.base_of(run)).absolute > 0.1


def test_what_has_no_adapter_keeps_its_bits(moved, merged):
    after, base = tensors_of(merged("pp2")), tensors_of(moved.base("base"))
    assert after.keys() == base.keys()
    changed = {name.partition("layers.")[2] for name in base if not torch.equal(base[name], after[name])}
    names = {f"{layer}.mlp.{part}" for layer in (1, 2) for part in ("gate", "up")}
    names |= {f"{layer}.mlp.down" for layer in range(4)} | {f"3.self_attn.{part}" for part in "qkv"}
    assert changed == {f"{name}_proj.weight" for name in names}


def test_type_and_shards_are_chosen(moved, merged, tmp_path):
    """Sums are formed in float32 and rounded once."""
    merge(moved.run("tp2"), tmp_path / "small", dtype=torch.bfloat16, max_shard_bytes=200_000)
    index = json.loads((tmp_path / "small" / "model.safetensors.index.json").read_text())["weight_map"]
    small = {name: load_file(tmp_path / "small" / file)[name] for name, file in index.items()}
    assert len(set(index.values())) > 2
    assert equal(small, {name: tensor.bfloat16() for name, tensor in tensors_of(merged("tp2")).items()})
    assert json.loads((tmp_path / "small" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("run", ["tp2", "boft", "urnn", "hybrid"])
def test_merge_adds_to_a_bfloat16_base_in_float32(run, moved, tmp_path):
    """The base in bfloat16 and the same values in float32 give the same bits."""
    rounded = {name: tensor.bfloat16() for name, tensor in tensors_of(moved.base_of(run)).items()}
    merged = []
    for dtype in (torch.bfloat16, torch.float32):
        base = Path(shutil.copytree(moved.base_of(run), tmp_path / f"{dtype} base"))
        save_file({name: tensor.to(dtype) for name, tensor in rounded.items()}, base / "model.safetensors")
        trained = trained_on(moved.run(run), tmp_path / f"{dtype} run", base)
        merged.append(tensors_of(merge(trained, tmp_path / f"{dtype} merged", dtype=torch.float32, progress=False)))
    assert equal(*merged)


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_a_merged_model_ends_with_the_end_token_of_the_runs_own_tokenizer(moved, tmp_path, file):
    base, own = Path(shutil.copytree(moved.base("base"), tmp_path / "base")), tmp_path / "own"
    save_tokenizer(own)
    end = json.loads((own / "tokenizer_config.json").read_text())["eos_token"]
    tokens = json.loads((own / "tokenizer.json").read_text())["added_tokens"]
    [token] = [token["id"] for token in tokens if token["content"] == end]
    config = json.loads((base / file).read_text()) if (base / file).exists() else {}
    (base / "generation_config.json").unlink(missing_ok=True)
    (base / file).write_text(json.dumps({**config, "eos_token_id": 7}))
    trained = trained_on(moved.run("tp2"), tmp_path / "run", base)
    given = dataclasses.replace(read_record(find_checkpoint(trained)).config.data, tokenizer_model=str(own))
    merged = merge(copy_run(trained, tmp_path / "copy", with_config(data=given)), tmp_path / "merged")
    assert json.loads((merged / file).read_text())["eos_token_id"] == [7, token]


def test_the_runs_own_tokenizer_and_chat_template_come_along(moved, tmp_path, caplog):
    base, own = Path(shutil.copytree(moved.base("base"), tmp_path / "base")), tmp_path / "own"
    own.mkdir()
    for path in (base / "vocab.json", base / "tokenizer.json", own / "tokenizer.json"):
        path.write_text(path.parent.name)
    (tmp_path / "mine.jinja").write_text("{{ messages }}")
    trained = trained_on(moved.run("tp2"), tmp_path / "run", base)
    given = read_record(find_checkpoint(trained)).config.data

    def tokenizers(name: str, **settings: Any) -> list[dict[str, str]]:
        run = copy_run(trained, tmp_path / name, with_config(data=dataclasses.replace(given, **settings)))
        written = merge(run, tmp_path / f"merged {name}"), export_adapter(run, tmp_path / f"adapter {name}")
        files = [
            path for folder in written for path in folder.iterdir() if re.match("chat_|tokenizer|vocab", path.name)
        ]
        return [{path.name: path.read_text() for path in files if path.parent == folder} for folder in written]

    mine = {"tokenizer.json": "own", "chat_template.jinja": "{{ messages }}"}
    assert tokenizers("files", tokenizer_model=str(own), chat_template=str(tmp_path / "mine.jinja")) == [mine, mine]
    of_base = {"tokenizer.json": "base", "vocab.json": "base"}
    text = {"chat_template.jinja": "{{ 1 }}"}
    assert tokenizers("text", chat_template="{{ 1 }}") == [of_base | text, text]
    assert tokenizers("gone", tokenizer_model="gone", chat_template="gone.jinja") == [of_base, {}]
    assert (
        "--tokenizer-model gone is no folder here" in caplog.text and "--chat-template gone.jinja is not" in caplog.text
    )


@pytest.mark.parametrize("form", ["converted", "run"])
def test_base_in_the_form_of_megatron(form, moved, merged, tmp_path):
    """Converted, or a run of full fine-tuning: config and tokenizer come along; another such base is refused."""
    bases = {name: tmp_path / name for name in ("base", "other")}
    for name, base in bases.items():
        original = Path(shutil.copytree(moved.base(name), tmp_path / f"hf-{name}"))
        (original / "tokenizer.json").write_text("{}")
        if form == "converted":
            hf_to_megatron(original, base, progress=False)
        else:
            save_run(original, base, global_tensors(original, padded_vocab_size=1024), shape=read_shape(original))
            write_manifest(base / "iter_0000002", {})
    run = trained_on(moved.run("tp2"), tmp_path / "run", bases["base"])
    merge(run, tmp_path / "merged")
    assert equal(tensors_of(tmp_path / "merged"), tensors_of(merged("tp2")))
    assert (tmp_path / "merged" / "tokenizer.json").is_file()
    with pytest.raises(ConfigurationError, match=r"other is another one \(.*__0_0.distcp"):
        merge(run, tmp_path / "wrong", pretrained_checkpoint=bases["other"])
    if form == "run":
        flip_a_byte(bases["base"] / "iter_0000002" / "__0_0.distcp")
        with pytest.raises(ConfigurationError, match="__0_0.distcp"):
            merge(run, tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("other", r"trained on the base model .*base, but .*other is another one \(model.safetensors\): give the base"),
        ("small", r"small is another one \(.*hidden_size 96 there, 72 here"),
        ("nowhere", r"the base model .*nowhere of the run in .* is not there: give its folder with --pretrained-check"),
    ],
)
def test_another_base_is_refused(base, message, moved, tmp_path):
    with pytest.raises(ConfigurationError, match=message):
        merge(moved.run("tp2"), tmp_path / "merged", pretrained_checkpoint=moved.base(base))
    assert not list(tmp_path.iterdir())


def test_every_test_that_the_page_names_exists_and_every_number_of_its_matrix_is_in_the_list():
    page = (ROOT / "docs" / "moving-weights.md").read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", page)
    assert len(named) >= 14
    assert [f"{file}::{name}" for file, name in named if f"def {name}(" not in (ROOT / file).read_text()] == []
    used = {int(number) for cell in re.findall(r"\[([\d, ]+)\]", page) for number in cell.split(",")}
    assert used == {int(number) for number in re.findall(r"^(\d+)\. `tests/", page, re.M)}
