"""The best rates of LoRA-GA and of LoRA, from the records of tools/widths.py."""

import json
from math import isnan, log
from pathlib import Path

import pytest

from tools.widths import best_rate, table, wanted

RECORDS = Path(__file__).parents[2] / "docs" / "results" / "widths"


def test_the_best_rate_is_the_vertex_of_the_parabola():
    losses = {rate: 2 + (log(rate) - log(0.004)) ** 2 for rate in (0.001, 0.002, 0.005, 0.01)}
    assert best_rate(losses) == pytest.approx(0.004)
    assert isnan(best_rate({rate: -loss for rate, loss in losses.items()})), "no rate is the best of a hill"


def test_with_the_aligned_start_lora_ga_has_loras_rate_at_four_widths():
    losses = json.loads((RECORDS / "losses.json").read_text())
    found = table(losses)
    assert found == json.loads((RECORDS / "rates.json").read_text()) and len(losses) == len([*wanted()]) == 120
    assert [row[0] for row in found["rows"]] == ["64", "128", "256", "512"]
    for width, of_lora, of_lora_ga, *_ in found["rows"]:
        assert 1 / 1.5 < float(of_lora_ga) / float(of_lora) < 1.5, width
