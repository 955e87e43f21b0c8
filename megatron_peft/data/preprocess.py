"""JSON lines to Megatron's indexed datasets: one `.bin`/`.idx` pair for each key of the records.

A pair appears under its name only when it is complete; nothing that exists is overwritten. Every process that tokenizes
imports this module, so torch and megatron-core are imported where the files are written.
"""

import glob
import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from megatron_peft.config import Checked, ConfigurationError, DataConfig, option, require, required_option
from megatron_peft.data.files import RecordFiles
from megatron_peft.data.tokenizers import build_tokenizer
from megatron_peft.runtime.ranks import Worker, WorkerKilled

if TYPE_CHECKING:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

_CHUNK = 64  # records sent to a worker at once
Encoded = list[list[int]] | str  # the ids of each key of a record, or what is wrong with it


@dataclass(frozen=True)
class PreprocessSettings(Checked):
    """The flags of megatron-peft data preprocess, with Megatron's names and defaults."""

    input: tuple[str, ...] = required_option("JSON-lines files, or glob patterns", metavar="FILE")
    output_prefix: str = required_option("writes PREFIX_KEY_document.bin and .idx", metavar="PREFIX")
    json_keys: tuple[str, ...] = option(("text",), "fields to convert, each to its own dataset", metavar="KEY")
    tokenizer_type: Literal["HuggingFaceTokenizer", "SentencePieceTokenizer", "NullTokenizer"] = option(
        "HuggingFaceTokenizer", "what --tokenizer-model holds"
    )
    tokenizer_model: str | None = option(None, "a Hugging Face folder or a SentencePiece model", metavar="PATH")
    vocab_size: int | None = option(None, "vocabulary size of NullTokenizer", check="positive")
    append_eod: bool = option(False, "append the end-of-document token to each document")
    workers: int = option(1, "number of processes", check="positive")
    log_interval: int = option(1000, "records between progress lines", check="positive")
    keep_sequential_samples: bool = option(False, "accepted for Megatron's scripts; the order is always kept")

    @property
    def files(self) -> tuple[str, ...]:
        """Return the input files. A pattern that matches nothing stays, and is reported as a missing file."""
        return tuple(path for given in self.input for path in _matches(given))


def _matches(given: str) -> list[str]:
    is_file = Path(given).exists()  # whose name may look like a pattern
    return [given] if is_file else sorted(glob.glob(given)) or [given]


class DocumentEncoder:
    """Tokenizes the keys of one record, with a beginning-of-sequence token if the tokenizer adds one."""

    def __init__(self, config: PreprocessSettings) -> None:
        self.config = config
        self.records = RecordFiles(config.files, "--input")
        named = {name: getattr(config, name) for name in ("tokenizer_type", "tokenizer_model", "vocab_size")}
        self.tokenizer = build_tokenizer(DataConfig(**named), None)

    def encode(self, index: int) -> Encoded:
        """Ids of each key, or the error message: an exception would end the pool's iterator."""
        place = ""
        try:
            record = self.records[index]  # the error names the place itself
            place = f"{self.records.place(index)}: "
            return [self._document(record, key) for key in self.config.json_keys]
        except ConfigurationError as error:
            return f"{place}{error}"

    def _document(self, record: dict, key: str) -> list[int]:
        require(key in record, f'lacks the field "{key}" (it has {", ".join(record)}); name others with --json-keys.')
        text = record[key]
        require(isinstance(text, str), f'"{key}" is not text but {type(text).__name__}.')
        ids = self.tokenizer.encode_prompt(text) if text else []
        return [*ids, self.tokenizer.eos_id] if ids and self.config.append_eod else ids


def encoded_documents(config: PreprocessSettings, encoder: DocumentEncoder) -> Generator[Encoded, None, None]:
    """`DocumentEncoder.encode` of each record, in the order of the input, in this process or in `workers`.

    Each worker answers through a pipe of its own: one that is killed in the middle of an answer leaves no lock behind.
    """
    indices = range(len(encoder.records))
    if config.workers == 1:
        yield from map(encoder.encode, indices)
        return
    name = f"a worker of --workers {config.workers}"
    workers, asked = [Worker() for _ in range(config.workers)], deque[Worker]()
    try:
        for worker in workers:
            worker.ask(partial(_start_worker, config))
        for worker in workers:
            worker.answer(name)
        for worker, start in zip(cycle(workers), indices[::_CHUNK]):
            if len(asked) == 2 * len(workers):  # each computes while its next chunk waits
                yield from asked.popleft().answer(name)
            worker.ask(partial(_encode_in_worker, indices[start : start + _CHUNK]))
            asked.append(worker)
        for worker in asked:
            yield from worker.answer(name)
    except WorkerKilled as error:
        raise ConfigurationError(f"{name} was killed, probably for the memory that it took: use fewer.") from error
    finally:
        for worker in workers:
            worker.end()


_worker_encoder: DocumentEncoder  # set once in each worker process


def _start_worker(config: PreprocessSettings) -> None:
    global _worker_encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _worker_encoder = DocumentEncoder(config)


def _encode_in_worker(chunk: range) -> list[Encoded]:
    return [*map(_worker_encoder.encode, chunk)]


@dataclass
class Preprocessed:
    """What was written: output prefixes, and counts over all keys."""

    prefixes: tuple[str, ...]
    documents: int = 0
    empty_documents: int = 0
    tokens: int = 0


def preprocess(config: PreprocessSettings, report: Callable[[str], None] = print) -> Preprocessed:
    """Write all pairs. Empty documents are left out and counted.

    report: called with a line of progress every `log_interval` records.
    Raises ConfigurationError for bad input, and if an output exists.
    """
    import torch
    from megatron.core.datasets.indexed_dataset import DType

    done = Preprocessed(tuple(f"{config.output_prefix}_{key}_document" for key in config.json_keys))  # Megatron's names
    existing = [path for prefix in done.prefixes for path in _pair(prefix) if path.exists()]
    require(not existing, f"{' and '.join(map(str, existing))} exist: remove them, or give another --output-prefix.")
    for folder in {Path(prefix).parent: None for prefix in done.prefixes}:
        is_writable = folder.is_dir() and os.access(folder, os.W_OK)
        require(is_writable, f"--output-prefix: cannot write to the folder {folder}.")
    encoder = DocumentEncoder(config)
    dtype = DType.optimal_dtype(encoder.tokenizer.largest_id + 1)  # an added token may have an id above their count
    with ExitStack() as stack:
        builders = [stack.enter_context(_new_pair(prefix, dtype)) for prefix in done.prefixes]
        begin, total = time.monotonic(), len(encoder.records)
        for number, documents in enumerate(stack.enter_context(closing(encoded_documents(config, encoder))), 1):
            if isinstance(documents, str):
                raise ConfigurationError(documents)
            for builder, ids in zip(builders, documents, strict=True):
                if ids:
                    builder.add_document(torch.tensor(ids), [len(ids)])
                done.documents += bool(ids)
                done.empty_documents += not ids
                done.tokens += len(ids)
            if number % config.log_interval == 0 or number == total:
                report(f"{number} of {total} records, {number / (time.monotonic() - begin):.0f} per second")
        require(done.documents > 0, f"no document of {' '.join(config.files)} holds any text.")
    return done


def _pair(prefix: str) -> tuple[Path, Path]:
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx")


@contextmanager
def _new_pair(prefix: str, dtype: type) -> Iterator["IndexedDatasetBuilder"]:
    """A builder whose files are renamed at the end, the index last, and removed on an error."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    drafts = _pair(f"{prefix}.part-{os.getpid()}")
    builder = IndexedDatasetBuilder(str(drafts[0]), dtype=dtype)
    try:
        yield builder
        builder.finalize(str(drafts[1]))
        for draft, path in zip(drafts, _pair(prefix), strict=True):
            draft.replace(path)
    finally:
        builder.data_file.close()
        for draft in drafts:
            draft.unlink(missing_ok=True)
