"""The Hybrid's lambda: a heat map of layer by step for each kind of linear layer.

lambda is the share of the low-rank part, 1 - lambda that of the rotation.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure, SubFigure

from megatron_peft.reporting.drawing import new_figure

LAYER = re.compile(r"decoder\.layers\.(\d+)\.(?:.*\.)?(\w+)$")
ByLayer = Mapping[str, Sequence[float | None]]
LABEL = "λ: low-rank 1, rotation 0"


def read_lines(records: Sequence[Mapping[str, Any]]) -> tuple[list[int], dict[str, list[float | None]]]:
    """(iterations, values by layer) of the lines of lambda.jsonl."""
    layers = records[-1]["lambda"] if records else {}
    return (
        [record["iteration"] for record in records],
        {layer: [record["lambda"].get(layer) for record in records] for layer in layers},
    )


def maps(by_layer: ByLayer) -> dict[str, np.ndarray]:
    """Kind of linear layer, as linear_qkv -> [layers, iterations]; layers that are not adapted are NaN."""
    kinds: dict[str, dict[int, Sequence[float | None]]] = {}
    for name, values in by_layer.items():
        found = LAYER.search(name)
        if found:
            kinds.setdefault(found[2], {})[int(found[1])] = values
    return {kind: _as_array(layers) for kind, layers in kinds.items()}


def _as_array(layers: Mapping[int, Sequence[float | None]]) -> np.ndarray:
    length = len(next(iter(layers.values())))
    array = np.full((max(layers) + 1, length), np.nan)
    for layer, values in layers.items():
        array[layer] = [np.nan if value is None else value for value in values]
    return array


def mean_by_layer(runs: Sequence[ByLayer]) -> dict[str, list[float | None]]:
    """Of runs with the same layers; cut to the shortest."""
    length = min(len(values) for run in runs for values in run.values())
    return {
        layer: np.mean([np.array(run[layer][:length], dtype=float) for run in runs], axis=0).tolist()
        for layer in runs[0]
    }


def draw(title: str, iterations: Sequence[int], by_layer: ByLayer) -> Figure:
    """A figure of its own."""
    figure = new_figure(13, 4.2, title)
    draw_into(figure, iterations, by_layer)
    return figure


def draw_into(figure: Figure | SubFigure, iterations: Sequence[int], by_layer: ByLayer) -> None:
    """A panel for each kind of layer, side by side, with one scale from 0 to 1."""
    found = maps(by_layer)
    if not found:
        return
    panels = np.atleast_1d(figure.subplots(1, len(found), sharey=True))
    first, last = iterations[0], iterations[min(len(iterations), next(iter(found.values())).shape[1]) - 1]
    half = (last - first) / max(len(iterations) - 1, 1) / 2 or 0.5
    image = None
    for axes, (kind, values) in zip(panels, found.items(), strict=True):
        extent = (first - half, last + half, -0.5, len(values) - 0.5)
        look = {"aspect": "auto", "origin": "lower", "interpolation": "nearest", "cmap": "PuOr"}
        image = axes.imshow(values, vmin=0, vmax=1, extent=extent, **look)
        axes.set_title(kind, loc="left", fontsize=11)
        axes.set_xlabel("iteration")
    panels[0].set_ylabel("layer")
    assert image is not None
    figure.colorbar(image, ax=list(panels), label=LABEL, fraction=0.02)
