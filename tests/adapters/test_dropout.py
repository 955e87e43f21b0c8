"""Dropout of the low rank's input: gradients are those of a mask that is kept, and none is."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from torch import Tensor

from megatron_peft.adapters.frozen_linear import FrozenLinearCall
from megatron_peft.adapters.hybrid import Hybrid
from megatron_peft.adapters.low_rank import LowRank, low_rank_part
from megatron_peft.adapters.low_rank_linear import Dropout
from megatron_peft.config import PeftConfig
from megatron_peft.models.layers import ScaledDotProductAttention, _SwiGLU
from megatron_peft.parallel.layout import LinearLayout
from megatron_peft.rehearsal.recorder import Recorder
from megatron_peft.runtime.precision import full_precision
from tests.adapters.many_ranks import drawn
from tests.benchmarks.gpu_subjects import device
from tests.emulated_tf32 import tf32
from tests.one_rank import Place, one_rank

OUT, IN, TOKENS, P = 16, 12, (5, 2), 0.25
H, DY = ("h", *TOKENS, 2 * IN), ("dy", *TOKENS, OUT)


@pytest.fixture(scope="module", autouse=True)
def world():
    with one_rank():
        yield


def tracker() -> Any:
    """megatron-core's, of the ranks' own generators."""
    return tensor_parallel.get_cuda_rng_tracker()


def random_state() -> list[Tensor]:
    """Of the ranks' common generator and of their own ones."""
    return [torch.cuda.get_rng_state(), *tracker().get_states().values()]


def set_random_state(states: list[Tensor]) -> None:
    torch.cuda.set_rng_state(states[0])
    tracker().set_states(dict(zip(tracker().get_states(), states[1:], strict=True)))


def moved(kind: Any, split: Any, p: float = P) -> Any:
    """An adapter away from its start; lambda is 0.3."""
    settings = {"lora_rank": 3, "lora_dropout": p, "hybrid_lambda": "fixed:0.3", "boft_block_size": 2}
    peft = PeftConfig("hybrid" if kind is Hybrid else "lora", boft_factors=2, **settings)
    made = kind(LinearLayout(split, OUT, IN, cast(Any, Place(0, 1))), peft, "layer.adapter", 0, torch.float32)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.copy_(drawn(name, *parameter.shape))
    return made


@pytest.mark.parametrize("is_turned", [False, True])
def test_a_mask_is_drawn_again_as_it_was(is_turned):
    x = torch.ones(6, 40).T if is_turned else torch.ones(6, 40)
    dropout = Dropout(0.5, nullcontext)
    mask = dropout.draw(x)
    following = torch.rand(3)
    assert torch.equal(dropout.draw_again(), mask) and not torch.equal(torch.rand(3), following)


class _WithoutPeers(FrozenLinearCall):
    def reduce(self, y: Tensor) -> Tensor:
        return y


def call_of(split: str, splits_sequence: bool, size: int) -> FrozenLinearCall:
    """With `size` 2 as on one of two ranks, the other of which holds nothing."""
    weight, group = drawn("W", OUT, IN).float().to(device()), cast(Any, Place(0, size))
    output_sum: Any = "none" if split == "column" else "whole" if size == 1 else "own tokens"
    return _WithoutPeers(weight, None, False, splits_sequence, group, output_sum)


def of_swiglu(h: Tensor) -> Tensor:
    """What a row-parallel layer of the Hybrid recomputes."""
    return _SwiGLU.apply(h)


@pytest.mark.gpu("recompute")
@pytest.mark.parametrize(
    ("kind", "split", "splits_sequence", "size"),
    [
        (LowRank, "column", False, 1),
        (LowRank, "column", True, 1),
        (LowRank, "row", False, 1),
        (Hybrid, "column", False, 1),
        (Hybrid, "column", True, 1),
        (Hybrid, "row", False, 1),
        (Hybrid, "row", False, 2),
    ],
)
@tf32()  # as container images allow it
@full_precision
def test_gradients_are_those_of_torchs_dropout_and_generators_go_on_as_with_it(kind, split, splits_sequence, size):
    """Others draw between forward and backward, as the next layers do."""
    adapter, call = moved(kind, split), call_of(split, splits_sequence, size)
    # With the sequence split a block has begun the ranks' own generator, which is the default one then.
    is_common = call.output_sum != "whole"
    low_rank, (h, dy) = low_rank_part(adapter), (drawn(*one).float().to(device()) for one in (H, DY))
    assert low_rank is not None
    h.requires_grad_()
    trained, before = [h, *adapter.parameters()], random_state()

    ours = adapter(of_swiglu(h), call)
    after = random_state()
    torch.rand(7, device=device())
    with tracker().fork():
        torch.rand(7, device=device())
    others = random_state()
    found = torch.autograd.grad((ours * dy).sum(), trained)
    assert all(map(torch.equal, random_state(), others)), "backward leaves generators where they were"

    set_random_state(before)
    x = of_swiglu(h)
    with nullcontext() if is_common else tracker().fork():
        branch = F.dropout(x, P) @ low_rank.A.T @ low_rank.B.T
    assert all(map(torch.equal, random_state(), after)) and not all(map(torch.equal, before, after))
    plain = x @ call.weight.T
    if kind is Hybrid:
        plain = plain + 0.7 * plain @ torch.block_diag(*adapter.rotation.changes()).T
    plain = plain + (0.3 if kind is Hybrid else 1.0) * low_rank.scale * branch
    expected = torch.autograd.grad((plain * dy).sum(), trained)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


PLACES = [("column", 1), ("row", 1), ("row", 2)]


@pytest.mark.parametrize(("kind", "split", "size"), [(kind, *place) for kind in (LowRank, Hybrid) for place in PLACES])
def test_nothing_is_held_for_backward_because_of_dropout(kind, split, size):
    """Whoever holds it: autograd, or Python."""
    held = []
    for p in (0.0, P):
        adapter, call, h = moved(kind, split, p), call_of(split, False, size), drawn(*H).float()
        h.requires_grad_()
        with Recorder() as recorder:
            y = adapter(of_swiglu(h), call)
        assert y.requires_grad  # and it is alive
        held.append(recorder.memory.total)
    assert held[0] == held[1]


def test_with_the_sequence_split_recompute_draws_the_masks_of_forward():
    """Of core attention and of a low rank, within megatron-core's fork of a block, after a mask of the block's own."""
    seen: list[Tensor] = []
    low_rank, call = moved(LowRank, "column", 0.5), call_of("column", splits_sequence=True, size=1)
    block: Any = SimpleNamespace(config=SimpleNamespace(sequence_parallel=True), dropout=0.5, training=True)
    block._kernels, block.softmax_scale = (), None

    def layer(x: Tensor) -> Tensor:
        dropout = low_rank.input_dropout(call)
        assert dropout is not None
        heads = x.view(1, 2, 3, 4)
        seen.extend([dropout.draw(x), ScaledDotProductAttention._attend(block, heads, heads, heads)])
        return x * seen[-2] + seen[-1].view_as(x)

    x = drawn("x", 6, 4).float().to(device()).requires_grad_()
    with tracker().fork():
        F.dropout(torch.ones(5, device=device()))
        y = tensor_parallel.checkpoint(layer, False, x)
        F.dropout(torch.ones(5, device=device()))
    torch.rand(3, device=device())
    y.sum().backward()
    assert torch.equal(seen[0], seen[2]) and torch.equal(seen[1], seen[3])
