"""LoRA-GA's start beside the exact gradient of the weights; run on ranks by test_initialize.py."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core import parallel_state

from megatron_peft.adapters.attach import attach_adapters, linear_layers
from megatron_peft.config import ParallelConfig
from megatron_peft.data.build import build_data
from megatron_peft.data.tokenizers import build_tokenizer
from megatron_peft.lora_ga.initialize import start_from_gradients
from megatron_peft.models.huggingface import read_shape
from megatron_peft.runtime.launch import start_model_parallel, start_world
from megatron_peft.training.build import build_state
from megatron_peft.training.start import first_steps
from megatron_peft.training.step import finish_with, run_schedule
from tests.training.layout_runs import Job


@dataclass(frozen=True)
class Found:
    """By layer: the exact gradient [out, in], A [r, in], B [out, r], the reported energy; sizes seen meanwhile."""

    gradients: dict[str, torch.Tensor]
    A: dict[str, torch.Tensor]
    B: dict[str, torch.Tensor]
    energy: dict[str, float]


def exact_and_started(job: Job) -> Found:
    start_world(ParallelConfig())
    config = job.config(1)
    start_model_parallel(config.parallel, config.training.seed)
    shape = read_shape(config.model.pretrained_checkpoint)
    data = build_data(config, build_tokenizer(config.data, None), data_parallel_rank=0, data_parallel_size=1)
    (chunk,) = (wrapped.module for wrapped in build_state(config, shape, data.train_iters).model_chunks)
    steps = first_steps(config, data.train)

    def replay() -> None:
        finish_with([chunk], None)
        for step in steps:
            run_schedule([chunk], step, forward_only=False)

    layers = {target.name: target.module for target in linear_layers(chunk)}
    gradients = _exact_gradients(layers, replay)
    attach_adapters([chunk], config.peft, config.training.seed)
    groups = parallel_state.get_tensor_model_parallel_group(), parallel_state.get_data_parallel_group()
    report = start_from_gradients([chunk], config.peft, config.training.seed, replay, 1, *groups)
    A, B = ({name: getattr(module.adapter, factor).detach() for name, module in layers.items()} for factor in "AB")
    return Found(gradients, A, B, report.energy)


def _exact_gradients(layers, replay) -> dict[str, torch.Tensor]:
    for module in layers.values():
        module.adapter = None
        module.weight.requires_grad_(True)
    replay()
    gradients = {name: module.weight.grad.double() for name, module in layers.items()}
    for module in layers.values():
        module.weight.requires_grad_(False)
        module.weight.grad = None
    return gradients
