"""A gated column layer and a row layer with adapters, in float64, at several layouts; started by test_linear.py.

Everything is drawn as a whole and sliced, and what is returned is joined to the whole, so that two layouts can be
compared tensor by tensor. Letters: s sequence, b batch, h hidden, f features between the two layers.
"""

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from megatron_peft.adapters.linear import AdaptedColumnParallelLinear, AdaptedRowParallelLinear
from megatron_peft.adapters.low_rank import LowRank
from megatron_peft.benchmarks.steps import num_elements
from megatron_peft.config import ParallelConfig, PeftConfig
from megatron_peft.parallel.collectives import sum_partial_gradients_over_tensor_parallel
from megatron_peft.rehearsal.program import Call
from megatron_peft.rehearsal.recorder import Recorder
from megatron_peft.runtime.launch import start_model_parallel, start_world
from tests.adapters.many_ranks import drawn as draw
from tests.adapters.many_ranks import joined as join
from tests.adapters.many_ranks import layer_config, split_of
from tests.kept import kept_for_backward

S, BATCH, H, F, RANK = 8, 3, 12, 10, 2
PEFT = PeftConfig(lora_rank=RANK, lora_alpha=3.0)


class GatedPair(nn.Module):
    """row(gate * up) with [gate; up] = column(x) + bias, adapters on both (or on neither)."""

    def __init__(self, size: int, sequence_parallel: bool, with_adapters: bool) -> None:
        super().__init__()
        common: dict[str, Any] = {"config": layer_config(size, sequence_parallel), "init_method": None}
        self.column = AdaptedColumnParallelLinear(H, 2 * F, stride=2, tp_comm_buffer_name="fc1", **common)
        self.row = AdaptedRowParallelLinear(
            F, H, input_is_parallel=True, skip_bias_add=False, tp_comm_buffer_name="fc2", **common
        )
        for name, layer in self.named_children():
            _fill(layer, name, with_adapters)

    def forward(self, x: Tensor) -> Tensor:  # [s, b, h] -> [s, b, h]
        gate, up = self.column(x)[0].chunk(2, -1)
        return self.row(gate * up)[0]


def _fill(layer: Any, name: str, with_adapters: bool) -> None:
    layout = layer.layout
    weight = draw(f"{name}.weight", layout.out_features, layout.in_features)
    layer.requires_grad_(False)
    layer.weight.copy_(layout.slice_input(layout.slice_output(weight)))
    layer.bias.copy_(layout.slice_output(draw(f"{name}.bias", layout.out_features)))
    if with_adapters:
        layer.adapter = LowRank(layout, PEFT, f"{name}.adapter", seed=3, dtype=torch.float64)
        with torch.no_grad():
            layer.adapter.B.copy_(layout.slice_output(draw(f"{name}.B", layout.out_features, RANK)))


def run(layouts: list[tuple[bool, bool]]) -> list[dict[str, Any]]:
    """For each (sequence parallel, with adapters): whole tensors by name, and counts of collectives."""
    start_world()
    size = dist.get_world_size()
    start_model_parallel(ParallelConfig(tensor_model_parallel_size=size, world_size=size), seed=1)
    return [run_here(*layout) for layout in layouts]


def run_here(sequence_parallel: bool, with_adapters: bool) -> dict[str, Any]:
    """One forward, backward and sum of partial gradients in the present world."""
    group: Any = parallel_state.get_tensor_model_parallel_group()
    pair = GatedPair(group.size(), sequence_parallel, with_adapters)

    def own_tokens(whole: Tensor) -> Tensor:
        return whole.chunk(group.size())[group.rank()] if sequence_parallel else whole

    def whole_sequence(own: Tensor) -> Tensor:
        return torch.cat(_from_all(own, group)) if sequence_parallel else own

    x = own_tokens(draw("x", S, BATCH, H)).clone().requires_grad_()
    with Recorder(keeps_work=False) as log:
        y = pair(x)
        y.backward(own_tokens(draw("dy", S, BATCH, H)))
        for parameter in pair.parameters():
            parameter.main_grad = parameter.grad
        sum_partial_gradients_over_tensor_parallel([pair], group)
    found = {"y": whole_sequence(y.detach()), "dx": whole_sequence(x.grad)}
    calls = (entry for entry in log.entries() if isinstance(entry, Call))
    found["calls"] = Counter((call.operation, num_elements(call)) for call in calls)
    found["kept"] = _kept(pair.column, x)
    for name, parameter in pair.named_parameters():
        if parameter.requires_grad:
            found[name] = join(_from_all(parameter.detach(), group), split_of(parameter))
            found[f"d {name}"] = join(_from_all(parameter.main_grad, group), split_of(parameter))
    return found


def _kept(layer: nn.Module, x: Tensor) -> list[Any]:
    """What a layer's forward keeps for its backward, parameters aside: sizes of tensors, and "x" for x itself."""
    with kept_for_backward() as kept:
        layer(x)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    sizes: dict[int, Any] = {tensor.untyped_storage().data_ptr(): tensor.numel() for tensor in kept}
    if x.untyped_storage().data_ptr() in sizes:
        sizes[x.untyped_storage().data_ptr()] = "x"
    return sorted((size for storage, size in sizes.items() if storage not in parameters), key=str)


def _from_all(tensor: Tensor, group: Any) -> list[Tensor]:
    parts = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return parts
