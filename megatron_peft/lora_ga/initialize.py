"""LoRA-GA's initialization: A and B from the leading singular triplets of G, the gradient of W (eq. (7)-(8)).

G is the sum over tokens of dy x^T, so its sketches are summed token by token in two passes over the same batches; G
itself is never formed:

    pass 1:  Y = G Omega    = sum over tokens of dy (Omega^T x)^T
    pass 2:  Z = Q^T G      = sum over tokens of (Q^T dy) x^T

Each pass runs training's own forward and backward, at any layout, and costs two narrow products a layer. The
mathematics is in `sketch.py`.

Letters: s sequence, b batch, w width of the sketch, r rank; in and out are a rank's own.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from megatron.core import parallel_state
from torch import Tensor, nn

from megatron_peft.adapters.attach import TargetLayer, linear_layers, start_gradients_at_the_embedding
from megatron_peft.adapters.frozen_linear import FrozenLinearCall, frozen_linear, producer_of, recompute
from megatron_peft.adapters.low_rank import low_rank_part
from megatron_peft.adapters.step import adapters_step
from megatron_peft.config import PeftConfig, require
from megatron_peft.lora_ga.sketch import (
    INIT_RULES,
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
from megatron_peft.runtime.precision import full_precision


class SketchProduct(nn.Module):
    """Takes an adapter's place: the frozen layer, whose backward adds a narrow product to `total`, in float32.

    narrow: Omega^T [w, in] in the first pass, Q^T [w, out] in the second: a rank's own, in the activations' dtype.
    num_features: of the other side, on this rank.
    is_first: `total` is Y^T = sum of (Omega^T x) dy^T, [w, out]; else Z = sum of (Q^T dy) x^T, [w, in].
    """

    def __init__(self, narrow: Tensor, num_features: int, is_first: bool) -> None:
        super().__init__()
        self.narrow, self.is_first = narrow, is_first
        self.total = torch.zeros(narrow.shape[0], num_features, device=narrow.device)

    def forward(self, x: Tensor, call: FrozenLinearCall) -> Tensor:  # [s, b, in] -> [s, b, out]
        return call.reduce(_AddInBackward.apply(frozen_linear(x, call), x.detach(), producer_of(x), self, call))

    def add(self, grad: Tensor, x: Tensor, call: FrozenLinearCall) -> None:
        """Add a microbatch's term: dy [s, b, out], x [s, b, in]."""
        start = start_sum_scatter_sequence_over_tensor_parallel
        whole, other = grad, x
        if self.is_first:
            start, whole, other = start_gather_sequence_over_tensor_parallel, x, grad
        narrowed = linear(whole, self.narrow)
        if call.splits_sequence:  # communicate the narrow side
            narrowed = start(narrowed, call.group)()
        self.total.add_(outer_sum(narrowed, other, self.total.dtype))


class _AddInBackward(torch.autograd.Function):
    """The identity on z."""

    @staticmethod
    def forward(ctx, z, x, producer, product, call):  # type: ignore[override]
        ctx.save_for_backward(x if producer is None else None)  # else backward recomputes x: no memory but the sketches
        ctx.producer, ctx.product, ctx.call = producer, product, call
        return z.view_as(z)

    @staticmethod
    @full_precision
    def backward(ctx, grad):  # type: ignore[override]
        (x,) = ctx.saved_tensors
        if x is None:
            x = recompute(ctx.producer)
        ctx.product.add(grad, x, ctx.call)
        return grad, None, None, None, None


# w - r. In a 135M model (8 batches of 8 messages, r = 16) every layer's r directions then held 99.4% of what the exact
# ones hold; 16 left the worst layer at 97.6%.
OVERSAMPLING = 48


class InitReport(NamedTuple):
    """What the initialization found on this rank: by layer, the share of |G|_F^2 in the r leading directions (what the
    sketch misses is estimated), and the wall time."""

    energy: dict[str, float]
    seconds: float


def init_from_gradients(
    model_chunks: Sequence[nn.Module], peft: PeftConfig, seed: int, replay: Callable[[], None], num_tokens: int
) -> InitReport:
    """Set A and B of every low-rank adapter from the gradient of the base weights. A collective.

    model_chunks: this rank's, bare, with adapters attached and the base loaded.
    replay: runs forward and backward on the same batches at each call; the loss is the sum over tokens.
    num_tokens: that have a loss, in all batches on all replicas.
    Raises ConfigurationError, on all ranks, if a gradient is not finite.
    """
    started_at = time.perf_counter()
    tensor_parallel_group: Any = parallel_state.get_tensor_model_parallel_group()  # ranks that hold slices of W
    data_parallel_group: Any = parallel_state.get_data_parallel_group()  # replicas, which run other slices of batches
    targets = [target for chunk in model_chunks for target in linear_layers(chunk)]
    low_rank = [target for target in targets if low_rank_part(target.module.adapter) is not None]
    sketches = [_Sketch(target, peft.lora_rank, peft.lora_ga_init, seed) for target in low_rank]

    def collect() -> None:
        """Run one pass and sum the branches' totals over replicas and, where they are partial, over ranks."""
        with adapters_step(model_chunks):  # of adapters without a low rank, which stay
            replay()
        sum_coalesced([sketch.branch.total for sketch in sketches], data_parallel_group)
        sum_coalesced([sketch.branch.total for sketch in sketches if sketch.total_is_partial], tensor_parallel_group)

    with ExitStack() as hooks:
        for chunk in model_chunks:  # no parameter has a gradient now, so backward would not reach the first layers
            hook = start_gradients_at_the_embedding(chunk)
            if hook is not None:
                hooks.callback(hook.remove)
        collect()
        checked_together(lambda: _check_finite(sketches))
        for sketch in sketches:
            sketch.prepare_second_pass()
        collect()
    energy = {sketch.target.name: sketch.finish(num_tokens) for sketch in sketches}
    return InitReport(energy, time.perf_counter() - started_at)


class _Sketch:
    """One layer while it is sketched, with a `SketchProduct` in its adapter's place."""

    def __init__(self, target: TargetLayer, rank: int, init: str, seed: int) -> None:
        layout, like = target.module.layout, target.module.weight.dtype
        device = torch.cuda.current_device()  # of a quantized weight only the form has one
        self.rank, self.init = rank, INIT_RULES[init]
        width = min(self.init.triplets_per_rank * rank + OVERSAMPLING, layout.out_features, layout.in_features)
        self.target, self.layout = target, layout
        self.adapter = target.module.adapter
        omega = torch.randn(width, layout.in_features, generator=generator_for(seed, f"{target.name}.sketch"))
        direction = torch.randn(layout.in_features, generator=generator_for(seed, f"{target.name}.sketch.direction"))
        self.direction = layout.slice_input(direction).to(device)
        # Of some columns oneDNN has no fast product.
        own_omega = layout.slice_input(omega).to(device, like).contiguous()
        target.module.adapter = self.branch = SketchProduct(own_omega, layout.local_out_features, is_first=True)

    @property
    def total_is_partial(self) -> bool:
        """Whether `branch.total` is a partial sum on each tensor-parallel rank: Y if the input is split, else Z."""
        return self.layout.split == ("row" if self.branch.is_first else "column")

    def sum_over_rows(self, partial: Tensor) -> Tensor:
        """The sum over the ranks that share the rows of W."""
        if self.layout.split == "column":
            sum_coalesced([partial], self.layout.group)
        return partial

    def sum_over_columns(self, partial: Tensor) -> Tensor:
        """The sum over the ranks that share the columns of W."""
        if self.layout.split == "row":
            sum_coalesced([partial], self.layout.group)
        return partial

    @torch.no_grad()
    def prepare_second_pass(self) -> None:
        Y = self.branch.total.t()
        self.squared_residual = squared_residual_estimate(Y, self.sum_over_rows)
        Q = orthonormal_basis(Y, self.sum_over_rows).to(self.target.module.weight.dtype)
        self.target.module.adapter = self.branch = SketchProduct(Q.t(), self.layout.local_in_features, is_first=False)

    @torch.no_grad()
    def finish(self, num_tokens: int) -> float:
        """Restore the adapter with its new A and B. Returns the share of |G|_F^2 in the r leading directions."""
        Q, Z = self.branch.narrow.t().double(), self.branch.total
        triplets = leading_triplets(Q, Z, self.init.triplets_per_rank * self.rank, self.sum_over_columns)
        triplets = with_fixed_signs(triplets, self.direction, self.sum_over_columns)
        energy = triplets.S[: self.rank].square().sum()
        sketched = self.sum_over_columns(Z.double().square().sum())
        self.target.module.adapter = self.adapter
        low_rank = low_rank_part(self.adapter)
        assert low_rank is not None
        of_the_mean = triplets._replace(S=triplets.S / num_tokens)
        factors = self.init.factors(of_the_mean, self.rank, self.layout.out_features)
        low_rank.start_at(*with_all_rows(factors, triplets.S[: self.rank], low_rank.A.detach()))
        return float(energy) / max(float(sketched) + self.squared_residual, 1e-300)


def _check_finite(sketches: Sequence[_Sketch]) -> None:
    bad = [sketch.target.name for sketch in sketches if not sketch.branch.total.isfinite().all()]
    require(
        not bad,
        f"LoRA-GA's start: the gradient of {', '.join(bad[:3])}{', ...' if len(bad) > 3 else ''} is NaN or infinite. "
        f"Check the data and the base model, or start with --peft-method lora.",
    )
