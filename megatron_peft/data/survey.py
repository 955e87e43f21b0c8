"""One pass over instruction data before training: every record is checked, and its length is known.

The pass is shared by all processes (each surveys an equal share of the records, then all know everything), so bad
records end the run at its start, on every rank, with one message. What is kept: 5 bytes a record.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch.distributed as dist
from rich.progress import track

from megatron_peft.config import ConfigurationError, require
from megatron_peft.data.instruction import fields_left_out, tokenize_record
from megatron_peft.data.jsonl import JsonRecords
from megatron_peft.data.sample import Sample, sample_from_ids
from megatron_peft.data.tokenizers import Tokenizer

_PROGRESS_FROM = 20_000  # records; fewer take a moment only


@dataclass(frozen=True)
class Fit:
    """How a record becomes a sample of at most `seq_length` input positions (--overlong)."""

    tokenizer: Tokenizer
    seq_length: int
    overlong: str = "truncate"

    def sample(self, records: JsonRecords, index: int) -> tuple[Sample, int]:
        """The sample (of length 0 if it is to be skipped) and the input positions that the whole record would take.

        Raises ConfigurationError naming file and line.
        """
        record = records[index]
        try:
            ids, trained = tokenize_record(record, self.tokenizer)
            whole = sample_from_ids(ids, trained, len(ids))
            self._check(whole)
        except ConfigurationError as error:
            raise ConfigurationError(f"{records.place(index)}: {error}") from error
        if len(whole) <= self.seq_length:
            return whole, len(whole)
        limit = self.seq_length if self.overlong == "truncate" else 0
        return sample_from_ids(ids, trained, limit), len(whole)

    def _check(self, whole: Sample) -> None:
        require(
            self.overlong != "error" or len(whole) <= self.seq_length,
            f"the sample takes {len(whole)} tokens, above --seq-length {self.seq_length}: raise it, or give "
            "--overlong truncate or --overlong skip.",
        )
        require(
            self.overlong != "error" or len(whole) > 0,
            "the sample has no token to learn from: give it a text, or give --overlong skip.",
        )


@dataclass(frozen=True)
class Survey:
    """positions: int32 [records], the input positions of each sample, 0 where it is skipped;
    overlong: bool [records], the record alone is longer than --seq-length;
    left_out: number of records by field that nothing reads."""

    positions: np.ndarray
    overlong: np.ndarray
    left_out: Counter[str]

    @property
    def usable(self) -> np.ndarray:
        """int64 [samples]: the record of each sample."""
        return np.flatnonzero(self.positions)

    def summary(self, records: JsonRecords, fit: Fit) -> list[str]:
        """A sentence for each thing that the user should know, with the first place where it happens."""
        skipped = self.positions == 0
        findings = (
            (self.overlong & ~skipped, f"are longer than --seq-length {fit.seq_length} and were cut at their end"),
            (
                self.overlong & skipped,
                f"are longer than --seq-length {fit.seq_length} and were {_skipped(fit.overlong)}",
            ),
            (~self.overlong & skipped, "have no token to learn from and were skipped"),
        )
        fields = ", ".join(f'"{name}" ({count} records)' for name, count in self.left_out.most_common())
        unread = [f"fields that nothing reads were left out: {fields}."] if fields else []
        return unread + [
            f"{int(which.sum())} of {len(which)} samples {what} (first: {records.place(int(which.argmax()))})."
            for which, what in findings
            if which.any()
        ]


def _skipped(overlong: str) -> str:
    because = ", since their prompt alone fills it and no token of a completion is left"
    return "skipped" + (because if overlong == "truncate" else "")


def survey(records: JsonRecords, fit: Fit) -> Survey:
    """Look at every record once. Must be called by all ranks if torch.distributed runs; all get the same answer.

    Raises ConfigurationError, on every rank, for the first bad record, and if no sample is left.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    bounds = np.linspace(0, len(records), world_size + 1).astype(np.int64)
    shares = gather_over_world(_survey_share(records, fit, range(bounds[rank], bounds[rank + 1])))
    for share in shares:
        if isinstance(share, str):
            raise ConfigurationError(share)
    positions, overlong, left_out = zip(*shares, strict=True)
    found = Survey(np.concatenate(positions), np.concatenate(overlong), sum(left_out, Counter()))
    if not found.positions.any():
        why = " ".join(found.summary(records, fit))
        raise ConfigurationError(f"no sample is left of {len(records)} (from {records.place(0)} on). {why}")
    return found


def gather_over_world(value: object) -> list:
    """`value` of every rank, in order of rank; of this process alone where torch.distributed does not run."""
    if not dist.is_initialized():
        return [value]
    values: list = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _survey_share(records: JsonRecords, fit: Fit, share: range) -> tuple[np.ndarray, np.ndarray, Counter[str]] | str:
    """The findings of `Survey` for some records, or the message of the first bad one: a rank that raised here would
    leave the others waiting."""
    positions = np.zeros(len(share), dtype=np.int32)
    overlong = np.zeros(len(share), dtype=bool)
    left_out: Counter[str] = Counter()
    quiet = share.start > 0 or len(share) < _PROGRESS_FROM
    try:
        for i, index in enumerate(track(share, "reading samples", disable=quiet, transient=True)):
            sample, whole = fit.sample(records, index)
            positions[i], overlong[i] = len(sample), whole > fit.seq_length
            left_out.update(fields_left_out(records[index], fit.tokenizer))
    except ConfigurationError as error:
        return str(error)
    return positions, overlong, left_out
