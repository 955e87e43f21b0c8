"""Values out of a config.json: what is no count, number or switch is named with its key."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_peft.config import ConfigurationError
from megatron_peft.models.huggingface_values import number, size, switch


def test_values_are_read_and_null_is_the_default() -> None:
    config = {"layers": 3, "eps": 1e-5, "whole": 2, "tied": True, "nothing": None}
    assert size(config, "layers") == 3
    assert number(config, "eps") == 1e-5
    assert number(config, "whole") == 2.0 and isinstance(number(config, "whole"), float)
    assert switch(config, "tied") is True
    assert (size(config, "nothing", 7), number(config, "lost", 0.5), switch(config, "nothing")) == (7, 0.5, False)


@pytest.mark.parametrize("value", [0, -1, 2.0, "3", True])
def test_a_count_is_a_whole_number_above_zero(value: Any) -> None:
    with pytest.raises(ConfigurationError, match=f"layers is {value!r}; it must be a whole number above 0"):
        size({"layers": value}, "layers")


@pytest.mark.parametrize("value", [0, -0.5, "1", True])
def test_a_number_is_above_zero(value: Any) -> None:
    with pytest.raises(ConfigurationError, match=f"eps is {value!r}; it must be a number above 0"):
        number({"eps": value}, "eps")


@pytest.mark.parametrize("value", [0, 1, "true"])
def test_a_switch_is_true_or_false(value: Any) -> None:
    with pytest.raises(ConfigurationError, match=f"tied is {value!r}; it must be true or false"):
        switch({"tied": value}, "tied")


def test_what_has_no_default_must_be_there() -> None:
    with pytest.raises(ConfigurationError, match="layers is missing"):
        size({"layers": None}, "layers")
