"""What the tests with engines see, as the table of docs/moving-weights.md: RECORD_SERVED=docs/results/serving.json make
test-engines writes it anew, and python -m tools.documents docs/moving-weights.md the page."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3", "Bloom")


class Rows:
    """A cell for each method, form and family."""

    def __init__(self) -> None:
        self.cells: dict[tuple[str, str, str], dict[str, str]] = {}

    def add(self, engine: str, method: str, form: str, family: str, cell: str) -> None:
        self.cells.setdefault((engine, form, method), {})[family] = cell

    def table(self) -> dict[str, object]:
        columns = ["engine", "served as", "method", *FAMILIES]
        rows = [[*about, *(cells.get(family, "") for family in FAMILIES)] for about, cells in self.cells.items()]
        title = "Modules bound, and the largest difference of log-probabilities (in nats) from the run's own"
        return {"title": title, "columns": columns, "text_columns": len(columns), "rows": rows}


@pytest.fixture(scope="session")
def served_rows() -> Iterator[Rows]:
    """Written to the file that RECORD_SERVED names."""
    rows = Rows()
    yield rows
    if path := os.environ.get("RECORD_SERVED"):
        Path(path).write_text(json.dumps(rows.table(), indent=1) + "\n")
