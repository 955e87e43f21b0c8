"""The two factors of a low-rank adapter, between Megatron's fused layers and Hugging Face's separate ones.

A weight's rule says which rows of a fused layer are which module's. They are the rows of B as well; A meets the input,
which all modules of a layer share. Letters: out and in are a layer's features, r the rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_peft.models.rules import Index, Part, Rule

WEIGHT = ".weight"


@dataclass(frozen=True)
class Factors:
    """A [r, in] and B [out, r]; the change of the weight is B A times a scale that a whole adapter has in common."""

    A: Tensor
    B: Tensor

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    def padded(self, rank: int) -> "Factors":
        """The same change at a higher rank. What is added is zero on both sides, so training leaves it at zero."""
        more = rank - self.rank
        A = torch.cat([self.A, self.A.new_zeros(more, self.A.shape[1])])
        return Factors(A, torch.cat([self.B, self.B.new_zeros(self.B.shape[0], more)], dim=1))


def modules_of(rule: Rule) -> dict[str, tuple[int, ...]]:
    """The Hugging Face modules whose weights a rule holds, with the shapes [out, in] of the weights."""
    return {part.name.removesuffix(WEIGHT): part.shape for part in rule.parts}


def is_weight(rule: Rule) -> bool:
    """Whether it is for a matrix, and not for a bias."""
    return rule.name.endswith(WEIGHT)


def layer_of(rule: Rule) -> str:
    """Megatron's layer whose weight the rule is for."""
    return rule.name.removesuffix(WEIGHT)


def split(rule: Rule, factors: Factors) -> dict[str, Factors]:
    """A fused layer's adapter as one for each of its modules: the same A, and the module's rows of B."""
    rows = _rule_of_B(rule, factors.rank).write([factors.B])
    return {name.removesuffix(WEIGHT): Factors(factors.A, B) for name, B in rows.items()}


def fuse(rule: Rule, found: Mapping[str, Factors]) -> Factors:
    """The adapters of a layer's modules as one of the fused layer.

    With one A in common the rank stays. Otherwise A is [A_q; A_k; A_v] and B has each module's B in its own rows and
    columns and zeros elsewhere, so that the rank is the sum. Modules without an adapter have zero rows.
    """
    blocks = list(found.values())
    shared = all(torch.equal(block.A, blocks[0].A) for block in blocks)
    A = blocks[0].A if shared else torch.cat([block.A for block in blocks])
    rows = {module: A.new_zeros(shape[0], A.shape[0]) for module, shape in modules_of(rule).items()}
    start = 0
    for module, block in found.items():
        rows[module][:, start : start + block.rank] = block.B
        start += 0 if shared else block.rank
    rule_of_B = _rule_of_B(rule, A.shape[0])
    B = A.new_empty(rule_of_B.local_shape(1))
    rule_of_B.read(B, _Held(rows), 0, 1)
    return Factors(A, B)


def _rule_of_B(rule: Rule, rank: int) -> Rule:
    """Rows as the weight's, and r columns."""
    return replace(rule, parts=tuple(Part(part.name, (part.shape[0], rank)) for part in rule.parts))


@dataclass(frozen=True)
class _Held:
    """Tensors in memory as a source of a rule."""

    by_module: Mapping[str, Tensor]

    def slice(self, name: str, index: Index) -> Tensor:
        return self.by_module[name.removesuffix(WEIGHT)][index]
