"""A folder appears whole or not at all."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from megatron_peft.config import ConfigurationError
from megatron_peft.conversion.output_folder import new_folder
from tests.recorded_calls import recorded_calls


def test_the_folder_appears_at_the_end(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "out"
    with new_folder(output) as draft:
        (draft / "file").write_text("whole")
        assert not output.exists()
    assert (output / "file").read_text() == "whole"
    assert [path.name for path in output.parent.iterdir()] == ["out"]


def test_it_gets_its_name_by_one_rename_of_what_is_on_the_disk(tmp_path: Path, monkeypatch) -> None:
    """Killed, or without power, at any instant there is all of it or nothing."""
    calls = recorded_calls(monkeypatch)
    with new_folder(tmp_path / "out") as draft:
        (draft / "file").write_text("whole")
    synced = [("fsync", draft / "file"), ("fsync", draft)]
    assert calls == [*synced, ("rename", tmp_path / "out"), ("fsync", tmp_path)]


def test_permissions_are_those_of_any_new_folder(tmp_path: Path) -> None:
    (tmp_path / "ordinary").mkdir()
    with new_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ConfigurationError("bad"), ZeroDivisionError()])
def test_nothing_is_left_after_an_error(error: BaseException, tmp_path: Path) -> None:
    with pytest.raises(type(error)), new_folder(tmp_path / "out") as draft:
        (draft / "file").touch()
        raise error
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="--output .*out could not be written .No space left"):
        with new_folder(tmp_path / "out"):
            raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_a_parent_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match="could not be written"), new_folder(tmp_path / "file" / "out"):
        pass


@pytest.mark.parametrize("kind", ["file", "folder", "dangling link"])
def test_what_is_there_is_kept(kind: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    {"file": output.touch, "folder": output.mkdir, "dangling link": lambda: output.symlink_to("nowhere")}[kind]()
    with pytest.raises(ConfigurationError, match="exists already"), new_folder(output):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="exists already"), new_folder(tmp_path / "out"):
        (tmp_path / "out").mkdir()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
