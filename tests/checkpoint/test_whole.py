"""A damaged checkpoint is named, and an older whole one is taken, unless one was asked for by name."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from megatron_peft.checkpoint import whole
from megatron_peft.checkpoint.manifest import damage
from megatron_peft.config import ConfigurationError


def test_a_flipped_byte_makes_load_go_back_loudly(two_ranks):
    assert [facts["gone back"]["iteration"] for facts in two_ranks] == [2, 2]
    (said,), on_the_second_rank = (facts["gone back"]["said"] for facts in two_ranks)
    assert "iter_0000003 is damaged: __1_0.distcp has other bytes than were written" in said
    assert "GOING BACK to" in said and "iter_0000002" in said
    assert on_the_second_rank == []


def test_a_damaged_checkpoint_given_by_name_is_refused(two_ranks):
    for facts in two_ranks:
        assert "iter_0000003 holds no whole checkpoint" in facts["gone back"]["explicit"]
        assert "__1_0.distcp has other bytes" in facts["gone back"]["explicit"]


def test_scoring_takes_no_other_checkpoint_than_the_newest(two_ranks):
    for facts in two_ranks:
        assert "__1_0.distcp has other bytes" in facts["gone back"]["inference"]


def test_when_none_is_whole_the_damage_of_each_is_named(two_ranks):
    for facts in two_ranks:
        message = facts["gone back"]["none whole"]
        assert "iter_0000003 is damaged: __1_0.distcp" in message
        assert "iter_0000002 is damaged: .metadata has other bytes" in message
        assert "from the beginning" in message


def test_any_flipped_byte_and_any_truncation_of_a_real_checkpoint_is_found(files, two_ranks, tmp_path):
    """Every file of it; 40 offsets and 40 lengths each, the first and the last among them."""
    checkpoint = Path(shutil.copytree(Path(files.work, "lora-TP2", "iter_0000002"), tmp_path / "copy"))
    draw = random.Random(0)
    assert damage(checkpoint) == [] and len(list(checkpoint.iterdir())) == 8
    for path in checkpoint.iterdir():
        whole = path.read_bytes()
        for offset in {0, len(whole) - 1, *(draw.randrange(len(whole)) for _ in range(38))}:
            flipped = whole[:offset] + bytes([whole[offset] ^ 1 << draw.randrange(8)]) + whole[offset + 1 :]
            for torn in (flipped, whole[:offset]):
                path.write_bytes(torn)
                (problem,) = damage(checkpoint)
                assert problem.startswith(path.name), (path.name, offset)
        path.write_bytes(whole)


def test_a_tracker_whose_checkpoint_is_gone_is_told(tmp_path):
    """The run would start over, and with --save in the same folder go on there."""
    assert whole._candidates(tmp_path) == []
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("12\n")
    with pytest.raises(
        ConfigurationError, match="holds no checkpoint of a run, but its latest_.*names 12: .*--pretrained"
    ):
        whole._candidates(tmp_path)
