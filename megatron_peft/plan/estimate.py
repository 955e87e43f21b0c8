"""One rank's step from the shape of the model: what it computes, calls and holds, by formulas.

A rehearsal runs the real step and finds the same (`record.py`); these formulas are for --fit, which looks at hundreds
of layouts, and are held against rehearsals in the tests. They follow our own modules: `adapters/frozen_linear.py`,
`models/layers.py`. What is left out of them: biases, the time of dropout, LoRA-GA's start. Of a method that they do not
know (`knows_method`) they take the number of parameters that it declares and one pass over what its layers give.

Letters: s tokens of a microbatch and `own` those of a rank outside the linear layers; h hidden, t tensor-parallel size,
r rank of the low rank, g features of a rotation's block; q, kv, f a rank's own query, key and feed-forward features.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from megatron_peft.config import LINEAR_MODULES, ParallelConfig, RunConfig
from megatron_peft.config.methods.hybrid import ROTATIONS
from megatron_peft.config.parallel import stages_of_layout
from megatron_peft.models.kernels import fusions_on_a_gpu
from megatron_peft.models.shape import ModelShape
from megatron_peft.rehearsal.record import ITEM_BYTES, Call, Computation, Entry, Product, Wait

FLOAT = "float32"
Kind = Literal["frozen", "full", "low rank", "rotation", "mixture"]


@dataclass(frozen=True)
class Chunk:
    """What a pipeline rank holds of the model in one piece: numbers of its layers, and the ends."""

    layers: tuple[int, ...]
    embedding: bool
    head: bool


def chunks_of_stages(parallel: ParallelConfig, num_layers: int) -> list[list[Chunk]]:
    """The chunks of every pipeline rank, as megatron-core divides the layers. They must divide (`check_layout`)."""
    pp, virtual = parallel.pipeline_model_parallel_size, parallel.num_virtual_stages(num_layers) or 1
    counts = _layers_of_virtual_stages(parallel, num_layers, pp * virtual)
    firsts = [sum(counts[:index]) for index in range(len(counts))]
    return [
        [
            Chunk(tuple(range(firsts[at], firsts[at] + counts[at])), at == 0, at == pp * virtual - 1)
            for at in range(stage, pp * virtual, pp)
        ]
        for stage in range(pp)
    ]


def _layers_of_virtual_stages(parallel: ParallelConfig, num_layers: int, num_stages: int) -> list[int]:
    """Of the stages in the order in which a token passes them."""
    if parallel.pipeline_model_parallel_layout is not None:
        return [stage.count("t") for stage in stages_of_layout(parallel.pipeline_model_parallel_layout)]
    first, last = parallel.decoder_first_pipeline_num_layers, parallel.decoder_last_pipeline_num_layers
    if first or last:
        between = num_stages - bool(first) - bool(last)
        rest = (num_layers - (first or 0) - (last or 0)) // max(between, 1)
        return [*([first] if first else []), *[rest] * between, *([last] if last else [])]
    counts = [parallel.num_divided(num_layers) // num_stages] * num_stages
    counts[0] -= parallel.account_for_embedding_in_pipeline_split
    counts[-1] -= parallel.account_for_loss_in_pipeline_split
    return counts


def knows_method(run: RunConfig) -> bool:
    """Whether the formulas say what the run's method computes; only a rehearsal knows that of a package's own one."""
    spec = run.peft.spec
    return not run.peft.trains_adapters or spec.mixes or bool({"lora_rank", "rotation_side"} & spec.fields(run.peft))


class _Tape:
    """Entries in program order: work is gathered until the next call."""

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype
        self.entries: list[Entry] = []
        self.num_calls = 0
        self._products: dict[Product, int] = {}
        self._bytes = self._kernels = 0

    def product(self, m: int, n: int, k: int, batch: int = 1, dtype: str | None = None) -> None:
        if batch:
            self._count(Product("mm", batch, m, n, k, dtype or self.dtype))

    def attention(self, batch: int, s: int, d: int, backward: bool = False) -> None:
        self._count(Product("attention backward" if backward else "attention", batch, s, s, d, self.dtype))

    def _count(self, product: Product) -> None:
        self._products[product] = self._products.get(product, 0) + 1
        self._kernels += 1

    def touch(self, num_elements: float, kernels: int, dtype: str | None = None) -> None:
        """Operations that read and write so many elements."""
        self._bytes += int(num_elements * ITEM_BYTES[dtype or self.dtype])
        self._kernels += kernels

    def call(
        self,
        operation: str,
        axis: str,
        group: tuple[int, ...],
        *shape: int,
        dtype: str | None = None,
        start: bool = False,
    ) -> int:
        """A collective; nothing in a group of one. With `start` the number to `wait` for."""
        if len(group) == 1:
            return -1
        self._flush()
        self.entries.append(Call(operation, axis, group, (shape,), dtype or self.dtype, is_async=start))
        self.num_calls += 1
        return self.num_calls - 1

    def wait(self, number: int) -> None:
        if number >= 0:
            self._flush()
            self.entries.append(Wait(number))

    def _flush(self) -> None:
        if self._kernels or self._bytes:
            self.entries.append(Computation(self._products, self._bytes, self._kernels))
        self._products, self._bytes, self._kernels = {}, 0, 0

    def done(self) -> tuple[Entry, ...]:
        self._flush()
        return tuple(self.entries)


@dataclass(frozen=True)
class _Linear:
    """A rank's part of a linear layer: [out, in] of the rank's own features."""

    name: str
    out: int
    into: int
    split: Literal["column", "row"]


class StepEstimate:
    """A rank's step in a run: the rank that is first of its tensor- and data-parallel groups, of any stage.

    Args:
        run: with its world size.
        shape: of the base model.
        fuses: other fusions than those of the run's flags.
        samples: that a row packs, of equal lengths; tokens attend to those of their sample.
    """

    def __init__(
        self, run: RunConfig, shape: ModelShape, fuses: Mapping[str, bool] | None = None, samples: int = 1
    ) -> None:
        self.run, self.shape = run, shape
        parallel = run.parallel
        self.t, self.pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
        self.dp = parallel.data_parallel_size
        self.dtype = "bfloat16" if run.model.bf16 else FLOAT
        self.item = ITEM_BYTES[self.dtype]
        self.splits = parallel.sequence_parallel
        self.length, self.rows = run.data.seq_length, run.training.micro_batch_size
        self.s = self.length * self.rows
        self.own = self.s // self.t if self.splits else self.s
        heads, groups = shape.num_attention_heads // self.t, shape.num_query_groups // self.t
        self.heads, self.groups, self.d = heads, groups, shape.kv_channels
        self.h, self.q, self.kv = shape.hidden_size, heads * shape.kv_channels, groups * shape.kv_channels
        self.f, self.gates = shape.ffn_hidden_size // self.t, 2 if shape.gated_linear_unit else 1
        self.vocabulary = shape.padded_vocab_size(run.model.make_vocab_size_divisible_by, self.t) // self.t
        self.linears = {
            "linear_qkv": _Linear("linear_qkv", self.q + 2 * self.kv, self.h, "column"),
            "linear_proj": _Linear("linear_proj", self.h, self.q, "row"),
            "linear_fc1": _Linear("linear_fc1", self.gates * self.f, self.h, "column"),
            "linear_fc2": _Linear("linear_fc2", self.h, self.f, "row"),
        }
        self.samples = samples
        self.chunks = chunks_of_stages(parallel, shape.num_layers)
        self.fuses = {**fusions_on_a_gpu(run, shape), **(fuses or {})}
        self._targeted = _targeted_layers(shape.architecture, tuple(run.peft.target_modules), shape.num_layers)
        spec = run.peft.spec
        self.is_full = not run.peft.trains_adapters
        fields = spec.fields(run.peft)
        self.r: int = run.peft.lora_rank if "lora_rank" in fields else 0  # pyright: ignore[reportAttributeAccessIssue]
        self.dropout = self.r > 0 and run.peft.lora_dropout > 0  # pyright: ignore[reportAttributeAccessIssue]
        self.rotates = "rotation_side" in spec.fields(run.peft) or spec.mixes
        rotation: Any = ROTATIONS[run.peft.hybrid_rotation] if spec.mixes else spec  # pyright: ignore[reportAttributeAccessIssue]
        self.g: int = rotation.group_size(run.peft) if self.rotates else 0
        self.rotation = rotation
        granularity = run.model.transformer.get("recompute_granularity")
        self.recompute = granularity
        self.recomputed = run.model.recompute_modules or ("core_attn",) if granularity == "selective" else ()

    def rank(self, stage: int) -> int:
        """The global rank of the first one of its tensor- and data-parallel groups."""
        return stage * self.t * self.dp

    def tensor_group(self, stage: int) -> tuple[int, ...]:
        """Its tensor-parallel ranks."""
        return tuple(range(self.rank(stage), self.rank(stage) + self.t))

    def data_group(self, stage: int) -> tuple[int, ...]:
        """Its replicas."""
        return tuple(range(self.rank(stage), self.rank(stage) + self.t * self.dp, self.t))

    @property
    def pipeline_group(self) -> tuple[int, ...]:
        """One rank of each stage."""
        return tuple(self.rank(stage) for stage in range(self.pp))

    def kind(self, linear: _Linear, targets: frozenset[str]) -> Kind:
        """What a layer carries."""
        if self.is_full:
            return "full"
        if linear.name not in targets:
            return "frozen"
        if self.r:
            return "mixture" if self.rotates else "low rank"
        return "rotation"

    # What a layer computes. A backward is that of the forward above it.

    def forward_layer(self, tape: _Tape, targets: frozenset[str], group: tuple[int, ...]) -> None:
        """One transformer layer."""
        self._attention_forward(tape, targets, group)
        self._mlp_forward(tape, targets, group)

    def _attention_forward(self, tape: _Tape, targets: frozenset[str], group: tuple[int, ...]) -> None:
        tape.touch(2 * self.own * self.h, 1)  # norm
        self._column_forward(tape, self.linears["linear_qkv"], targets, group)
        if 1 < self.groups < self.heads:
            tape.touch(2 * self.s * self.q, 1)  # queries out of the fused rows, where they lie apart
        if self.shape.position_embedding == "rope":
            self._rope(tape)
        self._core_attention(tape)
        self._row_forward(tape, self.linears["linear_proj"], targets, group)
        tape.touch(3 * self.own * self.h, 1)  # residual

    def _rope(self, tape: _Tape) -> None:
        """Of queries and keys, forward or backward."""
        passes, kernels = (2, 2) if self.fuses["apply_rope_fusion"] else (9, 8)
        tape.touch(passes * self.s * (self.q + self.kv), kernels)

    def _core_attention(self, tape: _Tape) -> None:
        tape.attention(self.rows * self.heads * self.samples, self.length // self.samples, self.d)
        if self.rows > 1:
            tape.touch(2 * self.s * self.q, 1)  # back to [s, b, h]

    def _mlp_forward(self, tape: _Tape, targets: frozenset[str], group: tuple[int, ...]) -> None:
        tape.touch(2 * self.own * self.h, 1)
        self._column_forward(tape, self.linears["linear_fc1"], targets, group)
        passes, kernels = (2, 1) if self.gates == 1 else (3, 1) if self.fuses["bias_activation_fusion"] else (5, 2)
        tape.touch(passes * self.s * self.f, kernels)
        self._row_forward(tape, self.linears["linear_fc2"], targets, group)
        tape.touch(3 * self.own * self.h, 1)

    def backward_layer(
        self, tape: _Tape, targets: frozenset[str], group: tuple[int, ...], is_last: bool = False
    ) -> None:
        """Its backward, after what is recomputed; of the last one no gradient of its input is asked for."""
        if self.recompute == "full":
            self.forward_layer(tape, targets, group)
        elif "mlp" in self.recomputed:
            self._mlp_forward(tape, targets, group)
        self._row_backward(tape, self.linears["linear_fc2"], targets, group)
        passes, kernels = (3, 2) if self.gates == 1 else (5, 1) if self.fuses["bias_activation_fusion"] else (11, 4)
        if passes == 11 and self.kind(self.linears["linear_fc2"], targets) == "mixture":  # its input is recomputed
            passes, kernels = 14, 5
        tape.touch(passes * self.s * self.f, kernels)
        self._column_backward(tape, self.linears["linear_fc1"], targets, group)
        self._norm_backward(tape)
        self._row_backward(tape, self.linears["linear_proj"], targets, group)
        if "core_attn" in self.recomputed:
            self._core_attention(tape)
        if self.rows > 1:
            tape.touch(2 * self.s * self.q, 1)
        tape.attention(self.rows * self.heads * self.samples, self.length // self.samples, self.d, backward=True)
        if self.shape.position_embedding == "rope":
            self._rope(tape)
        tape.touch(2 * self.s * (self.q + 2 * self.kv), 1)
        self._column_backward(tape, self.linears["linear_qkv"], targets, group, is_last)
        if not is_last:
            self._norm_backward(tape)

    def _norm_backward(self, tape: _Tape) -> None:
        """With the sum of its gradient and the residual's."""
        tape.touch(6 * self.own * self.h, 2 + self.is_full)

    def _column_forward(self, tape: _Tape, linear: _Linear, targets: frozenset[str], group: tuple[int, ...]) -> None:
        kind = self.kind(linear, targets)
        has_low_rank = kind in ("low rank", "mixture")
        if has_low_rank:
            tape.product(self.own, self.r, linear.into)
            tape.touch(2 * self.own * self.r, 1)
        if self.splits:
            narrow = tape.call("all_gather", "tensor", group, self.own, self.r, start=True) if has_low_rank else -1
            tape.call("all_gather", "tensor", group, self.own, linear.into)
            tape.wait(narrow)
        tape.product(self.s, linear.out, linear.into)
        if kind in ("rotation", "mixture"):
            self._rotate(tape, self.s, linear.out)
        if has_low_rank:
            tape.product(self.s, linear.out, self.r)

    def _rotate(self, tape: _Tape, tokens: int, features: int) -> None:
        tape.touch(2 * tokens * features, 1)  # a copy, to which the product is added
        tape.product(tokens, self.g, self.g, batch=self._blocks(features))

    def _blocks(self, features: int) -> int:
        return max(features // self.g, 1) if self.g else 0

    def _sum_output(self, tape: _Tape, group: tuple[int, ...], features: int) -> None:
        tape.call("reduce_scatter" if self.splits else "all_reduce", "tensor", group, self.s, features)

    def _row_forward(self, tape: _Tape, linear: _Linear, targets: frozenset[str], group: tuple[int, ...]) -> None:
        kind = self.kind(linear, targets)
        tape.product(self.s, linear.out, linear.into)
        if kind in ("low rank", "mixture"):
            tape.product(self.s, self.r, linear.into)
            tape.touch(2 * self.s * self.r, 1)
        if kind == "low rank":
            tape.product(self.s, linear.out, self.r)
        self._sum_output(tape, group, linear.out)
        if kind == "mixture":
            self._sum_output(tape, group, self.r)
        if kind in ("rotation", "mixture"):
            self._rotate(tape, self.own, linear.out)
        if kind == "mixture":
            tape.product(self.own, linear.out, self.r)

    def _column_backward(
        self, tape: _Tape, linear: _Linear, targets: frozenset[str], group: tuple[int, ...], is_last: bool = False
    ) -> None:
        kind, narrow, wide = self.kind(linear, targets), -1, -1
        has_low_rank = kind in ("low rank", "mixture")
        if has_low_rank:
            tape.product(self.s, self.r, linear.out)
            tape.touch(2 * self.s * self.r, 1)
            if self.splits:
                narrow = tape.call("reduce_scatter", "tensor", group, self.s, self.r, start=True)
        if kind in ("rotation", "mixture") and not is_last:
            self._rotate(tape, self.s, linear.out)
        regathered = -1
        if kind == "full" and self.splits:
            regathered = tape.call("all_gather", "tensor", group, self.own, linear.into, start=True)
        if not is_last:
            tape.product(self.s, linear.into, linear.out)
            tape.wait(regathered)
            operation = "reduce_scatter" if self.splits else "all_reduce"
            wide = tape.call(operation, "tensor", group, self.s, linear.into, start=True)
        self._weight_gradients(tape, linear, kind, self.s, self.own)
        tape.wait(narrow)
        tape.wait(wide)
        if kind == "full":
            self._added_gradient(tape, linear.out * linear.into)
        if has_low_rank and not is_last:
            tape.product(self.own, linear.into, self.r)

    def _row_backward(self, tape: _Tape, linear: _Linear, targets: frozenset[str], group: tuple[int, ...]) -> None:
        kind = self.kind(linear, targets)
        own = self.own if self.splits else self.s // self.t
        if kind in ("rotation", "mixture"):
            self._rotate(tape, self.own, linear.out)
            tape.product(self.g, self.g, own, batch=self._blocks(linear.out))
        if kind == "mixture":
            tape.product(self.r, linear.out, own)
            tape.product(self.own, self.r, linear.out)
            tape.touch(2 * self.own * self.r, 1)
            if self.splits:
                tape.call("all_gather", "tensor", group, self.own, self.r)
        if self.splits:
            tape.call("all_gather", "tensor", group, self.own, linear.out)
        if kind == "low rank":
            tape.product(self.s, self.r, linear.out)
            tape.touch(2 * self.s * self.r, 1)
        tape.product(self.s, linear.into, linear.out)
        if kind in ("low rank", "mixture"):
            tape.product(self.s, linear.into, self.r)
            tape.product(self.r, linear.into, self.s)
            tape.touch(3 * self.r * (linear.into + linear.out), 2, FLOAT)
        if kind == "low rank":
            tape.product(self.r, linear.out, self.s)
        if kind == "mixture":
            tape.touch(3 * self.s * linear.into, 1)  # the sum of both branches' gradients
        if kind == "full":
            tape.product(linear.out, linear.into, self.s)
            self._added_gradient(tape, linear.out * linear.into)

    def _added_gradient(self, tape: _Tape, num_elements: int, of_product: bool = True) -> None:
        """To the sum over microbatches, in float32: within the product that gives it, where that is fused."""
        if of_product and self.fuses["gradient_accumulation_fusion"]:
            return
        tape.touch(2 * num_elements, 1, FLOAT)
        tape.touch(num_elements, 0)

    def _weight_gradients(self, tape: _Tape, linear: _Linear, kind: Kind, tokens: int, own: int) -> None:
        if kind in ("low rank", "mixture"):
            tape.product(self.r, linear.out, tokens)
            tape.product(self.r, linear.into, own)
            tape.touch(3 * self.r * (linear.out + linear.into), 2, FLOAT)
        groups = self._blocks(linear.out)
        if kind in ("rotation", "mixture"):
            tape.product(self.g, self.g, tokens, batch=groups)
        if kind == "mixture":
            tape.touch(3 * self.r * linear.out, 1)  # B in float32
            tape.product(self.g, self.g, self.r, batch=groups, dtype=FLOAT)
        if kind == "full":
            tape.product(linear.out, linear.into, tokens)

    def embed(self, tape: _Tape, group: tuple[int, ...]) -> None:
        """The embedding's forward; frozen, it has no backward."""
        tape.touch((2 if self.t == 1 else 4) * self.s * self.h, 1 if self.t == 1 else 9)  # rows of other ranks are zero
        tape.call("reduce_scatter" if self.splits else "all_reduce", "tensor", group, self.s, self.h)

    def head_forward(self, tape: _Tape, group: tuple[int, ...]) -> None:
        """Final norm, output layer and loss."""
        tape.touch(2 * self.own * self.h, 1)
        if self.splits:
            tape.call("all_gather", "tensor", group, self.own, self.h)
        logits = self.s * self.vocabulary
        tape.product(self.s, self.vocabulary, self.h)
        tape.touch(1.5 * logits, 1, FLOAT)  # in float32, and their maximum
        tape.call("all_reduce", "tensor", group, self.s, dtype=FLOAT)
        tape.touch(2 * logits, 1, FLOAT)  # exponentials and their sum
        for _ in range(2):
            tape.call("all_reduce", "tensor", group, self.s, dtype=FLOAT)
        tape.touch(2 * logits, 8, FLOAT)  # the softmax; the loss

    def head_backward(self, tape: _Tape, group: tuple[int, ...]) -> None:
        """Their backward."""
        logits = self.s * self.vocabulary
        tape.touch(3.5 * logits, 8, FLOAT)
        regathers = self.is_full and self.splits
        regathered = tape.call("all_gather", "tensor", group, self.own, self.h, start=True) if regathers else -1
        tape.product(self.s, self.h, self.vocabulary)
        tape.wait(regathered)
        operation = "reduce_scatter" if self.splits else "all_reduce"
        wide = tape.call(operation, "tensor", group, self.s, self.h, start=True)
        if self.is_full:
            tape.product(self.vocabulary, self.h, self.s)
        tape.wait(wide)
        if self.is_full:
            self._added_gradient(tape, self.vocabulary * self.h)
        tape.touch(3 * self.own * self.h, 1 + self.is_full)

    def forward_chunk(self, chunk: Chunk, stage: int) -> tuple[Entry, ...]:
        """The forward of one microbatch through a chunk, with the calls of the tensor-parallel ranks."""
        tape, group = _Tape(self.dtype), self.tensor_group(stage)
        if chunk.embedding:
            self.embed(tape, group)
        for layer in chunk.layers:
            self.forward_layer(tape, self.targets(layer), group)
        if chunk.head:
            self.head_forward(tape, group)
        return tape.done()

    def backward_chunk(self, chunk: Chunk, stage: int) -> tuple[Entry, ...]:
        """The backward of `forward_chunk`."""
        tape, group = _Tape(self.dtype), self.tensor_group(stage)
        if chunk.head:
            self.head_backward(tape, group)
        first = self._first_with_gradient(chunk)
        for layer in reversed([layer for layer in chunk.layers if layer >= first]):
            is_last = layer == first and "linear_qkv" in self.targets(layer) and self._stops(chunk)
            self.backward_layer(tape, self.targets(layer), group, is_last)
        if chunk.embedding and self.is_full:
            if self.splits:
                tape.call("all_gather", "tensor", group, self.own, self.h)
            tape.touch(2 * self.s * self.h + self.vocabulary * self.h, 3)
            self._added_gradient(tape, self.vocabulary * self.h, of_product=False)
        return tape.done()

    def _stops(self, chunk: Chunk) -> bool:
        """Whether backward stops at the first adapter: the embedding's output needs no gradient then."""
        is_adapted = any(self.targets(layer) for layer in chunk.layers)
        return chunk.embedding and is_adapted and not self.is_full and self.recompute is None

    def _first_with_gradient(self, chunk: Chunk) -> int:
        return next((layer for layer in chunk.layers if self.targets(layer) or not self._stops(chunk)), 0)

    def targets(self, layer: int) -> frozenset[str]:
        """The linear layers of a transformer layer that carry an adapter."""
        return frozenset(LINEAR_MODULES) if self.is_full else self._targeted[layer]

    def layers_by_targets(self, chunk: Chunk) -> Mapping[frozenset[str], int]:
        """How many layers of a chunk carry adapters on the same linear layers."""
        return Counter(map(self.targets, chunk.layers))


@cache
def _targeted_layers(architecture: str, patterns: tuple[str, ...], num_layers: int) -> tuple[frozenset[str], ...]:
    """The linear layers of each transformer layer that --peft-target-modules means."""
    from megatron_peft.adapters.attach import is_targeted
    from megatron_peft.models.families import family_of

    modules = family_of(architecture).modules
    places = {name: "self_attention" if name in ("linear_qkv", "linear_proj") else "mlp" for name in LINEAR_MODULES}
    names = [{name: f"decoder.layers.{layer}.{places[name]}.{name}" for name in places} for layer in range(num_layers)]
    return tuple(frozenset(name for name in one if is_targeted(one[name], patterns, modules)) for one in names)
