"""Tensors of a distributed checkpoint are read box by box; torn ones are named before that."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_peft.config import ConfigurationError
from megatron_peft.conversion.distributed_files import _Window, open_distributed
from tests.conversion.megatron_folders import save_distributed

TENSORS = {"a.weight": torch.arange(12.0).view(3, 4), "b.weight": torch.arange(5).bfloat16()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_distributed(tmp_path / "megatron", {**TENSORS, "steps": 7})


def edit_index(folder: Path, change) -> None:
    index = pickle.loads((folder / ".metadata").read_bytes())
    change(index)
    (folder / ".metadata").write_bytes(pickle.dumps(index))


def test_tensors_are_found_with_shape_and_type_and_other_objects_are_not(folder: Path) -> None:
    found = open_distributed(folder)
    assert {key: (tensor.shape, tensor.dtype) for key, tensor in found.items()} == {
        "a.weight": ((3, 4), torch.float32),
        "b.weight": ((5,), torch.bfloat16),
    }


def test_any_box_is_read(folder: Path) -> None:
    box = torch.zeros(2, 2)
    assert open_distributed(folder)["a.weight"].fill(box, (1, 2)) == 48  # the whole tensor was stored as one
    assert torch.equal(box, TENSORS["a.weight"][1:, 2:])


def test_a_window_is_a_file_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"before[inside]after")
    with open(tmp_path / "file", "rb") as file:
        window = _Window(file, 7, 6)
        assert window.read() == b"inside" and window.read() == b""
        assert window.seek(-4, io.SEEK_END) == 2 and window.read(2) == b"si" and window.tell() == 4
        assert window.seek(-1, io.SEEK_CUR) == 3 and window.read(9) == b"ide"


def test_a_missing_file_is_named(folder: Path) -> None:
    (folder / "__0_0.distcp").unlink()
    with pytest.raises(ConfigurationError, match="megatron lacks __0_0.distcp, which its index lists"):
        open_distributed(folder)


def test_a_short_file_is_named(folder: Path) -> None:
    path = folder / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ConfigurationError, match="is torn: __0_0.distcp"):
        open_distributed(folder)


def test_a_missing_part_is_named(folder: Path) -> None:
    def lose(index) -> None:
        del index.storage_data[MetadataIndex("a.weight", (0, 0))]

    edit_index(folder, lose)
    with pytest.raises(ConfigurationError, match="parts are missing of a.weight"):
        open_distributed(folder)


def test_a_damaged_part_is_named_when_it_is_read(folder: Path) -> None:
    path = folder / "__0_0.distcp"
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(ConfigurationError, match="__0_0.distcp is damaged where it holds a.weight"):
        open_distributed(folder)["a.weight"].fill(torch.zeros(3, 4), (0, 0))


def test_a_part_of_another_shape_is_named_when_it_is_read(folder: Path) -> None:
    def swap(index) -> None:
        places = index.storage_data
        places[MetadataIndex("a.weight", (0, 0))] = places[MetadataIndex("b.weight", (0,))]

    edit_index(folder, swap)
    with pytest.raises(ConfigurationError, match=r"does not hold a.weight \[3, 4\] where its index says so"):
        open_distributed(folder)["a.weight"].fill(torch.zeros(3, 4), (0, 0))
