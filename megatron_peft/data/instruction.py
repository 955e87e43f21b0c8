"""Instruction data: records surveyed once, read as samples."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch.distributed as dist
from rich.progress import track

from megatron_peft.config import ConfigurationError, not_obeyed
from megatron_peft.data.files import RecordFiles
from megatron_peft.data.records import Fit
from megatron_peft.data.samples import Sample
from megatron_peft.data.token_cache import PROGRESS_FROM, TokenCache, open_cache
from megatron_peft.runtime.launch import gather_over_world

# One pass over the data before training checks every record and measures its length, so a bad record ends the run at
# its start. Each rank surveys an equal share of the records. What is kept: 5 bytes a record.


@dataclass(frozen=True)
class Survey:
    """What one pass over the data found.

    positions: int32 [records], the input positions of each sample, 0 where it is skipped; overlong: bool [records], the
    record alone is longer than --seq-length; left_out: number of records by unused field.
    """

    positions: np.ndarray
    overlong: np.ndarray
    left_out: Counter[str]

    @property
    def usable(self) -> np.ndarray:
        """int64 [samples]: the record of each sample."""
        return np.flatnonzero(self.positions)

    def summary(self, records: RecordFiles, fit: Fit) -> list[str]:
        """A sentence for each thing that the user should know, with the first place where it happens."""
        skipped = self.positions == 0
        too_long = f"are longer than --seq-length {fit.seq_length} and were"
        prompt_only = ", since their prompt alone fills it and no token of a completion is left"
        findings = (
            (self.overlong & ~skipped, f"{too_long} cut at their end"),
            (self.overlong & skipped, f"{too_long} skipped{prompt_only if fit.overlong == 'truncate' else ''}"),
            (~self.overlong & skipped, "have no token to learn from and were skipped"),
        )
        fields = ", ".join(f'"{not_obeyed(name)}" ({count} records)' for name, count in self.left_out.most_common())
        unread = [f"fields that nothing reads were left out: {fields}."] if fields else []
        return unread + [
            f"{int(which.sum())} of {len(which)} samples {what} (first: {records.place(int(which.argmax()))})."
            for which, what in findings
            if which.any()
        ]


def survey(records: RecordFiles, fit: Fit, cache: TokenCache | None = None) -> Survey:
    """Read every record once, or the lengths of those in the cache. A collective over all ranks, with one result.

    Raises ConfigurationError, on every rank, for the first bad record, and if all samples were skipped.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    bounds = np.linspace(0, len(records), world_size + 1).astype(np.int64)
    share = range(bounds[rank], bounds[rank + 1])
    own = _survey_share(records, fit, share) if cache is None else _survey_cached(records, fit, share, cache)
    shares = gather_over_world(own)
    for share in shares:
        if isinstance(share, str):
            raise ConfigurationError(share)
    positions, overlong, left_out = zip(*shares, strict=True)
    unread = sum(left_out, Counter()) if cache is None else cache.left_out
    found = Survey(np.concatenate(positions), np.concatenate(overlong), unread)
    if not found.positions.any():
        why = " ".join(found.summary(records, fit))
        raise ConfigurationError(f"all {len(records)} samples were skipped (from {records.place(0)} on). {why}")
    return found


def _survey_share(records: RecordFiles, fit: Fit, share: range) -> tuple[np.ndarray, np.ndarray, Counter[str]] | str:
    """What `survey` gathers of some records. A bad record is returned as its message: raising would hang the others."""
    positions = np.zeros(len(share), dtype=np.int32)
    overlong = np.zeros(len(share), dtype=bool)
    left_out: Counter[str] = Counter()
    quiet = share.start > 0 or len(share) < PROGRESS_FROM
    try:
        for i, index in enumerate(track(share, "reading samples", disable=quiet, transient=True)):
            sample, whole = fit.sample(records, index)
            positions[i], overlong[i] = len(sample), whole > fit.seq_length
            left_out.update(fit.left_out(records, index))
    except ConfigurationError as error:
        return str(error)
    return positions, overlong, left_out


def _survey_cached(
    records: RecordFiles, fit: Fit, share: range, cache: TokenCache
) -> tuple[np.ndarray, np.ndarray, Counter[str]] | str:
    """As `_survey_share`, but the cache has the unused fields of all records."""
    whole, kept = cache.positions(share, fit.seq_length)
    overlong = whole > fit.seq_length
    refused = np.flatnonzero(overlong | (whole == 0))
    try:
        for i in refused[:1]:
            fit.require_fits(int(whole[i]), records, share[int(i)])
    except ConfigurationError as error:
        return str(error)
    return np.where(overlong & (fit.overlong != "truncate"), 0, kept), overlong, Counter()


class InstructionDataset:
    """The samples of JSON records that are left after `--overlong`.

    lengths: int32 [samples], input positions of each; warnings: what was truncated or skipped.
    Building it is a collective over all ranks (see `survey`).
    """

    def __init__(self, records: RecordFiles, fit: Fit, cache_root: Path | None = None) -> None:
        """cache_root: where tokens are kept for the next start; None: they are made when they are needed."""
        self._records = records
        self.digest = records.digest
        self._fit = fit
        self._cache = None if cache_root is None else open_cache(cache_root, records, fit)
        found = survey(records, fit, self._cache)
        self._usable = found.usable
        self.lengths: np.ndarray = found.positions[self._usable]
        self.warnings = found.summary(records, fit)

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

    def record(self, index: int) -> dict:
        """The JSON record of a sample."""
        return self._records[int(self._usable[index])]
