"""A whole model as a Hugging Face folder, written parameter by parameter."""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_peft.conversion.companions import CONFIG, config_of_shape, copy_companions, set_stored_type, write_config
from megatron_peft.conversion.output_folder import new_folder
from megatron_peft.conversion.progress import byte_bar
from megatron_peft.conversion.writer import SafetensorsWriter, TensorSpec
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
