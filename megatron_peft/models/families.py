"""The model families: shapes from a Hugging Face `config.json`, rules for weights. No torch is imported."""

import json
import logging
from collections.abc import Callable, Collection, Mapping, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_peft.config import ConfigurationError, require
from megatron_peft.config.untrusted import read_json_object
from megatron_peft.models import bloom, llama
from megatron_peft.models.rules import HFTensor, Rule
from megatron_peft.models.shape import Config, ModelShape

# The shape of a model from a Hugging Face `config.json`. Plain JSON: neither transformers nor torch is imported.
#
# What a config asks for and the model does not do is refused by name. Keys that transformers' own class does not define
# change nothing there either; they are named in a warning.

logger = logging.getLogger(__name__)

# Keys of any family that change the computation, with the values that leave it as it is.
REFUSED: dict[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "compression_config": (None,),
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
    "pruned_heads": (None, {}),
}
# Bookkeeping, tokens, generation and dropout (a flag of the run): no part of a model's shape.
HARMLESS = {
    "architectures", "model_type", "_name_or_path", "transformers_version", "_attn_implementation_autoset",
    "torch_dtype", "dtype", "use_cache", "initializer_range", "attention_dropout", "hidden_dropout", "bos_token_id",
    "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "decoder_start_token_id", "output_attentions",
    "output_hidden_states", "return_dict", "use_return_dict", "torchscript", "use_bfloat16",
    "chunk_size_feed_forward", "is_decoder", "id2label", "label2id", "num_labels", "problem_type", "finetuning_task",
    "task_specific_params", "tokenizer_class", "prefix", "gradient_checkpointing", "max_sequence_length",
    "max_length", "min_length", "do_sample", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty",
    "length_penalty", "num_beams", "early_stopping", "is_llama_config", "transformers.js_config",
}  # fmt: skip


NUMBER_TYPES = {"float64", "float32", "float16", "bfloat16"}


@dataclass(frozen=True)
class Family:
    """How the configs of one model_type are read, what its linear layers are called, and where its weights go.

    Args:
        architectures: the classes that hold the whole language model; the first is the usual one.
        shape: reads the shape, and raises ConfigurationError with the key at fault.
        read: keys that it reads, or that are known to say nothing about the shape.
        refused: further keys that change the computation, with the values that leave it as it is.
        modules: Hugging Face's name of a linear layer -> Megatron's layer that holds it, fused with others or not.
        rules: of every parameter of a model of this shape.
        prefix: what transformers puts before the names of the model without its output layer.
    """

    architectures: tuple[str, ...]
    shape: Callable[[Config], ModelShape]
    read: Set[str]
    refused: Mapping[str, tuple[Any, ...]]
    modules: Mapping[str, str]
    rules: Callable[[ModelShape], list[Rule]]
    prefix: str


FAMILIES = {
    "llama": Family(
        ("LlamaForCausalLM",),
        llama.llama_shape,
        llama.READ,
        llama.REFUSED,
        llama.MODULES,
        llama.llama_rules,
        "model.",
    ),
    # Embedding and output are one matrix, so that a bare BloomModel is the whole language model.
    "bloom": Family(
        ("BloomForCausalLM", "BloomModel"),
        bloom.bloom_shape,
        bloom.READ,
        bloom.REFUSED,
        bloom.MODULES,
        bloom.bloom_rules,
        "transformer.",
    ),
}


def read_shape(folder: str | Path) -> ModelShape:
    """Shape of the model in `folder`. ConfigurationError names the file and the key at fault."""
    path = Path(folder) / "config.json"
    config = _read_json(path)
    _require_supported_architecture(path, config)
    _refuse_unsupported(path, config)
    try:
        return FAMILIES[config["model_type"]].shape(config)
    except ConfigurationError as error:
        raise ConfigurationError(f"{path}: {error}") from None


def _read_json(path: Path) -> dict[str, Any]:
    require(
        path.parent.is_dir(),
        f"--pretrained-checkpoint {path.parent} is not a folder: give the folder of a downloaded model.",
    )
    require(
        path.is_file(),
        f"--pretrained-checkpoint {path.parent} holds no config.json: it is not a Hugging Face model folder.",
    )
    return read_json_object(path)


def _require_supported_architecture(path: Path, config: Config) -> None:
    supported = ", ".join(family.architectures[0] for family in FAMILIES.values())
    model_type, named = config.get("model_type"), config.get("architectures") or []
    require(
        isinstance(named, list) and all(isinstance(name, str) for name in named),
        f"{path}: architectures is {str(named)[:40]}, not a list of names.",
    )
    require(
        isinstance(model_type, str)
        and model_type in FAMILIES
        and set(named) <= set(FAMILIES[model_type].architectures),
        f"{path} describes {', '.join(named) or 'a model'} of model_type {model_type!r}, which is not supported. "
        f"Supported: {supported}.",
    )


def _refuse_unsupported(path: Path, config: Config) -> None:
    family = FAMILIES[config["model_type"]]
    known = {**REFUSED, **family.refused}
    refused = [key for key, accepted in known.items() if config.get(key) not in accepted]
    told = ", ".join(f"{key}={json.dumps(config[key])[:80]}" for key in refused)
    require(not refused, f"{path} asks for what is not supported: {told}. Use a checkpoint without it.")
    for key in ("dtype", "torch_dtype"):
        named = config.get(key)
        require(
            named is None or str(named).removeprefix("torch.") in NUMBER_TYPES,
            f"{path}: {key} is {json.dumps(named)[:80]}; it must be {', '.join(sorted(NUMBER_TYPES))} or null.",
        )
    unknown = sorted(config.keys() - family.read - HARMLESS - known.keys())
    if unknown:
        logger.warning("%s: keys without a meaning for this model are ignored: %s", path, ", ".join(unknown))


def rules_for(shape: ModelShape, stored: Collection[str] = ()) -> dict[str, Rule]:
    """Every rule of the model by Megatron parameter name (global layer numbers).

    Args:
        stored: tensors of the folder that is read. A model that was saved without its output layer (bigscience's own
            files) has names without the prefix; the rules then have the names of the folder, as in transformers.
    """
    family = FAMILIES[shape.architecture]
    rules = {rule.name: rule for rule in family.rules(shape)}
    return {name: _as_stored(rule, family.prefix, stored) for name, rule in rules.items()}


def _as_stored(rule: Rule, prefix: str, stored: Collection[str]) -> Rule:
    def name(part: HFTensor) -> str:
        bare = part.name.removeprefix(prefix)
        return bare if part.name not in stored and bare in stored else part.name

    return replace(rule, hf_tensors=tuple(HFTensor(name(part), part.shape) for part in rule.hf_tensors))
