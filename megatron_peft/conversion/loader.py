"""Hugging Face weights straight into the chunks of a GPTModel: each rank reads its own slices, one at a time."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from torch import Tensor, nn

from megatron_peft.config import ConfigurationError, require
from megatron_peft.conversion.families import rules_for
from megatron_peft.conversion.inventory import check_inventory
from megatron_peft.conversion.rules import Rule, expected_tensors
from megatron_peft.conversion.source import open_source
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

    The chunks are bare GPTModels (before Float16Module and DDP). Everything is compared with the headers of the files
    first, so a ConfigurationError (missing, extra, misshapen or truncated tensors, a parameter without a rule) comes
    before a weight is read. `progress` shows a bar at a terminal, and nothing elsewhere.
    """
    start = time.perf_counter()
    source = open_source(folder)
    rules = rules_for(shape, source.headers)
    check_inventory(source, expected_tensors(rules), shape.tied_embeddings)
    targets = [target for chunk in model_chunks for target in _targets(chunk, rules, tensor_parallel_size)]
    for target in _with_bar(targets, enabled=progress):
        target.rule.read(target.parameter, source, tensor_parallel_rank, tensor_parallel_size)
    return LoadReport(source.bytes_read, len(targets), time.perf_counter() - start)


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
                f"{name} {list(parameter.shape)} is part of the model, but no Hugging Face tensor holds it: "
                f"the model was built with another shape than that of --pretrained-checkpoint."
            )
        require(
            rule.accepts(parameter.shape, size),
            f"{name} is {list(parameter.shape)} on a rank, but --pretrained-checkpoint gives "
            f"{list(rule.local_shape(size))} at --tensor-model-parallel-size {size}.",
        )
        yield Target(rule, parameter)


def _with_bar(targets: Sequence[Target], enabled: bool) -> Iterator[Target]:
    """The targets one by one, with a bar over their bytes."""
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    shown = enabled and console.is_terminal
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=not shown) as bar:
        task = bar.add_task("Loading weights", total=sum(_num_bytes(t.parameter) for t in targets))
        for target in targets:
            yield target
            bar.advance(task, _num_bytes(target.parameter))


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
