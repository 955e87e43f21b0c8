"""BOFT: the weight rotated by a product of butterfly factors, each block-diagonal and orthogonal (eq. (3)-(6)).

    W' = R W (output side) or W R^T (input side),   R = B_m ... B_1                                 eq. (3)

R is block-diagonal in groups of g = b 2^(m-1) features. Factor i (from 0) views a group as [., 2, 2^i, b/2] and mixes
the pairs, eq. (4): its blocks act on the b features {pair} x {b/2}, at a stride of 2^i b/2. So m factors of b x b
blocks reach every feature of the group. They are composed into dense g x g blocks once a step (`rotation.py`:
weights only), then one batched product rotates the activations.

`cayley`: a block is (I + Q)(I - Q)^-1 with Q skew-symmetric, given by the b (b - 1) / 2 numbers above its diagonal. The
paper puts its learning rate inside, Cayley(eta Q), which makes the true step eta^3: we don't. `projection`: the blocks
themselves are trained, and each step ends at the nearest orthogonal ones, eq. (5)-(6). Both start at R = I.

Letters: k groups, m factors, c = g / b blocks of a factor in a group, b block size, g features of a group.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from itertools import accumulate
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn

from megatron_peft.adapters.blocks import identity_like
from megatron_peft.adapters.change import RotationChange, StoredTensors
from megatron_peft.adapters.rotation import BlockRotation, rotate_weight
from megatron_peft.config import PeftConfig, PeftFormat, require
from megatron_peft.config.methods import OTHER_EXPORTS
from megatron_peft.config.methods.rotation import BOFT
from megatron_peft.parallel.layout import LinearLayout
from megatron_peft.runtime.precision import full_precision

NUM_NEWTON_STEPS = 5


class Butterfly(BlockRotation):
    """What both parametrizations share: shapes. Rotations start at the identity, in float32."""

    def __init__(self, layout: LinearLayout, peft: PeftConfig, name: str, seed: int, dtype: torch.dtype) -> None:
        size, num_factors = peft.boft_block_size, peft.boft_factors
        group_size = BOFT.group_size(peft)
        super().__init__(layout, peft.rotation_side, group_size)
        self.block_size = size
        self.shape = (self.num_local_groups, num_factors, group_size // size)


class Boft(Butterfly):
    """Cayley: Q [k, m, c, b (b - 1) / 2] is trained."""

    def __init__(self, layout: LinearLayout, peft: PeftConfig, name: str, seed: int, dtype: torch.dtype) -> None:
        super().__init__(layout, peft, name, seed, dtype)
        count = self.block_size * (self.block_size - 1) // 2
        self.Q = nn.Parameter(torch.zeros(*self.shape, count, device=torch.cuda.current_device()))
        self.mark_rotation(self.Q)

    @property
    def trained(self) -> nn.Parameter:
        return self.Q

    @staticmethod
    def changes_of(trained: Tensor, *constants: Tensor) -> Tensor:
        """R - I of Q [k, m, c, b (b - 1) / 2]."""
        return change_of(cayley(skew(trained)))

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

    @property
    def trained(self) -> nn.Parameter:
        return self.P

    @staticmethod
    def changes_of(trained: Tensor, *constants: Tensor) -> Tensor:
        """R - I of P [k, m, c, b, b]."""
        return change_of(trained)

    @torch.no_grad()
    def restart(self) -> None:
        self.P.copy_(torch.eye(self.block_size, device=self.P.device))

    @torch.no_grad()
    @full_precision
    def project(self) -> None:
        """P <- the nearest orthogonal blocks, eq. (6)."""
        self.P.copy_(nearest_orthogonal(self.P))


def build(layout: LinearLayout, peft: PeftConfig, name: str, seed: int, dtype: torch.dtype) -> Butterfly:
    """The rotation that `--boft-parametrization` asks for."""
    kinds = {"cayley": Boft, "projection": ProjectedBoft}
    return kinds[peft.boft_parametrization](layout, peft, name, seed, dtype)


def change_of(factors: Tensor) -> Tensor:  # [k, m, c, b, b] -> [k, g, g]
    """R - I."""
    R = compose(factors)
    return R - identity_like(R)


def skew(upper: Tensor) -> Tensor:  # [..., b (b - 1) / 2] -> [..., b, b]
    """The skew-symmetric matrix with these numbers above its diagonal, row by row.

    One product with a constant of zeros and ones, exact, since indexing costs several times as much both ways.
    """
    size = (1 + isqrt(1 + 8 * upper.shape[-1])) // 2
    return (upper @ _skew_basis(size, upper.dtype, upper.device)).unflatten(-1, (size, size))


@cache
def _skew_basis(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:  # -> [b (b - 1) / 2, b b]
    row, column = torch.triu_indices(size, size, 1, device=device)
    basis = torch.zeros(len(row), size, size, dtype=dtype, device=device)
    number = torch.arange(len(row), device=device)
    basis[number, row, column] = 1
    basis[number, column, row] = -1
    return basis.flatten(1)


def cayley(Q: Tensor) -> Tensor:  # [..., b, b] -> [..., b, b]
    """(I + Q)(I - Q)^-1 = 2 (I - Q)^-1 - I: orthogonal for a skew-symmetric Q, and the inverse is always there.

    The answer C is kept for backward: with N = (I - Q)^-1 = (C + I) / 2, dQ = 2 N^T dC N^T.
    """
    return _Cayley.apply(Q)


class _Cayley(torch.autograd.Function):
    @staticmethod
    @full_precision
    def forward(ctx, Q):  # type: ignore[override]
        C = inverse(identity_like(Q) - Q).mul_(2).sub_(identity_like(Q))
        ctx.save_for_backward(C)
        return C

    @staticmethod
    @full_precision
    def backward(ctx, grad):  # type: ignore[override]
        (C,) = ctx.saved_tensors
        twice_N = (C + identity_like(C)).mT
        return (twice_N @ grad @ twice_N).div_(2)


@full_precision
def nearest_orthogonal(P: Tensor) -> Tensor:  # [..., b, b] -> [..., b, b]
    """The orthogonal factor of P's polar decomposition, the projection of eq. (6).

    Newton's iteration P <- (P + P^-T) / 2 takes singular values to 1 from anywhere above 0, quadratically; one step of
    Newton-Schulz polishes. Five steps take singular values in [0.3, 3.5] to rounding; a step of training leaves them
    within a few per cent of 1. A fixed number: the device is never waited for.
    """
    for _ in range(NUM_NEWTON_STEPS):
        P = (P + inverse(P).mT) / 2
    return 1.5 * P - 0.5 * P @ (P.mT @ P)


def inverse(matrices: Tensor) -> Tensor:  # [..., b, b] -> [..., b, b]
    """Inverse of invertible matrices, unchecked: the check of `torch.linalg.inv` synchronizes with a CUDA device."""
    return torch.linalg.inv_ex(matrices).inverse


def compose(factors: Tensor) -> Tensor:  # [k, m, c, b, b] -> [k, g, g]
    """R = B_m ... B_1 as dense blocks. Keeps the factors for backward and nothing else."""
    return _Compose.apply(factors)


class _Compose(torch.autograd.Function):
    @staticmethod
    @full_precision
    def forward(ctx, factors):  # type: ignore[override]
        ctx.save_for_backward(factors)
        return _products(_dense_factors(factors))[-1]

    @staticmethod
    @full_precision
    def backward(ctx, grad):  # type: ignore[override]
        (factors,) = ctx.saved_tensors
        dense = _dense_factors(factors)
        below = _products(dense[:-1])  # of the factors under each but the first
        grad_factors = torch.empty_like(factors)
        for i in range(len(dense) - 1, 0, -1):
            grad_factors[:, i] = _entries(grad @ below[i - 1].mT, i, factors)
            grad = dense[i].mT @ grad
        grad_factors[:, 0] = _entries(grad, 0, factors)
        return grad_factors


def _products(dense: Sequence[Tensor]) -> list[Tensor]:
    """B_1, B_2 B_1, B_3 B_2 B_1, ..."""
    return list(accumulate(dense, lambda below, factor: factor @ below))


def _dense_factors(factors: Tensor) -> list[Tensor]:  # [k, m, c, b, b] -> m times [k, g, g]
    num_groups, num_factors, count, size, _ = factors.shape
    dense = [factors.new_zeros(num_groups, count * size, count * size) for _ in range(num_factors)]
    for i, matrix in enumerate(dense):
        entries = _entry_view(matrix, i, size)
        entries.copy_(factors[:, i].reshape(entries.shape))
    return dense


def _entries(dense: Tensor, i: int, factors: Tensor) -> Tensor:  # [k, g, g] -> [k, c, b, b]
    """What a dense matrix has in the places of factor i's blocks."""
    return _entry_view(dense, i, factors.shape[-1]).reshape(factors[:, i].shape)


def _entry_view(dense: Tensor, i: int, size: int) -> Tensor:  # [k, g, g] -> [k, c / 2^i, 2^i, 2, b / 2, 2, b / 2]
    """The places of factor i's blocks in a dense matrix: where both features are of the same pair (eq. (4))."""
    halves = 2 if i else 1  # the first factor's pairs are neighbors, so that b may be odd where it is the only one
    side = (dense.shape[-1] // (2**i * size), halves, 2**i, size // halves)
    same = dense.view(-1, *side, *side).diagonal(0, 1, 5).diagonal(0, 2, 5)
    return same.permute(0, 5, 6, 1, 2, 3, 4)


def merge(weight: Tensor, tensors: Mapping[str, Tensor], peft: PeftConfig) -> Tensor:  # [out, in] -> [out, in]
    """R W, or W R^T."""
    return rotate_weight(weight, rotation(tensors, peft), peft.rotation_side)


def change(tensors: StoredTensors, peft: PeftConfig) -> RotationChange:
    """(R - I) W, or W (R - I)^T."""
    return RotationChange(rotation(tensors, peft), peft.rotation_side)


def rotation(tensors: Mapping[str, Tensor], peft: PeftConfig) -> Tensor:  # -> [k, g, g]
    """R in float64, of the numbers Q above the diagonals or of the blocks P."""
    if "P" in tensors:
        return compose(tensors["P"].double())
    return compose(cayley(skew(tensors["Q"].double())))


# BOFT as Hugging Face PEFT has it.
#
# Both compute W' = W R^T with R = B_m ... B_1 and pair the same features. A block of ours is Cayley(Q) = (I + Q)(I -
# Q)^-1 with Q given by the numbers above its diagonal; one of theirs is (I - S)(I + S)^-1 with S = (D - D^T) / 2 out
# of a whole b x b matrix D (`boft_R`). So S = -Q. Theirs lie in one row of n = in / b blocks a factor, ours by groups.
# Blocks that were trained by projection have the Q of Cayley's inverse, unless they have an eigenvalue of -1: no Q is
# large enough for that. Their `boft_s` scales the output features, which ours never does.

LARGEST_NUMBER = 1e4  # of a Cayley block: beyond it float32 holds no rotation to 1e-3


class BoftFormat(PeftFormat):
    """BOFT of the input side."""

    rows = ("boft_s",)

    def config(self, peft: PeftConfig, target_modules: list[str]) -> dict[str, Any]:
        require(
            peft.rotation_side == "input",
            f"the run rotated the output side of its weights (--rotation-side output), HF PEFT's BOFT rotates the "
            f"input: {OTHER_EXPORTS}.",
        )
        return {
            "peft_type": "BOFT",
            "boft_block_size": peft.boft_block_size,
            "boft_block_num": 0,
            "boft_n_butterfly_factor": peft.boft_factors,
            "boft_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": False,
            "init_weights": True,
        }

    def shapes(self, config: Mapping[str, Any], out_features: int, in_features: int) -> dict[str, tuple[int, ...]]:
        block = config["boft_block_size"]
        return {
            "boft_R": (config["boft_n_butterfly_factor"], in_features // block, block, block),
            "boft_s": (out_features, 1),
        }

    def tensors(
        self, tensors: Mapping[str, Tensor], peft: PeftConfig, layer: str, out_features: int
    ) -> dict[str, Tensor]:
        Q = tensors["Q"] if "Q" in tensors else inverse_cayley(tensors["P"].double())
        largest = Q.abs().max().item()
        require(
            largest < LARGEST_NUMBER,
            f"a block of {layer} has an eigenvalue of -1, which HF PEFT's BOFT cannot express (Cayley's numbers would "
            f"reach {largest:.2g}): {OTHER_EXPORTS}.",
        )
        return {"boft_R": to_huggingface(Q.float()), "boft_s": torch.ones(out_features, 1)}

    def note(self, peft: PeftConfig) -> str:
        if peft.boft_factors == 1:
            return ""
        return (
            f"HF PEFT opens this adapter only with its CUDA extension, which it builds itself (a GPU, nvcc, ninja): "
            f"there are {peft.boft_factors} butterfly factors, and without the extension HF PEFT knows 1.\n"
        )


EXPORT = BoftFormat()


def to_huggingface(Q: Tensor) -> Tensor:  # [k, m, c, b (b - 1) / 2] -> [m, n, b, b]
    """`boft_R` of the same rotation."""
    return -skew(Q).transpose(0, 1).flatten(1, 2)


def from_huggingface(D: Tensor) -> Tensor:  # [m, n, b, b] -> [k, m, c, b (b - 1) / 2]
    """Q of the same rotation."""
    num_factors, _, size, _ = D.shape
    row, column = torch.triu_indices(size, size, 1)
    Q = ((D.mT - D) / 2)[..., row, column]
    return Q.unflatten(1, (-1, 2 ** (num_factors - 1))).transpose(0, 1).contiguous()


def inverse_cayley(R: Tensor) -> Tensor:  # [..., b, b] -> [..., b (b - 1) / 2]
    """Q of (I + Q)(I - Q)^-1 = R: above the diagonal of (R + I)^-1 (R - I). Not finite where R has an eigenvalue -1."""
    identity = torch.eye(R.shape[-1], dtype=R.dtype, device=R.device)
    Q, _ = torch.linalg.solve_ex(R + identity, R - identity)
    row, column = torch.triu_indices(Q.shape[-1], Q.shape[-1], 1)
    return ((Q - Q.mT) / 2)[..., row, column]
