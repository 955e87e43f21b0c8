"""Hugging Face folders: slices come from the right file and are counted, small files come along, faults are named."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from megatron_peft.config import ConfigurationError
from megatron_peft.config.untrusted import is_finite
from megatron_peft.conversion import hf_files as source_module
from megatron_peft.conversion.hf_files import Header, Source, check_inventory, open_source, write_config
from megatron_peft.models.families import config_of_shape, read_shape
from megatron_peft.models.shape import RopeScaling
from tests.conversion.megatron_folders import ODD, bloom_shapes, llama_shapes

DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize("kind", ["single", "sharded", "torch", "sharded torch"])
def test_slices_equal_those_of_the_model(kind, saved_folders, odd_llama):
    source = open_source(saved_folders[kind])
    state = odd_llama.state_dict()
    assert {name: header.shape for name, header in source.headers.items()} == {n: t.shape for n, t in state.items()}
    for name, tensor in state.items():
        assert torch.equal(source.slice(name, (slice(1, 5),)), tensor[1:5])
    before = source.counts.bytes
    assert torch.equal(source.slice(DOWN, (slice(None), slice(8, 16))), state[DOWN][:, 8:16])
    assert source.counts.bytes - before == 96 * 8 * 4


@pytest.mark.parametrize("index", [(slice(-1, None), slice(None)), (slice(None), slice(-8, None))])
@pytest.mark.parametrize("kind", ["single", "torch"])
def test_a_value_that_is_not_finite_is_named_where_its_slice_is_read(kind, index, copy_of):
    folder = copy_of(kind)
    path = folder / ("model.safetensors" if kind == "single" else "pytorch_model.bin")
    weights = load_file(path) if kind == "single" else torch.load(path)
    weights[DOWN][-1, -1] = torch.inf
    save_file(weights, path) if kind == "single" else torch.save(weights, path)
    source = open_source(folder)
    source.slice(DOWN, (slice(0, -1), slice(0, -1)))
    with pytest.raises(ConfigurationError, match=f"{path} holds NaN or infinities in {DOWN}. Copy or download"):
        source.slice(DOWN, index)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [torch.nan, -torch.nan, torch.inf, -torch.inf])
def test_one_value_that_is_not_finite_is_found_among_any_number(value, dtype):
    largest = torch.finfo(dtype).max
    for length in (1, 2, 15, 16, 17, 33, 70_000):
        values = torch.tensor([largest, -largest], dtype=dtype).repeat(length)
        assert is_finite(values) and is_finite(values.view(length, 2)[:, :1])
        values[2 * (length // 2)] = value
        assert not is_finite(values) and not is_finite(values.view(length, 2)[:, :1])
    eight_bits = torch.tensor([1.0, value]).to(torch.float8_e5m2)
    assert is_finite(eight_bits[:1]) and not is_finite(eight_bits)
    assert is_finite(torch.empty(0, dtype=dtype)) and is_finite(torch.ones(2, dtype=torch.uint8))


@pytest.mark.parametrize("kind", ["single", "torch"])
def test_file_is_mapped_anew_so_that_touched_pages_go(kind, saved_folders, monkeypatch):
    monkeypatch.setattr(source_module, "MAPPED_BYTES", 30_000)  # a down_proj is 27,648 bytes
    source = open_source(saved_folders[kind])
    opened, original = [], source_module._open_file
    monkeypatch.setattr(source_module, "_open_file", lambda path: opened.append(path) or original(path))
    for _ in range(6):
        source.slice(DOWN, (slice(None), slice(0, 1)))
    assert len(opened) == 3


def test_safetensors_win_over_pickles(copy_of):
    folder = copy_of("single")
    (folder / "pytorch_model.bin").write_bytes(b"never opened")
    assert {h.file.name for h in open_source(folder).headers.values()} == {"model.safetensors"}


TORN = [
    *((slice(-100), "truncated or torn"), (slice(200), "truncated or torn, 200 bytes")),
    *((b"", "truncated or torn, 0 bytes"), (b"version https://git-lfs.github.com/spec/v1\nsize 9\n", "git lfs pull")),
]
SHARD, INDEX = "model-00004-of-00009.safetensors", "model.safetensors.index.json"


@pytest.mark.parametrize(("content", "told"), TORN)
@pytest.mark.parametrize(
    ("kind", "file"), [("single", "model.safetensors"), ("sharded", SHARD), ("torch", "pytorch_model.bin")]
)
def test_torn_file_is_named(kind, file, content, told, copy_of):
    path = copy_of(kind) / file
    path.write_bytes(path.read_bytes()[content] if isinstance(content, slice) else content)
    with pytest.raises(ConfigurationError, match=f"{file} cannot be read: .*{told}"):
        open_source(path.parent)


@pytest.mark.parametrize(
    ("file", "text", "told"),
    [
        *((INDEX, text, f"{INDEX} is not an index") for text in ("{}", '{"weight_map": 3}')),
        (INDEX, json.dumps({"weight_map": {"ghost": SHARD}}), f"missing: ghost in {SHARD}"),
        (INDEX, None, "holds no weights: expected one of model.safetensors"),
        (SHARD, None, f"{SHARD} is missing, but the index"),
    ],
)
def test_an_index_that_promises_in_vain_and_files_that_are_missing_are_named(file, text, told, copy_of):
    path = copy_of("sharded") / file
    if text is None:
        path.unlink()
    else:
        path.write_text(text)
    with pytest.raises(ConfigurationError, match=told):
        open_source(path.parent)


def test_a_pickle_of_an_old_format_is_refused(copy_of):
    path = copy_of("torch") / "pytorch_model.bin"
    torch.save({"a": torch.zeros(3)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(ConfigurationError, match="torch before 1.6.*Convert it to safetensors"):
        open_source(path.parent)


EXPECTED = {"model.embed_tokens.weight": (11, 4), "model.norm.weight": (4,), "lm_head.weight": (11, 4)}


def header(*shape: int, dtype: str = "F32") -> Header:
    return Header(Path("folder/model.safetensors"), shape, dtype)


def check(changes: dict[str, Header | None], expected=EXPECTED, tied: bool = False) -> None:
    headers = {name: header(*shape) for name, shape in expected.items()} | changes
    check_inventory(Source(Path("folder"), {name: h for name, h in headers.items() if h}), expected, tied)


@pytest.mark.parametrize("dtype", ["F64", "F32", "BF16", "F16", "float64", "float32", "bfloat16", "float16"])
def test_complete_folder_passes_with_rotary_buffers_of_old_checkpoints(dtype):
    rotary = {"model.layers.0.self_attn.rotary_emb.inv_freq": header(10)}
    check({"model.norm.weight": header(4, dtype=dtype), **rotary})


def test_all_faults_are_told_at_once_and_long_lists_are_cut():
    changes = {"lm_head.weight": None, "model.norm.weight": header(5), **dict.fromkeys("abcdefghij", header(2))}
    with pytest.raises(ConfigurationError) as raised:
        check(changes | {"model.embed_tokens.weight": header(11, 4, dtype="I8")})
    told = str(raised.value)
    assert "1 missing: lm_head.weight" in told
    assert "10 not part of this model: a, b, c, d, e, f, g, h and 2 more" in told
    assert "1 of the wrong shape: model.norm.weight [5] instead of [4]" in told
    assert "1 of an unsupported number type: model.embed_tokens.weight I8" in told


def test_output_layer_is_harmless_only_when_tied():
    expected = {"model.norm.weight": (4,)}
    check({"lm_head.weight": header(11, 4)}, expected, tied=True)
    with pytest.raises(ConfigurationError, match="not part of this model: lm_head.weight"):
        check({"lm_head.weight": header(11, 4)}, expected, tied=False)


SCALED = dataclasses.replace(ODD, rotary_base=20000.0, rope_scaling=RopeScaling(4.0, 1.0, 3.0, 32))


@settings(max_examples=30)
@given(st.one_of(llama_shapes(), bloom_shapes(), st.just(SCALED)))
def test_a_made_config_gives_the_shape_back(tmp_path_factory, shape):
    folder = tmp_path_factory.mktemp("config")
    write_config(folder, config_of_shape(shape))
    assert read_shape(folder) == shape


def test_weights_code_and_folders_are_not_copied(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir(), target.mkdir(), (source / "tokenizer_parts").mkdir()
    kept = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja"}
    for name in {*kept, "model.safetensors", "modeling_x.py", "common.pt", ".metadata"}:
        (source / name).write_text(name)
    source_module.copy_small_files(source, target)
    assert {path.name for path in target.iterdir()} == kept


@pytest.mark.parametrize(
    ("before", "stored", "after"),
    [
        ('{"dtype": "float32"}', {torch.bfloat16}, {"dtype": "bfloat16"}),
        ('{"torch_dtype": "float32"}', {torch.bfloat16}, {"torch_dtype": "bfloat16"}),
        ('{"dtype": "float16"}', {torch.float32, torch.bfloat16}, {"dtype": "float16"}),  # several types say nothing
        ('{"dtype":  "float32"}', {torch.float32}, None),  # says so already, and stays byte for byte
    ],
)
def test_the_type_is_set_under_the_key_that_is_there(before, stored, after, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(before)
    source_module.set_stored_type(tmp_path, [*stored] * 2)
    assert path.read_text() == before if after is None else json.loads(path.read_text()) == after
