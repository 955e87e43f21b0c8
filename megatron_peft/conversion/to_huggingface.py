"""Write a base model in Megatron's format, or the whole model of a run, as a Hugging Face folder."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_peft.checkpoint.folders import MANIFEST, RECORD, damage, megatron_files
from megatron_peft.checkpoint.record import read_record
from megatron_peft.config import ConfigurationError, require
from megatron_peft.conversion.hf_files import CONFIG, copy_small_files, set_stored_type, write_config
from megatron_peft.conversion.pretrained import Weights, open_weights, owned_rules, read_model_shape
from megatron_peft.conversion.writer import (
    DEFAULT_SHARD_BYTES,
    SafetensorsWriter,
    TensorSpec,
    byte_bar,
    check_new,
    new_folder,
)
from megatron_peft.models.families import config_of_shape
from megatron_peft.models.rules import Rule
from megatron_peft.models.shape import ModelShape

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Contents:
    """Contents of a Hugging Face folder.

    Args:
        shape: of the model.
        rules: of every parameter that the model owns, by name.
        types: of the written parameters, by the same names.
        tensors: returns the Hugging Face tensors of one parameter; called once for each rule, in order.
        origins: folders to search for the model's config.json and tokenizer, in order.
    """

    shape: ModelShape
    rules: Mapping[str, Rule]
    types: Mapping[str, torch.dtype]
    tensors: Callable[[Rule], Mapping[str, Tensor]]
    origins: Iterable[Path]

    def specs(self) -> dict[str, TensorSpec]:
        """Shape and type of every Hugging Face tensor."""
        return {
            tensor.name: TensorSpec(tensor.shape, self.types[name])
            for name, rule in self.rules.items()
            for tensor in rule.hf_tensors
        }


def write_huggingface(output: Path, contents: Contents, max_shard_bytes: int, bar: str, progress: bool) -> None:
    """Write config.json, the tokenizer's files and sharded safetensors. `output` appears only when complete.

    Args:
        output: must not exist.
        max_shard_bytes: of one file.
        bar: label of the progress bar.
        progress: show it at a terminal.

    Raises:
        ConfigurationError: `output` cannot be written, or `contents.tensors` raises it.
    """
    specs = contents.specs()
    total_bytes = sum(spec.num_bytes for spec in specs.values())
    with new_folder(output) as draft, byte_bar(bar, total_bytes, progress) as advance:
        _describe(draft, contents)
        with SafetensorsWriter(draft, specs, max_shard_bytes) as writer:
            for rule in contents.rules.values():
                _write_tensors(writer, contents.tensors(rule))
                advance(sum(specs[tensor.name].num_bytes for tensor in rule.hf_tensors))


def _write_tensors(writer: SafetensorsWriter, tensors: Mapping[str, Tensor]) -> None:
    """A function of its own, so that the tensors of one parameter are freed before the next are read."""
    for name, tensor in tensors.items():
        writer.write(name, tensor)


def _describe(draft: Path, contents: Contents) -> None:
    """Write config.json and the tokenizer's files, copied from the first origin that has a config.json."""
    origin = next((folder for folder in contents.origins if (folder / CONFIG).is_file()), None)
    if origin is None:
        logger.warning("no config.json was found: writing one from the model's shape, without a tokenizer")
        write_config(draft, config_of_shape(contents.shape))
    else:
        copy_small_files(origin, draft)
    set_stored_type(draft, contents.types.values())


def megatron_to_hf(
    input: str | Path,
    output: str | Path,
    *,
    pretrained_checkpoint: str | Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: bool = True,
) -> Path:
    """Write `output`: sharded safetensors with their index, config.json and the tokenizer's files.

    Args:
        input: output of hf-to-megatron, --save folder of full fine-tuning, or checkpoint of Megatron-LM.
        output: must not exist.
        pretrained_checkpoint: Hugging Face folder with config.json and tokenizer, if `input` does not lead to one.
        dtype: of the weights; None keeps the stored type. float32 reads the float32 copies of bf16 training.
        max_shard_bytes: of one file.
        progress: show a bar at a terminal.

    Raises:
        ConfigurationError: before anything is written, if `input` is torn, refused, holds only adapters or does not
            fit its shape, or if `output` exists.
    """
    check_new(output)
    files = megatron_files(input)
    if files is None:
        raise ConfigurationError(
            f"--input {input} holds no Megatron checkpoint: expected .metadata, mp_rank_00 or iter_* in it."
        )
    require_undamaged(files)
    shape = read_model_shape(pretrained_checkpoint or input)
    rules, weights = open_weights(input, shape)
    rules = owned_rules(rules, shape)
    contents = Contents(
        shape=shape,
        rules=rules,
        types={name: dtype or weights.stored_type(rule) for name, rule in rules.items()},
        tensors=lambda rule: _tensors(rule, weights, dtype),
        origins=origins(Path(input), files, pretrained_checkpoint),
    )
    write_huggingface(Path(output), contents, max_shard_bytes, "Converting", progress)
    return Path(output)


def _tensors(rule: Rule, weights: Weights, dtype: torch.dtype | None) -> dict[str, Tensor]:
    whole = torch.empty(rule.local_shape(1), dtype=dtype or weights.stored_type(rule))
    weights.read(rule, whole, 0, 1)
    return rule.write([whole])


def require_undamaged(files: Path) -> None:
    """Compare a checkpoint with its manifest, if it has one. ConfigurationError names the damage."""
    problems = damage(files) if (files / MANIFEST).is_file() else []
    require(not problems, f"{files} is damaged: {'; '.join(problems)}. Copy it again, or give an older iter_* folder.")


def origins(folder: Path, files: Path, pretrained_checkpoint: str | Path | None = None) -> Iterator[Path]:
    """Folders to search for a model's config.json and tokenizer, in order; a run's base, and its base, come last."""
    if pretrained_checkpoint is not None:
        yield Path(pretrained_checkpoint)
    yield from (files, folder)
    base = read_record(files).config.model.pretrained_checkpoint if (files / RECORD).is_file() else None
    if base is not None:
        base_files = megatron_files(base)
        yield from [Path(base)] if base_files is None else origins(Path(base), base_files)
