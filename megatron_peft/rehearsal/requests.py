"""What a rehearsed rank is asked for: a run, a place in it, and the microbatches of its step; or a model's layers.

And what is asked for in place of a large run: a smaller one of the same kind.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import accumulate, pairwise
from typing import Any

from megatron_peft.config import ParallelConfig, RunConfig, is_targeted
from megatron_peft.config.training import stages_of_layout
from megatron_peft.models.families import family_of
from megatron_peft.models.shape import ModelShape
from megatron_peft.rehearsal.program import Segment

SAMPLES_IN_A_PACK = 4  # assumed: what is in the data is not known
MOST_STAGES = 4  # of a small run


@dataclass(frozen=True)
class Lengths:
    """Sizes of a microbatch."""

    rows: int  # samples, or 1 if they are packed
    positions: int  # of each row
    packed: tuple[int, ...] = ()  # lengths of the samples in the one row

    @classmethod
    def longest(cls, config: RunConfig) -> "Lengths":
        """The largest sizes that the flags allow."""
        rows, positions = config.training.micro_batch_size, config.data.seq_length
        if not config.data.pack_sequences:
            return cls(rows, positions)
        num_samples, total = SAMPLES_IN_A_PACK * rows, rows * positions
        ends = [total * number // num_samples for number in range(num_samples + 1)]
        return cls(1, total, tuple(end - begin for begin, end in pairwise(ends)))


@dataclass(frozen=True)
class RankToRehearse:
    """What a process needs to run one rank."""

    config: RunConfig  # its world need not exist
    shape: ModelShape
    rank: int
    num_microbatches: int  # of the recorded step
    lengths: Lengths  # of its microbatches
    all_phases: bool = True  # LoRA-GA's start, validation and saving too, not loading and the step alone
    num_waiting: int = 0  # microbatches that the run's step has beside these; the device holds their data too
    calls_alone: bool = False  # record the calls of the whole run, from the model to a checkpoint, and nothing else

    @classmethod
    def of(cls, config: RunConfig, shape: ModelShape, rank: int, peaks: bool = True) -> "RankToRehearse":
        """A rank of a run, with as many microbatches as it needs for its peak; without `peaks` with the fewest."""
        request = cls(config, shape, rank, config.num_microbatches, Lengths.longest(config))
        if not peaks:  # a first, a last and one between them, where the run has them: all others are like that one
            pp = config.parallel.pipeline_model_parallel_size
            fewest = -(-3 // pp) * pp if config.parallel.is_interleaved else 3
            return replace(request, num_microbatches=min(config.num_microbatches, fewest), all_phases=False)
        enough = enough_microbatches(config, request.stage, config.num_microbatches)
        return replace(request, num_microbatches=enough, num_waiting=config.num_microbatches - enough)

    @property
    def stage(self) -> int:
        parallel = self.config.parallel
        return self.rank // (parallel.world_size // parallel.pipeline_model_parallel_size)


def enough_microbatches(config: RunConfig, stage: int, num_microbatches: int) -> int:
    """The fewest whose step fills the stage with as many at once as a step of `num_microbatches` does."""
    pp = config.parallel.pipeline_model_parallel_size
    # 1F1B holds pp - stage; and the first, the last and one between them are different from one another. The
    # interleaved schedule warms up with less than two rounds.
    return min(num_microbatches, 2 * pp if config.parallel.is_interleaved else max(pp - stage + 1, 3))


@dataclass(frozen=True)
class LayersToRecord:
    """What a process needs to record the segments of a model (`program.RecordedLayers`).

    Equal for layouts of a run whose layers compute, send and hold the same.
    """

    run: RunConfig  # of one tensor-parallel group, without a pipeline and replicas
    shape: ModelShape
    # In the model's order. "before" stands for those ahead of the first that has an adapter; "first" is that one, whose
    # backward may stop early; of the others there is one for each set of targets.
    layers: tuple[Segment, ...]
    lengths: Lengths
    fuses: Mapping[str, bool] = field(default_factory=dict)  # other fusions than those of the run's flags

    @classmethod
    def of(cls, run: RunConfig, shape: ModelShape) -> "LayersToRecord":
        targets = targets_of_layers(run, shape)
        first = next((layer for layer, names in enumerate(targets) if names), 0)
        layers: dict[Segment, frozenset[str]] = {"before": frozenset()} if first > 0 else {}
        layers |= {"first": targets[first]} | {names: names for names in targets}
        of_layer = [f"decoder.layers.{n}.{name}" for n, names in enumerate(layers.values()) for name in sorted(names)]
        tp, size = run.parallel.tensor_model_parallel_size, run.training.micro_batch_size
        alone = replace(
            run,
            parallel=ParallelConfig(tp, world_size=tp, sequence_parallel=run.parallel.sequence_parallel),
            model=replace(run.model, transformer=one_layer_recomputed(run), transformer_impl="local"),
            peft=replace(run.peft, target_modules=tuple(of_layer)) if run.peft.trains_adapters else run.peft,
            training=replace(run.training, overlap_grad_reduce=False, global_batch_size=2 * size),
            optimizer=replace(run.optimizer, use_distributed_optimizer=False, overlap_param_gather=False),
        )
        # The last of several stages has a table of its own.
        is_tied = shape.tied_embeddings and run.parallel.pipeline_model_parallel_size == 1
        few = replace(of_num_layers(shape, len(layers)), tied_embeddings=is_tied)
        return cls(alone, few, tuple(layers), Lengths.longest(run))


def one_layer_recomputed(run: RunConfig) -> Mapping[str, Any]:
    """The run's fields of TransformerConfig, for fewer layers: those that are recomputed are so one by one."""
    given = run.model.transformer
    return {**given, "recompute_num_layers": 1} if "recompute_num_layers" in given else given


def of_num_layers(shape: ModelShape, num_layers: int) -> ModelShape:
    """The shape with so many layers, which are fewer."""
    full_attention = min(shape.num_full_attention_layers, num_layers)
    return replace(shape, num_layers=num_layers, num_full_attention_layers=full_attention)


def targets_of_layers(run: RunConfig, shape: ModelShape) -> Sequence[frozenset[str]]:
    """The linear layers of each transformer layer that are adapted (by the end of their names), or all trained."""
    if not run.peft.trains_adapters:
        return [frozenset(shape.linear_layers(1))] * shape.num_layers
    return _adapted(shape, tuple(run.peft.target_modules))


@cache
def _adapted(shape: ModelShape, patterns: Sequence[str]) -> Sequence[frozenset[str]]:
    kinds, modules = [*shape.linear_layers(1)], family_of(shape.architecture).modules
    return [
        frozenset(kind for kind in kinds if is_targeted(f"decoder.layers.{layer}.{kind}", patterns, modules))
        for layer in range(shape.num_layers)
    ]


@dataclass(frozen=True)
class Chunk:
    """What a pipeline rank holds of the model in one piece: numbers of its layers, and the ends."""

    layers: tuple[int, ...]
    embedding: bool
    head: bool


def chunks_of_stages(parallel: ParallelConfig, num_layers: int) -> list[list[Chunk]]:
    """The chunks of every pipeline rank, as megatron-core divides the layers. They must divide (`check_layout`)."""
    pp = parallel.pipeline_model_parallel_size
    num_stages = pp * (parallel.num_virtual_stages(num_layers) or 1)
    first, last = parallel.decoder_first_pipeline_num_layers, parallel.decoder_last_pipeline_num_layers
    if parallel.pipeline_model_parallel_layout is not None:
        counts = [stage.count("t") for stage in stages_of_layout(parallel.pipeline_model_parallel_layout)]
    elif first or last:
        between = num_stages - bool(first) - bool(last)
        rest = (num_layers - (first or 0) - (last or 0)) // max(between, 1)
        counts = [*([first] if first else []), *[rest] * between, *([last] if last else [])]
    else:
        counts = [parallel.num_divided(num_layers) // num_stages] * num_stages
        counts[0] -= parallel.account_for_embedding_in_pipeline_split
        counts[-1] -= parallel.account_for_loss_in_pipeline_split
    chunks = [
        Chunk(tuple(range(begin, end)), embedding=at == 0, head=at == len(counts) - 1)
        for at, (begin, end) in enumerate(pairwise(accumulate(counts, initial=0)))
    ]
    return [chunks[stage::pp] for stage in range(pp)]


def alike_stages(run: RunConfig, shape: ModelShape) -> list[int]:
    """Each pipeline stage's twin: the first whose ranks compute and send the same in a microbatch."""
    targets = targets_of_layers(run, shape)
    contents = [
        [(chunk.embedding, chunk.head, [targets[layer] for layer in chunk.layers]) for chunk in chunks]
        for chunks in chunks_of_stages(run.parallel, shape.num_layers)
    ]
    return [contents.index(content) for content in contents]


# Ranks, stages, layers and microbatches.


def kept_stages(num_stages: int) -> Sequence[int]:
    """The stages that the small run has: the first and the last of so many."""
    kept = min(num_stages, MOST_STAGES)
    return *range(kept - kept // 2), *range(num_stages - kept // 2, num_stages)


def make_small(
    config: RunConfig, shape: ModelShape, most_tensor_parallel: int, most_replicas: int, most_microbatches: int
) -> tuple[RunConfig, ModelShape]:
    """A run with at most so many ranks on an axis and microbatches a step, and few layers, as wide as before."""
    stages = kept_stages(config.parallel.pipeline_model_parallel_size)
    tp, pp = min(config.parallel.tensor_model_parallel_size, most_tensor_parallel), len(stages)
    changed, num_layers = _small_stages(config.parallel, shape.num_layers, stages)
    parallel = replace(
        config.parallel,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        world_size=tp * pp * min(config.parallel.data_parallel_size, most_replicas),
        distributed_backend="gloo",
        distributed_timeout_minutes=5,
        **changed,
    )
    num_microbatches = min(config.num_microbatches, most_microbatches)
    if parallel.is_interleaved:
        num_microbatches -= num_microbatches % pp
    size = config.training.micro_batch_size * num_microbatches * parallel.data_parallel_size
    # Of a pattern for layers that the small model has not, the kinds of layers that it means.
    modules, targets = family_of(shape.architecture).modules, list[str]()
    names = [(layer, kind) for layer in range(shape.num_layers) for kind in shape.linear_layers(1)]
    for pattern in config.peft.target_modules:
        meant = [place for place in names if is_targeted("decoder.layers.{}.{}".format(*place), (pattern,), modules)]
        is_kept = any(layer < num_layers for layer, _ in meant)
        targets += [pattern] if is_kept else [kind.split(".")[-1] for _, kind in meant]
    small = replace(
        config,
        parallel=parallel,
        model=replace(config.model, transformer=one_layer_recomputed(config)),
        peft=replace(config.peft, target_modules=tuple(dict.fromkeys(targets))),
        training=replace(config.training, global_batch_size=size),
    )
    return small, of_num_layers(shape, num_layers)


def _small_stages(parallel: ParallelConfig, num_layers: int, stages: Sequence[int]) -> tuple[dict[str, Any], int]:
    """Changed fields of the layout, and the number of layers."""
    num_stages, layout = parallel.pipeline_model_parallel_size, parallel.pipeline_model_parallel_layout
    if layout is not None:  # the first and the last chunk of each rank
        chunks = stages_of_layout(layout)
        ends = sorted({0, len(chunks) - num_stages})
        layout = re.sub("t+", "t", "|".join(chunks[first + stage] for first in ends for stage in stages))
        return {"pipeline_model_parallel_layout": layout}, layout.count("t")
    names = (f"decoder_{end}_pipeline_num_layers" for end in ("first", "last"))
    sizes = {name: size for name in names if (size := getattr(parallel, name))}
    if sizes:  # stages in the middle have 2 layers; an end has 1, 2 or 3, as it has fewer, as many or more
        others = num_stages - len(sizes)
        middle = (num_layers - sum(sizes.values())) // others if others else min(sizes.values())
        sizes = {name: 2 + (size > middle) - (size < middle) for name, size in sizes.items()}
        return sizes, sum(sizes.values()) + 2 * (len(stages) - len(sizes))
    virtual = parallel.num_virtual_stages(num_layers)
    accounted = parallel.num_divided(num_layers) - num_layers
    divided = len(stages) * min(virtual or 1, 2)
    while divided - accounted < max(2, len(stages)):
        divided += len(stages)
    return ({"num_layers_per_virtual_pipeline_stage": 1} if virtual else {}), divided - accounted
