"""JSON lines become Megatron's indexed datasets, by one process or several, whole or not at all."""

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from transformers import AutoTokenizer

from megatron_peft.commands.data import preprocess_data
from megatron_peft.config import ConfigurationError
from megatron_peft.data.preprocess import DocumentEncoder, PreprocessSettings, encoded_documents, preprocess
from tests.data.tiny_tokenizers import save_tokenizer

TEXTS = [{"text": "1 2 3", "title": "7"}, {"text": "", "title": "8"}, {"text": "4 5", "title": "9"}]


def config(path: str, prefix: Path | str, **settings) -> PreprocessSettings:
    defaults = {"tokenizer_type": "NullTokenizer", "vocab_size": 99}
    return PreprocessSettings((path,), str(prefix), **{**defaults, **settings})


def documents(prefix: Path | str) -> list[list[int]]:
    dataset = IndexedDataset(str(prefix))
    return [dataset[i].tolist() for i in range(len(dataset))]


def test_documents_keep_their_order_empty_ones_are_counted_and_each_key_has_its_own(write_lines, tmp_path):
    lines: list[str] = []
    done = preprocess(config(write_lines(TEXTS), tmp_path / "out", append_eod=True, log_interval=2), lines.append)
    assert documents(tmp_path / "out_text_document") == [[1, 2, 3, 99], [4, 5, 99]]
    assert (done.documents, done.empty_documents, done.tokens) == (2, 1, 7)
    assert done.prefixes == (f"{tmp_path}/out_text_document",)
    assert [line.split(",")[0] for line in lines] == ["2 of 3 records", "3 of 3 records"]
    preprocess(config(write_lines(TEXTS), tmp_path / "two", json_keys=("text", "title")))
    assert documents(tmp_path / "two_text_document") == [[1, 2, 3], [4, 5]]  # no end without --append-eod
    assert documents(tmp_path / "two_title_document") == [[7], [8], [9]]


@pytest.mark.parametrize(
    ("given", "found"),
    [
        pytest.param("a[1].jsonl", ["a[1].jsonl"], id="file"),
        pytest.param("a*.jsonl", ["a1.jsonl", "a[1].jsonl"], id="pattern"),
        pytest.param("b[1].jsonl", ["b[1].jsonl"], id="nothing"),
    ],
)
def test_input_is_a_pattern_unless_a_file_has_the_name(write_lines, tmp_path, monkeypatch, given, found):
    monkeypatch.chdir(tmp_path)
    for name in ("a[1].jsonl", "a1.jsonl"):
        write_lines(TEXTS, name)
    assert config(given, "out").files == tuple(found)


@pytest.mark.parametrize("workers", [1, 2])
def test_documents_keep_the_order_and_bad_records_their_place(write_lines, workers):
    numbers = [{"text": str(i % 90), "title": ""} for i in range(350)]
    long = {"text": "7 " * 1_000_000}  # so that a second worker overtakes the first
    path = write_lines([long, *numbers, "{", {"text": "x"}])
    settings = config(path, "out", workers=workers)
    first, *documents, torn, bad = encoded_documents(settings, DocumentEncoder(settings))
    assert first == [[7] * 1_000_000] and documents == [[[i % 90]] for i in range(350)]
    assert "line 352: not JSON" in torn and "line 353: NullTokenizer reads ids" in bad


@pytest.mark.parametrize("by", ["SIGKILL", "SIGTERM"])  # the kernel's, and that of daemons that watch memory
def test_a_worker_that_was_killed_ends_the_others_with_an_error(write_lines, by):
    settings = config(write_lines([{"text": "7 " * 100_000}] * 400), "out", workers=2)
    others = set(multiprocessing.active_children())
    documents = encoded_documents(settings, DocumentEncoder(settings))
    next(documents)
    killed, other = set(multiprocessing.active_children()) - others
    time.sleep(1)  # both are in the middle of an answer that is larger than a pipe
    os.kill(killed.pid, signal.Signals[by])
    with pytest.raises(ConfigurationError, match="a worker of --workers 2 was killed, probably for the memory"):
        list(documents)
    assert not other.is_alive()


def test_a_document_begins_as_in_transformers(write_lines, tmp_path):
    folder = str(save_tokenizer(tmp_path, adds_bos=True))
    path = write_lines([{"text": "the cat"}, {"text": ""}])
    encoder = DocumentEncoder(PreprocessSettings((path,), "out", tokenizer_model=folder, append_eod=True))
    assert encoder.encode(0) == [[*AutoTokenizer.from_pretrained(folder).encode("the cat"), 2]]
    assert encoder.encode(0)[0][0] == 3
    assert encoder.encode(1) == [[]]


def test_an_id_above_the_count_of_tokens_is_not_wrapped(write_lines, tmp_path):
    folder = save_tokenizer(tmp_path)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["the"] = 66_000
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    path = write_lines([{"text": "the cat"}])
    preprocess(PreprocessSettings((path,), str(tmp_path / "out"), tokenizer_model=str(folder)))
    assert documents(tmp_path / "out_text_document")[0][0] == 66_000


@pytest.mark.parametrize(
    ("record", "told"),
    [({"body": "1"}, 'lacks the field "text" .it has body.; name others with --json-'), ({"text": 1}, '"text" is not')],
)
def test_a_bad_record_is_named_and_leaves_nothing_behind(write_lines, tmp_path, record, told):
    folder = tmp_path / "output"
    folder.mkdir()
    with pytest.raises(ConfigurationError, match=f"line 4: {told}"):
        preprocess(config(write_lines([*TEXTS, record]), folder / "out"))
    assert list(folder.iterdir()) == []


def test_what_exists_is_not_overwritten_and_what_cannot_be_written_is_named(write_lines, tmp_path):
    path, empty = write_lines(TEXTS), write_lines([{"text": ""}], "empty.jsonl")
    index = tmp_path / "a_text_document.idx"
    index.write_text("mine")
    for source, prefix, told in (
        (path, "a", "a_text_document.idx exist: remove them, or give another --output"),
        (path, "nowhere/b", "--output-prefix: cannot write to the folder .*nowhere"),
        (empty, "c", "no document of .*empty.jsonl holds any text"),
    ):
        with pytest.raises(ConfigurationError, match=told):
            preprocess(config(source, tmp_path / prefix))
    assert index.read_text() == "mine"


def run_tool(path: str, prefix: Path, *more: str) -> int:
    given = ["--input", path, "--output-prefix", str(prefix), "--tokenizer-type", "NullTokenizer"]
    return preprocess_data([*given, "--vocab-size", "99", *more])


def test_the_tool_takes_megatrons_flags_and_patterns_and_refuses_others_by_name(write_lines, tmp_path, capsys):
    write_lines([{"text": "1"}], "part-1.jsonl")
    path, pattern = write_lines([{"text": "2"}], "part-2.jsonl"), str(tmp_path / "part-*.jsonl")
    assert run_tool(pattern, tmp_path / "out", "--append-eod", "--keep-sequential-samples") == 0
    assert documents(tmp_path / "out_text_document") == [[1, 99], [2, 99]]
    assert "wrote 2 documents, 4 tokens" in capsys.readouterr().out
    for flags, told in (
        (["--split-sentences"], "--split-sentences is a Megatron flag that megatron_peft does not support"),
        (["--workers", "0"], "--workers is 0; it must be above 0"),
    ):
        assert run_tool(path, tmp_path / "other", *flags) == 2
        assert told in capsys.readouterr().err
