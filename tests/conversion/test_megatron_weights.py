"""Megatron's checkpoints under all the names and places that it gives them, and its old files of ranks, joined."""

import shutil
from argparse import Namespace
from dataclasses import replace

import pytest
import torch

from megatron_peft.checkpoint.safe_pickle import load_inertly
from megatron_peft.config import LINEAR_MODULES, ConfigurationError
from megatron_peft.conversion.convert import megatron_to_hf
from megatron_peft.conversion.megatron_files import open_megatron
from megatron_peft.conversion.pretrained import shape_of_arguments
from megatron_peft.models.families import rules_for
from megatron_peft.models.shape import ModelShape
from tests.conversion import megatron_folders
from tests.conversion.megatron_folders import ODD, equal, global_tensors, save_distributed, save_ranks, tensors_of

RANK_FILE = "mp_rank_01_000/model_optim_rng.pt"
FC2 = "decoder.layers.1.mlp.linear_fc2.weight"
FINAL_NORM = "decoder.final_layernorm.weight"


def stacked(tensors):
    """All layers of a parameter as one tensor, as megatron-core stores uniform layers by default."""
    layers = {}
    for name, tensor in tensors.items():
        prefix, _, rest = name.partition("decoder.layers.")
        key = f"decoder.layers.{rest.partition('.')[2]}" if rest else prefix
        layers.setdefault(key, []).append(tensor)
    return {key: torch.stack(found) if key.startswith("decoder.layers.") else found[0] for key, found in layers.items()}


def fused_norms(tensors):
    """The names of a model with Transformer Engine's layers."""
    first, second = ("input_layernorm.", "self_attention.linear_qkv."), ("pre_mlp_layernorm.", "mlp.linear_fc1.")
    return {
        name.replace(first[0], f"{first[1]}layer_norm_").replace(second[0], f"{second[1]}layer_norm_"): tensor
        for name, tensor in tensors.items()
    }


@pytest.mark.parametrize("form", [stacked, fused_norms, lambda tensors: stacked(fused_norms(tensors))])
def test_every_spelling_is_read(form, original, tmp_path):
    state = {"layers._extra_state": torch.zeros(1), "optimizer.state.exp_avg.a": torch.zeros(1)}
    tensors = form(global_tensors(original)) | state | {"chained_0.optimizer.x": torch.zeros(1)}
    save_distributed(tmp_path / "megatron", tensors)
    written = megatron_to_hf(tmp_path / "megatron", tmp_path / "hf", pretrained_checkpoint=original, progress=False)
    assert equal(tensors_of(written), tensors_of(original))


def test_all_faults_are_told_at_once(original, tmp_path):
    tensors = global_tensors(original)
    del tensors[FINAL_NORM]
    tensors["decoder.layers.1.mlp.linear_fc2.bias"] = torch.zeros(9)
    tensors["decoder.layers.4.mlp.linear_fc2.bias"] = torch.zeros(10)
    tensors["output_layer.weight"] = torch.zeros(22, 10)
    with pytest.raises(ConfigurationError) as raised:
        open_megatron(save_distributed(tmp_path, tensors)).check(rules_for(ODD))
    told = str(raised.value)
    assert f"1 missing: {FINAL_NORM}" in told
    assert "1 not part of this model: decoder.layers.4.mlp.linear_fc2.bias" in told
    assert "2 of the wrong shape" in told
    assert "output_layer.weight [22, 10] instead of [23, 10]" in told


def test_a_stack_of_more_layers_is_another_model(original, tmp_path):
    tensors = stacked(global_tensors(original)) | {"decoder.layers.mlp.linear_fc2.bias": torch.zeros(5, 10)}
    with pytest.raises(ConfigurationError, match="not part of this model: decoder.layers.4.mlp.linear_fc2.bias"):
        open_megatron(save_distributed(tmp_path, tensors)).check(rules_for(ODD))


def rank_file_holds(content):
    return lambda ranks: torch.save(content, ranks / RANK_FILE)


def change_fc2(ranks, change):
    model = load_inertly(ranks / RANK_FILE)["model"]
    copies = {name: tensor.clone() for name, tensor in model.items() if tensor is not None}
    torch.save({"model": copies | {FC2: change(copies[FC2])}}, ranks / RANK_FILE)


OLD_NAMES = {"model": {"language_model.encoder.layers.0.norm": torch.zeros(1)}}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda ranks: shutil.rmtree(ranks / "mp_rank_01_000"), "lacks the folders mp_rank_01_000"),
        (lambda ranks: (ranks / RANK_FILE).unlink(), "mp_rank_01_000 holds none of model_optim_rng.pt"),
        (lambda ranks: (ranks / "mp_rank_00_000_000").mkdir(), "mp_rank_00_000_000 has expert parallelism"),
        (rank_file_holds(OLD_NAMES), "language_model.encoder.* --saver core"),
        (rank_file_holds({}), "holds no 'model'"),
        (
            lambda ranks: change_fc2(ranks, lambda fc2: fc2[:, :5]),
            r"linear_fc2.weight is \[10, 5\] on rank 1 of 2 .* \[10, 6\]",
        ),
    ],
    ids=["a folder", "a file", "experts", "names before megatron-core", "no model", "another shape"],
)
def test_what_lacks_in_the_files_of_ranks_or_does_not_fit_is_named(change, told, original, tmp_path):
    ranks = save_ranks(original, tmp_path / "ranks", tp=2, pp=2)
    change(ranks)
    with pytest.raises(ConfigurationError, match=told):
        open_megatron(ranks).find(rules_for(ODD)[FC2])


def test_a_value_that_is_not_finite_is_named_with_its_rank_when_it_is_read(original, tmp_path):
    ranks = save_ranks(original, tmp_path / "ranks", tp=2, pp=2)
    change_fc2(ranks, lambda fc2: fc2.index_fill(0, torch.tensor([9]), -torch.inf))
    weights, rule, local = open_megatron(ranks), rules_for(ODD)[FC2], torch.empty(10, 6)
    weights.read(rule, local, 0, 2)
    with pytest.raises(ConfigurationError, match=rf"ranks/mp_rank_01\* holds NaN or infinities in {FC2}"):
        weights.read(rule, local, 1, 2)


SHAPE = ModelShape("llama", 2, 24, 40, 4, 2, 8, 37, 64, norm_epsilon=1e-6, rotary_base=500000.0)


def told_shape(**changes):
    return shape_of_arguments(Namespace(**megatron_folders.megatron_arguments(SHAPE) | changes), "folder")


def test_the_shape_is_in_the_arguments():
    assert told_shape() == SHAPE
    assert told_shape(group_query_attention=False, num_query_groups=1).num_query_groups == 4
    assert told_shape(add_bias_linear=True).linear_biases == frozenset(LINEAR_MODULES)
    qwen2, qwen3 = told_shape(add_qkv_bias=True), told_shape(qk_layernorm=True)
    assert qwen2 == replace(SHAPE, architecture="qwen2", linear_biases=frozenset({"linear_qkv"}))
    assert qwen3 == replace(SHAPE, architecture="qwen3", qk_layernorm=True)
    assert told_shape(untie_embeddings_and_output_weights=False).tied_embeddings


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"swiglu": False}, "trained with swiglu False"),
        ({"normalization": "LayerNorm"}, "normalization 'LayerNorm'"),
        ({"use_rope_scaling": True}, "use_rope_scaling True"),
        ({"num_experts": 8}, "num_experts 8"),
        ({"window_size": (4096, 0)}, r"window_size \(4096, 0\)"),
        ({"qk_layernorm": True, "add_qkv_bias": True}, "qk_layernorm and with biases"),
        ({"ffn_hidden_size": None}, "have ffn_hidden_size None, which is not a size"),
        ({"num_attention_heads": 0}, "have num_attention_heads 0, which is not a size"),
        ({"hidden_size": "96", "num_layers": 2**31}, "have num_layers 2147483648, hidden_size 96, which is not a size"),
        ({"vocab_size": None}, "vocabulary padded to 128 rows"),
    ],
)
def test_what_cannot_be_read_is_named_with_the_way_out(changes, told):
    with pytest.raises(ConfigurationError, match=f"{told}.*config.json"):
        told_shape(**changes)
    with pytest.raises(ConfigurationError, match="folder does not say what model it is"):
        shape_of_arguments(None, "folder")
