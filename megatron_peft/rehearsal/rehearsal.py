"""A rank's loading, start, training step and validation, run by the training code itself on tensors without numbers.

Each rank runs in a process of its own, on torch's fake process group (`runtime/fake_ranks.py`). What it computes,
sends and holds is in its `RankRecord`. It reads the model's shape, no weights and no data: every microbatch is as long
as --seq-length allows.
"""

import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from multiprocessing import get_context
from threading import Thread
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from megatron_peft.config import ConfigurationError, RunConfig
from megatron_peft.models.shape import ModelShape
from megatron_peft.rehearsal.asked import LayersToRecord, Lengths, RankToRehearse
from megatron_peft.rehearsal.deadlock import Problem, check_order, missing_wait
from megatron_peft.rehearsal.record import Entry, RankRecord, RecordedLayers
from megatron_peft.rehearsal.schedule import (
    RankGrid,
    RankProgram,
    StageProgram,
    program_of_stage,
    programs_of_ranks,
    renumbered,
)
from megatron_peft.runtime.ranks import NO_GPU, preload

if TYPE_CHECKING:
    from megatron_peft.rehearsal.stage_schedule import StageOutline

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


def rehearse(ranks: Sequence[RankToRehearse], num_processes: int | None = None) -> list[RankRecord]:
    """The record of each rank.

    Args:
        num_processes: at a time; default: the cores of this machine, at most four.
    """
    with _processes(num_processes, len(ranks)) as run:
        asked = [run(_rehearse_here, rank) for rank in ranks]
        return [one.result() for one in asked]


def record_layers(
    asked: Sequence[LayersToRecord], num_processes: int | None = None, watch: Watch = lambda done, more: None
) -> list[RecordedLayers]:
    """The segments of each model, from as few layers as have all kinds of them.

    Args:
        num_processes: as of `rehearse`.
        watch: counts recordings.
    """
    if not asked:
        return []
    number = min(num_processes or _num_processes(), len(asked))
    with _processes(number, number) as run:
        watch(0, len(asked))
        # What one costs most is found in torch's caches by those that follow in its process.
        parts = [asked[first::number] for first in range(number)]
        found: list[Any] = [run(_record_layers, part) for part in parts]
        for one, part in zip(found, parts, strict=True):
            one.add_done_callback(partial(lambda done, _: watch(done, 0), len(part)))
        recorded = [one.result() for one in found]
    return [recorded[index % number][index // number] for index in range(len(asked))]


@dataclass(frozen=True)
class RehearsedRun:
    """A run of which some ranks were rehearsed.

    Args:
        config, shape: of the run.
        records: of the rehearsed ranks. Of every stage that holds something else, the one with most microbatches in
            flight; the first, second, middle and last stage; and a second tensor-parallel rank.
        stages: the program of every stage, with all of the run's microbatches.
        alike: of every stage, the rehearsed one that holds the same.
    """

    config: RunConfig
    shape: ModelShape
    records: tuple[RankRecord, ...]
    stages: tuple[StageProgram, ...]
    alike: tuple[int, ...]

    @property
    def grid(self) -> RankGrid:
        """The places of its ranks."""
        return RankGrid.of(self.config.parallel)

    def parameters(self) -> dict[str, int]:
        """Of the whole model, "trained" and "frozen"; each global parameter counts once."""
        of_stage = {record.stage: record.parameters for record in self.records}
        return {
            kind: sum(of_stage[stage][f"{kind} of stage"] for stage in self.alike) for kind in ("trained", "frozen")
        }

    def programs(self) -> dict[int, RankProgram]:
        """The entries of every rank; of more than two replicas, of two, which stand for all."""
        return programs_of_ranks(self.stages, replace(self.grid, data=min(self.grid.data, 2)))


def rehearse_run(
    config: RunConfig,
    shape: ModelShape,
    num_processes: int | None = None,
    peaks: bool = True,
    watch: Watch = lambda done, more: None,
) -> RehearsedRun:
    """Rehearse the distinct ranks of a run's world, which need not exist.

    Args:
        peaks: of memory. Without them, the records tell what ranks compute and call, in less time.
        watch: counts processes, of which each rehearses a rank.
    """
    grid, num_microbatches = RankGrid.of(config.parallel), config.num_microbatches
    with _processes(num_processes, 4, watch) as run:
        outlines: list[StageOutline] = run(_outline_here, config, shape).result()
        contents = [outline.contents for outline in outlines]
        alike = {stage: contents.index(one) for stage, one in enumerate(contents)}  # the first of those like it
        places = [grid.rank(0, 0, stage) for stage in sorted(set(alike.values()))]
        if peaks:
            fullest = (0, min(1, grid.pipeline - 1), grid.pipeline // 2, grid.pipeline - 1)
            places = sorted({*places, *(grid.rank(0, 0, stage) for stage in fullest)})
            places += [grid.rank(1, 0, grid.pipeline - 1)] if grid.tensor > 1 else []
        asked = [RankToRehearse.of(config, shape, rank, peaks) for rank in places]
        records = dict(
            zip(places, [one.result() for one in [run(_rehearse_here, rank) for rank in asked]], strict=True)
        )
    programs = [
        program_of_stage(records[grid.rank(0, 0, alike[stage])], stage, outline.schedule, grid, num_microbatches)
        for stage, outline in enumerate(outlines)
    ]
    return RehearsedRun(config, shape, tuple(records.values()), tuple(programs), tuple(alike.values()))


def start_planned_peak(config: RunConfig, shape: ModelShape) -> Callable[[], int | str | None]:
    """Rehearse rank 0 beside a run. What is returned gives its peak of all phases in bytes; None until it is known.

    A rehearsal that fails gives its error's last line: the run does not depend on it.
    """
    asked = RankToRehearse.of(config, shape, 0)
    found: list[int | str] = []

    def rehearse_it() -> None:
        try:
            [record] = rehearse([asked])
            found.append(max(record.peak(phase) for phase in record.peaks))
        except Exception as error:
            found.append((str(error).strip() or repr(error)).splitlines()[-1])

    Thread(target=rehearse_it, daemon=True).start()
    return lambda: found[0] if found else None


def order_problem(
    run: RehearsedRun, num_processes: int | None = None, watch: Watch = lambda done, more: None
) -> Problem | None:
    """The first problem of the calls of any rank; None: all end.

    Every rank of a smaller run (`small_layout`) is rehearsed from the model to a checkpoint, and their programs are
    replayed: one rank may do something else than another if those that it does it with do so too. Then a step of the
    run itself is replayed, with all of its layers, stages and microbatches.
    """
    if run.grid.size == 1:
        return None
    num_processes = num_processes or _num_processes()
    with _processes(num_processes, num_processes, watch) as start:
        config, shape, stages = start(_small_here, run.config, run.shape).result()
        grid, many = RankGrid.of(config.parallel), RankGrid.of(run.config.parallel)
        places = [grid.place(rank) for rank in range(grid.size)]
        if grid.size > MOST_RANKS:  # every tensor-parallel rank of a replica, and one of each replica
            places = [place for place in places if 0 in place[:2]]
        lengths = (Lengths.longest(config),)
        asked = RankToRehearse(config, shape, 0, config.num_microbatches, lengths, calls_alone=True)
        # A process takes several ranks: most of what the first one costs is found in torch's caches by the others.
        parts = [places[first::num_processes] for first in range(num_processes)]
        found = [start(_record_calls, asked, [grid.rank(*place) for place in part]) for part in parts]
        records = {grid.place(record.rank): record for one in found for record in one.result()}
    numbers = {
        grid.rank(*place): many.rank(*place[:2], stages[place[2]]) for place in map(grid.place, range(grid.size))
    }
    programs: dict[int, tuple[Entry, ...]] = {}
    for rank, number in numbers.items():
        tensor, data, stage = grid.place(rank)
        record = records.get((tensor, data, stage)) or records[tensor, 0, stage]
        entries = (
            record.entries if record.rank == rank else StageProgram(grid, record.rank, record.entries).of_rank(rank)
        )
        programs[number] = tuple(renumbered(entries, numbers))
    return check_order(programs) or missing_wait(programs) or check_order(run.programs())


def _num_processes() -> int:
    return min(len(os.sched_getaffinity(0)), 4)


@contextmanager
def _processes(
    num_processes: int | None, most: int, watch: Watch = lambda done, more: None
) -> Iterator[Callable[..., "Future[Any]"]]:
    """A function that runs a function of this file in a process of its own, forked from one that has torch."""
    context = get_context("forkserver")
    preload(["megatron_peft.rehearsal.layer_recording"])  # and all that a rehearsed rank imports
    number = min(num_processes or _num_processes(), most)
    running: set[Any] = set()
    with ThreadPoolExecutor(number) as threads:  # each waits for a process

        def start(function: Callable[..., Any], *arguments: Any) -> "Future[Any]":
            watch(0, 1)
            future = threads.submit(_in_a_process, context, running, function, arguments)
            future.add_done_callback(lambda _: watch(1, 0))
            return future

        try:
            yield start
        except BaseException:  # Ctrl-C too
            threads.shutdown(wait=False, cancel_futures=True)
            for process in [*running]:
                process.kill()
            raise


def _in_a_process(context: Any, running: set[Any], function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, function, arguments), daemon=True)
    process.start()
    running.add(process)
    sender.close()
    try:
        result, error = receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"the process of a rehearsed rank ended with exit code {process.exitcode}") from None
    finally:
        running.discard(process)
    process.join()
    if error is not None:
        raise error
    return result


def _answer(sender: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the asking process ends this one
    import_module(NO_GPU)  # where the server could not
    sys.stdout = open(os.devnull, "w")  # what a run tells at its start
    warnings.simplefilter("ignore")
    try:
        answer = function(*arguments), None
    except ConfigurationError as error:
        answer = None, ConfigurationError(*error.problems)
    except BaseException:
        answer = None, RuntimeError(f"a rehearsed rank failed:\n{traceback.format_exc()}")
    sender.send(answer)
    sender.close()
    os._exit(0)  # torch has nothing to put away


def _rehearse_here(rank: RankToRehearse) -> RankRecord:
    from megatron_peft.rehearsal.rehearsed_rank import rehearse_rank

    return rehearse_rank(rank)


def _record_calls(of: RankToRehearse, ranks: Sequence[int]) -> list[RankRecord]:
    return [_rehearse_here(replace(of, rank=rank)) for rank in ranks]


def _record_layers(asked: Sequence[LayersToRecord]) -> list[RecordedLayers]:
    from megatron_peft.rehearsal.layer_recording import recorded_layers

    return recorded_layers(asked)


def _outline_here(config: RunConfig, shape: ModelShape) -> "list[StageOutline]":
    from megatron_peft.rehearsal.stage_schedule import outline_stages

    return outline_stages(config, shape)


def _small_here(config: RunConfig, shape: ModelShape) -> tuple[RunConfig, ModelShape, tuple[int, ...]]:
    """A run of few layers, stages and microbatches, with the run's tensor-parallel ranks; and which stages it has."""
    from megatron_peft.rehearsal.small_run import small_layout, small_targets

    parallel, stages = config.parallel, config.parallel.pipeline_model_parallel_size
    small, num_layers = small_layout(parallel, shape.num_layers)
    tp, pp = parallel.tensor_model_parallel_size, small.pipeline_model_parallel_size
    dp = min(parallel.data_parallel_size, MOST_REPLICAS)
    small = replace(small, tensor_model_parallel_size=tp, world_size=tp * pp * dp)
    batch = min(config.num_microbatches, pp if small.is_interleaved else 2)
    recomputes = "recompute_num_layers" in config.model.transformer
    transformer = {**config.model.transformer, **({"recompute_num_layers": 1} if recomputes else {})}
    training: Any = replace(config.training, global_batch_size=batch * config.training.micro_batch_size * dp)
    config = replace(
        config,
        parallel=small,
        training=training,
        model=replace(config.model, transformer=transformer),
        peft=replace(config.peft, target_modules=small_targets(config.peft, shape, num_layers)),
        checkpoint=replace(config.checkpoint, save="never written"),
    )
    full = min(shape.num_full_attention_layers, num_layers)
    shape = replace(shape, num_layers=num_layers, num_full_attention_layers=full)
    return config, shape, tuple(stage if stage < pp - pp // 2 else stages - pp + stage for stage in range(pp))
