"""What --pretrained-checkpoint may be: a Hugging Face folder, or a base model in Megatron's own form."""

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_peft.checkpoint.folders import MANIFEST, RECORD, megatron_files
from megatron_peft.checkpoint.load import require_whole
from megatron_peft.checkpoint.record import read_record
from megatron_peft.config import ConfigurationError, RunConfig, require
from megatron_peft.conversion.hf_files import CONFIG, Source, check_inventory, open_source, stored_type
from megatron_peft.conversion.megatron_weights import open_megatron, shape_of_arguments
from megatron_peft.conversion.writer import byte_bar
from megatron_peft.models.families import read_shape, rules_for
from megatron_peft.models.rules import Rule, expected_tensors
from megatron_peft.models.shape import ModelShape, check_layout, check_lengths, compare_shape

OUTPUT, EMBEDDING = "output_layer.weight", "embedding.word_embeddings.weight"


class Weights(Protocol):
    """An open base model."""

    @property
    def bytes_read(self) -> int:
        """So far, in the stored types."""
        ...

    def read(self, rule: Rule, local: Tensor, rank: int, size: int) -> None:
        """Fill a tensor-parallel rank's local tensor in place, in its own dtype and on its own device."""
        ...

    def stored_type(self, rule: Rule) -> torch.dtype:
        """In which a parameter is stored; of tensors that are fused, the wider type."""
        ...


class HuggingFaceWeights:
    """Those of a `Source`."""

    def __init__(self, source: Source) -> None:
        self._source = source

    @property
    def bytes_read(self) -> int:
        return self._source.bytes_read

    def read(self, rule: Rule, local: Tensor, rank: int, size: int) -> None:
        rule.read(local, self._source, rank, size)

    def stored_type(self, rule: Rule) -> torch.dtype:
        types = (stored_type(self._source.headers[part.name].dtype) for part in rule.parts)
        return reduce(torch.promote_types, types)


def read_model_shape(folder: str | Path) -> ModelShape:
    """Shape of the base model in `folder`, from its config.json, a run's record or Megatron-LM's arguments.

    Raises:
        ConfigurationError: it is no folder of a model, or of one that is not supported.
    """
    files = megatron_files(folder)
    if files is None:
        return read_shape(folder)
    described = next((place for place in (files, Path(folder)) if (place / CONFIG).is_file()), None)
    if described is not None:
        return read_shape(described)
    if (files / RECORD).is_file():
        return read_record(files).shape
    return shape_of_arguments(open_megatron(files).arguments(), str(files))


def open_weights(folder: str | Path, shape: ModelShape) -> tuple[dict[str, Rule], Weights]:
    """The rules of every parameter, and the weights that they read. Everything is checked, no weight is read yet.

    Raises:
        ConfigurationError: missing, extra or misshapen tensors; torn files; a folder of adapters.
    """
    files = megatron_files(folder)
    if files is None:
        source = open_source(folder)
        require(
            len(source.headers) >= shape.num_layers,  # rules of so many layers would take minutes
            f"the tensors in {folder} do not fit its config.json: {len(source.headers)} tensors, {shape.num_layers:,} "
            "layers.",
        )
        rules = rules_for(shape, source.headers)
        check_inventory(source, expected_tensors(rules), shape.tied_embeddings)
        return rules, HuggingFaceWeights(source)
    weights = open_megatron(files)
    rules = rules_for(shape)
    weights.check(owned_rules(rules, shape))
    if shape.tied_embeddings:  # the last pipeline stage has its own copy
        rules[OUTPUT] = replace(rules[OUTPUT], name=EMBEDDING)
    return rules, weights


def owned_rules(rules: Mapping[str, Rule], shape: ModelShape) -> dict[str, Rule]:
    """Those of the parameters that a whole model owns: a tied output layer is the embedding."""
    return {name: rule for name, rule in rules.items() if not (shape.tied_embeddings and name == OUTPUT)}


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


def checked_shape(config: RunConfig) -> ModelShape:
    """The shape of the base model. ConfigurationError: what contradicts the flags or the layout, or is not there."""
    base = config.model.pretrained_checkpoint
    assert base is not None
    shape = read_model_shape(base)
    if dist.get_rank() == 0:  # each rank opens them again to load its part: the headers of 405B are many
        open_weights(base, shape)
    problems = [
        *compare_shape(config.model.shape_flags, shape),
        *check_layout(config.parallel, shape),
        *check_lengths(config.data.seq_length, shape),
    ]
    if problems:
        raise ConfigurationError(*problems)
    return shape


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
