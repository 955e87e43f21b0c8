"""Values of YAML files that YAML 1.1 reads otherwise than people write them."""

from megatron_peft.config.untrusted import parse_yaml


def test_a_time_is_a_text_and_a_number_a_number() -> None:
    text = "{time: 24:00:00, short: 1:30, minutes: 90, hexadecimal: 0x1F, grouped: 1_000}"
    expected = {"time": "24:00:00", "short": "1:30", "minutes": 90, "hexadecimal": 31, "grouped": 1000}
    assert parse_yaml(text, "a.yaml") == expected
