"""How benchmarks measure: CPU seconds of steps that take turns, memory, products; figures and tables."""

import dataclasses
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from megatron_peft.benchmarks.subjects import STEPS, Setting, Step, on_ranks
from megatron_peft.runtime.cpu_kernels import give_back_freed_memory
from megatron_peft.training.metrics import memory_bytes

# CPU seconds of several steps that take turns, so that whatever else the machine does falls on all of them alike.
#
# CPU seconds of all threads of the process, not wall time: waiting for another rank or for a core costs nothing.

NUM_WARMUPS = 2
FEWEST_TURNS = 3
MAX_SECONDS = 300.0  # of wall time: no turn begins after that, so that a benchmark ends on a busy machine too


def seconds_of_steps(setting: Setting, names: tuple[str, ...], floors: tuple[str, ...] = ()) -> dict[str, list[float]]:
    """CPU seconds, over all ranks, of every turn of these `STEPS`; with those of `floors`, the products that they and
    "frozen" do not share.
    """
    by_rank = on_ranks(time_turns, setting, names=names, floors=floors)
    return {name: [sum(turn) for turn in zip(*(r[name] for r in by_rank), strict=True)] for name in by_rank[0]}


def time_turns(setting: Setting, names: tuple[str, ...], floors: tuple[str, ...]) -> dict[str, list[float]]:
    """CPU seconds of every turn on this rank, by name. Started on ranks."""
    steps = {name: STEPS[name](setting) for name in names}
    logs = {name: products_of(steps[name]) for name in ("frozen", *floors) if floors}
    for name in floors:
        steps[f"{name} adds"] = products_beyond(logs[name], logs["frozen"])
        steps[f"{name} spares"] = products_beyond(logs["frozen"], logs[name])
    end = time.monotonic() + MAX_SECONDS

    def is_late() -> bool:
        """Whether the time is up on any rank."""
        over = torch.tensor(time.monotonic() > end, dtype=torch.int32)
        dist.all_reduce(over, dist.ReduceOp.MAX)
        return bool(over)

    return take_turns(steps, setting.turns, is_late)


def take_turns(
    steps: Mapping[str, Step], num_turns: int, is_late: Callable[[], bool] = lambda: False
) -> dict[str, list[float]]:
    """CPU seconds of each step in each turn, after `NUM_WARMUPS` turns that do not count.

    Every second turn runs the other way round, so that no step always follows the same one. Once `is_late`,
    it stops as soon as `FEWEST_TURNS` have run.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(-NUM_WARMUPS, num_turns):
        if is_late() and turn >= FEWEST_TURNS:
            break
        for name in list(steps)[:: -1 if turn % 2 else 1]:
            spent = cpu_seconds(steps[name])
            if turn >= 0:
                seconds[name].append(spent)
    return seconds


def median_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """The median over the turns of the quotient of seconds."""
    return median(a / b for a, b in zip(above, below, strict=True))


def cpu_seconds(step: Step) -> float:
    """CPU seconds of all threads of this process during a step."""
    start = time.process_time()
    step()
    return time.process_time() - start


# Resident memory of a process and its peak, as Linux tells them.

MIB = 2**20


class Peak(NamedTuple):
    """Bytes: the largest resident set of a process, and what was resident before the model was built."""

    peak: int
    start: int


def peak_of_steps(setting: Setting, name: str, num_steps: int = 3, keeps_freed: bool = True) -> Peak:
    """The peak of some steps of a subject in a fresh process of one rank."""
    return on_ranks(run_steps, setting, name=name, num_steps=num_steps, keeps_freed=keeps_freed)[0]


def run_steps(setting: Setting, name: str, num_steps: int, keeps_freed: bool) -> Peak:
    """Args: keeps_freed: whether the C library may keep what is freed. Started on a rank."""
    if not keeps_freed:
        give_back_freed_memory()
    start, _ = memory_bytes()
    step = STEPS[name](setting)
    for _ in range(num_steps):
        step()
    return Peak(memory_bytes()[1], start)


def peak_of_program(program: str) -> int:
    """The high-water mark in bytes of an interpreter that has run this text and nothing else."""
    last = "print([line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')][0])"
    done = subprocess.run([sys.executable, "-c", f"{program}\n{last}"], capture_output=True, text=True, check=True)
    return int(done.stdout.splitlines()[-1]) * 1024


# A figure: what was measured, the target, and whether it is reached; as a table and as JSON.


@dataclass(frozen=True)
class Figure:
    """One measured number, in `unit` ("" for a ratio).

    target: the largest value that is good; None where the number is only for comparison.
    note: the numbers behind it.
    """

    name: str
    measured: float
    target: float | None = None
    unit: str = ""
    note: str = ""

    @property
    def reached(self) -> bool | None:
        """Whether the target is reached; None without one."""
        return None if self.target is None else self.measured <= self.target


VERDICTS = {True: "[green]pass[/green]", False: "[red]FAIL[/red]", None: ""}


def print_table(title: str, figures: Sequence[Figure], console: Console | None = None) -> None:
    """The figures of one benchmark as a table."""
    table = Table(title=title, title_justify="left")
    for header in ("figure", "measured", "target", "", "what is behind it"):
        table.add_column(header, overflow="fold")
    for figure in figures:
        target = "" if figure.target is None else f"<= {figure.target:.4g} {figure.unit}"
        measured = f"{figure.measured:.4g} {figure.unit}"
        table.add_row(escape(figure.name), measured, target, VERDICTS[figure.reached], escape(figure.note))
    (console or Console()).print(table)


def write_json(path: Path, figures: Sequence[Figure]) -> None:
    """A list of objects: the fields of `Figure`, and `reached`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{**dataclasses.asdict(figure), "reached": figure.reached} for figure in figures]
    path.write_text(json.dumps(rows, indent=2) + "\n")


# The floor of a method: the products of its step that another step does not have, run alone.
#
# They are recorded from the step itself and run again on copies of their tensors, in their order, without autograd: on
# any machine the step takes about that time or more. Alone, a product finds less in the caches. A rotation's inverses
# and Fourier transforms count as products.

PRODUCTS = {"_linear_pointwise", "mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_"}
PRODUCTS |= {"linalg_inv_ex", "_linalg_solve_ex", "_fft_c2c"}


class ProductLog(TorchDispatchMode):
    """Context manager; while it is entered `calls` grows, and `again` has a call on copies for each of `calls`."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []
        self.again: dict[tuple[Any, ...], Callable[[], Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in PRODUCTS:
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
            call = _factors(func.overloadpacket.__name__, tensors)
            if call not in self.again:
                self.again[call] = partial(func, *tree_map_only(Tensor, torch.clone, args), **(kwargs or {}))
            self.calls.append(call)
        return func(*args, **(kwargs or {}))


def _factors(name: str, tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    """Shapes of a product's factors, by whatever operator; or the operator's name and the shape of what it takes."""
    if name == "_linear_pointwise":  # x, W and perhaps a bias
        return tuple(tensors[0].shape), tuple(tensors[1].t().shape)
    if name.startswith(("linalg", "_linalg", "_fft")):
        return name, tuple(tensors[0].shape)
    return tuple(tensors[-2].shape), tuple(tensors[-1].shape)  # before them, what they are added to


def products_of(step: Step) -> ProductLog:
    """The products of a step that is not the first."""
    step()
    with ProductLog() as log:
        step()
    return log


def products_beyond(log: ProductLog, other: ProductLog) -> Step:
    """Runs the products of `log` that `other` has not."""
    common = Counter(other.calls)
    beyond = []
    for call in log.calls:
        common[call] -= 1
        if common[call] < 0:
            beyond.append(call)
    return torch.no_grad()(lambda: [log.again[call]() for call in beyond])
