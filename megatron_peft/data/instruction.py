"""Instruction data: every record is read once before training, then as a sample; its tokens may be kept in a cache."""

import hashlib
import json
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch.distributed as dist
from rich.progress import track

from megatron_peft.checkpoint import folders
from megatron_peft.config import ConfigurationError, not_obeyed, require, writing
from megatron_peft.config.untrusted import read_json_object
from megatron_peft.data.files import RecordFiles
from megatron_peft.data.records import Fit, TokenizedRecord
from megatron_peft.data.samples import Sample, sample_from_ids
from megatron_peft.runtime.launch import checked_together, gather_over_world, place_on_node

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
        positions, left_out = zip(*gather_over_world(measured), strict=True)
        whole, kept = np.concatenate(positions, axis=1)
        overlong = whole > fit.seq_length
        if fit.overlong == "error" and (refused := overlong | (whole == 0)).any():
            self._refuse(int(refused.argmax()), int(whole[refused.argmax()]))
        positions = np.where(overlong & (fit.overlong == "skip"), 0, kept)
        self._usable = np.flatnonzero(positions)  # int64 [samples]: the record of each
        self.lengths: np.ndarray = positions[self._usable]
        unread = sum(left_out, Counter()) if self._cache is None else self._cache.left_out
        self.warnings = self._warnings(positions == 0, overlong, unread)
        if not len(self._usable):
            skipped = f"all {len(records)} samples were skipped (from {records.place(0)} on)."
            raise ConfigurationError(" ".join([skipped, *self.warnings]))

    def _measure(self, share: range) -> tuple[np.ndarray, Counter[str]]:
        """int32 [2, share], the input positions of the whole record and of what --seq-length leaves of it; number of
        records by unused field, which the cache has of all.

        Raises ConfigurationError for the first bad record.
        """
        fit, left_out = self._fit, Counter[str]()
        if self._cache is not None:
            return self._cache.positions(share, fit.seq_length), left_out
        positions = np.zeros((2, len(share)), dtype=np.int32)
        quiet = share.start > 0 or len(share) < PROGRESS_FROM
        for i, index in enumerate(track(share, "reading samples", disable=quiet, transient=True)):
            ids, trained = fit.tokenized(self._records, index)
            positions[:, i] = [len(sample_from_ids(ids, trained, most)) for most in (len(ids), fit.seq_length)]
            left_out.update(fit.left_out(self._records, index))
        return positions, left_out

    def _refuse(self, record: int, length: int) -> None:
        """Raise the error of --overlong error for a record that takes so many positions."""
        what, way_out = "has no token to learn from", "give it a text, or give --overlong skip"
        if length:
            what = f"takes {length} tokens, above --seq-length {self._fit.seq_length}"
            way_out = "raise it, or give --overlong truncate or --overlong skip"
        raise ConfigurationError(f"{self._records.place(record)}: the sample {what}: {way_out}.")

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
        record, cache = int(self._usable[index]), self._cache
        return self._fit.cut(*(cache.tokenized(record) if cache else self._fit.tokenized(self._records, record)))

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

    def __init__(self, folder: Path, num_records: int) -> None:
        """Raises ConfigurationError unless the folder holds lists of ids and flags for so many records."""
        import pyarrow as pa

        self.folder = folder
        shards = [folder / name for name in sorted(folders.read_manifest(folder)) if name.endswith(".arrow")]
        try:
            table = pa.concat_tables([pa.ipc.open_stream(pa.memory_map(str(shard))).read_all() for shard in shards])
            table.validate(full=True)
            self._ids, self._trained = table.column("ids"), table.column("trained")
            self.left_out = Counter[str](read_json_object(folder / COUNTS)["left_out"])
        except (pa.ArrowException, KeyError, TypeError) as error:
            raise ConfigurationError(_damaged(folder, str(error))) from error
        types = self._ids.type, self._trained.type
        is_one = len(table) == num_records and types == (pa.list_(pa.int32()), pa.list_(pa.bool_()))
        told = (
            f"it has {len(table)} records of {types[0]} and {types[1]}, and should have {num_records} of ids and flags"
        )
        require(is_one, _damaged(folder, told))

    def tokenized(self, index: int) -> TokenizedRecord:
        """All ids of a record, and which of them the loss counts."""
        ids, trained = self._ids[index].values, self._trained[index].values
        return TokenizedRecord(ids.to_numpy(), trained.to_numpy(zero_copy_only=False))

    def positions(self, share: range, seq_length: int) -> np.ndarray:
        """int32 [2, share]: input positions of whole records, and of what --seq-length leaves of them."""
        positions = [np.zeros((2, 0), dtype=np.int32)]
        for masks in self._trained.slice(share.start, len(share)).chunks:
            offsets, flags = masks.offsets.to_numpy(), masks.values.to_numpy(zero_copy_only=False)
            # The number of the last trained token before each; the first token of a record is not predicted.
            last = np.append(-1, np.maximum.accumulate(np.where(flags, np.arange(len(flags)), -1))).astype(np.int32)
            starts, ends = offsets[:-1], offsets[1:]
            ends_kept = np.minimum(ends, starts + seq_length + 1)
            positions.append(np.maximum(last[np.stack([ends, ends_kept])] - starts, 0))
        return np.concatenate(positions, axis=1)

    def require_ids_fit(self, share: range, largest: int, records: RecordFiles) -> None:
        """Raises ConfigurationError for an id of these records that is above `largest` or below 0."""
        first = share.start
        for lists in self._ids.slice(share.start, len(share)).chunks:
            ids, offsets = lists.flatten().to_numpy(), lists.offsets.to_numpy()
            if (wrong := (ids < 0) | (ids > largest)).any():
                at = int(wrong.argmax())
                place = records.place(first + int(np.searchsorted(offsets - offsets[0], at, side="right")) - 1)
                why = f"the id {ids[at]} for {place}; those of the tokenizer are below {largest + 1}"
                raise ConfigurationError(_damaged(self.folder, why))
            first += len(lists)


def _damaged(folder: Path, why: str) -> str:
    return f"the token cache {folder} is damaged ({why}): remove this folder, and the next start makes it again."


def cache_folder(root: Path, records: RecordFiles, fit: Fit) -> Path:
    """Named by the contents of the files, the tokenizer with its chat template, the columns, and the versions."""
    decides = (FORMAT, version("transformers"), records.digest, records.lengths, fit.tokenizer.digest, fit.columns)
    return root / f"tokens-{hashlib.sha256(repr(decides).encode()).hexdigest()[:32]}"


def open_cache(root: Path, records: RecordFiles, fit: Fit) -> TokenCache:
    """The cache of these records, which is made first where it is missing. A collective over all ranks.

    Raises ConfigurationError, on every rank, for the first bad record, and if `root` cannot be written.
    """
    folder, place = cache_folder(root, records, fit), place_on_node()
    share = range(len(records) * place.rank // place.size, len(records) * (place.rank + 1) // place.size)
    # All ranks look before any of them writes; a node is done if all of its ranks have seen the cache.
    seen = gather_over_world((place.node, os.path.lexists(folder), secrets.token_hex(4)))
    is_done = all(is_there for node, is_there, _ in seen if node == place.node)
    if not all(is_there for _, is_there, _ in seen):
        draft = folder.with_name(f".{folder.name}.{seen[0][2]}.{place.node}")
        is_first = place.rank == 0 and not is_done
        lock = checked_together(lambda: _start_draft(draft) if is_first else None)
        try:
            written = checked_together(
                lambda: None if is_done else _write_share(draft, records, fit, place.rank, share)
            )
            of_node = [written for node, written in gather_over_world((place.node, written)) if node == place.node]
            checked_together(lambda: _publish(draft, folder, of_node, len(records)) if is_first else None)
        finally:
            if lock is not None:
                shutil.rmtree(draft, ignore_errors=True)
                lock.release()

    def opened() -> TokenCache:
        cache = TokenCache(folder, len(records))
        cache.require_ids_fit(share, fit.tokenizer.largest_id, records)
        return cache

    def require_whole() -> None:
        problems = folders.damage(folder, place.rank, place.size)  # of this rank's share of the files
        require(not problems, _damaged(folder, "; ".join(problems)))

    # Arrow sees none of it before all of it is known to be what was written.
    checked_together(require_whole)
    return checked_together(opened)


def _writing_in(root: Path) -> AbstractContextManager[None]:
    way_out = "give --data-cache-path a folder that can be written"
    return writing("the tokens of the data", way_out, f"cannot be kept in {root}")


def _start_draft(draft: Path) -> folders.FolderLock:
    """Make and hold the folder of a draft, after those of killed runs were removed, which nobody holds."""
    with _writing_in(draft.parent):
        # Those of this start are being made by other nodes at this moment, and may not be held yet.
        for left in [other for other in draft.parent.glob(".tokens-*") if other.stem != draft.stem]:
            with suppress(ConfigurationError, OSError):  # a run at work; no folder of ours
                lock = folders.FolderLock(left, grace_seconds=0)
                if lock.is_held:
                    shutil.rmtree(left, ignore_errors=True)
                lock.release()
        return folders.FolderLock(draft)


def _write_share(
    draft: Path, records: RecordFiles, fit: Fit, rank: int, share: range
) -> tuple[Counter[str], dict[str, folders.FileSum]]:
    """Tokenize the share of a node's rank into a file. Returns the unused fields, and the file's sum by its name."""
    from datasets import Features, List, Value
    from datasets.arrow_writer import ArrowWriter

    features, left_out = Features({"ids": List(Value("int32")), "trained": List(Value("bool"))}), Counter[str]()
    shard = draft / f"tokens-{rank:05d}.arrow"
    quiet = rank > 0 or len(share) < PROGRESS_FROM
    with _writing_in(draft.parent):
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
        return left_out, {shard.name: folders.measure(shard)}


def _publish(
    draft: Path, folder: Path, written: Sequence[tuple[Counter[str], dict[str, folders.FileSum]]], num_records: int
) -> None:
    """Give the draft its name, unless another node or run was faster. written: what `_write_share` returned."""
    left_out = sum((fields for fields, _ in written), Counter[str]())
    with _writing_in(folder.parent):
        (draft / COUNTS).write_text(json.dumps({"records": num_records, "left_out": left_out}))
        folders.write_manifest(draft, {name: file_sum for _, files in written for name, file_sum in files.items()})
        try:
            folders.publish_draft(draft, folder)
        except OSError:
            if not folder.is_dir():
                raise
