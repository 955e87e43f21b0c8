"""Convert a Hugging Face folder to a Megatron distributed checkpoint (`torch_dist`).

Keys and shapes are those of GPTModel's `sharded_state_dict` with a key for each layer.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import IOBase
from math import prod
from os import PathLike
from pathlib import Path

import torch
from torch import Size, Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, StorageMeta, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.utils.serialization import config as serialization_config

from megatron_peft.checkpoint.folders import check_new, megatron_files, new_folder
from megatron_peft.config import ConfigurationError, require
from megatron_peft.conversion.hf_files import CONFIG, Source, copy_small_files, set_stored_type
from megatron_peft.conversion.pretrained import open_weights, owned_rules
from megatron_peft.conversion.writer import DirectFile, byte_bar, require_no_overflow
from megatron_peft.models.families import read_shape
from megatron_peft.models.rules import HFSlice, Rule, VocabularyRows

# A tensor is stored as the shards of this many tensor-parallel ranks, the first that divides it: so a rank that loads
# it reads little more than its own share.
SHARD_COUNTS = (8, 4, 2, 3)
MIN_SHARD_BYTES = 4 * 2**20
FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


@dataclass(frozen=True)
class ShardSlice:
    """A slice of a global tensor that is stored by itself.

    Args:
        item: what torch's writer plans with.
        rule, rank, size: a tensor-parallel rank's local tensor that the slice is, or is a part of.
        hf_slice: the values of a part; None for all of the local tensor.
    """

    item: WriteItem
    rule: Rule
    rank: int
    size: int
    shape: Size
    dtype: torch.dtype
    hf_slice: HFSlice | None

    def read(self, source: Source) -> Tensor:
        """Read the values of the slice."""
        values = torch.empty(self.shape, dtype=self.dtype)
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
    """Write `output`, which --pretrained-checkpoint opens with any layout.

    Args:
        input: a Hugging Face folder.
        output: must not exist.
        dtype: of the weights; None keeps the stored type (the wider one if tensors are fused).
        make_vocab_size_divisible_by: zeros pad the rows of embedding and output layer to a multiple of it.
        progress: show a bar at a terminal.

    Raises:
        ConfigurationError: before anything is written, if `input` is not a model, is truncated or does not fit its
            config.json, or if `output` exists.
    """
    check_new(output)
    require(
        make_vocab_size_divisible_by > 0,
        f"--make-vocab-size-divisible-by {make_vocab_size_divisible_by} must be above 0.",
    )
    is_megatrons = megatron_files(input) is not None
    require(not is_megatrons, f"--input {input} is already in Megatron's format: give a Hugging Face folder.")
    described = (Path(input) / CONFIG).is_file()
    require(described, f"--input {input} is not a folder with a {CONFIG}: give the Hugging Face folder of a model.")
    shape = read_shape(input)
    rules, source = open_weights(input, shape)
    assert isinstance(source, Source)
    padded = shape.padded_vocab_size(make_vocab_size_divisible_by, 1)
    slices = [
        stored
        for rule in owned_rules(rules, shape).values()
        for stored in shard_slices(rule, padded, dtype or source.stored_type(rule))
    ]
    total_bytes = sum(stored.shape.numel() * stored.dtype.itemsize for stored in slices)
    with new_folder(output) as draft, byte_bar("Converting", total_bytes, progress) as advance:
        copy_small_files(Path(input), draft)
        set_stored_type(draft, {stored.dtype for stored in slices})
        _write(slices, source, draft, advance)
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
            offset, shape = Size(part.offset), part.view.shape
            data = TensorWriteData(ChunkStorageMetadata(offset, shape), TensorProperties(dtype=dtype), Size(whole))
            item = WriteItem(MetadataIndex(rule.name, offset), WriteItemType.SHARD, tensor_data=data)
            yield ShardSlice(item, rule, rank, size, shape, dtype, hf_slice)


class _StreamingPlanner(DefaultSavePlanner):
    """Reads each slice when torch's writer gets to it, and holds one at a time."""

    def __init__(self, slices: Sequence[ShardSlice], source: Source, advance: Callable[[int], None]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._slices = {stored.item.index: stored for stored in slices}
        self._source = source
        self._advance = advance
        self._current = torch.empty(0)

    def create_local_plan(self) -> SavePlan:
        return SavePlan([stored.item for stored in self._slices.values()])

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        self._current.untyped_storage().resize_(0)  # the writer keeps the last slice of every tensor until the end
        self._current = self._slices[write_item.index].read(self._source)
        require_no_overflow(self._current, write_item.index.fqn)
        self._advance(self._current.nbytes)
        return self._current


class _DirectFileSystem(FileSystem):
    @contextmanager
    def create_stream(self, path: str | PathLike, mode: str) -> Iterator[IOBase]:
        with DirectFile(Path(path)) as file:
            yield file


class _Writer(FileSystemWriter):
    """torch's writer of distributed checkpoints, past the page cache."""

    def __init__(self, folder: Path) -> None:
        # No copying ahead: it would sort the slices by size. `new_folder` syncs the files.
        super().__init__(folder, sync_files=False, per_thread_copy_ahead=0)
        self.fs = _DirectFileSystem()

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()  # torch's has the path of the draft and a random id


def _write(slices: Sequence[ShardSlice], source: Source, folder: Path, advance: Callable[[int], None]) -> None:
    planner, writer = _StreamingPlanner(slices, source, advance), _Writer(folder)
    # The steps of torch.distributed.checkpoint.save, which would wrap every error in a CheckpointException.
    plans, metadata = planner.create_global_plan([planner.create_local_plan()])
    (plan,) = writer.prepare_global_plan(plans)
    # torch.save would spend a sixth of the time on checksums, which torch.load ignores.
    with serialization_config.patch({"save.compute_crc32": False}):  # pyright: ignore[reportAttributeAccessIssue]
        written = writer.write_data(plan, planner).wait()
    writer.finish(metadata, [written])
    (folder / "metadata.json").write_text(json.dumps(FORMAT))
    torch.save({}, folder / "common.pt")  # Megatron keeps arguments here; config.json has them
