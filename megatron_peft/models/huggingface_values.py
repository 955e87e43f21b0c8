"""Values out of a `config.json`, checked. A key that is absent or null has the default; without one it is an error."""

import math
from collections.abc import Mapping
from typing import Any

from megatron_peft.config import require
from megatron_peft.models.shape import MOST, is_positive, is_size

Config = Mapping[str, Any]


def size(config: Config, key: str, default: int | None = None, most: int = MOST) -> int:
    """A count or a length."""
    value = _value(config, key, default)
    require(is_size(value, most), f"{key} is {_shown(value)}; it must be a whole number above 0 and at most {most:,}.")
    return value


def number(config: Config, key: str, default: float | None = None, most: float = math.inf) -> float:
    """A positive number, whole or not, that float32 can hold."""
    value = _value(config, key, default)
    limit = "" if most == math.inf else f" and at most {most:g}"
    require(
        is_positive(value) and value <= most,
        f"{key} is {_shown(value)}; it must be a number above 0{limit}, which float32 can hold.",
    )
    return float(value)


def switch(config: Config, key: str, default: bool = False) -> bool:
    """true or false."""
    value = _value(config, key, default)
    require(type(value) is bool, f"{key} is {_shown(value)}; it must be true or false.")
    return value


def _value(config: Config, key: str, default: Any) -> Any:
    value = config.get(key)
    value = default if value is None else value
    require(value is not None, f"{key} is missing.")
    return value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
