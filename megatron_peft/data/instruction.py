"""Instruction data: every record is read once before training, then as a sample; its tokens may be kept in a cache."""

import hashlib
import json
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
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
from megatron_peft.config import ConfigurationError, not_obeyed, require
from megatron_peft.config.untrusted import read_json_object
from megatron_peft.data.files import RecordFiles
from megatron_peft.data.records import Fit, TokenizedRecord
from megatron_peft.data.samples import Sample
from megatron_peft.runtime.launch import PlaceOnNode, checked_together, gather_over_world, place_on_node

PROGRESS_FROM = 20_000  # records; fewer take a moment only


class InstructionDataset:
    """The samples of records that are left after `--overlong`. What is kept in memory: 12 bytes a sample.

    lengths: int32 [samples], input positions of each; warnings: what was truncated or skipped, with the first place
    where it happens; digest: of the files.
    """

    def __init__(self, records: RecordFiles, fit: Fit, cache_root: Path | None = None) -> None:
        """A collective over all ranks: each of them checks and measures an equal share of the records.

        cache_root: where tokens are kept for the next start; None: they are made when they are needed.
        Raises ConfigurationError, on every rank, for the first bad record, and if all samples were skipped.
        """
        self._records, self._fit, self.digest = records, fit, records.digest
        self._cache = None if cache_root is None else open_cache(cache_root, records, fit)
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        share = range(len(records) * rank // world_size, len(records) * (rank + 1) // world_size)
        measured = checked_together(lambda: self._measure(share), first_alone=True)
        positions, overlong, left_out = zip(*gather_over_world(measured), strict=True)
        unread = sum(left_out, Counter()) if self._cache is None else self._cache.left_out
        positions = np.concatenate(positions)
        self._usable = np.flatnonzero(positions)  # int64 [samples]: the record of each
        self.lengths: np.ndarray = positions[self._usable]
        self.warnings = self._warnings(positions == 0, np.concatenate(overlong), unread)
        if not len(self._usable):
            skipped = f"all {len(records)} samples were skipped (from {records.place(0)} on)."
            raise ConfigurationError(" ".join([skipped, *self.warnings]))

    def _measure(self, share: range) -> tuple[np.ndarray, np.ndarray, Counter[str]]:
        """(int32 [share], the input positions of each sample, 0 where it is skipped; bool [share], the record alone is
        longer than --seq-length; number of records by unused field, which the cache has of all).

        Raises ConfigurationError for the first bad record.
        """
        fit, left_out = self._fit, Counter[str]()
        if self._cache is not None:
            whole, kept = self._cache.positions(share, fit.seq_length)
            overlong = whole > fit.seq_length
            for i in np.flatnonzero(overlong | (whole == 0))[:1]:
                fit.require_fits(int(whole[i]), self._records, share[int(i)])
            return np.where(overlong & (fit.overlong != "truncate"), 0, kept), overlong, left_out
        positions, overlong = np.zeros(len(share), dtype=np.int32), np.zeros(len(share), dtype=bool)
        quiet = share.start > 0 or len(share) < PROGRESS_FROM
        for i, index in enumerate(track(share, "reading samples", disable=quiet, transient=True)):
            sample, whole = fit.sample(self._records, index)
            positions[i], overlong[i] = len(sample), whole > fit.seq_length
            left_out.update(fit.left_out(self._records, index))
        return positions, overlong, left_out

    def _warnings(self, skipped: np.ndarray, overlong: np.ndarray, unread: Counter[str]) -> list[str]:
        """skipped, overlong: bool [records]; unread: number of records by unused field."""
        too_long = f"are longer than --seq-length {self._fit.seq_length} and were"
        prompt_only = ", since their prompt alone fills it and no token of a completion is left"
        findings = (
            (overlong & ~skipped, f"{too_long} cut at their end"),
            (overlong & skipped, f"{too_long} skipped{prompt_only if self._fit.overlong == 'truncate' else ''}"),
            (~overlong & skipped, "have no token to learn from and were skipped"),
        )
        fields = ", ".join(f'"{not_obeyed(name)}" ({count} records)' for name, count in unread.most_common())
        return [f"fields that nothing reads were left out: {fields}."] * bool(fields) + [
            f"{int(which.sum())} of {len(which)} samples {what} (first: {self._records.place(int(which.argmax()))})."
            for which, what in findings
            if which.any()
        ]

    def __len__(self) -> int:
        return len(self._usable)

    def __getitem__(self, index: int) -> Sample:
        record = int(self._usable[index])
        if self._cache is not None:
            return self._fit.cut(*self._cache.tokenized(record))
        return self._fit.sample(self._records, record)[0]

    def lengths_of_files(self) -> list[int]:
        """Samples of each source."""
        ends = np.searchsorted(self._usable, np.cumsum(self._records.lengths))
        return np.diff(ends, prepend=0).tolist()


# A cache of tokens: Arrow files that are mapped into memory, so that records are tokenized once, not at each start of a
# run. A cache is a folder, named by all that decides its tokens. It appears when it is whole; the ranks of a node share
# its making. Like a checkpoint it has a manifest with size and CRC-32 of each file, compared whenever it is opened.
#
# The files are those of `datasets`, but `Dataset.map` does not make them. It leaves the work to a process or its forks,
# where here the ranks of a node share it. It reads what its fingerprint names, whatever became of the bytes: a flipped
# bit would be trained on. Its JSON is a table with one set of columns: a record that lacks a field has an empty one.

FORMAT = 2  # of the files, and of how a record becomes tokens
COUNTS = "counts.json"  # beside the shards: {"records": how many, "left_out": {field: records}}
_BATCH, _BATCH_TOKENS = 500, 1 << 20  # records written at once, fewer if they have more tokens


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
        self._ends = np.cumsum([0, *(len(ids) for ids, _ in self._columns)], dtype=np.int64)
        num_records = int(self._ends[-1])
        require(
            num_records == counts.get("records") == len(records),
            _damaged(folder, f"it has {num_records} records, and should have {len(records)}"),
        )
        for shard in range(place.rank, len(shards), place.size):
            ids, first = self._columns[shard][0], int(self._ends[shard])
            _require_ids_fit(shards[shard], ids, fit.tokenizer.largest_id, records, first)

    def tokenized(self, index: int) -> TokenizedRecord:
        """All ids of a record, and which of them the loss counts."""
        shard = int(np.searchsorted(self._ends, index, side="right")) - 1
        ids, trained = (column[index - int(self._ends[shard])].values for column in self._columns[shard])
        return TokenizedRecord(ids.to_numpy(), trained.to_numpy(zero_copy_only=False))

    def positions(self, share: range, seq_length: int) -> tuple[np.ndarray, np.ndarray]:
        """int32 [share] each: input positions of whole records, and of what --seq-length leaves of them."""
        whole, kept = np.zeros((2, len(share)), dtype=np.int32)
        first = 0  # record of the array of masks
        for masks in (chunk for _, column in self._columns for chunk in column.chunks):
            low, high = max(share.start, first), min(share.stop, first + len(masks))
            if low < high:
                offsets = masks.offsets.to_numpy()[low - first : high - first + 1]
                flags = masks.values.to_numpy(zero_copy_only=False)
                # The number of the last trained token before each; the first token of a record is not predicted.
                last = np.append(-1, np.maximum.accumulate(np.where(flags, np.arange(len(flags)), -1)))
                starts, ends, rows = offsets[:-1], offsets[1:], slice(low - share.start, high - share.start)
                whole[rows] = np.maximum(last[ends] - starts, 0)
                kept[rows] = np.maximum(last[np.minimum(ends, starts + seq_length + 1)] - starts, 0)
            first += len(masks)
        return whole, kept


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
        missing = any(lists.null_count or lists.values.null_count for lists in (*ids.chunks, *trained.chunks))
        if missing or any(a.offsets != b.offsets for a, b in zip(ids.chunks, trained.chunks, strict=True)):
            raise pa.ArrowInvalid("a record has not a flag for each id")
    except (pa.ArrowException, OSError, KeyError) as error:
        raise ConfigurationError(_damaged(shard.parent, f"{shard.name}: {error}")) from error
    return columns


def _require_ids_fit(shard: Path, column: Any, largest: int, records: RecordFiles, first: int) -> None:
    """Raises ConfigurationError for an id above `largest` or below 0. first: of the records of the shard."""
    for lists in column.chunks:
        ids = lists.values.to_numpy()
        if len(ids) and (ids.min() < 0 or ids.max() > largest):
            at = int(((ids < 0) | (ids > largest)).argmax())
            record = first + int(np.searchsorted(lists.offsets.to_numpy(), at, side="right")) - 1
            what = f"{shard.name} has the id {ids[at]} for {records.place(record)}; those of the tokenizer are below"
            raise ConfigurationError(_damaged(shard.parent, f"{what} {largest + 1}"))
        first += len(lists)


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
    is_done = all(is_there for node, is_there, _ in seen if node == place.node)
    if not all(is_there for _, is_there, _ in seen):
        draft = folder.with_name(f".{folder.name}.{seen[0][2]}.{place.node}")
        is_first = place.rank == 0 and not is_done
        lock = checked_together(lambda: _start_draft(draft) if is_first else None)
        try:
            share = checked_together(lambda: None if is_done else _write_share(draft, records, fit, place))
            shares = [share for node, share in gather_over_world((place.node, share)) if node == place.node]
            checked_together(lambda: _publish(draft, folder, shares, len(records)) if is_first else None)
        finally:
            if lock is not None:
                shutil.rmtree(draft, ignore_errors=True)
                lock.release()

    def require_whole() -> None:
        problems = damage(folder, place.rank, place.size)  # of this rank's share of the files
        require(not problems, _damaged(folder, "; ".join(problems)))

    # Arrow sees none of it before all of it is known to be what was written.
    checked_together(require_whole)
    return checked_together(lambda: TokenCache(folder, records, fit, place))


def _start_draft(draft: Path) -> FolderLock:
    """Make and hold the folder of a draft, after those of killed runs were removed, which nobody holds."""
    try:
        # Those of this start are being made by other nodes at this moment, and may not be held yet.
        for left in [other for other in draft.parent.glob(".tokens-*") if other.stem != draft.stem]:
            with suppress(ConfigurationError, OSError):  # a run at work; no folder of ours
                lock = FolderLock(left, grace_seconds=0)
                if lock.is_held:
                    shutil.rmtree(left, ignore_errors=True)
                lock.release()
        return FolderLock(draft)
    except OSError as error:
        raise _cannot_keep(draft.parent, error) from error


def _write_share(
    draft: Path, records: RecordFiles, fit: Fit, place: PlaceOnNode
) -> tuple[Counter[str], dict[str, FileSum]]:
    """Tokenize this rank's share into a file. Returns the unused fields, and the file's sum by its name."""
    from datasets import Features, List, Value
    from datasets.arrow_writer import ArrowWriter

    share = range(len(records) * place.rank // place.size, len(records) * (place.rank + 1) // place.size)
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
                    writer.write_batch({name: [getattr(record, name) for record in batch] for name in features})
                    batch, num_tokens = [], 0
            writer.finalize()
        return left_out, {shard.name: measure(shard)}
    except OSError as error:
        raise _cannot_keep(draft.parent, error) from error


def _publish(
    draft: Path, folder: Path, shares: Sequence[tuple[Counter[str], dict[str, FileSum]]], num_records: int
) -> None:
    """Give the draft its name, unless another node or run was faster. shares: what `_write_share` returned."""
    left_out = sum((fields for fields, _ in shares), Counter[str]())
    try:
        (draft / COUNTS).write_text(json.dumps({"records": num_records, "left_out": left_out}))
        write_manifest(draft, {name: file_sum for _, files in shares for name, file_sum in files.items()})
        publish_draft(draft, folder)
    except OSError as error:
        if not folder.is_dir():
            raise _cannot_keep(folder.parent, error) from error


def _cannot_keep(root: Path, error: OSError) -> ConfigurationError:
    return ConfigurationError(
        f"the tokens of the data cannot be kept in {root} ({error.strerror or error}): give --data-cache-path a folder "
        "that can be written."
    )
