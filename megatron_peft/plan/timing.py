"""Seconds of a step: a replay of what every rank computes and calls, in program order, with a cluster's constants.

    a product       max(operations / (rate x efficiency of its size x sustained), bytes / memory bandwidth)
    all else        bytes / memory bandwidth
    a call          alpha log2(ranks) + beta x bytes, once every rank of its group is there

`Cluster.of_run` says what is sustained on a run's nodes, and which part of tensor-parallel calls is hidden.

A rank has two clocks, as PyTorch has on a GPU: the host launches, and the device computes what was launched. Calls run
beside the computation, those of one group one after the other; the device waits for a call where the program does, the
host never. What the device spends waiting is a bubble (the others are not there yet), exposed communication (the call
itself) or launches (the host is behind). Two kernels that run at once do not slow each other down here.
"""

import json
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Column, Table

from megatron_peft.config import RunConfig
from megatron_peft.models.shape import ModelShape
from megatron_peft.plan.cluster import Cluster
from megatron_peft.rehearsal.program import MESSAGES, Call, Computation, Entry, Mark, Product, Wait
from megatron_peft.training.watchers import ModelFlops

COMPUTED = ("products", "attention", "other operations")
LAUNCHES, BUBBLE, EXPOSED = "launches", "bubble", "communication: "  # and the first word of the group's axis
# Groups whose sums the host reads, at the end of a step; until then it launches ahead.
READ_BY_THE_HOST = ("world", "model", "optimizer instance")


@dataclass(frozen=True)
class Span:
    """What a rank's device did from `start` to `end`, in seconds from the start of the step."""

    start: float
    end: float
    phase: str  # of a `Mark`


@dataclass(frozen=True)
class StepTime:
    """A step's time until the last rank has ended, and where it goes: the mean over the ranks."""

    seconds: float
    by_kind: Mapping[str, float]  # they add up: `COMPUTED`, `LAUNCHES`, `BUBBLE`, `EXPOSED` with the group's axis
    spans: Mapping[int, tuple[Span, ...]] = field(default_factory=dict)  # of each rank that was replayed

    # Parts of the step in which a device waits: for other ranks, for a call under way, for its host.

    @property
    def bubble(self) -> float:
        return self.by_kind.get(BUBBLE, 0.0) / self.seconds

    @property
    def exposed_communication(self) -> float:
        return sum(value for kind, value in self.by_kind.items() if kind.startswith(EXPOSED)) / self.seconds

    @property
    def launch_bound(self) -> float:
        return self.by_kind.get(LAUNCHES, 0.0) / self.seconds

    def as_dict(self) -> dict[str, Any]:
        parts = ("seconds", "bubble", "exposed_communication", "launch_bound")
        return {**{name: getattr(self, name) for name in parts}, "seconds_by_kind": dict(self.by_kind)}


@lru_cache(maxsize=100_000)
def product_seconds(product: Product, cluster: Cluster) -> float:
    """One product alone on a device. Attention is causal: half of its square is computed."""
    rate = (cluster.bf16_tflops if product.dtype in ("bfloat16", "float16") else cluster.fp32_tflops) * 1e12
    moved = product.num_bytes / (cluster.memory_gb_per_second * cluster.memory_efficiency * 1e9)
    if product.kind == "mm":
        return max(product.flops / (rate * cluster.efficiency(product.flops) * cluster.sustained), moved)
    return max(product.flops / 2 / (rate * cluster.attention_efficiency * cluster.sustained), moved)


@dataclass(frozen=True)
class WorkTime:
    """Seconds of some work: of the device by kind, and of the host that launches it."""

    device: tuple[tuple[str, float], ...]
    host: float

    def share(self, share: float) -> "WorkTime":  # from 0 to 1
        return WorkTime(tuple((kind, seconds * share) for kind, seconds in self.device), self.host * share)


def work_time(work: Computation, cluster: Cluster) -> WorkTime:
    """What `work` takes on a device by itself."""
    times = dict.fromkeys(COMPUTED, 0.0)
    for product, count in work.products.items():
        times["products" if product.kind == "mm" else "attention"] += count * product_seconds(product, cluster)
    times["other operations"] = work.num_bytes / (cluster.memory_gb_per_second * cluster.memory_efficiency * 1e9)
    return WorkTime(tuple(times.items()), work.num_kernels * cluster.launch_us * 1e-6)


def time_alone(entries: Sequence[Entry], rank: int, cluster: Cluster) -> WorkTime:
    """The time of a part of a rank's program in which it waits for none but its tensor-parallel peers.

    They do the same at the same time. A part that a schedule repeats need be replayed only once.
    """
    device = step_time({rank: entries}, replace(cluster, launch_us=0.0, call_us=0.0)).by_kind
    num_kernels = sum(entry.num_kernels for entry in entries if isinstance(entry, Computation))
    num_calls = sum(isinstance(entry, Call) for entry in entries)
    host = num_kernels * cluster.launch_us + num_calls * cluster.call_us
    return WorkTime(tuple((kind, seconds) for kind, seconds in device.items() if seconds), host * 1e-6)


def step_time(
    scheduled: Mapping[int, Sequence[Entry | WorkTime]], cluster: Cluster, keep_spans: bool = False
) -> StepTime:
    """The time of a step, of all that each global rank does in program order; work may have been timed already.

    Ranks that do the same at the same time may be left out: tensor-parallel peers and replicas. The other end of every
    message must be there. ValueError: ranks wait for one another for ever; `check_order` says who waits for whom.
    """
    return _Replay(scheduled, cluster, keep_spans).run()


@dataclass(slots=True, eq=False)
class _Transfer:
    """A call: it begins when the last of its ranks has posted it."""

    axis: str
    missing: int  # ranks that have not posted it
    ready: float = 0.0  # when the last one has posted it, so far
    end: float = -1.0  # less than 0 until it is known
    waiting: list[int] = field(default_factory=list)  # ranks that wait to know it


@dataclass(slots=True, eq=False)
class _Rank:
    """Clocks of one rank."""

    number: int
    program: Sequence[Entry | WorkTime]
    host: float = 0.0
    device: float = 0.0
    calls: dict[Any, _Transfer] = field(default_factory=dict)  # the latest that it has posted with each handle
    pending: list[_Transfer] = field(default_factory=list)  # those that it waits for now
    totals: dict[str, float] = field(default_factory=dict)  # seconds of each kind
    spans: list[Span] = field(default_factory=list)
    mark: Mark | None = None  # the phase that it is in, and when its first work began
    marked_at: float | None = None

    def spend(self, kind: str, seconds: float) -> None:
        self.totals[kind] = self.totals.get(kind, 0.0) + seconds
        self.device += seconds


class _Replay:
    def __init__(self, scheduled: Mapping[int, Sequence[Entry | WorkTime]], cluster: Cluster, keep_spans: bool) -> None:
        self.cluster, self.keep_spans = cluster, keep_spans
        self.launch, self.call_host = cluster.launch_us * 1e-6, cluster.call_us * 1e-6
        self.ranks = {number: _Rank(number, entries) for number, entries in scheduled.items()}
        # The schedule repeats the same objects, and each is looked at once.
        self.works: dict[int, WorkTime] = {}  # by id
        self.look_at = cache(self._look_at)
        self.joined: dict[Any, _Transfer] = {}  # (key, number of the call) -> not yet joined by all
        self.num_posted: Counter[Any] = Counter()  # by (key, rank)
        self.free: defaultdict[Any, float] = defaultdict(float)  # key -> when its last call ended
        self.runnable = deque(scheduled)

    def run(self) -> StepTime:
        running = {number: self.steps(rank) for number, rank in self.ranks.items()}
        stuck = {*running}
        while self.runnable:
            number = self.runnable.popleft()
            if next(running[number], "ended") == "ended":
                stuck.discard(number)
        if stuck:
            raise ValueError(f"ranks {', '.join(map(str, sorted(stuck)[:8]))} wait for ever.")
        ranks = self.ranks.values()
        by_kind: dict[str, float] = dict.fromkeys((*COMPUTED, LAUNCHES, BUBBLE), 0.0)
        seconds = max(max(rank.device, rank.host) for rank in ranks)
        for rank in ranks:
            rank.spend(LAUNCHES, max(rank.host - rank.device, 0.0))
            rank.spend(BUBBLE, seconds - rank.device)
            for kind, spent in rank.totals.items():
                by_kind[kind] = by_kind.get(kind, 0.0) + spent / len(ranks)
        return StepTime(seconds, by_kind, {rank.number: tuple(rank.spans) for rank in ranks if self.keep_spans})

    def steps(self, rank: _Rank) -> Iterator[None]:
        """Runs a rank's program, and stops wherever it waits for a call that others have not joined."""
        batch: int | None = None  # of the messages that were posted last
        for entry in rank.program:
            own_batch = entry.batch if isinstance(entry, Call) else None
            if rank.pending and (own_batch is None or own_batch != batch):
                yield from self.waits(rank)
            batch = own_batch
            if isinstance(entry, WorkTime):
                self.compute(rank, entry)
            elif isinstance(entry, Computation):
                if id(entry) not in self.works:
                    self.works[id(entry)] = work_time(entry, self.cluster)
                self.compute(rank, self.works[id(entry)])
            elif isinstance(entry, Call):
                self.post(rank, entry)
            elif isinstance(entry, Wait) and entry.handle in rank.calls:  # else it was called before the step
                rank.pending.append(rank.calls[entry.handle])
            elif isinstance(entry, Mark):
                self.turn_to(rank, entry)
        yield from self.waits(rank)
        self.turn_to(rank, None)

    def compute(self, rank: _Rank, times: WorkTime) -> None:
        first_launch = rank.host + min(times.host, self.launch)
        if first_launch > rank.device:
            rank.spend(LAUNCHES, first_launch - rank.device)
        if rank.marked_at is None:
            rank.marked_at = rank.device
        rank.host += times.host
        for kind, seconds in times.device:
            rank.spend(kind, seconds)
        if rank.host > rank.device:
            rank.spend(LAUNCHES, rank.host - rank.device)

    def post(self, rank: _Rank, call: Call) -> None:
        seconds, key, num_ranks = self.look_at(rank.number, call)
        rank.host += self.call_host
        number = self.num_posted[key, rank.number]
        self.num_posted[key, rank.number] += 1
        transfer = self.joined.pop((key, number), None) or _Transfer(call.axis, missing=num_ranks)
        transfer.missing -= 1
        transfer.ready = max(transfer.ready, rank.device, rank.host)
        rank.calls[call.handle] = transfer
        if not call.is_async:
            rank.pending.append(transfer)
        if transfer.missing > 0:
            self.joined[key, number] = transfer
            return
        transfer.end = self.free[key] = max(transfer.ready, self.free[key]) + seconds
        self.runnable.extend(transfer.waiting)

    def _look_at(self, rank: int, call: Call) -> tuple[float, Any, int]:
        """Seconds; a key: calls with the same one follow one another; number of its ranks that are replayed."""
        if call.operation in MESSAGES:
            assert call.peer is not None
            ends = (rank, call.peer) if call.operation == "send" else (call.peer, rank)
            return self.cluster.call_seconds(call.operation, call.num_bytes, ends), (call.axis, ends), 2
        seconds = self.cluster.call_seconds(call.operation, call.num_bytes, call.group)
        if call.axis == "tensor" and call.operation in ("all_gather", "reduce_scatter") and not call.is_async:
            seconds *= 1 - self.cluster.hidden
        present = tuple(member for member in call.group if member in self.ranks)
        return seconds, (call.axis, present), len(present)

    def waits(self, rank: _Rank) -> Iterator[None]:
        """Let the device wait for what is pending; stops where it is not known for how long."""
        for transfer in rank.pending:
            while transfer.end < 0:
                transfer.waiting.append(rank.number)
                yield
            if transfer.end > rank.device:
                rank.spend(BUBBLE, max(transfer.ready - rank.device, 0.0))  # until the last rank has joined
                rank.spend(EXPOSED + transfer.axis.split()[0], transfer.end - rank.device)
            if transfer.axis in READ_BY_THE_HOST:
                rank.host = max(rank.host, rank.device)
        rank.pending.clear()

    def turn_to(self, rank: _Rank, mark: Mark | None) -> None:
        if self.keep_spans and rank.mark is not None and rank.marked_at is not None:
            rank.spans.append(Span(rank.marked_at, rank.device, rank.mark.phase))
        rank.mark, rank.marked_at = mark, None


# What a step's time means for a run: tokens a second, TFLOP/s and MFU, hours for a number of tokens.

ERRORS = Path(__file__).parent / "published_errors.json"
ONLY_RANKS = "A plan ranks the layouts of a run on a cluster; its seconds are no promise."


@dataclass(frozen=True)
class Accuracy:
    """How far off plans of published runs were: planned over published seconds, less 1."""

    errors: tuple[float, ...]
    elsewhere: tuple[float, ...] = ()  # layouts of a run on a network that is not like those of clusters here

    @classmethod
    @cache
    def reported(cls) -> "Accuracy":
        """The errors of the runs that had no part in the constants (`tools/published.py`)."""
        return cls(*(tuple(errors.values()) for errors in json.loads(ERRORS.read_text(encoding="utf-8")).values()))

    @property
    def median(self) -> float:
        return median(map(abs, self.errors))

    @property
    def worst(self) -> float:
        return max(map(abs, self.errors))

    def around(self, seconds: float) -> tuple[float, float]:
        """What a run may take of which a plan says `seconds`, if it is as far off as the outermost of these."""
        return seconds / (1 + max(*self.errors, 0.0)), seconds / (1 + min(*self.errors, 0.0))

    def __str__(self) -> str:
        sizes = f"{self.median:.0%} in the median, {self.worst:.0%} at most"
        text = f"{len(self.errors)} published runs were off by {sizes}"
        if not self.elsewhere:
            return text
        layouts, other = f"{len(self.elsewhere)} layouts on another network", Accuracy(self.elsewhere)
        return f"{text}; {layouts} by {other.median:.0%}, {other.worst:.0%} at most"


@dataclass(frozen=True)
class PlannedSpeed:
    """A step's time, and what a run of such steps gets done. Every sequence is taken to be full."""

    time: StepTime
    tokens: int  # of a step, over all replicas
    flops: int  # of a step, as --log-throughput counts them (`ModelFlops`)
    num_gpus: int
    peak_tflops: float  # of a GPU in the run's precision
    num_layers: int

    @classmethod
    def of(cls, run: RunConfig, shape: ModelShape, cluster: Cluster, time: StepTime) -> "PlannedSpeed":
        length, rows = run.data.seq_length, run.global_batch_size
        model = ModelFlops.of(shape, is_frozen=run.peft.trains_adapters)
        flops = model.count(rows * length, rows * length * (length + 1) // 2)
        peak = cluster.bf16_tflops if run.model.bf16 else cluster.fp32_tflops
        return cls(time, rows * length, flops, run.parallel.world_size, peak, shape.num_layers)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.time.seconds

    @property
    def tflops_per_gpu(self) -> float:  # of the model: recompute does not count
        return self.flops / self.time.seconds / self.num_gpus / 1e12

    @property
    def mfu(self) -> float:
        return self.tflops_per_gpu / self.peak_tflops

    def hours(self, num_tokens: float) -> float:
        return num_tokens / self.tokens_per_second / 3600

    def summary(self) -> str:
        """Seconds of a step, and how far they can be relied on."""
        accuracy = Accuracy.reported()
        low, high = accuracy.around(self.time.seconds)
        return f"time: {self.time.seconds:.3g} s a step ({low:.3g} to {high:.3g}: {accuracy}). {ONLY_RANKS}"

    def as_dict(self, num_tokens: float = 1e8) -> dict[str, Any]:
        accuracy = Accuracy.reported()
        errors = {"number": len(accuracy.errors), "median_error": accuracy.median, "worst_error": accuracy.worst}
        return {
            "time": self.time.as_dict(),
            "seconds_range": accuracy.around(self.time.seconds),
            "published_runs": errors,
            "tokens_per_step": self.tokens,
            **{name: getattr(self, name) for name in ("tokens_per_second", "tflops_per_gpu", "mfu")},
            "tokens_of_the_run": num_tokens,
            "hours": self.hours(num_tokens),
        }


def time_table(speed: PlannedSpeed, num_tokens: float | None = None) -> Table:
    """Where a step's time goes, and the hours of `num_tokens`, or of 100 million, as a table for the terminal."""
    numbers = Column(justify="right"), Column(justify="right")
    table = Table("", *numbers, title="Time of a step (estimated)", show_header=False)
    seconds = speed.time.seconds
    for kind, spent in speed.time.by_kind.items():
        if spent > 0.0005 * seconds:
            table.add_row(kind, f"{spent:.3f} s", f"{spent / seconds:.1%}")
    table.add_row("step", f"{seconds:.3f} s", "100%", end_section=True)
    table.add_row("tokens a second", f"{speed.tokens_per_second:,.0f}", "")
    table.add_row("TFLOP/s a GPU, MFU", f"{speed.tflops_per_gpu:.0f}", f"{speed.mfu:.1%}")
    tokens = 1e8 if num_tokens is None else num_tokens
    table.add_row(f"hours for {tokens:,.0f} tokens", f"{speed.hours(tokens):,.1f}", "")
    return table
