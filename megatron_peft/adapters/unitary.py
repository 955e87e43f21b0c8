"""Unitary matrices of the uRNN (eq. (10)-(12)). Tensors in, tensors out.

    U(theta) = D3 R2 F^-1 D2 Pi R1 F D1                                                             eq. (10)

F is the unitary Fourier transform of n complex numbers, D = diag(exp(i phi)) phases, R = I - 2 v v^H a reflection with
v normalized, Pi a fixed permutation: 7n real numbers, theta = [phi1, phi2, phi3, Re v1, Im v1, Re v2, Im v2].

A reflection is at distance 2 from the identity and Pi mixes everything, so U itself cannot start near the identity.
A weight is rotated by Q(theta) = U(theta) U(theta_0)^H, theta_0 the random start: the identity at theta_0, unitary.

Real features are complex numbers in pairs, x[2i] + i x[2i+1]; `as_real` is the real matrix that does the same to them.

Letters: k groups, n complex features of a group, g = 2n real ones.
"""

from functools import cache

import torch
from torch import Tensor

from megatron_peft.runtime.precision import full_precision

NUM_ROWS = 7  # of theta
TAYLOR_ORDER, SQUARINGS = 6, 8  # of the exponential


def random_theta(num_groups: int, size: int, generator: torch.Generator) -> Tensor:  # -> [k, 7, n]
    """Phases uniform on the circle, directions of reflection uniform on the sphere."""
    theta = torch.randn(num_groups, NUM_ROWS, size, generator=generator)
    theta[:, :3] = torch.empty(num_groups, 3, size).uniform_(-torch.pi, torch.pi, generator=generator)
    return theta


def structured(theta: Tensor, permutation: Tensor) -> Tensor:  # [k, 7, n], [k, n] -> [k, n, n] complex
    """U(theta), eq. (10), read from the right."""
    (phase1, phase2, phase3), (v1, v2) = _phases(theta), _directions(theta)
    U = _reflect_rows(fourier(theta.shape[-1], phase1.dtype, phase1.device) * phase1[:, None], v1)  # R1 F D1
    U = torch.fft.ifft(phase2[..., None] * _permuted_rows(U, permutation), dim=1, norm="ortho")  # F^-1 D2 Pi ...
    return phase3[..., None] * _reflect_rows(U, v2)  # D3 R2 ...


def change_from_start(theta: Tensor, U0: Tensor, permutation: Tensor) -> Tensor:  # -> [k, n, n] complex
    """Q - I = (U(theta) - U(theta_0)) U(theta_0)^H, given U(theta_0): exactly zero at theta_0."""
    return (structured(theta, permutation) - U0) @ U0.mH


def apply_structured(x: Tensor, theta: Tensor, permutation: Tensor) -> Tensor:  # [..., k, n] complex, twice
    """U(theta) x by fast Fourier transforms, O(n log n)."""
    (phase1, phase2, phase3), (v1, v2) = _phases(theta), _directions(theta)
    x = _reflect(torch.fft.fft(x * phase1, norm="ortho"), v1)
    x = torch.fft.ifft(x[..., permutation] * phase2, norm="ortho")
    return _reflect(x, v2) * phase3


def apply_structured_inverse(y: Tensor, theta: Tensor, permutation: Tensor) -> Tensor:  # [..., k, n] complex, twice
    """U(theta)^H y."""
    (phase1, phase2, phase3), (v1, v2) = _phases(theta), _directions(theta)
    y = torch.fft.fft(_reflect(y * phase3.conj(), v2), norm="ortho") * phase2.conj()
    y = torch.fft.ifft(_reflect(y[..., permutation.argsort()], v1), norm="ortho")
    return y * phase1.conj()


def as_real(U: Tensor) -> Tensor:  # [k, n, n] complex -> [k, 2n, 2n]
    """The real matrix that does to (Re, Im) pairs what U does: a + ib becomes [[a, -b], [b, a]].

    (a, -b) is conj(a + ib) as a pair, and (b, a) is i conj(a + ib).
    """
    rows = torch.stack([U.conj(), 1j * U.conj()], 2)
    return torch.view_as_real(rows).reshape(U.shape[0], 2 * U.shape[1], 2 * U.shape[2])


@full_precision
def exponential_step(U: Tensor, gradient: Tensor, rate: Tensor | float) -> Tensor:  # [k, n, n] complex, twice
    """One step of descent on the unitary group, eq. (11)-(12): exp(-rate S) U, S = G U^H - U G^H.

    The paper prints exp(+rate S), which ascends. `gradient` is dL/dRe U + i dL/dIm U. Nothing is read from the device.
    """
    M = gradient @ U.mH
    return unitarized(torch.baddbmm(U, exponential_change(-rate * (M - M.mH)), U))


def exponential_change(X: Tensor) -> Tensor:  # [k, n, n] -> [k, n, n]
    """exp(X) - I: Taylor's series of X / 256, squared 8 times. torch's matrix_exp reads norms from the device.

    Relative to |X| it is exact to float32's rounding up to a 2-norm of 16, where a long step has 1; for skew-Hermitian
    X the error is 1e-4 at 100, and above 200 the result is of no use.
    """
    X = X / 2**SQUARINGS
    E = X / TAYLOR_ORDER
    for j in range(TAYLOR_ORDER - 1, 0, -1):
        E = torch.baddbmm(X, X, E, beta=1 / j, alpha=1 / j)  # (X + X E) / j
    for _ in range(SQUARINGS):
        E = torch.baddbmm(E, E, E, beta=2)  # (I + E)^2 - I
    return E


def unitarized(U: Tensor) -> Tensor:  # [..., n, n] -> [..., n, n]
    """The nearest unitary matrix of one that is nearly so: two Newton-Schulz steps, whose error e becomes (3/4) e^2."""
    for _ in range(2):
        U = 1.5 * U - 0.5 * U @ (U.mH @ U)
    return U


@full_precision
def orthogonality_error(R: Tensor) -> Tensor:  # [k, g, g] -> scalar
    """The largest entry of |R^H R - I|."""
    return (R.mH @ R - torch.eye(R.shape[-1], dtype=R.dtype, device=R.device)).abs().max()


@cache
def fourier(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:  # -> [n, n] complex
    """The unitary Fourier matrix."""
    return torch.fft.fft(torch.eye(size, dtype=dtype, device=device), norm="ortho")


def _phases(theta: Tensor) -> tuple[Tensor, ...]:  # -> 3 times [k, n] complex
    angles = theta[:, :3]
    return torch.polar(torch.ones_like(angles), angles).unbind(1)


def _directions(theta: Tensor) -> tuple[Tensor, ...]:  # -> twice [k, n] complex, of norm 1
    parts = theta[:, 3:].unflatten(1, (2, 2))
    v = torch.complex(parts[:, :, 0], parts[:, :, 1])
    return (v / torch.linalg.vector_norm(v, dim=-1, keepdim=True)).unbind(1)


def _permuted_rows(U: Tensor, permutation: Tensor) -> Tensor:  # [k, n, n], [k, n] -> [k, n, n]
    """The rows of every group in its own order: one choice of rows out of those of all groups."""
    first = torch.arange(0, permutation.numel(), permutation.shape[1], device=permutation.device)
    return U.flatten(0, 1).index_select(0, (permutation + first[:, None]).flatten()).view_as(U)


def _reflect_rows(U: Tensor, v: Tensor) -> Tensor:  # [k, n, n], [k, n] -> [k, n, n]
    """(I - 2 v v^H) U."""
    return U - 2 * v[..., None] * (v.conj()[:, None] @ U)


def _reflect(x: Tensor, v: Tensor) -> Tensor:  # [..., k, n], [k, n] -> [..., k, n]
    """(I - 2 v v^H) x."""
    return x - 2 * v * (v.conj() * x).sum(-1, keepdim=True)
