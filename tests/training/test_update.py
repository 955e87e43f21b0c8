"""The rules that end a step on whole matrices: clipping, schedule and accumulation apply to them too."""

from __future__ import annotations

import pytest
import torch

from megatron_peft.adapters.boft import ProjectedBoft
from megatron_peft.adapters.butterfly import nearest_orthogonal
from megatron_peft.adapters.unitary import exponential_step
from megatron_peft.adapters.urnn import RiemannianUrnn
from megatron_peft.config import ConfigurationError
from megatron_peft.training.step import train_step

RATE = 0.05
RIEMANNIAN = {"method": "urnn", "urnn_update": "riemannian", "urnn_block_size": 4, "peft_lr_rotation": RATE}
PROJECTED = {
    "method": "boft",
    "boft_parametrization": "projection",
    "boft_block_size": 2,
    "boft_factors": 2,
    "peft_lr_rotation": RATE,
}


def adapters(state, kind):
    return [module for module in state.model_chunks[0].modules() if isinstance(module, kind)]


@pytest.mark.parametrize("clip_grad", [0.0, 1e-2])
@pytest.mark.parametrize("sharded", [False, True])
def test_riemannian_blocks_move_by_the_clipped_gradient_and_the_schedules_rate(start, clip_grad, sharded):
    state, data = start(
        peft=RIEMANNIAN,
        optimizer={"clip_grad": clip_grad, "use_distributed_optimizer": sharded, "lr_decay_style": "constant"},
    )
    modules = adapters(state, RiemannianUrnn)
    before = [module.U.detach().clone() for module in modules]
    kept = {}
    real = state.optimizer.step

    def step():
        kept.update({module: module.U.main_grad.clone() for module in modules})
        return real()

    state.optimizer.step = step
    report = train_step(state, next(iter(data.train)))
    clipping = min(1.0, clip_grad / (report.grad_norm + 1e-6)) if clip_grad else 1.0
    assert len(modules) == 8 and (clipping < 0.5) == bool(clip_grad)
    for module, U in zip(modules, before, strict=True):
        gradient = kept[module].view_as(U)
        expected = exponential_step(torch.view_as_complex(U), torch.view_as_complex(gradient), RATE * clipping)
        torch.testing.assert_close(module.U.detach(), torch.view_as_real(expected), atol=1e-7, rtol=1e-6)
        assert not torch.equal(module.U, U)


def test_projected_blocks_end_where_the_optimizer_led_to(start):
    state, data = start(peft=PROJECTED)
    modules = adapters(state, ProjectedBoft)
    ended = {}
    real = state.optimizer.step

    def step():
        outcome = real()
        ended.update({module: module.P.detach().clone() for module in modules})
        return outcome

    state.optimizer.step = step
    train_step(state, next(iter(data.train)))
    for module in modules:
        assert torch.equal(module.P.detach(), nearest_orthogonal(ended[module]))
        assert not torch.equal(module.P.detach(), ended[module])


@pytest.mark.parametrize("settings", [RIEMANNIAN, PROJECTED])
def test_gathering_parameters_late_is_refused(job, settings):
    late = {"use_distributed_optimizer": True, "overlap_param_gather": True}
    with pytest.raises(ConfigurationError, match="whole parameters, which --overlap-param-gather has not"):
        job(peft=settings, optimizer=late, training={"overlap_grad_reduce": True}).config(1)


def test_the_logged_rate_is_that_of_rotations_where_nothing_else_is_trained(start):
    state, data = start(peft=PROJECTED, optimizer={"lr_decay_style": "constant"})
    assert train_step(state, next(iter(data.train))).learning_rate == RATE
