"""A damaged checkpoint is named, and an older whole one is taken, unless one was asked for by name."""

from __future__ import annotations


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
