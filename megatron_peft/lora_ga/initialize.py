"""LoRA-GA's start: A spans the leading right singular vectors of the loss's gradient in W (eq. (7)-(8)).

The two sketches are gradients of low-rank branches. With A = Omega^T and B = 0 a LoRA of width w leaves the model as
it is, and dB = dy^T (x Omega) = G Omega. With A = 0 and B = Q it does so too, and dA = (dy Q)^T x = Q^T G. So two
ordinary passes over the same batches do it, at any layout and with all that training can (recompute, accumulation,
pipelines), and the gradient of a weight exists nowhere.

`aligned`: A = V_r^T / sqrt(3), B = 0. The start keeps the pretrained function, and A has the norm of LoRA's own start.

Letters: w width of the sketch, r rank.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_peft.adapters.attach import Target, linear_layers
from megatron_peft.adapters.low_rank import LowRank
from megatron_peft.config import PeftConfig
from megatron_peft.lora_ga.sketch import leading_triplets, orthonormal_basis, squared_norm_estimate, with_fixed_signs
from megatron_peft.parallel.collectives import sum_coalesced
from megatron_peft.parallel.gradients import partial_gradients
from megatron_peft.parallel.seeds import generator_for

OVERSAMPLING = 16
ALIGNED_NORM = 3**-0.5  # of a row of A: that of LoRA's Kaiming-uniform start


@dataclass(frozen=True)
class StartReport:
    """What the start found on this rank.

    Args:
        energy: by layer, the part of |G|_F^2 that its r leading directions hold (|G| is estimated from the sketch).
        seconds: wall time.
    """

    energy: dict[str, float]
    seconds: float


def start_from_gradients(
    model_chunks: Sequence[nn.Module],
    peft: PeftConfig,
    seed: int,
    replay: Callable[[], None],
    tensor_parallel_group: dist.ProcessGroup,
    data_parallel_group: dist.ProcessGroup,
) -> StartReport:
    """Set A of every low-rank adapter from the gradient of the base weights. A collective.

    Args:
        model_chunks: this rank's, bare, with adapters attached and the base loaded.
        peft, seed: of the run.
        replay: runs the same batches forward and backward each time it is called, adding up gradients.
        tensor_parallel_group: the holders of W's parts.
        data_parallel_group: the replicas, which run other parts of the batches.
    """
    started_at = time.perf_counter()
    targets = [target for chunk in model_chunks for target in linear_layers(chunk)]
    sketches = [_Sketch(target, peft, seed) for target in targets if _low_rank(target.module.adapter) is not None]
    branches = [sketch.branch for sketch in sketches]
    groups = (tensor_parallel_group, data_parallel_group)
    _collect([branch.B for branch in branches], replay, *groups)
    for sketch in sketches:
        sketch.turn_to_second_pass()
    _collect([branch.A for branch in branches], replay, *groups)
    energy = {sketch.target.name: sketch.finish(peft.lora_rank) for sketch in sketches}
    return StartReport(energy, time.perf_counter() - started_at)


class _Sketch:
    """One layer while it is sketched: a wide low-rank branch in place of its adapter."""

    def __init__(self, target: Target, peft: PeftConfig, seed: int) -> None:
        layout = target.module.layout
        width = min(peft.lora_rank + OVERSAMPLING, layout.out_features, layout.in_features)
        wide = replace(peft, lora_rank=width, lora_alpha=width, lora_rs=False, lora_dropout=0.0)
        self.target, self.layout = target, layout
        self.adapter = target.module.adapter
        self.branch = LowRank(layout, wide, f"{target.name}.sketch", seed, target.module.weight.dtype)
        self.branch.A.requires_grad_(False)
        self.direction = layout.slice_input(
            torch.randn(layout.in_features, generator=generator_for(seed, f"{target.name}.sketch.direction"))
        ).to(self.branch.A.device)
        target.module.adapter = self.branch

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
        """B becomes Q, A zero."""
        A, B = self.branch.A, self.branch.B
        variance = 1 / (3 * self.layout.in_features)  # of LoRA's uniform start, which is our Omega
        self.squared_norm = squared_norm_estimate(B.main_grad, variance, self.add_up_rows)
        self.Q = orthonormal_basis(B.main_grad, self.add_up_rows)
        B.copy_(self.Q).requires_grad_(False)
        A.zero_().requires_grad_(True)
        del B.main_grad

    @torch.no_grad()
    def finish(self, rank: int) -> float:
        """Put the adapter back with its new A. Returns the part of |G|^2 that it spans."""
        triplets = leading_triplets(self.Q, self.branch.A.main_grad, rank, self.add_up_columns)
        triplets = with_fixed_signs(triplets, self.direction, self.add_up_columns)
        self.target.module.adapter = self.adapter
        low_rank = _low_rank(self.adapter)
        assert low_rank is not None
        low_rank.A.copy_(ALIGNED_NORM * triplets.V.T)
        return float(triplets.S.square().sum()) / max(self.squared_norm, 1e-300)


def _low_rank(adapter: nn.Module | None) -> LowRank | None:
    """The low-rank part of an adapter, if it has one."""
    part = getattr(adapter, "low_rank", adapter)
    return part if isinstance(part, LowRank) else None


def _collect(
    factors: Sequence[nn.Parameter],
    replay: Callable[[], None],
    tensor_parallel_group: dist.ProcessGroup,
    data_parallel_group: dist.ProcessGroup,
) -> None:
    """Fill `main_grad` of the factors, in float32, with the gradient of all batches, microbatches and replicas."""
    hooks = [_accumulate_in_float32(factor) for factor in factors]
    replay()
    for hook in hooks:
        hook.remove()
    sum_coalesced([factor.main_grad for factor in factors], data_parallel_group)
    sum_coalesced(partial_gradients(factors), tensor_parallel_group)


def _accumulate_in_float32(factor: nn.Parameter):
    factor.main_grad = torch.zeros_like(factor, dtype=torch.float32)

    def move(parameter: Tensor) -> None:
        parameter.main_grad.add_(parameter.grad)
        parameter.grad = None

    return factor.register_post_accumulate_grad_hook(move)
