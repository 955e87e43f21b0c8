"""Requirements gather; an exception of another kind passes through untouched."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from megatron_peft.config_error import ConfigurationError, Requirements, flag, require


def test_flag_spells_a_field_name() -> None:
    assert flag("lora_rank") == "--lora-rank"


def test_require_raises_its_message_only_when_unmet() -> None:
    require(True, "fine")
    with pytest.raises(ConfigurationError, match="not fine"):
        require(False, "not fine")


def test_every_unmet_requirement_is_told() -> None:
    config = SimpleNamespace(rank=0, rate=-1, share=1.5, on=True, path=None)
    with pytest.raises(ConfigurationError) as caught, Requirements(config) as requirements:
        requirements.positive("rank")
        requirements.not_negative("rate")
        requirements.fraction("share")
        requirements.needs("on", "path")
        requirements.at_most_one("on", "share")
        requirements(True, "never told")
    assert [problem.split(" ")[0] for problem in caught.value.problems] == [
        "--rank",
        "--rate",
        "--share",
        "--on",
        "--on",
    ]


def test_nothing_unmet_raises_nothing() -> None:
    with Requirements(SimpleNamespace(rank=1, path=None)) as requirements:
        requirements.positive("rank", "path")
        requirements.needs("path", "rank")


def test_another_error_is_not_replaced_by_the_requirements() -> None:
    with pytest.raises(ZeroDivisionError), Requirements(None) as requirements:
        requirements(False, "unmet")
        _ = 1 // 0
