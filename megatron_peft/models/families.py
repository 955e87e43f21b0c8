"""Model families: what a family's file declares, and what follows from it, without torch or transformers.

A family is one file that defines `FAMILY`, and one line in `FAMILIES`; docs/new-model.md adds one.
"""

import json
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Set
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from megatron_peft.config import ConfigurationError, ParallelConfig, PeftConfig, is_targeted, require, require_matches
from megatron_peft.config.sources import not_a_folder
from megatron_peft.config.untrusted import read_json_object
from megatron_peft.models.rules import Columns, FusedRows, HFTensor, Replicated, Rule, vocabulary_rules
from megatron_peft.models.shape import Config, ModelShape, check_layout

logger = logging.getLogger(__name__)

FAMILIES = {  # model_type -> the module that defines its `FAMILY`, imported at first use
    "llama": "megatron_peft.models.llama",
    "bloom": "megatron_peft.models.bloom",
    "mistral": "megatron_peft.models.mistral",
    "qwen2": "megatron_peft.models.qwen2",
    "qwen3": "megatron_peft.models.qwen3",
}

# Keys of any family that change the computation -> the values that do not.
REFUSED: dict[str, tuple[Any, ...]] = {
    "compression_config": (None,),
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
    "pruned_heads": (None, {}),
}
# Keys that do not concern the shape: bookkeeping, tokens, generation, dropout (a flag of the run).
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
class WeightNames:
    """Hugging Face's names of a decoder's modules, from which the rules for all parameters follow."""

    prefix: str  # of all names but `output`; a model that was saved without its output layer has names without it
    embedding: str
    final_norm: str
    layers: str  # before a layer's number
    input_norm: str  # this and what follows of a layer: before attention
    mlp_norm: str  # before the MLP
    linear_qkv: tuple[str, ...]  # q, k and v; or one module, with rows [key-value head, (its q, k, v), feature]
    linear_proj: str
    linear_fc1: tuple[str, ...]  # gate and up of a gated MLP; or one module
    linear_fc2: str
    query_norm: str = ""  # if the shape has them
    key_norm: str = ""
    embedding_norm: str = ""  # of the whole model, if its shape has one
    output: str = "lm_head"


@dataclass(frozen=True)
class Family:
    """What is particular to one model_type."""

    architectures: tuple[str, ...]  # transformers' classes of the whole language model; the first is the usual one
    shape: Callable[[Config], ModelShape]  # of a config.json; ConfigurationError names the key at fault
    config: Callable[[ModelShape], dict[str, Any]]  # the inverse of `shape`
    read: Set[str]  # keys that `shape` reads, and keys that have no effect
    refused: Mapping[str, tuple[Any, ...]]  # keys that change the computation -> the values that do not
    weights: WeightNames
    vllm_serves_lora: bool = True

    @property
    def modules(self) -> dict[str, str]:
        """Hugging Face's name of a linear layer -> the Megatron layer that contains it, alone or fused with others."""
        names = self.weights
        fused = {
            "linear_qkv": names.linear_qkv,
            "linear_proj": (names.linear_proj,),
            "linear_fc1": names.linear_fc1,
            "linear_fc2": (names.linear_fc2,),
        }
        return {name.rpartition(".")[2]: layer for layer, modules in fused.items() for name in modules}


def family_of(model_type: str) -> Family:
    """A registered family; ConfigurationError otherwise."""
    require(
        str(model_type) in FAMILIES,  # a checkpoint's record may hold anything
        f"model family {str(model_type)[:40]!r} is not supported. Supported: {', '.join(FAMILIES)}; "
        "docs/new-model.md adds one.",
    )
    return import_module(FAMILIES[model_type]).FAMILY


def read_shape(folder: str | Path) -> ModelShape:
    """Shape of the model in `folder`. ConfigurationError names the file and the key at fault."""
    path = Path(folder)
    require(path.is_dir(), not_a_folder(str(folder), "--pretrained-checkpoint"))
    require(
        (path / "config.json").is_file(),
        f"--pretrained-checkpoint {path} holds no config.json: it is not a Hugging Face model folder.",
    )
    return read_shape_of_file(path / "config.json")


def read_shape_of_file(path: Path) -> ModelShape:
    """Shape of the model that a config.json describes, whatever the file is called. Raises as `read_shape` does."""
    config = read_json_object(path)
    supported = ", ".join(family_of(name).architectures[0] for name in FAMILIES)
    model_type, named = config.get("model_type"), config.get("architectures") or []
    require(
        isinstance(named, list) and all(isinstance(name, str) for name in named),
        f"{path}: architectures is {str(named)[:40]}, not a list of names.",
    )
    require(
        isinstance(model_type, str)
        and model_type in FAMILIES
        and set(named) <= set(family_of(model_type).architectures),
        f"{path} describes {', '.join(named) or 'a model'} of model_type {model_type!r}, which is not supported. "
        f"Supported: {supported}; docs/new-model.md adds a family.",
    )
    family = family_of(config["model_type"])
    known = {**REFUSED, **family.refused}
    refused = [key for key, accepted in known.items() if config.get(key) not in accepted]
    shown = ", ".join(f"{key}={json.dumps(config[key])[:80]}" for key in refused)
    _require_readable(path, config.get("quantization_config"))
    require(not refused, f"{path} uses unsupported settings: {shown}. Use a checkpoint without it.")
    for key in ("dtype", "torch_dtype"):
        named = config.get(key)
        require(
            named is None or str(named).removeprefix("torch.") in NUMBER_TYPES,
            f"{path}: {key} is {json.dumps(named)[:80]}; it must be {', '.join(sorted(NUMBER_TYPES))} or null.",
        )
    unknown = sorted(config.keys() - family.read - HARMLESS - known.keys() - {"quantization_config"})
    if unknown:
        # transformers' own class does not define them either.
        logger.warning("%s: unknown keys are ignored: %s", path, ", ".join(unknown))
    try:
        return family.shape(config)
    except ConfigurationError as error:
        raise ConfigurationError(f"{path}: {error}") from None


def _require_readable(path: Path, quantization: Any) -> None:
    """Raises ConfigurationError for weights that are quantized in another way than bitsandbytes' NF4."""
    config = quantization if isinstance(quantization, dict) else {"quant_method": quantization}
    is_nf4 = bool(config.get("load_in_4bit")) and config.get("bnb_4bit_quant_type") == "nf4"
    is_nf4 = is_nf4 and config.get("quant_method", "bitsandbytes") == "bitsandbytes"
    method = str(config.get("quant_method", "an unknown method"))[:40]
    require(
        quantization is None or is_nf4,
        f"{path}: the weights are quantized (quantization_config: {method}), and only the NF4 of bitsandbytes is read. "
        f"Take the model that they were made from, with --base-precision nf4 or fp8.",
    )


def check_adapters(peft: PeftConfig, parallel: ParallelConfig, shape: ModelShape) -> list[str]:
    """Messages of what --peft-target-modules and the method's numbers do not fit; `attach_adapters` checks the same."""
    if not peft.trains_adapters or check_layout(parallel, shape):
        return []  # sizes that do not divide have messages of their own
    kinds, modules = shape.linear_layers(parallel.tensor_model_parallel_size), family_of(shape.architecture).modules
    layers = [(f"decoder.layers.{layer}.{name}", kinds[name]) for layer in range(shape.num_layers) for name in kinds]
    try:
        require_matches(peft.target_modules, [name for name, _ in layers], modules)
        for name, sizes in layers:
            if is_targeted(name, peft.target_modules, modules):
                peft.spec.check_layer(peft, sizes, name)
    except ConfigurationError as error:
        return list(error.problems)
    return []


def config_of_shape(shape: ModelShape) -> dict[str, Any]:
    """A config.json for a model without one; `read_shape` gives the shape back."""
    family = family_of(shape.architecture)
    return {"architectures": [family.architectures[0]], "model_type": shape.architecture, **family.config(shape)}


def rules_for(shape: ModelShape, stored: Collection[str] = ()) -> dict[str, Rule]:
    """The rule of every parameter of the whole model, by Megatron's name; layers are numbered globally from 0.

    stored: tensors of the folder that is read. A model that was saved without its output layer (bigscience's own
        files) has names without the prefix; the rules then have the names of the folder, as in transformers.
    """
    names = family_of(shape.architecture).weights
    rules = vocabulary_rules(shape, names.prefix + names.embedding, names.output)
    if shape.embedding_layernorm:
        rules += _norm_rules(shape, "embedding.word_embeddings_layernorm", names.prefix + names.embedding_norm)
    rules += _norm_rules(shape, "decoder.final_layernorm", names.prefix + names.final_norm)
    for layer in range(shape.num_layers):
        rules += _layer_rules(shape, names, f"decoder.layers.{layer}.", f"{names.prefix}{names.layers}.{layer}.")
    return {rule.name: _as_stored(rule, names.prefix, stored) for rule in rules}


def _norm_rules(shape: ModelShape, megatron: str, hugging_face: str, features: int | None = None) -> Iterator[Rule]:
    """`features` of the norm, if they are not the hidden ones."""
    for kind in ("weight", "bias") if shape.normalization == "LayerNorm" else ("weight",):
        yield Replicated(f"{megatron}.{kind}", (HFTensor(f"{hugging_face}.{kind}", (features or shape.hidden_size,)),))


def _layer_rules(shape: ModelShape, names: WeightNames, megatron: str, hugging_face: str) -> Iterator[Rule]:
    """`megatron` and `hugging_face` are the layer's name on each side, with a dot at the end."""
    hidden, ffn = shape.hidden_size, shape.ffn_hidden_size
    query, key = (heads * shape.kv_channels for heads in (shape.num_attention_heads, shape.num_query_groups))
    yield from _norm_rules(shape, f"{megatron}input_layernorm", f"{hugging_face}{names.input_norm}")
    yield from _norm_rules(shape, f"{megatron}pre_mlp_layernorm", f"{hugging_face}{names.mlp_norm}")
    if shape.qk_layernorm:
        for part, norm in (("q", names.query_norm), ("k", names.key_norm)):
            megatron_norm = f"{megatron}self_attention.{part}_layernorm"
            yield from _norm_rules(shape, megatron_norm, f"{hugging_face}{norm}", shape.kv_channels)
    qkv_rows = (query, key, key) if len(names.linear_qkv) == 3 else (query + 2 * key,)
    qkv, fc1 = partial(FusedRows, num_groups=shape.num_query_groups), partial(FusedRows, num_groups=None)
    for module, linears, rows, in_features, weight_rule, bias_rule in (
        ("self_attention.linear_qkv", names.linear_qkv, qkv_rows, hidden, qkv, qkv),
        ("mlp.linear_fc1", names.linear_fc1, (ffn,) * len(names.linear_fc1), hidden, fc1, fc1),
        ("self_attention.linear_proj", (names.linear_proj,), (hidden,), query, Columns, Replicated),
        ("mlp.linear_fc2", (names.linear_fc2,), (hidden,), ffn, Columns, Replicated),
    ):
        parameters: list[tuple[str, Any, tuple[int, ...]]] = [("weight", weight_rule, (in_features,))]
        if module.rpartition(".")[2] in shape.linear_biases:
            parameters.append(("bias", bias_rule, ()))
        for kind, rule, columns in parameters:
            sizes = {f"{hugging_face}{name}.{kind}": (num, *columns) for name, num in zip(linears, rows, strict=True)}
            yield rule(f"{megatron}{module}.{kind}", tuple(HFTensor(*tensor) for tensor in sizes.items()))


def _as_stored(rule: Rule, prefix: str, stored: Collection[str]) -> Rule:
    def name(tensor: HFTensor) -> str:
        bare = tensor.name.removeprefix(prefix)
        return bare if tensor.name not in stored and bare in stored else tensor.name

    return replace(rule, hf_tensors=tuple(HFTensor(name(tensor), tensor.shape) for tensor in rule.hf_tensors))
