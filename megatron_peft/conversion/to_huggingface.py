"""Write a Hugging Face folder: of a model in Megatron's format, or of a run's adapters merged into their base.

One parameter at a time: it is read in Megatron's form (fused, whole), changed if an adapter changes it, and written as
the Hugging Face tensors that it consists of.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor

from megatron_peft.checkpoint.folders import MANIFEST, RECORD, check_new, megatron_files, new_folder
from megatron_peft.checkpoint.run_record import read_record
from megatron_peft.config import ConfigurationError, require
from megatron_peft.conversion.hf_files import CONFIG, copy_small_files, set_stored_type, write_config
from megatron_peft.conversion.model_card import Exported, check_license, write_card
from megatron_peft.conversion.pretrained import Weights, open_weights, owned_rules, read_model_shape
from megatron_peft.conversion.trained_adapters import base_of, layer_name, open_adapters, require_undamaged
from megatron_peft.conversion.writer import DEFAULT_SHARD_BYTES, byte_bar, write_safetensors
from megatron_peft.models.families import config_of_shape
from megatron_peft.models.rules import Rule
from megatron_peft.models.shape import ModelShape

logger = logging.getLogger(__name__)


def _write(
    output: Path,
    base: str | Path,
    shape: ModelShape,
    origins: Iterable[Path],
    read: Callable[[Rule, Weights], Mapping[str, Tensor]],
    dtype: torch.dtype | None,
    max_shard_bytes: int,
    bar: str | None,
    card: Exported | None = None,
) -> Path:
    """Write config.json, the tokenizer's files and sharded safetensors. `output` appears only when complete.

    Args:
        base: folder of the weights, in either format.
        origins: folders to search for the model's config.json and tokenizer, in order.
        read: returns the Hugging Face tensors of one parameter.
        dtype: of the weights; None keeps the stored type.
        bar: label of the progress bar; None: no bar.
        card: what the model card says; None: no card.

    Raises:
        ConfigurationError: `base` does not fit, `output` cannot be written, or `read` raises it.
    """
    rules, weights = open_weights(base, shape)
    rules = owned_rules(rules, shape)
    types = {name: dtype or weights.stored_type(rule) for name, rule in rules.items()}
    specs = {
        tensor.name: torch.empty(tensor.shape, dtype=types[rule.name], device="meta")
        for rule in rules.values()
        for tensor in rule.hf_tensors
    }

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for rule in rules.values():
            held = dict(read(rule, weights))
            for name in [*held]:
                yield name, held.pop(name)

    total_bytes = sum(spec.nbytes for spec in specs.values())
    with new_folder(output) as draft, byte_bar(bar or "", total_bytes, bar is not None) as advance:
        origin = next((folder for folder in origins if (folder / CONFIG).is_file()), None)
        if origin is None:
            logger.warning("no config.json was found: writing one from the model's shape, without a tokenizer")
            write_config(draft, config_of_shape(shape))
        else:
            copy_small_files(origin, draft)
        set_stored_type(draft, types.values())
        write_safetensors(draft, specs, tensors(), max_shard_bytes, advance=advance)
        if card is not None:
            write_card(draft, card)
    return output


def _tensors(rule: Rule, weights: Weights, dtype: torch.dtype | None = None) -> Mapping[str, Tensor]:
    whole = torch.empty(rule.local_shape(1), dtype=dtype or weights.stored_type(rule))
    weights.read(rule, whole, 0, 1)
    return rule.write([whole])


def megatron_to_hf(
    input: str | Path,
    output: str | Path,
    *,
    pretrained_checkpoint: str | Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    license: str | None = None,
    progress: bool = True,
) -> Path:
    """Write `output`: sharded safetensors with their index, config.json and the tokenizer's files.

    Args:
        input: output of hf-to-megatron, --save folder of full fine-tuning, or checkpoint of Megatron-LM.
        output: must not exist.
        pretrained_checkpoint: Hugging Face folder with config.json and tokenizer, if `input` does not lead to one.
        dtype: of the weights; None keeps the stored type. float32 reads the float32 copies of bf16 training.
        max_shard_bytes: of one file.
        license: of the model card, which a run gets; None takes the base's.
        progress: show a bar at a terminal.

    Raises:
        ConfigurationError: before anything is written, if `input` is truncated, refused, holds only adapters or does
            not fit its shape, or if `output` exists.
    """
    check_new(output)
    check_license(license)
    files = megatron_files(input)
    if files is None:
        raise ConfigurationError(
            f"--input {input} holds no Megatron checkpoint: expected .metadata, mp_rank_00 or iter_* in it."
        )
    if (files / MANIFEST).is_file():
        require_undamaged(files)
    shape = read_model_shape(pretrained_checkpoint or input)
    places = _origins(Path(input), files, pretrained_checkpoint)
    bar, card = "Converting" if progress else None, None
    if (files / RECORD).is_file():
        record = read_record(files)
        base = record.config.model.pretrained_checkpoint
        card = Exported(files, record, Path(output), base, is_adapter=False, license=license)
    read = partial(_tensors, dtype=dtype)
    return _write(Path(output), input, shape, places, read, dtype, max_shard_bytes, bar, card)


def _origins(folder: Path, files: Path, pretrained_checkpoint: str | Path | None = None) -> Iterator[Path]:
    """Folders to search for a model's config.json and tokenizer, in order; a run's base, and its base, come last."""
    if pretrained_checkpoint is not None:
        yield Path(pretrained_checkpoint)
    yield from (files, folder)
    base = read_record(files).config.model.pretrained_checkpoint if (files / RECORD).is_file() else None
    if base is not None:
        base_files = megatron_files(base)
        yield from [Path(base)] if base_files is None else _origins(Path(base), base_files)


def merge(
    input: str | Path,
    output: str | Path,
    *,
    pretrained_checkpoint: str | Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    license: str | None = None,
    progress: bool = True,
) -> Path:
    """Write `output`: a model card, config.json, the tokenizer's files and sharded safetensors of the changed model.

    Args:
        input: the --save folder of a run, of any layout.
        output: must not exist.
        pretrained_checkpoint: the base, if it is not where the run says.
        dtype: of the weights; None keeps the base's.
        max_shard_bytes: of one file.
        license: of the model card; None takes the base's.
        progress: show a bar at a terminal.

    Raises:
        ConfigurationError: before anything is written: no checkpoint or no adapters, another base, an output that
            exists, damaged files.
    """
    check_new(output)
    check_license(license)
    adapters = open_adapters(input)
    peft, shape = adapters.record.config.peft, adapters.record.shape
    module = import_module(peft.spec.adapter)
    require(hasattr(module, "merge"), f"--input {input}: adapters of --peft-method {peft.method} cannot be merged.")
    base = base_of(adapters, pretrained_checkpoint)
    files = megatron_files(base)
    if files is not None and (files / MANIFEST).is_file():
        require_undamaged(files)
    places = [base] if files is None else _origins(base, files)

    def read(rule: Rule, weights: Weights) -> Mapping[str, Tensor]:
        """Changed in float32 (or float64), and cast when written."""
        layer, stored = layer_name(rule), weights.stored_type(rule)
        if layer not in adapters.record.adapted_layers:
            return _tensors(rule, weights)
        whole = torch.empty(rule.local_shape(1), dtype=torch.promote_types(stored, torch.float32))
        weights.read(rule, whole, 0, 1)
        return rule.write([module.merge(whole, adapters.of(layer), peft)])

    card = Exported(adapters.folder, adapters.record, Path(output), str(base), is_adapter=False, license=license)
    bar = "Merging" if progress else None
    return _write(Path(output), base, shape, places, read, dtype, max_shard_bytes, bar, card)
