"""The runner tells a test that sees a break from one that merely fails, and each break of the list can be made."""

import shutil
import subprocess
import sys
from pathlib import Path

from tests.mutations import run

TESTS = """
import os
import pytest
from megatron_peft.sums import add

@pytest.fixture
def three():
    return add(1, 2) or 1 / 0

def test_sum(): assert add(1, 2) == 3
def test_fixture(three): assert three == 3
def test_anything(): assert add(0, 0) == 0
def test_refusal():
    with pytest.raises(ValueError): add(1, None)
def test_crash(): add(1, 2) == 3 or os._exit(0)
"""
SUMS = "def add(a, b):\n    if b is None: raise ValueError\n    return a + b\n"
BREAKS = [  # (old, new, test, what the runner says)
    ("a + b", "a - b", "test_sum", "caught"),
    ("raise ValueError", "return 0", "test_refusal", "caught"),
    ("a + b", "a - b", "test_anything", "SURVIVED the test passes"),
    ("a + b", "0", "test_fixture", "SURVIVED failed otherwise: [['setup', 'ZeroDivisionError'"),
    ("a + b", "a + b +", "test_sum", "SURVIVED no answer in"),  # a syntax error
    ("a + b", "a.b", "test_sum", "SURVIVED failed otherwise: [['call', 'AttributeError'"),
    ("a + b", "a - b", "test_crash", "SURVIVED no answer in"),
    ("a * b", "a - b", "test_sum", "`old` stands 0 times"),
    ("a", "b", "test_sum", "`old` stands 5 times"),
]


def test_only_a_test_that_says_what_is_wrong_counts(tmp_path: Path) -> None:
    (tmp_path / "megatron_peft").mkdir()
    (tmp_path / "megatron_peft" / "__init__.py").touch()
    (tmp_path / "megatron_peft" / "sums.py").write_text(SUMS)
    place = tmp_path / "tests" / "mutations"
    place.mkdir(parents=True)
    (tmp_path / "tests" / "test_sums.py").write_text(TESTS)
    shutil.copy(run.__file__, place)
    entries = [
        f"[[mutation]]\nwhat = 'break {index}'\nfile = 'megatron_peft/sums.py'\nold = '{old}'\nnew = '{new}'\n"
        f"test = 'tests/test_sums.py::{test}'\n"
        for index, (old, new, test, _) in enumerate(BREAKS)
    ]
    (place / "mutations.toml").write_text("".join(entries))
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    script = "import sys, run; run.LIBRARIES = (); sys.exit(run.main())"
    done = subprocess.run([sys.executable, "-c", script], cwd=place, capture_output=True, text=True)
    assert done.returncode == 1 and f"2 of {len(BREAKS)} caught" in done.stdout, done.stdout + done.stderr
    for index, (*_, said) in enumerate(BREAKS):
        (line,) = [line for line in done.stdout.splitlines() if f"break {index}" in line]
        assert all(word in line for word in said.split(" ")), line


def test_every_break_of_the_list_can_be_made() -> None:
    """Its text stands once, and the test that it names is there."""
    for mutation in run.read_list():
        assert not run.text_problem(mutation)
        file, _, test = mutation.test.partition("::")
        name = test.split("[")[0]
        assert f"def {name}(" in (run.ROOT / file).read_text(), mutation.test
