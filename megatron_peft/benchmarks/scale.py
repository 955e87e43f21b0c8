"""What a run asks of its hosts and of the file system as its ranks grow: at its start, a save, a log line, a resume.

The run is `finetune` with the recipe of Llama-3.1-405B at TP8 PP16: its layers, keys and slices a rank, of a narrow
model, in the world of `absent_ranks`. Instead of training it saves and writes log lines.
"""

import datetime
import json
import os
import pickle
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_peft.benchmarks.absent_ranks import AbsentRanks, Grid
from megatron_peft.benchmarks.measure import Costs, Figure, Meter, forget_files
from megatron_peft.benchmarks.subjects import Setting
from megatron_peft.checkpoint import load, save
from megatron_peft.checkpoint.safe_pickle import read_metadata
from megatron_peft.checkpoint.save import Saver
from megatron_peft.checkpoint.tensors import Written, WrittenSlice, complete_files
from megatron_peft.cli.parser import read_config
from megatron_peft.config import RunConfig
from megatron_peft.models.families import read_shape
from megatron_peft.runtime.fake_ranks import replaced
from megatron_peft.runtime.ranks import preload, run_ranks
from megatron_peft.training import run
from megatron_peft.training.metrics import METRICS_FILE, MetricsWriter
from megatron_peft.training.step import StepReport
from megatron_peft.training.update import mixtures
from megatron_peft.training.watchers import watched_steps

RECIPE = Path(__file__).parents[2] / "examples" / "recipes" / "llama-3.1-405b.yaml"
# Of the recipe: so all stages have 8 layers, and each replica holds the optimizer's whole state.
WITHOUT = ("account-for-", "use-distributed-optimizer")
RANKS_OF_NODE = 8
NUM_LOG_LINES = 3
TIMEOUT = datetime.timedelta(minutes=20)
MOST_RANKS = 1024  # up to which the first rank has these seconds
SECONDS_ALLOWED = {"save": 2.0, "save of a full index": 2.0, "log line": 0.02}
MOST_DESCRIPTORS = 256  # whatever the number of ranks
LOG_LINES = 50_000  # of 7 kB
Phases = dict[str, Costs]


def scale_figures(setting: Setting) -> list[Figure]:
    """The figures of a world of the setting's layout."""
    preload(["megatron_peft.training.run"])
    grid = Grid(setting.tensor_parallel, setting.data_parallel, setting.pipeline_parallel)
    with tempfile.TemporaryDirectory() as folder:
        return figures_of(grid, phases_of(grid, recipe_run(setting, grid, Path(folder))))


def phases_of(grid: Grid, config: RunConfig) -> dict[int, Phases]:
    """Those of the running ranks. A resume is that of new processes, after a long time without a save."""
    running = grid.running()
    resumed = replace(config, checkpoint=replace(config.checkpoint, load=config.checkpoint.save))
    costs: dict[int, Phases] = {rank: {} for rank in running}
    for each in (config, resumed):
        store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)  # a rank would serve the others
        run_one = partial(run_present_rank, grid, running, store.port)
        by_rank = run_ranks(len(running), run_one, each, timeout=TIMEOUT.total_seconds())
        for rank, phases in zip(running, by_rank, strict=True):
            costs[rank] |= phases
    return costs


def recipe_run(setting: Setting, grid: Grid, folder: Path) -> RunConfig:
    """The recipe's run on made-up data, whose records all have one length."""
    shape, num_ranks = read_shape(setting.checkpoint), grid.world_size
    record = json.dumps({"prompt": "1 2 3 4 5 6 7", "completion": " 8 9 10"})
    (folder / "train.jsonl").write_text(f"{record}\n" * 4 * num_ranks)
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


def run_present_rank(grid: Grid, running: tuple[int, ...], port: int, config: RunConfig) -> Phases:
    """Started for each of the running ranks. port: of the store in which they meet."""
    torch.set_num_threads(1)
    rank = running[int(os.environ["RANK"])]
    node, on_node = divmod(rank, RANKS_OF_NODE)
    os.environ |= {"LOCAL_WORLD_SIZE": str(RANKS_OF_NODE), "LOCAL_RANK": str(on_node), "GROUP_RANK": str(node)}
    os.environ["MASTER_PORT"], tempfile.tempdir = str(port), str(Path(config.checkpoint.save or "").parent)
    store = dist.TCPStore("localhost", port, is_master=False, timeout=TIMEOUT)
    with AbsentRanks(grid, running, rank, store, rank in measured_ranks(grid)) as meter:
        run_phases(config, meter)
    return meter.phases


def measured_ranks(grid: Grid) -> tuple[int, int]:
    """The first rank, and one of another slice, replica and node."""
    return 0, grid.anchor(grid.world_size - 1)


def run_phases(config: RunConfig, meter: Meter) -> None:
    """Start the run, save it and write log lines; or, with --load, start it, resume and open a long log."""
    usual, usual_completion, start = load.load_checkpoint, save.complete_files, ExitStack()
    written: list[Written] = []  # of all ranks, on the first

    def resume(state: Any) -> Any:
        with meter.phase("resume"):
            return usual(state)

    def complete(draft: Path, by_rank: Sequence[Written]) -> Any:
        written.extend(by_rank)
        return usual_completion(draft, by_rank)

    def save_and_log(state: Any, data: Any, saver: Saver, *_: Any) -> str:
        start.close()
        if config.checkpoint.load:
            iteration, is_first = state.position.iteration, dist.get_rank() == 0
            with meter.phase("long log"), MetricsWriter(config.checkpoint.save, config.logging, is_first, iteration):
                pass
            return ""
        _make_moments(state)
        random.seed(0)
        np.random.seed(0)  # the texts of all ranks' generators have one length, and so have their files
        state.position.iteration, state.position.consumed_samples = 1, config.global_batch_size
        with meter.phase("save"), replaced(save, "complete_files", complete):
            saver.start(state)
            outcome = saver.finish()
        if outcome is not None and outcome.error is not None:
            raise outcome.error
        if written and config.parallel.world_size <= MOST_RANKS:
            _write_index(written, config.parallel.data_parallel_size, meter)
        written.clear()
        folder = Path(config.checkpoint.save or "").with_name("background")
        with Saver(replace(config.checkpoint, save=str(folder), async_save=True)), meter.phase("background save"):
            pass  # what its threads meet in is open by now
        with watched_steps(state) as watchers:
            for iteration in range(NUM_LOG_LINES):  # the last one is kept: what is gathered once is not in it
                watchers.after_step(iteration + 1, StepReport(1.0, 1, 4096, 4096, 1.0, 1e-5, stop=False))
                with meter.phase("log line"):
                    watchers.speed(watchers.interval.averages())
                    mixtures(state)
        return ""

    if not config.checkpoint.load:
        start.enter_context(meter.phase("start"))
    elif dist.get_rank() == 0:
        folder = Path(config.checkpoint.load)
        _write_log(folder / METRICS_FILE)
        forget_files(folder)
    with (
        replaced(run, "train", save_and_log),
        replaced(run, "start_losses", lambda *_: (1.0, 1.0)),  # no numbers come from other stages
        replaced(load, "load_checkpoint", resume if config.checkpoint.load else usual),
    ):
        run.finetune(config)


def _make_moments(state: Any) -> None:
    """An optimizer makes them in its first step."""
    for part in getattr(state.optimizer, "chained_optimizers", [state.optimizer]):
        if not part.is_stub_optimizer:
            for parameter in (parameter for group in part.optimizer.param_groups for parameter in group["params"]):
                parameter.grad = torch.zeros_like(parameter)
            part.optimizer.step()


def _write_log(path: Path) -> None:
    """That of a run which wrote lines for months, the last of them after its last checkpoint."""
    layers = {f"decoder.layers.{i}.self_attention.linear_qkv": 0.5 for i in range(128)}
    path.write_text(
        "".join(f"{json.dumps({'iteration': i, 'lambda': layers})}\n" * n for i, n in ((1, LOG_LINES), (2, 9)))
    )


def _write_index(by_rank: Sequence[Written], num_replicas: int, meter: Meter) -> None:
    """Write as many slices as full fine-tuning has with the distributed optimizer and a bucket for each parameter.

    Its seven tensors of a layer are cut as LoRA's eight; here each replica has a slice of each of their states.
    """
    sent = [
        pickle.dumps(own._replace(slices=[part for each in own.slices for part in _over_replicas(each, num_replicas)]))
        for own in by_rank
    ]
    with tempfile.TemporaryDirectory() as folder:
        with meter.phase("save of a full index"):
            complete_files(Path(folder), [pickle.loads(data) for data in sent])  # as a gather gives them
        with meter.phase("read of a full index"):
            read_metadata(Path(folder))


def _over_replicas(written: WrittenSlice, number: int) -> Iterator[WrittenSlice]:
    num_parts = number if written.key.startswith("optimizer.") else 1
    (all_rows, *rest), (begin, *others), rows = written.global_shape, written.offset, written.shape[0]
    for part in range(num_parts):
        offset = begin * num_parts + part * rows, *others
        yield written._replace(global_shape=(all_rows * num_parts, *rest), offset=offset)


def figures_of(grid: Grid, by_rank: Mapping[int, Phases]) -> list[Figure]:
    """CPU seconds of the first rank in each phase, with what was counted behind them; and the most descriptors."""
    ranks, figures = grid.world_size, []
    first, other = (by_rank[rank] for rank in measured_ranks(grid))
    for phase, costs in first.items():
        of_other = other.get(phase, Costs())
        sizes = [(name, getattr(costs, name), getattr(of_other, name)) for name in vars(costs)]
        note = "; ".join(f"{n.replace('_', ' ')} {a:,.4g} | {b:,.4g} | {a + (ranks - 1) * b:,.4g}" for n, a, b in sizes)
        allowed = SECONDS_ALLOWED.get(phase) if ranks <= MOST_RANKS else None
        figures.append(Figure(f"{ranks:,} ranks, {phase}", costs.cpu_seconds, allowed, "s", note))
    most = max(costs.descriptors for phases in (first, other) for costs in phases.values())
    return [*figures, Figure(f"{ranks:,} ranks, the most descriptors of a process", most, MOST_DESCRIPTORS)]
