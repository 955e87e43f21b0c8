"""A base model in Megatron's form, or the whole model of a run, as a Hugging Face folder."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from megatron_peft.checkpoint.folders import MANIFEST, RECORD, damage, megatron_files
from megatron_peft.checkpoint.record import read_record
from megatron_peft.config import ConfigurationError, require
from megatron_peft.conversion.huggingface_folder import Contents, write_huggingface
from megatron_peft.conversion.megatron_weights import MegatronWeights, open_megatron
from megatron_peft.conversion.output_folder import check_new
from megatron_peft.conversion.pretrained import owned_rules, read_model_shape
from megatron_peft.conversion.writer import DEFAULT_SHARD_BYTES
from megatron_peft.models.families import rules_for
from megatron_peft.models.rules import Rule


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
