"""--fit: the layouts of a run that fit a cluster's GPUs, ranked by tokens a second.

    every way to compute a layer (TP, micro-batch, ...)     its layers are recorded, on tensors without numbers
    every layout that divides the model and the batch      memory and time of its bottleneck stage, from these layers
    the fastest of those that fit                           memory and time by a replay of all stages
    of those with the same TP, PP, ...                      the fastest: they differ in how a pipeline is divided alone

What is varied: TP, PP, virtual stages, DP (the rest of the world), sequence parallelism, the micro-batch, activation
recompute and, with several replicas, the distributed optimizer. All else is the run's own.
"""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from functools import cache
from itertools import product
from math import gcd, inf, lcm
from typing import Any

from rich import box
from rich.table import Column, Table

from megatron_peft.config import ConfigurationError, ParallelConfig, RunConfig, flag, require
from megatron_peft.config.errors import spelled
from megatron_peft.config.training import ACCOUNTED_STAGES, LAYOUT, UNEVEN_STAGES
from megatron_peft.models.families import check_adapters
from megatron_peft.models.shape import ModelShape, check_layout, check_quantized, divisors
from megatron_peft.plan.cluster import Cluster
from megatron_peft.plan.recorded_step import RecordedStep, estimated_time, total
from megatron_peft.plan.timing import PlannedSpeed, time_alone
from megatron_peft.rehearsal.program import Memory, RecordedLayers, Segment
from megatron_peft.rehearsal.rehearsal import kept_processes, record_layers
from megatron_peft.rehearsal.requests import LayersToRecord, alike_stages
from megatron_peft.runtime.progress import Advance, no_progress

MICRO_BATCHES = (1, 2, 4, 8)
RECOMPUTES: Mapping[str, tuple[dict[str, Any], tuple[str, ...]]] = {  # name -> (fields of TransformerConfig, modules)
    "none": ({}, ()),
    "modules": ({"recompute_granularity": "selective"}, ("mlp",)),
    "full": ({"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}, ()),
}
NUM_REPLAYED = 12  # layouts
NUM_DIVISIONS_REPLAYED = 2  # of each: other virtual stages, or ends that count as layers
ALL_OF_RECOMPUTE = (*RECOMPUTES["full"][0], "distribute_saved_activations")
# Fields of `ParallelConfig`; all are set back before they are varied.
PARALLEL_FIELDS = (
    *("tensor_model_parallel_size", "pipeline_model_parallel_size", "num_layers_per_virtual_pipeline_stage"),
    *(*ACCOUNTED_STAGES, "sequence_parallel", *UNEVEN_STAGES, LAYOUT),
)


def _layout_values(run: RunConfig) -> dict[str, Any]:
    """What `fit` varies or sets back; 0, None, False and () are without a flag."""
    transformer = run.model.transformer
    return {
        **{name: getattr(run.parallel, name) for name in PARALLEL_FIELDS},
        "micro_batch_size": run.training.micro_batch_size,
        "use_distributed_optimizer": run.optimizer.use_distributed_optimizer,
        **{name: transformer.get(name) for name in ALL_OF_RECOMPUTE},
        "recompute_modules": run.model.recompute_modules,
    }


@dataclass(frozen=True)
class FittedLayout:
    """A run at a layout that fits, with what a step of it takes."""

    run: RunConfig
    recompute: str  # of `RECOMPUTES`
    speed: PlannedSpeed
    memory: Memory  # of the rank that holds most, which is of this stage
    stage: int

    @property
    def flags(self) -> list[str]:
        """Words of a command line that set the layout, beside the run's own."""
        set_values = {flag(name): value for name, value in _layout_values(self.run).items() if value}
        return [word for name, value in set_values.items() for word in spelled(name, value).split()]

    def flags_to_leave_out(self, original: RunConfig) -> list[str]:
        """Flags of `original`, the run that a layout was looked for, which `flags` cannot take back."""
        own = _layout_values(self.run)
        return [flag(name) for name, value in _layout_values(original).items() if value and not own[name]]

    def as_dict(self, num_tokens: float = 1e8) -> dict[str, Any]:
        """Plain values for JSON, with the hours of a run of so many tokens."""
        return {
            "flags": self.flags,
            "data_parallel_size": self.run.parallel.data_parallel_size,
            "memory_bytes": dict(self.memory),
            "peak_bytes": total(self.memory),
            "stage": self.stage,
            **self.speed.as_dict(num_tokens),
        }


@kept_processes()
def fit(
    run: RunConfig,
    shape: ModelShape,
    world_size: int,
    cluster: Cluster,
    num_layouts: int = 10,
    watch: Advance = no_progress,
    known: dict[str, RecordedLayers] | None = None,
) -> list[FittedLayout]:
    """The layouts that fit, the fastest first; of those that divide the layers in other ways alone, the fastest.

    `run` may be of any layout. `watch` counts recordings, and layouts whose step is replayed; `known` is what searches
    for the same run in other worlds have recorded, and this one adds its own. ConfigurationError: there is no global
    batch to compare layouts at, or no layout divides or fits; it names what came nearest.
    """
    require(
        run.training.global_batch_size is not None,
        "--fit compares layouts at the same global batch: give --global-batch-size.",
    )
    laid_out = [*_layouts(run, shape, world_size, cluster)]
    require(
        bool(laid_out),
        f"--fit: no layout of {world_size} GPUs divides the model ({shape.num_layers} layers, "
        f"{shape.num_attention_heads} heads, {shape.num_query_groups} key-value heads) and --global-batch-size "
        f"{run.training.global_batch_size}: use another --world-size or another global batch.",
    )
    candidates: list[_Candidate] = []
    least = [0.0] * len(laid_out)  # the seconds that each takes at least
    for recompute in RECOMPUTES:  # each takes longer than the one before
        replayed = _fastest(candidates, cluster)
        limit = replayed[-1][0].seconds if len(replayed) == NUM_REPLAYED else inf
        too_large: set[ParallelConfig] = set()
        for size in MICRO_BATCHES:  # each takes more memory than the one before
            runs = {
                number: _recomputing(laid, recompute)
                for number, laid in enumerate(laid_out)
                if laid.training.micro_batch_size == size and least[number] <= limit and laid.parallel not in too_large
            }
            every = record_layers([LayersToRecord.of(laid, shape) for laid in runs.values()], watch, known)
            distinct = dict(zip(every, runs.values(), strict=True))
            times = {layers: seconds_of_segments(layers, cluster.of_run(laid)) for layers, laid in distinct.items()}
            for (number, laid), layers in zip(runs.items(), every, strict=True):
                candidate = _candidate(RecordedStep(laid, shape, layers), recompute, times[layers], cluster)
                candidates.append(candidate)
                least[number] = candidate.seconds
                if total(candidate.memory) > cluster.usable_bytes:
                    too_large.add(laid.parallel)
    fastest = _fastest(candidates, cluster)
    if not fastest:
        nearest = min(candidates, key=lambda candidate: total(candidate.memory))
        parallel, peak = nearest.step.run.parallel, total(nearest.memory)
        raise ConfigurationError(
            f"--fit: nothing fits {world_size} GPUs with {cluster.usable_bytes / 2**30:.1f} GiB each to use. TP "
            f"{parallel.tensor_model_parallel_size}, PP {parallel.pipeline_model_parallel_size} with recompute "
            f"{nearest.recompute} comes nearest and takes {peak / 2**30:.1f} GiB: use more GPUs, a shorter "
            f"--seq-length, or a method that trains less."
        )
    watch(0, len(fastest))
    best: list[FittedLayout] = []
    for alike in fastest:
        best.append(min((_replayed(candidate, cluster) for candidate in alike[:NUM_DIVISIONS_REPLAYED]), key=_slowness))
        watch(1, 0)
    return sorted(best, key=_slowness)[:num_layouts]


def _replayed(candidate: "_Candidate", cluster: Cluster) -> FittedLayout:
    run, shape = candidate.step.run, candidate.step.shape
    speed = PlannedSpeed.of(run, shape, cluster, estimated_time(candidate.step, cluster))
    return FittedLayout(run, candidate.recompute, speed, candidate.memory, candidate.stage)


def _slowness(layout: FittedLayout) -> tuple[float, int]:
    return layout.speed.time.seconds, total(layout.memory)


@dataclass(frozen=True)
class _Candidate:
    """A layout, its time without a replay of its schedule, and the memory of its fullest rank, of this stage."""

    step: RecordedStep
    recompute: str
    seconds: float
    memory: Memory
    stage: int


def _fastest(candidates: Sequence[_Candidate], cluster: Cluster) -> list[list[_Candidate]]:
    """The fastest that fit; together those that divide the layers of a pipeline in other ways alone."""
    groups: defaultdict[Hashable, list[_Candidate]] = defaultdict(list)
    for candidate in sorted(candidates, key=lambda candidate: candidate.seconds):
        if total(candidate.memory) <= cluster.usable_bytes:
            groups[_but_for_division(candidate)].append(candidate)
    return [*groups.values()][:NUM_REPLAYED]


def _but_for_division(candidate: _Candidate) -> Hashable:
    run = candidate.step.run
    division = "num_layers_per_virtual_pipeline_stage", *ACCOUNTED_STAGES
    whole = tuple(value for name, value in vars(run.parallel).items() if name not in division)
    return whole, run.training.micro_batch_size, candidate.recompute


def _layouts(run: RunConfig, shape: ModelShape, world_size: int, cluster: Cluster) -> Iterator[RunConfig]:
    """The run at every layout that divides the model and the batch, without recompute."""
    run = _recomputing(run, "none")
    may_shard = run.optimizer.optimizer == "adam" and not run.optimizer.overlap_param_gather
    for parallel, size in product(_parallel_layouts(run, shape, world_size, cluster), MICRO_BATCHES):
        training, optimizer = replace(run.training, micro_batch_size=size), run.optimizer
        if may_shard:  # never slower here, and smaller
            optimizer = replace(optimizer, use_distributed_optimizer=parallel.data_parallel_size > 1)
        with suppress(ConfigurationError):  # it doesn't divide the batch
            yield replace(run, parallel=parallel, training=training, optimizer=optimizer)


def _recomputing(run: RunConfig, recompute: str) -> RunConfig:
    varied, modules = RECOMPUTES[recompute]
    others = {key: value for key, value in run.model.transformer.items() if key not in ALL_OF_RECOMPUTE}
    return replace(run, model=replace(run.model, transformer={**others, **varied}, recompute_modules=modules))


def _parallel_layouts(run: RunConfig, shape: ModelShape, world_size: int, cluster: Cluster) -> Iterator[ParallelConfig]:
    """Those that divide the model and the world; TP stays within a node."""
    defaults = {field.name: field.default for field in fields(ParallelConfig) if field.name in PARALLEL_FIELDS}
    node = cluster.gpus_per_node
    for tp in divisors(gcd(world_size, node) if world_size > node else world_size):
        of_tp = ParallelConfig(tensor_model_parallel_size=tp, world_size=tp)
        if check_adapters(run.peft, of_tp, shape) or check_quantized(run.model, tp, shape):
            continue  # the method's adapters, or a quantized base's blocks, do not fit the linear layers
        for pp in divisors(world_size // tp):
            for pipeline, sequence in product(_pipelines(shape.num_layers, pp), (False, True) if tp > 1 else (False,)):
                varied = {**pipeline, "tensor_model_parallel_size": tp, "sequence_parallel": sequence}
                parallel = replace(run.parallel, world_size=world_size, **{**defaults, **varied})
                if not check_layout(parallel, shape):
                    yield parallel


def _pipelines(num_layers: int, pp: int) -> Iterator[dict[str, Any]]:
    """Fields of `ParallelConfig` of every even pipeline, whose embedding and loss count as layers or do not."""
    for ends in (False, True) if pp > 1 else (False,):
        stage_layers, rest = divmod(num_layers + 2 * ends, pp)
        if rest or stage_layers < 1 + ends:
            continue
        for chunk in [None, *divisors(stage_layers)[:-1]] if pp > 1 else [None]:
            yield {
                "pipeline_model_parallel_size": pp,
                "num_layers_per_virtual_pipeline_stage": chunk,
                **dict.fromkeys(ACCOUNTED_STAGES, ends),
            }


def seconds_of_segments(layers: RecordedLayers, cluster: Cluster) -> dict[Segment, float]:
    """What both passes of a microbatch take, on the cluster as the run finds it."""
    seconds = dict.fromkeys(layers.parameters, 0.0)
    for (phase, segment), recorded in layers.passes.items():
        if phase in ("forward", "backward"):
            time = time_alone(recorded.entries, 0, cluster)
            seconds[segment] += max(sum(spent for _, spent in time.device), time.host)
    return seconds


def _candidate(step: RecordedStep, recompute: str, times: Mapping[Segment, float], cluster: Cluster) -> _Candidate:
    """`times`: `seconds_of_segments`, from which those of all stages follow."""
    stages = [sum(times[segment] for chunk in held for segment in step.segments(chunk)) for held in step.chunks]
    microbatches, num_chunks, bottleneck = step.run.num_microbatches, len(step.chunks[0]), max(stages)
    seconds = microbatches * bottleneck + (sum(stages) - bottleneck) / num_chunks
    # Sums of gradients and the gather of parameters, of the first stage.
    trained = step.parameters(step.chunks[0]).num_trained
    seconds += cluster.call_seconds("all_reduce", 4 * trained, step.data_group(0))
    if step.pp > 1:  # a message to each side; those of the interleaved schedule run beside the computation
        message = cluster.call_seconds("send", step.message_bytes, (step.rank(0), step.rank(1)))
        seconds += 2 * microbatches * message * (1.0 if num_chunks == 1 else 0.1 * num_chunks)
    held = {stage: step.memory(stage) for stage in sorted({*alike_stages(step.run, step.shape)})}
    fullest = max(held, key=lambda stage: total(held[stage]))
    return _Candidate(step, recompute, seconds, held[fullest], fullest)


SEQUENCE_STEP = 64  # tokens


@kept_processes()
def longest_sequence(
    run: RunConfig, shape: ModelShape, cluster: Cluster, watch: Advance = no_progress
) -> tuple[int, int]:
    """The longest --seq-length that fits at a run's layout, and what its fullest rank holds, in bytes.

    A multiple of `SEQUENCE_STEP` and of the tensor-parallel size, or all of the model's positions (as many as TP
    divides); 0 if the shortest does not fit, with its bytes. Each length is recorded, as by `fit`; `watch` counts them.
    """

    @cache
    def peak(length: int) -> int:
        tried = replace(run, data=replace(run.data, seq_length=length))
        [layers] = record_layers([LayersToRecord.of(tried, shape)], watch)
        step = RecordedStep(tried, shape, layers)
        return max(total(step.memory(stage)) for stage in {*alike_stages(run, shape)})

    tp = run.parallel.tensor_model_parallel_size
    step, last = lcm(SEQUENCE_STEP, tp), shape.longest_sequence // tp * tp
    lengths = [*range(step, last, step), last]
    num_fitting = bisect_right(lengths, cluster.usable_bytes, key=peak)
    longest = lengths[num_fitting - 1] if num_fitting else 0
    return longest, peak(longest or lengths[0])


def fit_tables(layouts: Sequence[FittedLayout], title: str, num_tokens: float) -> list[Table]:
    """The layouts as tables of 80 columns: what they are and take, hours for `num_tokens`; and where the time goes."""

    def narrow(title: str, names: str) -> Table:  # of numbers, which stand close together
        columns = (Column(name, justify="right", no_wrap=True) for name in ("", *names.split(", ")))
        return Table(*columns, title=title, box=box.SIMPLE, padding=(0, 1, 0, 0))

    table = narrow(title, "TP, PP, VPP, DP, SP, rows, recompute, GiB, s/step, tokens/s, hours")
    shares = narrow("The same, parts of a step", "TFLOP/s a GPU, MFU, bubble, communication, launches")
    for number, layout in enumerate(layouts, 1):
        parallel, speed, time = layout.run.parallel, layout.speed, layout.speed.time
        stages, is_split = parallel.num_virtual_stages(speed.num_layers), parallel.sequence_parallel
        sizes = number, parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size, stages or "-"
        more = parallel.data_parallel_size, "yes" if is_split else "no", layout.run.training.micro_batch_size
        measures = f"{total(layout.memory) / 2**30:.1f}", f"{time.seconds:.2f}", f"{speed.tokens_per_second:,.0f}"
        table.add_row(*map(str, (*sizes, *more, layout.recompute, *measures)), f"{speed.hours(num_tokens):,.1f}")
        parts = speed.mfu, time.bubble, time.exposed_communication, time.launch_bound
        shares.add_row(str(number), f"{speed.tflops_per_gpu:.0f}", *(f"{part:.1%}" for part in parts))
    return [table, shares]
