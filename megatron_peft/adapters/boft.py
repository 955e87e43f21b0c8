"""BOFT: the weight turned by a product of butterfly factors, each block-diagonal and orthogonal (eq. (3)-(6)).

    W' = R W (output side) or W R^T (input side),   R = B_m ... B_1                                 eq. (3)

`cayley`: a block is (I + Q)(I - Q)^-1 with Q skew-symmetric, given by the b (b - 1) / 2 numbers above its diagonal, so
m factors have m g (b - 1) / 2 a group instead of g (g - 1) / 2. The paper puts its learning rate inside, Cayley(eta Q),
which makes the true step eta^3: we don't. `projection`: the blocks themselves are trained, and each step ends at the
nearest orthogonal ones, eq. (5)-(6). Both start at R = I.

The factors (`butterfly.py`) are composed into dense g x g blocks once a forward (weights only), then one batched
product turns the activations. Letters: k groups, m factors, c blocks of a factor in a group, b block size.
"""

import torch
from torch import Tensor, nn

from megatron_peft.adapters.butterfly import cayley, compose, nearest_orthogonal, skew
from megatron_peft.adapters.frozen_linear import identity_like
from megatron_peft.adapters.rotation import BlockRotation
from megatron_peft.config import PeftConfig
from megatron_peft.parallel.layout import LinearLayout


class Butterfly(BlockRotation):
    """What both parametrizations share: shapes, and how blocks become a rotation.

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
        self.shape = (self.num_local_groups, num_factors, group_size // size)

    def blocks(self) -> Tensor:
        """Of every factor, [k, m, c, b, b]; orthogonal."""
        raise NotImplementedError

    def changes(self) -> Tensor:
        """D = R - I, [k, g, g]."""
        R = compose(self.blocks())
        return R - identity_like(R)


class Boft(Butterfly):
    """Cayley: Q [k, m, c, b (b - 1) / 2] is trained."""

    def __init__(self, layout: LinearLayout, peft: PeftConfig, name: str, seed: int, dtype: torch.dtype) -> None:
        super().__init__(layout, peft, name, seed, dtype)
        count = self.block_size * (self.block_size - 1) // 2
        self.Q = nn.Parameter(torch.zeros(*self.shape, count, device=torch.cuda.current_device()))
        self.mark_rotation(self.Q)

    def blocks(self) -> Tensor:
        return cayley(skew(self.Q, self.block_size))

    @torch.no_grad()
    def restart(self) -> None:
        self.Q.zero_()


class ProjectedBoft(Butterfly):
    """Projection: the blocks P [k, m, c, b, b] are trained; `project` ends every step."""

    def __init__(self, layout: LinearLayout, peft: PeftConfig, name: str, seed: int, dtype: torch.dtype) -> None:
        super().__init__(layout, peft, name, seed, dtype)
        identity = torch.eye(self.block_size, device=torch.cuda.current_device())
        self.P = nn.Parameter(identity.expand(*self.shape, -1, -1).clone(memory_format=torch.contiguous_format))
        self.mark_rotation(self.P)

    def blocks(self) -> Tensor:
        return self.P

    @torch.no_grad()
    def restart(self) -> None:
        self.P.copy_(torch.eye(self.block_size, device=self.P.device))

    @torch.no_grad()
    def project(self) -> None:
        """P <- the nearest orthogonal blocks, eq. (6)."""
        self.P.copy_(nearest_orthogonal(self.P))


def boft(layout: LinearLayout, peft: PeftConfig, name: str, seed: int, dtype: torch.dtype) -> Butterfly:
    """The rotation that `--boft-parametrization` asks for."""
    kinds = {"cayley": Boft, "projection": ProjectedBoft}
    return kinds[peft.boft_parametrization](layout, peft, name, seed, dtype)
