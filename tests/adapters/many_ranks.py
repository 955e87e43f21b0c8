"""Adapted layers on any number of tensor-parallel ranks in one process, compared with the same layers on one rank.

torch's LocalTensorMode runs every rank's program at once: a LocalTensor holds each rank's slice, an operation is done
on all slices, and a collective is the sum or the concatenation that it stands for. The process groups are fake, the
numbers float64. torch's mode is private; without it nothing can be compared here.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_peft.adapters import low_rank, urnn
from megatron_peft.adapters.attach import new_adapters
from megatron_peft.adapters.boft import ProjectedBoft
from megatron_peft.adapters.linear import AdaptedColumnParallelLinear, AdaptedRowParallelLinear
from megatron_peft.config import LINEAR_MODULES, LinearSizes, PeftConfig
from megatron_peft.parallel.collectives import sum_partial_gradients_over_tensor_parallel
from megatron_peft.parallel.layout import LinearLayout, generator_for
from megatron_peft.runtime import cpu

Split = tuple[int, int] | None  # (dim that the ranks split, parts along it that each is split); None: each has all


def run_layer(
    name: str,
    sizes: LinearSizes,
    peft: PeftConfig | None,
    group: dist.ProcessGroup,
    shape: tuple[int, int],
    sequence_parallel: bool,
) -> dict[str, Tensor]:
    """One forward and backward of a frozen layer, with an adapter or without one; the name is for what is drawn.

    Output, the input's gradient and, after the sum over the ranks, the gradient of every parameter, whole. `shape` is
    tokens and batch of the input.
    """
    size = group.size()
    layer = build_layer(name, sizes, group, sequence_parallel)
    if peft is not None:
        attach(layer, peft, size)
    tokens, features = (0, 1) if sequence_parallel else None, (2, sizes.num_parts)
    of_x, of_y = (tokens, features) if sizes.split == "column" else (features, tokens)
    x = spread(drawn("x", *shape, sizes.in_features), of_x, size).requires_grad_()
    dy = spread(drawn("dy", *shape, sizes.out_features), of_y, size)
    with all_ranks_at_once(size):
        y = layer(x)[0]
        y.backward(dy)
        for parameter in layer.parameters():
            parameter.main_grad = parameter.grad
        sum_partial_gradients_over_tensor_parallel([layer], group)
    trained = {name: parameter for name, parameter in layer.named_parameters() if parameter.requires_grad}
    gradients = {name: whole(parameter.main_grad, split_of(parameter)) for name, parameter in trained.items()}
    return {"y": whole(y.detach(), of_y), "dx": whole(x.grad, of_x), **gradients}


@contextmanager
def fake_groups(*sizes: int) -> Iterator[dict[int, dist.ProcessGroup]]:
    """Groups of one rank and of each of the sizes, by size; this process is the first of each."""
    from torch.testing._internal.distributed import fake_pg  # noqa: F401  registers the backend

    cpu.install()
    dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=max(sizes))
    try:
        yield {size: dist.new_group(list(range(size)), backend="fake") for size in {1, *sizes}}  # type: ignore[misc]
    finally:
        dist.destroy_process_group()


def layer_config(size: int, sequence_parallel: bool, head_features: int | None = None) -> Any:
    """megatron-core's configuration of layers in float64 that all have a bias, on `size` ranks."""
    config: Any = TransformerConfig(
        num_layers=1,
        hidden_size=size,
        num_attention_heads=size,
        kv_channels=head_features,
        tensor_model_parallel_size=size,
        sequence_parallel=sequence_parallel,
        params_dtype=torch.float64,
        perform_initialization=False,
    )
    config.linear_biases = {*LINEAR_MODULES}
    return config


def build_layer(name: str, sizes: LinearSizes, group: dist.ProcessGroup, sequence_parallel: bool) -> Any:
    """A frozen layer with all ranks' slices of its weight and bias."""
    is_column = sizes.split == "column"
    special: dict[str, Any] = {"stride": sizes.num_parts} if is_column else {"input_is_parallel": True}
    layer: Any = (AdaptedColumnParallelLinear if is_column else AdaptedRowParallelLinear)(
        sizes.in_features,
        sizes.out_features,
        config=layer_config(group.size(), sequence_parallel, sizes.head_features),
        init_method=None,
        skip_bias_add=False,
        tp_comm_buffer_name=name.removeprefix("linear_"),
        tp_group=group,
        **special,
    )
    layer.is_frozen = True
    layer.requires_grad_(False)
    for tensor, shape in {"weight": (sizes.out_features, sizes.in_features), "bias": (sizes.out_features,)}.items():
        put(layer, tensor, drawn(f"{name}.{tensor}", *shape), group.size())
    return layer


def attach(layer: Any, peft: PeftConfig, size: int) -> None:
    """Give the layer its adapter, in float64 and moved away from the start; the ranks' starts are slices of one."""

    def made(group: Any) -> Any:
        one = layer.layout
        layout = LinearLayout(one.split, one.out_features, one.in_features, group, one.num_parts, one.head_features)
        return new_adapters({"layer": layout}, peft, 3, torch.float64)["layer"]

    alone, ranks = made(TensorParallelPlace(0, 1)), [made(TensorParallelPlace(at, size)) for at in range(size)]
    slices = [dict(one.named_parameters()) for one in ranks]
    for name, parameter in alone.named_parameters():
        start = joined([own[name].detach() for own in slices], split_of(slices[0][name]))
        assert torch.equal(start, parameter), f"{name} does not start as on one rank"
    move(alone.double())
    layer.adapter = made(layer.layout.group)
    for path, module in layer.adapter.named_modules():
        for name, own in {**module._parameters, **module._buffers, **vars(module)}.items():
            if isinstance(own, nn.Parameter) or hasattr(own, "tensor_model_parallel"):
                put(module, name, getattr(alone.get_submodule(path), name).detach(), size)
            elif isinstance(own, Tensor):  # not marked: each rank's constructor knows its slice
                setattr(module, name, as_held([getattr(one.get_submodule(path), name) for one in ranks]))
    if hasattr(layer.adapter, "bind_weight"):
        layer.adapter.bind_weight(layer.weight)


@torch.no_grad()
def move(adapter: nn.Module) -> None:
    """Every parameter away from its start; rotations stay rotations."""
    for module in adapter.modules():
        if isinstance(module, low_rank.LowRank) and module.A0 is not None:
            module.start_at(drawn("A0", *module.A.shape), drawn("B0", *module.B.shape))
        if isinstance(module, urnn.RiemannianUrnn):
            module.move(module.U.clone(), drawn("G", *module.U.shape), 0.2)
            continue
        for name, parameter in module.named_parameters(recurse=False):
            parameter += 0.3 * drawn(name, *parameter.shape)
        if isinstance(module, ProjectedBoft):
            module.project()


@contextmanager
def all_ranks_at_once(size: int) -> Iterator[None]:
    """Ranks ask their group which they are: it answers an integer of several values (by itself always 0)."""
    if size == 1:
        yield
        return
    local: Any = import_module("torch.distributed._local_tensor")

    class Mode(local.LocalTensorMode):
        """torch's takes the conjugate of a number, which backward asks for, for a new tensor on each rank."""

        def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
            if func is torch.ops.aten._conj.default and isinstance(args[0], complex):
                return func(*args)
            return super().__torch_dispatch__(func, types, args, kwargs)

    rank = torch.SymInt(local.LocalIntNode({rank: rank for rank in range(size)}))
    with rank_of_groups(rank), Mode(size):
        yield


@contextmanager
def rank_of_groups(rank: Any) -> Iterator[None]:
    """Every process group answers this rank: an integer of one value for each rank."""
    with mock.patch.object(dist.ProcessGroup, "rank", lambda group: rank):
        yield


# Tensors as all ranks hold them.


@dataclass(frozen=True)
class TensorParallelPlace:
    """Answers like the process group of rank `at` of `of`, for code that only slices."""

    at: int
    of: int

    def rank(self) -> int:
        return self.at

    def size(self) -> int:
        return self.of


def given_dropout(mask: Any) -> Any:
    """A `Dropout` whose mask is this one; None of None."""
    return None if mask is None else SimpleNamespace(draw=lambda x: mask, draw_again=lambda: mask)


def drawn(name: str, *shape: int) -> Tensor:
    """Random numbers in float64, the same for a name."""
    return torch.randn(*shape, dtype=torch.float64, generator=generator_for(0, name))


def split_of(parameter: Any) -> Split:
    """How a parameter or buffer says that it lies on the ranks."""
    is_split = getattr(parameter, "tensor_model_parallel", False)
    return (parameter.partition_dim, parameter.partition_stride) if is_split else None


def put(module: nn.Module, name: str, tensor: Tensor, size: int) -> None:
    """All ranks' slices of a whole tensor in the place of a parameter or buffer, which says how it is split."""
    old = getattr(module, name)
    new = spread(tensor, split_of(old), size)
    new = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
    for attribute, value in vars(old).items():
        setattr(new, attribute, value)
    setattr(module, name, new)


def spread(whole: Tensor, split: Split, size: int) -> Any:
    """A whole tensor as all ranks hold it; as it is on one rank."""
    if size == 1:
        return whole
    if split is None:
        return local_tensor([whole.clone() for _ in range(size)])
    dim, parts = split
    pieces = whole.chunk(parts * size, dim)
    return local_tensor([torch.cat(pieces[rank::size], dim) for rank in range(size)])


def as_held(own: Sequence[Tensor]) -> Any:
    """Each rank's own tensor, in float64, as all ranks hold it."""
    tensors = [one.double() if one.is_floating_point() else one for one in own]
    return tensors[0] if len(tensors) == 1 else local_tensor(tensors)


def local_tensor(slices: Sequence[Tensor]) -> Any:
    return import_module("torch.distributed._local_tensor").LocalTensor(dict(enumerate(slices)))


def whole(tensor: Any, split: Split) -> Tensor:
    """`spread` undone."""
    return joined(list(tensor._local_tensors.values()) if hasattr(tensor, "_local_tensors") else [tensor], split)


def joined(slices: Sequence[Tensor], split: Split) -> Tensor:
    """The whole of the ranks' slices; copies must be equal."""
    if split is None:
        assert all(torch.equal(one, slices[0]) for one in slices), "copies differ between ranks"
        return slices[0]
    dim, parts = split
    stacked = zip(*(one.chunk(parts, dim) for one in slices), strict=True)
    return torch.cat([torch.cat(same_part, dim) for same_part in stacked], dim)
