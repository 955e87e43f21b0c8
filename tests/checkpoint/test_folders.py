"""Publication survives a kill at any call, damage is found, one process saves, leftovers are harmless."""

import errno
import os
import random
import shutil
import signal
import time
from contextlib import contextmanager, suppress
from functools import partial
from unittest import mock

import pytest

from megatron_peft.checkpoint import folders
from megatron_peft.checkpoint.folders import BEST, MANIFEST, RECORD, TRACKER, FolderLock, checkpoints, damage
from megatron_peft.config import ConfigurationError
from tests.conversion.megatron_folders import save_random
from tests.recorded_calls import recorded_calls


def save(folder, iteration, text):
    draft = folders.start_draft(folders.iteration_folder(folder, iteration))
    (draft / RECORD).write_text(text)
    return folders.publish(draft, folder, iteration)


def newest_text(folder):
    return (folders.newest_checkpoint(folder) / RECORD).read_text()


def test_newest_is_what_the_tracker_names_unless_a_checkpoint_itself_is_given(tmp_path):
    save(tmp_path, 50, "new")
    save(tmp_path, 10, "newer, of a run that started again")
    assert newest_text(tmp_path) == "newer, of a run that started again"
    assert newest_text(tmp_path / "iter_0000050") == "new"


@pytest.mark.parametrize("text", ["", "70\n", "release\n", "9" * 5000])
def test_without_a_usable_tracker_the_newest_folder_is_taken(tmp_path, text, caplog):
    save(tmp_path, 50, "a")
    save(tmp_path, 60, "b")
    (tmp_path / TRACKER).write_text(text)
    assert newest_text(tmp_path) == "b"
    assert "iter_0000060" in caplog.text


def test_leftovers_of_a_killed_run_are_removed_but_no_whole_checkpoint(tmp_path):
    # A rank that outlives its killed run must not write into the next run's files.
    assert folders.start_draft(tmp_path / "iter_0000050") != folders.start_draft(tmp_path / "iter_0000050")
    assert folders.newest_checkpoint(tmp_path) is folders.newest_checkpoint(tmp_path / "missing") is None
    save(tmp_path, 40, "a")
    (tmp_path / ".iter_0000030.removed").mkdir()
    os.rename(save(tmp_path, 50, "b"), tmp_path / ".iter_0000050.replaced")  # killed between the two renames
    folders.remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000040", "iter_0000050", TRACKER]
    assert newest_text(tmp_path) == "b"


def test_the_last_checkpoints_are_kept_and_later_iterations_are_left_alone(tmp_path, monkeypatch, caplog):
    for iteration in (10, 20, 30, 40, 90, 50):
        save(tmp_path, iteration, str(iteration))
    aside = shutil.copytree(tmp_path / "iter_0000020", tmp_path / "iter_0000020_keep")
    folders.keep_last(tmp_path, 50, num_kept=3)
    assert aside.is_dir(), "what somebody has put aside is no checkpoint of the run"
    assert [path.name[-2:] for path in checkpoints(tmp_path)] == ["50", "90", "40", "30"]
    folders.keep_last(tmp_path, 50, num_kept=2)
    assert [path.name[-2:] for path in checkpoints(tmp_path)] == ["50", "90", "40"]
    monkeypatch.setattr(os, "rename", mock.Mock(side_effect=PermissionError("not yours")))
    folders.keep_last(tmp_path, 50, num_kept=1)
    assert "iter_0000040 cannot be removed: not yours" in caplog.text


def test_what_is_being_removed_has_no_checkpoints_name_any_more(tmp_path, monkeypatch):
    for iteration in (50, 60):
        save(tmp_path, iteration, str(iteration))
    with monkeypatch.context() as killed:
        killed.setattr(folders.shutil, "rmtree", mock.Mock(side_effect=OSError("killed")))
        folders.keep_last(tmp_path, 60, 1)
    assert sorted(path.name for path in tmp_path.glob("*iter_*")) == [".iter_0000050.removed", "iter_0000060"]


def best_text(folder):
    return (folders.newest_checkpoint(folder / BEST) / RECORD).read_text()


def test_the_best_checkpoint_has_a_link_and_is_kept(tmp_path, monkeypatch, caplog):
    for iteration in (10, 20, 30, 40, 50):
        save(tmp_path, iteration, str(iteration))
    folders.link_best(tmp_path, 20)
    folders.link_best(tmp_path, 60)  # whose save has failed
    assert best_text(tmp_path) == "20" and os.readlink(tmp_path / BEST) == "iter_0000020"
    folders.keep_last(tmp_path, 50, num_kept=1, best=30)
    assert [path.name[-2:] for path in checkpoints(tmp_path)] == ["50", "30", "20"]
    folders.link_best(tmp_path, 30)
    folders.keep_last(tmp_path, 50, num_kept=1)
    assert [path.name[-2:] for path in checkpoints(tmp_path)] == ["50", "30"] and newest_text(tmp_path) == "50"
    monkeypatch.setattr(os, "symlink", mock.Mock(side_effect=PermissionError("no links here")))
    folders.link_best(tmp_path, 50)
    assert "cannot be made a link to iter_0000050 (no links here)" in caplog.text and best_text(tmp_path) == "30"


@pytest.mark.parametrize("lost", [RECORD, MANIFEST])
def test_a_checkpoint_that_lost_its_record_or_manifest_is_still_seen(tmp_path, lost):
    """It must be named as damaged; passing it over would start a run from the beginning."""
    checkpoint = save(tmp_path, 50, "a")
    (checkpoint / lost).unlink()
    assert checkpoints(tmp_path) == checkpoints(checkpoint) == [checkpoint]


@pytest.mark.parametrize(
    ("tracker", "place"), [("10\n", "iter_0000010"), ("release", "release"), ("9" * 5000, "release"), (None, "")]
)
def test_the_tracker_leads_to_megatrons_files(tracker, place, tmp_path):
    for name in ("iter_0000010", "iter_0000020", "release") if tracker else ("",):
        (tmp_path / name / "mp_rank_00").mkdir(parents=True)
    if tracker:
        (tmp_path / TRACKER).write_text(tracker)
    assert folders.megatron_files(tmp_path) == tmp_path / place
    assert folders.megatron_files(save_random(tmp_path / "hf")) is folders.megatron_files(tmp_path / "nowhere") is None


class Killed(BaseException):
    """The process ends here; nothing that it would have done later happens."""


CALLS = ((os, "rename"), (os, "replace"), (os, "fsync"), (os, "symlink"), (shutil, "rmtree"))


def count_down(monkeypatch, calls, error):
    """Let `calls` calls of CALLS through, then raise `error` for ever."""
    left = [calls]

    def guarded(original, *arguments, **settings):
        left[0] -= 1
        if left[0] < 0:
            raise error
        return original(*arguments, **settings)

    for owner, name in CALLS:
        monkeypatch.setattr(owner, name, partial(guarded, getattr(owner, name)))
    return left


def killed_at_every_call(tmp_path, monkeypatch, before, act):
    """Folders in which `act` was killed at its first call of CALLS, its second, ..., and one in which it came to its
    end."""
    for calls in range(100):
        folder = tmp_path / str(calls)
        before(folder)
        with monkeypatch.context() as patch:
            left = count_down(patch, calls, Killed())
            with suppress(Killed):
                act(folder)
        yield folder
        if left[0] >= 0:
            assert calls > 6
            return
    pytest.fail("not every call was reached")


@pytest.mark.parametrize("iteration", [50, 60])  # of the same iteration, and of a later one
def test_killed_at_any_call_the_tracker_names_a_whole_checkpoint(tmp_path, monkeypatch, caplog, iteration):
    seen, before, act = set(), lambda folder: save(folder, 50, "old"), lambda folder: save(folder, iteration, "new")
    for folder in killed_at_every_call(tmp_path, monkeypatch, before, act):
        survived = newest_text(folder)
        seen.add(survived)
        assert not caplog.records, "the tracker's checkpoint was missing, and another one was taken"
        folders.remove_leftovers(folder)  # as the next run does first
        assert newest_text(folder) == survived
        save(folder, iteration, "again")  # and the run can go on
        assert newest_text(folder) == "again"
    assert seen == {"old", "new"}


def save_the_best(iteration, folder):
    save(folder, iteration, str(iteration))
    folders.link_best(folder, iteration)
    folders.keep_last(folder, iteration, num_kept=1, best=iteration)


def test_killed_at_any_call_the_link_names_a_whole_best_checkpoint(tmp_path, monkeypatch):
    seen, before, act = set(), partial(save_the_best, 40), partial(save_the_best, 50)
    for folder in killed_at_every_call(tmp_path, monkeypatch, before, act):
        folders.remove_leftovers(folder)
        seen.add(best_text(folder))
        save_the_best(60, folder)
        assert best_text(folder) == newest_text(folder) == "60" and len(checkpoints(folder)) == 1
    assert seen == {"40", "50"}


def test_files_are_synced_before_the_rename_and_that_before_the_tracker(tmp_path, monkeypatch):
    """A loss of power may undo what was not synced, in any order."""
    calls = recorded_calls(monkeypatch)
    checkpoint, tracker = save(tmp_path, 50, "a"), tmp_path / f".{TRACKER}.tmp"
    published, named = calls.index(("rename", checkpoint)), calls.index(("replace", tmp_path / TRACKER))
    synced = {".draft" if path.suffix == ".draft" else path.name for call, path in calls[:published] if call == "fsync"}
    assert synced == {RECORD, MANIFEST, ".draft", tracker.name}
    assert calls[published + 1 : named] == [("fsync", tmp_path)] == calls[named + 1 :]
    calls.clear()
    folders.link_best(tmp_path, 50)
    assert calls == [("replace", tmp_path / BEST), ("fsync", tmp_path)]


def test_links_that_others_have_left_lead_nothing_elsewhere(tmp_path):
    other, path = tmp_path / "other", tmp_path / TRACKER
    other.write_text("kept")
    (tmp_path / f".{TRACKER}.tmp").symlink_to(other)
    folders.write_atomically(path, "50\n")
    assert path.read_text() == "50\n" and not path.is_symlink()
    (tmp_path / ".lock").symlink_to(other)
    with pytest.raises(OSError, match=f"{tmp_path}/.lock"):
        FolderLock(tmp_path)
    assert other.read_text() == "kept"


FULL = OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_told_with_the_file_and_leaves_the_old_text_and_checkpoint(tmp_path, monkeypatch):
    save(tmp_path / "run", 50, "old")
    with monkeypatch.context() as full, pytest.raises(OSError, match="No space"):
        full.setattr(folders, "write_beside", mock.Mock(side_effect=FULL))
        folders.publish(folders.start_draft(tmp_path / "run" / "iter_0000050"), tmp_path / "run", 50)
    assert (tmp_path / "run" / "iter_0000050" / RECORD).read_text() == "old"  # what needs space comes before a rename
    path = tmp_path / TRACKER
    folders.write_atomically(path, "50\n")
    count_down(monkeypatch, 0, FULL)
    with pytest.raises(OSError, match=f"No space left on device: '{path}'"):
        folders.write_atomically(path, "60\n")
    assert path.read_text() == "50\n" and [one.name for one in tmp_path.iterdir() if one.is_file()] == [TRACKER]
    monkeypatch.setattr(os, "pwrite", mock.Mock(side_effect=FULL))
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/.lock'"):
        FolderLock(tmp_path)


CONTENTS = {"__0_0.distcp": bytes(range(256)) * 40, ".metadata": b"names", RECORD: b'{"a": 1}', "empty": b""}


@pytest.fixture
def described(tmp_path):
    """A checkpoint of CONTENTS with its manifest."""
    for name, content in CONTENTS.items():
        (tmp_path / name).write_bytes(content)
    folders.write_manifest(tmp_path, {})
    return tmp_path


def test_every_flipped_byte_truncation_and_growth_is_found(described):
    """Of the manifest itself too; all of the small files, samples of the large one."""
    assert damage(described) == []
    assert folders.read_manifest(described)["__0_0.distcp"] == folders.measure(described / "__0_0.distcp")
    draw = random.Random(0)
    for path in sorted(described.iterdir()):
        whole = path.read_bytes()
        is_small = len(whole) < 1000
        flips = range(len(whole)) if is_small else draw.sample(range(len(whole)), 50)
        changed = [whole[:at] + bytes([whole[at] ^ 1 << draw.randrange(8)]) + whole[at + 1 :] for at in flips]
        changed += [whole[:length] for length in range(0, len(whole), 1 if is_small else 997)]
        for content in (*changed, whole + b"\0"):
            path.write_bytes(content)
            (problem,) = damage(described)
            assert problem.startswith(path.name), (path.name, content)
        path.write_bytes(whole)
    assert damage(described) == []


def test_each_rank_names_the_missing_files_of_its_share(described):
    for name in CONTENTS:
        (described / name).unlink()
    for num_ranks in (1, 3, 7):
        found = [damage(described, rank, num_ranks) for rank in range(num_ranks)]
        assert sorted(sum(found, [])) == sorted(f"{name} is missing" for name in CONTENTS)
        assert max(map(len, found)) - min(map(len, found)) <= 1
    (described / MANIFEST).unlink()
    assert damage(described) == [f"{MANIFEST} cannot be read: No such file or directory"]


def test_a_rank_checks_the_files_that_a_rank_of_its_number_wrote(tmp_path):
    """It reads them again, from memory."""
    for rank in range(8):
        for name in (f"__{rank}_0.distcp", f"__{rank}_optimizer_0.distcp"):
            (tmp_path / name).write_bytes(bytes(10 + 7 * rank % 5))
    folders.write_manifest(tmp_path, {})
    for path in tmp_path.glob("__*"):
        path.unlink()
    for rank in range(4):
        told = [f"__{one}_{kind}0.distcp is missing" for one in (rank, rank + 4) for kind in ("", "optimizer_")]
        assert sorted(damage(tmp_path, rank, 4)) == sorted(told)


def test_files_that_their_writers_measured_are_not_read_again(described):
    known = {"__0_0.distcp": folders.measure(described / "__0_0.distcp")}
    (described / "__0_0.distcp").write_bytes(b"changed on the way to the disk")
    folders.write_manifest(described, known)
    assert damage(described) == ["__0_0.distcp has 30 bytes instead of 10240"]


@contextmanager
def holder(folder, write=lambda folder: None):
    """Another process, forked, that holds the folder and writes there; its number."""
    told, tells = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            lock = FolderLock(folder)
            write(folder)
            is_worker = os.fork() == 0  # of the data: it outlives its parent
            os.write(tells, b"holds it" if lock.is_held and not is_worker else b"")
            time.sleep(20 if is_worker else 600)
        finally:
            os._exit(1)
    os.close(tells)
    try:
        with open(told, "rb", buffering=0) as words:
            assert words.read(8) == b"holds it"
        yield process
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path):
    FolderLock(tmp_path).release()  # a lock that was given back can be taken
    with holder(tmp_path) as process:
        with pytest.raises(ConfigurationError, match=f"--save {tmp_path}: .*process {process} on .*another --save"):
            FolderLock(tmp_path, grace_seconds=0.2)
        os.kill(process, signal.SIGKILL)
        lock = FolderLock(tmp_path)
    assert lock.is_held
    lock.release()


WRITES = {"manifest": partial(folders.write_manifest, known={}), "sync": folders.sync_folder}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_draft_is_held_until_it_has_its_name(tmp_path, write):
    """A start that cleans up would remove it while its files go to the disk."""
    with holder(tmp_path, write), pytest.raises(ConfigurationError, match="another run is saving there"):
        FolderLock(tmp_path, grace_seconds=0)


def test_a_lock_that_is_not_a_file_is_an_error_and_a_file_system_without_locks_gives_a_warning(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(folders.fcntl, "lockf", mock.Mock(side_effect=OSError(95, "Operation not supported")))
    lock = FolderLock(tmp_path)
    assert not lock.is_held and "cannot be locked" in caplog.text
    lock.release()
    (tmp_path / ".lock").unlink()
    os.mkfifo(tmp_path / ".lock")
    with pytest.raises(ConfigurationError, match=f"--save {tmp_path}: .lock in it is a pipe .*remove it"):
        FolderLock(tmp_path)


def test_a_new_folder_gets_its_name_by_one_rename_of_what_is_on_the_disk(tmp_path, monkeypatch):
    """Killed, or without power, at any instant there is all of it or nothing. Its permissions are a new folder's."""
    calls, output = recorded_calls(monkeypatch), tmp_path / "deep" / "out"
    with folders.new_folder(output) as draft:
        (draft / "file").write_text("whole")
        assert not output.exists()
    synced = [("fsync", draft / "file"), ("fsync", draft)]
    assert calls == [*synced, ("rename", output), ("fsync", output.parent)]
    assert (output / "file").read_text() == "whole" and list(output.parent.iterdir()) == [output]
    assert output.stat().st_mode == output.parent.stat().st_mode


@pytest.mark.parametrize(
    ("error", "expected", "told"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt, ""),
        (ConfigurationError("bad"), ConfigurationError, "bad"),
        (FULL, ConfigurationError, "--output .*out could not be written .No space"),
    ],
)
def test_nothing_is_left_of_a_new_folder_after_an_error(error, expected, told, tmp_path):
    with pytest.raises(expected, match=told), folders.new_folder(tmp_path / "out") as draft:
        (draft / "file").touch()
        raise error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["file", "folder", "dangling link", "folder that appears meanwhile"])
def test_what_has_the_name_of_a_new_folder_is_kept(kind, tmp_path):
    output = tmp_path / "out"
    make = {"file": output.touch, "dangling link": lambda: output.symlink_to("nowhere")}.get(kind, output.mkdir)
    if kind != "folder that appears meanwhile":
        make()
    with pytest.raises(ConfigurationError, match="exists already"), folders.new_folder(output):
        make()
    if kind == "file":  # a parent of a folder it cannot be
        with pytest.raises(ConfigurationError, match="could not be written"), folders.new_folder(output / "in"):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
