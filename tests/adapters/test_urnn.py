"""uRNN's adapters: the identity at the start, their formula, by Fourier transforms too, and what may be replaced."""

from typing import Any

import pytest
import torch

from megatron_peft.adapters import urnn as module
from megatron_peft.adapters.frozen_linear import FrozenLinearCall
from megatron_peft.adapters.unitary import as_real, orthogonality_error, random_theta, structured
from megatron_peft.adapters.urnn import RiemannianUrnn, StructuredUrnn, UnitaryReplacement, build, rotate_by_fourier
from megatron_peft.config import ConfigurationError, PeftConfig
from megatron_peft.config.methods.rotation import IS_ROTATION
from megatron_peft.parallel.layout import LinearLayout
from megatron_peft.runtime import cpu
from tests.kept import kept_for_backward
from tests.one_rank import Place

OUT, IN = 48, 32
NAME = "decoder.layers.0.linear.adapter"


def made(split: str, out: int = OUT, place: Place | None = None, **settings):
    cpu.install()
    layout = LinearLayout(split, out, IN, place or Place(0, 1))  # type: ignore[arg-type]
    peft = PeftConfig("urnn", **{"urnn_block_size": 8, **settings})
    peft.spec.check_layer(peft, layout, NAME.removesuffix(".adapter"))
    return build(layout, peft, NAME, 0, torch.bfloat16)


def frozen(weight: torch.Tensor, bias: torch.Tensor | None = None, row: bool = False) -> FrozenLinearCall:
    place: Any = Place(0, 1)
    return FrozenLinearCall(weight, bias, False, False, place, "whole" if row else "none")


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def move(adapter: StructuredUrnn | RiemannianUrnn) -> None:
    if isinstance(adapter, RiemannianUrnn):
        adapter.move(adapter.U.detach(), draw(*adapter.U.shape), 0.2)
        return
    with torch.no_grad():
        adapter.theta += 0.2 * draw(*adapter.theta.shape)


UPDATES = pytest.mark.parametrize("update", ["structured", "riemannian"])


@UPDATES
@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("split", ["column", "row"])
def test_it_starts_as_the_base_and_is_its_formula(split, side, update):
    adapter = made(split, rotation_side=side, urnn_update=update)
    weight, x, bias = draw(OUT, IN), draw(5, 2, IN), draw(OUT) if split == "column" else None
    call = frozen(weight, bias, row=split == "row")
    torch.testing.assert_close(adapter(x, call), torch.nn.functional.linear(x, weight, bias), rtol=0, atol=0)
    move(adapter)
    R = torch.block_diag(*adapter.changes()) + torch.eye(OUT if side == "output" else IN)
    assert (R - torch.eye(len(R))).abs().max() > 0.01 and orthogonality_error(R) < 1e-5
    turned = R @ weight if side == "output" else weight @ R.T
    torch.testing.assert_close(adapter(x, call), torch.nn.functional.linear(x, turned, bias), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("split", ["column", "row"])
def test_fourier_transforms_do_what_dense_blocks_do(monkeypatch, split, side):
    adapter = made(split, rotation_side=side)
    move(adapter)
    weight, bias = draw(OUT, IN), draw(OUT) if split == "column" else None
    found = []
    for largest in (8, 4):
        monkeypatch.setattr(module, "DENSE_UP_TO", largest)
        x = draw(5, 2, IN).requires_grad_()
        y = adapter(x, frozen(weight, bias, row=split == "row"))
        found.append((y, *torch.autograd.grad((y * draw(5, 2, OUT)).sum(), [x, adapter.theta])))
    for dense, fast in zip(*found, strict=True):
        torch.testing.assert_close(fast, dense, atol=1e-4, rtol=1e-4)


def test_the_factor_is_u_times_the_inverse_of_its_start():
    adapter = made("column")
    move(adapter)
    U, U0 = (structured(theta, adapter.permutation.expand(len(theta), -1)) for theta in (adapter.theta, adapter.start))
    torch.testing.assert_close(adapter.changes() + torch.eye(8), as_real(U @ U0.mH), atol=1e-6, rtol=0)


@UPDATES
def test_parameters_are_float32_rotations_and_say_how_ranks_hold_them(update):
    split, replicated = (made(side, place=Place(1, 2), urnn_update=update) for side in ("column", "row"))
    for parameter in (*split.parameters(), *replicated.parameters()):
        assert getattr(parameter, IS_ROTATION) and parameter.dtype == torch.float32
    assert all(parameter.tensor_model_parallel for parameter in split.parameters())
    assert all(parameter.partial_over_tensor_parallel for parameter in replicated.parameters())


@torch.no_grad()
def test_a_start_that_is_read_from_a_checkpoint_is_the_one_that_counts():
    adapter = made("column")
    assert (adapter.changes() == 0).all()
    adapter.start.add_(0.1)
    assert (adapter.changes() != 0).any()
    adapter.theta.copy_(adapter.start)
    assert (adapter.changes() == 0).all()


def test_parameters_a_group_are_those_of_the_kind_that_the_flag_says():
    adapter, riemannian = made("column"), made("column", urnn_update="riemannian")
    assert isinstance(adapter, StructuredUrnn) and adapter.theta.shape == (6, 7, 4)  # 7 n for n = 4 complex features
    assert isinstance(riemannian, RiemannianUrnn) and riemannian.U.shape == (6, 4, 4, 2)


@UPDATES
def test_a_replaced_layer_is_its_unitary_matrix(update):
    adapter = made("row", out=IN, urnn_mode="replace", urnn_update=update)
    x = draw(5, 2, IN)
    assert isinstance(adapter, UnitaryReplacement)
    torch.testing.assert_close(adapter(x, frozen(draw(IN, IN))), x)  # it starts as the identity, whatever W is
    move(adapter.rotation)
    R = torch.block_diag(*adapter.rotation.changes()) + torch.eye(IN)
    torch.testing.assert_close(adapter(x, frozen(draw(IN, IN))), x @ R.T, atol=1e-5, rtol=1e-5)


def test_layers_that_are_not_square_are_not_replaced():
    with pytest.raises(ConfigurationError, match=r"needs square layers, but decoder.layers.0.linear is 48 x 32: give"):
        made("row", urnn_mode="replace")


def test_group_sizes_that_would_fit_are_listed():
    with pytest.raises(ConfigurationError) as error:
        made("column", place=Place(0, 2), urnn_block_size=16)
    assert "--urnn-block-size 16 gives groups of 16 features" in str(error.value)
    assert "holds 24 per rank at --tensor-model-parallel-size 2" in str(error.value)
    assert "Groups that do: 2, 4, 6, 8, 12, 24; groups of 16 fit at --tensor-model-parallel-size 1." in str(error.value)


def test_by_fourier_transforms_it_keeps_one_output():
    theta, permutation, x = random_theta(3, 4, torch.Generator().manual_seed(0)), torch.randperm(4), draw(5, 2, 24)
    with kept_for_backward() as kept:
        rotate_by_fourier(x, theta.requires_grad_(), theta.detach(), permutation, slice(None), False)
    assert sum(tensor.numel() for tensor in kept) == x.numel() + 2 * theta.numel() + len(permutation)
