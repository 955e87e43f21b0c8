"""A trained run of LoRA and its export, and the ways in which an adapter's folder may be spoilt."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_peft.commands import train
from tests.tiny_llama import VOCAB_SIZE, draw_parameters, save_llama, save_pairs

SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "head_dim": 32}
BLOOM = {"hidden_size": 128, "n_layer": 2, "n_head": 4}
RUN = (
    "--tokenizer-type NullTokenizer --seq-length 32 --train-iters 6 --global-batch-size 4 --micro-batch-size 2 "
    "--lr 2e-2 --log-interval 1 --num-workers 0"
)
RANK = 8
FIRST = "base_model.model.model.layers.0."
OUT, Q, DOWN = (f"{FIRST}{name}.lora_" for name in ("self_attn.o_proj", "self_attn.q_proj", "mlp.down_proj"))
Tensors = dict[str, Tensor]


def trained(folder: Path, *flags: str, family: str = "Llama") -> tuple[Path, Path]:
    """(base, run) of some steps, which move log-probabilities by far more than rounding does."""
    base, data = folder / "base", save_pairs(folder / "pairs.jsonl")
    if family == "Llama":
        save_llama(base, **SIZES)
    else:
        torch.manual_seed(0)
        sizes = BLOOM if family == "Bloom" else {**SIZES, "max_position_embeddings": 256, "tie_word_embeddings": False}
        config = getattr(transformers, f"{family}Config")(**sizes, vocab_size=VOCAB_SIZE)
        model = getattr(transformers, f"{family}ForCausalLM")(config)
        draw_parameters(model, std=0.08)
        model.save_pretrained(base)
    words = [*RUN.split(), "--vocab-size", str(VOCAB_SIZE - 1), "--pretrained-checkpoint", str(base), *flags]
    assert train.main([*words, "--train-data-path", str(data), "--save", str(folder / "run")]) == 0
    return base, folder / "run"


def _renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name.replace(old, new): x for name, x in tensors.items()}


def _without(part: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: x for name, x in tensors.items() if part not in name}


def _changed(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, name: change(tensors[name]).contiguous()}


def _swapped(tensors: Tensors) -> Tensors:
    """A and B of a square layer, each as the other: the shapes are right."""
    A, B = f"{OUT}A.weight", f"{OUT}B.weight"
    return {**tensors, A: tensors[B].T.contiguous(), B: tensors[A].T.contiguous()}


def _transposed(tensors: Tensors) -> Tensors:
    return {name: x.T.contiguous() for name, x in tensors.items()}


# What is done to the tensors, and which fields of the adapter's config are changed.
SILENT_IN_NAMES: dict[str, Callable[[Tensors], Tensors]] = {
    "wrong prefix": _renamed("base_model.model.model.", "base_model.model."),
    "one wrong prefix": _renamed(OUT, OUT.replace("model.model.model", "model.model")),
    "absent layer": _renamed("layers.1.", "layers.7."),
    "wrong parent": _renamed("self_attn.o_proj", "mlp.o_proj"),
    "dropped module": _without(DOWN),
    "dropped A of q": _without(f"{Q}A"),
    "dropped B of o": _without(f"{OUT}B"),
    "unknown module": _renamed("o_proj", "out_proj"),
    "half of B's rows": _changed(f"{DOWN}B.weight", lambda x: x[: len(x) // 2]),
    "half of A's columns": _changed(f"{DOWN}A.weight", lambda x: x[:, : x.shape[1] // 2]),
    "A's rank is not B's": _changed(f"{DOWN}A.weight", lambda x: x[: RANK // 2]),
    "B too large": _changed(f"{DOWN}B.weight", lambda x: torch.cat([x, x])),
    "transposed factors": _transposed,
    "not finite": _changed(f"{OUT}B.weight", lambda x: x * float("nan")),
    "empty": lambda tensors: {},
}
SILENT_IN_CONFIG: dict[str, dict[str, Any]] = {
    "rank cut": {"r": RANK // 2, "lora_alpha": RANK},
    "rank above the tensors'": {"r": 2 * RANK, "lora_alpha": 4 * RANK},
    "DoRA": {"use_dora": True},
    "bias": {"bias": "all"},
}
SILENT_IN_NUMBERS: dict[str, Any] = {
    "alpha doubled": {"lora_alpha": 64},
    "flag of rsLoRA": {"use_rslora": True},
    "swapped square factors": _swapped,
}


def spoilt(adapter: Path, folder: Path, how: Any) -> Path:
    """A copy with its tensors or its settings changed."""
    shutil.copytree(adapter, folder)
    file, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    if isinstance(how, dict):
        config.write_text(json.dumps({**json.loads(config.read_text()), **how}))
    else:
        save_file(how(load_file(file)), file)
    return folder
