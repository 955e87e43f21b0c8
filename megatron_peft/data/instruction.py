"""Instruction data: records become tokens once, in the cache of `datasets`, and samples when they are read."""

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from hashlib import sha256
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from megatron_peft.config import ConfigurationError, not_obeyed, require, writing
from megatron_peft.data.files import RecordFiles
from megatron_peft.data.node_files import NodeFiles
from megatron_peft.data.records import Fit
from megatron_peft.data.samples import Sample, index_type
from megatron_peft.runtime.launch import checked_together, place_in_world, place_on_node, share_of

Made = TypeVar("Made")
FORMAT = 5  # of the tables of tokens, and of how a record becomes tokens
RECORDS_OF_A_PROCESS = 20_000  # fewer are not worth a process
MOST_PROCESSES = 64


class InstructionDataset:
    """The samples of records that are left after `--overlong`.

    lengths: int32 [samples], input positions of each; longest_sample: of them; warnings: what was truncated or skipped,
    with the first place where it happens; digest: of the files.
    """

    def __init__(
        self,
        records: RecordFiles,
        fit: Fit,
        cache_dir: Path | None = None,
        node: NodeFiles | None = None,
        name: str = "train",
    ) -> None:
        """Tokenize the records, or find their tokens in the cache. A collective over all ranks.

        Args:
            cache_dir: where `datasets` keeps the tokens for the next start; None: its own cache.
            node: files of arrays, under `name`.

        Raises:
            ConfigurationError: on every rank, for the first bad record, and if all samples are skipped.
        """
        self._records, self._fit, self.digest = records, fit, records.digest
        node = node or NodeFiles()
        keep = partial(node.kept, name)
        self._table = made_once(lambda: tokens_of(records, fit, cache_dir)).data
        whole, kept = keep("positions", 0, np.int32, lambda: _positions(self._table, fit.seq_length)).reshape(2, -1)
        overlong = whole > fit.seq_length
        longest = int(whole.max(initial=0))  # of whole records
        if fit.overlong == "error" and (refused := overlong | (whole == 0)).any():
            self._refuse(int(refused.argmax()), whole, longest)
        used = kept > 0
        if fit.overlong == "skip":
            used &= ~overlong
        numbers = index_type(len(records))
        self._usable = keep("samples", 0, numbers, lambda: [np.flatnonzero(used).astype(numbers)])
        self.lengths = keep("lengths", 0, np.int32, lambda: [kept[used]])
        self.warnings = self._warnings((overlong & used, overlong & ~used, ~overlong & ~used), longest)
        if not len(self._usable):
            none_left = f"all {len(records)} samples were skipped (from {records.place(0)} on)."
            raise ConfigurationError(" ".join([none_left, *self.warnings]))
        self.longest_sample = int(self.lengths.max())

    def _refuse(self, record: int, whole: np.ndarray, longest: int) -> None:
        """Raise the error of --overlong error for a record, where the longest one has `longest` positions."""
        what, way_out = "has no token to learn from", "give it a text, or give --overlong skip"
        if whole[record]:
            what = f"takes {whole[record]} tokens, above --seq-length {self._fit.seq_length}"
            way_out = f"raise it ({longest} holds all samples), or give --overlong truncate or --overlong skip"
        raise ConfigurationError(f"{self._records.place(record)}: the sample {what}: {way_out}.")

    def _warnings(self, findings: Sequence[np.ndarray], longest: int) -> list[str]:
        """Return a sentence for each kind of finding.

        findings: bool [records] each: cut, skipped for their length, and empty.
        longest: positions of the longest whole record.
        """
        too_long = f"are longer than --seq-length {self._fit.seq_length} ({longest} would hold all) and were"
        prompt_only = ", since their prompt alone fills it and no token of a completion is left"
        outcomes = (
            f"{too_long} cut at their end",
            f"{too_long} skipped{prompt_only if self._fit.overlong == 'truncate' else ''}",
            "have no token to learn from and were skipped",
        )
        unread = Counter[str]()
        for names in self._table.column("left_out").chunks:
            unread.update(names.flatten().to_pylist())
        fields = ", ".join(f'"{not_obeyed(name)}" ({count} records)' for name, count in unread.most_common())
        warnings = [f"fields that nothing reads were left out: {fields}."] * bool(fields)
        for what, which in zip(outcomes, findings, strict=True):
            if total := int(which.sum()):
                first = self._records.place(int(which.argmax()))
                warnings.append(f"{total} of {len(self._records)} samples {what} (first: {first}).")
        return warnings

    def __len__(self) -> int:
        return len(self._usable)

    def __getitem__(self, index: int) -> Sample:
        record = int(self._usable[index])
        ids, trained = (self._table.column(name)[record].values for name in ("ids", "trained"))
        return self._fit.cut(ids.to_numpy(), trained.to_numpy(zero_copy_only=False))

    def lengths_of_files(self) -> list[int]:
        """Return the number of samples of each source."""
        ends = np.searchsorted(self._usable, np.cumsum(self._records.lengths))
        return np.diff(ends, prepend=0).tolist()


def made_once(make: Callable[[], Made]) -> Made:
    """Run `make`, which fills a cache, on rank 0, then on the first rank of each node, then on the others: each finds
    what an earlier one has made where they see one folder. A collective over all ranks.

    Raises on all ranks as `checked_together` does.
    """
    made: list[Made] = []
    for is_turn in (place_in_world()[0] == 0, place_on_node().rank == 0, True):
        checked_together(lambda is_turn=is_turn: made.append(make()) if is_turn and not made else None)
    return made[0]


def tokens_of(records: RecordFiles, fit: Fit, cache_dir: Path | None) -> Any:
    """Return the tokens of whole records: a mapped `datasets.Dataset` with a row for each record.

    Its columns: ids, int32 [tokens]; trained, bool [tokens], which of them the loss counts; left_out, the fields of
    `Fit.left_out`. Its name in the cache is made of the files' contents, the tokenizer with its chat template, the
    columns, and the version of transformers.

    Raises:
        ConfigurationError: a record is bad, or the cache cannot be written or read.
    """
    import datasets
    import pyarrow as pa
    import pyarrow.compute as pc

    num_processes = min(place_on_node().size, len(records) // RECORDS_OF_A_PROCESS, MOST_PROCESSES)
    if num_processes > 1:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the processes are the parallelism
    if place_in_world()[0] == 0 and sys.stderr.isatty() and len(records) >= RECORDS_OF_A_PROCESS:
        datasets.enable_progress_bars()
    decides = (FORMAT, version("transformers"), records.digest, records.lengths, fit.tokenizer.digest, fit.columns)
    root = cache_dir or Path(datasets.config.HF_DATASETS_CACHE)
    way_out = "give --data-cache-path a folder that can be written"
    try:
        with writing("the tokens of the data", way_out, f"cannot be kept in {root}"):
            tokens: Any = datasets.Dataset.from_generator(
                partial(_rows, records, fit),
                datasets.Features(
                    ids=datasets.List(datasets.Value("int32")),
                    trained=datasets.List(datasets.Value("bool")),
                    left_out=datasets.List(datasets.Value("string")),
                ),
                cache_dir=str(root),
                gen_kwargs={"shares": [share_of(len(records), i, MOST_PROCESSES) for i in range(MOST_PROCESSES)]},
                num_proc=num_processes if num_processes > 1 else None,
                fingerprint=sha256(repr(decides).encode()).hexdigest()[:32],
            )
    except datasets.exceptions.DatasetGenerationError as error:
        for _ in _rows(records, fit, [range(len(records))]):  # raises for the first bad record
            pass
        why = error.__cause__ or error
        raise ConfigurationError(f"the tokens of the data cannot be kept in {root}: {why}: {way_out}.") from error
    except (pa.ArrowException, ValueError) as error:
        raise ConfigurationError(_damaged(root, str(error))) from error
    finally:
        datasets.disable_progress_bars()
    for chunk in tokens.data.column("ids").chunks:
        least, most = (pc.min_max(chunk.flatten())[name].as_py() for name in ("min", "max"))
        is_known = least is None or 0 <= least <= most <= fit.tokenizer.largest_id
        limit = f"those of the tokenizer are below {fit.tokenizer.largest_id + 1}"
        require(is_known, _damaged(root, f"they are ids from {least} to {most}; {limit}"))
    return tokens


def _rows(records: RecordFiles, fit: Fit, shares: Sequence[range]) -> Iterator[dict[str, Any]]:
    """Yield a row of tokens for each record. Raises ConfigurationError for a bad one."""
    for index in chain.from_iterable(shares):
        ids, trained = fit.tokenized(records, index)
        yield {"ids": ids, "trained": trained, "left_out": fit.left_out(records, index)}


def _damaged(root: Path, why: str) -> str:
    way_out = "remove the folder generator in it, and the next start makes them again"
    return f"the tokens of the data in {root} are damaged ({why}): {way_out}."


def _positions(table: Any, seq_length: int) -> list[np.ndarray]:
    """Return the input positions of whole records, and of what --seq-length leaves of them: int32 [records] each."""
    whole, kept = list[np.ndarray](), list[np.ndarray]()
    for masks in table.column("trained").chunks:
        offsets, flags = masks.offsets.to_numpy(), masks.flatten().to_numpy(zero_copy_only=False)
        offsets = offsets - offsets[0]
        # The number of the last trained token before each; the first token of a record is not predicted.
        last = np.append(-1, np.maximum.accumulate(np.where(flags, np.arange(len(flags)), -1))).astype(np.int32)
        starts, ends = offsets[:-1], offsets[1:]
        whole.append(np.maximum(last[ends] - starts, 0))
        kept.append(np.maximum(last[np.minimum(ends, starts + seq_length + 1)] - starts, 0))
    return [*whole, *kept]
