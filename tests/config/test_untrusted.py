"""Values of YAML files that YAML 1.1 reads otherwise than people write them; text that no file takes."""

import pytest

from megatron_peft.config import ConfigurationError
from megatron_peft.config.untrusted import parse_json, parse_yaml


def test_a_time_is_a_text_and_a_number_a_number() -> None:
    text = "{time: 24:00:00, short: 1:30, minutes: 90, hexadecimal: 0x1F, grouped: 1_000}"
    expected = {"time": "24:00:00", "short": "1:30", "minutes": 90, "hexadecimal": 31, "grouped": 1000}
    assert parse_yaml(text, "a.yaml") == expected


def test_unpaired_surrogate_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="line 1: a string contains an unpaired surrogate"):
        parse_json('{"a": "\\ud800"}', "a.jsonl, line 1")
    assert parse_json('{"a": "\\ud83d\\ude00"}', "a.jsonl, line 1") == {"a": "😀"}
