"""BOFT's adapters: what a rank holds, both parametrizations, Hugging Face PEFT's rotation; the butterfly's pieces."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from megatron_peft.adapters.boft import Boft, ProjectedBoft, build, cayley, compose, nearest_orthogonal, skew
from megatron_peft.config import ConfigurationError, PeftConfig
from megatron_peft.config.methods.rotation import IS_ROTATION
from megatron_peft.parallel.layout import LinearLayout
from megatron_peft.runtime import cpu
from tests.one_rank import Place


def made(split: str = "column", size: int = 1, heads: int | None = None, **settings) -> Boft | ProjectedBoft:
    cpu.install()
    layout = LinearLayout(split, 48, 32, Place(0, size), head_features=heads)  # type: ignore[arg-type]
    peft = PeftConfig("boft", **{"boft_block_size": 4, "boft_factors": 2, **settings})
    peft.spec.check_layer(peft, layout, "decoder.layers.0.linear")
    return build(layout, peft, "decoder.layers.0.linear.adapter", 0, torch.bfloat16)


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
    Q = made(split, 2, rotation_side=side).Q
    assert Q.shape == (groups, 2, 2, 6) and Q.dtype == torch.float32
    assert Q.tensor_model_parallel is is_split
    assert Q.partial_over_tensor_parallel is not is_split
    assert getattr(Q, IS_ROTATION)


def test_groups_that_do_not_divide_are_refused():
    with pytest.raises(ConfigurationError, match=r"--boft-block-size 4 with --boft-factors 4 gives groups of 32 .* 24"):
        made(size=2, boft_factors=4)
    with pytest.raises(ConfigurationError, match="decoder.layers.0.linear holds 12 in each attention head"):
        made(heads=12)


def test_projected_blocks_start_at_the_identity_and_end_a_step_orthogonal():
    adapter = made(boft_parametrization="projection")
    assert (adapter.changes() == 0).all() and adapter.P.shape == (6, 2, 2, 4, 4)
    with torch.no_grad():
        adapter.P += 0.05 * torch.randn(adapter.P.shape, generator=torch.Generator().manual_seed(0))
    U, _, Vh = torch.linalg.svd(adapter.P.detach().double())
    adapter.project()
    torch.testing.assert_close(adapter.P.detach(), (U @ Vh).float(), atol=1e-6, rtol=0)
    R = adapter.changes() + torch.eye(8)
    torch.testing.assert_close(R @ R.mT, torch.eye(8).expand_as(R), atol=1e-6, rtol=0)


def block_diagonal(blocks: torch.Tensor) -> torch.Tensor:
    """In place of HF PEFT's CUDA extension: [factors, blocks, b, b] -> [factors, n, n]."""
    return torch.stack([torch.block_diag(*factor) for factor in blocks])


@pytest.mark.parametrize("factors", [1, 3])
def test_the_input_side_is_hugging_face_pefts(monkeypatch, factors):
    layer = pytest.importorskip("peft.tuners.boft.layer")
    from peft import BOFTConfig

    monkeypatch.setattr(layer, "get_fbd_cuda", lambda: True)
    monkeypatch.setattr(layer, "FastBlockDiag", SimpleNamespace(apply=block_diagonal))
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
    torch.testing.assert_close(torch.block_diag(*compose(cayley(skew(Q)))), R, atol=1e-5, rtol=1e-5)


BLOCK, FACTORS, GROUPS = 4, 3, 2
SIZE = BLOCK * 2 ** (FACTORS - 1)


def numbers(scale: float = 1.0) -> torch.Tensor:
    shape = (GROUPS, FACTORS, SIZE // BLOCK, BLOCK * (BLOCK - 1) // 2)
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def rotation(Q: torch.Tensor) -> torch.Tensor:
    return compose(cayley(skew(Q)))


def test_zero_is_the_identity_exactly_and_blocks_are_orthogonal_and_reach_every_feature():
    R, identity = rotation(numbers()), torch.eye(SIZE, dtype=torch.float64).expand(GROUPS, -1, -1)
    assert torch.equal(rotation(0 * numbers()), identity)
    torch.testing.assert_close(R @ R.mT, identity)
    assert (R.abs() > 1e-6).all()


def test_gradients():
    torch.autograd.gradcheck(rotation, numbers(0.3).requires_grad_(), fast_mode=True)


@pytest.mark.parametrize("distance", [1e-3, 0.1, 0.3])
def test_the_nearest_orthogonal_matrix_is_the_polar_factor(distance):
    noise = torch.randn(500, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    P = cayley(skew(torch.ones(500, 28, dtype=torch.float64))) + distance * noise
    P = P[torch.linalg.svdvals(P)[:, -1] > 0.3]
    U, _, Vh = torch.linalg.svd(P)
    assert len(P) > 100
    torch.testing.assert_close(nearest_orthogonal(P), U @ Vh, atol=1e-8, rtol=0)
    torch.testing.assert_close(nearest_orthogonal(P.float()), (U @ Vh).float(), atol=2e-6, rtol=0)
