"""A failure on any rank ends all of them, soon, with one exit code and one message."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

import pytest

from megatron_peft.runtime.failure import FAREWELL_SECONDS
from tests.ranks import Ranks
from tests.runtime import failure_runs
from tests.time_limits import seconds

SIZES = {
    "configuration on one": 3,
    "configuration on all": 2,
    "error on one": 2,
    "error on the first": 2,
    "no error": 2,
}
FAILING = [case for case in SIZES if case != "no error"]


@dataclass(frozen=True)
class Outcome:
    exit_codes: list[int | None]
    output: str
    ended_at: float


@pytest.fixture(scope="module")
def outcomes():
    return {case: _run(case, size) for case, size in SIZES.items()}


def _run(case: str, size: int) -> Outcome:
    with Ranks(size, failure_runs.main, case) as ranks:
        for process in ranks.processes:  # none is ended from outside
            process.join(seconds(120))
        return Outcome(ranks.exit_codes, "".join(map(ranks.output, range(size))), time.time())


@pytest.mark.parametrize("case", ["configuration on one", "configuration on all"])
def test_a_configuration_error_is_said_once_without_a_traceback(outcomes, case):
    found = outcomes[case]
    assert found.exit_codes == [2] * SIZES[case], found.output
    assert found.output.count("program: error: --lr is wrong.") == 1
    assert "Traceback" not in found.output


@pytest.mark.parametrize("case", ["error on one", "error on the first"])
def test_any_other_error_is_said_once_with_its_rank(outcomes, case):
    found = outcomes[case]
    assert found.exit_codes == [1] * SIZES[case], found.output
    assert found.output.count("RuntimeError: lost") == 1
    failed = 0 if case == "error on the first" else SIZES[case] - 1
    assert f"program: rank {failed} failed:" in found.output


@pytest.mark.parametrize("case", FAILING)
def test_nobody_waits_for_a_timeout(outcomes, case):
    raised_at = [float(text) for text in re.findall(r"raised at ([\d.]+)", outcomes[case].output)]
    assert outcomes[case].ended_at - max(raised_at) < seconds(FAREWELL_SECONDS)


def test_without_a_failure_nothing_is_said(outcomes):
    assert outcomes["no error"].exit_codes == [0, 0]
    assert outcomes["no error"].output == "ended well\n" * 2
