"""A resumed run is the uninterrupted one, bit for bit; a damaged checkpoint is named, and an older whole one taken."""

import shutil
from pathlib import Path

import pytest

from megatron_peft.checkpoint import load
from megatron_peft.checkpoint.folders import TRACKER, damage
from megatron_peft.config import ConfigurationError
from megatron_peft.parallel.collectives import from_first_rank
from tests.checkpoint import rank_checks
from tests.checkpoint.rank_checks import RESUMED_ON_FOUR, RESUMED_ON_TWO
from tests.conversion.megatron_folders import flip_a_byte
from tests.ranks import run_ranks


@pytest.mark.parametrize("name", RESUMED_ON_TWO)
def test_resumed_equals_uninterrupted(two_ranks, name):
    assert [facts["resumed"][name] for facts in two_ranks] == [[], []]


def test_resumed_equals_uninterrupted_on_four_ranks(files):
    by_rank = run_ranks(4, rank_checks.on_four_ranks, files, limit=900)
    assert by_rank == [{name: [] for name in RESUMED_ON_FOUR}] * 4


def test_a_flipped_byte_makes_load_go_back_loudly(two_ranks):
    assert [facts["gone back"]["iteration"] for facts in two_ranks] == [2, 2]
    (said,), on_the_second_rank = (facts["gone back"]["said"] for facts in two_ranks)
    assert "iter_0000003 is damaged: __1_0.distcp has other bytes than were written" in said
    assert "GOING BACK to" in said and "iter_0000002" in said and on_the_second_rank == []


@pytest.mark.parametrize(
    "asked, words",
    {
        "by name": ["iter_0000003 holds no whole checkpoint", "__1_0.distcp has other bytes"],
        "to score": ["__1_0.distcp has other bytes"],  # scoring takes no other checkpoint than the newest
        "none is whole": [
            "3 is damaged: __1_0.distcp",
            "2 is damaged: .metadata has other bytes",
            "from the beginning",
        ],
    }.items(),
)
def test_the_damage_is_named_where_going_back_is_no_way(two_ranks, asked, words):
    for facts in two_ranks:
        message = facts["gone back"][asked]
        assert all(word in message for word in words), message


def test_a_flipped_byte_in_any_file_of_a_real_checkpoint_is_found(files, two_ranks, tmp_path):
    checkpoint = Path(shutil.copytree(Path(files.work, "lora-TP2", "iter_0000002"), tmp_path / "copy"))
    assert damage(checkpoint) == [] and len(list(checkpoint.iterdir())) == 8
    for path in checkpoint.iterdir():
        before = path.read_bytes()
        flip_a_byte(path)
        (problem,) = damage(checkpoint)
        assert problem.startswith(path.name)
        path.write_bytes(before)


def test_a_tracker_whose_checkpoint_is_gone_is_told(tmp_path):
    """The run would start over, and with --save in the same folder go on there."""
    assert load._candidates(tmp_path) == []
    (tmp_path / TRACKER).write_text("12\n")
    with pytest.raises(ConfigurationError, match="holds no checkpoint .*, but its latest_.*names 12: .*--pretrained"):
        load._candidates(tmp_path)


def test_a_folder_that_cannot_be_read_is_an_error_of_the_user(alone, tmp_path):
    with pytest.raises(ConfigurationError, match="No such file or directory: .*gone"):
        from_first_rank(lambda: (tmp_path / "gone").read_text())
