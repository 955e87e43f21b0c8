"""Saving in the background: what is written is the moment of the save, and nothing pending is lost."""

from __future__ import annotations

import pytest

from megatron_peft.checkpoint import saver
from megatron_peft.checkpoint.folders import start_draft
from megatron_peft.checkpoint.saver import Saver
from megatron_peft.config import CheckpointConfig, ConfigurationError
from tests.checkpoint.test_folder_lock import holder


def test_a_step_goes_on_while_files_are_written(two_ranks):
    for facts in two_ranks:
        assert facts["behind"]["before"] == (None, None)
        assert facts["behind"]["after"] == (1, "None", "iter_0000001")


def test_the_state_of_the_saves_moment_is_written(two_ranks):
    assert [facts["behind"]["differences"] for facts in two_ranks] == [[], []]


def test_each_save_is_told_once(facts):
    assert facts["behind"]["nothing pending"] is None


def test_a_save_does_not_disturb_the_run(two_ranks):
    assert [facts["saves disturb"] for facts in two_ranks] == [[], []]


def test_a_full_disk_in_the_background_is_told_on_all_ranks_and_costs_nothing(two_ranks):
    for facts in two_ranks:
        failing = facts["behind, failing"]
        assert "iteration 2 was not saved" in failing["message"] and "No space left" in failing["message"]
        assert failing["unchanged"]
        assert failing["again"] == (2, None)


def test_a_pending_save_is_completed_when_the_run_ends_and_the_last_two_are_kept(two_ranks):
    assert [facts["left behind"] for facts in two_ranks] == [["iter_0000002", "iter_0000003"]] * 2


def test_a_run_into_the_folder_of_another_is_refused_and_touches_nothing(alone, tmp_path, monkeypatch):
    draft = start_draft(tmp_path, 50)
    take = saver.FolderLock
    monkeypatch.setattr(saver, "FolderLock", lambda folder: take(folder, grace_seconds=0.1))
    with holder(tmp_path), pytest.raises(ConfigurationError, match="another run is saving there"):
        Saver(CheckpointConfig(save=str(tmp_path)))
    assert draft.exists()


def test_drafts_of_a_killed_run_are_removed(alone, tmp_path):
    draft = start_draft(tmp_path, 50)
    with Saver(CheckpointConfig(save=str(tmp_path))) as unused:
        assert unused.finish() is None
    assert not draft.exists()


def test_without_a_lock_drafts_may_belong_to_somebody(alone, tmp_path, monkeypatch):
    draft = start_draft(tmp_path, 50)
    monkeypatch.setattr(saver.FolderLock, "_acquire", lambda lock, deadline: False)
    with Saver(CheckpointConfig(save=str(tmp_path))):
        assert draft.exists()
