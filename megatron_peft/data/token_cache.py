"""Tokens of records in Arrow files that are mapped into memory: tokenized once, not at each start of a run.

A cache is a folder, named by all that decides its tokens. It appears when it is whole; the ranks of a node share its
making. Like a checkpoint it has a manifest with size and CRC-32 of each file, compared whenever it is opened.
"""

import hashlib
import json
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from megatron_peft.checkpoint.folders import (
    FileSum,
    FolderLock,
    damage,
    measure,
    publish_draft,
    read_manifest,
    write_manifest,
)
from megatron_peft.config import ConfigurationError, require
from megatron_peft.config.untrusted import read_json_object
from megatron_peft.data.files import RecordFiles
from megatron_peft.data.records import Fit, TokenizedRecord
from megatron_peft.runtime.launch import PlaceOnNode, checked_together, gather_over_world, place_on_node

FORMAT = 2  # of the files, and of how a record becomes tokens
COUNTS = "counts.json"  # beside the shards: {"records": how many, "left_out": {field: records}}
_BATCH, _BATCH_TOKENS = 500, 1 << 20  # records written at once, fewer if they have more tokens
PROGRESS_FROM = 20_000  # records; fewer take a moment only


class TokenCache:
    """The tokens of all records, by number; left_out: number of records by unused field."""

    def __init__(self, folder: Path, records: RecordFiles, fit: Fit, place: PlaceOnNode) -> None:
        """Raises ConfigurationError unless the folder holds lists of ids and flags for so many records.

        place: this rank's share of the shards is searched for ids that the tokenizer does not have.
        """
        counts = read_json_object(folder / COUNTS)
        left_out = counts.get("left_out")
        if not isinstance(left_out, dict) or any(type(count) is not int for count in left_out.values()):
            raise ConfigurationError(_damaged(folder, f"{COUNTS} does not count fields"))
        self.left_out: Counter[str] = Counter(left_out)
        shards = [folder / name for name in sorted(read_manifest(folder)) if name.endswith(".arrow")]
        self._columns = [_columns_of(path) for path in shards]
        self._ends = np.cumsum([len(ids) for ids, _ in self._columns], dtype=np.int64)
        found = int(self._ends[-1]) if shards else 0
        require(
            found == counts.get("records") == len(records),
            _damaged(folder, f"it has {found} records, and should have {len(records)}"),
        )
        for which in range(place.rank, len(shards), place.size):
            first = int(self._ends[which]) - len(self._columns[which][0])
            _require_ids_fit(shards[which], self._columns[which], fit.tokenizer.largest_id, records, first)

    def tokenized(self, index: int) -> TokenizedRecord:
        which = int(np.searchsorted(self._ends, index, side="right"))
        local = index - (int(self._ends[which - 1]) if which else 0)
        ids, trained = (column[local].values for column in self._columns[which])
        return TokenizedRecord(ids.to_numpy(), trained.to_numpy(zero_copy_only=False))

    def positions(self, share: range, seq_length: int) -> tuple[np.ndarray, np.ndarray]:
        """int32 [share] each: input positions of whole records, and of what --seq-length leaves of them."""
        found = np.zeros((2, len(share)), dtype=np.int32)
        for first, trained in self._masks(share):
            offsets = trained.offsets.to_numpy()
            flags = trained.values.to_numpy(zero_copy_only=False)
            where = np.flatnonzero(flags)
            rows = slice(first - share.start, first - share.start + len(trained))
            starts, ends = offsets[:-1], offsets[1:]
            for row, stops in zip(found, (ends, np.minimum(ends, starts + seq_length + 1)), strict=True):
                row[rows] = _last_trained(where, starts, stops)
        return found[0], found[1]

    def _masks(self, share: range) -> Iterator[tuple[int, Any]]:
        """(first record, their masks) of the Arrow arrays that hold the share."""
        start = 0
        for _, column in self._columns:
            for chunk in column.chunks:
                low, high = max(share.start, start), min(share.stop, start + len(chunk))
                if low < high:
                    yield low, chunk.slice(low - start, high - low)
                start += len(chunk)


def _last_trained(where: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """Of each record the number of the last token before its stop that is trained, 0 without: the first is not.

    where: positions of all trained tokens.
    """
    last = np.searchsorted(where, stops) - 1
    found = np.where(last >= 0, where[np.maximum(last, 0)] if len(where) else -1, -1) - starts
    return np.maximum(found, 0)


def cache_folder(root: Path, records: RecordFiles, fit: Fit) -> Path:
    """Named by the contents of the files, the tokenizer with its chat template, the columns, and the versions."""
    decides = (FORMAT, version("transformers"), records.digest, records.lengths, fit.tokenizer.digest, fit.columns)
    return root / f"tokens-{hashlib.sha256(repr(decides).encode()).hexdigest()[:32]}"


def open_cache(root: Path, records: RecordFiles, fit: Fit) -> TokenCache:
    """The cache of these records, which is made first where it is missing. A collective over all ranks.

    Raises ConfigurationError, on every rank, for the first bad record, and if `root` cannot be written.
    """
    folder, place = cache_folder(root, records, fit), place_on_node()
    # All ranks look before any of them writes; a node is done if all of its ranks have seen the cache.
    seen = gather_over_world((place.node, os.path.lexists(folder), secrets.token_hex(4)))
    token = seen[0][2]
    mine = [is_there for node, is_there, _ in seen if node == place.node]
    if not all(is_there for _, is_there, _ in seen):
        draft = folder.with_name(f".{folder.name}.{token}.{place.node}")
        is_first = place.rank == 0 and not all(mine)
        lock = checked_together(lambda: _start_draft(draft) if is_first else None)
        try:
            found = checked_together(lambda: None if all(mine) else _write_share(draft, records, fit, place))
            written = [one for node, one in gather_over_world((place.node, found)) if node == place.node]
            checked_together(lambda: _publish(draft, folder, written, len(records)) if is_first else None)
        finally:
            if lock is not None:
                shutil.rmtree(draft, ignore_errors=True)
                lock.release()
    # Arrow sees none of it before all of it is known to be what was written.
    checked_together(partial(_require_whole, folder, place))
    return checked_together(lambda: TokenCache(folder, records, fit, place))


def _require_whole(folder: Path, place: PlaceOnNode) -> None:
    """Raises ConfigurationError unless this rank's share of the files has the sizes and checksums of the manifest."""
    found = damage(folder, place.rank, place.size)
    require(not found, _damaged(folder, "; ".join(found)))


def _damaged(folder: Path, why: str) -> str:
    return f"the token cache {folder} is damaged ({why}): remove this folder, and the next start makes it again."


def _columns_of(shard: Path) -> tuple[Any, Any]:
    """The lists of ids and of flags that a shard maps. Raises ConfigurationError if it holds anything else."""
    import pyarrow as pa

    try:
        table = pa.ipc.open_stream(pa.memory_map(str(shard))).read_all()
        ids, trained = columns = table.column("ids"), table.column("trained")
        if (ids.type, trained.type) != (pa.list_(pa.int32()), pa.list_(pa.bool_())):
            raise pa.ArrowInvalid(f"its columns are {ids.type} and {trained.type}")
        table.validate(full=True)
        missing = any(one.null_count or one.values.null_count for one in (*ids.chunks, *trained.chunks))
        if missing or any(a.offsets != b.offsets for a, b in zip(ids.chunks, trained.chunks, strict=True)):
            raise pa.ArrowInvalid("a record has not a flag for each id")
    except (pa.ArrowException, OSError, KeyError) as error:
        raise ConfigurationError(_damaged(shard.parent, f"{shard.name}: {error}")) from error
    return columns


def _require_ids_fit(shard: Path, columns: tuple[Any, Any], largest: int, records: RecordFiles, first: int) -> None:
    """Raises ConfigurationError for an id above `largest` or below 0. first: of the records of the shard."""
    for lists in columns[0].chunks:
        ids = lists.values.to_numpy()
        if len(ids) and (ids.min() < 0 or ids.max() > largest):
            at = int(((ids < 0) | (ids > largest)).argmax())
            record = first + int(np.searchsorted(lists.offsets.to_numpy(), at, side="right")) - 1
            what = f"{shard.name} has the id {ids[at]} for {records.place(record)}; those of the tokenizer are below"
            raise ConfigurationError(_damaged(shard.parent, f"{what} {largest + 1}"))
        first += len(lists)


def _start_draft(draft: Path) -> FolderLock:
    """Make and hold the folder of a draft, after those of killed runs were removed, which nobody holds."""
    try:
        # Those of this start are being made by other nodes at this moment, and may not be held yet.
        for left in [one for one in draft.parent.glob(".tokens-*") if one.stem != draft.stem]:
            with suppress(ConfigurationError, OSError):  # a run at work; no folder of ours
                lock = FolderLock(left, grace_seconds=0)
                if lock.is_held:
                    shutil.rmtree(left, ignore_errors=True)
                lock.release()
        return FolderLock(draft)
    except OSError as error:
        raise _cannot_keep(draft, error) from error


def _write_share(
    draft: Path, records: RecordFiles, fit: Fit, place: PlaceOnNode
) -> tuple[Counter[str], dict[str, FileSum]]:
    """Tokenize this rank's share into a file. Returns the unused fields, and the file's sum by its name."""
    from datasets import Features, List, Value
    from datasets.arrow_writer import ArrowWriter

    bounds = np.linspace(0, len(records), place.size + 1).astype(np.int64)
    share = range(bounds[place.rank], bounds[place.rank + 1])
    features, left_out = Features({"ids": List(Value("int32")), "trained": List(Value("bool"))}), Counter[str]()
    shard = draft / f"tokens-{place.rank:05d}.arrow"
    quiet = place.rank > 0 or len(share) < PROGRESS_FROM
    try:
        draft.mkdir(parents=True, exist_ok=True)
        with ArrowWriter(features=features, path=str(shard)) as writer:
            batch, num_tokens = list[TokenizedRecord](), 0
            for index in track(share, "tokenizing records", disable=quiet, transient=True):
                batch.append(fit.tokenized(records, index))
                left_out.update(fit.left_out(records, index))
                num_tokens += len(batch[-1].ids)
                if len(batch) == _BATCH or num_tokens > _BATCH_TOKENS or index == share[-1]:
                    writer.write_batch({"ids": [one.ids for one in batch], "trained": [one.trained for one in batch]})
                    batch, num_tokens = [], 0
            writer.finalize()
        return left_out, {shard.name: measure(shard)}
    except OSError as error:
        raise _cannot_keep(draft, error) from error


def _cannot_keep(draft: Path, error: OSError) -> ConfigurationError:
    return ConfigurationError(
        f"the tokens of the data cannot be kept in {draft.parent} ({error.strerror or error}): give "
        "--data-cache-path a folder that can be written."
    )


def _publish(
    draft: Path, folder: Path, written: Sequence[tuple[Counter[str], dict[str, FileSum]]], num_records: int
) -> None:
    """Give the draft its name, unless another node or run was faster."""
    left_out = sum((fields for fields, _ in written), Counter[str]())
    try:
        (draft / COUNTS).write_text(json.dumps({"records": num_records, "left_out": left_out}))
        write_manifest(draft, {name: found for _, files in written for name, found in files.items()})
        publish_draft(draft, folder)
    except OSError as error:
        if not folder.is_dir():
            raise ConfigurationError(f"{folder} cannot be written: {error.strerror}.") from error
