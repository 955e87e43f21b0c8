"""Adapted layers on 8 and 16 tensor-parallel ranks equal the same layers on one, in float64 and in one process.

torch's LocalTensorMode runs every rank's program at once: a LocalTensor holds each rank's slice, an operation is done
on all slices, and a collective is the sum or the concatenation that it stands for. The process groups are fake.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from importlib import import_module
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_peft.adapters import low_rank, urnn
from megatron_peft.adapters.boft import ProjectedBoft
from megatron_peft.adapters.linear import AdaptedColumnParallelLinear, AdaptedRowParallelLinear
from megatron_peft.adapters.rotation import BlockRotation
from megatron_peft.config import PeftConfig
from megatron_peft.parallel.collectives import sum_partial_gradients_over_tensor_parallel
from megatron_peft.runtime import cpu
from tests.adapters.layer_runs import Split, draw, join, layer_config, split_of
from tests.one_rank import places

local = pytest.importorskip("torch.distributed._local_tensor", reason="this torch has no LocalTensorMode")

H, MOST_RANKS = 64, 16  # a rank has at least 4 features, one group of the rotations below

COLUMN, ROW = AdaptedColumnParallelLinear, AdaptedRowParallelLinear
KINDS: dict[str, tuple[Any, int, int, int, int]] = {  # layer, output features, input features, batch, parts
    "qkv": (COLUMN, 3 * H, H, 5, 1),  # more tokens than features: the weight turns
    "fc1": (COLUMN, 4 * H, H, 3, 2),  # fewer: the activations turn
    "proj": (ROW, H, H, 3, 1),
    "fc2": (ROW, H, 2 * H, 3, 1),
}
BOFT: dict[str, Any] = {"method": "boft", "boft_block_size": 2, "boft_factors": 2}
URNN: dict[str, Any] = {"method": "urnn", "urnn_block_size": 4}
HYBRID = BOFT | URNN | {"method": "hybrid", "lora_rank": 3, "hybrid_lambda": "fixed:0.3"}
METHODS: dict[str, dict[str, Any]] = {
    "frozen": {},
    "lora": {"method": "lora", "lora_rank": 3, "lora_dropout": 0.0},
    "lora-ga, start subtracted": {"method": "lora-ga", "lora_rank": 3, "lora_ga_init": "paper"},
    **{
        f"{name}, {side} side": {**settings, "rotation_side": side}
        for side in ("output", "input")
        for name, settings in {
            "boft": BOFT,
            "boft projection": {**BOFT, "boft_parametrization": "projection"},
            "urnn": URNN,
            "urnn by Fourier transforms": URNN,
            "urnn riemannian": {**URNN, "urnn_update": "riemannian"},
        }.items()
    },
    "urnn replace": {**URNN, "urnn_mode": "replace"},
    "urnn riemannian replace": {**URNN, "urnn_mode": "replace", "urnn_update": "riemannian"},
    "hybrid": HYBRID,
    "hybrid with urnn, start subtracted": {**HYBRID, "hybrid_rotation": "urnn", "lora_ga_init": "paper"},
}


def cases() -> Iterator[Any]:
    for method, settings in METHODS.items():
        only_square = settings.get("urnn_mode") == "replace"
        for kind in ("proj",) if only_square else KINDS:
            for size in (8, MOST_RANKS):
                is_quick = size == 8 and (kind in ("fc1", "fc2") or only_square)
                marks = [] if is_quick else [pytest.mark.slow]
                yield pytest.param(method, kind, size, marks=marks, id=f"{method}-{kind}-TP{size}")


@pytest.fixture(scope="module", autouse=True)
def groups() -> Iterator[dict[int, dist.ProcessGroup]]:
    """Of 1, 8 and 16 ranks, by size; this process is the first of each."""
    from torch.testing._internal.distributed import fake_pg  # noqa: F401  registers the backend

    cpu.install()
    dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=MOST_RANKS)
    yield {size: dist.new_group(list(range(size)), backend="fake") for size in (1, 8, MOST_RANKS)}
    dist.destroy_process_group()
    on_one_rank.cache_clear()


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["", "SP"])
@pytest.mark.parametrize(("method", "kind", "size"), cases())
def test_many_ranks_equal_one(groups, monkeypatch, method, kind, size, sequence_parallel):
    """Output, the input's gradient and, after the sum over the ranks, the gradient of every factor."""
    monkeypatch.setattr(urnn, "DENSE_UP_TO", 0 if "Fourier" in method else 512)
    length = 16 if sequence_parallel else 15  # what every rank sees whole need not divide by the ranks
    expected = on_one_rank(method, kind, groups[1], length)
    found = run(method, kind, groups[size], length, sequence_parallel)
    assert found.keys() == expected.keys()
    for name, whole in expected.items():
        largest = whole.abs().max()
        assert largest > 0, f"{name} is zero: it says nothing"
        error = (found[name] - whole).abs().max() / largest
        assert error < 1e-12, f"{name}: {error:.1e} of its largest number"


class _Skewed(torch.autograd.Function):
    """The same numbers, and the same gradient, in another order in memory."""

    @staticmethod
    def forward(ctx, x):  # type: ignore[override]
        return x.transpose(0, 1).contiguous().transpose(0, 1)

    backward = forward


@pytest.mark.parametrize("case", [("boft, input side", "fc1"), ("lora", "fc2")], ids=["gradient", "output"])
def test_what_is_not_contiguous_is_summed(groups, monkeypatch, case):
    """megatron-core's `_reduce` adds up a contiguous copy and gives back what it was given."""
    turn, plus = BlockRotation.rotated_by_transpose, low_rank.frozen_linear_plus_low_rank
    monkeypatch.setattr(BlockRotation, "rotated_by_transpose", lambda self, x: turn(self, _Skewed.apply(x)))
    monkeypatch.setattr(low_rank, "frozen_linear_plus_low_rank", lambda *args: _Skewed.apply(plus(*args)))
    test_many_ranks_equal_one(groups, monkeypatch, *case, 8, sequence_parallel=False)


@cache
def on_one_rank(method: str, kind: str, group: dist.ProcessGroup, length: int) -> dict[str, Tensor]:
    """Also the first to ask for the constants that adapters keep, which so belong to no rank."""
    return run(method, kind, group, length, sequence_parallel=False)


def run(method: str, kind: str, group: dist.ProcessGroup, length: int, sequence_parallel: bool) -> dict[str, Tensor]:
    """One forward, backward and sum of partial gradients; whole tensors by name."""
    (cls, out_features, in_features, batch, parts), size = KINDS[kind], group.size()
    layer = build(kind, group, sequence_parallel)
    if METHODS[method]:
        attach(layer, PeftConfig(**METHODS[method]), size)
    tokens, features = (0, 1) if sequence_parallel else None, (2, parts)
    of_x, of_y = (tokens, features) if cls is COLUMN else (features, tokens)
    x = spread(draw("x", length, batch, in_features), of_x, size).requires_grad_()
    dy = spread(draw("dy", length, batch, out_features), of_y, size)
    with all_ranks_at_once(size):
        y = layer(x)[0]
        y.backward(dy)
        for parameter in layer.parameters():
            parameter.main_grad = parameter.grad
        sum_partial_gradients_over_tensor_parallel([layer], group)
    trained = {name: parameter for name, parameter in layer.named_parameters() if parameter.requires_grad}
    gradients = {name: whole(parameter.main_grad, split_of(parameter)) for name, parameter in trained.items()}
    return {"y": whole(y.detach(), of_y), "dx": whole(x.grad, of_x), **gradients}


def build(kind: str, group: dist.ProcessGroup, sequence_parallel: bool) -> Any:
    """A frozen layer with all ranks' slices of its weight and bias."""
    cls, out_features, in_features, _, parts = KINDS[kind]
    special = {"stride": parts} if cls is COLUMN else {"input_is_parallel": True}
    layer = cls(
        in_features,
        out_features,
        config=layer_config(H, MOST_RANKS, group.size(), sequence_parallel),
        init_method=None,
        skip_bias_add=False,
        tp_comm_buffer_name=kind,
        tp_group=group,
        **special,
    )
    layer.is_frozen = True
    layer.requires_grad_(False)
    for name, shape in {"weight": (out_features, in_features), "bias": (out_features,)}.items():
        put(layer, name, draw(f"{kind}.{name}", *shape), group.size())
    return layer


def attach(layer: Any, peft: PeftConfig, size: int) -> None:
    """Give the layer its adapter, in float64 and moved away from the start; the ranks' starts are slices of one."""

    def made(group: Any) -> nn.Module:
        build = import_module(peft.spec.adapter).build
        return build(replace(layer.layout, group=group), peft, "layer.adapter", 3, torch.float64)

    alone, slices = made(places(1)[0]), [dict(made(place).named_parameters()) for place in places(size)]
    for name, parameter in alone.named_parameters():
        start = join([own[name].detach() for own in slices], split_of(slices[0][name]))
        assert torch.equal(start, parameter), f"{name} does not start as on one rank"
    move(alone.double())
    layer.adapter = made(layer.layout.group)
    for name, tensor in [*alone.named_parameters(), *alone.named_buffers()]:
        module, _, last = name.rpartition(".")
        put(layer.adapter.get_submodule(module), last, tensor.detach(), size)


@torch.no_grad()
def move(adapter: nn.Module) -> None:
    """Every parameter away from its start; rotations stay rotations."""
    for module in adapter.modules():
        if isinstance(module, low_rank.LowRank) and module.A0 is not None:
            module.start_at(draw("A0", *module.A.shape), draw("B0", *module.B.shape))
        if isinstance(module, urnn.RiemannianUrnn):
            module.move(module.U.clone(), draw("G", *module.U.shape), 0.2)
            continue
        for name, parameter in module.named_parameters(recurse=False):
            parameter += 0.3 * draw(name, *parameter.shape)
        if isinstance(module, ProjectedBoft):
            module.project()


class Mode(local.LocalTensorMode):
    """torch's takes the conjugate of a number, which backward asks for, for a new tensor on each rank."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.ops.aten._conj.default and isinstance(args[0], complex):
            return func(*args)
        return super().__torch_dispatch__(func, types, args, kwargs)


@contextmanager
def all_ranks_at_once(size: int) -> Iterator[None]:
    """Ranks ask their group which they are: it answers an integer of several values (by itself always 0)."""
    if size == 1:
        yield
        return
    rank = torch.SymInt(local.LocalIntNode({rank: rank for rank in range(size)}))
    with pytest.MonkeyPatch.context() as patch, Mode(size):
        patch.setattr(dist.ProcessGroup, "rank", lambda group: rank)
        yield


def put(module: nn.Module, name: str, tensor: Tensor, size: int) -> None:
    """All ranks' slices of a whole tensor in the place of a parameter or buffer, which says how it is split."""
    old = getattr(module, name)
    new = spread(tensor, split_of(old), size)
    new = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
    new.__dict__.update(vars(old))
    setattr(module, name, new)


def spread(whole: Tensor, split: Split, size: int) -> Tensor:
    """A whole tensor as all ranks hold it; as it is on one rank."""
    if size == 1:
        return whole
    if split is None:
        return local.LocalTensor({rank: whole.clone() for rank in range(size)})
    dim, parts = split
    pieces = whole.chunk(parts * size, dim)
    return local.LocalTensor({rank: torch.cat(pieces[rank::size], dim) for rank in range(size)})


def whole(tensor: Any, split: Split) -> Tensor:
    """`spread` undone."""
    return join(list(tensor._local_tensors.values()) if isinstance(tensor, local.LocalTensor) else [tensor], split)
