"""The shape of a base model: all that determines which tensors exist and what the forward computes."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal

from megatron_peft.config import DataConfig, LinearSizes, ModelConfig, ParallelConfig, flag, mistyped, require
from megatron_peft.config.model import BLOCK
from megatron_peft.config.training import stages_of_layout

MOST = 2**31 - 1  # of any size, so that products of two sizes fit 64 bits
MOST_LAYERS = 99_999
MOST_EPSILON = 1.0  # a larger epsilon would dominate the norm
_SIZES = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels"),
    *("vocab_size", "max_position_embeddings"),
)


def is_size(value: Any, most: int = MOST) -> bool:
    """Whether it is a whole number from 1 to `most`."""
    return type(value) is int and 0 < value <= most


def is_positive(value: Any) -> bool:
    """Whether it is a number above 0 that float32 rounds neither to 0 nor to infinity."""
    return type(value) in (int, float) and 2.0**-126 <= value < 2.0**128


@dataclass(frozen=True)
class RopeScaling:
    """Llama-3's rope scaling (`rope_type: llama3`); lengths in tokens."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder-only transformer. Names are megatron-core's where it has one.

    `linear_biases` names the linear layers that own a bias (`linear_qkv`, ...): Hugging Face configures attention and
    MLP biases apart, TransformerConfig does not. `qk_layernorm`: queries and keys are normalized, each head by itself,
    before the rotary embedding; the norm is of the same kind and epsilon as the layers' own. `sliding_window`: how many
    positions a query sees, its own included; None: all. The first `num_full_attention_layers` layers have no window.
    The forward has none in any layer: longer sequences are refused.
    """

    architecture: str  # of `models.families.FAMILIES`
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int  # features of one head
    vocab_size: int  # without padding
    max_position_embeddings: int
    normalization: Literal["RMSNorm", "LayerNorm"] = "RMSNorm"
    norm_epsilon: float = 1e-5
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    gated_linear_unit: bool = True
    linear_biases: frozenset[str] = frozenset()
    tied_embeddings: bool = False
    position_embedding: Literal["rope", "alibi"] = "rope"
    rotary_base: float = 10000.0
    rope_scaling: RopeScaling | None = None
    embedding_layernorm: bool = False
    qk_layernorm: bool = False
    sliding_window: int | None = None
    num_full_attention_layers: int = 0

    def __post_init__(self) -> None:
        """All readers pass here, whatever the file. ConfigurationError names the fields at fault."""
        wrong = [name for name in _SIZES if not is_size(getattr(self, name))] or [*mistyped(self)]
        wrong += ["num_layers"] * (not wrong and self.num_layers > MOST_LAYERS)
        wrong += [name for name in ("norm_epsilon", "rotary_base") if not is_positive(getattr(self, name))]
        wrong += ["norm_epsilon"] * (not wrong and self.norm_epsilon > MOST_EPSILON)
        wrong += ["sliding_window"] * (self.sliding_window is not None and not is_size(self.sliding_window))
        shown = ", ".join(f"{name} {str(getattr(self, name))[:40]}" for name in wrong)
        require(not wrong, f"a model's shape cannot have {shown}.")
        require(
            self.num_attention_heads % self.num_query_groups == 0,
            f"{self.num_attention_heads} attention heads cannot share {self.num_query_groups} key-value heads.",
        )

    @property
    def longest_sequence(self) -> int:
        """Positions that the forward computes as the model does."""
        return min(self.max_position_embeddings, self.sliding_window or MOST)

    def padded_vocab_size(self, multiple: int, tensor_parallel_size: int) -> int:
        """Rows of the embedding and of the output layer: `vocab_size` rounded up to a multiple for every rank.

        The padded rows are zero and their logits are masked, so the loss does not depend on them.
        """
        unit = multiple * tensor_parallel_size
        return -(-self.vocab_size // unit) * unit

    def linear_layers(self, tensor_parallel_size: int) -> dict[str, LinearSizes]:
        """The linear layers of each transformer layer, by the end of their names."""
        hidden, ffn, parts = self.hidden_size, self.ffn_hidden_size, 2 if self.gated_linear_unit else 1
        query, head = self.num_attention_heads * self.kv_channels, self.kv_channels
        query_key_value, tp = query + 2 * self.num_query_groups * head, tensor_parallel_size
        return {
            "self_attention.linear_qkv": LinearSizes("column", query_key_value, hidden, tp, head_features=head),
            "self_attention.linear_proj": LinearSizes("row", hidden, query, tp),
            "mlp.linear_fc1": LinearSizes("column", parts * ffn, hidden, tp, num_parts=parts),
            "mlp.linear_fc2": LinearSizes("row", hidden, ffn, tp),
        }


# Flags are compared with the checkpoint's model before any weight is read. Each check returns a list of messages.

# Flags with a value -> the checkpoint's value.
VALUES: Mapping[str, Callable[[ModelShape], Any]] = {
    **{name: attrgetter(name) for name in (*_SIZES, "normalization", "norm_epsilon")},
    "position_embedding_type": attrgetter("position_embedding"),
    "rotary_base": lambda shape: shape.rotary_base if shape.position_embedding == "rope" else "no rotary embedding",
    "rotary_percent": lambda shape: 1.0 if shape.position_embedding == "rope" else "no rotary embedding",
    "rope_scaling_factor": lambda shape: shape.rope_scaling.factor if shape.rope_scaling else "no rope scaling",
}


# Flags without a value -> (whether the checkpoint agrees, what the checkpoint has instead).
CLAIMS: Mapping[str, tuple[Callable[[ModelShape], bool], Callable[[ModelShape], str]]] = {
    "group_query_attention": (
        lambda shape: shape.num_query_groups < shape.num_attention_heads,
        lambda shape: f"one key-value head for each of its {shape.num_attention_heads} attention heads",
    ),
    "use_rotary_position_embeddings": (
        lambda shape: shape.position_embedding == "rope",
        lambda shape: f"position embedding {shape.position_embedding}",
    ),
    "use_rope_scaling": (lambda shape: shape.rope_scaling is not None, lambda shape: "no rope scaling"),
    "swiglu": (lambda shape: shape.gated_linear_unit and shape.activation == "silu", lambda shape: _mlp(shape)),
    "openai_gelu": (
        lambda shape: shape.activation == "gelu_tanh" and not shape.gated_linear_unit,
        lambda shape: _mlp(shape),
    ),
    "add_qkv_bias": (lambda shape: "linear_qkv" in shape.linear_biases, lambda shape: "no bias on linear_qkv"),
    "disable_bias_linear": (
        lambda shape: not shape.linear_biases - {"linear_qkv"},
        lambda shape: f"biases on {', '.join(sorted(shape.linear_biases))}",
    ),
    "qk_layernorm": (lambda shape: shape.qk_layernorm, lambda shape: "no norms of queries and keys"),
    "untie_embeddings_and_output_weights": (lambda shape: not shape.tied_embeddings, lambda shape: "tied embeddings"),
}


def compare_shape(shape_flags: Mapping[str, Any], shape: ModelShape) -> list[str]:
    """A message for each typed flag that contradicts the checkpoint, naming both values.

    Keys are flags with underscores (`num_layers`, `swiglu`): those of `VALUES` and `CLAIMS`, KeyError otherwise. Flags
    that were not typed claim nothing.
    """
    claims, problems = dict(shape_flags), []
    if "num_query_groups" in claims:
        claims.pop("group_query_attention", None)  # num_query_groups is more specific
    for name, typed in claims.items():
        if name in CLAIMS:
            agrees, instead = CLAIMS[name]
            if not agrees(shape):
                problems.append(f"{flag(name)} contradicts the checkpoint, which has {instead(shape)}.")
        elif (actual := VALUES[name](shape)) != typed:
            shown, there = (f"{value:g}" if isinstance(value, float) else str(value) for value in (typed, actual))
            problems.append(f"{flag(name)} {shown} contradicts the checkpoint, which has {there}: leave it out.")
    return problems


def check_layout(parallel: ParallelConfig, shape: ModelShape) -> list[str]:
    """A message for each dimension that does not divide the model, listing the values that do."""
    sizes = {
        "attention heads": shape.num_attention_heads,
        "key-value heads": shape.num_query_groups,
        "hidden features": shape.hidden_size,
        "MLP features": shape.ffn_hidden_size,
    }
    tp, problems = parallel.tensor_model_parallel_size, _pipeline_problems(parallel, shape)
    undivided = [f"{size} {name}" for name, size in sizes.items() if size % tp]
    if undivided:
        problem = f"--tensor-model-parallel-size {tp} does not divide the model's {', '.join(undivided)}: "
        problems = [f"{problem}use {_listed(divisors(math.gcd(*sizes.values())))}.", *problems]
    return problems


def check_quantized(model: ModelConfig, tensor_parallel_size: int, shape: ModelShape) -> list[str]:
    """A message if an output layer that is to be quantized is the embedding; one, with the sizes that fit, if a rank's
    part of a quantized weight would cut a block.
    """
    base_precision = model.base_precision
    if model.quantize_output_layer and shape.tied_embeddings:
        problem = "the output layer of this model is its embedding (tie_word_embeddings), which stays as it is"
        return [f"--quantize-output-layer: {problem}: leave it out."]
    whole = math.gcd(shape.num_attention_heads * shape.kv_channels, shape.ffn_hidden_size)  # what rows are split along
    if base_precision == "run" or (shape.hidden_size % BLOCK == 0 and whole % (tensor_parallel_size * BLOCK) == 0):
        return []
    intro = f"--base-precision {base_precision} has blocks of {BLOCK} input features, and linear layers of this model"
    if shape.hidden_size % BLOCK or whole % BLOCK:
        return [f"{intro} have {shape.hidden_size} and {whole}, which are no multiples of it: leave it out."]
    fitting = [size for size in divisors(math.gcd(whole // BLOCK, shape.num_query_groups))]
    return [
        f"{intro} with {whole} of them cannot be cut into --tensor-model-parallel-size {tensor_parallel_size} parts of "
        f"whole blocks: use {_listed(fitting)}."
    ]


def check_lengths(data: DataConfig, shape: ModelShape) -> list[str]:
    """A message if samples may be longer than a sliding window, or than a rotary model's positions.

    The default --seq-length fits any number of positions, and any window where nothing is trained.
    """
    length, longest, window = data.seq_length, shape.max_position_embeddings, shape.sliding_window
    is_default = length == DataConfig.seq_length
    reads_samples = bool(data.train_data_path or data.data_path)
    if window is not None and length > window and (reads_samples or not is_default):
        full, layers = shape.num_full_attention_layers, shape.num_layers
        where = f"in {layers - full} of its {layers} layers" if full else "in every layer"
        return [
            f"--seq-length {length} is above the sliding window of {window} tokens that the model has {where}, and "
            f"windows are not supported: use --seq-length {window} or less, where the window changes nothing. "
            f"--overlong says what to do with longer samples."
        ]
    if shape.position_embedding == "rope" and length > longest and not is_default:
        return [f"--seq-length {length} is above the {longest} positions of the model: use at most {longest}."]
    return []


def _mlp(shape: ModelShape) -> str:
    return f"{'a gated' if shape.gated_linear_unit else 'an ungated'} MLP with {shape.activation}"


def _pipeline_problems(parallel: ParallelConfig, shape: ModelShape) -> list[str]:
    pp, layers = parallel.pipeline_model_parallel_size, shape.num_layers
    if parallel.decoder_first_pipeline_num_layers or parallel.decoder_last_pipeline_num_layers:
        return _uneven_problems(parallel, shape)
    layout = parallel.pipeline_model_parallel_layout
    if layout is not None:
        held = sum(stage.count("t") for stage in stages_of_layout(layout))
        problem = f"--pipeline-model-parallel-layout {layout} has {held} layers (t), the model {layers}"
        return [] if held == layers else [f"{problem}: every layer stands in it once."]
    divided = parallel.num_divided(layers)
    counted = f"{layers} layers" + (f" ({divided - layers} more accounted for)" if divided > layers else "")
    if divided % pp:
        return [
            f"--pipeline-model-parallel-size {pp} does not divide the model's {counted}: use "
            f"{_listed(divisors(divided))}, or set --decoder-first-pipeline-num-layers and "
            f"--decoder-last-pipeline-num-layers, or --pipeline-model-parallel-layout."
        ]
    chunk = parallel.num_layers_per_virtual_pipeline_stage
    if chunk and (divided // pp) % chunk:
        return [
            f"--num-layers-per-virtual-pipeline-stage {chunk} does not divide the {divided // pp} layers of a stage "
            f"({counted}, over {pp} stages): use {_listed(divisors(divided // pp))}."
        ]
    return []


def _uneven_problems(parallel: ParallelConfig, shape: ModelShape) -> list[str]:
    """The stages whose layers are not given must have equally many, at least one."""
    first, last = parallel.decoder_first_pipeline_num_layers, parallel.decoder_last_pipeline_num_layers
    layers, ends = shape.num_layers, bool(first) + bool(last)
    rest, stages = layers - (first or 0) - (last or 0), parallel.pipeline_model_parallel_size - ends
    if rest == stages == 0 or (stages > 0 and rest > 0 and rest % stages == 0):
        return []
    given = {"decoder_first_pipeline_num_layers": first, "decoder_last_pipeline_num_layers": last}
    shown = " and ".join(f"{flag(name)} {value}" for name, value in given.items() if value)
    fitting = [held for held in range(ends, layers) if (layers - held) % stages == 0] if stages else [layers]
    return [
        f"{shown} leave {rest} of the model's {layers} layers to the other {stages} pipeline stages: "
        f"use {_listed(fitting)} layers in all for those."
    ]


def divisors(number: int) -> list[int]:
    """All of them, ascending."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def _listed(values: list[int]) -> str:
    """`1, 2 or 4`; only the ends of a long list."""
    texts = [str(value) for value in values]
    if len(texts) > 12:
        texts = [*texts[:8], "...", texts[-1]]
    return " or ".join(filter(None, [", ".join(texts[:-1]), texts[-1]])) if texts else "nothing (too few layers)"


# Checked values of a `config.json`. A key that is absent or null has the default; without one it is an error.

Config = Mapping[str, Any]


def size(config: Config, key: str, default: int | None = None, most: int = MOST) -> int:
    """A count or a length."""
    value = _value(config, key, default)
    require(
        is_size(value, most), f"{key} is {_shortened(value)}; it must be a whole number above 0 and at most {most:,}."
    )
    return value


def number(config: Config, key: str, default: float | None = None, most: float = math.inf) -> float:
    """A positive number that float32 can hold."""
    value = _value(config, key, default)
    limit = "" if most == math.inf else f" and at most {most:g}"
    require(
        is_positive(value) and value <= most,
        f"{key} is {_shortened(value)}; it must be a number above 0{limit}, which float32 can hold.",
    )
    return float(value)


def switch(config: Config, key: str, default: bool = False) -> bool:
    """true or false."""
    value = _value(config, key, default)
    require(type(value) is bool, f"{key} is {_shortened(value)}; it must be true or false.")
    return value


def _value(config: Config, key: str, default: Any) -> Any:
    value = config.get(key)
    value = default if value is None else value
    require(value is not None, f"{key} is missing.")
    return value


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
