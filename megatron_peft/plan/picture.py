"""One picture of a plan: memory of the rehearsed ranks by part, and the pipeline's timeline."""

from pathlib import Path
from typing import Any

from megatron_peft.plan.plan import Plan, joined_activations

_GIB = 2**30
_PARTS = ("weights", "buffers", "optimizer", "gradients", "activations", "temporary")
_COLORS = {"forward": "tab:blue", "backward": "tab:orange", "finish": "tab:green", "update": "tab:red"}


def draw(plan: Plan, path: Path) -> None:
    """Write the picture; the ending of `path` says in which format."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (memory, timeline) = pyplot.subplots(2, 1, figsize=(11, 8), layout="constrained")
    _memory(plan, memory)
    _timeline(plan, timeline)
    figure.savefig(path)
    pyplot.close(figure)


def _memory(plan: Plan, axes: Any) -> None:
    records = plan.run.records
    peaks = [joined_activations(record.peaks["step"]) for record in records]
    names = [f"rank {record.rank}\nstage {record.stage}" for record in records]
    below = [0.0] * len(records)
    for part in _PARTS:
        heights = [peak.get(part, 0) / _GIB for peak in peaks]
        axes.bar(names, heights, bottom=below, label=part)
        below = [low + height for low, height in zip(below, heights, strict=True)]
    axes.axhline(plan.cluster.usable_bytes / _GIB, color="black", linestyle="--", label="usable")
    axes.set_ylabel("GiB at the peak of a step")
    axes.set_title("Memory")
    axes.legend(fontsize="small", ncols=4)


def _timeline(plan: Plan, axes: Any) -> None:
    spans = {} if plan.pace is None else plan.pace.time.spans
    for row, rank in enumerate(sorted(spans)):
        for phase, color in _COLORS.items():
            drawn = [(one.start, one.end - one.start) for one in spans[rank] if one.phase == phase]
            axes.broken_barh(drawn, (row - 0.4, 0.8), facecolors=color, label=phase if row == 0 else None)
    axes.set_yticks(range(len(spans)), [f"stage {number}" for number in range(len(spans))])
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    axes.set_title("Pipeline (estimated)")
    axes.legend(fontsize="small")
