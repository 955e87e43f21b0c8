"""Every limit of time in the tests, so that a slow or busy machine can be given more by one variable."""

from __future__ import annotations

import os


def seconds(limit: float) -> float:
    """`limit` on the machine that the suite was timed on, times MEGATRON_PEFT_TEST_TIME_FACTOR."""
    return limit * float(os.environ.get("MEGATRON_PEFT_TEST_TIME_FACTOR", "1"))
