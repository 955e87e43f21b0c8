from __future__ import annotations

import numpy as np
import pytest

from megatron_peft.reporting.lambda_plot import draw, maps, mean_by_layer, read_lines

QKV = "decoder.layers.{}.self_attention.linear_qkv"
FC1 = "decoder.layers.{}.mlp.linear_fc1"


def test_map_is_layer_by_step_for_each_kind() -> None:
    found = maps({QKV.format(0): [0.1, 0.2], QKV.format(1): [0.3, 0.4], FC1.format(1): [0.5, None]})
    assert found["linear_qkv"].tolist() == [[0.1, 0.2], [0.3, 0.4]]
    assert np.isnan(found["linear_fc1"]).tolist() == [[True, True], [False, True]]


def test_lines_of_the_file_become_curves() -> None:
    lines = [{"iteration": 5, "lambda": {QKV.format(0): 0.5}}, {"iteration": 10, "lambda": {QKV.format(0): 0.4}}]
    assert read_lines(lines) == ([5, 10], {QKV.format(0): [0.5, 0.4]})
    assert read_lines([]) == ([], {})


def test_mean_is_over_runs() -> None:
    found = mean_by_layer([{"a": [0.2, 0.4, 0.9]}, {"a": [0.4, 0.8]}])
    assert found == {"a": pytest.approx([0.3, 0.6])}


def test_panels_share_one_scale_and_cover_the_run() -> None:
    figure = draw("Hybrid", [10, 20, 30], {QKV.format(3): [0.1, 0.2, 0.3], FC1.format(0): [0.5] * 3})
    *panels, _ = figure.axes
    assert [axes.get_title(loc="left") for axes in panels] == ["linear_qkv", "linear_fc1"]
    assert [axes.images[0].get_clim() for axes in panels] == [(0, 1), (0, 1)]
    assert panels[0].get_xlim() == (5, 35) and panels[0].images[0].get_extent()[2:] == [-0.5, 3.5]


@pytest.mark.parametrize("by_layer", [{}, {"embedding": [0.5]}])
def test_nothing_to_draw_is_an_empty_figure(by_layer: dict[str, list[float]]) -> None:
    assert draw("Hybrid", [1], by_layer).axes == []


def test_a_single_step_is_drawn() -> None:
    assert draw("Hybrid", [7], {QKV.format(0): [0.5]}).axes[0].get_xlim() == (6.5, 7.5)
