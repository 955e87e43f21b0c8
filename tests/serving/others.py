"""Adapters' folders as other trainers write them; none of these is installed, their code was read.

Those that save with HF PEFT are made with it, from the settings that they give it. Megatron-Bridge and mcore-bridge
write the file themselves, and are imitated.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FUSED = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}  # part: first part of the same fused layer


def _llama(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def log_probs_of_hf_peft(base: Path, folder: Path, tokens: Tensor) -> Tensor:  # [b, s] -> [b, s, vocabulary]
    with torch.inference_mode():
        return PeftModel.from_pretrained(_llama(base), folder).eval()(tokens).logits.log_softmax(-1)


def hf_peft(base: Path, folder: Path, **settings: Any) -> Path:
    """Random factors, large enough to move log-probabilities."""
    model = get_peft_model(_llama(base), LoraConfig(task_type="CAUSAL_LM", **{"r": 8, "lora_alpha": 16, **settings}))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data.normal_(std=0.1)
    model.save_pretrained(folder)
    return folder


def axolotl(base: Path, folder: Path) -> Path:
    """axolotl-ai-cloud/axolotl 0.18.0, src/axolotl/loaders/adapter.py: _build_peft_lora_config."""
    patterns: Any = {"rank_pattern": {"q_proj": 4, "down_proj": 16}, "alpha_pattern": {"down_proj": 8}}
    chosen: Any = {"exclude_modules": ["k_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}
    return hf_peft(base, folder, target_modules=LINEARS, target_parameters=[], **patterns, **chosen)


def unsloth(base: Path, folder: Path, **changes: Any) -> Path:
    """unslothai/unsloth 2026.8.19, unsloth/models/llama.py: finetune_last_n_layers becomes layers_to_transform.

    auto_mapping: unslothai/unsloth-zoo 2026.8.13, unsloth_zoo/hf_utils.py.
    """
    mapping = {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers.models.llama.modeling_llama"}
    hf_peft(base, folder, **{"target_modules": LINEARS, "layers_to_transform": [1], **changes})
    return _with_settings(folder, auto_mapping={**mapping, "unsloth_fixed": True})


def unsloth_pattern(base: Path, folder: Path) -> Path:
    """unslothai/unsloth-zoo 2026.8.13, unsloth_zoo/peft_utils.py: get_peft_regex."""
    parts, linears = "self_attn|attention|attn|mixer|mlp|feed_forward|ffn|dense", f"(?:{'|'.join(LINEARS)})"
    nested = rf"(?:.*?(?:vision|image|visual|patch|language|text).*?(?:{parts}).*?{linears})"
    targets = rf"{nested}|(?:\bmodel\.layers\.[\d]{{1,}}\.(?:{parts})\.(?:{linears}))"
    return unsloth(base, folder, target_modules=targets, layers_to_transform=None)


def ms_swift(base: Path, folder: Path) -> Path:
    """modelscope/ms-swift 4.6.0.dev0, swift/pipelines/train/tuner.py and swift/tuners/peft.py."""
    hf_peft(base, folder, target_modules=LINEARS, modules_to_save=[], use_rslora=True)
    added = {"lora_dtype": None, "lorap_lr_ratio": None, "lorap_emb_lr": 1e-6}
    (folder / "additional_config.json").write_text(json.dumps(added))
    return folder


def megatron_swift(base: Path, folder: Path) -> Path:
    """modelscope/ms-swift 4.6.0.dev0, swift/megatron/init.py; mcore-bridge 1.3.0.dev0, bridge/gpt_bridge.py."""
    ms_swift(base, folder)
    _share_A(folder)
    return _with_settings(folder, base_model_name_or_path=None)


def megatron_bridge(base: Path, folder: Path) -> Path:
    """NVIDIA-NeMo/Megatron-Bridge 0.7.0, models/conversion: save_hf_adapter, build_adapter_config_dict; its LoRA."""
    hf_peft(base, folder, target_modules=LINEARS)
    _share_A(folder)
    written: Any = {"peft_type": "LORA", "auto_mapping": None, "base_model_name_or_path": str(base), "bias": "none"}
    written |= {"fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True, "lora_alpha": 16}
    written |= {"lora_dropout": 0.0, "modules_to_save": None, "r": 8, "rank_pattern": {}, "alpha_pattern": {}}
    written |= {"target_modules": sorted(LINEARS), "task_type": "CAUSAL_LM", "use_dora": False, "use_rslora": False}
    (folder / "adapter_config.json").write_text(json.dumps(written, indent=2))
    return folder


def _share_A(folder: Path) -> None:
    """As the LoRA of a fused layer is split: each part has its rows of B, and the same A. In bf16, as trained."""
    file = folder / "adapter_model.safetensors"
    tensors = {name: x.bfloat16() for name, x in load_file(file).items()}
    for part, first in FUSED.items():
        names = [name for name in tensors if f".{part}.lora_A." in name]
        tensors |= {name: tensors[name.replace(part, first)].clone() for name in names}
    save_file(tensors, file)


def _with_settings(folder: Path, **changes: Any) -> Path:
    config = folder / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))
    return folder


# With the number of modules of two layers that each has.
WRITERS: dict[str, tuple[Callable[[Path, Path], Path], int]] = {
    "HF PEFT": (lambda base, folder: hf_peft(base, folder, target_modules="all-linear"), 14),
    "embeddings": (lambda base, folder: hf_peft(base, folder, target_modules=["q_proj", "embed_tokens", "lm_head"]), 4),
    "Axolotl": (axolotl, 6),
    "Unsloth": (unsloth, 7),
    "Unsloth's pattern": (unsloth_pattern, 14),
    "ms-swift": (ms_swift, 14),
    "Megatron-SWIFT": (megatron_swift, 14),
    "Megatron-Bridge": (megatron_bridge, 14),
}
