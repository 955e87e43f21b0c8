"""Records what a rank computes, sends and holds: a mode that sees every operation, on fake tensors and on real ones.

The same mode watches a rehearsed rank and a real one, so that tests can compare the two.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._prims_common import compute_required_storage_length
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from megatron_peft.config import require
from megatron_peft.rehearsal import program
from megatron_peft.rehearsal.program import MESSAGES, Call, Computation, EarlyUse, Entry, Mark, Product, Wait
from megatron_peft.runtime.fake_ranks import Mode, replaced

# megatron-core's groups that a dense model uses, and torch's of all ranks -> their names in a `Call`.
_AXES = {
    "TENSOR_MODEL_PARALLEL_GROUP": "tensor",
    "PIPELINE_MODEL_PARALLEL_GROUP": "pipeline",
    "DATA_PARALLEL_GROUP": "data",
    "DATA_PARALLEL_GROUP_WITH_CP": "data with context",
    "INTRA_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP": "data of an optimizer instance",
    "INTRA_DISTRIBUTED_OPTIMIZER_INSTANCE_GROUP": "optimizer instance",
    "MODEL_PARALLEL_GROUP": "model",
    "TENSOR_AND_DATA_PARALLEL_GROUP": "tensor and data",
    "TENSOR_AND_DATA_PARALLEL_GROUP_WITH_CP": "tensor and data with context",
    "EMBEDDING_GROUP": "embedding",
    "POSITION_EMBEDDING_GROUP": "position embedding",
    "default_pg": "world",
}
# Operations of torch.distributed -> ours.
_OPERATIONS = {
    **dict.fromkeys(("allreduce_", "allreduce_coalesced_"), "all_reduce"),
    **dict.fromkeys(("allgather_", "_allgather_base_", "allgather_into_tensor_coalesced_"), "all_gather"),
    **dict.fromkeys(("reduce_scatter_", "_reduce_scatter_base_", "reduce_scatter_tensor_coalesced_"), "reduce_scatter"),
    **dict.fromkeys(("alltoall_base_", "alltoall_"), "all_to_all"),
    **{name: name.rstrip("_") for name in ("broadcast_", "reduce_", "barrier", "send", "recv_")},
}
_DEVICE = torch.ops.prim.device.default


class Recorder(Mode):
    """The entries of a rank, and the memory that it holds, while it is entered.

    Unless it `keeps_work` they are calls alone, and where what one has not finished is used. It `fuses_sums` where on a
    GPU products that give a weight's gradient add it to the sum over microbatches themselves.
    """

    def __init__(self, keeps_work: bool = True, fuses_sums: bool = False) -> None:
        super().__init__()
        self.keeps_work, self.fuses_sums = keeps_work, fuses_sums
        self.memory = LiveMemory()
        self._batch: int | None = None
        self._num_batches = 0
        self._entries: list[Entry] = []
        self._num_calls = 0
        self._under_way: dict[int, _Handle] = {}  # by number of the call
        # Since the last entry: products, bytes of others, and what is put again.
        self._kernels: list[Product | int | Computation] = []
        self._last_product: Callable[[], Any] = lambda: None  # the storage that it has written, while that lives

    def mark(self, phase: program.Phase, microbatch: int | None = None, chunk: int = 0) -> None:
        self.memory.phase = phase
        self._add(Mark(phase, microbatch, chunk))

    def batch(self) -> AbstractContextManager[None]:
        """Messages posted meanwhile are one batch."""
        self._num_batches += 1
        return replaced(self, "_batch", self._num_batches - 1)

    def one_kernel(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """Run what is one kernel on a GPU (`runtime/cpu_kernels.one_kernel_on_gpu`).

        It reads what it is given and writes what it returns; or it is a product in the type of its factors.
        """
        before, self._kernels = self._kernels, []
        result = function(*args)
        inside, self._kernels = [kernel for kernel in self._kernels if isinstance(kernel, Product)], before
        if inside:  # a product of chunks of tokens, which are summed
            *_, factor = _tensors(args)
            [(batch, m, n)] = {(product.batch, product.m, product.n) for product in inside}
            k = sum(product.k for product in inside)
            self._kernels.append(Product("mm", batch, m, n, k, _dtype_name(factor.dtype)))
        else:
            sizes = ({_storage(tensor): _num_bytes(tensor) for tensor in _tensors(some)} for some in (args, result))
            self._kernels.append(sum(sum(by_storage.values()) for by_storage in sizes))  # some share their memory
        return result

    def once_a_shape(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """`function`, which runs for new shapes alone of tensors without numbers; for others its record is put again.

        It returns a new tensor, leaves no other one behind, and waits for its collectives.
        """
        known: dict[tuple[Any, ...], tuple[Any, torch.dtype, Sequence[Entry], Mapping[str, int]]] = {}

        def run(*args: Any) -> Tensor:
            if not any(isinstance(value, FakeTensor) for value in args):
                return function(*args)
            key = tuple(value.shape if isinstance(value, Tensor) else value for value in args)
            if key in known:
                shape, dtype, entries, rise = known[key]
                self.memory.rise(rise)
                self._num_calls += sum(isinstance(entry, Call) for entry in entries)
                result = torch.empty(shape, dtype=dtype)
            else:
                with replaced(self, "_entries", []), replaced(self, "_kernels", []), self.memory.own_rise() as rise:
                    result = function(*args)
                    entries = self.entries()
                known[key] = result.shape, result.dtype, entries, rise
            for entry in entries:
                assert isinstance(entry, Computation) or (isinstance(entry, Call) and not entry.is_async), entry
                self._kernels.append(entry) if isinstance(entry, Computation) else self._add(entry)
            return result

        return run

    def entries(self, since: int = 0) -> tuple[Entry, ...]:
        """What was recorded from this `place` on, in program order."""
        self._flush_work()
        return tuple(self._entries[since:])

    @property
    def place(self) -> int:
        """Number of entries so far."""
        self._flush_work()
        return len(self._entries)

    def forget_sends(self) -> None:
        # What a schedule has sent and not waited for.
        self._under_way = {number: handle for number, handle in self._under_way.items() if handle.operation != "send"}

    def _add(self, entry: Entry) -> None:
        self._flush_work()
        self._entries.append(entry)

    def _flush_work(self) -> None:
        if self._kernels:
            known = [kernel for kernel in self._kernels if isinstance(kernel, Computation)]
            products = Counter(kernel for kernel in self._kernels if isinstance(kernel, Product))
            num_bytes = sum(n for n in self._kernels if isinstance(n, int)) + sum(work.num_bytes for work in known)
            num_kernels = len(self._kernels) - len(known) + sum(work.num_kernels for work in known)
            for work in known:
                products.update(work.products)
            self._entries.append(Computation(dict(products), num_bytes, num_kernels))
        self._kernels = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # two calls of three are this one, and other modes would pass it on
        if func.namespace in ("c10d", "_c10d_functional"):
            return self._call(func, args, kwargs or {})
        result = func(*args, **(kwargs or {}))
        if self.keeps_work:
            self._count(func, args, result)
            self.memory.see(args, result)
        elif self._under_way and _written(func, args, result):  # else a view
            used = [*_tensors(args), *_tensors(result)]
            for number, handle in self._under_way.items():
                if any(_overlap(written, tensor) for written in handle.writes for tensor in used):
                    self._add(EarlyUse(number))
                    handle.writes = ()
        return result

    def _call(self, func: Any, args: Any, kwargs: Any) -> Any:
        name = func.overloadpacket.__name__
        if name == "monitored_barrier_":
            return func(*args, **kwargs)
        require(
            name in _OPERATIONS,
            f"a rank calls {func.namespace}.{name}, an operation of torch.distributed that rehearsals do not know: use "
            f"one of {', '.join(sorted({*_OPERATIONS.values()}))}, not functional ones.",
        )
        named = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)} | kwargs
        operation, group = _OPERATIONS[name], dist.ProcessGroup.unbox(named["process_group"])
        ranks = tuple(dist.get_process_group_ranks(group))
        inputs = [value for key, value in named.items() if key.startswith("input")]
        tensors = [*_tensors(inputs or named.get("tensors"))]
        is_mixed = len({tensor.dtype for tensor in tensors}) > 1  # coalesced, of several types: bytes are recorded
        [*peers] = (ranks[named[key]] for key in ("root_rank", "dst", "src") if key in named)
        result = func(*args, **kwargs)
        if self.keeps_work:
            self.memory.see(args, result)
        if len(ranks) == 1:
            return result
        number, self._num_calls = self._num_calls, self._num_calls + 1
        call = Call(
            operation,
            _AXES.get(group.group_desc, group.group_name),
            ranks,
            tuple((tensor.nbytes,) if is_mixed else tuple(tensor.shape) for tensor in tensors),
            _dtype_name(tensors[0].dtype) if tensors and not is_mixed else "uint8",
            peers[0] if peers else None,
            self._batch if operation in MESSAGES else None,
            handle=number,
        )
        self._add(call)
        *outputs, work = result if isinstance(result, tuple) else (result,)
        handle = _Handle(operation, dist.Work.unbox(work), lambda: self._waited_for(number, call))
        if not self.keeps_work and name != "send" and call.peer != dist.get_rank():  # a source may read what it sends
            written = [value for key, value in named.items() if key.startswith(("output", "tensors"))]
            handle.writes = [*_tensors(written)]
        self._under_way[number] = handle
        boxed = handle.boxed()  # pyright: ignore[reportAttributeAccessIssue]
        return (*outputs, boxed) if outputs else boxed

    def _waited_for(self, number: int, call: Call) -> None:
        if self._under_way.pop(number, None) is None:
            return
        self._flush_work()
        if self._entries and self._entries[-1] is call and call.batch is None:  # it is waited for at once
            self._entries[-1] = replace(call, handle=None)
        else:
            self._entries.append(Wait(number))

    def _count(self, func: Any, args: Any, result: Any) -> None:
        outputs, name = _written(func, args, result), func.overloadpacket.__name__
        if not outputs:
            return
        if self.fuses_sums and func is torch.ops.aten.add_.Tensor and isinstance(args[1], Tensor):
            is_part = args[0].untyped_storage().nbytes() > args[0].nbytes  # as of the buffer of all sums of gradients
            if is_part and args[1].untyped_storage() is self._last_product():
                return
        if name in _PRODUCTS:
            self._kernels.append(_product(name, args))
            self._last_product = weakref.ref(outputs[0].untyped_storage())
            return
        read = args
        if name in ("copy_", "fill_", "zero_"):  # the first is only written
            read = args[1:]
        elif name == "embedding":  # rows of the table
            read = args[1], *outputs
        self._kernels.append(sum(map(_num_bytes, (*_tensors(read), *outputs))))


class _Handle(dist.Work):
    """What a call gives, which tells when it is waited for. The recorder keeps it until then: C++ does not."""

    writes: Sequence[Tensor] = ()  # what must not be used before

    def __init__(self, operation: str, work: dist.Work, waits: Callable[[], None]) -> None:
        super().__init__()
        self.operation, self._work, self._waits = operation, work, waits

    def wait(self, timeout: Any = None) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        self._waits()
        with _disable_current_modes():  # gloo's sums over ranks end with copies of its own here
            return self._work.wait()


# What an operation reads and writes.

_LAUNCH_NOTHING = set("empty empty_like empty_strided new_empty new_empty_strided _unsafe_view".split())
_LAUNCH_NOTHING |= {"_local_scalar_dense", "lift_fresh", "resize_", "set_"}


@cache
def _writes(func: Any) -> tuple[Sequence[bool], Sequence[int]]:
    """Which results are new tensors, or those changed in place; which arguments it changes, if it returns nothing."""
    schema, name = func._schema, func.overloadpacket.__name__
    aliases = [returned.alias_info for returned in schema.returns]
    new = [name not in _LAUNCH_NOTHING and (alias is None or alias.is_write) for alias in aliases]
    changed = [i for i, arg in enumerate(schema.arguments) if arg.alias_info is not None and arg.alias_info.is_write]
    return new, [] if aliases else changed


def _written(func: Any, args: Sequence[Any], result: Any) -> list[Tensor]:
    """The tensors that an operation writes. Of a view there are none."""
    new, changed = _writes(func)
    results = result if len(new) > 1 else (result,)
    return [
        *_tensors([value for value, is_new in zip(results, new, strict=False) if is_new]),
        *_tensors([args[index] for index in changed]),
    ]


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values if isinstance(values, tuple | list) else (values,):
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _num_bytes(tensor: Tensor) -> int:
    """Its memory, where an expanded dimension counts once."""
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return prod(sizes) * tensor.element_size()


def _overlap(tensor: Tensor, other: Tensor) -> bool:
    """Whether they lie in parts of a storage that have bytes in common."""
    (begin, end), (first, last) = _extent(tensor), _extent(other)
    return _storage(tensor) == _storage(other) and first < end and begin < last


def _extent(tensor: Tensor) -> tuple[int, int]:  # of its elements in its storage, in bytes
    begin, size = int(tensor.storage_offset()), tensor.element_size()
    return begin * size, compute_required_storage_length(tensor.shape, tensor.stride(), begin) * size


_LINEAR = "_linear_pointwise"  # oneDNN's
_ATTENTION = [
    f"_scaled_dot_product_{name}"
    for name in ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")
]
# Operation -> (`Product.kind`, which argument is the first factor; the second factor follows).
_PRODUCTS: Mapping[str, tuple[Any, int]] = {
    **dict.fromkeys(("mm", "bmm", _LINEAR), ("mm", 0)),
    **dict.fromkeys(("addmm", "addmm_", "baddbmm", "baddbmm_"), ("mm", 1)),
    **dict.fromkeys(_ATTENTION, ("attention", 0)),
    **dict.fromkeys((f"{name}_backward" for name in _ATTENTION), ("attention backward", 1)),
}


def _product(name: str, args: Sequence[Any]) -> Product:
    """Factors are [..., m, k], [..., k, n]; queries, keys [b, heads, m, k], [b, g, n, k]; x [..., k], W [n, k]."""
    kind, first = _PRODUCTS[name]
    a, b = args[first : first + 2]
    k, is_transposed = a.shape[-1], kind != "mm" or name == _LINEAR
    batch, m = (1, a.numel() // k) if name == _LINEAR else (prod(a.shape[:-2]), a.shape[-2])
    return Product(kind, batch, m, b.shape[-2 if is_transposed else -1], k, _dtype_name(a.dtype))


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
    num_bytes: int = 0
    part: str = "temporary"
    ended: Any = None  # what tells of its end


class LiveMemory:
    """Bytes of all live storages, and of each part at the moment of their peak.

    A storage is "temporary" until the call of the module that made it ends; then it is one of the activations of that
    kind of layer. `assign` says what the others are. `total` are bytes now, `highest` those at the peak.
    """

    def __init__(self) -> None:
        self.phase: str | None = None
        self._live: dict[int, _Storage] = {}
        self._parts: Counter[str] = Counter()
        self.total = 0
        self._kinds: dict[nn.Module, str] = {}
        self._calls: list[tuple[str | None, list[_Storage]]] = []
        self.start_peak()

    def start_peak(self) -> None:
        self.highest, self._at_peak = self.total, dict(self._parts)

    @contextmanager
    def own_rise(self) -> Iterator[Counter[str]]:
        """The growth of each part until the highest moment meanwhile; it is known at the end."""
        begin, highest, at_peak, rise = Counter(self._parts), self.highest, self._at_peak, Counter[str]()
        self.start_peak()
        yield rise
        rise.update(self._at_peak)
        rise.subtract(begin)
        if highest >= self.highest:
            self.highest, self._at_peak = highest, at_peak

    def rise(self, by: Mapping[str, int]) -> None:
        """So much more of each part is held for a moment."""
        parts = Counter(self._parts)
        parts.update(by)
        if parts.total() > self.highest:
            self.highest, self._at_peak = parts.total(), dict(parts)

    def peak(self, assigned_since: bool = False) -> program.Memory:
        """Bytes of each part at the peak; of parts assigned since as they are now, what has gone being temporary."""
        parts = Counter(self._parts if assigned_since else self._at_peak)
        parts["temporary"] += self.highest - parts.total()
        return {part: num_bytes for part, num_bytes in sorted(parts.items()) if num_bytes}

    def name_modules(self, chunks: Iterable[nn.Module]) -> None:
        for chunk in chunks:
            for name, module in chunk.named_modules():
                known = [_LAYER_KINDS[part] for part in name.split(".") if part in _LAYER_KINDS]
                self._kinds[module] = known[-1] if known else "logits and loss"

    def assign(self, part: str, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            storage = self._seen(tensor)
            self._change(storage, storage.num_bytes, part)

    def resized(self, storage: torch.UntypedStorage) -> None:
        """A storage's size has changed, which no operation tells."""
        if storage._cdata in self._live:
            self._change(self._live[storage._cdata], storage.nbytes())

    # Hooks of all modules: what is made between them belongs to the module.

    def begin_call(self, module: nn.Module, inputs: Any) -> None:
        outer = self._calls[-1][0] if self._calls else None
        self._calls.append((self._kinds.get(module, outer), []))

    def end_call(self, module: nn.Module, inputs: Any, output: Any) -> None:
        kind, made = self._calls.pop() if self._calls else (None, [])
        for storage in made if kind is not None else ():
            if storage.part == "temporary":
                self._change(storage, storage.num_bytes, f"activations of {kind}")

    def see(self, args: Any, result: Any) -> None:
        for tensor in (*_tensors(args), *_tensors(result)):
            self._seen(tensor)
        if self.total > self.highest:
            self.highest, self._at_peak = self.total, dict(self._parts)

    def _seen(self, tensor: Tensor) -> _Storage:
        storage = tensor.untyped_storage()
        # A quantized weight's parameter has no memory of its own.
        key, num_bytes = storage._cdata, 0 if tensor.device.type == "meta" else storage.nbytes()
        known = self._live.get(key)
        if known is None:
            known = self._live[key] = _Storage()
            known.ended = weakref.ref(storage, lambda _: self._change(self._live.pop(key), 0))
            if self._calls:
                self._calls[-1][1].append(known)
            elif self.phase in _OUTSIDE_LAYERS:
                known.part = f"activations of {_OUTSIDE_LAYERS[self.phase]}"
        if num_bytes != known.num_bytes:
            self._change(known, num_bytes)
        return known

    def _change(self, storage: _Storage, num_bytes: int, part: str | None = None) -> None:
        self._parts[storage.part] -= storage.num_bytes
        storage.part = part or storage.part
        self._parts[storage.part] += num_bytes
        self.total += num_bytes - storage.num_bytes
        storage.num_bytes = num_bytes
