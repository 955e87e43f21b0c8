"""What a rehearsal finds of one rank: its computation and its calls in program order, its parameters, its peak memory.

Plain data without torch.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Literal

Phase = Literal["begin", "forward", "schedule", "backward", "finish", "update", "start", "step", "validation", "saving"]
PHASES = ("loading", "start", "step", "validation", "saving")  # of a run; "start" is LoRA-GA's

ITEM_BYTES = {
    "complex128": 16,
    **dict.fromkeys(("float64", "int64", "complex64"), 8),
    **dict.fromkeys(("float32", "int32"), 4),
    **dict.fromkeys(("bfloat16", "float16", "int16"), 2),
    **dict.fromkeys(("int8", "uint8", "bool"), 1),
}


@dataclass(frozen=True)
class Product:
    """`batch` products [m, k] [k, n]; or attention of `batch` heads, m queries by n keys, with heads of k features.

    Attention counts whole squares, both products: a causal mask halves what is computed of it.
    """

    kind: Literal["mm", "attention", "attention backward"]
    batch: int
    m: int
    n: int
    k: int
    dtype: str

    @property
    def flops(self) -> int:
        """2 for each multiply and add; attention has two products, and five in backward (scores are recomputed)."""
        num_products = {"mm": 1, "attention": 2, "attention backward": 5}[self.kind]
        num_real = 4 if self.dtype.startswith("complex") else 1  # products
        return 2 * num_products * num_real * self.batch * self.m * self.n * self.k

    @property
    def num_bytes(self) -> int:
        """Both factors and the result, once each; of attention queries, keys, values and the result."""
        if self.kind == "mm":
            return self.batch * (self.m * self.k + self.k * self.n + self.m * self.n) * ITEM_BYTES[self.dtype]
        times = 1 if self.kind == "attention" else 2
        return times * self.batch * 2 * (self.m + self.n) * self.k * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Computation:
    """What a rank computes between two calls."""

    products: Mapping[Product, int] = field(default_factory=dict)  # how often each was computed
    num_bytes: int = 0  # read and written by all other operations
    num_kernels: int = 0  # operations launched, products among them


@dataclass(frozen=True)
class Call:
    """A collective or a message."""

    operation: str  # "all_reduce", "all_gather", "reduce_scatter", "broadcast", "all_to_all", "barrier", "send", "recv"
    axis: str  # the process group, as "tensor", "data", "pipeline", "world": two groups may have the same ranks
    group: tuple[int, ...]  # its global ranks, in its order
    # Of the tensors that this rank puts in (of a "recv": that it gets); several if they are coalesced. Of "all_gather"
    # the own shard, of "reduce_scatter" all shards.
    shapes: tuple[tuple[int, ...], ...]
    dtype: str
    peer: int | None = None  # global rank of the other side of a message, or the source of a broadcast
    batch: int | None = None  # messages with the same number are posted together, and waited for together
    # Of an asynchronous call; a `Wait` for it says where it is waited for. Calls that follow one another may have the
    # same. None: it is waited for at once.
    handle: int | str | None = None

    @property
    def is_async(self) -> bool:
        return self.handle is not None

    @property
    def num_bytes(self) -> int:
        return sum(prod(shape) for shape in self.shapes) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Wait:
    """Where the latest call with this handle is waited for."""

    handle: int | str


@dataclass(frozen=True)
class EarlyUse:
    """Where what the call with this handle writes is used, although nobody has waited for it."""

    handle: int | str


@dataclass(frozen=True)
class Mark:
    """What follows belongs to this phase of a step, or of a whole run (`PHASES`).

    "begin" is what comes before the first microbatch, "forward" and "backward" are of a microbatch, "schedule" is what
    megatron-core's schedule does between them (messages), "finish" sums gradients, "update" is all that follows.
    """

    phase: Phase
    microbatch: int | None = None  # number within the step; None outside forward and backward
    chunk: int = 0  # of the interleaved schedule


Entry = Computation | Call | Wait | EarlyUse | Mark
MESSAGES = ("send", "recv")
Memory = dict[str, int]  # bytes of each part at the moment of the peak; their sum is the peak


@dataclass(frozen=True)
class RankRecord:
    """One rank's step in program order, and its peaks."""

    rank: int
    stage: int
    num_microbatches: int  # of the step in `entries`; the run may have more
    entries: tuple[Entry, ...]
    parameters: Mapping[str, int]  # number of elements on this rank, "trained" and "frozen"
    # By phase (`PHASES`) and part: "weights", "gradients", "optimizer", "buffers", "temporary", and "activations of
    # KIND" of each kind of layer.
    peaks: Mapping[str, Memory]

    @property
    def calls(self) -> Iterator[Call]:
        return (entry for entry in self.entries if isinstance(entry, Call))

    def peak(self, phase: str) -> int:
        return sum(self.peaks[phase].values())

    @property
    def highest_peak(self) -> int:
        return max(map(self.peak, self.peaks))


@dataclass(frozen=True)
class RecordedPass:
    """One microbatch's forward or backward through a segment of a model, or what is done once a step."""

    entries: tuple[Entry, ...] = ()
    left: int = 0  # bytes that it leaves behind, and their peak, both relative to its begin
    peak: int = 0


# "embedding", "head", "before" and "first" (`LayersToRecord`); another layer is named by its targets.
Segment = str | frozenset[str]
ENDS = ("embedding", "head")


@dataclass(frozen=True)
class Parameters:
    """Numbers of a model's segment on a tensor-parallel rank."""

    weight_bytes: int = 0
    buffer_bytes: int = 0
    trained: int = 0  # elements in the run's own type, with master parameters beside them where it is not float32
    trained_float32: int = 0  # in a run of another type, those in float32: their own masters
    partial: int = 0  # trained ones whose gradients are summed over the tensor-parallel ranks
    num_tensors: int = 0  # trained ones
    largest: int = 0  # elements of the largest trained one
    num_mixed: int = 0  # linear layers that mix a low rank with a rotation

    @property
    def num_trained(self) -> int:
        return self.trained + self.trained_float32

    @classmethod
    def sum(cls, several: "Iterable[Parameters]") -> "Parameters":
        parts = [*several]
        total = cls(*map(sum, zip(*(tuple(vars(one).values()) for one in parts), strict=True)))
        return replace(total, largest=max((one.largest for one in parts), default=0))


@dataclass(frozen=True, eq=False)
class RecordedLayers:
    """The segments of a model, and what is built once a step for the layers that were recorded."""

    # ("forward" or "backward", segment) -> one microbatch's; ("begin", "") and ("finish", "") -> what is done before
    # the first microbatch and after the last, for all layers. What does nothing may be missing.
    passes: Mapping[tuple[str, Segment], RecordedPass]
    parameters: Mapping[Segment, Parameters]
    fixed_kernels: Mapping[str, float]  # "begin", "finish" -> part of its kernels that any number of layers would take
    cached: int  # bytes that layers share, from the start or from the first microbatch on, as ALiBi's biases
