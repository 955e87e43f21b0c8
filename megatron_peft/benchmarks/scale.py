"""What a run asks of its hosts and of the file system as its ranks grow: at its start, a save, a log line, a resume.

The run is `finetune` with the recipe of Llama-3.1-405B at TP8 PP16: its layers, keys and slices a rank, of a narrow
model, in the world of `absent_ranks`. Instead of training it saves and writes log lines.
"""

import datetime
import json
import math
import os
import random
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_peft.benchmarks.absent_ranks import AbsentRanks, Grid
from megatron_peft.benchmarks.measure import Costs, Figure, Meter
from megatron_peft.benchmarks.subjects import Setting
from megatron_peft.checkpoint import load
from megatron_peft.checkpoint.save import Saver
from megatron_peft.cli.parser import read_config
from megatron_peft.config import RunConfig
from megatron_peft.models.families import read_shape
from megatron_peft.runtime.fake_ranks import replaced
from megatron_peft.runtime.ranks import preload, run_ranks
from megatron_peft.training import run
from megatron_peft.training.step import StepReport
from megatron_peft.training.update import mixtures
from megatron_peft.training.watchers import watched_steps

RECIPE = Path(__file__).parents[2] / "examples" / "recipes" / "llama-3.1-405b.yaml"
# Of the recipe: so all stages have 8 layers, and each replica holds the optimizer's whole state.
WITHOUT = ("account-for-", "use-distributed-optimizer")
RANKS_OF_NODE = 8
SAMPLES_A_RANK = 4
NUM_LOG_LINES = 3
TIMEOUT = datetime.timedelta(minutes=20)
SECONDS_ALLOWED, MOST_RANKS = {"save": 2.0, "log line": 0.02}, 1024  # on the first rank, up to so many
MOST_DESCRIPTORS = 256  # whatever the number of ranks


@dataclass(frozen=True)
class Case:
    """A world, those of its ranks that run, and a folder for the run's files."""

    grid: Grid
    running: tuple[int, ...]
    measured: tuple[int, ...]
    config: RunConfig
    resumes: bool = False
    port: int = 0  # of the store in which the running ranks meet


def scale_figures(setting: Setting) -> list[Figure]:
    """Of a world of the setting's layout."""
    preload([module for module in ("megatron_peft.training.run", "transformers.models.llama")])
    grid = Grid(setting.tensor_parallel, setting.data_parallel, setting.pipeline_parallel)
    other = grid.rank([min(1, size - 1) for size in grid[:2]] + [0])
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(setting, grid, Path(folder))
        first = Case(grid, tuple(grid.running()), (0, other), config)
        phases = measured(first)
        # A resume is that of a new process.
        config = replace(config, checkpoint=replace(config.checkpoint, load=config.checkpoint.save))
        running = tuple(sorted({0, other, other - grid.place(other)[0], grid.next_on(2, 0) or 0}))
        resumed = measured(Case(grid, running, (0, other), config, resumes=True))
        phases = [one | two for one, two in zip(phases, resumed, strict=True)]
    return figures_of(grid, *phases)


def config_of(setting: Setting, grid: Grid, folder: Path) -> RunConfig:
    """The recipe's run on made-up data, whose records all have one length."""
    shape, num_ranks = read_shape(setting.checkpoint), grid.world_size
    record = json.dumps({"prompt": "1 2 3 4 5 6 7", "completion": " 8 9 10"})
    (folder / "train.jsonl").write_text(f"{record}\n" * SAMPLES_A_RANK * num_ranks)
    lines = RECIPE.read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "run.yaml").write_text("".join(line for line in lines if not line.startswith(WITHOUT)))
    flags = {
        "--config": folder / "run.yaml",
        "--pretrained-checkpoint": setting.checkpoint,
        "--train-data-path": folder / "train.jsonl",
        "--save": folder / "save",
        "--tokenizer-type": "NullTokenizer",
        "--vocab-size": shape.vocab_size - 1,
        "--lora-rank": setting.rank,
        "--seq-length": setting.positions,
        "--global-batch-size": 128 * grid.data,
    }
    return read_config([str(word) for pair in flags.items() for word in pair], {"WORLD_SIZE": str(num_ranks)})


def measured(case: Case) -> list[dict[str, Costs]]:
    """The phases of each measured rank."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)  # a rank would serve the others
    case = replace(case, port=store.port)
    by_rank = run_ranks(len(case.running), run_present_rank, case, timeout=TIMEOUT.total_seconds())
    return [by_rank[case.running.index(rank)] for rank in case.measured]


def run_present_rank(case: Case) -> Mapping[str, Costs]:
    """Started for each running rank."""
    torch.set_num_threads(1)
    rank = case.running[int(os.environ["RANK"])]
    node, on_node = divmod(rank, RANKS_OF_NODE)
    os.environ.update(LOCAL_WORLD_SIZE=str(RANKS_OF_NODE), LOCAL_RANK=str(on_node), GROUP_RANK=str(node))
    os.environ["MASTER_PORT"] = str(case.port)
    tempfile.tempdir = str(Path(case.config.checkpoint.save or "").parent)
    store = dist.TCPStore("localhost", case.port, is_master=False, timeout=TIMEOUT)
    meter = Meter()
    absent = AbsentRanks(case.grid, case.running, rank, store, meter, rank in case.measured)
    with absent.world(), meter:
        run_phases(case.config, meter, case.resumes)
    return meter.phases


def run_phases(config: RunConfig, meter: Meter, resumes: bool = False) -> None:
    """Start the run, save it and write log lines; or start it again, and resume from what was saved."""
    usual = load.load_checkpoint

    def resume(state: Any) -> Any:
        with meter.phase("resume"):
            return usual(state)

    def save_and_log(state: Any, data: Any, saver: Saver, *_: Any) -> str:
        start.close()
        if resumes:
            return ""
        _make_moments(state)
        random.seed(0)
        np.random.seed(0)  # the texts of all ranks' generators have one length, and so have their files
        state.position.iteration = 1
        with meter.phase("save"):
            saver.start(state)
            outcome = saver.finish()
        if outcome is not None and outcome.error is not None:
            raise outcome.error
        report = StepReport(1.0, 1, 4096, 4096, 1.0, 1e-5, stop=False)
        folder = Path(config.checkpoint.save or "").with_name("background")
        with (
            Saver(replace(config.checkpoint, save=str(folder), load=None, async_save=True)),
            meter.phase("background save"),
        ):
            pass  # what its threads have to meet in is open by now
        with watched_steps(state) as watchers:
            for iteration in range(NUM_LOG_LINES):  # the last one is kept: what is gathered once is not in it
                watchers.after_step(iteration + 1, report)
                with meter.phase("log line"):
                    watchers.speed(watchers.interval.averages())
                    mixtures(state)
        return ""

    start = ExitStack()
    if not resumes:
        start.enter_context(meter.phase("start"))
    with (
        replaced(run, "train", save_and_log),
        replaced(run, "start_losses", lambda *_: (1.0, 1.0)),  # no numbers come from other stages
        replaced(load, "load_checkpoint", resume if resumes else usual),
    ):
        run.finetune(config)


def _make_moments(state: Any) -> None:
    """An optimizer makes them in its first step."""
    for one in getattr(state.optimizer, "chained_optimizers", [state.optimizer]):
        if not one.is_stub_optimizer:
            for parameter in (parameter for group in one.optimizer.param_groups for parameter in group["params"]):
                parameter.grad = torch.zeros_like(parameter)
            one.optimizer.step()


def figures_of(grid: Grid, first: Mapping[str, Costs], other: Mapping[str, Costs]) -> list[Figure]:
    """CPU seconds of the first rank in each phase, with what was counted behind them; and the most descriptors."""
    ranks, figures = grid.world_size, []
    for phase, costs in first.items():
        pair = costs, other[phase]
        opened, read = (
            [getattr(one, name) for one in pair] + [getattr(costs, name) + (ranks - 1) * getattr(pair[1], name)]
            for name in ("opened", "read_bytes")
        )
        note = (
            f"another {pair[1].cpu_seconds:.3g} s; "
            f"{costs.gathers} gathers, {_sizes(one.object_bytes for one in pair)}; "
            f"opened {opened[0]:,} and {opened[1]:,}, by all {opened[2]:,}; read {_sizes(read[:2])}, by all "
            f"{_sizes(read[2:])}; descriptors {' and '.join(f'{one.descriptors:,}' for one in pair)}; resident "
            f"{_sizes(one.resident_bytes for one in pair)}"
        )
        allowed = SECONDS_ALLOWED.get(phase) if ranks <= MOST_RANKS else None
        figures.append(Figure(f"{ranks:,} ranks, {phase}", costs.cpu_seconds, allowed, "s", note))
    most = max(one.descriptors for of_rank in (first, other) for one in of_rank.values())
    return [*figures, Figure(f"{ranks:,} ranks, the most descriptors of a process", most, MOST_DESCRIPTORS)]


def _sizes(of: Iterable[float]) -> str:
    """As `1.2 MB and 3 kB`."""
    powers = [(size, min(int(math.log(max(size, 1), 1000)), 4)) for size in of]
    return " and ".join(
        f"{size / 1000**power:.3g} {('bytes', 'kB', 'MB', 'GB', 'TB')[power]}" for size, power in powers
    )
