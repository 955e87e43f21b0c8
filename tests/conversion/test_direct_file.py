"""A file written past the page cache holds what was written, on file systems that know direct access and that don't."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import pytest

from megatron_peft.conversion import direct_file
from megatron_peft.conversion.direct_file import DirectFile

PAGE = 4096


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct_file, "BLOCK_BYTES", 2 * PAGE)


def written(path: Path, lengths: list[int]) -> bytes:
    """Write pieces of these lengths; returns what they were."""
    draw = random.Random(0)
    pieces = [draw.randbytes(length) for length in lengths]
    with DirectFile(path) as file:
        for number, piece in enumerate(pieces):
            assert file.tell() == sum(lengths[:number])
            assert file.write(memoryview(piece)) == len(piece)
    return b"".join(pieces)


@pytest.mark.parametrize(
    "lengths",
    [[], [0], [1], [PAGE], [2 * PAGE], [2 * PAGE + 1], [PAGE, PAGE, 5], [7 * PAGE + 3], [1] * 9, [3000] * 20],
)
def test_everything_arrives(lengths: list[int], tmp_path: Path) -> None:
    expected = written(tmp_path / "file", lengths)
    assert (tmp_path / "file").read_bytes() == expected


def refuse(name: str, refused, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let os.open or os.write raise EINVAL where `refused` says so; returns how often it did."""
    common, count = getattr(os, name), []

    def function(*args):
        if refused(*args):
            count.append(1)
            raise OSError(errno.EINVAL, "Invalid argument")
        return common(*args)

    monkeypatch.setattr(direct_file.os, name, function)
    return count


def test_a_file_system_that_does_not_open_for_direct_access(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refusals = refuse("open", lambda path, flags, mode: flags & os.O_DIRECT, monkeypatch)
    expected = written(tmp_path / "file", [5 * PAGE + 1])
    assert (tmp_path / "file").read_bytes() == expected and len(refusals) == 1


def test_a_file_system_that_refuses_when_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def is_direct(descriptor: int, data: memoryview) -> bool:
        return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)

    refusals = refuse("write", is_direct, monkeypatch)
    expected = written(tmp_path / "file", [5 * PAGE + 1])
    assert (tmp_path / "file").read_bytes() == expected and len(refusals) <= 1


def test_other_errors_of_writing_are_raised_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, data: memoryview) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    file = DirectFile(tmp_path / "file")
    monkeypatch.setattr(direct_file.os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        file.write(bytes(2 * PAGE))
    monkeypatch.undo()
    file.close()
    file.close()


def test_a_disk_that_takes_a_part_of_a_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    common, calls = os.write, []

    def short(descriptor: int, data: memoryview) -> int:
        calls.append(len(data))
        return common(descriptor, data[:PAGE] if len(calls) == 1 else data[:1000])

    monkeypatch.setattr(direct_file.os, "write", short)
    expected = written(tmp_path / "file", [4 * PAGE])
    assert (tmp_path / "file").read_bytes() == expected and len(calls) > 4


def test_a_file_that_is_there_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(FileExistsError):
        DirectFile(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "kept"
