"""Limits of time in tests. They are those of an idle machine; MEGATRON_PEFT_TEST_TIME_FACTOR lengthens them all."""

import os
import time
from collections.abc import Callable


def seconds(limit: float) -> float:
    """`limit`, longer on a machine that is said to be slow or loaded."""
    return limit * float(os.environ.get("MEGATRON_PEFT_TEST_TIME_FACTOR", "1"))


def wait_until(condition: Callable[[], object], what: str, limit: float = 60) -> None:
    """Returns as soon as `condition()` is true; fails, naming `what`, where it still is not after `limit` seconds."""
    end = time.monotonic() + seconds(limit)
    while not condition():
        assert time.monotonic() < end, f"{what} did not happen within {seconds(limit):g} seconds"
        time.sleep(0.02)
