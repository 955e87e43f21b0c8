"""The update of a step: the optimizer's own rule, and the rules that keep matrices orthogonal or unitary.

`--boft-parametrization projection` goes on from where the optimizer ended to the nearest orthogonal blocks, eq. (6).
`--urnn-update riemannian` goes back to where the step began and moves on the unitary group instead, eq. (11)-(12), with
the gradient that the optimizer clipped and the rate of its schedule. Both act on whole float32 parameters on every
rank, after a distributed optimizer has gathered them: a shard may cut a block in two.
"""

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from torch import nn

from megatron_peft.adapters.boft import ProjectedBoft
from megatron_peft.adapters.rotation import IS_ROTATION
from megatron_peft.adapters.urnn import RiemannianUrnn
from megatron_peft.training.shards import GradientShards
from megatron_peft.training.state import TrainingState

Kind = TypeVar("Kind", bound=nn.Module)
CLIP_EPSILON = 1e-6  # megatron-core's own: clipping multiplies by clip / (norm + epsilon)


def update(state: TrainingState) -> float:
    """Apply the gradients of a step. Returns their norm before clipping."""
    if not state.config.peft.leaves_the_optimizer:
        return _optimizer_step(state)
    on_group = list(_modules(state.model_chunks, RiemannianUrnn))
    parameters = [module.U for module in on_group]
    gradients = GradientShards(state.optimizer).whole(parameters)
    before = [parameter.detach().clone() for parameter in parameters]
    grad_norm = _optimizer_step(state)
    rate = rotation_learning_rate(state) * _clipping(state, grad_norm)
    for module, start, gradient in zip(on_group, before, gradients, strict=True):
        module.move(start, gradient, rate)
    for module in _modules(state.model_chunks, ProjectedBoft):
        module.project()
    return grad_norm


def rotation_learning_rate(state: TrainingState) -> float:
    """Of this step: every group of the optimizer's follows the schedule."""
    groups = [group for group in state.optimizer.param_groups if group.get(IS_ROTATION)]
    return groups[0]["lr"] if groups else 0.0


def _optimizer_step(state: TrainingState) -> float:
    outcome: Any = state.optimizer.step()
    return outcome[1]


def _clipping(state: TrainingState, grad_norm: float) -> float:
    """What the optimizer multiplied the gradients by."""
    limit = state.config.optimizer.clip_grad
    return min(1.0, limit / (grad_norm + CLIP_EPSILON)) if limit > 0 else 1.0


def _modules(model_chunks: Sequence[nn.Module], kind: type[Kind]) -> Iterator[Kind]:
    return (module for chunk in model_chunks for module in chunk.modules() if isinstance(module, kind))
