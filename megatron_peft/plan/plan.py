"""The plan of a run: what each rank holds and sends, whether all ranks' calls fit together, and what a step takes.

As tables and answers for the terminal, as JSON, and as one picture.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from megatron_peft.config import RunConfig
from megatron_peft.models.shape import ModelShape
from megatron_peft.plan.cluster import Cluster
from megatron_peft.plan.timing import PlannedSpeed, step_time, time_table
from megatron_peft.rehearsal.program import PHASES, Call, Entry, RankRecord
from megatron_peft.rehearsal.rehearsal import RehearsedRun, order_problem, rehearse_run
from megatron_peft.runtime.progress import progress_bar

_GIB, _MIB = 2**30, 2**20
ACTIVATIONS = "activations of "
PARTS = ("weights", "gradients", "optimizer", "activations", "buffers", "temporary")
COLORS = {"forward": "tab:blue", "backward": "tab:orange", "finish": "tab:green", "update": "tab:red"}


@dataclass(frozen=True)
class Plan:
    """What is known of a run before it starts."""

    run: RehearsedRun
    cluster: Cluster
    problem: str | None  # why its ranks would wait for ever
    speed: PlannedSpeed | None  # None where they would

    @property
    def fullest(self) -> RankRecord:
        """The rehearsed rank with the highest peak of all phases."""
        return max(self.run.records, key=lambda record: record.highest_peak)

    @property
    def fits(self) -> bool:
        """Whether every rank's peak leaves free what the cluster's file reserves for what no rehearsal sees."""
        return self.fullest.highest_peak <= self.cluster.usable_bytes

    def as_dict(self, num_tokens: float = 1e8) -> dict[str, Any]:
        """Plain values for JSON, with the hours of a run of so many tokens."""
        return {
            "cluster": self.cluster.name,
            "world_size": self.run.config.parallel.world_size,
            "parameters": self.run.parameters(),
            "ranks": [
                {
                    "rank": record.rank,
                    "stage": record.stage,
                    "parameters": dict(record.parameters),
                    "peak_bytes": {phase: dict(parts) for phase, parts in record.peaks.items()},
                }
                for record in self.run.records
            ],
            "peak_bytes": self.fullest.highest_peak,
            "usable_bytes": self.cluster.usable_bytes,
            "fits": self.fits,
            "calls_of_a_step": [
                {"stage": stage, "group": axis, "operation": operation, "calls": number, "bytes": num_bytes}
                for stage, program in enumerate(self.run.stages)
                for (axis, operation), (number, num_bytes) in calls_by_group(program.entries).items()
            ],
            "order": self.problem or "every rank's calls fit together",
            **({} if self.speed is None else self.speed.as_dict(num_tokens)),
        }


def make_plan(config: RunConfig, shape: ModelShape, cluster: Cluster) -> Plan:
    """Rehearse a run, match the calls of its ranks, and estimate its time. A bar at a terminal shows the rehearsals."""
    with progress_bar("Rehearsing") as watch:
        run = rehearse_run(config, shape, watch=watch)
        problem = order_problem(run, watch=watch)
    if problem is not None:
        return Plan(run, cluster, problem, None)
    time = step_time({stage.rank: stage.entries for stage in run.stages}, cluster.of_run(config), keep_spans=True)
    return Plan(run, cluster, None, PlannedSpeed.of(config, shape, cluster, time))


def calls_by_group(entries: Iterable[Entry]) -> dict[tuple[str, str], tuple[int, int]]:
    """(group, operation) -> (number of calls, bytes that the rank puts in)."""
    sizes: dict[tuple[str, str], list[int]] = defaultdict(list)  # bytes of each call
    for call in entries:
        if isinstance(call, Call) and call.operation != "recv":
            sizes[call.axis, call.operation].append(call.num_bytes)
    return {key: (len(each), sum(each)) for key, each in sorted(sizes.items())}


def summary(plan: Plan) -> list[str]:
    """The plan's answers, a line each."""
    numbers, peak = plan.run.parameters(), plan.fullest.highest_peak
    usable, reserved = plan.cluster.usable_bytes / _GIB, plan.cluster.reserved_gib
    total = sum(numbers.values())
    fits = "fits" if plan.fits else "DOES NOT FIT"
    order = "every call of every rank finds its partners"
    if plan.problem is not None:
        order = f"ranks would wait for ever. {plan.problem}"
    return [
        f"trainable parameters: {numbers['trained']:,} of {total:,} ({100 * numbers['trained'] / total:.3f}%)",
        f"memory: {peak / _GIB:.2f} GiB at most (rank {plan.fullest.rank}): {fits} {usable:.1f} GiB, a GPU's "
        f"{plan.cluster.memory_gib:g} less {reserved:g} for what a rehearsal does not see (reserved memory, NCCL, "
        f"workspaces)",
        f"order of communication: {order}",
    ]


def why_not_to_start(plan: Plan) -> str | None:
    """One sentence; None: nothing speaks against it."""
    if plan.problem is not None:
        return f"ranks would wait for ever. {plan.problem}"
    if plan.fits:
        return None
    peak, usable = plan.fullest.highest_peak / _GIB, plan.cluster.usable_bytes / _GIB
    return (
        f"the run does not fit GPUs of {plan.cluster.name}: rank {plan.fullest.rank} holds {peak:.2f} GiB at its peak, "
        f"and {usable:.2f} can be used. `megatron-peft plan --fit` finds layouts that fit; --cluster plans for others."
    )


def _gib_of(part: str, record: RankRecord) -> float:
    """A part of the peak of a rank's step, all activations being one."""
    return sum(size for name, size in record.peaks["step"].items() if name.split(" of ")[0] == part) / _GIB


def _stands_for(run: RehearsedRun) -> Iterator[str]:
    """Sentences on the ranks that were not rehearsed, since they hold the same as others."""
    for rank in (record.rank for record in run.records if run.grid.place(record.rank)[0] > 0):
        yield f"Rank {rank} represents all tensor-parallel ranks but the first."
    if run.grid.data > 1:
        yield "Each rank stands for its data-parallel replicas."


def _tables(plan: Plan) -> Iterator[Table]:
    # The peak of each rehearsed rank's step, by part; and of its other phases.
    records, fullest = plan.run.records, plan.fullest
    ranks = (Column(f"rank {record.rank}\nstage {record.stage}", justify="right") for record in records)
    memory = Table("", *ranks, title="Memory, GiB", caption=" ".join(_stands_for(plan.run)) or None)
    for part in PARTS:
        memory.add_row(part, *(f"{_gib_of(part, record):.2f}" for record in records))
    memory.add_section()
    for phase in PHASES:
        if phase in fullest.peaks:
            memory.add_row(f"peak, {phase}", *(f"{record.peak(phase) / _GIB:.2f}" for record in records))
    yield memory

    title = f"Activations of rank {fullest.rank} at the peak, MiB"
    activations = Table("", Column(justify="right"), title=title, show_header=False)
    for part, num_bytes in sorted(fullest.peaks["step"].items(), key=lambda item: -item[1]):
        if part.startswith(ACTIVATIONS):
            activations.add_row(part.removeprefix(ACTIVATIONS), f"{num_bytes / _MIB:,.1f}")
    yield activations

    # Of the first and the last stage.
    numbers = Column("calls", justify="right"), Column("MiB put in", justify="right")
    calls = Table("stage", "group", "operation", *numbers, title="Calls of a step")
    for stage in dict.fromkeys((0, len(plan.run.stages) - 1)):
        for (axis, operation), (number, num_bytes) in calls_by_group(plan.run.stages[stage].entries).items():
            calls.add_row(str(stage), axis, operation, f"{number:,}", f"{num_bytes / _MIB:,.1f}")
        calls.add_section()
    yield calls


def print_plan(plan: Plan, num_tokens: float | None = None) -> None:
    """All tables and answers, for the terminal; with the hours of a run of so many tokens."""
    speeds = [] if plan.speed is None else [plan.speed]
    console = Console()
    for table in (*_tables(plan), *(time_table(speed, num_tokens) for speed in speeds)):
        console.print(table)
    lines = [*(speed.summary() for speed in speeds), *summary(plan), *ways_to_fit(plan), *capacity(plan, num_tokens)]
    print(f"cluster: {plan.cluster.name}", *lines, sep="\n")


def ways_to_fit(plan: Plan) -> Iterator[str]:
    """Yield a line with the flags that need less memory and are not given yet, if the run does not fit."""
    if plan.fits:
        return
    config, transformer = plan.run.config, plan.run.config.model.transformer
    flags = {
        "--bf16": not config.model.bf16,
        "--base-precision nf4": config.peft.trains_adapters and config.model.base_precision == "run",
        "--use-distributed-optimizer": config.parallel.data_parallel_size > 1
        and config.optimizer.optimizer == "adam"
        and not config.optimizer.use_distributed_optimizer,
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1": (
            transformer.get("recompute_granularity") != "full"
        ),
        "a smaller --micro-batch-size": config.training.micro_batch_size > 1,
    }
    smaller = [name for name, is_applicable in flags.items() if is_applicable]
    listed = f"; these reduce memory: {', '.join(smaller)}" if smaller else ""
    yield f"to fit: --fit finds the layouts and numbers of GPUs that hold it{listed}"


def capacity(plan: Plan, num_tokens: float | None) -> Iterator[str]:
    """A sentence where an adapter is trained on more tokens than it has parameters. Args: num_tokens: None: unknown."""
    trained, peft = plan.run.parameters()["trained"], plan.run.config.peft
    if peft.trains_adapters and num_tokens is not None and num_tokens > trained:
        larger = "a higher rank" if "lora_rank" in peft.spec.fields(peft) else "an adapter with more parameters"
        yield (
            f"tokens: up to {num_tokens:,.0f}, {num_tokens / trained:.1f} a trained parameter. With more than about "
            f"one that has a loss, adapters fall behind full fine-tuning; {larger} holds more"
        )


def draw(plan: Plan, path: Path) -> None:
    """Write the picture: memory of the rehearsed ranks by part, and the pipeline's timeline."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8), layout="constrained")
    memory, timeline = figure.subplots(2, 1)
    names = [f"rank {record.rank}\nstage {record.stage}" for record in plan.run.records]
    below = [0.0] * len(names)
    for part in PARTS:
        heights = [_gib_of(part, record) for record in plan.run.records]
        memory.bar(names, heights, bottom=below, label=part)
        below = [low + height for low, height in zip(below, heights, strict=True)]
    memory.axhline(plan.cluster.usable_bytes / _GIB, color="black", linestyle="--", label="usable")
    memory.set(title="Memory", ylabel="GiB at the peak of a step")
    memory.legend(fontsize="small", ncols=4)

    spans = {} if plan.speed is None else plan.speed.time.spans
    for row, rank in enumerate(sorted(spans)):
        for phase, color in COLORS.items():
            drawn = [(span.start, span.end - span.start) for span in spans[rank] if span.phase == phase]
            timeline.broken_barh(drawn, (row - 0.4, 0.8), facecolors=color, label=phase if row == 0 else None)
    timeline.set_yticks(range(len(spans)), [f"stage {number}" for number in range(len(spans))])
    timeline.invert_yaxis()
    timeline.set(title="Pipeline (estimated)", xlabel="seconds")
    timeline.legend(fontsize="small")
    figure.savefig(path)
