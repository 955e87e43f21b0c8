"""A save that fails, on whatever rank and in whatever phase, is one message on all ranks and costs nothing."""

from __future__ import annotations

import errno

import pytest

from megatron_peft.checkpoint import save


@pytest.mark.parametrize("phase", ["data on rank 1", "data on rank 1, for real", "metadata", "common file", "record"])
def test_a_full_disk_loses_nothing(two_ranks, phase):
    messages = set()
    for facts in two_ranks:
        message, as_before = facts["failed saves"][phase]
        assert as_before, "the folder's files changed, or the draft is still there"
        messages.add(message)
    (message,) = messages
    assert message.startswith("CheckpointNotSaved: --save")
    assert "iteration 2 was not saved" in message
    assert ("File too large" if "for real" in phase else "No space left on device") in message


def test_a_later_save_works(facts):
    assert facts["failed saves"]["afterwards"] == 2


def test_a_folder_that_cannot_be_made_is_named(two_ranks):
    for facts in two_ranks:
        assert "pairs.jsonl/runs" in facts["failed saves"]["no folder"]


def test_adapters_only_and_neither_optimizer_nor_generators(facts):
    keys = facts["saved partly"]["keys"]
    assert len(keys) == 4 * 4 * 2  # layers, linear layers, A and B
    assert all(key.endswith((".adapter.A", ".adapter.B")) for key in keys)


def test_without_the_optimizer_the_parameters_can_be_taken(facts):
    assert "--no-save-optim" in facts["saved partly"]["refused"]
    assert facts["saved partly"]["taken"]


def test_a_copy_that_there_is_no_room_for_costs_no_checkpoint(tmp_path, monkeypatch, caplog):
    """The file of the adapters beside the checkpoints; each of them has its own."""
    (tmp_path / "adapter_config.json").write_text("of the one before")

    def full(path, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(save, "write_atomically", full)
    save._write_beside_checkpoints(tmp_path / "adapter_config.json", "{}")
    assert "adapter_config.json cannot be written" in caplog.text
    assert (tmp_path / "adapter_config.json").read_text() == "of the one before"
