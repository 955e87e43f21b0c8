"""The optimizer's state knows no layout: another one reads it, and writes the very same again."""

from __future__ import annotations

import pytest

from tests.checkpoint.rank_checks import RESHARDED


@pytest.mark.parametrize("name", RESHARDED)
def test_another_layout_makes_the_same_checkpoint(two_ranks, name):
    assert [facts["resharded"][name] for facts in two_ranks] == [[], []]
