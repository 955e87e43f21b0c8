"""BOFT: identity at zero, orthogonal, reaching every feature of a group, and Hugging Face PEFT's rotation."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from megatron_peft.adapters.boft import Boft
from megatron_peft.adapters.butterfly import cayley, compose, skew
from megatron_peft.adapters.rotation import IS_ROTATION
from megatron_peft.config import ConfigurationError, PeftConfig
from megatron_peft.parallel.layout import LinearLayout
from megatron_peft.runtime import cpu

BLOCK, FACTORS, GROUPS = 4, 3, 2
SIZE = BLOCK * 2 ** (FACTORS - 1)


class Place:
    """A rank of a group that needs no processes."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self._rank, self._size = rank, size

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size


def parameters(scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (GROUPS, FACTORS, SIZE // BLOCK, BLOCK * (BLOCK - 1) // 2)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def rotation(Q: torch.Tensor) -> torch.Tensor:
    return compose(cayley(skew(Q, BLOCK)))


def test_zero_is_the_identity_exactly():
    assert torch.equal(rotation(torch.zeros_like(parameters())), torch.eye(SIZE, dtype=torch.float64).expand(2, -1, -1))


def test_blocks_are_orthogonal_and_reach_every_feature():
    R = rotation(parameters())
    torch.testing.assert_close(R @ R.mT, torch.eye(SIZE, dtype=torch.float64).expand_as(R))
    assert (R.abs() > 1e-6).all()


def test_one_factor_is_block_diagonal():
    R = compose(cayley(skew(parameters()[:, :1], BLOCK)))
    inside = torch.block_diag(*[torch.ones(BLOCK, BLOCK)] * (SIZE // BLOCK)).bool()
    assert (R[:, ~inside] == 0).all() and (R[:, inside] != 0).all()


def test_gradients():
    torch.autograd.gradcheck(rotation, parameters(0.3).requires_grad_())


def layout(split: str, size: int = 1, heads: int | None = None) -> LinearLayout:
    return LinearLayout(split, 48, 32, Place(0, size), head_features=heads)  # type: ignore[arg-type]


def adapter(where: LinearLayout, **settings) -> Boft:
    cpu.install()
    return Boft(where, PeftConfig("boft", **settings), "decoder.layers.0.linear.adapter", 0, torch.bfloat16)


@pytest.mark.parametrize(
    ("split", "side", "groups", "is_split"),
    [
        ("column", "output", 3, True),
        ("row", "output", 6, False),
        ("column", "input", 4, False),
        ("row", "input", 2, True),
    ],
)
def test_a_rank_holds_the_groups_of_its_features(split, side, groups, is_split):
    Q = adapter(layout(split, 2), boft_block_size=4, boft_factors=2, rotation_side=side).Q
    assert Q.shape == (groups, 2, 2, 6) and Q.dtype == torch.float32
    assert Q.tensor_model_parallel is is_split
    assert Q.partial_over_tensor_parallel is not is_split
    assert getattr(Q, IS_ROTATION)


def test_groups_that_do_not_divide_are_refused():
    with pytest.raises(ConfigurationError, match=r"--boft-block-size 4 with --boft-factors 4 gives groups of 32 .* 24"):
        adapter(layout("column", 2), boft_block_size=4, boft_factors=4)
    with pytest.raises(ConfigurationError, match="the heads of decoder.layers.0.linear have 12"):
        adapter(layout("column", heads=12), boft_block_size=4, boft_factors=2)


class PureBlockDiagonal:
    """In place of HF PEFT's CUDA extension: [factors, blocks, b, b] -> [factors, n, n]."""

    @staticmethod
    def apply(blocks: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.block_diag(*factor) for factor in blocks])


@pytest.mark.parametrize("factors", [1, 3])
def test_the_input_side_is_hugging_face_pefts(monkeypatch, factors):
    layer = pytest.importorskip("peft.tuners.boft.layer")
    from peft import BOFTConfig

    monkeypatch.setattr(layer, "get_fbd_cuda", lambda: True)
    monkeypatch.setattr(layer, "FastBlockDiag", PureBlockDiagonal)
    config = BOFTConfig(boft_block_size=8, boft_n_butterfly_factor=factors)
    theirs = layer.Linear(nn.Linear(64, 16, bias=False), "default", config)
    data = theirs.boft_R["default"]
    with torch.no_grad():
        data.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    R, _ = theirs.get_delta_weight("default")
    row, column = torch.triu_indices(8, 8, 1)
    upper = -0.5 * (data - data.mT)[..., row, column]  # [m, 8 blocks, 28]; their Cayley has the other sign
    groups = 64 // (8 * 2 ** (factors - 1))
    Q = upper.unflatten(1, (groups, -1)).transpose(0, 1)
    torch.testing.assert_close(torch.block_diag(*compose(cayley(skew(Q, 8)))), R, atol=1e-5, rtol=1e-5)
