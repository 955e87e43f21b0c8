"""Names of the Hub stand for folders of its cache; nothing is downloaded where the user is offline."""

from pathlib import Path

import huggingface_hub
import pytest

from megatron_peft.cli.parser import read_config
from megatron_peft.commands import convert
from megatron_peft.config import ConfigurationError, DataConfig, kind_of_source, sources
from megatron_peft.config.model import PreviewOptions
from megatron_peft.data.build import checked_blend
from megatron_peft.data.files import RecordFiles
from megatron_peft.data.tokenizers import build_tokenizer
from tests.data.tiny_tokenizers import save_tokenizer

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FLAG = "--pretrained-checkpoint"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """The Hub's, with a model, and with a data set; nothing else of the machine's is seen."""
    folder = tmp_path / "hub"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    sources.local_folder.cache_clear()
    model = cached(folder, "models--org--model")
    save_tokenizer(model)
    (model / "model.safetensors").write_bytes(b"")
    data = cached(folder, "datasets--org--data")
    (data / "train.jsonl").write_text('{"text": "the cat"}\n')
    (data / "test.jsonl").write_text('{"text": "sat"}\n')
    (cached(folder, "models--org--part") / "config.json").write_text("{}")
    return folder


def cached(folder: Path, name: str) -> Path:
    """An empty snapshot in the form of the Hub's cache."""
    snapshot = folder / name / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (folder / name / "refs").mkdir()
    (folder / name / "refs" / "main").write_text(COMMIT)
    return snapshot


def test_a_cached_model_is_a_folder_whose_name_can_be_told(cache):
    folder = sources.local_model("org/model", FLAG)
    assert Path(folder) == cache / "models--org--model" / "snapshots" / COMMIT
    assert sources.hub_name(folder) == "org/model" and sources.hub_name(cache) is None
    config = DataConfig(tokenizer_model="org/model")
    assert build_tokenizer(config, None).encode("the cat") == build_tokenizer(DataConfig(), folder).encode("the cat")


def test_conversions_take_names_of_the_hub(cache, tmp_path, monkeypatch, capsys):
    given = []
    conversion = "megatron_peft.conversion.convert.hf_to_megatron"
    monkeypatch.setattr(conversion, lambda *a, **_: given.append(a) or Path(a[1]))
    assert convert.main(["hf-to-megatron", "--input", "org/model", "--output", "out"]) == 0
    assert given == [(sources.local_model("org/model", "--input"), "out")]
    assert convert.main(["verify", "--input", str(tmp_path), "--reference", "org/part"]) == 2
    assert "--reference org/part" in capsys.readouterr().err


def test_a_local_folder_of_the_name_wins(tmp_path):
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert sources.local_model("org/model", FLAG) == sources.local_tokenizer("org/model", FLAG) == "org/model"
    assert kind_of_source("org/model") == "table" and kind_of_source("org/data:train") == "hub"
    (tmp_path / "org" / "corpus.idx").write_bytes(b"")
    assert kind_of_source("org/corpus") == "indexed"
    for name in ("model", "/a/b", "./a/b", "a/b/c", "org/tokenizer.model", "../model"):
        assert sources.local_model(name, FLAG) == name, "a path is no name of the Hub"


def test_a_file_is_no_name_of_the_hub_and_is_told_what_can_be_read(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "notes").write_text("")
    assert [kind_of_source(path) for path in ("data/a.txt", "data/a.jsonl.gz", "data/notes")] == ["indexed"] * 3
    endings = "names of files of records end in .json, .jsonl, .parquet, .csv, .arrow"
    with pytest.raises(ConfigurationError, match=f"--train-data-path data/a.txt: .* not found. .*; {endings}"):
        checked_blend(["data/a.txt"], "--train-data-path")
    with pytest.raises(ConfigurationError, match=rf"data/nope is no file or folder here .*\({endings}\), the cache"):
        RecordFiles(["data/nope"], "--train-data-path")
    with pytest.raises(ConfigurationError, match=f"data/a.txt: no file of records; {endings}"):
        PreviewOptions().check_data(DataConfig(train_data_path=("data/a.txt",)))


def test_the_command_line_takes_names_and_tells_what_is_missing(cache):
    flags = "--train-data-path org/data:train --train-iters 1 --pretrained-checkpoint".split()
    config = read_config([*flags, "org/model", "--tokenizer-model", "org/model"], {})
    assert config.model.pretrained_checkpoint == config.data.tokenizer_model == sources.local_model("org/model", FLAG)
    told = "org/none is no folder here, .*does not have it, and HF_HUB_OFFLINE is set. .*: hf download org/none "
    with pytest.raises(ConfigurationError, match=told):
        read_config([*flags, "org/none"], {})
    with pytest.raises(ConfigurationError, match="org/part: its folder .* has no weights: hf download org/part"):
        sources.local_model("org/part", FLAG)


def test_a_data_set_of_the_hub_is_read_by_split(monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "prepared")
    train, test = (RecordFiles([f"org/data{split}"], "--train-data-path") for split in ("", ":test"))
    assert train[0] == {"text": "the cat"} and test[0] == {"text": "sat"} and train.digest != test.digest
    with pytest.raises(ConfigurationError, match="has the splits test, train|has the splits train, test"):
        RecordFiles(["org/data:valid"], "--train-data-path")
    with pytest.raises(ConfigurationError, match="hf download org/none --repo-type dataset"):
        RecordFiles(["org/none"], "--train-data-path")


def test_what_is_not_cached_is_downloaded_but_no_code_and_a_refusal_is_told(monkeypatch, tmp_path):
    asked = []

    def download(name, **settings):
        asked.append((name, settings))
        (tmp_path / "pytorch_model.bin").write_bytes(b"")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert sources.local_model("org/new", FLAG) == str(tmp_path)
    patterns = [pattern for _, settings in asked for pattern in settings["allow_patterns"]]
    assert "*.safetensors" in patterns and "pytorch_model*.bin" in patterns
    assert not [pattern for pattern in (*patterns, *sources.DATA_FILES) if pattern.endswith((".py", "*"))]

    def refuse(*_, **__):
        raise PermissionError("401: this one is gated\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ConfigurationError, match=r"\(PermissionError: 401: this one is gated\)\. .*hf auth login"):
        sources.local_tokenizer("org/gated", "--tokenizer-model")
