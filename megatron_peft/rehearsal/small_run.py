"""A small run of a large run's own shape: the model, layout, data and steps that a certificate starts for real.

Kept: the flags of the method and their numbers; gating, tied heads, biases, norms of queries and keys, position
embeddings; queries per key-value head; whether the vocabulary is padded; which pipeline stages hold fewer layers, more
or none; sequence parallelism, interleaving, packing and padding, recompute, precision, optimizer, the distributed
optimizer and overlap. Cut:

    tensor-parallel ranks, pipeline stages      at most 4 of each
    replicas                                    2, if there are several
    key-value heads of a rank                   at most 4
    head, hidden and MLP features               the smallest that the method's ranks and blocks fit
    vocabulary                                  one unit of --make-vocab-size-divisible-by (less 3, if padded)
    layers                                      one a virtual stage (two virtual stages a rank if interleaved)
    samples                                     microbatches of at most 2, at most 4 a step or twice the stages; an
                                                epoch ends within the four steps
    --seq-length                                48 tokens
    learning rates                              all times one number, without warmup and decay; --lr becomes 5e-3
    dropouts                                    0: layouts draw them differently
"""

import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megatron_peft.config import (
    CheckpointConfig,
    ConfigurationError,
    DataConfig,
    LoggingConfig,
    OptimizerSettings,
    ParallelConfig,
    PeftConfig,
    RunConfig,
    TrainingConfig,
)
from megatron_peft.models.families import check_adapters, config_of_shape, rules_for
from megatron_peft.models.rules import expected_tensors
from megatron_peft.models.shape import ModelShape
from megatron_peft.parallel.layout import generator_for
from megatron_peft.rehearsal.shrink import MOST_STAGES, shrink

MOST_TENSOR_PARALLEL, MOST_REPLICAS, MOST_KEY_HEADS = 4, 2, 4
NUM_STEPS = 4
SEQ_LENGTH = 48  # what 2, 3 and 4 ranks divide
LEARNING_RATE, FULL_LEARNING_RATE = 5e-3, 1e-3
EPOCH = 3  # steps; of packs about so many
SAMPLES_OF_A_PACK = 7 / 3
WIDTHS = (4, 8, 16, 32, 64, 128, 256, 512)
KEPT = {
    *("seed", "overlap_grad_reduce", "grad_reduce_in_bf16", "packing", "pad_to_seq_length"),
    *("optimizer", "weight_decay", "adam_beta1", "adam_beta2", "adam_eps", "sgd_momentum", "clip_grad"),
    *("use_distributed_optimizer", "overlap_param_gather"),
}
RECOMPUTE = ("recompute_granularity", "recompute_method", "recompute_num_layers", "distribute_saved_activations")


@dataclass(frozen=True)
class SmallRun:
    """A small run in the layout that is certified, and the same run in one process; both write under `folder`."""

    split: RunConfig
    alone: RunConfig
    shape: ModelShape


def small_run(config: RunConfig, shape: ModelShape, folder: Path) -> SmallRun:
    """The small run of a run, with its model and data, which are written.

    Args:
        config: of the run.
        shape: of its base model.
        folder: empty.

    Raises:
        ConfigurationError: no small model fits the method's numbers.
    """
    few = max(4, 2 * min(config.parallel.pipeline_model_parallel_size, MOST_STAGES))
    shrunk, of_few_layers = shrink(config, shape, MOST_TENSOR_PARALLEL, MOST_REPLICAS, few)
    parallel, num_layers = shrunk.parallel, of_few_layers.num_layers
    lr = LEARNING_RATE if config.peft.trains_adapters else FULL_LEARNING_RATE
    rate_scale, decoupled_lr = lr / config.optimizer.lr, config.optimizer.decoupled_lr
    peft = _peft(shrunk.peft, rate_scale)
    small = small_shape(shape, replace(config, peft=peft), parallel.tensor_model_parallel_size, num_layers)
    save_model(small, folder / "model")
    micro_batch_size = min(config.training.micro_batch_size, 2)
    size = micro_batch_size * shrunk.num_microbatches * parallel.data_parallel_size
    training = TrainingConfig(
        micro_batch_size=micro_batch_size,
        global_batch_size=size,
        train_iters=NUM_STEPS,
        eval_iters=NUM_STEPS,
        **_kept(config.training),
    )
    optimizer = OptimizerSettings(
        lr=lr,
        lr_decay_style="constant",
        decoupled_lr=decoupled_lr and decoupled_lr * rate_scale,
        **_kept(config.optimizer),
    )
    transformer = {name: value for name, value in shrunk.model.transformer.items() if "dropout" not in name}
    model = replace(
        config.model,
        pretrained_checkpoint=str(folder / "model"),
        shape_flags={},
        transformer=transformer | {"attention_dropout": 0.0, "hidden_dropout": 0.0},
        transformer_impl="local",
        attention_backend="auto",
    )
    split = RunConfig(
        parallel=parallel,
        model=model,
        peft=peft,
        data=_data(config.data, small, folder, size),
        training=training,
        optimizer=optimizer,
        checkpoint=CheckpointConfig(save=str(folder / "split"), async_save=config.checkpoint.async_save),
        logging=LoggingConfig(),
    )
    return SmallRun(split, _alone(split, folder), small)


def _kept(settings: TrainingConfig | OptimizerSettings | DataConfig) -> dict[str, Any]:
    return {name: value for name, value in vars(settings).items() if name in KEPT}


def _alone(split: RunConfig, folder: Path) -> RunConfig:
    """The same run in one process, with nothing that is sharded, recomputed or overlapped."""
    transformer = {name: value for name, value in split.model.transformer.items() if name not in RECOMPUTE}
    return replace(
        split,
        parallel=ParallelConfig(),
        model=replace(split.model, transformer=transformer, recompute_modules=()),
        training=replace(split.training, overlap_grad_reduce=False),
        optimizer=replace(split.optimizer, use_distributed_optimizer=False, overlap_param_gather=False),
        checkpoint=CheckpointConfig(save=str(folder / "alone")),
    )


def _peft(peft: PeftConfig, rate_scale: float) -> PeftConfig:
    """`rate_scale`: by which all learning rates are multiplied."""
    changes: dict[str, Any] = {"lora_dropout": 0.0, "lora_ga_batches": min(peft.lora_ga_batches, 2)}
    if peft.hybrid_merge_interval:
        changes["hybrid_merge_interval"] = min(peft.hybrid_merge_interval, 2)
    if peft.peft_lr_rotation and peft.urnn_update != "riemannian":  # whose rate is not a multiple of --lr
        changes["peft_lr_rotation"] = peft.peft_lr_rotation * rate_scale
    return replace(peft, **changes)


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
        shape,
        num_layers=num_layers,
        num_attention_heads=heads,
        num_query_groups=groups,
        vocab_size=unit - 3 * is_padded,
        num_full_attention_layers=min(shape.num_full_attention_layers, num_layers),
    )
    parallel = ParallelConfig(tensor_model_parallel_size=tensor_parallel, world_size=tensor_parallel)
    problems: list[str] = []
    for candidate in _widths(small):
        problems = check_adapters(config.peft, parallel, candidate)
        if not problems:
            return candidate
    raise ConfigurationError(f"no small model fits the run's method, so it cannot be certified: {problems[0]}")


def _widths(shape: ModelShape) -> Iterator[ModelShape]:
    """From narrow to wide. transformers takes hidden sizes that the heads divide; Bloom's heads have to fill it."""
    bound = shape.architecture == "bloom"  # hidden is heads x features, and the MLP four times that
    for head, width in product(WIDTHS, (0,) if bound else (1, 2, *WIDTHS)):
        hidden = (width or head) * shape.num_attention_heads
        if hidden >= 32:
            ffn = 4 * hidden if bound or not shape.gated_linear_unit else 2 * hidden
            yield replace(shape, kv_channels=head, hidden_size=hidden, ffn_hidden_size=ffn)


def save_model(shape: ModelShape, folder: Path) -> None:
    """Random weights of a shape, biases and norms too, as a Hugging Face folder."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config_of_shape(shape), indent=2) + "\n")
    tensors = {name: _draw(name, size) for name, size in expected_tensors(rules_for(shape)).items()}
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})


def _draw(name: str, size: tuple[int, ...]) -> torch.Tensor:
    generator = generator_for(0, name)
    if len(size) > 1:
        return torch.randn(*size, generator=generator) * (0.8 / sqrt(size[1]))
    if name.endswith("bias"):
        return 0.1 * torch.randn(*size, generator=generator)
    return 0.5 + torch.rand(*size, generator=generator)


# The data.


def _data(data: DataConfig, shape: ModelShape, folder: Path, batch_size: int) -> DataConfig:
    """Generated sequences for indexed data, else records; packed and padded as the run's."""
    made: Mapping[str, Any] = {"mock_data": True}
    if data.reads_records or not (data.mock_data or data.data_path or data.train_data_path):
        number = round(batch_size * EPOCH * (SAMPLES_OF_A_PACK if data.pack_sequences else 1))
        path = (str(save_records(folder / "data.jsonl", shape.vocab_size, number)),)
        made = {"train_data_path": path, "valid_data_path": path, "pack_sequences": data.pack_sequences}
    return DataConfig(
        **made,
        **_kept(data),
        seq_length=SEQ_LENGTH,
        tokenizer_type="NullTokenizer",
        vocab_size=shape.vocab_size - 1,
        num_workers=0,
    )


def save_records(path: Path, vocab_size: int, number: int) -> Path:
    """Prompts and completions of random ids, of many lengths."""
    draw = random.Random(0)

    def words(shortest: int, longest: int) -> str:
        return " ".join(str(draw.randrange(vocab_size - 1)) for _ in range(draw.randint(shortest, longest)))

    pairs = [{"prompt": words(2, 12), "completion": " " + words(3, 24)} for _ in range(number)]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return path
