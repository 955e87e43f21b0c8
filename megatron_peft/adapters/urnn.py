"""uRNN: the weight rotated by blocks that are unitary over pairs of features (eq. (10)-(12), Algorithm 1).

    W' = Q W (output side) or W Q^H (input side),   Q = diag(Q_1, ..., Q_k)

`structured`: Q = U(theta) U(theta_0)^H with U of eq. (10), trained in theta. `riemannian`: the block U itself is the
parameter, and eq. (11)-(12) move it on the unitary group in place of the optimizer's own rule. Both start at the
identity; a group is `--urnn-block-size` real features, half as many complex ones.

`--urnn-mode replace` (Algorithm 1, line 7 read literally): the weight of a square layer is Q, and the pretrained one is
not used at all.

Letters: k groups, n complex features of a group, g = 2n real ones; s sequence, b batch.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from megatron_peft.adapters.blocks import identity_like
from megatron_peft.adapters.change import ReplacementChange, RotationChange, StoredTensors, WeightChange
from megatron_peft.adapters.frozen_linear import FrozenLinearCall, frozen_linear
from megatron_peft.adapters.rotation import AppliedRotation, BlockRotation, RotatesOnceAStep, rotate, rotate_weight
from megatron_peft.adapters.unitary import (
    apply_structured,
    apply_structured_inverse,
    as_real,
    change_from_start,
    exponential_step,
    random_theta,
    structured,
)
from megatron_peft.config import PeftConfig
from megatron_peft.config.methods.rotation import URNN
from megatron_peft.parallel.layout import LinearLayout, generator_for
from megatron_peft.runtime.precision import full_precision

# For groups too large for dense blocks: y = U(theta) U(theta_0)^H x, or its inverse, by fast Fourier transforms.
# Backward saves y alone: the inverse gives x back, and the factors in between are recomputed.


def rotate_by_fourier(
    x: Tensor, theta: Tensor, start: Tensor, permutation: Tensor, tokens: slice, inverse: bool
) -> Tensor:  # [s, b, 2 k n], twice
    """y = Q x, Q = U(theta) U(theta_0)^H; with `inverse` y = Q^H x.

    theta, start, permutation: [k, 7, n], [k, 7, n], [n].
    tokens: rows of the flattened tokens over which this rank forms the gradient of theta.
    """
    return _RotateByFourier.apply(x, theta, start, permutation, tokens, inverse)


class _RotateByFourier(torch.autograd.Function):
    @staticmethod
    @full_precision
    def forward(ctx, x, theta, start, permutation, tokens, inverse):  # type: ignore[override]
        y = _as_features(_rotated(_as_complex(x, theta), theta, start, permutation, inverse), x)
        ctx.save_for_backward(y, theta, start, permutation)
        ctx.tokens, ctx.inverse = tokens, inverse
        return y

    @staticmethod
    @full_precision
    def backward(ctx, grad):  # type: ignore[override]
        y, theta, start, permutation = ctx.saved_tensors
        upstream = _as_complex(grad, theta)
        x = _rotated(_as_complex(y, theta), theta, start, permutation, not ctx.inverse)
        dx = _as_features(_rotated(upstream, theta, start, permutation, not ctx.inverse), grad)
        with torch.enable_grad():
            theta = theta.detach().requires_grad_()
            again = _rotated(x[ctx.tokens].detach(), theta, start, permutation, ctx.inverse)
            (dtheta,) = torch.autograd.grad(again, theta, upstream[ctx.tokens])
        return dx, dtheta, None, None, None, None


def _rotated(x: Tensor, theta: Tensor, start: Tensor, permutation: Tensor, inverse: bool) -> Tensor:
    first, second = (theta, start) if inverse else (start, theta)
    return apply_structured(apply_structured_inverse(x, first, permutation), second, permutation)


def _as_complex(x: Tensor, theta: Tensor) -> Tensor:  # [s, b, 2 k n] -> [s b, k, n]
    groups, _, size = theta.shape
    return torch.view_as_complex(x.reshape(-1, groups, size, 2).to(theta.dtype).contiguous())


def _as_features(x: Tensor, like: Tensor) -> Tensor:  # [s b, k, n] -> [s, b, 2 k n]
    return torch.view_as_real(x).reshape(like.shape).to(like.dtype)


DENSE_UP_TO = 512  # features of a group; larger ones are rotated by FFT: megatron-peft bench urnn-crossover measures it


class StructuredUrnn(BlockRotation):
    """The phases and reflections theta [k, 7, n] of one adapted linear layer, in float32; they start at theta_0.

    The adapter's global name and the run's seed fix theta_0 and Pi, which are buffers in the checkpoint.
    """

    start: Tensor  # theta_0 [k, 7, n]
    permutation: Tensor  # Pi [n]

    def __init__(self, layout: LinearLayout, peft: PeftConfig, name: str, seed: int, dtype: torch.dtype) -> None:
        super().__init__(layout, peft.rotation_side, peft.urnn_block_size)
        size, num_groups = self.group_size // 2, layout.num_features(self.side) // self.group_size
        generator, device = generator_for(seed, f"{name}.theta"), torch.cuda.current_device()
        start = layout.slice_groups(self.side, random_theta(num_groups, size, generator)).to(device).contiguous()
        self.theta = nn.Parameter(start.clone())
        self.mark_rotation(self.theta)
        self.register_buffer("start", start)
        layout.mark_groups(self.side, self.start)
        self.register_buffer("permutation", torch.randperm(size, generator=generator).to(device))
        self._start_blocks: tuple[tuple[int, int], Tensor] | None = None

    @property
    def trained(self) -> nn.Parameter:
        return self.theta

    def constants(self) -> tuple[Tensor, ...]:
        """U(theta_0) [k, n, n] and Pi [k, n]."""
        return self.start_blocks(), self._permutations()

    @staticmethod
    def changes_of(trained: Tensor, *constants: Tensor) -> Tensor:
        """Q - I of theta [k, 7, n], given U(theta_0) and Pi."""
        return as_real(change_from_start(trained, *constants))

    @property
    def has_blocks(self) -> bool:
        return self.group_size <= DENSE_UP_TO

    @torch.no_grad()
    @full_precision
    def start_blocks(self) -> Tensor:
        """U(theta_0), [k, n, n]; computed again when a checkpoint has been read into theta_0 or Pi."""
        read = self.start._version, self.permutation._version
        if self._start_blocks is None or self._start_blocks[0] != read:
            self._start_blocks = read, structured(self.start, self._permutations())
        return self._start_blocks[1]

    def _permutations(self) -> Tensor:  # -> [k, n]
        return self.permutation.expand(self.num_local_groups, -1)

    @torch.no_grad()
    def restart(self) -> None:
        self.theta.copy_(self.start)

    def rotate_output(self, x: Tensor, call: FrozenLinearCall) -> Tensor:
        """y = Q (W x)."""
        if self.has_blocks:
            return super().rotate_output(x, call)
        z = call.reduce(frozen_linear(x, replace(call, bias=None)))
        y = self._rotate(z, call.own_tokens(z.shape[0] * z.shape[1]), inverse=False)
        return y if call.bias is None else y + call.bias

    def rotated_by_transpose(self, x: Tensor) -> Tensor:
        """Q^H x."""
        return super().rotated_by_transpose(x) if self.has_blocks else self._rotate(x, slice(None), inverse=True)

    def _rotate(self, x: Tensor, tokens: slice, inverse: bool) -> Tensor:
        return rotate_by_fourier(x, self.theta, self.start, self.permutation, tokens, inverse)


class RiemannianUrnn(BlockRotation):
    """The unitary blocks U of one adapted linear layer, moved by `move` and not by the optimizer's rule.

    U: [k, n, n, 2], real and imaginary parts; the identity at the start.
    """

    def __init__(self, layout: LinearLayout, peft: PeftConfig, name: str, seed: int, dtype: torch.dtype) -> None:
        super().__init__(layout, peft.rotation_side, peft.urnn_block_size)
        size = self.group_size // 2
        identity = torch.eye(size, dtype=torch.complex64, device=torch.cuda.current_device())
        blocks = identity.expand(self.num_local_groups, size, size)
        self.U = nn.Parameter(torch.view_as_real(blocks).clone(memory_format=torch.contiguous_format))
        self.mark_rotation(self.U)

    @property
    def trained(self) -> nn.Parameter:
        return self.U

    @staticmethod
    def changes_of(trained: Tensor, *constants: Tensor) -> Tensor:
        """U - I of U [k, n, n, 2]."""
        R = as_real(torch.view_as_complex(trained))
        return R - identity_like(R)

    @torch.no_grad()
    def restart(self) -> None:
        self.U.zero_()
        self.U[..., 0].diagonal(dim1=-2, dim2=-1).fill_(1)

    @property
    def moved(self) -> nn.Parameter:
        """What `move` updates in place of the optimizer."""
        return self.U

    @torch.no_grad()
    @full_precision
    def move(self, before: Tensor, gradient: Tensor, rate: Tensor | float) -> None:
        """U <- exp(-rate S) U from the U and the gradient of before the step, both [k, n, n, 2]; eq. (11)-(12)."""
        U, G = torch.view_as_complex(before), torch.view_as_complex(gradient)
        self.U.copy_(torch.view_as_real(exponential_step(U, G, rate)))


class UnitaryReplacement(RotatesOnceAStep, nn.Module):
    """y = Q x in place of a square row-parallel layer; the pretrained weight is not used.

    A rank turns its own input features into the output features of the same numbers, and the layer's usual sum puts
    the ranks' parts together.
    """

    def __init__(self, layout: LinearLayout, peft: PeftConfig, name: str, seed: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.layout = layout
        self.rotation = urnn_rotation(layout, replace(peft, rotation_side="input"), name, seed, dtype)

    def applied_rotation(self) -> AppliedRotation:
        """The rotation of the input, as it is: Q x."""
        return AppliedRotation(self.rotation, "output")

    def forward(self, x: Tensor, call: FrozenLinearCall) -> Tensor:  # [s, b, in] -> [s, b, out]
        """y = Q x, in its place among the features of all ranks."""
        y = rotate(x, self.rotation.changes() if self.held is None else self.held.D, held=self.held)
        before = self.layout.group.rank() * self.layout.local_in_features
        after = self.layout.out_features - before - self.layout.local_in_features
        return call.reduce(nn.functional.pad(y, (before, after)))


def build(layout: LinearLayout, peft: PeftConfig, name: str, seed: int, dtype: torch.dtype) -> nn.Module:
    """The adapter that `--urnn-mode` and `--urnn-update` ask for."""
    kind = UnitaryReplacement if URNN.replaces_base(peft) else urnn_rotation
    return kind(layout, peft, name, seed, dtype)


def urnn_rotation(layout: LinearLayout, peft: PeftConfig, name: str, seed: int, dtype: torch.dtype) -> BlockRotation:
    """The rotation that `--urnn-update` asks for."""
    kinds = {"structured": StructuredUrnn, "riemannian": RiemannianUrnn}
    return kinds[peft.urnn_update](layout, peft, name, seed, dtype)


def merge(weight: Tensor, tensors: Mapping[str, Tensor], peft: PeftConfig) -> Tensor:  # [out, in] -> [out, in]
    """Q W, or W Q^H; with --urnn-mode replace Q itself."""
    if URNN.replaces_base(peft):
        return torch.block_diag(*_replacement(tensors, peft)).to(weight.dtype)
    return rotate_weight(weight, rotation(tensors, peft), peft.rotation_side)


def change(tensors: StoredTensors, peft: PeftConfig) -> WeightChange:
    """(Q - I) W, or W (Q - I)^H; with --urnn-mode replace Q - W."""
    if URNN.replaces_base(peft):
        return ReplacementChange(_replacement(tensors, peft))
    return RotationChange(rotation(tensors, peft), peft.rotation_side)


def _replacement(tensors: Mapping[str, Tensor], peft: PeftConfig) -> Tensor:  # -> [k, g, g]
    return rotation({name.removeprefix("rotation."): tensor for name, tensor in tensors.items()}, peft)


def rotation(tensors: Mapping[str, Tensor], peft: PeftConfig) -> Tensor:  # -> [k, g, g]
    """Q in float64 as real blocks, of theta or of the unitary blocks U."""
    if "U" in tensors:
        return as_real(torch.view_as_complex(tensors["U"].double()))
    start = tensors["start"].double()
    permutation = tensors["permutation"].long().expand(len(start), -1)
    change = as_real(change_from_start(tensors["theta"].double(), structured(start, permutation), permutation))
    return change + identity_like(change)
