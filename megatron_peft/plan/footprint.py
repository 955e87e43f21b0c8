"""Parameters and memory of one rank by formulas, in the parts that a rehearsal measures (`record.PARTS`).

Activations are what autograd saves of a microbatch from its forward to its backward, as our modules save it:

    residual    the inputs of both norms                     2 own h
    attention   the fused rows, rotated queries and keys,
                the result                                   s (q + 2 kv), s (q + kv), s q
    SwiGLU      its input                                    2 s f
    LoRA        the inputs of its column-parallel layers     2 own h; that of linear_proj is attention's result; that of
                                                             linear_fc2, s f, the Hybrid recomputes from SwiGLU's input
    rotation    the outputs of its row-parallel layers       2 own h; those of the others are kept anyway

Letters as in `estimate.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_peft.plan.estimate import Chunk, StepEstimate
from megatron_peft.rehearsal.record import ITEM_BYTES, Memory


@dataclass(frozen=True)
class Parameters:
    """Numbers of elements on a rank.

    Args:
        frozen: in the run's own type.
        trained: in the run's own type, with master parameters beside them where it is not float32.
        trained_float32: rotations, their own masters.
        partial: of the trained ones, those whose gradients are summed over the tensor-parallel ranks.
        rotated: features of all rotations.
        tensors: how many trained tensors there are.
        mixed: how many layers mix a low rank with a rotation.
    """

    frozen: int
    trained: int
    trained_float32: int
    partial: int
    rotated: int
    tensors: int
    mixed: int


def parameters(step: StepEstimate, chunks: Sequence[Chunk]) -> Parameters:
    """Those of the chunks of one rank."""
    frozen = trained = in_float32 = partial = rotated = tensors = mixed = 0
    norms = 2 if step.shape.normalization == "LayerNorm" else 1
    for chunk in chunks:
        for targets, count in step.layers_by_targets(chunk).items():
            frozen += count * (2 * norms * step.h + 2 * step.shape.qk_layernorm * norms * step.d)
            for linear in step.linears.values():
                frozen += count * (linear.out * linear.into + (linear.name in step.shape.linear_biases) * linear.out)
                kind = step.kind(linear, targets)
                tensors += count * {"frozen": 0, "full": 1, "low rank": 2, "rotation": 1, "mixture": 3}[kind]
                mixed += count * (kind == "mixture")
                if kind in ("low rank", "mixture"):
                    trained += count * step.r * (linear.out + linear.into)
                    partial += count * step.r * (linear.into if linear.split == "column" else linear.out)
                if kind in ("rotation", "mixture"):
                    numbers = count * step.rotation.num_parameters(step.run.peft, linear.out, linear.into)
                    in_float32 += numbers
                    rotated += count * linear.out
                    partial += numbers if linear.split == "row" else 0
        frozen += (chunk.embedding + (chunk.head and _has_own_head(step))) * step.vocabulary * step.h
        frozen += (chunk.embedding * step.shape.embedding_layernorm + chunk.head) * norms * step.h
    if step.is_full:
        frozen, trained = 0, frozen
    return Parameters(frozen, trained, in_float32, partial if step.t > 1 else 0, rotated, tensors, mixed)


def _has_own_head(step: StepEstimate) -> bool:
    return not step.shape.tied_embeddings or step.pp > 1


def saved_bytes(step: StepEstimate, chunk: Chunk) -> int:
    """What one microbatch's forward through a chunk keeps until its backward."""
    elements = (1 + chunk.head) * step.own * step.h  # the chunk's input, the last norm's output
    layers = step.layers_by_targets(chunk)
    elements += sum(count * _saved_of_layer(step, targets) for targets, count in layers.items())
    return elements * step.item + chunk.head * step.s * step.vocabulary * ITEM_BYTES["float32"]  # and the softmax


def _saved_of_layer(step: StepEstimate, targets: frozenset[str]) -> int:
    if step.recompute == "full":
        return step.own * step.h
    s, own, h, q, kv, f = step.s, step.own, step.h, step.q, step.kv, step.f
    kinds = {name: step.kind(linear, targets) for name, linear in step.linears.items()}
    keeps_input = {name: kind in ("full", "low rank", "mixture") for name, kind in kinds.items()}
    keeps_output = {name: kind in ("rotation", "mixture") for name, kind in kinds.items()}
    elements = 2 * own * h + s * (q + 2 * kv) + s * q
    elements += s * (q + kv) if step.shape.position_embedding == "rope" else s * (2 * q + 2 * kv)
    elements += own * h * keeps_input["linear_qkv"] + own * h * keeps_output["linear_proj"]
    if step.rows > 1:  # [s, b, h] of attention's result is a copy
        elements += s * q * keeps_input["linear_proj"]
    # Of dropout the mask is kept, and the masked input even where the input is kept anyway.
    is_masked = {name: step.dropout and kind in ("low rank", "mixture") for name, kind in kinds.items()}
    elements += own * h * is_masked["linear_qkv"] + (2 if step.rows == 1 else 1) * s * q * is_masked["linear_proj"]
    if "mlp" in step.recomputed:
        return elements
    elements += own * h * is_masked["linear_fc1"] + s * f * is_masked["linear_fc2"]
    elements += own * h * keeps_input["linear_fc1"] + own * h * keeps_output["linear_fc2"] + step.gates * s * f
    recomputes = step.gates == 2 and kinds["linear_fc2"] == "mixture" and not step.dropout
    return elements + s * f * (keeps_input["linear_fc2"] and not recomputes)


def working_bytes(step: StepEstimate, chunks: Sequence[Chunk]) -> int:
    """The largest sum of tensors that live for a moment only: in the backward of a layer, or of the head."""
    s, h, f = step.s, step.h, step.f
    gathered = (2 if step.splits else 1) * s * h + 2 * step.own * h
    layer = (gathered + (step.gates + 2) * s * f) * step.item
    if step.recompute == "full" or "mlp" in step.recomputed:
        layer += _saved_when_recomputed(step) * step.item
    table = step.is_full * step.vocabulary * h * step.item  # a gradient before it is added to the sum
    if any(chunk.embedding for chunk in chunks):
        layer = max(layer, table)
    if not any(chunk.head for chunk in chunks):
        return layer
    # The softmax is gone when the layers' backward begins.
    softmax = s * step.vocabulary * ITEM_BYTES["float32"]
    return max(layer - softmax, s * step.vocabulary * step.item + table)


def _saved_when_recomputed(step: StepEstimate) -> int:
    elements = step.own * step.h + (step.gates + 1) * step.s * step.f
    if step.recompute == "full":
        elements += 3 * step.own * step.h + step.s * (3 * step.q + 2 * step.kv)
    return elements


def memory(step: StepEstimate, stage: int, in_flight: int) -> Memory:
    """Bytes of a rank at the peak of a step.

    Args:
        stage: pipeline rank.
        in_flight: bytes of activations of the microbatches whose backward is still to come (`pipeline.in_flight`).
    """
    counts = parameters(step, step.chunks[stage])
    optimizer, trained = step.run.optimizer, counts.trained + counts.trained_float32
    shards = step.dp if optimizer.use_distributed_optimizer else 1
    moments = {"adam": 8, "sgd": 4 if optimizer.sgd_momentum else 0}[optimizer.optimizer]
    masters = 0 if step.item == ITEM_BYTES["float32"] else 4 * counts.trained
    gradient = 2 if step.run.training.grad_reduce_in_bf16 and step.item == 2 else 4
    temporary = working_bytes(step, step.chunks[stage])
    if gradient == 2:  # the update copies gradients to float32, when no activations are held
        temporary = max(temporary, 4 * trained // shards - in_flight)
    return {
        "weights": (counts.frozen + counts.trained) * step.item + 4 * counts.trained_float32,
        "gradients": gradient * trained,
        "optimizer": (masters + moments * trained) // shards,
        "activations": in_flight,
        "buffers": 4 * 4 * counts.rotated * step.g,  # D, its sums, its multiplier and what it was built from
        "temporary": temporary,
    }


def total(parts: Mapping[str, int]) -> int:
    """Bytes."""
    return sum(parts.values())
