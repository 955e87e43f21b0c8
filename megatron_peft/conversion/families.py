"""The rules of each model family. A new family is one line here."""

from __future__ import annotations

from collections.abc import Callable

from megatron_peft.conversion.llama_rules import llama_rules
from megatron_peft.conversion.rules import Rule
from megatron_peft.models.shape import ModelShape

FAMILIES: dict[str, Callable[[ModelShape], list[Rule]]] = {"llama": llama_rules}


def rules_for(shape: ModelShape) -> dict[str, Rule]:
    """Every rule of the model by Megatron parameter name (global layer numbers)."""
    return {rule.name: rule for rule in FAMILIES[shape.architecture](shape)}
