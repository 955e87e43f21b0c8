"""Publication survives being cut off at any call, and a killed run's remains do no harm."""

from __future__ import annotations

import errno
import os
import shutil
from unittest import mock

import pytest

from megatron_peft.checkpoint import folders
from megatron_peft.checkpoint.folders import (
    RECORD,
    TRACKER,
    checkpoints,
    keep_last,
    newest_checkpoint,
    publish,
    remove_leftovers,
    start_draft,
    write_atomically,
)
from megatron_peft.checkpoint.manifest import MANIFEST
from tests.recorded_calls import recorded_calls


def save(folder, iteration, text):
    draft = start_draft(folder, iteration)
    (draft / RECORD).write_text(text)
    return publish(draft, folder, iteration)


def newest_text(folder):
    checkpoint = newest_checkpoint(folder)
    return None if checkpoint is None else (checkpoint / RECORD).read_text()


def test_published_checkpoint_has_megatrons_names(tmp_path):
    checkpoint = save(tmp_path / "runs", 50, "a")
    assert checkpoint == tmp_path / "runs" / "iter_0000050"
    assert (tmp_path / "runs" / TRACKER).read_text() == "50\n"
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["iter_0000050", TRACKER]


def test_newest_is_what_the_tracker_names(tmp_path):
    save(tmp_path, 50, "new")
    save(tmp_path, 10, "newer, of a run that started again")
    assert newest_text(tmp_path) == "newer, of a run that started again"


def test_a_checkpoint_itself_can_be_given(tmp_path):
    save(tmp_path, 50, "a")
    save(tmp_path, 60, "b")
    assert newest_text(tmp_path / "iter_0000050") == "a"


@pytest.mark.parametrize("text", ["", "70\n", "release\n"])
def test_without_a_usable_tracker_the_newest_folder_is_taken(tmp_path, text, caplog):
    save(tmp_path, 50, "a")
    save(tmp_path, 60, "b")
    (tmp_path / TRACKER).write_text(text)
    assert newest_text(tmp_path) == "b"
    assert "iter_0000060" in caplog.text


def test_no_checkpoint_is_none(tmp_path):
    start_draft(tmp_path, 50)
    assert newest_checkpoint(tmp_path) is None
    assert newest_checkpoint(tmp_path / "missing") is None


def test_drafts_of_one_iteration_never_share_a_folder(tmp_path):
    """A rank that outlives its killed run must not write into the next run's files."""
    assert start_draft(tmp_path, 50) != start_draft(tmp_path, 50)


def test_leftovers_of_a_killed_run_are_cleared_and_nothing_whole_is(tmp_path):
    save(tmp_path, 40, "a")
    start_draft(tmp_path, 50)
    (tmp_path / ".iter_0000030.removed").mkdir()
    os.rename(save(tmp_path, 50, "b"), tmp_path / ".iter_0000050.replaced")  # killed between the two renames
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000040", "iter_0000050", TRACKER]
    assert newest_text(tmp_path) == "b"


def test_the_last_are_kept_and_later_ones_of_another_run_are_left_alone(tmp_path):
    for iteration in (10, 20, 30, 40, 90):
        save(tmp_path, iteration, str(iteration))
    save(tmp_path, 50, "50")
    keep_last(tmp_path, 50, num_kept=3)
    assert [path.name[-2:] for path in checkpoints(tmp_path)] == ["50", "90", "40", "30"]
    keep_last(tmp_path, 50, num_kept=1)
    assert [path.name[-2:] for path in checkpoints(tmp_path)] == ["50", "90"]


def test_what_cannot_be_removed_is_said_and_harms_nothing(tmp_path, monkeypatch, caplog):
    save(tmp_path, 40, "a")
    save(tmp_path, 50, "b")
    monkeypatch.setattr(os, "rename", mock.Mock(side_effect=PermissionError("not yours")))
    keep_last(tmp_path, 50, num_kept=1)
    assert "iter_0000040 cannot be removed: not yours" in caplog.text


@pytest.mark.parametrize("lost", [RECORD, MANIFEST])
def test_a_checkpoint_that_lost_its_record_or_manifest_is_still_seen(tmp_path, lost):
    """It must be named as damaged; passing it over would start a run from the beginning."""
    checkpoint = save(tmp_path, 50, "a")
    (checkpoint / lost).unlink()
    assert checkpoints(tmp_path) == checkpoints(checkpoint) == [checkpoint]


class Killed(BaseException):
    """The process ends here; nothing that it would have done later happens."""


CALLS = ((os, "rename"), (os, "replace"), (os, "fsync"), (shutil, "rmtree"))


def count_down(monkeypatch, calls, error):
    """Let `calls` calls of CALLS through, then raise `error` for ever."""
    left = [calls]

    def guard(original):
        def guarded(*arguments, **settings):
            left[0] -= 1
            if left[0] < 0:
                raise error
            return original(*arguments, **settings)

        return guarded

    for owner, name in CALLS:
        monkeypatch.setattr(owner, name, guard(getattr(owner, name)))
    return left


@pytest.mark.parametrize("iteration", [50, 60])  # of the same iteration, and of a later one
def test_killed_at_any_call_the_tracker_names_a_whole_checkpoint(tmp_path, monkeypatch, caplog, iteration):
    seen = set()
    for calls in range(100):
        folder = tmp_path / str(calls)
        save(folder, 50, "old")
        with monkeypatch.context() as patch:
            left = count_down(patch, calls, Killed())
            try:
                save(folder, iteration, "new")
            except Killed:
                pass
        survived = newest_text(folder)
        seen.add(survived)
        assert not caplog.records, "the tracker's checkpoint was missing, and another one was taken"
        remove_leftovers(folder)  # as the next run does first
        assert newest_text(folder) == survived
        save(folder, iteration, "again")  # and the run can go on
        assert newest_text(folder) == "again"
        if left[0] >= 0:
            break
    assert left[0] >= 0 and calls > 6, "every call was reached"
    assert seen == {"old", "new"}


def test_all_is_on_the_disk_before_its_name_is_and_that_before_the_trackers(tmp_path, monkeypatch):
    """A loss of power may undo what was not synced, in any order."""
    calls = recorded_calls(monkeypatch)
    checkpoint, tracker = save(tmp_path, 50, "a"), tmp_path / f".{TRACKER}.tmp"
    published, named = calls.index(("rename", checkpoint)), calls.index(("replace", tmp_path / TRACKER))
    synced = {".draft" if path.suffix == ".draft" else path.name for call, path in calls[:published] if call == "fsync"}
    assert synced == {RECORD, MANIFEST, ".draft", tracker.name}
    assert calls[published + 1 : named] == [("fsync", tmp_path)] == calls[named + 1 :]


def test_a_full_disk_leaves_the_old_text_and_no_temporary_file(tmp_path, monkeypatch):
    path = tmp_path / TRACKER
    write_atomically(path, "50\n")
    full = OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch:
        count_down(patch, 0, full)
        with pytest.raises(OSError, match="No space"):
            write_atomically(path, "60\n")
    assert path.read_text() == "50\n"
    assert list(tmp_path.iterdir()) == [path]


def test_everything_that_needs_space_comes_before_the_first_rename(tmp_path, monkeypatch):
    save(tmp_path, 50, "old")
    draft = start_draft(tmp_path, 50)
    (draft / RECORD).write_text("new")
    monkeypatch.setattr(
        folders, "write_beside", lambda path, text: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full"))
    )
    with pytest.raises(OSError, match="full"):
        publish(draft, tmp_path, 50)
    assert (tmp_path / "iter_0000050" / RECORD).read_text() == "old"
