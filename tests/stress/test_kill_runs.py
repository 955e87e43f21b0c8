"""Ten kills of a real run; `kill_runs.py` by hand does many."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.time_limits import seconds

SCRIPT = Path(__file__).with_name("kill_runs.py")


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_loses_nothing():
    command = [sys.executable, SCRIPT, "--kills", "10", "--iterations", "20", "--layout", "dp2", "--async-save"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds(500))
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    tally = json.loads(done.stdout.splitlines()[-1])
    assert tally["kills"] == 10 and tally["rounds"] > 0
    assert all(tally[name] > 0 for name in ("inside_a_save", "restarts", "checkpoints_verified", "tensors_equal"))
