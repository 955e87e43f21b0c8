"""A mapped tensor is the one that torch.load gives, and what is no plain tensor is refused."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from megatron_peft.conversion.saved_tensor import map_tensor

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


def put(folder: Path, content: object, before: int) -> tuple[Path, int, int]:
    """The file, first byte and length of what torch.save makes, with other bytes on both sides."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    path = folder / "file"
    path.write_bytes(b"x" * before + buffer.getvalue() + b"y" * 100)
    return path, before, len(buffer.getvalue())


@pytest.mark.parametrize("before", [0, 1, 64, 4096, 70_001])
@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_is_the_same_wherever_it_lies(name: str, before: int, tmp_path: Path) -> None:
    expected = TENSORS[name]
    found = map_tensor(*put(tmp_path, expected, before))
    assert (found.dtype, found.shape, found.stride()) == (expected.dtype, expected.shape, expected.stride())
    assert torch.equal(found, expected)


def test_a_tensor_without_checksums_is_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        place = put(tmp_path, BASE, 3)
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(map_tensor(*place), BASE)


def test_the_file_stays_as_it_is(tmp_path: Path) -> None:
    place = put(tmp_path, BASE, 0)
    before = place[0].read_bytes()
    map_tensor(*place).zero_()
    assert place[0].read_bytes() == before


class Runs:
    """Would run code when it is unpickled."""

    def __reduce__(self):
        return (print, ("it ran",))


@pytest.mark.parametrize("content", [Runs(), nn.Linear(2, 2), {"a": Runs()}])
def test_what_is_no_tensor_is_refused_and_does_not_run(content: object, tmp_path: Path, capsys) -> None:
    with pytest.raises(pickle.UnpicklingError, match="which no plain tensor needs"):
        map_tensor(*put(tmp_path, content, 0))
    assert "it ran" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [[BASE, BASE], 7, {"a": BASE}])
def test_plain_things_that_are_no_tensor_are_refused(content: object, tmp_path: Path) -> None:
    with pytest.raises((TypeError, ValueError, KeyError)):
        map_tensor(*put(tmp_path, content, 0))


def test_a_view_of_too_small_a_storage_is_refused(tmp_path: Path) -> None:
    path, start, length = put(tmp_path, BASE, 0)
    torn = path.read_bytes().replace(b"K\x05K\x0c\x86", b"K\x7fK\x0c\x86")  # five rows become 127
    path.write_bytes(torn)
    with pytest.raises(RuntimeError, match="out of bounds"):
        map_tensor(path, start, length)


def test_the_numbers_are_not_copied(tmp_path: Path) -> None:
    path, start, length = put(tmp_path, BASE, 0)
    found: Tensor = map_tensor(path, start, length)
    assert str(path) in Path("/proc/self/maps").read_text()
    del found
    assert str(path) not in Path("/proc/self/maps").read_text()
