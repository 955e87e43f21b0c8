from __future__ import annotations

import subprocess
import sys

import pytest

from megatron_peft.config import DataConfig
from megatron_peft.data.documents import DocumentEncoder, PreprocessConfig, encoded_documents
from tests.data.tiny_tokenizers import save_tokenizer

RECORDS = [{"text": str(i % 90), "title": ""} for i in range(150)]


def config(path: str, **settings) -> PreprocessConfig:
    data = DataConfig(train_data_path=(path,), tokenizer_type="NullTokenizer", vocab_size=99)
    return PreprocessConfig(data, "out", **settings)


@pytest.mark.parametrize("workers", [1, 2])
def test_documents_keep_the_order_and_bad_records_their_place(write_lines, workers):
    long = {"text": "7 " * 1_000_000}  # so that a second worker overtakes the first
    path = write_lines([long, *RECORDS, "{", {"text": "x"}])
    settings = config(path, workers=workers)
    with encoded_documents(settings, DocumentEncoder(settings)) as encoded:
        first, *documents, torn, bad = encoded
    assert first == [[7] * 1_000_000] and documents == [[[i % 90]] for i in range(150)]
    assert "line 152: not JSON" in torn and "line 153: NullTokenizer reads ids" in bad


def test_a_document_begins_as_transformers_would_begin_it(write_lines, tmp_path):
    folder = str(save_tokenizer(tmp_path, adds_bos=True))
    data = DataConfig(train_data_path=(write_lines([{"text": "the cat"}, {"text": ""}]),), tokenizer_model=folder)
    encoder = DocumentEncoder(PreprocessConfig(data, "out", append_eod=True))
    assert encoder.encode(0) == [[3, *encoder.tokenizer.encode("the cat"), 2]]
    assert encoder.encode(1) == [[]]


def test_a_worker_does_not_import_torch():
    code = (
        "import sys, megatron_peft.data.documents; sys.exit('torch' in sys.modules or 'megatron.core' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
