"""Pretrained weights straight into the chunks of a GPTModel: each rank reads its own slices, one at a time."""

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from megatron_peft.checkpoint.folders import MANIFEST, megatron_files
from megatron_peft.checkpoint.load import require_whole
from megatron_peft.config import ConfigurationError, require
from megatron_peft.conversion.pretrained import open_weights
from megatron_peft.conversion.progress import byte_bar
from megatron_peft.models.rules import Rule
from megatron_peft.models.shape import ModelShape

LOCAL_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")


@dataclass(frozen=True)
class LoadReport:
    """What one rank read: bytes in the stored type, parameters filled, wall seconds."""

    bytes_read: int
    num_tensors: int
    seconds: float


@dataclass(frozen=True)
class Target:
    """A parameter to fill, and its rule."""

    rule: Rule
    parameter: nn.Parameter


def load_pretrained(
    model_chunks: Sequence[nn.Module],
    folder: str | Path,
    shape: ModelShape,
    *,
    tensor_parallel_rank: int,
    tensor_parallel_size: int,
    progress: bool,
) -> LoadReport:
    """Fill the base parameters of each chunk in place, in their own dtype; adapters are left alone.

    `folder` is a Hugging Face folder or a base model in Megatron's own form, and `shape` what `read_model_shape` says.
    The chunks are bare GPTModels (before Float16Module and DDP). Everything is compared with the headers of the files
    first, so a ConfigurationError (missing, extra, misshapen or truncated tensors, a parameter without a rule) comes
    before a weight is read. A run that is a base is compared with its manifest, each rank its share of the files: a
    collective of all ranks. `progress` shows a bar at a terminal, and nothing elsewhere.
    """
    start = time.perf_counter()
    files = megatron_files(folder)
    if files is not None and (files / MANIFEST).is_file():
        require_whole(files)
    rules, weights = open_weights(folder, shape)
    targets = [target for chunk in model_chunks for target in _targets(chunk, rules, tensor_parallel_size)]
    with byte_bar("Loading weights", sum(_num_bytes(target.parameter) for target in targets), progress) as advance:
        for target in targets:
            weights.read(target.rule, target.parameter, tensor_parallel_rank, tensor_parallel_size)
            advance(_num_bytes(target.parameter))
    return LoadReport(weights.bytes_read, len(targets), time.perf_counter() - start)


def base_parameters(chunk: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters of the pretrained model by global name: adapters left out, layers numbered over all stages."""
    for name, parameter in chunk.named_parameters():
        if ".adapter." not in name:
            yield LOCAL_LAYER.sub(lambda match: f"decoder.layers.{_global_layer(chunk, match)}.", name), parameter


def _global_layer(chunk: nn.Module, match: re.Match[str]) -> int:
    """From 0; megatron-core numbers its layers over all stages from 1."""
    layer: Any = chunk.get_submodule(match.group().rstrip("."))
    return layer.layer_number - 1


def _targets(chunk: nn.Module, rules: Mapping[str, Rule], size: int) -> Iterator[Target]:
    for name, parameter in base_parameters(chunk):
        rule = rules.get(name)
        if rule is None:
            raise ConfigurationError(
                f"{name} {list(parameter.shape)} is part of the model, but no tensor of the checkpoint holds it: "
                f"the model was built with another shape than that of --pretrained-checkpoint."
            )
        require(
            rule.accepts(parameter.shape, size),
            f"{name} is {list(parameter.shape)} on a rank, but --pretrained-checkpoint gives "
            f"{list(rule.local_shape(size))} at --tensor-model-parallel-size {size}.",
        )
        yield Target(rule, parameter)


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
