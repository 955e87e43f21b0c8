"""BOFT, eq. (3)-(6): flags, checks and cost. The adapter is `adapters/boft.py`."""

from dataclasses import dataclass
from typing import Literal

from megatron_peft.config.errors import option
from megatron_peft.config.methods.rotation import RotationMethod, RotationOptions


@dataclass(frozen=True)
class BoftOptions(RotationOptions):
    """Butterfly factors of orthogonal blocks."""

    boft_block_size: int = option(8, "b, the size of the orthogonal blocks", check="even")
    boft_factors: int = option(
        3, "m, the number of butterfly factors; groups of b 2^(m-1) features are rotated together", check="positive"
    )
    boft_parametrization: Literal["cayley", "projection"] = option(
        "cayley",
        "cayley: blocks are Cayley transforms; projection: the blocks themselves are trained, and each step ends at "
        "the nearest orthogonal ones",
    )


class BoftMethod(RotationMethod):
    """BOFT: a rotation that is a product of butterfly factors, eq. (3)-(6)."""

    name = "boft"
    summary = "R W, R a product of m butterfly factors with orthogonal b x b blocks"
    options = (BoftOptions,)
    adapter = "megatron_peft.adapters.boft"
    group_fields = ("boft_block_size", "boft_factors")
    whole_update = ("boft_parametrization", "projection")  # eq. (6)
    cost = "out m (b - 1) / 2; projection: out m b (input side: in)"
    demo_lr = 5e-4

    def num_parameters(self, peft: BoftOptions, out_features: int, in_features: int) -> int:
        features = out_features if peft.rotation_side == "output" else in_features
        numbers = features * peft.boft_factors * peft.boft_block_size  # of whole blocks
        return numbers if peft.boft_parametrization == "projection" else (numbers - features * peft.boft_factors) // 2

    def group_size(self, peft: BoftOptions) -> int:
        return peft.boft_block_size * 2 ** (peft.boft_factors - 1)


BOFT = BoftMethod()
