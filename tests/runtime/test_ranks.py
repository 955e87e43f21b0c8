"""Ranks answer, and when they do not, their words are told. The functions that they run are the standard library's."""

from __future__ import annotations

import math
import os
import time

import pytest

from tests.ranks import RanksFailed, run_ranks
from tests.time_limits import seconds


def test_results_come_by_rank() -> None:
    assert run_ranks(2, os.getenv, "RANK") == ["0", "1"]


def test_what_a_failing_rank_printed_is_in_the_error() -> None:
    with pytest.raises(RanksFailed, match="--- rank 0(.|\n)*math domain error"):
        run_ranks(1, math.sqrt, -1.0)


def test_ranks_that_take_too_long_are_stopped() -> None:
    start = time.monotonic()
    with pytest.raises(RanksFailed, match="rank 0"):
        run_ranks(1, time.sleep, 600, limit=0.2)
    assert time.monotonic() - start < seconds(60)
