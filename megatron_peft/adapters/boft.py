"""BOFT: the weight turned by a product of butterfly factors, each block-diagonal and orthogonal (eq. (3)-(6)).

    W' = R W,   R = B_m ... B_1                                                                     eq. (3)

R is block-diagonal in groups of g = b 2^(m-1) features. Factor i (from 0) views a group as [., 2, 2^i, b/2] and mixes
the pairs, eq. (4): its blocks act on the b features {pair} x {b/2}, at a stride of 2^i b/2. So m factors of b x b
blocks reach every feature of the group with m g (b - 1) / 2 parameters instead of g (g - 1) / 2.

A block is Cayley(Q) = (I + Q)(I - Q)^-1 with Q skew-symmetric, given by the b (b - 1) / 2 numbers above its diagonal.
Zeros give R = I. The paper puts its learning rate inside, Cayley(eta Q), which makes the true step eta^3: we don't.

The factors are composed into dense g x g blocks once a forward (weights only), then one batched product turns the
activations. Letters: k groups, m factors, c blocks of a factor in a group, b block size, g features of a group.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_peft.adapters.butterfly import cayley, compose, skew
from megatron_peft.adapters.rotation import BlockRotation
from megatron_peft.config import PeftConfig
from megatron_peft.parallel.layout import LinearLayout


class Boft(BlockRotation):
    """The Cayley parameters of one adapted linear layer.

    Args:
        layout: of the base weight.
        peft: block size b, number of factors m, side.
        name: global name of the adapter.
        seed, dtype: not used: rotations start at the identity, in float32.

    Raises:
        ConfigurationError: groups of b 2^(m-1) features do not divide what a rank holds.
    """

    def __init__(self, layout: LinearLayout, peft: PeftConfig, name: str, seed: int, dtype: torch.dtype) -> None:
        size, num_factors = peft.boft_block_size, peft.boft_factors
        group_size = size * 2 ** (num_factors - 1)
        flags = f"--boft-block-size {size} with --boft-factors {num_factors}"
        super().__init__(layout, peft.rotation_side, group_size, name, flags)
        self.block_size = size
        shape = (self.num_local_groups, num_factors, group_size // size, size * (size - 1) // 2)
        self.Q = nn.Parameter(torch.zeros(shape, dtype=torch.float32, device=torch.cuda.current_device()))
        self.mark_rotation(self.Q)

    def changes(self) -> Tensor:
        """D = R - I, [k, g, g]."""
        R = compose(cayley(skew(self.Q, self.block_size)))
        return R - torch.eye(self.group_size, dtype=R.dtype, device=R.device)
