"""Single layers: BOFT beside the frozen layer and HF PEFT's; uRNN's FFT beside dense blocks; the loss in chunks."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_peft.adapters.attach import freeze
from megatron_peft.adapters.boft import build
from megatron_peft.adapters.linear import AdaptedColumnParallelLinear
from megatron_peft.adapters.rotation import rotate
from megatron_peft.adapters.urnn import DENSE_UP_TO, StructuredUrnn, rotate_by_fourier
from megatron_peft.benchmarks.measure import MAX_SECONDS, Figure, median_ratio, take_turns
from megatron_peft.benchmarks.subjects import Setting, Step, on_ranks
from megatron_peft.config import ModelConfig, ParallelConfig, PeftConfig
from megatron_peft.models.families import FAMILIES
from megatron_peft.models.gpt import build_model_chunks
from megatron_peft.models.loss import ChunkedLossModel, chunk_tokens
from megatron_peft.models.shape import ModelShape
from megatron_peft.parallel.layout import LinearLayout
from megatron_peft.runtime import cpu
from megatron_peft.runtime.cpu_kernels import give_back_freed_memory
from megatron_peft.training.metrics import memory_bytes

# A linear layer of BOFT beside the frozen layer and HF PEFT's: forward and backward of 1024 tokens at width 2048.
#
# HF PEFT composes several factors only with a CUDA extension (without it the number of factors is silently 1); here it
# gets the same function in plain torch, so that both do b = 8, m = 3.

WIDTH, NUM_TOKENS, BLOCK_SIZE, NUM_FACTORS = 2048, 1024, 8, 3
TARGET = 1.25


def boft_layer_figures(setting: Setting) -> list[Figure]:
    """Times over the frozen linear layer's; HF PEFT's for comparison."""
    seconds = on_ranks(time_layers, setting)[0]
    frozen = seconds["frozen"]
    return [
        Figure(f"{name} layer / frozen layer", median_ratio(seconds[name], frozen), limit, "", note)
        for name, limit in {"BOFT": TARGET, "HF PEFT's BOFT": None}.items()
        for note in [f"{median(seconds[name]):.3f} and {median(frozen):.3f} CPU s"]
    ]


def time_layers(setting: Setting) -> dict[str, list[float]]:
    """CPU seconds of every turn by name. Started on a rank."""
    steps = {name: _step(build()) for name, build in LAYERS.items()}
    return take_turns(steps, setting.turns)


def _step(layer: Callable[[Tensor], Tensor]) -> Step:
    x = torch.randn(NUM_TOKENS, 1, WIDTH, requires_grad=True)
    grad = torch.randn(NUM_TOKENS, 1, WIDTH)
    return lambda: layer(x).backward(grad)


def _linear(has_boft: bool) -> Callable[[Tensor], Tensor]:
    config: Any = TransformerConfig(
        num_layers=1, hidden_size=WIDTH, num_attention_heads=1, perform_initialization=False
    )
    common: dict[str, Any] = {"config": config, "init_method": None, "bias": False, "tp_comm_buffer_name": "fc1"}
    layer: Any = AdaptedColumnParallelLinear(WIDTH, WIDTH, **common).requires_grad_(False)
    nn.init.normal_(layer.weight, std=WIDTH**-0.5)
    if has_boft:
        peft = PeftConfig(method="boft", boft_block_size=BLOCK_SIZE, boft_factors=NUM_FACTORS)
        layer.adapter = build(layer.layout, peft, "decoder.layers.0.mlp.linear_fc1.adapter", 0, torch.float32)
    return lambda x: layer(x)[0]


def _hf_boft() -> Callable[[Tensor], Tensor]:
    from peft import BOFTConfig, get_peft_model
    from peft.tuners.boft import layer as boft

    module: Any = boft
    module.get_fbd_cuda = lambda: True
    module.FastBlockDiag = _PureBlockDiagonal
    sizes: dict[str, Any] = {"boft_block_size": BLOCK_SIZE, "boft_n_butterfly_factor": NUM_FACTORS}
    config = BOFTConfig(**sizes, boft_dropout=0.0, target_modules=["0"])
    return get_peft_model(nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False)), config)


class _PureBlockDiagonal:
    """The function of HF PEFT's CUDA extension: [factors, blocks, b, b] -> [factors, n, n]."""

    @staticmethod
    def apply(blocks: Tensor) -> Tensor:
        return torch.stack([torch.block_diag(*factor) for factor in blocks])


LAYERS = {"frozen": partial(_linear, False), "BOFT": partial(_linear, True), "HF PEFT's BOFT": _hf_boft}


# From which size of group on fast Fourier transforms turn a uRNN layer's features faster than dense blocks.

CROSSOVER_NUM_TOKENS, NUM_FEATURES = 1024, 4096


def crossover_figures(setting: Setting) -> list[Figure]:
    """Forward and backward of a rotation of 4096 features and 1024 tokens, on both sides of `DENSE_UP_TO`."""
    torch.set_num_threads(1)
    cpu.install()
    figures = []
    for size in (DENSE_UP_TO // 4, DENSE_UP_TO, 2 * DENSE_UP_TO, 4 * DENSE_UP_TO):
        seconds = take_turns(crossover_steps(size), setting.turns)
        ways = ("dense", "fourier") if size <= DENSE_UP_TO else ("fourier", "dense")
        note = "; ".join(f"{name} {median(spent):.3f} CPU s" for name, spent in seconds.items())
        name = f"groups of {size}: {ways[0]} / {ways[1]}"
        figures.append(Figure(name, median_ratio(*(seconds[way] for way in ways)), 1.0, "", note))
    return figures


def crossover_steps(size: int, num_features: int = NUM_FEATURES) -> dict[str, Step]:
    """A rotation by dense blocks and by Fourier transforms, forward and backward, on the device."""
    alone: Any = SimpleNamespace(rank=lambda: 0, size=lambda: 1)  # a group of this rank
    layout = LinearLayout("row", num_features, 64, alone)
    adapter = StructuredUrnn(layout, PeftConfig("urnn", urnn_block_size=size), "layer.adapter", 0, torch.float32)
    size_and_place = {"size": (CROSSOVER_NUM_TOKENS, 1, num_features), "device": torch.cuda.current_device()}
    x, upstream = torch.randn(**size_and_place, requires_grad=True), torch.randn(**size_and_place)
    fixed = adapter.start, adapter.permutation
    return {
        "dense": lambda: rotate(x, adapter.changes()).backward(upstream),
        "fourier": lambda: rotate_by_fourier(x, adapter.theta, *fixed, slice(None), False).backward(upstream),
    }


# The loss of a frozen output layer in chunks of tokens, beside that of whole logits.

LOSS_SHAPE: dict[str, Any] = {
    "architecture": next(iter(FAMILIES)),  # any one
    "num_layers": 1,
    "hidden_size": 1024,
    "ffn_hidden_size": 64,
    "num_attention_heads": 1,
    "num_query_groups": 1,
    "kv_channels": 64,
    "vocab_size": 128256,
    "max_position_embeddings": 64,
    "tied_embeddings": True,
}
TIMED_TOKENS, HELD_TOKENS = 1024, 4096
MOST_LOSS_TIME, MOST_LOSS_MB = 1.03, 80.0


def loss_figures(setting: Setting) -> list[Figure]:
    """Time beside the whole loss, and memory beyond the hidden states, their gradient and the weight."""
    chunks, whole = on_ranks(time_losses, setting)[0]
    held = [on_ranks(bytes_of_a_loss, setting, chunk_size=chunk_size)[0] / 1e6 for chunk_size in (None, 0)]
    note = f"{median(chunks):.2f} and {median(whole):.2f} CPU s, {TIMED_TOKENS:,} tokens; {len(whole)} turns"
    ratio = median_ratio(chunks, whole)
    whole_note = f"whole {held[1]:,.0f} MB; {HELD_TOKENS:,} tokens"
    return [
        Figure("loss in chunks / whole loss, forward and backward", ratio, MOST_LOSS_TIME, "", note),
        Figure("loss in chunks: memory beyond hidden states and gradient", held[0], MOST_LOSS_MB, "MB", whole_note),
    ]


def time_losses(setting: Setting) -> list[list[float]]:
    """CPU seconds of every turn, in chunks and whole. Started on a rank."""
    model, end = _model_of_a_loss(), time.monotonic() + MAX_SECONDS
    batch = _loss_batch(TIMED_TOKENS)
    steps = {str(chunk_size): partial(_loss_and_gradient, model, chunk_size, *batch) for chunk_size in (None, 0)}
    return [*take_turns(steps, setting.turns, lambda: time.monotonic() > end).values()]


def bytes_of_a_loss(setting: Setting, chunk_size: int | None) -> int:
    """The most resident memory of a loss and its gradient, above what was there before. Started on a rank."""
    give_back_freed_memory()
    model, (hidden, labels) = _model_of_a_loss(), _loss_batch(HELD_TOKENS)
    _loss_and_gradient(model, chunk_size, *_loss_batch(8))  # the first product makes more than its result
    before, _ = memory_bytes()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what is resident
    _loss_and_gradient(model, chunk_size, hidden, labels)
    return memory_bytes()[1] - before - hidden.nbytes


def _model_of_a_loss() -> ChunkedLossModel:
    (model,) = build_model_chunks(ModelShape(**LOSS_SHAPE), ModelConfig("none"), ParallelConfig())
    freeze(model)
    nn.init.normal_(model.output_weight, std=LOSS_SHAPE["hidden_size"] ** -0.5)
    return model


def _loss_batch(num_tokens: int) -> tuple[Tensor, Tensor]:
    """Hidden states [s, 1, h] and labels [1, s]."""
    hidden = torch.randn(num_tokens, 1, LOSS_SHAPE["hidden_size"]).requires_grad_()
    return hidden, torch.randint(LOSS_SHAPE["vocab_size"], (1, num_tokens))


def _loss_and_gradient(model: ChunkedLossModel, chunk_size: int | None, hidden: Tensor, labels: Tensor) -> None:
    """What megatron-core's model computes behind its last layer."""
    head, model.config.loss_chunk_tokens = model.output_layer, chunk_tokens(chunk_size, LOSS_SHAPE["vocab_size"])
    head.hands_on_input = model.config.loss_chunk_tokens > 0
    loss = model.compute_language_model_loss(labels, head(hidden, model.output_weight)[0]).sum()
    torch.autograd.grad(loss, hidden)
