"""A run, a prepared task and an experiment of an older version are still read (`make golden` reads them too)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.golden.tree import Tree
from tests.golden.written import CHECKS, check


@pytest.fixture(scope="module")
def tree() -> Iterator[Tree]:
    with Tree(Path(__file__).parents[2]) as tree:
        yield tree


@pytest.mark.parametrize("name", CHECKS)
def test_what_b03219c_wrote_is_read(tree: Tree, tmp_path: Path, name: str) -> None:
    check(name, tree, tmp_path / "files")
