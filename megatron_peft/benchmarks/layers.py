"""Single layers: BOFT beside the frozen layer and HF PEFT's; the group size from which uRNN's FFT is faster."""

from collections.abc import Callable
from functools import partial
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_peft.adapters.boft import build
from megatron_peft.adapters.linear import AdaptedColumnParallelLinear
from megatron_peft.adapters.rotation import rotate
from megatron_peft.adapters.urnn import DENSE_UP_TO, StructuredUrnn, rotate_by_fourier
from megatron_peft.benchmarks.measure import Figure, median_ratio, take_turns
from megatron_peft.benchmarks.subjects import Setting, Step, on_ranks
from megatron_peft.config import PeftConfig
from megatron_peft.parallel.layout import LinearLayout
from megatron_peft.runtime import cpu

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
