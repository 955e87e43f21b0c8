"""Values out of a `config.json`, checked. A key that is absent or null has the default; without one it is an error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_peft.config import require

Config = Mapping[str, Any]


def size(config: Config, key: str, default: int | None = None) -> int:
    """A count or a length."""
    value = _value(config, key, default)
    require(type(value) is int and value > 0, f"{key} is {value!r}; it must be a whole number above 0.")
    return value


def number(config: Config, key: str, default: float | None = None) -> float:
    """A positive number, whole or not."""
    value = _value(config, key, default)
    require(type(value) in (int, float) and value > 0, f"{key} is {value!r}; it must be a number above 0.")
    return float(value)


def switch(config: Config, key: str, default: bool = False) -> bool:
    """true or false."""
    value = _value(config, key, default)
    require(type(value) is bool, f"{key} is {value!r}; it must be true or false.")
    return value


def _value(config: Config, key: str, default: Any) -> Any:
    value = config.get(key)
    value = default if value is None else value
    require(value is not None, f"{key} is missing.")
    return value
