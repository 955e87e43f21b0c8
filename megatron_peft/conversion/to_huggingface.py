"""A base model in Megatron's form, or the whole model of a run, as a Hugging Face folder."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_peft.checkpoint.folders import MANIFEST, RECORD, damage, megatron_files
from megatron_peft.checkpoint.record import read_record
from megatron_peft.config import ConfigurationError, require
from megatron_peft.conversion.hf_files import CONFIG, copy_companions, set_stored_type, write_config
from megatron_peft.conversion.megatron_weights import MegatronWeights, open_megatron
from megatron_peft.conversion.pretrained import owned_rules, read_model_shape
from megatron_peft.conversion.writer import (
    DEFAULT_SHARD_BYTES,
    SafetensorsWriter,
    TensorSpec,
    byte_bar,
    check_new,
    new_folder,
)
from megatron_peft.models.families import config_of_shape, rules_for
from megatron_peft.models.rules import Rule
from megatron_peft.models.shape import ModelShape

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Contents:
    """What a folder is made of.

    Args:
        shape: of the model.
        rules: of every parameter that the model owns, by name.
        types: in which they are written, by the same names.
        tensors: the Hugging Face tensors of one parameter; called once for each rule, in order.
        origins: folders that may hold the model's own config.json and tokenizer, the surest first.
    """

    shape: ModelShape
    rules: Mapping[str, Rule]
    types: Mapping[str, torch.dtype]
    tensors: Callable[[Rule], Mapping[str, Tensor]]
    origins: Iterable[Path]

    def specs(self) -> dict[str, TensorSpec]:
        """Shape and type of every Hugging Face tensor."""
        parts = ((part, self.types[name]) for name, rule in self.rules.items() for part in rule.parts)
        return {part.name: TensorSpec(part.shape, dtype) for part, dtype in parts}


def write_huggingface(output: Path, contents: Contents, max_shard_bytes: int, bar: str, progress: bool) -> None:
    """Write `output`, whole or not at all: config.json, the tokenizer's files and sharded safetensors.

    Args:
        output: must not exist.
        max_shard_bytes: of one file.
        bar: what the bar is called.
        progress: show it at a terminal.

    Raises:
        ConfigurationError: as `new_folder`, and what reading raises.
    """
    specs = contents.specs()
    total_bytes = sum(spec.num_bytes for spec in specs.values())
    with new_folder(output) as draft, byte_bar(bar, total_bytes, progress) as advance:
        _describe(draft, contents)
        with SafetensorsWriter(draft, specs, max_shard_bytes) as writer:
            for rule in contents.rules.values():
                _write_tensors(writer, contents.tensors(rule))
                advance(sum(specs[part.name].num_bytes for part in rule.parts))


def _write_tensors(writer: SafetensorsWriter, tensors: Mapping[str, Tensor]) -> None:
    """They are gone when it returns: no two parameters are held at a time."""
    for name, tensor in tensors.items():
        writer.write(name, tensor)


def _describe(draft: Path, contents: Contents) -> None:
    """config.json and the tokenizer's files, from the first origin that has a config.json."""
    origin = next((folder for folder in contents.origins if (folder / CONFIG).is_file()), None)
    if origin is None:
        logger.warning("no config.json was found: one is made from the shape, and there is no tokenizer beside it")
        write_config(draft, config_of_shape(contents.shape))
    else:
        copy_companions(origin, draft)
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
        input: what hf-to-megatron wrote, the --save folder of full fine-tuning, or a checkpoint of Megatron-LM.
        output: must not exist.
        pretrained_checkpoint: Hugging Face folder with config.json and tokenizer, if `input` leads to none.
        dtype: of the weights; None keeps what is stored. float32 takes the float32 copies of bf16 training.
        max_shard_bytes: of one file.
        progress: show a bar at a terminal.

    Raises:
        ConfigurationError: before anything is written, for an input that is torn, refused, of adapters only or at
            odds with its shape, and for an output that exists.
    """
    check_new(output)
    files = megatron_files(input)
    if files is None:
        raise ConfigurationError(
            f"--input {input} holds no Megatron checkpoint: expected .metadata, mp_rank_00 or iter_* in it."
        )
    require_undamaged(files)
    shape = read_model_shape(pretrained_checkpoint or input)
    weights = open_megatron(files)
    rules = owned_rules(rules_for(shape), shape)
    weights.check(rules)
    contents = Contents(
        shape=shape,
        rules=rules,
        types={name: dtype or weights.stored_type(rule) for name, rule in rules.items()},
        tensors=lambda rule: _tensors(rule, weights, dtype),
        origins=origins(Path(input), files, pretrained_checkpoint),
    )
    write_huggingface(Path(output), contents, max_shard_bytes, "Converting", progress)
    return Path(output)


def _tensors(rule: Rule, weights: MegatronWeights, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The Hugging Face tensors of one parameter."""
    whole = torch.empty(rule.local_shape(1), dtype=dtype or weights.stored_type(rule))
    weights.read(rule, whole, 0, 1)
    return rule.write([whole])


def require_undamaged(files: Path) -> None:
    """Compare a run's checkpoint with its manifest; others have none. ConfigurationError names the damage."""
    problems = damage(files) if (files / MANIFEST).is_file() else []
    require(not problems, f"{files} is damaged: {'; '.join(problems)}. Copy it again, or give an older iter_* folder.")


def origins(folder: Path, files: Path, pretrained_checkpoint: str | Path | None = None) -> Iterator[Path]:
    """Folders that may hold a model's own config.json and tokenizer, the surest first: of a run, down to its base."""
    if pretrained_checkpoint is not None:
        yield Path(pretrained_checkpoint)
    yield from (files, folder)
    base = read_record(files).config.model.pretrained_checkpoint if (files / RECORD).is_file() else None
    if base is not None:
        base_files = megatron_files(base)
        yield from [Path(base)] if base_files is None else origins(Path(base), base_files)
