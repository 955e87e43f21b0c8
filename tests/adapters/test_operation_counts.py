"""How many kernels an adapter adds to a frozen layer, counted on meta tensors along the path that CUDA takes.

On a GPU a step of few tokens is bound by launches. Counted are operations of aten that compute: neither views nor
allocations.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_peft.adapters import boft, hybrid, low_rank, urnn
from megatron_peft.adapters.linear import AdaptedColumnParallelLinear, AdaptedRowParallelLinear
from megatron_peft.adapters.step import AdaptersStep, adapters_step
from megatron_peft.config import ParallelConfig, PeftConfig
from megatron_peft.runtime import cpu
from megatron_peft.runtime.launch import start_model_parallel, stop
from tests.adapters.many_ranks import layer_config
from tests.kept import kept_for_backward
from tests.one_rank import one_rank

HIDDEN, TOKENS, LAYERS, RANK = 64, 32, 5, 4
ADAPTERS: dict[str, Any] = {"lora": low_rank, "boft": boft, "urnn": urnn, "hybrid": hybrid}

# Beyond the frozen layer, a microbatch: forward, backward, autograd's additions to the parameters' gradients.
A_MICROBATCH = {"lora": (3, 7, 0), "boft": (2, 4, 0), "urnn": (2, 4, 0), "hybrid": (5, 13, 0)}
# The same of one of two ranks, collectives counted too. A row layer of one rank has what a column layer has.
BLOCKS = {"boft": (2, 4, 0), "urnn": (2, 4, 0)}
TWO_RANKS: dict[tuple[str, bool], dict[str, tuple[int, int, int]]] = {  # by split and --sequence-parallel
    ("column", False): {"lora": (3, 7, 0), **BLOCKS, "hybrid": (5, 13, 0)},
    ("column", True): {"lora": (4, 8, 0), **BLOCKS, "hybrid": (6, 14, 0)},  # A x is gathered, its gradient scattered
    ("row", False): {"lora": (3, 7, 0), **BLOCKS, "hybrid": (6, 12, 0)},
    ("row", True): {"lora": (3, 7, 0), **BLOCKS, "hybrid": (6, 13, 0)},
}
# All layers of a stage together, however many there are.
A_STEP = {"boft": 40, "urnn": 108, "hybrid": 47}
INPUT = {"rotation_side": "input"}
PROJECTION, RIEMANNIAN = {"boft_parametrization": "projection"}, {"urnn_update": "riemannian", "peft_lr_rotation": 0.1}
# By name: method and numbers, a microbatch, a step.
VARIANTS: dict[str, tuple[str, dict[str, Any], tuple[int, int, int], int]] = {
    "boft input": ("boft", INPUT, (2, 4, 0), 41),
    "urnn input": ("urnn", INPUT, (2, 4, 0), 110),
    "projection": ("boft", PROJECTION, (2, 4, 0), 30),
    "riemannian": ("urnn", RIEMANNIAN, (2, 4, 0), 15),
    "hybrid urnn": ("hybrid", {"hybrid_rotation": "urnn"}, (5, 13, 0), 115),
    **{method: (method, {}, microbatch, A_STEP.get(method, 0)) for method, microbatch in A_MICROBATCH.items()},
}

FREE = {"aten::empty", "aten::empty_like", "aten::new_empty", "aten::_unsafe_view", "aten::empty_strided"}


class Kernels(TorchDispatchMode):
    """Counts operations that compute."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.sent: Counter[tuple[str, int]] = Counter()  # collectives, and the numbers of their larger side

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = [one.alias_info for one in func._schema.returns]
        is_view = any(one is not None and not one.is_write for one in returned)
        if not is_view and func._schema.name not in FREE:
            self.names[func._schema.name] += 1
        if func.namespace == "c10d":
            given = (one for arg in args for one in (arg if isinstance(arg, list) else [arg]))
            size = max(one.numel() for one in given if isinstance(one, torch.Tensor))
            self.sent[func._schema.name.removeprefix("c10d::"), size] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def world() -> Iterator[None]:
    with one_rank():
        yield


@pytest.fixture
def two_ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Rank 1 of two tensor-parallel ranks that do not communicate."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    cpu.install()
    dist.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    start_model_parallel(ParallelConfig(tensor_model_parallel_size=2, world_size=2), 1)
    monkeypatch.setattr(cpu, "_CPU", torch.device("meta"))  # megatron-core allocates what it gathers there
    yield
    monkeypatch.undo()
    stop()


def layers(
    method: str | None, count: int = 1, split: str = "column", splits_sequence: bool = False, **numbers: Any
) -> nn.ModuleList:
    """Parallel linear layers in bfloat16 on meta tensors, each parameter with megatron-core's buffer.

    Args:
        method: of their adapters, with `numbers`; None: frozen alone.
    """
    config = layer_config(dist.get_world_size(), splits_sequence)
    config.params_dtype, config.linear_biases = torch.bfloat16, set()
    common: dict[str, Any] = {"config": config, "init_method": lambda weight: None, "bias": False}
    made = nn.ModuleList()
    for number in range(count):
        layer: Any
        if split == "column":
            layer = AdaptedColumnParallelLinear(HIDDEN, HIDDEN, tp_comm_buffer_name="fc1", **common)
        else:
            kept = {"input_is_parallel": True, "skip_bias_add": True, "tp_comm_buffer_name": "fc2"}
            layer = AdaptedRowParallelLinear(HIDDEN, HIDDEN, **kept, **common)
        layer.requires_grad_(False).is_frozen = True
        if method is not None:
            sizes = {"lora_rank": RANK, "boft_block_size": 4, "boft_factors": 3, "urnn_block_size": 16}
            peft = PeftConfig(method=method, **{**sizes, **numbers})
            layer.adapter = ADAPTERS[method].build(layer.layout, peft, f"layer {number}", 0, torch.bfloat16)
        made.append(layer)
    made.to("meta")
    for parameter in made.parameters():
        if parameter.requires_grad:
            parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)  # pyright: ignore[reportAttributeAccessIssue]
    return made


def input_of(layer: Any) -> torch.Tensor:
    tokens = TOKENS // 2 if layer.layout.split == "column" and layer.sequence_parallel else TOKENS
    return torch.zeros(tokens, 1, layer.weight.shape[1], dtype=torch.bfloat16, device="meta", requires_grad=True)


def a_microbatch(method: str | None, **settings: Any) -> tuple[Counter[str], Counter[str], int]:
    """Kernels of (forward, backward, additions to gradients); `settings` of `layers`."""
    stage = layers(method, **settings)
    x = input_of(stage[0])
    with adapters_step([stage]):
        with Kernels() as forward:
            y, _ = stage[0](x)
        with Kernels() as backward:
            y.backward(torch.zeros_like(y))
    added = [one for one in stage.parameters() if one.grad is not None and not one.grad_added_to_main_grad]  # pyright: ignore[reportAttributeAccessIssue]
    backward.names["aten::zeros_like"] -= 1  # the gradient that this test gives
    return forward.names, +backward.names, len(added)


def beyond_frozen(method: str, numbers: dict[str, Any] | None = None, **settings: Any) -> tuple[int, int, int]:
    """What the adapter adds: kernels of forward and of backward, additions to gradients."""
    frozen, adapted = a_microbatch(None, **settings), a_microbatch(method, **settings, **(numbers or {}))
    forward, backward = (ours.total() - theirs.total() for ours, theirs in zip(adapted[:2], frozen[:2], strict=True))
    return forward, backward, adapted[2]


def a_step(method: str, count: int, **settings: Any) -> Counter[str]:
    """Kernels of what is done once a step for so many layers."""
    step = AdaptersStep([layers(method, count, **settings)])
    step.begin()  # U(theta_0) is made once a run
    with Kernels() as kernels:
        step.begin()
        step.finish([])
    return kernels.names


@pytest.mark.usefixtures("two_ranks")
@pytest.mark.parametrize("method", A_MICROBATCH)
@pytest.mark.parametrize(("split", "splits_sequence"), TWO_RANKS)
def test_an_adapter_of_two_ranks_adds_few_kernels(method, split, splits_sequence):
    settings = {"split": split, "splits_sequence": splits_sequence}
    assert beyond_frozen(method, **settings) == TWO_RANKS[split, splits_sequence][method]
    if method in A_STEP:
        # A row layer of the Hybrid keeps what its rotation has before the sum.
        fewer = 2 * (method == "hybrid" and split == "row")
        assert a_step(method, 2, **settings).total() == A_STEP[method] - fewer


@pytest.mark.usefixtures("two_ranks")
@pytest.mark.parametrize(("split", "splits_sequence"), TWO_RANKS)
def test_what_an_adapter_of_two_ranks_sends_and_keeps_is_narrow(split, splits_sequence):
    """Beside its own input, once. A row layer's input is features of all tokens already: nothing is gathered."""
    sent, kept, narrow = [], [], TOKENS * RANK
    for method in (None, "lora"):
        (layer,) = layers(method, split=split, splits_sequence=splits_sequence)
        x = input_of(layer)
        with Kernels() as kernels:
            with kept_for_backward() as kept:
                y, _ = layer(x)
            y.backward(torch.zeros_like(y))
        sent.append(kernels.sent)
    gathers = splits_sequence and split == "column"
    calls = {("_allgather_base_", narrow): 1, ("_reduce_scatter_base_", narrow): 1} if gathers else {}
    assert sent[1] - sent[0] == calls and sent[0]
    assert sorted(one.numel() for one in kept if one.ndim == 3) == [narrow, x.numel()]


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("variant", VARIANTS)
def test_an_adapter_adds_few_kernels_and_rotations_of_all_layers_are_one_computation(variant):
    method, numbers, microbatch, step = VARIANTS[variant]
    assert beyond_frozen(method, numbers) == microbatch
    if not numbers:
        assert beyond_frozen(method, split="row") == microbatch
    if step:
        few, many = a_step(method, 2, **numbers), a_step(method, LAYERS, **numbers)
        assert few == many and many.total() == step, many
