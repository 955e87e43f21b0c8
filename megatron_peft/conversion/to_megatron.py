"""A Hugging Face folder as a Megatron distributed checkpoint (`torch_dist`).

Keys and shapes are those of GPTModel's `sharded_state_dict` with a key for each layer. A tensor is written as the
shares of several tensor-parallel ranks, so that a rank that loads it later reads little more than its own. No more than
one share is ever held.
"""

import json
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from math import prod
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo  # the index of every torch_dist checkpoint holds it
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_peft.checkpoint.folders import INDEX, megatron_files
from megatron_peft.config import ConfigurationError, require
from megatron_peft.conversion.hf_files import (
    CONFIG,
    Source,
    check_inventory,
    copy_companions,
    open_source,
    set_stored_type,
    stored_type,
)
from megatron_peft.conversion.pretrained import owned_rules
from megatron_peft.conversion.writer import DirectFile, byte_bar, check_new, new_folder
from megatron_peft.models.families import read_shape, rules_for
from megatron_peft.models.rules import Region, Rule, VocabularyRows, expected_tensors

NUM_SHARES = (8, 4, 2, 3)  # tried in this order
NUMBERS = "__0_0.distcp"  # torch's name for the first file of rank 0
MIN_SHARE_BYTES = 4 * 2**20
FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


@dataclass(frozen=True)
class Share:
    """What one of `size` tensor-parallel ranks holds of a parameter."""

    rule: Rule
    rank: int
    size: int
    local_shape: tuple[int, ...]
    global_shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def regions(self) -> list[Region]:
        """The boxes that it is stored as, without their numbers."""
        return list(self.rule.regions(self._without_numbers, self.rank, self.size))

    def read(self, source: Source, number: int) -> Tensor:
        """The numbers of one region. If there are several, each is one piece, and is read by itself."""
        if len(self.regions) == 1:
            local = torch.empty(self.local_shape, dtype=self.dtype)
            self.rule.read(local, source, self.rank, self.size)
            return local
        piece = list(self.rule.pieces(self._without_numbers, self.rank, self.size))[number]
        region = torch.empty(self.regions[number].view.shape, dtype=self.dtype)
        return region.copy_(source.slice(piece.name, piece.index))

    @property
    def _without_numbers(self) -> Tensor:
        return torch.empty(self.local_shape, device="meta")


def hf_to_megatron(
    input: str | Path,
    output: str | Path,
    *,
    dtype: torch.dtype | None = None,
    make_vocab_size_divisible_by: int = 128,
    progress: bool = True,
) -> Path:
    """Write `output`, which --pretrained-checkpoint opens at any layout.

    Args:
        input: a Hugging Face folder.
        output: must not exist.
        dtype: of the weights; None keeps what is stored (of tensors that are fused, the wider type).
        make_vocab_size_divisible_by: rows of embedding and output layer are padded with zeros to a multiple of it.
        progress: show a bar at a terminal.

    Raises:
        ConfigurationError: before anything is written, for a folder that is no model, torn, or at odds with its
            config.json, and for an output that exists.
    """
    check_new(output)
    require(
        make_vocab_size_divisible_by > 0,
        f"--make-vocab-size-divisible-by {make_vocab_size_divisible_by} must be above 0.",
    )
    is_megatrons = megatron_files(input) is not None
    require(not is_megatrons, f"--input {input} is in Megatron's form already: give a Hugging Face folder.")
    described = (Path(input) / CONFIG).is_file()
    require(described, f"--input {input} is not a folder with a {CONFIG}: give the Hugging Face folder of a model.")
    shape, source = read_shape(input), open_source(input)
    rules = rules_for(shape, source.headers)
    check_inventory(source, expected_tensors(rules), shape.tied_embeddings)
    padded = shape.padded_vocab_size(make_vocab_size_divisible_by, 1)
    shares = [
        share
        for rule in owned_rules(rules, shape).values()
        for share in shares_of(rule, padded, dtype or _widest(rule, source))
    ]
    with new_folder(output) as draft:
        copy_companions(Path(input), draft)
        set_stored_type(draft, {share.dtype for share in shares})
        total = sum(prod(share.local_shape) * share.dtype.itemsize for share in shares)
        with byte_bar("Converting", total, progress) as advance:
            _write(shares, source, draft, advance)
    return Path(output)


def shares_of(rule: Rule, padded_vocab_size: int, dtype: torch.dtype) -> list[Share]:
    """A parameter's shares, of at least MIN_SHARE_BYTES each if there are several."""
    whole = _local_shape(rule, 1, padded_vocab_size)
    assert whole is not None
    num_bytes = prod(whole) * dtype.itemsize
    for size in NUM_SHARES:
        local = _local_shape(rule, size, padded_vocab_size)
        if local not in (None, whole) and num_bytes >= size * MIN_SHARE_BYTES:
            assert local is not None
            return [Share(rule, rank, size, local, whole, dtype) for rank in range(size)]
    return [Share(rule, 0, 1, whole, whole, dtype)]


def _local_shape(rule: Rule, size: int, padded_vocab_size: int) -> tuple[int, ...] | None:
    """None if `size` ranks cannot share it evenly."""
    if isinstance(rule, VocabularyRows):
        rows, uneven = divmod(padded_vocab_size, size)
        return None if uneven else (rows, *rule.local_shape(1)[1:])
    try:
        return rule.local_shape(size)
    except ConfigurationError:
        return None


def _widest(rule: Rule, source: Source) -> torch.dtype:
    return reduce(torch.promote_types, (stored_type(source.headers[part.name].dtype) for part in rule.parts))


def _write(shares: Sequence[Share], source: Source, folder: Path, advance: Callable[[int], None]) -> None:
    """What torch's own writer would write, which keeps the last share of every parameter until it is done."""
    tensors: dict[str, Any] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    with DirectFile(folder / NUMBERS) as file, _without_checksums():
        for share in shares:
            size, properties = torch.Size(share.global_shape), TensorProperties(dtype=share.dtype)
            entry = tensors.setdefault(share.rule.name, TensorStorageMetadata(properties, size, []))
            for number, region in enumerate(share.regions):
                start = file.tell()
                torch.save(share.read(source, number), cast(IO[bytes], file))
                places[MetadataIndex(share.rule.name, region.offset)] = _StorageInfo(
                    NUMBERS, start, file.tell() - start
                )
                entry.chunks.append(ChunkStorageMetadata(torch.Size(region.offset), region.view.shape))
                advance(region.view.numel() * share.dtype.itemsize)
    index = Metadata(tensors, storage_data=places, storage_meta=StorageMeta())
    (folder / INDEX).write_bytes(pickle.dumps(index))
    (folder / "metadata.json").write_text(json.dumps(FORMAT))
    torch.save({}, folder / "common.pt")  # where Megatron keeps what is no tensor: here config.json says it


@contextmanager
def _without_checksums() -> Iterator[None]:
    """torch.save computes a checksum of each tensor, a sixth of all time, and torch.load never looks at it."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)
