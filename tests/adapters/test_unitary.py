"""The structured unitary matrix: eq. (10) factor by factor, and the exponential map of eq. (11)-(12)."""

import pytest
import torch
from torch import Tensor

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
from tests.training.waits import Waits

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


def test_it_is_equation_10_and_unitary(theta, permutation):
    U = structured(theta, permutation.expand(GROUPS, -1))
    for group in range(GROUPS):
        torch.testing.assert_close(U[group], eq_10(theta[group], permutation))
    assert orthogonality_error(U) < 1e-14


def test_gradients_of_every_parameter(theta, permutation):
    U0 = structured(theta + 0.1, permutation.expand(GROUPS, -1))
    change = lambda theta: change_from_start(theta, U0, permutation.expand(GROUPS, -1))  # noqa: E731
    torch.autograd.gradcheck(change, theta.requires_grad_())


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


def test_a_step_descends_and_stays_unitary():
    """The loss Re tr(C^H U) falls by rate x |S|^2 / 2; with the paper's plus sign it would rise."""
    U = torch.linalg.matrix_exp(skew_hermitian(2.0))
    C = draw(6, GROUPS, SIZE, SIZE)
    rate, M = 1e-6, C @ U.mH  # C is the gradient, dL/dRe U + i dL/dIm U
    predicted = -rate * (M - M.mH).abs().square().sum() / 2
    moved = exponential_step(U, C, rate)
    torch.testing.assert_close((C.conj() * (moved - U)).real.sum(), predicted, rtol=1e-3, atol=0)
    assert orthogonality_error(moved) < 1e-12


@pytest.mark.parametrize("norm", [1e-6, 1e-3, 0.1, 1.0, 8.0, 16.0])
def test_the_exponential_is_exact_to_float32s_rounding(norm):
    X = skew_hermitian(norm).to(torch.complex64)
    exact = torch.linalg.matrix_exp(X.to(torch.complex128)) - torch.eye(SIZE)
    error = torch.linalg.matrix_norm(exponential_change(X) - exact, 2)
    assert error.max() < 1e-6 * min(norm, 2)  # torch's own has 1e-7 times the identity at any norm


def test_a_step_reads_nothing_from_the_device():
    U, C = torch.linalg.matrix_exp(skew_hermitian(2.0)), draw(6, GROUPS, SIZE, SIZE)
    with Waits() as waits:
        exponential_step(U, C, torch.tensor(0.1))
    assert not waits.found


def test_drift_is_mended():
    U = torch.linalg.matrix_exp(skew_hermitian(1.0)) * 1.01
    assert orthogonality_error(unitarized(U)) < 1e-6 < 1e-2 < orthogonality_error(U)


@pytest.mark.parametrize("norm", [3.0, 50.0])
def test_a_long_step_stays_unitary(norm):
    U = torch.eye(SIZE, dtype=torch.complex64).expand(GROUPS, -1, -1)
    moved = exponential_step(U, (norm * skew_hermitian(1.0)).to(torch.complex64), 1.0)
    assert orthogonality_error(moved) < 1e-5
