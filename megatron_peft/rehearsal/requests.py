"""What a rehearsed rank is asked for: a run, a place in it, and the microbatches of its step; or a model's layers."""

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


@dataclass(frozen=True)
class Lengths:
    """Sizes of a microbatch."""

    rows: int  # samples, or 1 if they are packed
    positions: int  # of each row
    packed: tuple[int, ...] = ()  # lengths of the samples in the one row

    @classmethod
    def longest(cls, config: RunConfig) -> "Lengths":
        """As long as the flags allow."""
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
        asked = cls(config, shape, rank, config.num_microbatches, Lengths.longest(config))
        if not peaks:  # a first, a last and one between them, where the run has them: all others are like that one
            pp = config.parallel.pipeline_model_parallel_size
            fewest = -(-3 // pp) * pp if config.parallel.is_interleaved else 3
            return replace(asked, num_microbatches=min(config.num_microbatches, fewest), all_phases=False)
        enough = enough_microbatches(config, asked.stage, config.num_microbatches)
        return replace(asked, num_microbatches=enough, num_waiting=config.num_microbatches - enough)

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
        layers |= {"first": targets[first]} | {one: one for one in targets}
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
    counts = _layers_of_virtual_stages(parallel, num_layers, pp * (parallel.num_virtual_stages(num_layers) or 1))
    chunks = [
        Chunk(tuple(range(first, end)), embedding=at == 0, head=at == len(counts) - 1)
        for at, (first, end) in enumerate(pairwise(accumulate(counts, initial=0)))
    ]
    return [chunks[stage::pp] for stage in range(pp)]


def _layers_of_virtual_stages(parallel: ParallelConfig, num_layers: int, num_stages: int) -> list[int]:
    """Numbers of layers, in the order in which a token passes the stages."""
    if parallel.pipeline_model_parallel_layout is not None:
        return [stage.count("t") for stage in stages_of_layout(parallel.pipeline_model_parallel_layout)]
    first, last = parallel.decoder_first_pipeline_num_layers, parallel.decoder_last_pipeline_num_layers
    if first or last:
        between = num_stages - bool(first) - bool(last)
        rest = (num_layers - (first or 0) - (last or 0)) // max(between, 1)
        return [*([first] if first else []), *[rest] * between, *([last] if last else [])]
    counts = [parallel.num_divided(num_layers) // num_stages] * num_stages
    counts[0] -= parallel.account_for_embedding_in_pipeline_split
    counts[-1] -= parallel.account_for_loss_in_pipeline_split
    return counts


def alike_stages(run: RunConfig, shape: ModelShape) -> list[int]:
    """Each pipeline stage's twin: the first whose ranks compute and send the same in a microbatch."""
    targets = targets_of_layers(run, shape)
    contents = [
        [(chunk.embedding, chunk.head, [targets[layer] for layer in chunk.layers]) for chunk in chunks]
        for chunks in chunks_of_stages(run.parallel, shape.num_layers)
    ]
    return [contents.index(one) for one in contents]
