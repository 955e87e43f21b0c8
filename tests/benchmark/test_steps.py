"""Steps are really run and timed; the one that a figure names first stands above the line."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from megatron_peft.benchmark import steps
from megatron_peft.benchmark.figures import Figure
from megatron_peft.benchmark.subjects import Setting


@pytest.mark.parametrize("figures", [steps.rotation_figures, steps.hybrid_full_figures])
def test_a_figure_is_the_quotient_of_the_two_that_it_names(
    figures: Callable[[Setting, int], list[Figure]], even: Setting
) -> None:
    for figure in figures(even, 1):
        amounts = [float(text) for text in re.findall(r"([\d.]+) (?:CPU s|MiB)", figure.note)[:2]]
        assert amounts[0] > 0 and figure.measured == pytest.approx(amounts[0] / amounts[1], rel=0.2)
        if "step" in figure.name:
            above, below = re.findall(r"(\w+) step", figure.name)
            assert [above, below] == re.findall(r"(\w+) [\d.]+ CPU s", figure.note)
