"""Instruction data: every record is read once before training, then as a sample; its tokens may be kept in a cache."""

import hashlib
import json
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from megatron_peft.checkpoint import folders
from megatron_peft.config import ConfigurationError, not_obeyed, require, writing
from megatron_peft.config.untrusted import read_json_object
from megatron_peft.data.files import RecordFiles
from megatron_peft.data.node_files import NodeFiles, sharers_of
from megatron_peft.data.records import Fit, TokenizedRecord
from megatron_peft.data.samples import Sample, index_type, sample_from_ids
from megatron_peft.runtime.launch import (
    checked_together,
    from_first_of,
    from_rank,
    gather_over_world,
    place_in_world,
    share_of,
)

PROGRESS_FROM = 20_000  # records; fewer take a moment only


class InstructionDataset:
    """The samples of records that are left after `--overlong`. What each takes is a file of the node's: 8 bytes.

    lengths: int32 [samples], input positions of each; longest_sample: of them; warnings: what was truncated or skipped,
    with the first place where it happens; digest: of the files.
    """

    def __init__(
        self, records: RecordFiles, fit: Fit, cache_root: Path | None = None, node: NodeFiles | None = None
    ) -> None:
        """A collective over all ranks: each of them checks and measures an equal share of the records.

        cache_root: where tokens are kept for the next start; None: they are made when they are needed.
        Raises ConfigurationError, on every rank, for the first bad record, and if all samples were skipped.
        """
        self._records, self._fit, self.digest = records, fit, records.digest
        self._cache = None if cache_root is None else open_cache(cache_root, records, fit)
        node = node or NodeFiles()
        rank, num_ranks = place_in_world()
        share = share_of(len(records), rank, num_ranks)
        (whole, kept), left_out = checked_together(lambda: self._measure(share), first_alone=True)
        overlong = whole > fit.seq_length
        longest = max(gather_over_world(int(whole.max(initial=0))))  # of whole records
        refused = np.flatnonzero(overlong | (whole == 0))[:1] if fit.overlong == "error" else ()
        checked_together(lambda: [self._refuse(share[i], whole[i], longest) for i in refused], first_alone=True)
        kept = np.where(overlong & (fit.overlong == "skip"), 0, kept)
        used = np.flatnonzero(kept)
        numbers = (share.start + used).astype(index_type(len(records)))
        self._usable = node.gathered(numbers, range(num_ranks))  # the record of each sample
        self.lengths = node.gathered(kept[used], range(num_ranks))
        skipped = kept == 0
        which = (overlong & ~skipped, overlong & skipped, ~overlong & skipped)
        findings = [np.flatnonzero(each) + share.start for each in which]
        by_rank = gather_over_world((left_out, [(len(indices), indices[:1]) for indices in findings]))
        unread = sum((fields for fields, _ in by_rank), Counter[str]()) if self._cache is None else self._cache.left_out
        self.warnings = self._warnings([findings for _, findings in by_rank], unread, longest)
        if not len(self._usable):
            none_left = f"all {len(records)} samples were skipped (from {records.place(0)} on)."
            raise ConfigurationError(" ".join([none_left, *self.warnings]))
        self.longest_sample = int(self.lengths.max())

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

    def _refuse(self, record: int, length: int, longest: int) -> None:
        """Raise the error of --overlong error for a record of `length` positions, where the longest takes `longest`."""
        what, way_out = "has no token to learn from", "give it a text, or give --overlong skip"
        if length:
            what = f"takes {length} tokens, above --seq-length {self._fit.seq_length}"
            way_out = f"raise it ({longest} holds all samples), or give --overlong truncate or --overlong skip"
        raise ConfigurationError(f"{self._records.place(record)}: the sample {what}: {way_out}.")

    def _warnings(
        self, findings: Sequence[Sequence[tuple[int, np.ndarray]]], unread: Counter[str], longest: int
    ) -> list[str]:
        """Return a sentence for each kind of finding.

        findings: of each rank, how many were cut, skipped for their length and empty, and the first of each.
        unread: number of records by unused field.
        longest: positions of the longest whole record.
        """
        too_long = f"are longer than --seq-length {self._fit.seq_length} ({longest} would hold all) and were"
        prompt_only = ", since their prompt alone fills it and no token of a completion is left"
        outcomes = (
            f"{too_long} cut at their end",
            f"{too_long} skipped{prompt_only if self._fit.overlong == 'truncate' else ''}",
            "have no token to learn from and were skipped",
        )
        fields = ", ".join(f'"{not_obeyed(name)}" ({count} records)' for name, count in unread.most_common())
        warnings = [f"fields that nothing reads were left out: {fields}."] * bool(fields)
        for what, by_rank in zip(outcomes, zip(*findings, strict=True), strict=True):
            if total := sum(count for count, _ in by_rank):
                first = self._records.place(int(np.concatenate([at for _, at in by_rank])[0]))
                warnings.append(f"{total} of {len(self._records)} samples {what} (first: {first}).")
        return warnings

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
# run. A cache is a folder, named by all that decides its tokens. It appears when it is whole; all ranks share its
# making, and what they have made is copied where nodes have disks of their own, as is a cache that some nodes lack.
# Like a checkpoint it has a manifest with size and CRC-32 of each file, compared whenever it is opened.
#
# The files are those of `datasets`, but `Dataset.map` does not make them. It leaves the work to a process or its forks,
# where here all ranks share it. It reads what its fingerprint names, whatever became of the bytes: a flipped
# bit would be trained on. Its JSON is a table with one set of columns: a record that lacks a field has an empty one.

FORMAT = 4  # of the files, and of how a record becomes tokens
COUNTS = "counts.json"  # beside the shards: {"records": how many, "left_out": {field: records}}
_BATCH, _BATCH_TOKENS = 500, 1 << 20  # records written at once, fewer if they have more tokens
MOST_SHARDS = 64  # files of a cache: each rank opens all of them
_COPIED_BYTES = 1 << 25  # at once


class TokenCache:
    """The tokens of all records, by number; left_out: number of records by unused field."""

    def __init__(self, folder: Path, num_records: int) -> None:
        """Raises ConfigurationError unless the folder holds lists of ids and flags for so many records."""
        import pyarrow as pa

        self.folder = folder
        shards = [folder / name for name in sorted(folders.read_manifest(folder)) if name.endswith(".arrow")]
        try:
            table = pa.concat_tables([_mapped(shard) for shard in shards])
            table.validate(full=True)
            self._ids, self._trained = table.column("ids"), table.column("trained")
            self.left_out = Counter[str](read_json_object(folder / COUNTS)["left_out"])
        except (pa.ArrowException, KeyError, TypeError) as error:
            raise ConfigurationError(_damaged(folder, str(error))) from error
        types = self._ids.type, self._trained.type
        is_one = len(table) == num_records and types == (pa.list_(pa.int32()), pa.list_(pa.bool_()))
        problem = (
            f"it has {len(table)} records of {types[0]} and {types[1]}, and should have {num_records} of ids and flags"
        )
        require(is_one, _damaged(folder, problem))

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


def _mapped(shard: Path) -> Any:
    """The table of a file, which stays mapped but not open: a process may have few files open."""
    import pyarrow as pa

    with pa.memory_map(str(shard)) as file:
        return pa.ipc.open_stream(file).read_all()


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
    folder, sharers, (rank, num_ranks) = cache_folder(root, records, fit), sharers_of(root), place_in_world()
    share = share_of(len(records), rank, num_ranks)
    is_there = from_first_of(sharers, lambda: os.path.lexists(folder))
    seen = gather_over_world((sharers, is_there, secrets.token_hex(4)))
    roots = [other for other, _, _ in seen]  # of each rank
    members = [other for other in range(num_ranks) if roots[other] == sharers]
    is_first = rank == members[0]

    def require_whole(is_due: bool) -> None:  # this rank's share of the files
        problems = folders.damage(folder, members.index(rank), len(members)) if is_due else []
        require(not problems, _damaged(folder, "; ".join(problems)))

    # Arrow sees none of it, and no other node gets any, before all of it is known to be what was written.
    checked_together(lambda: require_whole(is_there))
    if not all(there := [is_there for _, is_there, _ in seen]):
        draft = folder.with_name(f".{folder.name}.{seen[0][2]}.{sharers}")
        lock = checked_together(lambda: _start_draft(draft) if is_first and not is_there else None)
        try:
            if any(there):
                source = there.index(True)
                sums = from_rank(source, lambda: folders.read_manifest(folder))
                for name in sums:
                    _copy(source, folder / name, draft / name if lock else None)
            else:
                sums = _write_shards(draft, records, fit, roots, members)
            checked_together(lambda: _publish(draft, folder, sums) if lock else None)
        finally:
            if lock is not None:
                shutil.rmtree(draft, ignore_errors=True)
                lock.release()

    def opened() -> TokenCache:
        cache = TokenCache(folder, len(records))
        cache.require_ids_fit(share, fit.tokenizer.largest_id, records)
        return cache

    checked_together(lambda: require_whole(not is_there))
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


def _write_shards(
    draft: Path, records: RecordFiles, fit: Fit, roots: Sequence[str], members: Sequence[int]
) -> dict[str, folders.FileSum]:
    """Tokenize all records, each rank its share, into a draft of each root. Returns the sums of this one's shards.

    roots: that of each rank; members: the ranks of this one. A collective.
    """
    rank, num_ranks = place_in_world()
    num_shards = min(num_ranks, MOST_SHARDS)
    parts = [draft / f"part-{other:05d}.arrow" for other in range(num_ranks)]
    share = share_of(len(records), rank, num_ranks)
    left_out = gather_over_world(checked_together(lambda: _write_share(parts[rank], records, fit, share)))
    for source, part in enumerate(parts) if len(members) < num_ranks else ():
        _copy(source, part, part if rank == members[0] != source and roots[source] != roots[rank] else None)

    def join() -> dict[str, folders.FileSum]:
        with _writing_in(draft.parent):
            if rank == members[0]:
                counts = {"records": len(records), "left_out": sum(left_out, Counter[str]())}
                (draft / COUNTS).write_text(json.dumps(counts))
            own = share_of(num_shards, members.index(rank), len(members))
            return dict(
                _join(draft, number, [parts[i] for i in share_of(num_ranks, number, num_shards)]) for number in own
            )

    joined = gather_over_world(checked_together(join))
    return {name: file_sum for other in members for name, file_sum in joined[other].items()}


def _write_share(part: Path, records: RecordFiles, fit: Fit, share: range) -> Counter[str]:
    """Tokenize a rank's share into a file. Returns the number of records by unused field."""
    from datasets import Features, List, Value
    from datasets.arrow_writer import ArrowWriter

    features, left_out = Features({"ids": List(Value("int32")), "trained": List(Value("bool"))}), Counter[str]()
    quiet = share.start > 0 or len(share) < PROGRESS_FROM
    with _writing_in(part.parent.parent), ArrowWriter(features=features, path=str(part)) as writer:
        batch, num_tokens = list[TokenizedRecord](), 0
        for index in track(share, "tokenizing records", disable=quiet, transient=True):
            batch.append(fit.tokenized(records, index))
            left_out.update(fit.left_out(records, index))
            num_tokens += len(batch[-1].ids)
            if len(batch) == _BATCH or num_tokens > _BATCH_TOKENS or index == share[-1]:
                writer.write_batch({name: [getattr(record, name) for record in batch] for name in features})
                batch, num_tokens = [], 0
        writer.finalize()
    return left_out


def _join(draft: Path, number: int, parts: Sequence[Path]) -> tuple[str, folders.FileSum]:
    """Make a shard of the parts. Returns its name and its sum."""
    import pyarrow as pa

    shard = draft / f"tokens-{number:05d}.arrow"
    tables = [_mapped(part) for part in parts]
    if len(parts) > 1:
        with pa.OSFile(str(shard), "wb") as file, pa.ipc.new_stream(file, tables[0].schema) as writer:
            writer.write_table(pa.concat_tables(tables))
        for part in parts:
            part.unlink()
    else:
        parts[0].rename(shard)
    return shard.name, folders.measure(shard)


def _copy(source: int, path: Path, to: Path | None) -> None:
    """Copy `path` of the rank `source` to `to`, on ranks that give one, a block at a time. A collective."""

    def read(begin: int) -> bytes:
        with path.open("rb") as file:
            file.seek(begin)
            return file.read(_COPIED_BYTES)

    def write(block: bytes) -> None:
        if to:
            with _writing_in(to.parent.parent), to.open("ab") as file:
                file.write(block)

    num_bytes = 0
    while block := from_rank(source, partial(read, num_bytes)):
        checked_together(partial(write, block))
        num_bytes += len(block)


def _publish(draft: Path, folder: Path, sums: Mapping[str, folders.FileSum]) -> None:
    """Give the draft its name, unless another node or run was faster."""
    with _writing_in(folder.parent):
        folders.write_manifest(draft, sums)
        try:
            folders.publish_draft(draft, folder)
        except OSError:
            if not folder.is_dir():
                raise
