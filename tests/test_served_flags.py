"""One flag for each thing that is served, each with its words."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields
from typing import Literal, Optional

import pytest

from megatron_peft.argument_tables import ACCEPTED, ACCEPTED_VALUES, GROUPS, NO_FLAG
from megatron_peft.megatron_flags import refused_flags
from megatron_peft.served_flags import Flag, _value_of, sections, served_flags

SERVED = served_flags()
CONFIG_FIELDS = {one.name for config_class in sections().values() for one in fields(config_class)}


def test_no_spelling_stands_for_two_flags() -> None:
    counted = Counter(name for one in SERVED for name in one.names)
    assert [name for name, count in counted.items() if count > 1] == []


def test_every_field_of_ours_has_a_flag() -> None:
    assert {one.key for one in SERVED if one.target == "config"} == CONFIG_FIELDS - NO_FLAG


@pytest.mark.parametrize("one", SERVED, ids=lambda one: one.names[0])
def test_every_flag_has_a_help_line_and_a_group(one: Flag) -> None:
    assert len(one.help) > 10
    assert one.group in GROUPS


def test_no_served_flag_is_refused() -> None:
    assert {name[2:] for one in SERVED for name in one.names} & refused_flags().keys() == set()


def test_accepted_flags_store_nothing_that_is_read() -> None:
    assert {name for one in SERVED if one.target == "nothing" for name in one.names} == {*ACCEPTED, *ACCEPTED_VALUES}


@pytest.mark.parametrize(
    ("annotation", "expected"),
    [
        (int, (int, None, False)),
        (float | None, (float, None, False)),
        (tuple[str, ...], (str, None, True)),
        (Literal["a", "b"], (str, ("a", "b"), False)),
        (Optional[Literal["a", "b"]], (str, ("a", "b"), False)),  # noqa: UP045 - what get_type_hints makes of it
    ],
)
def test_value_of_a_field_type(annotation: object, expected: tuple[type, tuple[str, ...] | None, bool]) -> None:
    assert _value_of(annotation) == expected
