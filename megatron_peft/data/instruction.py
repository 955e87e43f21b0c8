"""Instruction data: every record is read once before training, then as a sample."""

from collections import Counter
from pathlib import Path

import numpy as np
import torch.distributed as dist
from rich.progress import track

from megatron_peft.config import ConfigurationError, not_obeyed
from megatron_peft.data.files import RecordFiles
from megatron_peft.data.records import Fit
from megatron_peft.data.samples import Sample
from megatron_peft.data.token_cache import PROGRESS_FROM, open_cache
from megatron_peft.runtime.launch import checked_together, gather_over_world


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
        measured = checked_together(lambda: self._measured(share), first_alone=True)
        positions, overlong, left_out = zip(*gather_over_world(measured), strict=True)
        unread = sum(left_out, Counter()) if self._cache is None else self._cache.left_out
        positions = np.concatenate(positions)
        self._usable = np.flatnonzero(positions)  # int64 [samples]: the record of each
        self.lengths: np.ndarray = positions[self._usable]
        self.warnings = self._warnings(positions == 0, np.concatenate(overlong), unread)
        if not len(self._usable):
            skipped = f"all {len(records)} samples were skipped (from {records.place(0)} on)."
            raise ConfigurationError(" ".join([skipped, *self.warnings]))

    def _measured(self, share: range) -> tuple[np.ndarray, np.ndarray, Counter[str]]:
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
