"""The tests that docs/moving-weights.md names exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "moving-weights.md").read_text()


def test_every_named_test_exists_and_every_number_of_the_matrix_is_in_the_list():
    named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", PAGE)
    assert len(named) >= 14
    assert [f"{file}::{name}" for file, name in named if f"def {name}(" not in (ROOT / file).read_text()] == []
    used = {int(number) for cell in re.findall(r"\[([\d, ]+)\]", PAGE) for number in cell.split(",")}
    assert used == {int(number) for number in re.findall(r"^(\d+)\. `tests/", PAGE, re.M)}
