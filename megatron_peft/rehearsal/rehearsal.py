"""A rank's loading, start, training step and validation, run by the training code itself on tensors without numbers.

Each rank runs in a process of its own, on torch's fake process group (`runtime/fake_ranks.py`). What it computes,
sends and holds is in its `RankRecord`. It reads the model's shape, no weights and no data: every microbatch is as long
as --seq-length allows.
"""

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import starmap
from multiprocessing.connection import wait
from threading import Thread
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from megatron_peft.config import ConfigurationError, RunConfig
from megatron_peft.models.shape import ModelShape
from megatron_peft.rehearsal import schedule
from megatron_peft.rehearsal.deadlock import check_order
from megatron_peft.rehearsal.program import Entry, RankRecord, RecordedLayers
from megatron_peft.rehearsal.rehearsed_rank import recorded_layers, rehearse_rank
from megatron_peft.rehearsal.requests import LayersToRecord, Lengths, RankToRehearse, alike_stages
from megatron_peft.rehearsal.schedule import RankGrid, StageProgram
from megatron_peft.rehearsal.small_run import kept_stages, make_small
from megatron_peft.runtime.ranks import Ranks, preload

Watch = Callable[[int, int], None]  # is told how much of the work is done now, and how much more there is to do
MOST_REPLICAS, MOST_RANKS = 8, 64  # whose calls are compared in `order_problem`


@contextmanager
def work_bar(title: str) -> Iterator[Watch]:
    """A bar at a terminal, of work whose amount turns out on the way."""
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=None)

        def watch(done: int, more: int) -> None:
            if more:
                bar.update(task, total=(bar.tasks[0].total or 0) + more)
            bar.advance(task, done)

        yield watch


def rehearse(ranks: Sequence[RankToRehearse], watch: Watch = lambda done, more: None) -> list[RankRecord]:
    """The record of each rank. `watch` counts ranks."""
    return _in_processes(rehearse_rank, [(rank,) for rank in ranks], watch)


def record_layers(
    asked: Sequence[LayersToRecord],
    watch: Watch = lambda done, more: None,
    known: dict[str, RecordedLayers] | None = None,
) -> list[RecordedLayers]:
    """The segments of each model, from as few layers as have all kinds of them. `watch` counts recordings.

    What is `known` already is not recorded again; this adds its own.
    """
    known = {} if known is None else known
    names = [repr(one) for one in asked]
    new = {name: (one,) for name, one in zip(names, asked, strict=True) if name not in known}
    known.update(zip(new, _in_processes(recorded_layers, [*new.values()], watch, take_several=True), strict=True))
    return [known[name] for name in names]


@dataclass(frozen=True)
class RehearsedRun:
    """A run of which some ranks were rehearsed."""

    config: RunConfig
    shape: ModelShape
    # Of every stage that holds something else, the rank with most microbatches in flight; the first, second, middle and
    # last stage; and a second tensor-parallel rank.
    records: tuple[RankRecord, ...]
    stages: tuple[StageProgram, ...]  # of every stage, with all of the run's microbatches
    alike: Sequence[int]  # of every stage, the rehearsed one that holds the same

    @property
    def grid(self) -> RankGrid:
        return RankGrid.of(self.config.parallel)

    def parameters(self) -> dict[str, int]:
        """Those of the whole model, "trained" and "frozen"; each global parameter counts once."""
        of_stage = {record.stage: record.parameters for record in self.records}
        return {
            kind: sum(of_stage[stage][f"{kind} of stage"] for stage in self.alike) for kind in ("trained", "frozen")
        }

    def programs(self) -> dict[int, Iterator[Entry]]:
        """The entries of every rank; of more than two replicas, of two, which stand for all."""
        return schedule.programs_of_ranks(self.stages, replace(self.grid, data=min(self.grid.data, 2)))


def rehearse_run(
    config: RunConfig, shape: ModelShape, peaks: bool = True, watch: Watch = lambda done, more: None
) -> RehearsedRun:
    """Rehearse the distinct ranks of a run's world, which need not exist. `watch` counts them.

    Without `peaks` of memory the records tell what ranks compute and call, in less time.
    """
    grid, alike = RankGrid.of(config.parallel), alike_stages(config, shape)
    stages = {*alike, 0, min(1, grid.pipeline - 1), grid.pipeline // 2, grid.pipeline - 1} if peaks else {*alike}
    places = [grid.rank(0, 0, stage) for stage in sorted(stages)]
    if peaks and grid.tensor > 1:
        places.append(grid.rank(1, 0, grid.pipeline - 1))
    [schedules] = _in_processes(schedule.schedules_of_stages, [(config, shape)], watch)
    records = rehearse([RankToRehearse.of(config, shape, rank, peaks) for rank in places], watch)
    of_rank = dict(zip(places, records, strict=True))
    like = [of_rank[grid.rank(0, 0, stage)] for stage in alike]
    programs = [
        schedule.program_of_stage(record, stage, entries, grid, config.num_microbatches)
        for stage, (record, entries) in enumerate(zip(like, schedules, strict=True))
    ]
    return RehearsedRun(config, shape, tuple(records), tuple(programs), alike)


def start_planned_peak(config: RunConfig, shape: ModelShape) -> Callable[[], int | str | None]:
    """Rehearse rank 0 beside a run. What is returned gives its peak of all phases in bytes; None until it is known.

    A rehearsal that fails gives its error's last line: the run does not depend on it.
    """
    found: list[int | str] = []

    def rehearse_it() -> None:
        try:
            [record] = rehearse([RankToRehearse.of(config, shape, 0)])
            found.append(record.highest_peak)
        except Exception as error:
            found.append((str(error).strip() or repr(error)).splitlines()[-1])

    Thread(target=rehearse_it, daemon=True).start()
    return lambda: found[0] if found else None


def order_problem(run: RehearsedRun, watch: Watch = lambda done, more: None) -> str | None:
    """The first problem of the calls of any rank; None: all end.

    Every rank of a small run (`make_small`) is rehearsed from the model to a checkpoint, and their programs are
    replayed: one rank may do something else than another if those that it does it with do so too. Then a step of the
    run itself is replayed, with all of its layers, stages and microbatches.
    """
    if run.grid.size == 1:
        return None
    stages = kept_stages(run.grid.pipeline)
    few = len(stages) if run.config.parallel.is_interleaved else 2
    config, shape = make_small(run.config, run.shape, run.grid.tensor, MOST_REPLICAS, few)
    config = replace(config, checkpoint=replace(config.checkpoint, save="never written"))
    grid, lengths = RankGrid.of(config.parallel), Lengths.longest(config)
    places = [grid.place(rank) for rank in range(grid.size)]
    numbers = {grid.rank(*place): run.grid.rank(*place[:2], stages[place[2]]) for place in places}
    if grid.size > MOST_RANKS:  # every tensor-parallel rank of a replica, and one of each replica
        places = [place for place in places if 0 in place[:2]]
    asked = [
        (RankToRehearse(config, shape, grid.rank(*place), config.num_microbatches, lengths, calls_alone=True),)
        for place in places
    ]
    records = dict(zip(places, _in_processes(rehearse_rank, asked, watch, take_several=True), strict=True))
    programs: dict[int, tuple[Entry, ...]] = {}
    for rank, number in numbers.items():
        tensor, data, stage = grid.place(rank)
        record = records.get((tensor, data, stage)) or records[tensor, 0, stage]
        recorded = StageProgram(grid, record.rank, record.entries)
        entries = record.entries if record.rank == rank else recorded.of_rank(rank)
        programs[number] = tuple(schedule.renumbered(entries, numbers))
    return check_order(programs, whole_runs=True) or check_order(run.programs())


def _in_processes(
    function: Callable[..., Any], asked: Sequence[tuple[Any, ...]], watch: Watch, take_several: bool = False
) -> list[Any]:
    """What a function gives for each of these arguments, in processes forked from one that has torch.

    At a time there are as many as this machine has cores, at most four. Each has one of its own, unless they
    `take_several`: what the first one costs most is found in torch's caches by those that follow.
    """
    num_processes = min(len(os.sched_getaffinity(0)), 4)
    num_parts = min(num_processes, len(asked)) if take_several else len(asked)
    preload([rehearse_rank.__module__])
    watch(0, len(asked))
    answers: list[Any] = [None] * len(asked)
    waiting = [slice(part, None, num_parts) for part in range(num_parts)]
    running: dict[Any, tuple[slice, Ranks]] = {}  # by what tells that a process has ended
    with ExitStack() as stack:  # none is left after an error and Ctrl-C
        while waiting or running:
            while waiting and len(running) < num_processes:
                part = waiting.pop(0)
                ranks = Ranks(1, _answer, (function, asked[part]))
                ranks.processes[0].daemon = True  # a run ends without its planned peak
                stack.enter_context(ranks)
                running[ranks.processes[0].sentinel] = part, ranks
            for ended in wait([*running]):
                part, ranks = running.pop(ended)
                if any(ranks.exit_codes):
                    raise RuntimeError(f"a rehearsed rank failed ({ranks.exit_codes[0]}):\n{ranks.output(0)}")
                answer = ranks.result(0)
                if isinstance(answer, Exception):
                    raise answer
                answers[part] = answer
                watch(len(answer), 0)
    return answers


def _answer(of: tuple[Callable[..., Any], Sequence[tuple[Any, ...]]]) -> Any:
    """The life of such a process."""
    function, asked = of
    gc.freeze()  # what the server has imported is no garbage, and to look for some would copy it
    try:
        return [*starmap(function, asked)]
    except ConfigurationError as error:
        return error
