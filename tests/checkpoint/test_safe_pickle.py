"""Nothing in a checkpoint of somebody else's runs."""

import argparse
import os
import pickle
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint import metadata as torch_metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo

from megatron_peft.checkpoint.safe_pickle import Inert, load_inertly, read_metadata
from megatron_peft.checkpoint.tensors import Target, read_index, read_tensors
from megatron_peft.config import ConfigurationError
from megatron_peft.conversion.convert import megatron_to_hf
from megatron_peft.conversion.hf_files import open_source
from megatron_peft.conversion.pretrained import read_model_shape
from tests.conversion.megatron_folders import save_distributed, save_random, save_ranks


class Attack:
    """Unpickled by an ordinary unpickler, it calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def attack(kind: str, mark: Path) -> Attack:
    """One that would leave a mark, or reach for something."""
    calls = {"system": f"touch {mark}", "eval": f"open({str(mark)!r}, 'w')", "load": str(mark), "getattr": "x"}
    functions = {"system": os.system, "eval": eval, "load": torch.load, "getattr": getattr}
    return Attack(functions[kind], calls[kind])


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> Path:
    """A checkpoint of Megatron's ranks, of one."""
    folder = tmp_path_factory.mktemp("ranks")
    return save_ranks(save_random(folder / "hf"), folder / "ranks", tp=1, pp=1)


@pytest.mark.parametrize("kind", ["system", "eval", "load", "getattr"])
def test_a_malicious_checkpoint_of_ranks_is_refused_by_name_and_runs_nothing(kind, ranks, tmp_path):
    mark = tmp_path / "ran"
    torch.save({"model": {}, "args": attack(kind, mark)}, ranks / "mp_rank_00" / "model_optim_rng.pt")
    for read in (read_model_shape, lambda place: megatron_to_hf(place, tmp_path / "out", progress=False)):
        with pytest.raises(ConfigurationError, match=f"model_optim_rng.pt is refused: .*{kind}.*No code"):
            read(ranks)
    assert not mark.exists() and not (tmp_path / "out").exists()


@pytest.fixture
def folder(tmp_path) -> Path:
    """A distributed checkpoint of one tensor, "a"."""
    return save_distributed(tmp_path / "megatron", {"a": torch.zeros(2)})


@contextmanager
def changed_index(folder: Path) -> Iterator[Any]:
    """The index of a checkpoint, which is written back at the end."""
    index = pickle.loads((folder / ".metadata").read_bytes())
    yield index
    (folder / ".metadata").write_bytes(pickle.dumps(index))


def read_one_tensor(folder: Path) -> None:
    values = torch.zeros(2)
    targets = [Target(values, [ShardedTensor.from_rank_offsets("a", values)], True, True)]
    read_tensors(targets, folder, read_metadata(folder))


def read_the_index(folder: Path) -> None:
    read_index([ShardedTensor.from_rank_offsets("a", torch.zeros(2))], folder)


@pytest.mark.parametrize("kind", ["system", "eval"])
def test_a_malicious_index_is_refused_by_name_and_runs_nothing(kind, folder, tmp_path, alone):
    mark = tmp_path / "ran"
    with changed_index(folder) as index:
        index.planner_data = attack(kind, mark)
    for read in (read_metadata, read_the_index, read_one_tensor):
        with pytest.raises(ConfigurationError, match=f"is refused: .*{kind}.*No code from it was run"):
            read(folder)
    assert not mark.exists()


def test_a_part_that_is_no_tensor_is_never_unpickled(folder, tmp_path, alone):
    """torch unpickles such a part whatever it holds, and megatron-core looks at nothing but its size."""
    mark = tmp_path / "ran"
    torch.save(attack("system", mark), folder / "__0_0.distcp")
    with changed_index(folder) as index:
        index.state_dict_metadata["a"] = torch_metadata.BytesStorageMetadata()
        index.state_dict_metadata["a"].size = torch.Size([2])
        place = _StorageInfo("__0_0.distcp", 0, (folder / "__0_0.distcp").stat().st_size)
        index.storage_data = {torch_metadata.MetadataIndex("a"): place}
    with pytest.raises(ConfigurationError, match="is damaged: .*a from model not in state dict"):
        read_one_tensor(folder)
    assert not mark.exists()


def test_index_of_python_3_11_0_is_read_without_getattr(folder, monkeypatch):
    """Debian 12 has 3.11.2, which pickles a member of an enumeration as getattr(enumeration, name)."""

    def reduced(member: Any, protocol: int) -> Any:
        return getattr, (type(member), member.name)

    monkeypatch.setattr(torch_metadata._MEM_FORMAT_ENCODING, "__reduce_ex__", reduced)
    whole = pickle.loads((folder / ".metadata").read_bytes())
    (folder / ".metadata").write_bytes(pickle.dumps(whole))
    assert b"getattr" in (folder / ".metadata").read_bytes()
    assert [*read_metadata(folder).state_dict_metadata] == ["a"]


def written(*texts: str) -> list[bytes]:
    """Each as a pickle holds it."""
    return [bytes([0x8C, len(text)]) + text.encode() for text in texts]


@pytest.mark.parametrize("name", ["Metadata", "BytesStorageMetadata", "MetadataIndex"])
def test_an_index_cannot_change_the_classes_of_torch(name, tmp_path):
    """The BUILD of a pickle sets attributes on whatever is named, a class included."""
    module, name_, attribute = written(torch_metadata.__name__, name, "left_behind")
    (tmp_path / ".metadata").write_bytes(b"\x80\x04" + module + name_ + b"\x93N}" + attribute + b"K\x01s\x86b.")
    with pytest.raises(ConfigurationError, match=r"\.metadata (cannot be read|is not an index)"):
        read_metadata(tmp_path)
    assert not hasattr(getattr(torch_metadata, name), "left_behind")


@pytest.mark.parametrize("file", ["../outside.distcp", "/outside.distcp", "sub/__0_0.distcp", ".."])
def test_an_index_names_files_of_its_own_folder_only(file, folder):
    with changed_index(folder) as index:
        for place in index.storage_data.values():
            place.relative_path = file
    with pytest.raises(ConfigurationError, match=f"is refused: it names '{file}'"):
        read_metadata(folder)


def test_a_dotted_name_does_not_reach_through_an_allowed_module(tmp_path):
    """Protocol 4 lets a name walk attributes: torch.distributed.checkpoint.metadata has `os` among its globals."""
    mark = tmp_path / "ran"
    module, name, argument = written(torch_metadata.__name__, "os.system", f"touch {mark}")
    (tmp_path / ".metadata").write_bytes(b"\x80\x04" + module + name + b"\x93" + argument + b"\x85R.")
    with pytest.raises(ConfigurationError, match="refused: .*os.system"):
        read_metadata(tmp_path)
    assert not mark.exists()


def test_objects_of_known_libraries_become_inert_and_stand_ins_go(tmp_path):
    declared = set(torch.serialization.get_safe_globals())
    content = {
        "args": argparse.Namespace(num_layers=2, signal=signal.SIGTERM),
        "rng": [random.getstate(), np.random.get_state(), np.dtype("u4")],
        "tensor": torch.arange(3),
    }
    torch.save(content, tmp_path / "file.pt")
    found = load_inertly(tmp_path / "file.pt")
    assert all(isinstance(value, Inert) for value in (found["args"], found["args"].signal, found["rng"][1][1]))
    assert found["args"].num_layers == 2
    assert torch.equal(found["tensor"], content["tensor"])
    assert set(torch.serialization.get_safe_globals()) == declared
    # What other libraries call safe is refused too.
    with torch.serialization.safe_globals([random.Random]):
        torch.save(random.Random(), tmp_path / "file.pt")
        with pytest.raises(ConfigurationError, match="refused: .*random.Random"):
            load_inertly(tmp_path / "file.pt")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 torn", pickle.dumps({"a": 1})])
def test_a_torn_file_is_named(content, tmp_path):
    (tmp_path / "file.pt").write_bytes(content)
    with pytest.raises(ConfigurationError, match="file.pt cannot be read: it is truncated, or no"):
        load_inertly(tmp_path / "file.pt")


def test_an_index_is_read_whole_and_a_torn_one_is_named(tmp_path):
    folder = save_distributed(tmp_path / "megatron", {"a": torch.zeros(2, 3), "b": torch.zeros(1).bfloat16()})
    found, expected = read_metadata(folder), FileSystemReader(folder).read_metadata()
    described = [
        {key: (tensor.properties.dtype, tensor.size, tensor.chunks) for key, tensor in one.state_dict_metadata.items()}
        for one in (found, expected)
    ]
    assert described[0] == described[1]
    assert found.storage_data == expected.storage_data
    whole = (folder / ".metadata").read_bytes()
    for content in (b"", whole[:-20], pickle.dumps({"a": 1})):
        (folder / ".metadata").write_bytes(content)
        with pytest.raises(ConfigurationError, match=r"\.metadata (cannot be read|is not an index)"):
            read_metadata(folder)


SIZE = (4, 6)


@pytest.mark.parametrize(
    ("boxes", "is_whole"),
    [
        ([((0, 0), SIZE)], True),
        ([((0, 0), (4, 2)), ((0, 2), (1, 4)), ((1, 2), (3, 4))], True),
        ([], False),
        ([((0, 0), (4, 5))], False),
        ([((0, 0), (4, 4)), ((0, 2), (4, 2))], False),  # as many elements as the tensor has
        ([((0, 0), SIZE), ((0, 6), SIZE)], False),
        ([((0, 0), SIZE), ((1, 1), (1, 1))], False),
    ],
)
def test_an_index_whose_slices_do_not_fill_a_tensor_is_refused(boxes, is_whole, tmp_path):
    """torch would leave the rest of the tensor as it was."""
    of_torch = torch_metadata
    chunks = [of_torch.ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in boxes]
    properties = of_torch.TensorProperties(torch.float32)
    one_slice = [of_torch.ChunkStorageMetadata(torch.Size([0] * len(SIZE)), torch.Size(SIZE))]
    tensors = {  # one beside it is whole
        key: of_torch.TensorStorageMetadata(properties, torch.Size(SIZE), slices)
        for key, slices in {"whole": one_slice, "a": chunks}.items()
    }
    places = {
        of_torch.MetadataIndex(key, chunk.offsets): _StorageInfo("__0_0.distcp", 0, 1)
        for key, tensor in tensors.items()
        for chunk in tensor.chunks
    }
    (tmp_path / ".metadata").write_bytes(pickle.dumps(of_torch.Metadata(dict(tensors), storage_data=places)))
    with (
        nullcontext()
        if is_whole
        else pytest.raises(ConfigurationError, match="slices of a tensor are missing or overlap")
    ):
        read_metadata(tmp_path)


def test_no_message_advises_to_unpickle_without_a_check(folder, tmp_path, alone):
    torch.save({"a": attack("system", tmp_path / "ran")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigurationError, match=r"it names \w+\.system.*safetensors") as told:
        open_source(tmp_path)
    assert "weights_only" not in str(told.value)
    payload = (tmp_path / "pytorch_model.bin").read_bytes()
    (folder / "__0_0.distcp").write_bytes(payload)
    with changed_index(folder) as index:
        index.storage_data = {key: _StorageInfo("__0_0.distcp", 0, len(payload)) for key in index.storage_data}
    with pytest.raises(ConfigurationError, match=r"is damaged: .*it names \w+\.system") as told:
        read_one_tensor(folder)
    assert "weights_only" not in str(told.value) and "\n" not in str(told.value)
