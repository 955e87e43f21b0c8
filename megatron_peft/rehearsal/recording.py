"""Records what a rank computes, sends and holds: modes that see every operation, on fake tensors and on real ones.

The same modes watch a rehearsed rank and a real one, so that tests can compare the two.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from megatron_peft.config import require
from megatron_peft.rehearsal.record import (
    MESSAGES,
    Call,
    Computation,
    EarlyUse,
    Entry,
    Mark,
    Memory,
    Phase,
    Product,
    Wait,
)
from megatron_peft.runtime.fake_ranks import Mode

# Groups of megatron-core that a dense model uses -> their names in a `Call`. Others are never called.
_GROUPS = {
    "tensor": "_TENSOR_MODEL_PARALLEL_GROUP",
    "pipeline": "_PIPELINE_MODEL_PARALLEL_GROUP",
    "data": "_DATA_PARALLEL_GROUP",
    "data with context": "_DATA_PARALLEL_GROUP_WITH_CP",
    "data of an optimizer instance": "_INTRA_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP",
    "optimizer instance": "_INTRA_DISTRIBUTED_OPTIMIZER_INSTANCE_GROUP",
    "model": "_MODEL_PARALLEL_GROUP",
    "tensor and data": "_TENSOR_AND_DATA_PARALLEL_GROUP",
    "tensor and data with context": "_TENSOR_AND_DATA_PARALLEL_GROUP_WITH_CP",
    "embedding": "_EMBEDDING_GROUP",
    "position embedding": "_POSITION_EMBEDDING_GROUP",
}


def group_names() -> Mapping[str, str]:
    """torch's name of each process group that this rank is in -> ours."""
    groups = {name: getattr(parallel_state, variable) for name, variable in _GROUPS.items()}
    found = {group.group_name: name for name, group in reversed(groups.items()) if isinstance(group, dist.ProcessGroup)}
    return {**found, dist.group.WORLD.group_name: "world"}  # pyright: ignore[reportOptionalMemberAccess]


# Operations of torch.distributed -> (ours, the argument that holds what this rank puts in, the one that names a peer).
_OPERATIONS = {
    "allreduce_": ("all_reduce", "tensors", None),
    "allreduce_coalesced_": ("all_reduce", "tensors", None),
    "allgather_": ("all_gather", "input_tensors", None),
    "_allgather_base_": ("all_gather", "input_tensor", None),
    "allgather_into_tensor_coalesced_": ("all_gather", "inputs", None),
    "reduce_scatter_": ("reduce_scatter", "input_tensors", None),
    "_reduce_scatter_base_": ("reduce_scatter", "input_tensor", None),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", "inputs", None),
    "broadcast_": ("broadcast", "tensors", "root_rank"),
    "reduce_": ("reduce", "tensors", "root_rank"),
    "alltoall_base_": ("all_to_all", "input", None),
    "alltoall_": ("all_to_all", "input_tensors", None),
    "barrier": ("barrier", None, None),
    "send": ("send", "tensors", "dst"),
    "recv_": ("recv", "tensors", "src"),
}
_DEVICE = torch.ops.prim.device.default


class Recorder(Mode):
    """The entries of a rank, while it is entered.

    Args:
        groups: as `group_names` gives them.
        keeps_work: record computation too; otherwise calls alone, and where what one has not finished is used.
        fuses_sums: on a GPU, products that give a weight's gradient add it to the sum over microbatches themselves.
    """

    def __init__(self, groups: Mapping[str, str], keeps_work: bool = True, fuses_sums: bool = False) -> None:
        super().__init__()
        self.groups, self.keeps_work, self.fuses_sums = groups, keeps_work, fuses_sums
        self._batch: int | None = None
        self._num_batches = 0
        self.clear()

    def clear(self) -> None:
        """Forget what was recorded."""
        self._entries: list[Entry] = []
        self._num_calls = 0
        self._under_way: dict[int, list[Tensor]] = {}  # by number of the call: what it writes
        self._last_product: int | None = None  # the storage that it has written
        self._start_work()

    def _start_work(self) -> None:
        self._products: Counter[Product] = Counter()
        self._num_bytes = self._num_kernels = 0

    def mark(self, phase: Phase, microbatch: int | None = None, chunk: int = 0) -> None:
        """What follows belongs to this phase."""
        self._add(Mark(phase, microbatch, chunk))

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Messages posted meanwhile are one batch."""
        self._batch, self._num_batches = self._num_batches, self._num_batches + 1
        try:
            yield
        finally:
            self._batch = None

    def one_kernel(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """Run what is one kernel on a GPU (`runtime/cpu_kernels.one_kernel_on_gpu`).

        It reads what it is given and writes what it returns; or it is a product in the type of its factors.
        """
        before = self._products, self._num_bytes, self._num_kernels
        self._start_work()
        result = function(*args)
        inside = self._products
        self._products, self._num_bytes, self._num_kernels = before
        self._num_kernels += 1
        if inside:  # a product of chunks of tokens, which are summed
            *_, factor = _tensors(args)
            [(batch, m, n)] = {(one.batch, one.m, one.n) for one in inside}
            k = sum(one.k * count for one, count in inside.items())
            self._products[Product("mm", batch, m, n, k, _dtype_name(factor.dtype))] += 1
        else:
            for tensors in (args, result):  # some of which may share their memory
                self._num_bytes += sum({_storage(one): _num_bytes(one) for one in _tensors(tensors)}.values())
        return result

    def entries(self, since: tuple[int, int] = (0, 0)) -> tuple[Entry, ...]:
        """In program order.

        Args:
            since: a `place`; waits then count the calls from there on, and none is for an earlier one.
        """
        self._flush_work()
        first, calls = since
        found = [replace(one, call=one.call - calls) if isinstance(one, Wait) else one for one in self._entries[first:]]
        assert all(one.call >= 0 for one in found if isinstance(one, Wait)), "waits for a call of another pass"
        return tuple(found)

    @property
    def place(self) -> tuple[int, int]:
        """Numbers of entries and of calls so far."""
        self._flush_work()
        return len(self._entries), self._num_calls

    def _add(self, entry: Entry) -> None:
        self._flush_work()
        self._entries.append(entry)

    def _flush_work(self) -> None:
        if self.keeps_work and self._num_kernels:
            self._entries.append(Computation(dict(self._products), self._num_bytes, self._num_kernels))
        self._start_work()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # two calls of three are this one, and other modes would pass it on
        if func.namespace in ("c10d", "_c10d_functional"):
            return self._call(func, args, kwargs or {})
        result = func(*args, **(kwargs or {}))
        if self.keeps_work:
            self._count(func, args, result)
        elif self._under_way and next(_written(_kind(func), args, result), None) is not None:  # else a view
            for tensor in (*_tensors(args), *_tensors(result)):
                self._look_for_early_use(tensor)
        return result

    def _look_for_early_use(self, tensor: Tensor) -> None:
        first, last = _extent(tensor)
        for number, written in [*self._under_way.items()]:
            for one in written:
                if _storage(one) == _storage(tensor):
                    begin, end = _extent(one)
                    if first < end and begin < last:
                        self._add(EarlyUse(number))
                        self._under_way.pop(number, None)

    def _call(self, func: Any, args: Any, kwargs: Any) -> Any:
        name = func.overloadpacket.__name__
        if name == "monitored_barrier_":
            return func(*args, **kwargs)
        require(
            name in _OPERATIONS,
            f"a rank calls {func.namespace}.{name}, an operation of torch.distributed that rehearsals do not know: use "
            f"one of {', '.join(sorted({operation for operation, *_ in _OPERATIONS.values()}))}, not functional ones.",
        )
        named = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)} | kwargs
        group = dist.ProcessGroup.unbox(named["process_group"])
        operation, put_in, other_side = _OPERATIONS[name]
        ranks = tuple(dist.get_process_group_ranks(group))
        tensors = [*_tensors(named[put_in])] if put_in else []
        peer = ranks[named[other_side]] if other_side else None
        result = func(*args, **kwargs)
        if len(ranks) == 1:
            return result
        call = Call(
            operation,
            self.groups.get(group.group_name, group.group_name),
            ranks,
            tuple(tuple(tensor.shape) for tensor in tensors),
            _dtype_name(tensors[0].dtype) if tensors else "uint8",
            peer,
            self._batch if operation in MESSAGES else None,
            is_async=True,
        )
        self._add(call)
        index = self._num_calls
        self._num_calls += 1
        if not self.keeps_work and name != "send" and peer != dist.get_rank():  # a source may read what it sends
            written = [value for key, value in named.items() if key.startswith("output") or key == "tensors"]
            self._under_way[index] = [*_tensors(written)]

        def waits() -> None:
            self._under_way.pop(index, None)
            self._flush_work()
            if self._entries and self._entries[-1] is call and call.batch is None:  # it is waited for at once
                self._entries[-1] = replace(call, is_async=False)
            else:
                self._entries.append(Wait(index))

        *outputs, work = result if isinstance(result, tuple) else (result,)
        handle = _Watched(operation, dist.Work.unbox(work), waits).boxed()  # pyright: ignore[reportAttributeAccessIssue]
        return (*outputs, handle) if outputs else handle

    def _count(self, func: Any, args: Any, result: Any) -> None:
        kind = _kind(func)
        outputs = list(_written(kind, args, result))
        if not outputs:
            return
        if self.fuses_sums and _adds_to_a_buffer(func, args) and _storage(args[1]) == self._last_product:
            return
        self._num_kernels += 1
        if kind.product is not None:
            self._products[kind.product(args)] += 1
            self._last_product = _storage(outputs[0])
        else:
            read = args if kind.reads is None else kind.reads(args, outputs)
            self._num_bytes += sum(map(_num_bytes, (*_tensors(read), *outputs)))


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _adds_to_a_buffer(func: Any, args: Any) -> bool:
    """Whether it adds a tensor to a part of a storage, as to that of all sums of gradients."""
    adds = func is torch.ops.aten.add_.Tensor and isinstance(args[1], Tensor)
    return adds and args[0].untyped_storage().nbytes() > args[0].nbytes


def _extent(tensor: Tensor) -> tuple[int, int]:
    """Where its elements begin and end in its storage, in bytes."""
    begin, size = tensor.storage_offset(), tensor.element_size()
    length = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return int(begin * size), int((begin + length * (tensor.numel() > 0)) * size)


class _Watched(dist.Work):
    """A handle that tells when it is waited for."""

    def __init__(self, operation: str, work: dist.Work, waits: Callable[[], None]) -> None:
        super().__init__()
        self.operation, self._work, self._waits = operation, work, waits
        _HANDLES.add(self)

    def wait(self, timeout: Any = None) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        if self in _HANDLES:
            _HANDLES.remove(self)
            self._waits()
        with _disable_current_modes():  # gloo's sums over ranks end with copies of its own here
            return self._work.wait()

    def is_completed(self) -> bool:
        return self._work.is_completed()


_HANDLES: set[Any] = set()  # C++ holds no reference to the Python half of a handle


def forget_sends() -> None:
    """Drop the handles of messages that a schedule has sent and not waited for, and with them what was sent."""
    _HANDLES.difference_update([one for one in _HANDLES if one.operation == "send"])


def _tensors(values: Any) -> Iterator[Tensor]:
    """Those in an operation's arguments, which may be lists of them."""
    for value in values if isinstance(values, tuple | list) else (values,):
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# What kind of operation it is, found once for each.

_LAUNCH_NOTHING = set(
    "empty empty_like empty_strided new_empty new_empty_strided _unsafe_view "
    "_local_scalar_dense lift_fresh resize_ set_".split()
)

_READS: Mapping[str, Callable[[Sequence[Any], Sequence[Tensor]], Sequence[Any]]] = {
    **dict.fromkeys(("copy_", "fill_", "zero_"), lambda args, _: args[1:]),  # the first is only written
    "embedding": lambda args, outputs: (args[1], *outputs),  # rows of the table
}


@dataclass(frozen=True)
class _Kind:
    """Args:
    product: from an operation's arguments to the product that it computes.
    returns_new: which of its results are new tensors, or those changed in place; views are not.
    changes: which of its arguments it changes, where it returns nothing.
    reads: from its arguments and results to tensors of the size of what it reads, where that is not its arguments.
    """

    product: Callable[[Sequence[Any]], Product] | None
    returns_new: tuple[bool, ...]
    changes: tuple[int, ...]
    reads: Callable[[Sequence[Any], Sequence[Tensor]], Sequence[Any]] | None


@cache
def _kind(func: Any) -> _Kind:
    schema, name = func._schema, func.overloadpacket.__name__
    aliases = [returned.alias_info for returned in schema.returns]
    new = tuple(name not in _LAUNCH_NOTHING and (alias is None or alias.is_write) for alias in aliases)
    changed = [i for i, one in enumerate(schema.arguments) if one.alias_info is not None and one.alias_info.is_write]
    return _Kind(_PRODUCTS.get(name), new, () if aliases else tuple(changed), _READS.get(name))


def _written(kind: _Kind, args: Sequence[Any], result: Any) -> Iterator[Tensor]:
    """The tensors that an operation writes."""
    results = result if len(kind.returns_new) > 1 else (result,)
    for one, is_new in zip(results, kind.returns_new, strict=False):
        if is_new:
            yield from _tensors(one)
    for index in kind.changes:
        yield from _tensors(args[index])


def _num_bytes(tensor: Tensor) -> int:
    """Of its memory, where an expanded dimension counts once."""
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return prod(sizes) * tensor.element_size()


def _matrices(a: Tensor, b: Tensor) -> Product:
    """[..., m, k] [..., k, n]"""
    return Product("mm", prod(a.shape[:-2]), a.shape[-2], b.shape[-1], a.shape[-1], _dtype_name(a.dtype))


def _linear(x: Tensor, weight: Tensor) -> Product:
    """[..., k], [n, k]"""
    k = x.shape[-1]
    return Product("mm", 1, x.numel() // k, weight.shape[0], k, _dtype_name(x.dtype))


def _attention(kind: Any, query: Tensor, key: Tensor) -> Product:
    """[b, n, m, k], [b, g, n, k]"""
    batch, heads, m, k = query.shape
    return Product(kind, batch * heads, m, key.shape[2], k, _dtype_name(query.dtype))


_ATTENTION = [
    f"_scaled_dot_product_{name}"
    for name in ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")
]
_PRODUCTS: Mapping[str, Callable[[Sequence[Any]], Product]] = {
    **{name: lambda args: _matrices(args[0], args[1]) for name in ("mm", "bmm")},
    **{name: lambda args: _matrices(args[1], args[2]) for name in ("addmm", "addmm_", "baddbmm", "baddbmm_")},
    "_linear_pointwise": lambda args: _linear(args[0], args[1]),  # oneDNN's
    **{name: lambda args: _attention("attention", args[0], args[1]) for name in _ATTENTION},
    **{f"{name}_backward": lambda args: _attention("attention backward", args[1], args[2]) for name in _ATTENTION},
}


# Memory: the storages that are alive, in parts.

_LAYER_KINDS = {
    "embedding": "embedding",
    **dict.fromkeys(("input_layernorm", "pre_mlp_layernorm", "final_layernorm"), "norms"),
    **{name: name for name in ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")},
    "self_attention": "attention",
    "core_attention": "core attention",
    "mlp": "MLP",  # its activation function
    "layers": "residuals",
    "output_layer": "logits and loss",
}
_OUTSIDE_LAYERS: Mapping[str | None, str] = {"forward": "logits and loss", "schedule": "messages"}


@dataclass(slots=True, eq=False)
class _Storage:
    """A storage that is alive, and what tells of its end."""

    num_bytes: int = 0
    part: str = "temporary"
    ended: Any = None


class LiveMemory(Mode):
    """Bytes of all live storages, and of each part at the moment of their peak, while it is entered.

    A storage is "temporary" until the call of the module that made it ends; then it is one of the activations of that
    kind of layer. `assign` says what the others are.

    Attributes:
        total: bytes now.
        highest: bytes at the peak.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phase: str | None = None
        self._live: dict[int, _Storage] = {}
        self._parts: Counter[str] = Counter()
        self.total = 0
        self._kinds: dict[nn.Module, str] = {}
        self._calls: list[tuple[str | None, list[_Storage]]] = []
        self.start_peak()

    def start_peak(self) -> None:
        """Look for a peak from here on."""
        self.highest, self._at_peak = self.total, dict(self._parts)

    def peak(self, assigned_since: bool = False) -> Memory:
        """Bytes of each part at the peak.

        Args:
            assigned_since: of each part as it is now, what has gone since as temporary: only now is it known what the
                tensors are.
        """
        parts = Counter(self._parts if assigned_since else self._at_peak)
        if assigned_since:
            parts["temporary"] += self.highest - self.total
        return {part: num_bytes for part, num_bytes in sorted(parts.items()) if num_bytes}

    def name_modules(self, chunks: Iterable[nn.Module]) -> None:
        """Learn the kinds of layers, by the names of modules."""
        for chunk in chunks:
            for name, module in chunk.named_modules():
                known = [_LAYER_KINDS[one] for one in name.split(".") if one in _LAYER_KINDS]
                self._kinds[module] = known[-1] if known else "logits and loss"

    def assign(self, part: str, tensors: Iterable[Tensor]) -> None:
        """The tensors' storages belong to this part."""
        for tensor in tensors:
            self._move(self._seen(tensor), part)

    def resized(self, storage: torch.UntypedStorage) -> None:
        """A storage's size has changed, which no operation tells."""
        if storage._cdata in self._live:
            self._resize(self._live[storage._cdata], storage.nbytes())

    @contextmanager
    def watch_modules(self) -> Iterator[None]:
        """Learn which module is running."""
        hooks = nn.modules.module
        with (
            hooks.register_module_forward_pre_hook(self._begin_call),
            hooks.register_module_forward_hook(self._end_call, always_call=True),
        ):
            yield

    def _begin_call(self, module: nn.Module, inputs: Any) -> None:
        outer = self._calls[-1][0] if self._calls else None
        self._calls.append((self._kinds.get(module, outer), []))

    def _end_call(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if not self._calls:
            return
        kind, made = self._calls.pop()
        if kind is not None:
            for storage in made:
                if storage.part == "temporary":
                    self._move(storage, f"activations of {kind}")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in (*_tensors(args), *_tensors(result)):
            self._seen(tensor)
        if self.total > self.highest:
            self.highest, self._at_peak = self.total, dict(self._parts)
        return result

    def _seen(self, tensor: Tensor) -> _Storage:
        storage = tensor.untyped_storage()
        key, num_bytes = storage._cdata, storage.nbytes()
        known = self._live.get(key)
        if known is None:
            known = self._live[key] = _Storage()
            known.ended = weakref.ref(storage, lambda _: self._resize(self._live.pop(key), 0))
            if self._calls:
                self._calls[-1][1].append(known)
            elif self.phase in _OUTSIDE_LAYERS:
                known.part = f"activations of {_OUTSIDE_LAYERS[self.phase]}"
        if num_bytes != known.num_bytes:
            self._resize(known, num_bytes)
        return known

    def _resize(self, storage: _Storage, num_bytes: int) -> None:
        self._parts[storage.part] += num_bytes - storage.num_bytes
        self.total += num_bytes - storage.num_bytes
        storage.num_bytes = num_bytes

    def _move(self, storage: _Storage, part: str) -> None:
        self._parts[storage.part] -= storage.num_bytes
        self._parts[part] += storage.num_bytes
        storage.part = part
