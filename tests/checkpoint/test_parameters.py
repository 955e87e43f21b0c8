"""Parameters move between number types without a loss that can be avoided."""

from __future__ import annotations


def test_a_float32_run_takes_the_float32_copies_of_a_bf16_run(two_ranks):
    assert [facts["bf16 to float32"] for facts in two_ranks] == [[], []]
