"""JSON lines to Megatron's indexed datasets: one `.bin`/`.idx` pair for each key of the records.

A pair appears under its name only when it is complete; nothing that exists is overwritten.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder, get_bin_path, get_idx_path
from rich.progress import track

from megatron_peft.config import ConfigurationError, require
from megatron_peft.data.documents import DocumentEncoder, PreprocessConfig, encoded_documents


@dataclass(frozen=True)
class Preprocessed:
    """What was written: output prefixes, and counts over all keys."""

    prefixes: tuple[str, ...]
    documents: int
    empty_documents: int
    tokens: int


def preprocess(config: PreprocessConfig, report: Callable[[str], None] = print) -> Preprocessed:
    """Write all pairs. Empty documents are left out and counted.

    report: called with a line of progress every `log_interval` records; a terminal shows a bar instead.
    Raises ConfigurationError for bad input, and if an output exists.
    """
    outputs = tuple(config.output(key) for key in config.json_keys)
    _require_new(outputs)
    encoder = DocumentEncoder(config)
    dtype = DType.optimal_dtype(encoder.tokenizer.largest_id + 1)  # an added token may have an id above their count
    with ExitStack() as stack:
        builders = [stack.enter_context(_new_pair(prefix, dtype)) for prefix in outputs]
        encoded = stack.enter_context(encoded_documents(config, encoder))
        shown = _with_progress(encoded, len(encoder.records), config.log_interval, report)
        documents, empty, tokens = _add_documents(builders, shown)
        require(documents > 0, f"no document of {' '.join(config.data.train_data_path)} holds any text.")
    return Preprocessed(outputs, documents, empty, tokens)


def _add_documents(
    builders: Sequence[IndexedDatasetBuilder], encoded: Iterable[list[list[int]] | str]
) -> tuple[int, int, int]:
    """(documents, empty ones, tokens). A string in place of a record's documents is its error message."""
    documents = empty = tokens = 0
    for found in encoded:
        if isinstance(found, str):
            raise ConfigurationError(found)
        for builder, ids in zip(builders, found, strict=True):
            if ids:
                builder.add_document(torch.tensor(ids), [len(ids)])
            documents, empty, tokens = documents + bool(ids), empty + (not ids), tokens + len(ids)
    return documents, empty, tokens


def _require_new(outputs: Sequence[str]) -> None:
    existing = [path for prefix in outputs for path in _pair(prefix) if Path(path).exists()]
    require(not existing, f"{' and '.join(existing)} exist: remove them, or give another --output-prefix.")
    for prefix in outputs:
        folder = Path(prefix).parent
        require(
            folder.is_dir() and os.access(folder, os.W_OK), f"--output-prefix: cannot write to the folder {folder}."
        )


def _pair(prefix: str) -> tuple[str, str]:
    return get_bin_path(prefix), get_idx_path(prefix)


@contextmanager
def _new_pair(prefix: str, dtype: type) -> Iterator[IndexedDatasetBuilder]:
    """A builder whose files are renamed at the end, the index last, and removed on an error."""
    part = f"{prefix}.part-{os.getpid()}"
    builder = IndexedDatasetBuilder(get_bin_path(part), dtype=dtype)
    try:
        yield builder
        builder.finalize(get_idx_path(part))
        for unfinished, path in zip(_pair(part), _pair(prefix), strict=True):
            os.replace(unfinished, path)
    finally:
        builder.data_file.close()
        for unfinished in _pair(part):
            Path(unfinished).unlink(missing_ok=True)


def _with_progress(
    encoded: Iterable[list[list[int]] | str], total: int, log_interval: int, report: Callable[[str], None]
) -> Iterator[list[list[int]] | str]:
    from rich.console import Console

    if Console().is_terminal:
        yield from track(encoded, "tokenizing", total=total)
        return
    begin = time.monotonic()
    for done, found in enumerate(encoded, 1):
        yield found
        if done % log_interval == 0 or done == total:
            report(f"{done} of {total} records, {done / (time.monotonic() - begin):.0f} per second")
