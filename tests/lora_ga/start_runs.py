"""LoRA-GA's start beside the exact gradient of the weights; run on ranks by test_initialize.py."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core import parallel_state
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_peft.adapters.attach import attach_adapters, linear_layers, start_gradients_at_the_embedding
from megatron_peft.config import ConfigurationError, ParallelConfig
from megatron_peft.data.build import build_data
from megatron_peft.data.tokenizers import build_tokenizer
from megatron_peft.lora_ga.initialize import start_from_gradients
from megatron_peft.models.huggingface import read_shape
from megatron_peft.runtime.launch import start_model_parallel, start_world
from megatron_peft.training.build import build_state
from megatron_peft.training.start import first_steps
from megatron_peft.training.step import finish_with, run_schedule
from tests.kept import kept_for_backward
from tests.training.layout_runs import Job


@dataclass(frozen=True)
class Started:
    """By layer: A [r, in], B [out, r], |s (B A - B0 A0)|, the reported energy. What is not by layer: the loss with the
    adapters over that without, shapes of new tensors meanwhile."""

    A: dict[str, torch.Tensor]
    B: dict[str, torch.Tensor]
    change: dict[str, float]
    energy: dict[str, float]
    losses: tuple[float, float]
    shapes: set[tuple[int, ...]]


@dataclass(frozen=True)
class Found:
    """The exact gradient [out, in] of the mean loss by layer; each start by its name; what a NaN is told as; bytes
    that a batch keeps for backward in the frozen base and in the passes of the first start."""

    gradients: dict[str, torch.Tensor]
    starts: dict[str, Started]
    nan_message: str
    kept_bytes: list[int]


def exact_and_started(asked: tuple[Job, Sequence[str]]) -> Found:
    """The starts asked for by name, on the job's base and data."""
    job, inits = asked
    start_world(ParallelConfig())
    config = job.config(1)
    start_model_parallel(config.parallel, config.training.seed)
    shape = read_shape(job.base)
    data = build_data(config, build_tokenizer(config.data, None), data_parallel_rank=0, data_parallel_size=1)
    (chunk,) = (wrapped.module for wrapped in build_state(config, shape, data.train_iters).model_chunks)
    steps = first_steps(config, data.train)
    num_tokens = sum(microbatch.num_loss_tokens for step in steps for microbatch in step)
    kept: list[int] = []

    def replay() -> float:
        finish_with([chunk], None)
        with _kept_bytes(kept):
            reports = [run_schedule([chunk], steps[0], forward_only=False).sum(0)]
        reports += [run_schedule([chunk], step, forward_only=False).sum(0) for step in steps[1:]]
        return float(sum(report[0] for report in reports)) / num_tokens

    layers = {target.name: target.module for target in linear_layers(chunk)}
    gradients, loss = _exact_gradients(layers, replay)
    gradients = {name: G / num_tokens for name, G in gradients.items()}
    hook = start_gradients_at_the_embedding(chunk)
    replay()
    hook.remove()
    starts, (_, *kept_by_frozen_base) = {}, list(kept)
    kept.clear()
    for init in inits:
        attach_adapters([chunk], replace(config.peft, lora_ga_init=init), config.training.seed)
        starts[init] = _started(chunk, replace(config.peft, lora_ga_init=init), replay, num_tokens, loss)
    told = _told_of_nan(chunk, config.peft, replay, layers)
    return Found(gradients, starts, told, [*kept_by_frozen_base, *kept[:2]])


def _started(chunk: Any, peft: Any, replay: Any, num_tokens: int, base_loss: float) -> Started:
    layers = {target.name: target.module for target in linear_layers(chunk)}
    with _NewShapes() as new:
        report = start_from_gradients([chunk], peft, 1, replay, num_tokens, *_groups())
    adapters = {name: module.adapter for name, module in layers.items()}
    return Started(
        A={name: adapter.A.detach() for name, adapter in adapters.items()},
        B={name: adapter.B.detach() for name, adapter in adapters.items()},
        change={name: float(adapter.delta_weight().norm()) for name, adapter in adapters.items()},
        energy=report.energy,
        losses=(replay(), base_loss),
        shapes=new.shapes,
    )


def _groups() -> Any:
    return parallel_state.get_tensor_model_parallel_group(), parallel_state.get_data_parallel_group()


def _told_of_nan(chunk: Any, peft: Any, replay: Any, layers: dict[str, Any]) -> str:
    layers["decoder.layers.1.mlp.linear_fc2"].weight.data[0, 0] = torch.nan
    try:
        start_from_gradients([chunk], peft, 1, replay, 1, *_groups())
    except ConfigurationError as error:
        return str(error)
    return ""


def _exact_gradients(layers: dict[str, Any], replay: Any) -> tuple[dict[str, torch.Tensor], float]:
    for module in layers.values():
        module.adapter, module.is_frozen = None, False
        module.weight.requires_grad_(True)
    loss = replay()
    gradients = {name: module.weight.grad.double() for name, module in layers.items()}
    for module in layers.values():
        module.weight.requires_grad_(False)
        module.weight.grad = None
    return gradients, loss


@contextmanager
def _kept_bytes(found: list[int]) -> Iterator[None]:
    """Adds what is kept for backward meanwhile to the list; a memory that is kept twice counts once."""
    with kept_for_backward() as kept:
        yield
    found.append(sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept}.values()))


class _NewShapes(TorchDispatchMode):
    """Shapes of the tensors that operations return and that are not views of what they were given."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.shapes.add(tuple(tensor.shape))
        return result
