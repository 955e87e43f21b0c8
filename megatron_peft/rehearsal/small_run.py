"""A small run of a large run's own shape: the model, layout, data and steps that a certificate starts for real.

docs/certify.md lists what is kept and what is cut. `make_small` cuts ranks, stages, layers and microbatches alone, for
the order of calls too.
"""

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import lcm, sqrt
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megatron_peft.config import (
    CheckpointConfig,
    ConfigurationError,
    DataConfig,
    ParallelConfig,
    RunConfig,
    is_targeted,
    make_run,
)
from megatron_peft.config.training import stages_of_layout
from megatron_peft.models.families import check_adapters, config_of_shape, family_of, rules_for
from megatron_peft.models.rules import expected_tensors
from megatron_peft.models.shape import ModelShape
from megatron_peft.parallel.layout import generator_for
from megatron_peft.rehearsal.requests import of_num_layers, one_layer_recomputed

MOST_TENSOR_PARALLEL, MOST_STAGES, MOST_REPLICAS, MOST_KEY_HEADS = 4, 4, 2, 4
NUM_STEPS = 4
SEQ_LENGTH = 48  # what 2, 3, 4, 8 and 16 ranks divide; others have a multiple
LEARNING_RATE, FULL_LEARNING_RATE = 5e-3, 1e-3
EPOCH = 3  # steps; of packs about so many
SAMPLES_OF_A_PACK = 7 / 3
WIDTHS = (4, 8, 16, 32, 64, 128, 256, 512)
KEPT = {  # of training, optimizer and data
    *("seed", "overlap_grad_reduce", "grad_reduce_in_bf16", "packing", "pad_to_seq_length"),
    *("optimizer", "weight_decay", "adam_beta1", "adam_beta2", "adam_eps", "sgd_momentum", "clip_grad"),
    *("use_distributed_optimizer", "overlap_param_gather"),
}
RECOMPUTE = ("recompute_granularity", "recompute_method", "recompute_num_layers", "distribute_saved_activations")


@dataclass(frozen=True)
class SmallRun:
    """A small run in the layout that is certified, and the same run in one process, which saves nothing."""

    split: RunConfig
    alone: RunConfig
    shape: ModelShape


def small_run(
    config: RunConfig, shape: ModelShape, folder: Path, most_tensor_parallel: int = MOST_TENSOR_PARALLEL
) -> SmallRun:
    """The small run of a run, with its model and data, which are written to the empty `folder`.

    Raises:
        ConfigurationError: no small model fits the method's numbers.
    """
    few = max(4, 2 * min(config.parallel.pipeline_model_parallel_size, MOST_STAGES))
    shrunk, of_few_layers = make_small(config, shape, most_tensor_parallel, MOST_REPLICAS, few)
    parallel, tp = shrunk.parallel, shrunk.parallel.tensor_model_parallel_size
    lr = LEARNING_RATE if config.peft.trains_adapters else FULL_LEARNING_RATE
    rate_scale, decoupled_lr = lr / config.optimizer.lr, config.optimizer.decoupled_lr
    # Layouts draw dropouts differently.
    changes: dict[str, Any] = {"lora_dropout": 0.0, "lora_ga_batches": min(config.peft.lora_ga_batches, 2)}
    if config.peft.hybrid_merge_interval:
        changes["hybrid_merge_interval"] = min(config.peft.hybrid_merge_interval, 2)
    if config.peft.peft_lr_rotation and config.peft.urnn_update != "riemannian":  # whose is not a multiple of --lr
        changes["peft_lr_rotation"] = config.peft.peft_lr_rotation * rate_scale
    peft = replace(shrunk.peft, **changes)
    small = small_shape(shape, replace(config, peft=peft), tp, of_few_layers.num_layers)
    save_model(small, folder / "model")
    micro_batch_size = min(config.training.micro_batch_size, 2)
    size = micro_batch_size * shrunk.num_microbatches * parallel.data_parallel_size
    transformer = {name: value for name, value in shrunk.model.transformer.items() if "dropout" not in name}
    sections = (config.data, config.optimizer, config.training)
    values = {
        **{name: value for section in sections for name, value in vars(section).items() if name in KEPT},
        **vars(parallel),
        **vars(config.model),
        **vars(peft),
        **_data(config.data, small, folder, size),
        "pretrained_checkpoint": str(folder / "model"),
        "shape_flags": {},
        "transformer": transformer | {"attention_dropout": 0.0, "hidden_dropout": 0.0},
        "transformer_impl": "local",
        "attention_backend": "auto",
        "seq_length": lcm(SEQ_LENGTH, tp),
        "micro_batch_size": micro_batch_size,
        "global_batch_size": size,
        "train_iters": NUM_STEPS,
        "eval_iters": NUM_STEPS,
        "lr": lr,
        "lr_decay_style": "constant",
        "decoupled_lr": decoupled_lr and decoupled_lr * rate_scale,
        "save": str(folder / "split"),
        "async_save": config.checkpoint.async_save,
    }
    # In one process, with nothing that is sharded, recomputed or overlapped.
    of_one = {
        **vars(ParallelConfig()),
        "transformer": {name: one for name, one in values["transformer"].items() if name not in RECOMPUTE},
        "recompute_modules": (),
        **dict.fromkeys(("overlap_grad_reduce", "use_distributed_optimizer", "overlap_param_gather"), False),
        **vars(CheckpointConfig()),
    }
    return SmallRun(make_run(**values), make_run(**values | of_one), small)


def wide_run(config: RunConfig, shape: ModelShape, folder: Path) -> SmallRun | None:
    """The small run once more, on all tensor-parallel ranks of the run: one stage, one replica, nothing saved.

    None: the small run has as many.
    """
    parallel, ranks = config.parallel, config.parallel.tensor_model_parallel_size
    if ranks <= MOST_TENSOR_PARALLEL:
        return None
    wide = ParallelConfig(ranks, sequence_parallel=parallel.sequence_parallel, world_size=ranks)
    found = small_run(replace(config, parallel=wide), shape, folder, ranks)
    return replace(found, split=replace(found.split, checkpoint=CheckpointConfig()))


# Ranks, stages, layers and microbatches.


def kept_stages(num_stages: int) -> Sequence[int]:
    """The stages that the small run has: the first and the last of so many."""
    kept = min(num_stages, MOST_STAGES)
    return *range(kept - kept // 2), *range(num_stages - kept // 2, num_stages)


def make_small(
    config: RunConfig, shape: ModelShape, most_tensor_parallel: int, most_replicas: int, most_microbatches: int
) -> tuple[RunConfig, ModelShape]:
    """A run with at most so many ranks on an axis and microbatches a step, and few layers, as wide as before."""
    parallel, num_layers = small_layout(config.parallel, shape.num_layers, most_tensor_parallel, most_replicas)
    num_microbatches = min(config.num_microbatches, most_microbatches)
    if parallel.is_interleaved:
        num_microbatches -= num_microbatches % parallel.pipeline_model_parallel_size
    size = config.training.micro_batch_size * num_microbatches * parallel.data_parallel_size
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
        model=replace(config.model, transformer=one_layer_recomputed(config)),
        peft=replace(config.peft, target_modules=tuple(dict.fromkeys(targets))),
        training=replace(config.training, global_batch_size=size),
    )
    return small, of_num_layers(shape, num_layers)


def small_layout(
    parallel: ParallelConfig, num_layers: int, most_tensor_parallel: int, most_replicas: int
) -> tuple[ParallelConfig, int]:
    """The layout of the small run, and the number of layers of the model for it; the run's model has `num_layers`."""
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
        layout = re.sub("t+", "t", "|".join(kept))
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


# The model.


def small_shape(shape: ModelShape, config: RunConfig, tensor_parallel: int, num_layers: int) -> ModelShape:
    """The narrowest model of the shape that the method's numbers fit at `tensor_parallel` ranks.

    Raises:
        ConfigurationError: none up to WIDTHS fits.
    """
    run_tp = config.parallel.tensor_model_parallel_size
    multiple = config.model.make_vocab_size_divisible_by
    unit = max(multiple * tensor_parallel, 256)
    is_padded = shape.padded_vocab_size(multiple, run_tp) > shape.vocab_size
    groups = min(shape.num_query_groups // run_tp or 1, MOST_KEY_HEADS) * tensor_parallel
    heads = groups * (shape.num_attention_heads // shape.num_query_groups)
    small = replace(
        of_num_layers(shape, num_layers),
        num_attention_heads=heads,
        num_query_groups=groups,
        vocab_size=unit - 3 * is_padded,
    )
    parallel = ParallelConfig(tensor_parallel, world_size=tensor_parallel)
    problems: list[str] = []
    # From narrow to wide. transformers takes hidden sizes that the heads divide; Bloom's heads have to fill it, and its
    # MLP is four times as wide.
    bound = shape.architecture == "bloom"
    for head, width in product(WIDTHS, (0,) if bound else (1, 2, *WIDTHS)):
        hidden = (width or head) * heads
        ffn = 4 * hidden if bound or not shape.gated_linear_unit else 2 * hidden
        candidate = replace(small, kv_channels=head, hidden_size=hidden, ffn_hidden_size=ffn)
        problems = check_adapters(config.peft, parallel, candidate)
        if hidden >= 32 and not problems:
            return candidate
    raise ConfigurationError(f"no small model fits the run's method, so it cannot be certified: {problems[0]}")


def save_model(shape: ModelShape, folder: Path) -> None:
    """Random weights of a shape, biases and norms too, as a Hugging Face folder."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config_of_shape(shape), indent=2) + "\n")
    tensors: dict[str, torch.Tensor] = {}
    for name, size in expected_tensors(rules_for(shape)).items():
        generator = generator_for(0, name)
        if len(size) > 1:
            tensors[name] = torch.randn(*size, generator=generator) * (0.8 / sqrt(size[1]))
        elif name.endswith("bias"):
            tensors[name] = 0.1 * torch.randn(*size, generator=generator)
        else:
            tensors[name] = 0.5 + torch.rand(*size, generator=generator)
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})


def _data(data: DataConfig, shape: ModelShape, folder: Path, batch_size: int) -> dict[str, Any]:
    """Fields of the data: generated sequences for indexed data, else prompts and completions of random ids, of many
    lengths."""
    tokenizer = {"tokenizer_type": "NullTokenizer", "vocab_size": shape.vocab_size - 1, "num_workers": 0}
    if not data.reads_records and (data.mock_data or data.data_path or data.train_data_path):
        return {"mock_data": True, **tokenizer}
    draw = random.Random(0)

    def words(shortest: int, longest: int) -> str:
        return " ".join(str(draw.randrange(shape.vocab_size - 1)) for _ in range(draw.randint(shortest, longest)))

    number = round(batch_size * EPOCH * (SAMPLES_OF_A_PACK if data.pack_sequences else 1))
    pairs = [{"prompt": words(2, 12), "completion": " " + words(3, 24)} for _ in range(number)]
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    paths = {"train_data_path": (str(path),), "valid_data_path": (str(path),)}
    return {**paths, "pack_sequences": data.pack_sequences, **tokenizer}
