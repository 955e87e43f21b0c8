"""A run's adapters folded into their base, as an ordinary Hugging Face folder.

One parameter at a time: the base's is read in Megatron's form (fused, whole), changed in float32, cast, and written as
the tensors that it is made of.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from megatron_peft.adapters.butterfly import cayley, compose, skew
from megatron_peft.adapters.unitary import as_real, change_from_start, structured
from megatron_peft.checkpoint.folders import megatron_files
from megatron_peft.config import require
from megatron_peft.conversion.pretrained import Weights, open_weights, owned_rules
from megatron_peft.conversion.to_huggingface import Contents, origins, require_undamaged, write_huggingface
from megatron_peft.conversion.trained_adapters import (
    TrainedAdapters,
    base_of,
    layer_of,
    low_rank_factors,
    open_adapters,
)
from megatron_peft.conversion.writer import DEFAULT_SHARD_BYTES, check_new
from megatron_peft.models.rules import Rule

# The rotation of a trained adapter as dense blocks, whatever method and parametrization it was trained in.
#
# Letters: k groups of g features, on the side that turns.

Read = Callable[[str], Tensor]  # a tensor of the adapter by its name, in float64


def rotation_blocks(adapters: TrainedAdapters, layer: str, part: str = "") -> Tensor:  # -> [k, g, g]
    """R of a layer in float64.

    Args:
        part: what comes before the names, where an adapter has several parts: `rotation.`.
    """
    form = next(blocks for name, blocks in FORMS.items() if adapters.has(layer, f"{part}{name}"))
    peft = adapters.record.config.peft
    return form(lambda name: adapters.tensor(layer, f"{part}{name}").double(), peft.boft_block_size)


def cayley_blocks(read: Read, boft_block_size: int) -> Tensor:
    """BOFT's, of numbers above the diagonals."""
    return compose(cayley(skew(read("Q"), boft_block_size)))


def projected_blocks(read: Read, boft_block_size: int) -> Tensor:
    """BOFT's, whose small blocks are kept as they are."""
    return compose(read("P"))


def structured_blocks(read: Read, boft_block_size: int) -> Tensor:
    """uRNN's, of phases and reflections."""
    permutation = read("permutation").long()
    change = as_real(change_from_start(read("theta"), structured(read("start"), permutation), permutation))
    return change + torch.eye(change.shape[-1], dtype=change.dtype)


def unitary_blocks(read: Read, boft_block_size: int) -> Tensor:
    """uRNN's, whose unitary blocks are kept as they are."""
    return as_real(torch.view_as_complex(read("U")))


# By the tensor that only this form has.
FORMS: dict[str, Callable[[Read, int], Tensor]] = {
    "Q": cayley_blocks,
    "P": projected_blocks,
    "theta": structured_blocks,
    "U": unitary_blocks,
}


def add_low_rank(adapters: TrainedAdapters, layer: str, weight: Tensor) -> Tensor:
    """W + s B A."""
    return _add_low_rank(adapters, layer, weight, "", 1.0)


def turn(adapters: TrainedAdapters, layer: str, weight: Tensor) -> Tensor:
    """R W, or W R^T, by groups of features."""
    return _turned(adapters, layer, weight, "")


def turn_or_replace(adapters: TrainedAdapters, layer: str, weight: Tensor) -> Tensor:
    """As `turn`; with --urnn-mode replace the weight is R itself."""
    if adapters.record.config.peft.urnn_mode == "multiply":
        return turn(adapters, layer, weight)
    return torch.block_diag(*rotation_blocks(adapters, layer, "rotation.")).to(weight.dtype)


def mix(adapters: TrainedAdapters, layer: str, weight: Tensor) -> Tensor:
    """W + lambda s B A + (1 - lambda) (R - I) W; W has what --hybrid-merge-interval has folded into it."""
    if adapters.has(layer, "folded_weight"):
        weight = adapters.tensor(layer, "folded_weight").to(weight.dtype)
    share = float(adapters.tensor(layer, "mix"))
    turned = _turned(adapters, layer, weight, "rotation.")
    return _add_low_rank(adapters, layer, weight.lerp(turned, 1 - share), "low_rank.", share)


def _add_low_rank(adapters: TrainedAdapters, layer: str, weight: Tensor, part: str, share: float) -> Tensor:
    change = low_rank_factors(adapters, layer, part)
    A, B = change.A.to(weight.dtype), change.B.to(weight.dtype)
    return weight.addmm_(B, A, alpha=share * adapters.record.config.peft.lora_scale)


def _turned(adapters: TrainedAdapters, layer: str, weight: Tensor, part: str) -> Tensor:
    R = rotation_blocks(adapters, layer, part).to(weight.dtype)
    groups, size, _ = R.shape
    if adapters.record.config.peft.rotation_side == "output":
        return torch.bmm(R, weight.view(groups, size, -1)).view_as(weight)
    return torch.einsum("okg,khg->okh", weight.view(-1, groups, size), R).reshape(weight.shape)


# How a method changes a weight: (adapters, layer, weight) -> the weight, in place or anew. The weight is the base's in
# Megatron's form, [out, in], in float32 at least. A new method is one line here.
Merger = Callable[[TrainedAdapters, str, Tensor], Tensor]
MERGERS: dict[str, Merger] = {
    "lora": add_low_rank,
    "lora-ga": add_low_rank,
    "boft": turn,
    "urnn": turn_or_replace,
    "hybrid": mix,
}


def merge(
    input: str | Path,
    output: str | Path,
    *,
    pretrained_checkpoint: str | Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: bool = True,
) -> Path:
    """Write `output`: config.json, the tokenizer's files and sharded safetensors of the changed model.

    Args:
        input: the --save folder of a run, of any layout.
        output: must not exist.
        pretrained_checkpoint: the base, if it is not where the run says.
        dtype: of the weights; None keeps the base's.
        max_shard_bytes: of one file.
        progress: show a bar at a terminal.

    Raises:
        ConfigurationError: before anything is written: no checkpoint or no adapters, another base, an output that
            exists, damaged files.
    """
    check_new(output)
    adapters = open_adapters(input)
    method, shape = adapters.record.config.peft.method, adapters.record.shape
    require(method in MERGERS, f"--input {input}: adapters of --peft-method {method} cannot be merged.")
    merger = MERGERS[method]
    base = base_of(adapters, pretrained_checkpoint)
    files = megatron_files(base)
    if files is not None:
        require_undamaged(files)
    rules, weights = open_weights(base, shape)
    owned = owned_rules(rules, shape)
    contents = Contents(
        shape=shape,
        rules=owned,
        types={name: dtype or weights.stored_type(rule) for name, rule in owned.items()},
        tensors=lambda rule: _merged(rule, weights, adapters, merger),
        origins=[base] if files is None else origins(base, files),
    )
    write_huggingface(Path(output), contents, max_shard_bytes, "Merging", progress)
    return Path(output)


def _merged(rule: Rule, weights: Weights, adapters: TrainedAdapters, merger: Merger) -> Mapping[str, Tensor]:
    """The Hugging Face tensors of one parameter; in float32 (or float64) where an adapter has changed it."""
    layer, dtype = layer_of(rule), weights.stored_type(rule)
    if layer not in adapters.record.adapted_layers:
        whole = torch.empty(rule.local_shape(1), dtype=dtype)
        weights.read(rule, whole, 0, 1)
        return rule.write([whole])
    whole = torch.empty(rule.local_shape(1), dtype=torch.promote_types(dtype, torch.float32))
    weights.read(rule, whole, 0, 1)
    return rule.write([merger(adapters, layer, whole)])
