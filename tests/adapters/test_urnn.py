"""uRNN's adapters are their formula, by Fourier transforms too; eq. (10) and the exponential map of eq. (11)-(12)."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_peft.adapters import urnn as module
from megatron_peft.adapters.frozen_linear import FrozenLinearCall
from megatron_peft.adapters.unitary import (
    as_real,
    change_from_start,
    exponential_change,
    exponential_step,
    orthogonality_error,
    random_theta,
    structured,
    unitarized,
)
from megatron_peft.adapters.urnn import RiemannianUrnn, StructuredUrnn, UnitaryReplacement, build, rotate_by_fourier
from megatron_peft.config import ConfigurationError, PeftConfig
from megatron_peft.config.methods.rotation import IS_ROTATION
from megatron_peft.parallel.layout import LinearLayout
from megatron_peft.runtime import cpu
from tests.kept import kept_for_backward
from tests.one_rank import Place
from tests.training.waits import Waits

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


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def move(adapter: StructuredUrnn | RiemannianUrnn) -> None:
    if isinstance(adapter, RiemannianUrnn):
        adapter.move(adapter.U.detach(), numbers(*adapter.U.shape), 0.2)
        return
    with torch.no_grad():
        adapter.theta += 0.2 * numbers(*adapter.theta.shape)


UPDATES = pytest.mark.parametrize("update", ["structured", "riemannian"])


@UPDATES
@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("split", ["column", "row"])
def test_it_starts_as_the_base_and_is_its_formula(split, side, update):
    adapter = made(split, rotation_side=side, urnn_update=update)
    weight, x, bias = numbers(OUT, IN), numbers(5, 2, IN), numbers(OUT) if split == "column" else None
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
    weight, bias = numbers(OUT, IN), numbers(OUT) if split == "column" else None
    found = []
    for largest in (8, 4):
        monkeypatch.setattr(module, "DENSE_UP_TO", largest)
        x = numbers(5, 2, IN).requires_grad_()
        y = adapter(x, frozen(weight, bias, row=split == "row"))
        found.append((y, *torch.autograd.grad((y * numbers(5, 2, OUT)).sum(), [x, adapter.theta])))
    for dense, fast in zip(*found, strict=True):
        torch.testing.assert_close(fast, dense, atol=1e-4, rtol=1e-4)


def test_the_factor_is_u_times_the_inverse_of_its_start():
    adapter = made("column")
    move(adapter)
    U, U0 = (structured(theta, adapter.permutation.expand(len(theta), -1)) for theta in (adapter.theta, adapter.start))
    torch.testing.assert_close(adapter.changes() + torch.eye(8), as_real(U @ U0.mH), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("update", "size"), [("structured", (7, 4)), ("riemannian", (4, 4, 2))])
def test_parameters_are_float32_rotations_and_say_how_ranks_hold_them(update, size):
    """Of 4 complex features of a group 7 rows, or the blocks."""
    for split, groups in (("column", 3), ("row", 6)):
        ((_, parameter),) = made(split, place=Place(1, 2), urnn_update=update).named_parameters()
        assert getattr(parameter, IS_ROTATION) and parameter.dtype == torch.float32
        assert parameter.shape == (groups, *size)
        assert parameter.tensor_model_parallel == (split == "column")
        assert parameter.partial_over_tensor_parallel == (split == "row")


@torch.no_grad()
def test_a_start_that_is_read_from_a_checkpoint_is_the_one_that_counts():
    adapter = made("column")
    assert (adapter.changes() == 0).all()
    adapter.start.add_(0.1)
    assert (adapter.changes() != 0).any()
    adapter.theta.copy_(adapter.start)
    assert (adapter.changes() == 0).all()


@UPDATES
def test_a_replaced_layer_is_its_unitary_matrix(update):
    adapter = made("row", out=IN, urnn_mode="replace", urnn_update=update)
    x = numbers(5, 2, IN)
    assert isinstance(adapter, UnitaryReplacement)
    torch.testing.assert_close(adapter(x, frozen(numbers(IN, IN))), x)  # it starts as the identity, whatever W is
    move(adapter.rotation)
    R = torch.block_diag(*adapter.rotation.changes()) + torch.eye(IN)
    torch.testing.assert_close(adapter(x, frozen(numbers(IN, IN))), x @ R.T, atol=1e-5, rtol=1e-5)


def test_layers_that_are_not_square_and_groups_that_do_not_fit_are_refused():
    with pytest.raises(ConfigurationError, match=r"needs square layers, but decoder.layers.0.linear is 48 x 32: give"):
        made("row", urnn_mode="replace")
    with pytest.raises(ConfigurationError) as error:
        made("column", place=Place(0, 2), urnn_block_size=16)
    assert "--urnn-block-size 16 gives groups of 16 features" in str(error.value)
    assert "holds 24 per rank at --tensor-model-parallel-size 2" in str(error.value)
    assert "Groups that do: 2, 4, 6, 8, 12, 24; groups of 16 fit at --tensor-model-parallel-size 1." in str(error.value)


def test_by_fourier_transforms_it_keeps_one_output():
    theta, permutation, x = random_theta(3, 4, torch.Generator().manual_seed(0)), torch.randperm(4), numbers(5, 2, 24)
    with kept_for_backward() as kept:
        rotate_by_fourier(x, theta.requires_grad_(), theta.detach(), permutation, slice(None), False)
    assert sum(tensor.numel() for tensor in kept) == x.numel() + 2 * theta.numel() + len(permutation)


# The structured unitary matrix: eq. (10) factor by factor, and the exponential map of eq. (11)-(12).

GROUPS, SIZE = 3, 8


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.complex128) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def theta() -> Tensor:
    return random_theta(GROUPS, SIZE, torch.Generator().manual_seed(0)).double()


@pytest.fixture
def permutation() -> Tensor:
    return torch.randperm(SIZE, generator=torch.Generator().manual_seed(1))


def eq_10(theta: Tensor, permutation: Tensor) -> Tensor:
    """Of one group, matrix by matrix as it is printed: D3 R2 F^-1 D2 Pi R1 F D1."""
    j = torch.arange(SIZE)
    F = torch.exp(-2j * torch.pi * (j[:, None] * j).double() / SIZE) / SIZE**0.5
    D1, D2, D3 = (torch.diag(torch.exp(1j * phase)) for phase in theta[:3])
    R1, R2 = (reflection(torch.complex(*theta[row : row + 2])) for row in (3, 5))
    Pi = torch.eye(SIZE, dtype=F.dtype)[permutation]
    return D3 @ R2 @ F.conj().T @ D2 @ Pi @ R1 @ F @ D1


def reflection(v: Tensor) -> Tensor:
    return torch.eye(SIZE, dtype=v.dtype) - 2 * torch.outer(v, v.conj()) / v.abs().square().sum()


def test_it_is_equation_10_unitary_and_its_gradients_are_those_of_finite_differences(theta, permutation):
    permutations = permutation.expand(GROUPS, -1)
    U, U0 = structured(theta, permutations), structured(theta + 0.1, permutations)
    for group in range(GROUPS):
        torch.testing.assert_close(U[group], eq_10(theta[group], permutation))
    assert orthogonality_error(U) < 1e-14
    change = lambda theta: change_from_start(theta, U0, permutations)  # noqa: E731
    torch.autograd.gradcheck(change, theta.requires_grad_(), fast_mode=True)


def test_the_real_matrix_does_the_same_to_pairs(theta, permutation):
    U = structured(theta, permutation.expand(GROUPS, -1))
    x = draw(4, GROUPS, SIZE)
    pairs = torch.view_as_real(x).flatten(1)
    expected = torch.view_as_real(torch.einsum("kij,kj->ki", U, x)).flatten(1)
    torch.testing.assert_close(torch.einsum("kij,kj->ki", as_real(U), pairs), expected)
    assert orthogonality_error(as_real(U)) < 1e-14


def skew_hermitian(norm: float) -> Tensor:
    X = draw(5, GROUPS, SIZE, SIZE)
    X = X - X.mH
    return norm * X / torch.linalg.matrix_norm(X, 2)[:, None, None]


def test_a_step_descends_stays_unitary_and_reads_nothing_from_the_device():
    """The loss Re tr(C^H U) falls by rate x |S|^2 / 2; with the paper's plus sign it would rise."""
    U = torch.linalg.matrix_exp(skew_hermitian(2.0))
    C = draw(6, GROUPS, SIZE, SIZE)
    rate, M = torch.tensor(1e-6), C @ U.mH  # C is the gradient, dL/dRe U + i dL/dIm U
    predicted = -rate * (M - M.mH).abs().square().sum() / 2
    with Waits() as waits:
        moved = exponential_step(U, C, rate)
    torch.testing.assert_close((C.conj() * (moved - U)).real.sum(), predicted, rtol=1e-3, atol=0)
    assert orthogonality_error(moved) < 1e-12 and not waits.found


@pytest.mark.parametrize("norm", [1e-6, 1e-3, 0.1, 1.0, 8.0, 16.0])
def test_the_exponential_is_exact_to_float32s_rounding(norm):
    X = skew_hermitian(norm).to(torch.complex64)
    exact = torch.linalg.matrix_exp(X.to(torch.complex128)) - torch.eye(SIZE)
    error = torch.linalg.matrix_norm(exponential_change(X) - exact, 2)
    assert error.max() < 1e-6 * min(norm, 2)  # torch's own has 1e-7 times the identity at any norm


def test_drift_is_mended():
    U = torch.linalg.matrix_exp(skew_hermitian(1.0)) * 1.01
    assert orthogonality_error(unitarized(U)) < 1e-6 < 1e-2 < orthogonality_error(U)


@pytest.mark.parametrize("norm", [3.0, 50.0])
def test_a_long_step_stays_unitary(norm):
    U = torch.eye(SIZE, dtype=torch.complex64).expand(GROUPS, -1, -1)
    moved = exponential_step(U, (norm * skew_hermitian(1.0)).to(torch.complex64), 1.0)
    assert orthogonality_error(moved) < 1e-5
