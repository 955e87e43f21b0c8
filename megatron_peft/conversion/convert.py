"""Whole models: from a Hugging Face folder to Megatron's format, back again, and merged with a run's adapters.

Megatron's is the distributed checkpoint (`torch_dist`) with the keys and shapes of GPTModel's `sharded_state_dict`, a
key for each layer. The rules of `models.rules` go both ways; one slice or one parameter is in memory at a time.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from math import prod
from pathlib import Path
from typing import Literal

import torch
from torch import Size, Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter, WriteItem, metadata, planner
from torch.utils.serialization import config as serialization_config

from megatron_peft.checkpoint.folders import MANIFEST, OPTIMIZER_FILE, RECORD, check_new, megatron_files, new_folder
from megatron_peft.checkpoint.run_record import read_record
from megatron_peft.checkpoint.tensors import write_common_files
from megatron_peft.config import ConfigurationError, ModelConfig, require
from megatron_peft.conversion import hf_files, model_card, trained_adapters
from megatron_peft.conversion.megatron_files import OUTPUT
from megatron_peft.conversion.pretrained import (
    Weights,
    open_weights,
    owned_rules,
    read_model_shape,
    read_trained_values,
)
from megatron_peft.conversion.writer import DEFAULT_SHARD_BYTES, require_no_overflow, write_safetensors
from megatron_peft.models.families import config_of_shape, read_shape
from megatron_peft.models.rules import HFSlice, Rule, VocabularyRows
from megatron_peft.models.shape import ModelShape
from megatron_peft.runtime.progress import progress_bar

logger = logging.getLogger(__name__)

# A tensor is stored as the shards of this many tensor-parallel ranks, the first that divides it: so a rank that loads
# it reads little more than its own share.
SHARD_COUNTS = (8, 4, 2, 3)
MIN_SHARD_BYTES = 4 * 2**20


@dataclass(frozen=True)
class ShardSlice:
    """A slice of a global tensor that is stored by itself: a tensor-parallel rank's local tensor, or a part of it."""

    item: WriteItem  # what torch's writer plans with
    rule: Rule
    rank: int
    size: int
    hf_slice: HFSlice | None  # the values of a part; None for all of the local tensor

    def empty(self, device: str) -> Tensor:
        """A tensor of its shape and type."""
        data = self.item.tensor_data
        assert data is not None
        return torch.empty(data.chunk.sizes, dtype=data.properties.dtype, device=device)

    def read(self, source: hf_files.Source) -> Tensor:
        """Read the values of the slice."""
        values = self.empty("cpu")
        if self.hf_slice is not None:
            return values.copy_(source.slice(self.hf_slice.name, self.hf_slice.index))
        source.read(self.rule, values, self.rank, self.size)
        return values


def hf_to_megatron(
    input: str | Path,
    output: str | Path,
    *,
    dtype: torch.dtype | None = None,
    make_vocab_size_divisible_by: int = 128,
    progress: bool = True,
) -> Path:
    """Write `output`, which --pretrained-checkpoint opens with any layout, from a Hugging Face folder.

    dtype: of the weights; None keeps the stored type (the wider one if tensors are fused).
    make_vocab_size_divisible_by: zeros pad the rows of embedding and output layer to a multiple of it.

    Raises ConfigurationError: before anything is written, if `input` is not a model, is truncated or does not fit its
    config.json, or if `output` exists.
    """
    check_new(output)
    require(
        make_vocab_size_divisible_by > 0,
        f"--make-vocab-size-divisible-by {make_vocab_size_divisible_by} must be above 0.",
    )
    is_megatrons = megatron_files(input) is not None
    require(not is_megatrons, f"--input {input} is already in Megatron's format: give a Hugging Face folder.")
    config = Path(input, hf_files.CONFIG)
    message = (
        f"--input {input} is not a folder with a {config.name}: give the Hugging Face folder of a model, or "
        "ORG/NAME of the Hub."
    )
    require(config.is_file(), message)
    shape = read_shape(input)
    rules, source = open_weights(input, shape)
    assert isinstance(source, hf_files.Source)
    padded = shape.padded_vocab_size(make_vocab_size_divisible_by, 1)
    slices = [
        stored
        for rule in owned_rules(rules, shape).values()
        for stored in shard_slices(rule, padded, dtype or source.stored_type(rule))
    ]
    specs = [stored.empty("meta") for stored in slices]
    total_bytes = sum(spec.nbytes for spec in specs)
    with (
        new_folder(output) as draft,
        progress_bar("Converting", total_bytes, in_bytes=True, enabled=progress) as advance,
    ):
        hf_files.copy_small_files(Path(input), draft)
        hf_files.set_stored_type(draft, {spec.dtype for spec in specs})
        reader, writer = _StreamingPlanner(slices, source, advance), _Writer(draft)
        # The steps of torch.distributed.checkpoint.save, which would wrap every error in a CheckpointException.
        plans, index = reader.create_global_plan([reader.create_local_plan()])
        (plan,) = writer.prepare_global_plan(plans)
        # torch.save would spend a sixth of the time on checksums, which torch.load ignores.
        with serialization_config.patch({"save.compute_crc32": False}):  # pyright: ignore[reportAttributeAccessIssue]
            written = writer.write_data(plan, reader).wait()
        writer.finish(index, [written])
        write_common_files(draft)
    return Path(output)


def shard_slices(rule: Rule, padded_vocab_size: int, dtype: torch.dtype) -> Iterator[ShardSlice]:
    """The slices in which a parameter is stored; several shards have at least MIN_SHARD_BYTES each."""

    def shape_of_shard(count: int) -> tuple[int, ...] | None:
        if isinstance(rule, VocabularyRows):
            rows, uneven = divmod(padded_vocab_size, count)
            return None if uneven else (rows, *rule.local_shape(1)[1:])
        try:
            return rule.local_shape(count)
        except ConfigurationError:  # it cannot be split evenly
            return None

    whole = shape_of_shard(1)
    assert whole is not None
    size, local_shape = 1, whole
    for count in SHARD_COUNTS:
        shape = shape_of_shard(count)
        if shape not in (None, whole) and prod(whole) * dtype.itemsize >= count * MIN_SHARD_BYTES:
            size, local_shape = count, shape
            break
    local = torch.empty(local_shape, device="meta")
    for rank in range(size):
        parts = list(rule.global_slices(local, rank, size))
        # Where a rank has several slices, each of them is a Hugging Face slice.
        hf_slices = rule.hf_slices(local, rank, size) if len(parts) > 1 else [None]
        for part, hf_slice in zip(parts, hf_slices, strict=True):
            chunk = metadata.ChunkStorageMetadata(Size(part.offset), part.view.shape)
            data = planner.TensorWriteData(chunk, metadata.TensorProperties(dtype=dtype), Size(whole))
            place = metadata.MetadataIndex(rule.name, chunk.offsets)
            item = WriteItem(place, planner.WriteItemType.SHARD, tensor_data=data)
            yield ShardSlice(item, rule, rank, size, hf_slice)


class _StreamingPlanner(DefaultSavePlanner):
    """Reads each slice when torch's writer gets to it, and holds one at a time."""

    def __init__(self, slices: Sequence[ShardSlice], source: hf_files.Source, advance: Callable[[int], None]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._slices = {stored.item.index: stored for stored in slices}
        self._source = source
        self._advance = advance
        self._current = torch.empty(0)

    def create_local_plan(self) -> planner.SavePlan:
        return planner.SavePlan([stored.item for stored in self._slices.values()])

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        self._current.untyped_storage().resize_(0)  # the writer keeps the last slice of every tensor until the end
        self._current = self._slices[write_item.index].read(self._source)
        require_no_overflow(self._current, write_item.index.fqn)
        self._advance(self._current.nbytes)
        return self._current


class _Writer(FileSystemWriter):
    """torch's writer of distributed checkpoints, whose index is the same for the same model."""

    def __init__(self, folder: Path) -> None:
        # No copying ahead: it would sort the slices by size. `new_folder` syncs the files.
        super().__init__(folder, sync_files=False, per_thread_copy_ahead=0)

    def storage_meta(self) -> metadata.StorageMeta:
        return metadata.StorageMeta()  # torch's has the path of the draft and a random id


# To a Hugging Face folder, one parameter at a time: it is read in Megatron's form (fused, whole), changed if an adapter
# changes it, and written as the Hugging Face tensors that it consists of.


def _write(
    output: Path,
    base: str | Path,
    shape: ModelShape,
    origins: Iterable[Path],
    read: Callable[[Rule, Weights], Mapping[str, Tensor]],
    dtype: torch.dtype | None,
    max_shard_bytes: int,
    bar: str,
    card: model_card.Exported | None,
) -> Path:
    """Write config.json and the tokenizer's files, from the first of `origins` that has them, and the weights of `base`
    in sharded safetensors; `read` returns the Hugging Face tensors of one parameter, `bar` labels the progress bar.
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
    with new_folder(output) as draft, progress_bar(bar, total_bytes, in_bytes=True, enabled=bool(bar)) as advance:
        origin = next((folder for folder in origins if (folder / hf_files.CONFIG).is_file()), None)
        if origin is None:
            logger.warning("no config.json was found: writing one from the model's shape, without a tokenizer")
            hf_files.write_config(draft, config_of_shape(shape))
        else:
            hf_files.copy_small_files(origin, draft)
        hf_files.set_stored_type(draft, types.values())
        write_safetensors(draft, specs, tensors(), max_shard_bytes, advance=advance)
        if card is not None:
            hf_files.copy_trained_tokenizer(card.record.config.data, draft)
            model_card.write_card(draft, card)
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

    input: output of hf-to-megatron, --save folder of full fine-tuning, or checkpoint of Megatron-LM.
    pretrained_checkpoint: Hugging Face folder with config.json and tokenizer, if `input` does not lead to one.
    dtype: of the weights; None keeps the stored type. float32 reads the float32 copies of bf16 training.
    max_shard_bytes: of one file.
    license: of the model card, which a run gets; None takes the base's.

    Raises ConfigurationError: before anything is written, if `input` is truncated, refused, holds only adapters or does
    not fit its shape, or if `output` exists.
    """
    model_card.check_export(output, license)
    files = megatron_files(input)
    if files is None:
        raise ConfigurationError(
            f"--input {input} holds no Megatron checkpoint: expected .metadata, mp_rank_00 or iter_* in it."
        )
    if (files / MANIFEST).is_file():  # of the optimizer's tensors only the float32 copies are ever read
        trained_adapters.require_undamaged(files, without="" if dtype == torch.float32 else OPTIMIZER_FILE)
    shape = read_model_shape(pretrained_checkpoint or input)
    places = _origins(Path(input), files, pretrained_checkpoint)
    card = None
    if (files / RECORD).is_file():
        record = read_record(files)
        base = record.config.model.pretrained_checkpoint
        card = model_card.Exported(files, record, Path(output), base, is_adapter=False, license=license)
    read, bar = partial(_tensors, dtype=dtype), "Converting" if progress else ""
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


def is_quantized(rule: Rule, model: ModelConfig) -> bool:
    """Whether a run with --base-precision holds this weight in that."""
    return rule.is_linear or (rule.name == OUTPUT and model.quantize_output_layer)


def merge(
    input: str | Path,
    output: str | Path,
    *,
    pretrained_checkpoint: str | Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    license: str | None = None,
    into: Literal["original", "trained-values"] = "original",
    num_tokens: int | None = None,
    progress: bool = True,
) -> Path:
    """Write `output`: a model card, config.json, the tokenizer's files and sharded safetensors of the changed model.

    Arguments as for `megatron_to_hf`, of a run with adapters at any layout; `pretrained_checkpoint` is their base, if
    it is not where the run says.

    into: the weights of the base, or, after a run with --base-precision, what these were rounded to while it trained.
    num_tokens: as for `model_card.add_logits`.

    Raises ConfigurationError: before anything is written: no checkpoint or no adapters, another base, an output that
    exists, damaged files.
    """
    model_card.check_export(output, license)
    adapters = trained_adapters.open_adapters(input)
    peft, shape, model = adapters.record.config.peft, adapters.record.shape, adapters.record.config.model
    precision = model.base_precision if into == "trained-values" else "run"
    message = f"--into trained-values: --input {input} was trained on its base's own weights: leave it out."
    require(into == "original" or precision != "run", message)
    module = import_module(peft.spec.adapter)
    require(hasattr(module, "merge"), f"--input {input}: adapters of --peft-method {peft.method} cannot be merged.")
    base = trained_adapters.base_of(adapters, pretrained_checkpoint)
    files = megatron_files(base)
    if files is not None and (files / MANIFEST).is_file():
        trained_adapters.require_undamaged(files)
    places = [base] if files is None else _origins(base, files)

    def read(rule: Rule, weights: Weights) -> Mapping[str, Tensor]:
        """Changed in float32 (or float64), and cast when written."""
        layer, stored = rule.layer, weights.stored_type(rule)
        is_adapted = layer in adapters.record.adapted_layers
        is_rounded = precision != "run" and is_quantized(rule, model)
        if not (is_adapted or is_rounded):
            return _tensors(rule, weights)
        whole = torch.empty(rule.local_shape(1), dtype=torch.promote_types(stored, torch.float32))
        if is_rounded:
            run_dtype = torch.bfloat16 if model.bf16 else torch.float32
            whole.copy_(read_trained_values(rule, weights, precision, run_dtype))
        else:
            weights.read(rule, whole, 0, 1)
        return rule.write([module.merge(whole, adapters.of(layer), peft) if is_adapted else whole])

    card = model_card.Exported(
        adapters.folder, adapters.record, Path(output), str(base), is_adapter=False, license=license, into=into
    )
    bar = "Merging" if progress else ""
    _write(Path(output), base, shape, places, read, dtype, max_shard_bytes, bar, card)
    model_card.add_logits(card, num_tokens)
    return Path(output)
