"""--hybrid-merge-interval: the Hybrid's change goes into the weights, and the adapters start again.

The paper's W <- W + dW (Algorithm 2, line 21), made consistent: dW is added once, then it is zero again, and so are the
moments that the optimizer has of its parameters. lambda, the schedule and A go on.
"""

from typing import Any

import torch
from torch import Tensor

from megatron_peft.training.mixture import hybrid_adapters
from megatron_peft.training.state import TrainingState


def fold_if_due(state: TrainingState) -> None:
    """Fold after every so many iterations; the step of `state.position.iteration + 1` has just been taken."""
    interval = state.config.peft.hybrid_merge_interval
    if interval is None or (state.position.iteration + 1) % interval:
        return
    for adapter in hybrid_adapters(state).values():
        adapter.fold()
    forget_moments(state.optimizer)


def forget_moments(optimizer: Any) -> None:
    """Set every moment and step count to zero: the parameters that they belong to have started again."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if not part.is_stub_optimizer:  # a rank without trainable parameters
            _forget(part.optimizer)


def _forget(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        if "step" in group:  # fused optimizers count a group's steps, torch's a parameter's
            group["step"] = 0
    for moment in (moment for moments in optimizer.state.values() for moment in moments.values()):
        if isinstance(moment, Tensor):
            moment.zero_()
