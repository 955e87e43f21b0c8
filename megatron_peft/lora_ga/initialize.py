"""LoRA-GA's start: A and B from the leading singular triplets of the loss's gradient in W (eq. (7)-(8)).

G is the sum over tokens of dy x^T, so its sketches G Omega and Q^T G are summed token by token in two ordinary passes
over the same batches, at any layout and with all that training can (recompute, accumulation, pipelines),
and the gradient of a weight exists nowhere. With w = r + 48 every layer's r directions held 99.4% of what the exact
ones hold in a 135M model (8 batches of 8 messages, r = 16); r + 16 left the worst at 97.6%.

What A and B become, and the sketches' mathematics, is in `sketch.py`.

Letters: w width of the sketch, r rank.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_peft.adapters.attach import Target, linear_layers, start_gradients_at_the_embedding
from megatron_peft.adapters.frozen_linear import FrozenLinearCall, frozen_linear, producer_of, recompute
from megatron_peft.adapters.low_rank import low_rank_part
from megatron_peft.config import require
from megatron_peft.lora_ga.sketch import (
    STARTS,
    leading_triplets,
    orthonormal_basis,
    squared_residual_estimate,
    with_all_rows,
    with_fixed_signs,
)
from megatron_peft.parallel.collectives import (
    start_gather_sequence_over_tensor_parallel,
    start_sum_scatter_sequence_over_tensor_parallel,
    sum_coalesced,
)
from megatron_peft.parallel.layout import generator_for
from megatron_peft.runtime.cpu_kernels import linear, outer_sum
from megatron_peft.runtime.launch import checked_together

# What stands in an adapter's place while a layer's gradient is sketched: it changes nothing and sums a narrow product.
#
#     pass 1:  Y = G Omega    = sum over tokens of dy (Omega^T x)^T
#     pass 2:  Z = Q^T G      = sum over tokens of (Q^T dy) x^T           G = sum over tokens of dy x^T
#
# Each costs two narrow products a layer beside the frozen layer's own, half of what training a LoRA of that width
# costs. The sums are in float32, over all microbatches that are run. Under sequence parallelism the narrow side
# travels, as in `adapters/frozen_linear.py`.
#
# Both work in backward alone, and need x there. The frozen base keeps no layer's input; where the operation that x came
# from keeps what it can be made of again (SwiGLU, RMSNorm on a CPU), it is, and a pass takes the memory of its sketches
# and no more. Else x is kept.
#
# Letters: s sequence, b batch, w width; in and out are a rank's own.


class _Product(nn.Module):
    """One layer's frozen product, and a sum that grows on the way back."""

    total: Tensor

    def forward(self, x: Tensor, call: FrozenLinearCall) -> Tensor:  # [s, b, in] -> [s, b, out]
        return call.reduce(_AddOnTheWayBack.apply(frozen_linear(x, call), x.detach(), producer_of(x), self, call))

    def add(self, grad: Tensor, x: Tensor, call: FrozenLinearCall) -> None:
        """The part of a microbatch: dy [s, b, out], x [s, b, in]."""
        raise NotImplementedError


class LeftProduct(_Product):
    """Adds up Y = G Omega for one layer.

    Args:
        omega: [w, in], the rank's own slice, in the type of the activations.
        out_features: of this rank.

    Attributes:
        total: Y^T, [w, out], float32.
    """

    def __init__(self, omega: Tensor, out_features: int) -> None:
        super().__init__()
        self.omega = omega
        self.total = torch.zeros(omega.shape[0], out_features, device=omega.device)

    def add(self, grad: Tensor, x: Tensor, call: FrozenLinearCall) -> None:
        u = linear(x, self.omega)
        if call.splits_sequence:
            u = start_gather_sequence_over_tensor_parallel(u, call.group)()
        self.total.add_(outer_sum(u, grad))


class RightProduct(_Product):
    """Adds up Z = Q^T G for one layer.

    Args:
        Q: [out, w], the rank's own rows, in the type of the activations.
        in_features: of this rank.

    Attributes:
        total: Z, [w, in], float32.
    """

    def __init__(self, Q: Tensor, in_features: int) -> None:
        super().__init__()
        self.Q = Q
        self.total = torch.zeros(Q.shape[1], in_features, device=Q.device)

    def add(self, grad: Tensor, x: Tensor, call: FrozenLinearCall) -> None:
        du = linear(grad, self.Q.t())
        if call.splits_sequence:
            du = start_sum_scatter_sequence_over_tensor_parallel(du, call.group)()
        self.total.add_(outer_sum(du, x))


class _AddOnTheWayBack(torch.autograd.Function):
    """The identity on z."""

    @staticmethod
    def forward(ctx, z, x, producer, product, call):  # type: ignore[override]
        ctx.save_for_backward(x if producer is None else None)
        ctx.producer, ctx.product, ctx.call = producer, product, call
        return z.view_as(z)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        (x,) = ctx.saved_tensors
        if x is None:
            x = recompute(ctx.producer)
        ctx.product.add(grad, x, ctx.call)
        return grad, None, None, None, None


OVERSAMPLING = 48


@dataclass(frozen=True)
class StartReport:
    """What the start found on this rank.

    Args:
        energy: by layer, the part of |G|_F^2 that the r leading directions hold (what the sketch left is estimated).
        seconds: wall time.
    """

    energy: dict[str, float]
    seconds: float


def start_from_gradients(
    model_chunks: Sequence[nn.Module],
    rank: int,
    start: str,
    seed: int,
    replay: Callable[[], None],
    num_tokens: int,
    tensor_parallel_group: dist.ProcessGroup,
    data_parallel_group: dist.ProcessGroup,
) -> StartReport:
    """Set A and B of every low-rank adapter from the gradient of the base weights. A collective.

    Args:
        model_chunks: this rank's, bare, with adapters attached and the base loaded.
        rank, start, seed: --lora-rank, --lora-ga-init and --seed of the run.
        replay: runs the same batches forward and backward each time it is called, adding up the gradients of the
            tokens' losses.
        num_tokens: that have a loss, in all batches on all replicas: the loss is their mean.
        tensor_parallel_group: the holders of W's parts.
        data_parallel_group: the replicas, which run other parts of the batches.

    Raises:
        ConfigurationError: on every rank: a gradient is not finite.
    """
    started_at = time.perf_counter()
    targets = [target for chunk in model_chunks for target in linear_layers(chunk)]
    sketches = [
        _Sketch(target, rank, start, seed) for target in targets if low_rank_part(target.module.adapter) is not None
    ]
    groups = (tensor_parallel_group, data_parallel_group)
    with _gradients_through_every_layer(model_chunks):
        _collect(sketches, replay, *groups)
        checked_together(lambda: _check_finite(sketches))
        for sketch in sketches:
            sketch.turn_to_second_pass()
        _collect(sketches, replay, *groups)
    energy = {sketch.target.name: sketch.finish(num_tokens) for sketch in sketches}
    return StartReport(energy, time.perf_counter() - started_at)


@contextmanager
def _gradients_through_every_layer(model_chunks: Sequence[nn.Module]) -> Iterator[None]:
    """Nothing has a gradient while it is sketched, so that none would come down to the first layers."""
    hooks = [start_gradients_at_the_embedding(chunk) for chunk in model_chunks]
    try:
        yield
    finally:
        for hook in hooks:
            if hook is not None:
                hook.remove()


class _Sketch:
    """One layer while it is sketched: a branch that sums in place of its adapter."""

    branch: LeftProduct | RightProduct

    def __init__(self, target: Target, rank: int, start: str, seed: int) -> None:
        layout, weight = target.module.layout, target.module.weight
        self.rank, self.start = rank, STARTS[start]
        wanted = self.start.triplets_a_rank * rank + OVERSAMPLING
        width = min(wanted, layout.out_features, layout.in_features)
        self.target, self.layout = target, layout
        self.adapter = target.module.adapter
        omega = torch.randn(width, layout.in_features, generator=generator_for(seed, f"{target.name}.sketch"))
        direction = torch.randn(layout.in_features, generator=generator_for(seed, f"{target.name}.sketch.direction"))
        self.direction = layout.slice_input(direction).to(weight.device)
        self._stand_in(LeftProduct(layout.slice_input(omega).to(weight), layout.local_out_features))

    def _stand_in(self, branch: LeftProduct | RightProduct) -> None:
        self.branch = branch
        self.target.module.adapter = branch

    @property
    def total_is_partial(self) -> bool:
        """Whether the tensor-parallel ranks hold parts of the sum: Y's, where the input is split; else Z's."""
        return self.layout.split == ("row" if isinstance(self.branch, LeftProduct) else "column")

    def add_up_rows(self, part: Tensor) -> Tensor:
        """The sum over the holders of the rows of W."""
        return self._add_up(part) if self.layout.split == "column" else part

    def add_up_columns(self, part: Tensor) -> Tensor:
        """The sum over the holders of the columns of W."""
        return self._add_up(part) if self.layout.split == "row" else part

    def _add_up(self, part: Tensor) -> Tensor:
        sum_coalesced([part], self.layout.group)
        return part

    @torch.no_grad()
    def turn_to_second_pass(self) -> None:
        Y = self.branch.total.t()
        self.squared_residual = squared_residual_estimate(Y, 1.0, self.add_up_rows)
        Q = orthonormal_basis(Y, self.add_up_rows).to(self.target.module.weight)
        self._stand_in(RightProduct(Q, self.layout.local_in_features))

    @torch.no_grad()
    def finish(self, num_tokens: int) -> float:
        """Put the adapter back with its new A and B. Returns the part of |G|^2 that the r leading directions hold."""
        assert isinstance(self.branch, RightProduct)
        start, Q, Z = self.start, self.branch.Q.double(), self.branch.total
        triplets = leading_triplets(Q, Z, start.triplets_a_rank * self.rank, self.add_up_columns)
        triplets = with_fixed_signs(triplets, self.direction, self.add_up_columns)
        energy = triplets.S[: self.rank].square().sum()
        sketched = self.add_up_columns(Z.double().square().sum())
        self.target.module.adapter = self.adapter
        low_rank = low_rank_part(self.adapter)
        assert low_rank is not None
        of_the_mean = triplets._replace(S=triplets.S / num_tokens)
        factors = start.factors(of_the_mean, self.rank, self.layout.out_features)
        low_rank.start_at(*with_all_rows(factors, triplets.S[: self.rank], low_rank.A.detach()))
        return float(energy) / max(float(sketched) + self.squared_residual, 1e-300)


def _check_finite(sketches: Sequence[_Sketch]) -> None:
    bad = [sketch.target.name for sketch in sketches if not sketch.branch.total.isfinite().all()]
    require(
        not bad,
        f"LoRA-GA's start: the gradient of {', '.join(bad[:3])}{', ...' if len(bad) > 3 else ''} is NaN or infinite. "
        f"Check the data and the base model, or start with --peft-method lora.",
    )


def _collect(
    sketches: Sequence[_Sketch],
    replay: Callable[[], None],
    tensor_parallel_group: dist.ProcessGroup,
    data_parallel_group: dist.ProcessGroup,
) -> None:
    """Fill the branches' sums over all batches, microbatches, replicas and holders."""
    replay()
    sum_coalesced([sketch.branch.total for sketch in sketches], data_parallel_group)
    sum_coalesced([sketch.branch.total for sketch in sketches if sketch.total_is_partial], tensor_parallel_group)
