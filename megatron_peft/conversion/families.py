"""The rules of each model family. A new family is one line here."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

from megatron_peft.conversion.bloom_rules import bloom_rules
from megatron_peft.conversion.llama_rules import llama_rules
from megatron_peft.models.rules import Part, Rule
from megatron_peft.models.shape import ModelShape


@dataclass(frozen=True)
class Family:
    """Its table, and what transformers puts before the names of the model without its output layer."""

    rules: Callable[[ModelShape], list[Rule]]
    prefix: str


FAMILIES = {"llama": Family(llama_rules, "model."), "bloom": Family(bloom_rules, "transformer.")}


def rules_for(shape: ModelShape, stored: Collection[str] = ()) -> dict[str, Rule]:
    """Every rule of the model by Megatron parameter name (global layer numbers).

    Args:
        stored: tensors of the folder that is read. A model that was saved without its output layer (bigscience's own
            files) has names without the prefix; the rules then have the names of the folder, as in transformers.
    """
    family = FAMILIES[shape.architecture]
    rules = {rule.name: rule for rule in family.rules(shape)}
    return {name: _as_stored(rule, family.prefix, stored) for name, rule in rules.items()}


def _as_stored(rule: Rule, prefix: str, stored: Collection[str]) -> Rule:
    def name(part: Part) -> str:
        bare = part.name.removeprefix(prefix)
        return bare if part.name not in stored and bare in stored else part.name

    return replace(rule, parts=tuple(Part(name(part), part.shape) for part in rule.parts))
