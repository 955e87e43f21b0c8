"""A run made small, for certificates and for the order of calls: few ranks, stages, layers and microbatches.

Kept: what its stages, layers and targets are; which pipeline stages hold fewer layers, more or none; recompute.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from megatron_peft.config import ParallelConfig, RunConfig, is_targeted
from megatron_peft.config.parallel import stages_of_layout
from megatron_peft.models.families import family_of
from megatron_peft.models.shape import ModelShape

MOST_STAGES = 4


def kept_stages(num_stages: int) -> Sequence[int]:
    """Of so many pipeline stages, the first and the last ones that the small run has."""
    kept = min(num_stages, MOST_STAGES)
    return *range(kept - kept // 2), *range(num_stages - kept // 2, num_stages)


def shrink(
    config: RunConfig, shape: ModelShape, most_tensor_parallel: int, most_replicas: int, most_microbatches: int
) -> tuple[RunConfig, ModelShape]:
    """The small run: at most so many ranks on an axis, and microbatches a step. Its layers are as wide as before."""
    parallel, num_layers = small_layout(config.parallel, shape.num_layers, most_tensor_parallel, most_replicas)
    num_microbatches = min(config.num_microbatches, most_microbatches)
    if parallel.is_interleaved:
        num_microbatches -= num_microbatches % parallel.pipeline_model_parallel_size
    size = config.training.micro_batch_size * num_microbatches * parallel.data_parallel_size
    transformer: dict[str, Any] = {**config.model.transformer}
    if "recompute_num_layers" in transformer:
        transformer["recompute_num_layers"] = 1

    # Of a pattern for layers that the small model has not, the kinds of layers that it means.
    modules, targets = family_of(shape.architecture).modules, list[str]()
    names = [(layer, kind) for layer in range(shape.num_layers) for kind in shape.linear_layers(1)]
    for pattern in config.peft.target_modules:
        meant = [one for one in names if is_targeted("decoder.layers.{}.{}".format(*one), (pattern,), modules)]
        is_kept = any(layer < num_layers for layer, _ in meant)
        targets += [pattern] if is_kept else [kind.split(".")[-1] for _, kind in meant]
    small = replace(
        config,
        parallel=parallel,
        model=replace(config.model, transformer=transformer),
        peft=replace(config.peft, target_modules=tuple(dict.fromkeys(targets))),
        training=replace(config.training, global_batch_size=size),
    )
    full_attention = min(shape.num_full_attention_layers, num_layers)
    return small, replace(shape, num_layers=num_layers, num_full_attention_layers=full_attention)


def small_layout(
    parallel: ParallelConfig, num_layers: int, most_tensor_parallel: int, most_replicas: int
) -> tuple[ParallelConfig, int]:
    """The layout of the small run, and the number of layers of the model for it.

    Args:
        num_layers: of the run's model.
    """
    tp = min(parallel.tensor_model_parallel_size, most_tensor_parallel)
    pp = min(parallel.pipeline_model_parallel_size, MOST_STAGES)
    changed, layers = _small_stages(parallel, num_layers, pp)
    small = replace(
        parallel,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        world_size=tp * pp * min(parallel.data_parallel_size, most_replicas),
        distributed_backend="gloo",
        distributed_timeout_minutes=5,
        **changed,
    )
    return small, layers


def _small_stages(parallel: ParallelConfig, num_layers: int, pp: int) -> tuple[dict[str, Any], int]:
    """Changed fields of the layout, and the number of layers."""
    num_stages = parallel.pipeline_model_parallel_size
    if parallel.pipeline_model_parallel_layout is not None:  # the first and the last chunk of each rank
        stages = stages_of_layout(parallel.pipeline_model_parallel_layout)
        chunks = sorted({0, len(stages) // num_stages - 1})
        kept = [stages[chunk * num_stages + stage] for chunk in chunks for stage in kept_stages(num_stages)]
        layout = "|".join(kept).replace("tt", "t").replace("tt", "t")
        return {"pipeline_model_parallel_layout": layout}, layout.count("t")
    ends = {
        f"decoder_{name}_pipeline_num_layers": size
        for name in ("first", "last")
        if (size := getattr(parallel, f"decoder_{name}_pipeline_num_layers"))
    }
    if ends:  # stages in the middle have 2 layers; an end has 1, 2 or 3, as it has fewer, as many or more
        others = num_stages - len(ends)
        middle = (num_layers - sum(ends.values())) // others if others else min(ends.values())
        ends = {name: 2 + (size > middle) - (size < middle) for name, size in ends.items()}
        return ends, sum(ends.values()) + 2 * (pp - len(ends))
    virtual = parallel.num_virtual_stages(num_layers)
    accounted = parallel.num_divided(num_layers) - num_layers
    divided = pp * (min(virtual, 2) if virtual else 1)
    while divided - accounted < max(2, pp):
        divided += pp
    return ({"num_layers_per_virtual_pipeline_stage": 1} if virtual else {}), divided - accounted
