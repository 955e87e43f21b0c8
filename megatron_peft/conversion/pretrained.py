"""Open and load --pretrained-checkpoint: a Hugging Face folder or a base model in Megatron's format."""

import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_peft.checkpoint.folders import INDEX, MANIFEST, RECORD, megatron_files
from megatron_peft.checkpoint.load import require_whole
from megatron_peft.checkpoint.record import fingerprint, read_record
from megatron_peft.config import ConfigurationError, RunConfig, require
from megatron_peft.conversion.hf_files import CONFIG, ReadCounts, check_inventory, open_source
from megatron_peft.conversion.megatron_weights import open_megatron, shape_of_arguments
from megatron_peft.conversion.shared_reading import ALONE, ReadingGroups, fill_parameters
from megatron_peft.conversion.writer import byte_bar
from megatron_peft.models.families import read_shape, rules_for
from megatron_peft.models.rules import RowRange, Rule, expected_tensors
from megatron_peft.models.shape import ModelShape, check_layout, check_lengths, compare_shape
from megatron_peft.parallel.collectives import from_first_rank, require_same
from megatron_peft.runtime.launch import checked_together, place_on_node

OUTPUT, EMBEDDING = "output_layer.weight", "embedding.word_embeddings.weight"


class Weights(Protocol):
    """An open base model."""

    counts: ReadCounts

    def read(self, rule: Rule, local: Tensor, rank: int, size: int) -> None:
        """Fill a tensor-parallel rank's local tensor in place, in its own dtype and on its own device."""
        ...

    def read_rows(self, rule: Rule, rows: RowRange, target: Tensor) -> None:
        """Fill `target` with some rows of a parameter, in its own dtype and on its own device."""
        ...

    def stored_type(self, rule: Rule) -> torch.dtype:
        """Type of a parameter; the wider one if the rule fuses tensors of several types."""
        ...

    def place(self, rule: Rule) -> tuple[str, int]:
        """File and first byte of a parameter, or of its first part: parameters are read in this order."""
        ...

    def holds_whole_rows(self, rule: Rule, dtype: torch.dtype) -> bool:
        """Whether rows of a matrix, read in `dtype`, are contiguous in the files, and columns are strided."""
        ...


def read_model_shape(folder: str | Path) -> ModelShape:
    """Shape of the base model in `folder`, from its config.json, a run's record or Megatron-LM's arguments.

    Raises:
        ConfigurationError: it is not the folder of a supported model.
    """
    files = megatron_files(folder)
    if files is None:
        return read_shape(folder)
    with_config = next((place for place in (files, Path(folder)) if (place / CONFIG).is_file()), None)
    if with_config is not None:
        return read_shape(with_config)
    if (files / RECORD).is_file():
        return read_record(files).shape
    return shape_of_arguments(open_megatron(files).arguments(), str(files))


def open_weights(folder: str | Path, shape: ModelShape) -> tuple[dict[str, Rule], Weights]:
    """The rule of every parameter, by name, and the weights. Headers are checked; no weight is read yet.

    Raises:
        ConfigurationError: missing, extra or misshapen tensors, torn files, or a folder of adapters.
    """
    files = megatron_files(folder)
    if files is None:
        source = open_source(folder)
        require(
            len(source.headers) >= shape.num_layers,  # a wrong number of layers could take minutes
            f"the tensors in {folder} do not fit its config.json: {len(source.headers)} tensors, {shape.num_layers:,} "
            "layers.",
        )
        rules = rules_for(shape, source.headers)
        check_inventory(source, expected_tensors(rules), shape.tied_embeddings)
        return rules, source
    weights = open_megatron(files)
    rules = rules_for(shape)
    weights.check(owned_rules(rules, shape))
    if shape.tied_embeddings:  # the last pipeline stage has its own copy
        rules[OUTPUT] = replace(rules[OUTPUT], name=EMBEDDING)
    return rules, weights


def owned_rules(rules: Mapping[str, Rule], shape: ModelShape) -> dict[str, Rule]:
    """Rules of all parameters except a tied output layer, which is the embedding."""
    return {name: rule for name, rule in rules.items() if not (shape.tied_embeddings and name == OUTPUT)}


LOCAL_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")


@dataclass(frozen=True)
class LoadReport:
    """What one rank read, the number of its parameters (some may come from other ranks), wall seconds."""

    counts: ReadCounts
    num_tensors: int
    seconds: float


def checked_shape(config: RunConfig) -> ModelShape:
    """Shape of the base model. ConfigurationError if it is missing, or contradicts the flags or the layout."""
    base = config.model.pretrained_checkpoint
    assert base is not None
    shape = read_model_shape(base)
    if dist.get_rank() == 0:  # each rank opens them again when it loads
        open_weights(base, shape)
    problems = [
        *compare_shape(config.model.shape_flags, shape),
        *check_layout(config.parallel, shape),
        *check_lengths(config.data, shape),
    ]
    if problems:
        raise ConfigurationError(*problems)
    return shape


def known_fingerprint(base: str | Path) -> Mapping[str, str] | None:
    """Fingerprint of a base model's folder; None if it has no files to take it from (checkpoints of ranks)."""
    try:
        return fingerprint(str(base))
    except OSError:
        return None


def require_same_model(folder: str | Path) -> None:
    """Raise ConfigurationError on every rank if a node has another model in `folder` than the first one.

    A collective. One rank of each node opens its files; every rank does where the launcher does not tell nodes apart.
    """
    looks = "LOCAL_WORLD_SIZE" not in os.environ or place_on_node().rank == 0
    own = known_fingerprint(folder) or {} if looks else None
    require_same(own, f"--pretrained-checkpoint {folder}", "another model")


def load_pretrained(
    model_chunks: Sequence[nn.Module],
    folder: str | Path,
    shape: ModelShape,
    *,
    tensor_parallel_rank: int,
    tensor_parallel_size: int,
    progress: bool,
    groups: ReadingGroups = ALONE,
) -> LoadReport:
    """Fill the base parameters of each chunk in place, in their own dtype. Adapters keep their values.

    A collective of all ranks, where there are several. The first one alone reads and checks the headers, and sends
    them. One rank of each other node looks whether its files are the same.

    Args:
        model_chunks: bare GPTModels (before Float16Module and DDP).
        folder: a Hugging Face folder or a base model in Megatron's format.
        shape: of the model, from `read_model_shape`.
        progress: show a bar at a terminal.
        groups: of ranks that read for one another; by default each rank reads its own slices.

    Raises:
        ConfigurationError: on every rank. Before a weight is read, for missing, extra, misshapen or truncated tensors
            and for a parameter without a rule; after that, for a file that cannot be read or is damaged.
    """
    start = time.perf_counter()
    files = megatron_files(folder)
    if files is not None and (files / MANIFEST).is_file():
        require_whole(files)
    require_same_model(folder)
    rules, weights = _open_together(folder, shape)
    to_fill = checked_together(
        lambda: [pair for chunk in model_chunks for pair in _with_rules(chunk, rules, tensor_parallel_size)]
    )
    to_fill.sort(key=lambda pair: weights.place(pair[0]))
    with byte_bar("Loading weights", sum(parameter.nbytes for _, parameter in to_fill), progress) as advance:
        fill_parameters(to_fill, weights, tensor_parallel_rank, tensor_parallel_size, groups, advance)
    return LoadReport(weights.counts, len(to_fill), time.perf_counter() - start)


def _open_together(folder: str | Path, shape: ModelShape) -> tuple[dict[str, Rule], Weights]:
    """`open_weights` on the first rank, on all ranks. Old files of ranks hold mapped tensors: each rank opens them."""
    files = megatron_files(folder)
    if files is not None and not (files / INDEX).is_file():
        return checked_together(lambda: open_weights(folder, shape))
    rules, weights = from_first_rank(lambda: open_weights(folder, shape))
    if dist.is_initialized() and dist.get_rank() > 0:
        weights.counts = ReadCounts()  # it received the first rank's
    return rules, weights


def base_parameters(chunk: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters of the pretrained model, without adapters, by names that number layers over all stages."""
    for name, parameter in chunk.named_parameters():
        if ".adapter." not in name:
            yield LOCAL_LAYER.sub(lambda match: f"decoder.layers.{_global_layer(chunk, match)}.", name), parameter


def _global_layer(chunk: nn.Module, match: re.Match[str]) -> int:
    layer: Any = chunk.get_submodule(match.group().rstrip("."))
    return layer.layer_number - 1  # megatron-core counts from 1


def _with_rules(chunk: nn.Module, rules: Mapping[str, Rule], size: int) -> Iterator[tuple[Rule, nn.Parameter]]:
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
        yield rule, parameter
