"""The tables of what a step keeps for backward are those of the code as it is."""

from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from megatron_peft.config.untrusted import read_json_object
from tools.kept import DROPOUT, NOTHING, PLAIN, layer_kib, tables

pytestmark = pytest.mark.slow
RECORDS = Path(__file__).parents[2] / "docs" / "results" / "kept"


def in_another_process(function: Callable[..., Any], *calls: Any) -> list[Any]:
    """The process of a rehearsed rank is good for nothing else."""
    with get_context("spawn").Pool(1) as process:
        return process.starmap(function, calls)


def test_dropout_leaves_what_a_layer_keeps_as_it_is_and_autograd_keeps_its_mask_and_product():
    """The record says so too, and by how much."""
    asked = [("lora", NOTHING, 0.0), ("lora", NOTHING, DROPOUT), ("lora", PLAIN, DROPOUT)]
    without, dropped, plain = in_another_process(layer_kib, *asked)
    assert without == dropped < plain
    ways = read_json_object(RECORDS / "ways.json")
    [row] = (dict(zip(ways["columns"], one, strict=True)) for one in ways["rows"] if one[0] == "lora")
    assert [row[NOTHING], row[f"{NOTHING}, dropout {DROPOUT}"]] == [f"{without:.2f}"] * 2
    assert row[f"{PLAIN}, dropout {DROPOUT}"] == f"{plain:.2f}"


@pytest.mark.rehearsal
def test_records_are_what_the_tool_finds():
    [found] = in_another_process(tables, ())
    assert found == {path.stem: read_json_object(path) for path in RECORDS.glob("*.json")}
