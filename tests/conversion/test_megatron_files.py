"""Any box of a tensor is read from the boxes that it is stored in, under all the names and places that Megatron gives
them; old files of ranks are joined; torn files are named, and nothing in them runs."""

import contextlib
import pickle
import random
import shutil
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.nn.functional import pad

from megatron_peft.checkpoint.safe_pickle import load_inertly
from megatron_peft.config import LINEAR_MODULES, ConfigurationError
from megatron_peft.conversion import megatron_files
from megatron_peft.conversion.convert import megatron_to_hf
from megatron_peft.conversion.megatron_files import StoredSlice, StoredTensor, map_tensor, open_distributed
from megatron_peft.conversion.pretrained import shape_of_arguments
from megatron_peft.models.families import rules_for
from megatron_peft.models.shape import ModelShape
from tests.checkpoint.test_safe_pickle import Attack
from tests.conversion import megatron_folders
from tests.conversion.megatron_folders import ODD, equal, global_tensors, save_distributed, save_ranks, tensors_of

WHOLE = torch.arange(1, 61, dtype=torch.float32).view(6, 10)


def stored(tensor: torch.Tensor, rows: list[int], columns: list[int]) -> StoredTensor:
    """`tensor` cut before each of these rows and columns."""
    boxes = []
    for top, bottom in zip([0, *rows], [*rows, tensor.shape[0]], strict=True):
        for left, right in zip([0, *columns], [*columns, tensor.shape[1]], strict=True):
            part = tensor[top:bottom, left:right]
            boxes.append(StoredSlice((top, left), tuple(part.shape), lambda index, part=part: part[index]))
    return StoredTensor(tuple(tensor.shape), tensor.dtype, tuple(boxes))


cuts = st.lists(st.integers(1, 5), unique=True, max_size=3).map(sorted)


@settings(max_examples=60)
@given(cuts, cuts, st.data())
def test_any_box_out_of_any_boxes_and_what_lies_outside_the_tensor_stays_as_it_is(rows, columns, data):
    tensor = stored(WHOLE, rows, columns)
    top, left = data.draw(st.integers(0, 5)), data.draw(st.integers(0, 9))
    bottom, right = data.draw(st.integers(top + 1, 8)), data.draw(st.integers(left + 1, 10))
    target = torch.full((bottom - top, right - left), -1.0)
    tensor.fill(target, (top, left))
    assert torch.equal(target, pad(WHOLE, (0, 0, 0, 2), value=-1.0)[top:bottom, left:right])


def test_a_layer_of_a_stack():
    stack = torch.arange(24.0).view(4, 2, 3)
    halves = tuple(StoredSlice((at, 0, 0), (2, 2, 3), lambda index, at=at: stack[at : at + 2][index]) for at in (0, 2))
    for layer in range(4):
        one = megatron_files.layer_of(StoredTensor((4, 2, 3), stack.dtype, halves), layer)
        target = torch.zeros(2, 3)
        one.fill(target, (0, 0))
        assert one.shape == (2, 3) and torch.equal(target, stack[layer])


A = torch.arange(12.0).view(3, 4)


@pytest.fixture
def folder(tmp_path):
    return save_distributed(tmp_path / "megatron", {"a.weight": A, "b.weight": torch.arange(5).bfloat16(), "steps": 7})


def test_tensors_are_found_and_other_objects_are_not_and_any_box_is_read(folder):
    found = open_distributed(folder)
    kinds = {key: (tensor.shape, tensor.dtype) for key, tensor in found.items()}
    assert kinds == {"a.weight": ((3, 4), torch.float32), "b.weight": ((5,), torch.bfloat16)}
    box = torch.zeros(2, 2)
    assert found["a.weight"].fill(box, (1, 2)) == 4 * 4  # bytes of the box alone
    assert torch.equal(box, A[1:, 2:])


PART, OTHER = MetadataIndex("a.weight", (0, 0)), MetadataIndex("b.weight", (0,))


def with_nan(path):
    last = A.numpy().tobytes()[-4:]
    path.write_bytes(path.read_bytes().replace(last, np.float32("nan").tobytes()))


@pytest.mark.parametrize(
    ("file", "index", "is_seen_at_once", "told"),
    [
        (Path.unlink, None, True, "megatron lacks __0_0.distcp, which its index lists"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), None, True, "is truncated: __0_0.distcp"),
        (None, lambda places: places.pop(PART), True, r"key:a.weight has a slice at \(0, 0\) that is stored nowhere"),
        (lambda path: path.write_bytes(bytes(path.stat().st_size)), None, False, "is damaged where it holds a.weight"),
        (with_nan, None, False, "__0_0.distcp holds NaN or infinities in a.weight"),
        (None, lambda places: places.update({PART: places[OTHER]}), False, r"not hold a.weight \[3, 4\] where its"),
    ],
    ids=["no file", "short file", "no place", "zeros", "NaN", "another place"],
)
def test_damage_is_named_at_once_or_when_the_tensor_is_read(file, index, is_seen_at_once, told, folder):
    if file:
        file(folder / "__0_0.distcp")
    else:
        content = pickle.loads((folder / ".metadata").read_bytes())
        index(content.storage_data)
        (folder / ".metadata").write_bytes(pickle.dumps(content))
    with pytest.raises(ConfigurationError, match=told):
        found = open_distributed(folder)
        assert not is_seen_at_once
        found["a.weight"].fill(torch.zeros(3, 4), (0, 0))


def test_random_damage_is_named_or_harmless(folder):
    """Bytes within the archive of a tensor are overwritten: only numbers may change, or an error says what is torn."""
    place = pickle.loads((folder / ".metadata").read_bytes()).storage_data[PART]
    path, draw = folder / place.relative_path, random.Random(0)
    whole = path.read_bytes()
    for number in range(300):
        torn = bytearray(path.read_bytes() if number % 20 else whole)  # damage adds up
        for _ in range(draw.choice((1, 8, 200))):
            torn[place.offset + draw.randrange(place.length)] = draw.randrange(256)
        path.write_bytes(torn)
        with contextlib.suppress(ConfigurationError):
            open_distributed(folder)["a.weight"].fill(torch.zeros(3, 4), (0, 0))


BASE = torch.arange(60.0).view(5, 12)
TENSORS = {
    "plain": BASE,
    "bfloat16": BASE.bfloat16(),
    "bytes": BASE.to(torch.uint8),
    "flags": BASE > 30,
    "counts": BASE.long(),
    "transposed": BASE.t(),
    "a part of its storage": BASE[1:4, 2:7],
    "a number": torch.tensor(2.5, dtype=torch.float64),
    "large": torch.randn(300, 700),
}


def put(folder: Path, content: object, before: int = 0) -> tuple[Path, int, int]:
    """The file, first byte and length of what torch.save makes, with other bytes on both sides."""
    path = folder / "file"
    torch.save(content, path)
    saved = path.read_bytes()
    path.write_bytes(b"x" * before + saved + b"y" * 100)
    return path, before, len(saved)


@pytest.mark.parametrize("expected", TENSORS.values(), ids=TENSORS)
def test_a_mapped_tensor_is_the_same_wherever_it_lies(expected, tmp_path):
    for before in (0, 1, 64, 4096, 70_001):
        found = map_tensor(*put(tmp_path, expected, before))
        assert found.dtype == expected.dtype and torch.equal(found[...], expected)


def test_the_numbers_are_not_copied_and_the_file_stays_as_it_is(tmp_path):
    """Of a tensor that is not aligned, the part that is asked for is copied alone."""
    part = map_tensor(*put(tmp_path, TENSORS["large"], before=1))[10:14, 5:9]
    assert torch.equal(part, TENSORS["large"][10:14, 5:9])
    assert part.untyped_storage().nbytes() == 16 * 4
    place = put(tmp_path, BASE)
    before = place[0].read_bytes()
    found = map_tensor(*place)[...]
    assert str(place[0]) in Path("/proc/self/maps").read_text()
    found.zero_()
    assert place[0].read_bytes() == before
    del found
    assert str(place[0]) not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("content", [Attack(print, "it ran"), nn.Linear(2, 2), {"a": Attack(print, "it ran")}])
def test_what_is_no_tensor_is_refused_and_does_not_run(content, tmp_path, capsys):
    with pytest.raises(pickle.UnpicklingError, match="which no plain tensor needs"):
        map_tensor(*put(tmp_path, content))
    assert "it ran" not in capsys.readouterr().out
    for plain in ([BASE, BASE], 7, {"a": BASE}):
        with pytest.raises((TypeError, ValueError, KeyError)):
            map_tensor(*put(tmp_path, plain))


def test_a_view_of_too_small_a_storage_is_refused(tmp_path):
    place = put(tmp_path, BASE)
    place[0].write_bytes(place[0].read_bytes().replace(b"K\x05K\x0c\x86", b"K\x7fK\x0c\x86"))  # 5 rows become 127
    with pytest.raises(ValueError, match="incompatible with shape .* and size of buffer"):
        map_tensor(*place)


# A model's parameters under Megatron's names, and in its old files of ranks.

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
    for norm, layer in (("input_layernorm.", "self_attention.linear_qkv."), ("pre_mlp_layernorm.", "mlp.linear_fc1.")):
        tensors = {name.replace(norm, f"{layer}layer_norm_"): tensor for name, tensor in tensors.items()}
    return tensors


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
        megatron_files.open_megatron(save_distributed(tmp_path / "names", tensors)).check(rules_for(ODD))
    told = str(raised.value)
    assert f"1 missing: {FINAL_NORM}" in told
    assert "1 not part of this model: decoder.layers.4.mlp.linear_fc2.bias" in told
    assert "2 of the wrong shape" in told
    assert "output_layer.weight [22, 10] instead of [23, 10]" in told
    tensors = stacked(global_tensors(original)) | {"decoder.layers.mlp.linear_fc2.bias": torch.zeros(5, 10)}
    with pytest.raises(ConfigurationError, match="not part of this model: decoder.layers.4.mlp.linear_fc2.bias"):
        megatron_files.open_megatron(save_distributed(tmp_path / "stack", tensors)).check(rules_for(ODD))


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
            r"fc2.weight is \[10, 5\] on rank 1 of 2 .* \[10, 6\]",
        ),
    ],
    ids=["a folder", "a file", "experts", "names before megatron-core", "no model", "another shape"],
)
def test_what_lacks_in_the_files_of_ranks_or_does_not_fit_is_named(change, told, original, tmp_path):
    ranks = save_ranks(original, tmp_path / "ranks", tp=2, pp=2)
    change(ranks)
    with pytest.raises(ConfigurationError, match=told):
        megatron_files.open_megatron(ranks).find(rules_for(ODD)[FC2])


def test_a_value_that_is_not_finite_is_named_with_its_rank_when_it_is_read(original, tmp_path):
    ranks = save_ranks(original, tmp_path / "ranks", tp=2, pp=2)
    change_fc2(ranks, lambda fc2: fc2.index_fill(0, torch.tensor([9]), -torch.inf))
    weights, rule, local = megatron_files.open_megatron(ranks), rules_for(ODD)[FC2], torch.empty(10, 6)
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
        *(
            ({name: value}, f"trained with {name} {value!r}")
            for name, value in {
                "rotary_seq_len_interpolation_factor": 4,
                "no_rope_freq": 4,
                "apply_residual_connection_post_layernorm": True,
                "softmax_type": "off-by-one",
                "activation_func_clamp_value": 7.0,
                "glu_linear_offset": 1.0,
            }.items()
        ),
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
