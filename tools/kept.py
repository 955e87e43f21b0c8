"""What a step keeps for backward, a token: by the kind of layer that made it, by method, and by what is recomputed.

`python -m tools.kept docs/results/kept` rehearses steps of Llama-3.1-8B in bf16 and writes the tables of
docs/method-internals.md: what is alive between forward and backward, as the plan's recorder sees it. Beside it is what
autograd keeps of the same model if adapters and SwiGLU are their formulas in torch's operations, and logits are whole.
"""

import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_peft.adapters.frozen_linear import FrozenLinearCall
from megatron_peft.adapters.hybrid import Hybrid
from megatron_peft.adapters.low_rank import LowRank
from megatron_peft.adapters.rotation import BlockRotation
from megatron_peft.config import RunConfig
from megatron_peft.models.layers import SwiGLU
from megatron_peft.plan.plan import ACTIVATIONS
from megatron_peft.rehearsal.rehearsed_rank import Watch, microbatch_of, watch_run
from megatron_peft.rehearsal.requests import Lengths, RankToRehearse
from megatron_peft.runtime.fake_ranks import fake_rank, replaced
from megatron_peft.runtime.launch import model_parallel
from tools.headlines import METHODS
from tools.published import FULL_RECOMPUTE, LLAMA_8B, made_up_run, write_tables

TOKENS = 2048
PLAIN, NOTHING, DROPOUT = "plain autograd", "no recompute", 0.1
MODULES = {f"recompute {module}": module for module in ("core_attn", "layernorm", "mlp")}
WAYS = (PLAIN, NOTHING, *MODULES, "recompute full")
KINDS = {
    "norms": "norms",
    "qkv": "linear_qkv",
    "rotary embedding": "attention",
    "attention core": "core attention",
    "proj": "linear_proj",
    "fc1": "linear_fc1",
    "activation": "MLP",
    "fc2": "linear_fc2",
    "residuals": "residuals",
}
HEAD = "logits and loss"


class Kept(Watch):
    """Bytes by kind of layer that are alive where the first backward begins.

    Without numbers, though not with them, norms that were recomputed in it outlive their step.
    """

    kept: Mapping[str, int] = MappingProxyType({})

    def mark(self, phase: Any, microbatch: int | None = None, chunk: int = 0) -> None:
        if phase == "backward" and not self.kept:
            parts = self.memory.peak(assigned_since=True)
            self.kept = {part.removeprefix(ACTIVATIONS): size for part, size in parts.items() if ACTIVATIONS in part}
        super().mark(phase, microbatch, chunk)


@cache
def kept(method: str, way: str, dropout: float = 0.0) -> dict[str, float]:
    """KiB a token, of a layer by kind, and of the head."""
    transformer = FULL_RECOMPUTE if way == "recompute full" else {"recompute_granularity": "selective"}
    run = made_up_run(method, TOKENS, 1, recompute=transformer if "recompute " in way else {})
    chunk = 0 if way == PLAIN else run.model.cross_entropy_chunk_tokens
    modules = (MODULES[way],) if way in MODULES else ()
    run = replace(run, model=replace(run.model, recompute_modules=modules, cross_entropy_chunk_tokens=chunk))
    run = replace(run, peft=replace(run.peft, lora_dropout=dropout)) if dropout else run
    # The first layer keeps less, and some is kept once for all.
    few, more = (_kept_of(run, num_layers, way == PLAIN) for num_layers in (2, 4))
    of_layer = {kind: (more[part] - few[part]) / 2 for kind, part in KINDS.items()}
    return {kind: size / 1024 / TOKENS for kind, size in {**of_layer, HEAD: few[HEAD]}.items()}


def _kept_of(run: RunConfig, num_layers: int, is_plain: bool) -> Counter[str]:
    shape, lengths = replace(LLAMA_8B, num_layers=num_layers), Lengths.longest(run)
    watch = Kept({})
    with fake_rank(0, 1), model_parallel(run.parallel, run.training.seed), plain() if is_plain else nullcontext():
        with watch.watching():
            watch_run(watch, RankToRehearse(run, shape, 0, 1, lengths, False), [microbatch_of(lengths)])
    return Counter(watch.kept)


# The formulas in torch's operations.


def _low_rank(part: LowRank, x: Tensor) -> Tensor:
    A, B = part.factors()
    return F.linear(F.linear(F.dropout(x, part.dropout, part.training), A), B)


def _rotated(z: Tensor, D: Tensor) -> Tensor:
    """D z by block."""
    return torch.einsum("sbkg,khg->sbkh", z.unflatten(-1, D.shape[:2]), D.to(z.dtype)).flatten(2)


def _lora(adapter: LowRank, x: Tensor, call: FrozenLinearCall) -> Tensor:
    return F.linear(x, call.weight) + adapter.scale * _low_rank(adapter, x)


def _rotation(adapter: BlockRotation, x: Tensor, call: FrozenLinearCall) -> Tensor:
    z = F.linear(x, call.weight)
    return z + _rotated(z, adapter.applied())


def _hybrid(adapter: Hybrid, x: Tensor, call: FrozenLinearCall) -> Tensor:
    z, held = F.linear(x, call.weight), adapter.held
    assert held is not None and held.scale is not None
    return z + _rotated(z, held.D) + held.scale.to(z.dtype) * _low_rank(adapter.low_rank, x)


def _swiglu(_: SwiGLU, x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


@contextmanager
def plain() -> Iterator[None]:
    """Nothing but autograd decides what is kept."""
    formulas: Mapping[type, Any] = {LowRank: _lora, BlockRotation: _rotation, Hybrid: _hybrid, SwiGLU: _swiglu}
    with ExitStack() as stack:
        for kind, formula in formulas.items():
            stack.enter_context(replaced(kind, "forward", formula))
        yield


def tables() -> dict[str, dict[str, Any]]:
    """By the names of their files."""
    by_method = {method: kept(method, NOTHING) for method in METHODS}
    by_way = {way: kept("lora", way) for way in WAYS}
    return {
        "methods": _by_kind("Nothing is recomputed: KiB a token, of a layer by what made it", by_method),
        "lora": _by_kind("LoRA: KiB a token, of a layer by what made it", by_way),
        "ways": {
            "title": "A layer in all: KiB a token",
            "columns": ["method", *WAYS, f"{PLAIN}, dropout {DROPOUT}", f"{NOTHING}, dropout {DROPOUT}"],
            "text_columns": 1,
            "rows": [[method, *_of_ways(method)] for method in METHODS],
        },
    }


def _by_kind(title: str, columns: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    rows = {kind: [one[kind] for one in columns.values()] for kind in KINDS}
    rows["a layer"] = [_layer(one) for one in columns.values()]
    rows[f"{HEAD}, once"] = [one[HEAD] for one in columns.values()]
    cells = [[name, *(f"{size:.2f}" for size in sizes)] for name, sizes in rows.items()]
    return {"title": title, "columns": ["made by", *columns], "text_columns": 1, "rows": cells}


def _of_ways(method: str) -> Iterator[str]:
    yield from (f"{layer_kib(method, way):.2f}" for way in WAYS)
    has_dropout = method in ("lora", "lora-ga", "hybrid")
    yield from (f"{layer_kib(method, way, DROPOUT):.2f}" if has_dropout else "" for way in (PLAIN, NOTHING))


def layer_kib(method: str, way: str, dropout: float = 0.0) -> float:
    """KiB a token of a layer in all."""
    return _layer(kept(method, way, dropout))


def _layer(found: Mapping[str, float]) -> float:
    return sum(found[kind] for kind in KINDS)


def main(arguments: Sequence[str]) -> int:
    """Write the tables into the folder that is named."""
    write_tables(tables(), Path(arguments[0]))
    return 0


if __name__ == "__main__":
    import megatron_peft.runtime.no_gpu  # noqa: F401

    sys.exit(main(sys.argv[1:]))
