"""shellcheck and hadolint on what is not Python. Both are wheels of the lint extra; without them the tests skip."""

import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHELL_FILES = [*(ROOT / "examples").glob("*.sh"), *(ROOT / "examples").glob("*.sbatch"), ROOT / ".ci" / "run"]
SHELL_FILES += [ROOT / "tools" / name for name in ("image.sh", "lock.sh")]
SHELL_FILES += [Path(__file__).parent / "stand_ins" / name for name in ("scancel", "scontrol", "srun")]


def program(name: str) -> str:
    found = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed (make lint)")
    return found


@pytest.mark.parametrize("path", SHELL_FILES, ids=lambda path: path.name)
def test_shellcheck_is_clean(path: Path) -> None:
    result = subprocess.run(
        [program("shellcheck"), "--external-sources", str(path)], capture_output=True, text=True, cwd=ROOT
    )
    assert result.returncode == 0, result.stdout


def test_hadolint_is_clean() -> None:
    result = subprocess.run([program("hadolint"), str(ROOT / "Dockerfile")], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
