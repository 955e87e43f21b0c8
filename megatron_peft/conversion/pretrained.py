"""What --pretrained-checkpoint may be: a Hugging Face folder, or a base model in Megatron's own form."""

from collections.abc import Mapping
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megatron_peft.checkpoint.folders import RECORD, megatron_files
from megatron_peft.checkpoint.record import read_record
from megatron_peft.config import require
from megatron_peft.conversion.companions import CONFIG
from megatron_peft.conversion.hf_files import Source, open_source
from megatron_peft.conversion.inventory import check_inventory
from megatron_peft.conversion.legacy_arguments import shape_of_arguments
from megatron_peft.conversion.megatron_weights import open_megatron
from megatron_peft.conversion.stored_types import stored_type
from megatron_peft.models.families import read_shape, rules_for
from megatron_peft.models.rules import Rule, expected_tensors
from megatron_peft.models.shape import ModelShape

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
