"""Tokens of records in Arrow files that are mapped into memory: tokenized once, not at each start of a run.

A cache is a folder, named by all that decides its tokens. It appears when it is whole; the ranks of a node share its
making.
"""

import hashlib
import json
import secrets
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from megatron_peft.config import ConfigurationError, require
from megatron_peft.config.untrusted import read_json_object
from megatron_peft.data.files import RecordFiles
from megatron_peft.data.records import Fit, TokenizedRecord
from megatron_peft.runtime.launch import PlaceOnNode, checked_together, gather_over_world, place_on_node

FORMAT = 1  # of the files, and of how a record becomes tokens
MANIFEST = "manifest.json"
_BATCH = 500  # records written at once


class TokenCache:
    """The tokens of all records, by number; left_out: number of records by unused field."""

    def __init__(self, folder: Path) -> None:
        """Raises ConfigurationError if the folder is damaged."""
        import datasets

        described = read_json_object(folder / MANIFEST)
        self.left_out: Counter[str] = Counter(described["left_out"])
        shards = [folder / name for name in described["shards"]]
        try:
            tables = [datasets.Dataset.from_file(str(path)).data for path in shards]
        except Exception as error:  # noqa: BLE001 - of datasets and pyarrow
            raise ConfigurationError(f"the cache {folder} is damaged ({error}): remove it.") from error
        self._columns = [(table.column("ids"), table.column("trained")) for table in tables]
        self._ends = np.cumsum([len(table) for table in tables])
        require(
            int(self._ends[-1]) == described["records"],
            f"the cache {folder} is damaged: it has {self._ends[-1]} of {described['records']} records; remove it.",
        )

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
    seen = gather_over_world((place.node, (folder / MANIFEST).is_file(), secrets.token_hex(4)))
    token = seen[0][2]
    mine = [is_there for node, is_there, _ in seen if node == place.node]
    if not all(is_there for _, is_there, _ in seen):
        draft = folder.with_name(f".{folder.name}.{token}.{place.node}")
        try:
            found = checked_together(lambda: None if all(mine) else _write_share(draft, records, fit, place))
            counts = [left_out for node, left_out in gather_over_world((place.node, found)) if node == place.node]
            is_first = place.rank == 0 and not all(mine)
            checked_together(lambda: _publish(draft, folder, counts, place, len(records)) if is_first else None)
        finally:
            if place.rank == 0:
                shutil.rmtree(draft, ignore_errors=True)
    return checked_together(lambda: TokenCache(folder))


def _write_share(draft: Path, records: RecordFiles, fit: Fit, place: PlaceOnNode) -> Counter[str]:
    """Tokenize this rank's share into a file. Returns the unused fields."""
    from datasets import Features, List, Value
    from datasets.arrow_writer import ArrowWriter

    bounds = np.linspace(0, len(records), place.size + 1).astype(np.int64)
    share = range(bounds[place.rank], bounds[place.rank + 1])
    features, left_out = Features({"ids": List(Value("int32")), "trained": List(Value("bool"))}), Counter[str]()
    try:
        draft.mkdir(parents=True, exist_ok=True)
        with ArrowWriter(features=features, path=str(draft / _shard(place.rank))) as writer:
            for begin in range(0, len(share), _BATCH):
                some = share[begin : begin + _BATCH]
                tokens = [fit.tokenized(records, index) for index in some]
                writer.write_batch({"ids": [one.ids for one in tokens], "trained": [one.trained for one in tokens]})
                left_out.update(name for index in some for name in fit.left_out(records, index))
            writer.finalize()
    except OSError as error:
        raise ConfigurationError(
            f"the tokens of the data cannot be kept in {draft.parent} ({error.strerror or error}): give "
            "--data-cache-path a folder that can be written."
        ) from error
    return left_out


def _shard(rank: int) -> str:
    return f"tokens-{rank:05d}.arrow"


def _publish(draft: Path, folder: Path, counts: Sequence[Counter[str]], place: PlaceOnNode, num_records: int) -> None:
    """Give the draft its name, unless another node or run was faster."""
    shards = [_shard(rank) for rank in range(place.size)]
    described = {"records": num_records, "shards": shards, "left_out": sum(counts, Counter())}
    try:
        (draft / MANIFEST).write_text(json.dumps(described))
        draft.rename(folder)
    except OSError as error:
        if not (folder / MANIFEST).is_file():
            raise ConfigurationError(f"{folder} cannot be written: {error.strerror}.") from error
