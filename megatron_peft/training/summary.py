"""What will be trained, in a few lines: modules, parameters of the whole model, bytes on a rank."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import nn

from megatron_peft.adapters.attach import huggingface_modules
from megatron_peft.config import RunConfig

_MIB = 2**20
_FLOAT32_BYTES = 4


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters of the whole model, each global parameter counted once."""

    trainable: int
    total: int


def count_parameters(model_chunks: Sequence[nn.Module]) -> ParameterCounts:
    """Count over the tensor- and pipeline-parallel ranks. A collective: every rank must call it."""
    local = [0, 0]
    for parameter in _once(model_chunks):
        local[0] += parameter.numel() * parameter.requires_grad
        local[1] += parameter.numel()
    counts = torch.tensor(local, dtype=torch.int64, device=torch.cuda.current_device())
    group: Any = parallel_state.get_model_parallel_group()  # for types: never torch's mark of a rank outside it
    dist.all_reduce(counts, group=group)
    return ParameterCounts(*counts.tolist())


def _once(model_chunks: Sequence[nn.Module]) -> Iterator[nn.Parameter]:
    """This rank's share of the parameters such that the shares add up to the whole model."""
    counts_replicated = parallel_state.get_tensor_model_parallel_rank() == 0
    for chunk in model_chunks:
        for parameter in chunk.parameters():
            is_copy_of_embedding = getattr(parameter, "shared", False)  # a tied output layer on the last stage
            is_split = getattr(parameter, "tensor_model_parallel", False)
            if not is_copy_of_embedding and (is_split or counts_replicated):
                yield parameter


def training_summary(
    config: RunConfig, adapted: Sequence[str], counts: ParameterCounts, model_chunks: Sequence[nn.Module]
) -> str:
    """A few lines for the terminal.

    Args:
        adapted: global names of the adapted layers of the whole model.
        counts: of the whole model.
        model_chunks: this rank's, for its bytes.
    """
    lines = [f"--peft-method {config.peft.method}: {_modules(config, adapted, huggingface_modules(model_chunks))}"]
    if config.peft.urnn_mode == "replace":
        lines.append(
            "WARNING: --urnn-mode replace DISCARDS the pretrained weights of these layers: unitary ones stand in their "
            "place, and the model starts as another one."
        )
    share = 100 * counts.trainable / max(counts.total, 1)
    lines.append(f"trainable parameters: {counts.trainable:,} of {counts.total:,} ({share:.3f}%)")
    weights, gradients, moments = rank_bytes(config, model_chunks)
    lines.append(
        f"bytes on this rank: weights {weights / _MIB:,.1f} MiB, gradients {gradients / _MIB:,.1f} MiB, "
        f"optimizer {moments / _MIB:,.1f} MiB"
    )
    return "\n".join(lines)


def _modules(config: RunConfig, adapted: Sequence[str], parts: Mapping[str, str]) -> str:
    if not config.peft.trains_adapters:
        return "every parameter of the model"
    kinds = Counter(name.rpartition(".")[2] for name in adapted)
    listed = ", ".join(f"{kind} ({count})" for kind, count in sorted(kinds.items()))
    fused = [
        f"{name} is part of {parts[name]}, which is adapted whole"
        for name in config.peft.target_modules
        if name in parts and list(parts.values()).count(parts[name]) > 1
    ]
    return f"{len(adapted)} layers: {listed}" + "".join(f"\nnote: {line}" for line in fused)


def rank_bytes(config: RunConfig, model_chunks: Sequence[nn.Module]) -> tuple[int, int, int]:
    """(weights, gradients, optimizer state) of this rank in bytes.

    Gradients are summed in float32 under --bf16. Adam keeps two float32 moments, and under --bf16 a float32 master;
    --use-distributed-optimizer splits these over the data-parallel ranks.
    """
    parameters = [parameter for chunk in model_chunks for parameter in chunk.parameters()]
    weights = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    trainable = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    copies = (2 if config.optimizer.optimizer == "adam" else 1) + config.model.bf16
    shards = config.parallel.data_parallel_size if config.optimizer.use_distributed_optimizer else 1
    return weights, trainable * _FLOAT32_BYTES, trainable * _FLOAT32_BYTES * copies // shards


def say(text: str) -> None:
    """Print on rank 0."""
    if dist.get_rank() == 0:
        print(text, flush=True)
