"""What the tests of check-gpu run on: sizes, random models, samples, and states of runs."""

import io
import json
import math
import os
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from megatron_peft.adapters.attach import attach_adapters, start_gradients_at_the_embedding
from megatron_peft.benchmarks import SIZES_VARIABLE
from megatron_peft.checkpoint.state import TrainingState
from megatron_peft.config import METHODS, RunConfig, make_run
from megatron_peft.data.batches import Microbatch, pack, pad
from megatron_peft.data.samples import Sample
from megatron_peft.models.families import read_shape
from megatron_peft.models.gpt import build_model_chunks
from megatron_peft.models.kernels import Training
from megatron_peft.models.shape import ModelShape
from megatron_peft.parallel.layout import generator_for
from megatron_peft.runtime.launch import seed_generators
from megatron_peft.runtime.precision import full_precision
from megatron_peft.training.run import build_state
from megatron_peft.training.step import train_step
from megatron_peft.training.update import start_state
from tests.one_rank import one_rank

SEED = 1234
LOSSES = Path(__file__).with_name("gpu_losses.json")
NUM_STEPS = 10
FULL_RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
ADAPTERS = tuple(name for name, spec in METHODS.items() if spec.adapter)

# Odd where padding or a multiple of 16 must not matter: the vocabulary, and the lengths of samples.
LLAMA: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 501,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}


def shape_of_llama(
    hidden: int, ffn: int, heads: int, groups: int, channels: int, layers: int = 1, vocab: int = 256
) -> ModelShape:
    """A Llama's shape by its sizes."""
    return ModelShape(
        architecture="llama",
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=channels,
        vocab_size=vocab,
        max_position_embeddings=8192,
    )


@dataclass(frozen=True)
class Sizes:
    """How large the subjects are.

    Args:
        methods: of the lines that try several.
        layer: one layer, whose linear layers are compared with float64 on `layer_tokens` tokens.
        shard: one layer that is timed, on each number of `shard_tokens`.
        model: the model whose speed is measured, on `model_tokens` tokens a microbatch.
        groups: features of a uRNN's group, for the crossover to Fourier transforms.
        turns: of what is timed.
        loss_steps: how many losses are compared.
        num_variants: of packing, recompute and precision, of those that the place allows.
    """

    methods: tuple[str, ...]
    layer: ModelShape
    layer_tokens: int
    shard: ModelShape
    shard_tokens: tuple[int, ...]
    model: ModelShape
    model_tokens: int
    groups: tuple[int, ...]
    turns: int
    loss_steps: int = NUM_STEPS
    num_variants: int = 5


# A rank of Llama-3.1-405B at TP8: 128 heads, 8 groups of keys and 53,248 features of the MLP, divided by 8.
SHARD_405B = shape_of_llama(16384, 53248 // 8, 128 // 8, 1, 128)
LLAMA_1B = replace(shape_of_llama(2048, 8192, 32, 8, 64, layers=16, vocab=128256), tied_embeddings=True)
_LAYER = shape_of_llama(1024, 2048, 8, 2, 128)
_SMALL, _TINY = shape_of_llama(256, 512, 4, 2, 64), shape_of_llama(64, 64, 2, 1, 32)
SIZES = {
    "gpu": Sizes(ADAPTERS, _LAYER, 512, SHARD_405B, (4096, 512), LLAMA_1B, 4096, (256, 1024, 4096), 10),
    "cpu": Sizes(ADAPTERS, _SMALL, 64, _SMALL, (64, 16), replace(_SMALL, num_layers=2), 128, (256, 1024), 3),
    "tiny": Sizes(("lora", "hybrid"), _TINY, 16, _TINY, (8,), _TINY, 16, (64,), 1, loss_steps=3, num_variants=1),
}


def chosen_sizes() -> Sizes:
    """Those that check-gpu has asked for, and the tiny ones in the rest of the tests."""
    return SIZES[os.environ.get(SIZES_VARIABLE, "tiny")]


def device() -> torch.device:
    """Where models lie: the GPU, or the CPU without one."""
    return torch.device(torch.cuda.current_device())


def save_llama(folder: Path) -> str:
    """Its folder; tensors from generators of their own names, so no version and no device changes a number."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model = LlamaForCausalLM(LlamaConfig(**LLAMA))
    for name, parameter in model.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator_for(SEED, name), device="cpu")
        parameter.data.copy_(1 + 0.1 * drawn if "norm" in name else 0.08 * drawn)
    model.save_pretrained(folder)
    return str(folder)


def run_config(base: str, method: str, **groups: Any) -> RunConfig:
    """A run of ten steps of two microbatches of two samples, on one rank.

    Args:
        base: the model's folder.
        groups: fields that differ, by group: peft, model, transformer, data, training, checkpoint.
    """
    values: dict[str, Any] = {"pretrained_checkpoint": base, "method": method, "lora_ga_batches": 1}
    values |= {"urnn_block_size": 32}  # groups of rotated features fit into heads of 32
    values |= {"train_data_path": ("random.jsonl",), "seq_length": 256}  # never opened
    values |= {"micro_batch_size": 2, "global_batch_size": 4, "train_iters": NUM_STEPS}
    values |= {"lr": 5e-3, "lr_decay_style": "constant", "transformer": groups.pop("transformer", {})}
    return make_run(**values | {name: value for group in groups.values() for name, value in group.items()})


def random_samples() -> list[Sample]:
    """Four samples of unequal lengths; a prompt of five tokens does not count in the loss."""
    draw = np.random.default_rng(SEED)
    found = []
    for length in draw.integers(17, 60, 4):
        ids = draw.integers(0, LLAMA["vocab_size"], length + 1)
        found.append(Sample(ids[:-1], ids[1:], (np.arange(length) >= 5).astype(np.float32)))
    return found


def microbatches(packed: bool = False) -> list[Microbatch]:
    """The two microbatches of a step, of every step: so losses fall, and a step without effect shows.

    Packed or padded, the samples and so the losses are the same.
    """
    samples, collate = random_samples(), pack if packed else pad
    return [collate([[first], [second]], 1, 0) for first, second in (samples[:2], samples[2:])]


@full_precision
def state_of(base: str, method: str, **groups: Any) -> TrainingState:
    """A run of the two-layer Llama at its start, as pretrain_peft.py makes it; see `run_config` for the arguments."""
    config = run_config(base, method, **groups)
    seed_generators(SEED)
    start = [microbatches()] if config.peft.spec.starts_from_gradients else []
    return build_state(config, read_shape(base), NUM_STEPS, start)


@full_precision
def losses_of(state: TrainingState, num_steps: int, packed: bool = False) -> list[float]:
    """Of so many steps on the same microbatches."""
    return [train_step(state, microbatches(packed)).loss for _ in range(num_steps)]


def record_losses(base: str) -> None:
    """Write the CPU's losses anew. Only for a change that is meant to change them."""
    local = {"transformer_impl": "local"}
    rows = [f'    "{name}": {json.dumps(losses_of(state_of(base, name, model=local), NUM_STEPS))}' for name in ADAPTERS]
    words = "ten losses of the CPU by method: float32, padded; megatron-peft check-gpu --record-losses writes them"
    losses = ",\n".join(rows)
    LOSSES.write_text(f'{{\n  "about": "{words}",\n  "losses": {{\n{losses}\n  }}\n}}\n')


def random_state(shape: ModelShape, method: str | None, **groups: Any) -> TrainingState:
    """A run in bf16 from random weights of this shape, which no file holds; `method` None: all frozen."""
    config = run_config("random", method or "lora", **{"model": {"bf16": True}, **groups})
    chunks = random_chunks(shape, config, method)
    return start_state(chunks, config, shape, NUM_STEPS)


def random_chunks(shape: ModelShape, config: RunConfig, method: str | None) -> list[Any]:
    """A model of random weights with the method's adapters; None: frozen, and gradients run through it all the same."""
    chunks = build_model_chunks(shape, config.model, config.parallel, Training.of(config))
    torch.manual_seed(SEED)
    for parameter in chunks[0].parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    if method is None:
        chunks[0].requires_grad_(False)
        start_gradients_at_the_embedding(chunks[0])
    elif config.peft.trains_adapters:
        attach_adapters(chunks, config.peft, SEED)
    return chunks


def random_microbatch(shape: ModelShape, num_tokens: int) -> Microbatch:
    """One row of random tokens, all of which count."""
    ids = np.random.default_rng(SEED).integers(0, shape.vocab_size, num_tokens + 1)
    return pad([[Sample(ids[:-1], ids[1:], np.ones(num_tokens, dtype=np.float32))]], 1, 0)


def relative(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected, in float64 on the CPU; a NaN is infinite."""
    found, expected = (one.detach().to("cpu", torch.float64) for one in (found, expected))
    return _number(float((found - expected).norm() / expected.norm()))


def largest_relative(found: Sequence[float], expected: Sequence[float]) -> float:
    """The largest of the numbers' relative differences; a NaN is infinite."""
    return max(_number(abs(one - other) / abs(other)) for one, other in zip(found, expected, strict=True))


def _number(difference: float) -> float:
    """max() would pass over a NaN that is not its first argument."""
    return math.inf if math.isnan(difference) else difference


if __name__ == "__main__":
    with (
        one_rank(),
        tempfile.TemporaryDirectory() as folder,
        redirect_stdout(io.StringIO()),
    ):  # a run tells of its start
        record_losses(save_llama(Path(folder)))
