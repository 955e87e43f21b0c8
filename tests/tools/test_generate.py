"""tools/generate.py as a command: help, and errors that end it with 2."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tools import generate

ROOT = Path(__file__).parents[2]
BASE = ["--pretrained-checkpoint", "nowhere"]


def test_help_comes_without_torch() -> None:
    program = (
        "import sys, tools.generate as g\ntry: g.main(['--help'])\nexcept SystemExit: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert "--num-samples N" in done.stdout and done.stdout.strip().endswith("False"), done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (BASE, "generate.py: error: give exactly one of --prompt TEXT and --prompt-file FILE."),
        (["--prompt", "a", "--top-p", "2", *BASE], "generate.py: error: --top-p is 2.0"),
        (["--prompt", "a", *BASE], "nowhere"),
        (["--prompt", "a", "--load", "nowhere"], "nowhere holds no checkpoint"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_loaded(
    capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        generate.main(flags)
    assert message in capsys.readouterr().err
