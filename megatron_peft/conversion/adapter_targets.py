"""The shortest list of names that means a given set of layers."""

from collections import defaultdict
from collections.abc import Iterable


def shortest_targets(names: Iterable[str], num_layers: int) -> list[str]:
    """`q_proj` where all layers have it, else the full names; Megatron's names alike.

    Both --peft-target-modules and HF PEFT's target_modules take either, also mixed.

    Args:
        names: of modules, as `model.layers.3.self_attn.q_proj`.
        num_layers: of the model.
    """
    by_kind: dict[str, list[str]] = defaultdict(list)
    for name in names:
        by_kind[name.rpartition(".")[2]].append(name)
    return [target for kind, found in by_kind.items() for target in ([kind] if len(found) == num_layers else found)]
