"""Words are written for fields that exist."""

from __future__ import annotations

from dataclasses import fields

from megatron_peft.argument_help import HELP
from megatron_peft.megatron_fields import megatron_fields
from megatron_peft.served_flags import sections


def test_help_is_written_for_fields_that_exist() -> None:
    ours = {one.name for config_class in sections().values() for one in fields(config_class)}
    assert HELP.keys() <= ours | megatron_fields("TransformerConfig").keys()
