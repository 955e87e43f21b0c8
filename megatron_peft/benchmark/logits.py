"""The logits of the split model beside those of transformers."""

import dataclasses
from collections.abc import Iterator

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor

from megatron_peft.benchmark.figures import Figure
from megatron_peft.benchmarks.subjects import Setting, join, leave, load_base, load_with_transformers, microbatch
from megatron_peft.data.samples import Microbatch
from megatron_peft.models.families import read_shape
from megatron_peft.runtime.ranks import run_ranks

LARGEST_DIFFERENCE = 1e-4
LAYOUTS = (
    {"tensor_parallel": 1},
    {"tensor_parallel": 3},
    {"tensor_parallel": 3, "sequence_parallel": True},
    {"pipeline_parallel": 2},
)


def logits_figures(setting: Setting) -> list[Figure]:
    """The largest difference over all tokens of the microbatch and the whole vocabulary, at four layouts."""
    expected = _logits_of_transformers(setting)
    note = f"|logit| up to {expected.abs().max():.1f}, {setting.rows} x {setting.positions} tokens"
    settings = [dataclasses.replace(setting, **layout) for layout in LAYOUTS]
    return [
        Figure(f"{one.layout}: largest difference of logits", difference, LARGEST_DIFFERENCE, "", note)
        for one in settings
        for difference in [(_logits(one) - expected).abs().max().item()]
    ]


def _logits(setting: Setting) -> Tensor:
    return run_ranks(setting.world_size, split_logits, setting)[-1]


def split_logits(setting: Setting) -> Tensor | None:
    """[rows, positions, vocabulary] on the last pipeline stage, None on the others. Started on ranks."""
    join(setting)
    shape = read_shape(setting.checkpoint)
    batch = microbatch(setting, shape.vocab_size)
    model, _ = load_base(setting)
    outputs = get_forward_backward_func()(
        forward_step_func=_forward,
        data_iterator=iter([batch]),
        model=model,
        num_microbatches=1,
        seq_length=setting.positions,
        micro_batch_size=setting.rows,
        forward_only=True,
        collect_non_loss_data=True,
    )
    is_last = parallel_state.is_pipeline_last_stage()
    leave()
    return outputs[0][..., : shape.vocab_size].detach().clone() if is_last else None


def _forward(batches: Iterator[Microbatch], model):
    batch = next(batches)
    logits = model(input_ids=batch.tokens, position_ids=batch.position_ids, attention_mask=None)
    return logits, lambda output, non_loss_data: gather_from_tensor_model_parallel_region(output)


def _logits_of_transformers(setting: Setting) -> Tensor:
    model = load_with_transformers(setting)
    with torch.no_grad():
        return model(microbatch(setting, model.config.vocab_size).tokens).logits
