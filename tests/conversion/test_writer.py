"""Safetensors that are written one by one are what the library would write, whatever the file system does."""

import errno
import fcntl
import json
import os
import random
from functools import partial

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from megatron_peft.config import ConfigurationError
from megatron_peft.conversion import writer as direct_file
from megatron_peft.conversion.writer import DirectFile, parse_bytes, write_safetensors

TENSORS = {
    "a": torch.randn(3, 5),
    "b": torch.randn(7).bfloat16(),
    "c": torch.randn(2, 2, 2).half(),
    "d": torch.randn(4, 4).double().t(),
    "scalar": torch.tensor(1.5),
}
SPECS = {name: torch.empty_like(tensor, device="meta") for name, tensor in TENSORS.items()}


def write(folder, **settings) -> dict[str, list[str]]:
    """Names in each file."""
    write_safetensors(folder, SPECS, TENSORS.items(), **settings)
    found = {path.name: load_file(path) for path in sorted(folder.glob("*.safetensors"))}
    for tensors in found.values():
        assert all(t.dtype == TENSORS[n].dtype and torch.equal(t, TENSORS[n]) for n, t in tensors.items())
    return {file: sorted(tensors) for file, tensors in found.items()}


@pytest.mark.parametrize("stem", ["model", "adapter_model"])
def test_one_file_holds_everything(stem, tmp_path):
    assert write(tmp_path, stem=stem) == {f"{stem}.safetensors": sorted(TENSORS)}
    with safe_open(tmp_path / f"{stem}.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert len(list(tmp_path.iterdir())) == 1


def test_shards_keep_the_limit_and_have_an_index(tmp_path):
    files = write(tmp_path, max_shard_bytes=80)
    names = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    assert files == dict(zip(names, (["a", "b"], ["d"], ["c", "scalar"]), strict=True))  # d alone is above the limit
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file for file, names in files.items() for name in names}
    assert index["metadata"]["total_size"] == sum(spec.nbytes for spec in SPECS.values())


def test_sizes_are_understood():
    sizes = {"5GB": 5 * 10**9, "1.5 GiB": 3 * 2**29, "200mb": 2 * 10**8, "4096": 4096}
    assert {text: parse_bytes(text) for text in sizes} == sizes
    for text in ("", "5 bananas", "-1GB", "0MB", "0.5"):
        with pytest.raises(ConfigurationError, match="--max-shard-size .* is not a size"):
            parse_bytes(text)


PAGE = 4096


@pytest.fixture
def file(tmp_path, monkeypatch):
    """The place of a file that is written in blocks of two pages."""
    monkeypatch.setattr(direct_file, "BLOCK_BYTES", 2 * PAGE)
    return tmp_path / "file"


def check_writing(path, lengths: list[int]) -> None:
    pieces = [random.randbytes(length) for length in lengths]
    with DirectFile(path) as file:
        for number, piece in enumerate(pieces):
            assert file.tell() == sum(lengths[:number])
            assert file.write(memoryview(piece)) == len(piece)
    assert path.read_bytes() == b"".join(pieces)


LENGTHS = [[], [0], [1], [PAGE], [2 * PAGE], [2 * PAGE + 1], [PAGE, PAGE, 5], [7 * PAGE + 3], [1] * 9, [3000] * 20]


@pytest.mark.parametrize("lengths", LENGTHS)
def test_everything_arrives(lengths, file):
    check_writing(file, lengths)


def refuse(error: int, when, common, calls, *args):
    if when(*args):
        calls.append(args)
        raise OSError(error, os.strerror(error))
    return common(*args)


def write_short(common, calls, descriptor, data):
    calls.append(data)
    return common(descriptor, data[:PAGE] if len(calls) == 1 else data[:1000])


def is_direct(descriptor, data):
    return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)


@pytest.mark.parametrize(
    ("module", "name", "change", "num_calls"),
    [
        (fcntl, "fcntl", partial(refuse, errno.EINVAL, lambda *args: args[-1] & os.O_DIRECT), {1}),
        (os, "write", partial(refuse, errno.EINVAL, is_direct), {0, 1}),  # 0 where O_DIRECT is not known here
        (os, "write", write_short, range(5, 1000)),
    ],
    ids=["refused when opened", "refused when written", "parts of a block"],
)
def test_file_systems_with_ways_of_their_own_hold_everything_too(module, name, change, num_calls, file, monkeypatch):
    calls = []
    monkeypatch.setattr(module, name, partial(change, getattr(module, name), calls))
    check_writing(file, [5 * PAGE + 1])
    assert len(calls) in num_calls


def test_other_errors_of_writing_are_raised_once_and_no_file_is_overwritten(file, monkeypatch):
    opened = DirectFile(file)
    with pytest.raises(FileExistsError):
        DirectFile(file)
    monkeypatch.setattr(os, "write", partial(refuse, errno.ENOSPC, lambda *_: True, os.write, []))
    with pytest.raises(OSError, match="No space left"):
        opened.write(bytes(2 * PAGE))
    monkeypatch.undo()
    opened.close()
    opened.close()
