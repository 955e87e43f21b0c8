"""Records to documents of token ids, in several processes. Every process imports this module: keep it light."""

import multiprocessing
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from megatron_peft.config import ConfigurationError, DataConfig, require
from megatron_peft.data.files import RecordFiles
from megatron_peft.data.tokenizers import Tokenizer, build_tokenizer

_CHUNK = 64  # records sent to a worker at once


@dataclass(frozen=True)
class PreprocessConfig:
    """The flags of megatron-peft data preprocess. `data` has the tokenizer and, as training paths, the input files."""

    data: DataConfig
    output_prefix: str
    json_keys: tuple[str, ...] = ("text",)
    append_eod: bool = False
    workers: int = 1
    log_interval: int = 1000

    def output(self, key: str) -> str:
        """The prefix of a key's pair, as Megatron names it."""
        return f"{self.output_prefix}_{key}_document"


class DocumentEncoder:
    """Tokenizes the keys of one record, with a beginning-of-sequence token if the tokenizer adds one."""

    def __init__(self, config: PreprocessConfig) -> None:
        self.config = config
        self.records = RecordFiles(config.data.train_data_path, "--input")
        self.tokenizer: Tokenizer = build_tokenizer(config.data, None)

    def encode(self, index: int) -> list[list[int]] | str:
        """Ids of each key, or the error message: an exception would end the pool's iterator."""
        try:
            record = self.records[index]
        except ConfigurationError as error:  # names the place itself
            return str(error)
        try:
            return [self._document(record, key) for key in self.config.json_keys]
        except ConfigurationError as error:
            return f"{self.records.place(index)}: {error}"

    def _document(self, record: dict, key: str) -> list[int]:
        require(key in record, f'lacks the field "{key}" (it has {", ".join(record)}); name others with --json-keys.')
        text = record[key]
        require(isinstance(text, str), f'"{key}" is not text but {type(text).__name__}.')
        ids = self.tokenizer.encode_prompt(text) if text else []
        return [*ids, self.tokenizer.eos_id] if ids and self.config.append_eod else ids


@contextmanager
def encoded_documents(config: PreprocessConfig, encoder: DocumentEncoder) -> Iterator[Iterable[list[list[int]] | str]]:
    """`DocumentEncoder.encode` of each record, in the order of the input, in this process or in `workers`."""
    indices = range(len(encoder.records))
    if config.workers == 1:
        yield map(encoder.encode, indices)
        return
    with multiprocessing.get_context("spawn").Pool(config.workers, _start_worker, (config,)) as pool:
        yield pool.imap(_encode_in_worker, indices, chunksize=_CHUNK)


_worker_encoder: DocumentEncoder  # set once in each worker process


def _start_worker(config: PreprocessConfig) -> None:
    global _worker_encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _worker_encoder = DocumentEncoder(config)


def _encode_in_worker(index: int) -> list[list[int]] | str:
    return _worker_encoder.encode(index)
