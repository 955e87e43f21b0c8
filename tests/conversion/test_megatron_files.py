"""Any box of a tensor is read from the boxes that it is stored in; torn files are named, and nothing in them runs."""

import contextlib
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.nn.functional import pad

from megatron_peft.config import ConfigurationError
from megatron_peft.conversion.megatron_files import StoredSlice, StoredTensor, layer_of, map_tensor, open_distributed
from tests.checkpoint.test_safe_pickle import Attack
from tests.conversion.megatron_folders import save_distributed

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
        one = layer_of(StoredTensor((4, 2, 3), stack.dtype, halves), layer)
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
        (None, lambda places: places.pop(PART), True, "slices are missing from a.weight"),
        (lambda path: path.write_bytes(bytes(path.stat().st_size)), None, False, "is damaged where it holds a.weight"),
        (with_nan, None, False, "__0_0.distcp holds NaN or infinities in a.weight"),
        (
            None,
            lambda places: places.update({PART: places[OTHER]}),
            False,
            r"does not hold a.weight \[3, 4\] where its",
        ),
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


@pytest.mark.parametrize("seed", range(20))
def test_random_damage_is_named_or_harmless(folder, seed):
    """Bytes within the archive of a tensor are overwritten: only numbers may change, or an error says what is torn."""
    place = pickle.loads((folder / ".metadata").read_bytes()).storage_data[PART]
    path, draw = folder / place.relative_path, random.Random(seed)
    for _ in range(50):
        torn = bytearray(path.read_bytes())
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


def test_a_part_of_a_tensor_that_is_not_aligned_is_copied_alone(tmp_path):
    found = map_tensor(*put(tmp_path, TENSORS["large"], before=1))
    part = found[10:14, 5:9]
    assert torch.equal(part, TENSORS["large"][10:14, 5:9])
    assert part.untyped_storage().nbytes() == 16 * 4


def test_the_numbers_are_not_copied_and_the_file_stays_as_it_is(tmp_path):
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
