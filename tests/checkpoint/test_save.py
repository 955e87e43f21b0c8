"""A failed save is one message on all ranks and loses nothing, also in the background; generators repeat."""

import random
import re
import threading
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing import ShardedTensor

from megatron_peft.checkpoint import folders, save
from megatron_peft.checkpoint.folders import MANIFEST, publish, start_draft
from megatron_peft.checkpoint.save import Saver
from megatron_peft.checkpoint.state import random_targets, random_tensors, restore_random
from megatron_peft.checkpoint.tensors import PlannedFiles
from megatron_peft.config import CheckpointConfig, ConfigurationError
from megatron_peft.parallel.collectives import from_first_rank
from tests.checkpoint.test_folders import holder
from tests.recorded_calls import recorded_calls


@pytest.mark.parametrize("phase", ["data on rank 1", "data on rank 1, for real", "metadata", "common file", "record"])
def test_a_full_disk_loses_nothing(two_ranks, phase):
    assert [facts["failed saves"]["afterwards"] for facts in two_ranks] == [2, 2], "a later save works"
    (message, as_before), other = (facts["failed saves"][phase] for facts in two_ranks)
    assert other == (message, True) and as_before, "the folder's files changed, or the draft is still there"
    assert message.startswith("CheckpointNotSaved: --save") and "iteration 2 was not saved" in message
    assert ("File too large" if "for real" in phase else "No space left on device") in message


def test_a_save_does_not_disturb_the_run(two_ranks):
    assert [facts["saves disturb"] for facts in two_ranks] == [[], []]


def test_training_continues_while_the_state_at_the_save_is_written(two_ranks):
    for behind in (facts["behind"] for facts in two_ranks):
        assert (behind["before"], behind["after"]) == ((None, None), (1, "None", "iter_0000001"))
        assert behind["differences"] == [] and behind["nothing pending"] is None  # each save is told once


def test_the_thread_of_a_background_save_is_on_the_device_of_its_rank(alone, tmp_path, monkeypatch):
    """torch starts threads on device 0. `runtime/test_launch.py` has the function that sets it."""
    where: list[str] = []
    monkeypatch.setattr(save, "device_setter", lambda: lambda: where.append(threading.current_thread().name))
    with Saver(CheckpointConfig(save=str(tmp_path), async_save=True)) as saver:
        assert saver._executor is not None
        saver._executor.submit(int).result()
    assert where == ["checkpoint_0"]


def test_a_full_disk_in_the_background_is_reported_on_all_ranks(two_ranks):
    for failing in (facts["behind, failing"] for facts in two_ranks):
        assert "iteration 2 was not saved" in failing["message"] and "No space left" in failing["message"]
        assert failing["unchanged"] and failing["again"] == (2, None)


def test_a_pending_save_is_completed_when_the_run_ends_and_the_last_two_are_kept(two_ranks):
    assert [facts["left behind"] for facts in two_ranks] == [["iter_0000002", "iter_0000003"]] * 2


def test_a_run_into_the_folder_of_another_is_refused_and_touches_nothing(alone, tmp_path, monkeypatch):
    draft = start_draft(tmp_path / "iter_0000050")
    take = folders.FolderLock
    monkeypatch.setattr(folders, "FolderLock", lambda folder: take(folder, grace_seconds=0.1))
    with holder(tmp_path), pytest.raises(ConfigurationError, match="another run is saving there"):
        Saver(CheckpointConfig(save=str(tmp_path)))
    assert draft.exists()


def test_a_moved_folder_is_locked_again_unless_another_run_has_it(alone, tmp_path):
    with Saver(CheckpointConfig(save=str(tmp_path / "run"))) as saver:
        held = saver._lock
        saver.hold_folder()
        assert saver._lock is held
        (tmp_path / "run" / ".lock").unlink()
        publish(start_draft(tmp_path / "run" / "iter_0000050"), tmp_path / "run", 50)
        draft = start_draft(tmp_path / "run" / "iter_0000060")  # which a thread of this run is writing
        saver.hold_folder()  # the lock's file alone is gone, and the checkpoints are this run's
        assert draft.is_dir()
        (tmp_path / "run").rename(tmp_path / "moved")
        with holder(tmp_path / "run"), pytest.raises(ConfigurationError, match="another run has that folder now"):
            saver.hold_folder()
        saver.hold_folder()  # it has ended without a checkpoint
        assert saver._lock.is_in_place and saver._lock is not held
        (tmp_path / "run").rename(tmp_path / "moved again")
        (tmp_path / "moved").rename(tmp_path / "run")
        with pytest.raises(ConfigurationError, match="another run has that folder now"):
            saver.hold_folder()


def test_a_folder_that_cannot_be_read_is_a_configuration_error(alone, tmp_path):
    with pytest.raises(ConfigurationError, match="No such file or directory: .*gone"):
        from_first_rank(lambda: (tmp_path / "gone").read_text())


@pytest.mark.parametrize("is_locked", [True, False])
def test_drafts_of_a_killed_run_are_removed_under_the_lock_only(alone, tmp_path, monkeypatch, is_locked):
    draft = start_draft(tmp_path / "iter_0000050")
    if not is_locked:
        monkeypatch.setattr(folders, "locked", lambda *_: False)
    with Saver(CheckpointConfig(save=str(tmp_path))) as unused:
        assert unused.finish() is None
    assert draft.exists() != is_locked


def test_a_ranks_files_are_synced_when_write_returns_and_a_torn_one_is_told_in_words(alone, tmp_path, monkeypatch):
    """The first rank, which publishes them, may be another machine: it cannot sync what this one has not sent."""
    files = PlannedFiles([ShardedTensor.from_rank_offsets("w", torch.ones(4))], tmp_path)
    calls = recorded_calls(monkeypatch)
    written = files.write()
    assert set(written.sums) == {"__0_0.distcp"} and ("fsync", tmp_path / "__0_0.distcp") in calls
    torn = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")
    monkeypatch.setattr(torch, "save", mock.Mock(side_effect=torn))
    with pytest.raises(ConfigurationError, match="could not be written: a file was cut short; is the disk full.$"):
        files.complete([written])


def test_a_folder_of_tensors_is_on_the_disk_before_it_has_its_name_and_that_after(tmp_path, monkeypatch):
    files = SimpleNamespace(write_together=lambda publish: publish([]), complete=lambda by_rank: {})
    monkeypatch.setattr(save, "PlannedFiles", lambda tensors, draft: files)
    calls = recorded_calls(monkeypatch)
    save.write_new_folder([], tmp_path / "new")
    told = " ".join(f"{name} {path.name}" for name, path in calls)
    assert re.search(rf"fsync {MANIFEST} fsync \.new\.\w+\.draft rename new fsync {tmp_path.name}$", told)


def draws():
    with tensor_parallel.get_cuda_rng_tracker().fork():
        tracked = torch.rand(1).item()
    return [random.gauss(0, 1), float(np.random.normal()), torch.rand(1).item(), tracked]


def test_restored_generators_repeat_their_numbers_and_belong_to_a_layout(alone, monkeypatch):
    draws()  # an odd number of normal draws: a second one waits in Python's and in numpy's generator
    stored = {tensor.key: tensor.data.clone() for tensor in random_tensors()}
    first = draws()
    targets = random_targets({key: tuple(data.shape) for key, data in stored.items()})
    for target in targets:
        target.data.copy_(stored[target.key])
    restore_random(targets)
    assert draws() == first
    monkeypatch.setattr(parallel_state, "get_tensor_model_parallel_world_size", lambda: 2)
    assert random_targets({key: tuple(data.shape) for key, data in stored.items()}) == []
