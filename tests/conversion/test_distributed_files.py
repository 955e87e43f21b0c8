"""Tensors of a distributed checkpoint are read box by box; torn ones are named before that."""

from __future__ import annotations

import contextlib
import pickle
import random
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_peft.config import ConfigurationError
from megatron_peft.conversion.distributed_files import open_distributed
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
    assert open_distributed(folder)["a.weight"].fill(box, (1, 2)) == 4 * 4  # bytes of the box alone
    assert torch.equal(box, TENSORS["a.weight"][1:, 2:])


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


@pytest.mark.parametrize("seed", range(20))
def test_random_damage_is_named_or_harmless(folder: Path, seed: int) -> None:
    """Bytes within the archive of a tensor are overwritten: only numbers may change, or an error says what is torn."""
    place = pickle.loads((folder / ".metadata").read_bytes()).storage_data[MetadataIndex("a.weight", (0, 0))]
    path, draw = folder / place.relative_path, random.Random(seed)
    for _ in range(50):
        torn = bytearray(path.read_bytes())
        for _ in range(draw.choice((1, 8, 200))):
            torn[place.offset + draw.randrange(place.length)] = draw.randrange(256)
        path.write_bytes(torn)
        with contextlib.suppress(ConfigurationError):
            open_distributed(folder)["a.weight"].fill(torch.zeros(3, 4), (0, 0))
