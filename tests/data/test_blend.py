from __future__ import annotations

from pathlib import Path

import pytest

from megatron_peft.config import ConfigurationError
from megatron_peft.data.blend import Blend, parse_blend
from tests.data.indexed_corpus import numbered_documents, write_indexed


@pytest.fixture
def prefixes(tmp_path) -> list[str]:
    return [write_indexed(tmp_path / name, numbered_documents(3)) for name in ("a", "b")]


def test_prefixes_come_with_weights_or_without(prefixes):
    a, b = prefixes
    assert parse_blend([a], "--data-path") == Blend([a], None)
    assert parse_blend([a, b], "--data-path") == Blend([a, b], None)
    assert parse_blend(["0.3", a, "7", b], "--data-path") == Blend([a, b], [0.3, 7.0])


@pytest.mark.parametrize("mixture", [("0.3", "A", "B"), ("A", "0.3"), ("0.3", "0.7"), ("0.3",), ("A", "1", "B", "2")])
def test_weights_and_prefixes_must_alternate(prefixes, mixture):
    paths = [{"A": prefixes[0], "B": prefixes[1]}.get(part, part) for part in mixture]
    with pytest.raises(ConfigurationError, match="--data-path .*: give prefixes only, or a weight before each prefix"):
        parse_blend(paths, "--data-path")


def test_weights_are_above_0(prefixes):
    with pytest.raises(ConfigurationError, match="weights must be above 0"):
        parse_blend(["0", prefixes[0], "1", prefixes[1]], "--data-path")


def test_missing_files_are_named(prefixes):
    Path(prefixes[0] + ".bin").unlink()
    with pytest.raises(ConfigurationError, match=r"--valid-data-path .*a: .*a.bin not found. A prefix is a path with"):
        parse_blend(prefixes, "--valid-data-path")


def test_an_index_that_is_none_or_torn_is_named(prefixes):
    index = Path(prefixes[0] + ".idx")
    whole = index.read_bytes()
    for content in (b"", b"x" * len(whole), whole[:60]):
        index.write_bytes(content)
        with pytest.raises(ConfigurationError, match="a.idx is not an index of Megatron's, or it is torn"):
            parse_blend(prefixes, "--data-path")


def test_missing_tokens_are_counted(prefixes):
    data = Path(prefixes[1] + ".bin")
    data.write_bytes(data.read_bytes()[:-2])
    with pytest.raises(ConfigurationError, match="b.bin has 28 bytes where its index expects 30; it is torn"):
        parse_blend(prefixes, "--data-path")
