"""Open and load --pretrained-checkpoint: a Hugging Face folder or a base model in Megatron's format."""

import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from megatron_peft.adapters.quantized_weight import QuantizedWeight, stored_tensors
from megatron_peft.checkpoint import folders, load, run_record
from megatron_peft.config import LINEAR_MODULES, ConfigurationError, RunConfig, require, require_packages
from megatron_peft.conversion.hf_files import (
    CONFIG,
    NUMBER_TYPES,
    OUTPUT_WEIGHT,
    ReadCounts,
    Source,
    check_inventory,
    open_source,
    row_ranges,
)
from megatron_peft.conversion.megatron_files import EMBEDDING, OUTPUT, MegatronWeights, open_megatron
from megatron_peft.conversion.nf4_files import NF4Source, unpacked
from megatron_peft.models.families import read_shape, rules_for
from megatron_peft.models.rules import Columns, HFTensor, RowRange, Rule, expected_tensors
from megatron_peft.models.shape import ModelShape, check_layout, check_lengths, check_quantized, compare_shape, is_size
from megatron_peft.parallel.collectives import (
    Wait,
    columns_from_rows_over_tensor_parallel,
    from_first_rank,
    require_same,
    share_of_rows,
    start_broadcast,
)
from megatron_peft.runtime.launch import checked_together, place_on_node, wait_for_device
from megatron_peft.runtime.progress import progress_bar

LOCAL_LAYER = re.compile(r"^(decoder\.layers\.\d+)(?=\.)")
Weights = Source | MegatronWeights  # an open base model


def read_model_shape(folder: str | Path) -> ModelShape:
    """Shape of the base model in `folder`, from its config.json, a run's record or Megatron-LM's arguments.

    Raises ConfigurationError: it is not the folder of a supported model.
    """
    files = folders.megatron_files(folder)
    if files is None:
        return read_shape(folder)
    with_config = next((place for place in (files, Path(folder)) if (place / CONFIG).is_file()), None)
    if with_config is not None:
        return read_shape(with_config)
    if (files / folders.RECORD).is_file():
        return run_record.read_record(files).shape
    return shape_of_arguments(open_megatron(files).arguments, str(files))


WAY_OUT = "provide the model's config.json: put it into the folder, or give its folder with --pretrained-checkpoint."
# Arguments of a Llama, or of a Qwen, in Megatron-LM; other values compute something else.
LLAMA_LIKE = {
    "swiglu": True, "normalization": "RMSNorm", "position_embedding_type": "rope", "rotary_percent": 1.0,
    "use_rope_scaling": False, "qk_l2_norm": False, "window_size": None, "num_experts": None,
    "multi_latent_attention": False, "rotary_interleaved": False, "layernorm_zero_centered_gamma": False,
    "apply_layernorm_1p": False, "apply_residual_connection_post_layernorm": False, "no_rope_freq": None,
    "rotary_seq_len_interpolation_factor": None, "softmax_type": "vanilla", "activation_func_clamp_value": None,
    "glu_linear_offset": 0.0,
}  # fmt: skip


def shape_of_arguments(arguments: Any, where: str) -> ModelShape:
    """Shape of a Llama, Qwen2 or Qwen3 from Megatron-LM's arguments; `where` names the checkpoint in errors.

    Raises ConfigurationError: there are no arguments, they describe another kind of model, or they lack the size of the
    vocabulary before padding.
    """
    require(arguments is not None, f"{where} does not say what model it is: {WAY_OUT}")
    given = vars(arguments)
    other = [
        f"{name} {given[name]!r}" for name, value in LLAMA_LIKE.items() if given.get(name, value) not in (value, None)
    ]
    require(not other, f"{where} was trained with {', '.join(other)}, which is not read from arguments: {WAY_OUT}")
    sizes = {name: given.get(name) for name in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")}
    odd = [f"{name} {str(value)[:40]}" for name, value in sizes.items() if not is_size(value)]
    require(not odd, f"the arguments in {where} have {', '.join(odd)}, which is not a size: {WAY_OUT}")
    require(
        given.get("vocab_size") is not None,
        f"{where} holds a vocabulary padded to {given.get('padded_vocab_size')} rows and does not say from how many: "
        f"{WAY_OUT}",
    )
    biases = LINEAR_MODULES if given.get("add_bias_linear") else ["linear_qkv"] if given.get("add_qkv_bias") else []
    has_head_norms = bool(given.get("qk_layernorm"))
    require(
        not (biases and has_head_norms),
        f"{where} was trained with qk_layernorm and with biases, which is not read from arguments: {WAY_OUT}",
    )
    # The family whose config.json can say what differs from a Llama.
    family = "qwen3" if has_head_norms else "qwen2" if list(biases) == ["linear_qkv"] else "llama"
    heads = sizes["num_attention_heads"]
    grouped = given.get("group_query_attention")
    return ModelShape(
        architecture=family,
        **sizes,
        num_query_groups=given.get("num_query_groups") or heads if grouped else heads,
        kv_channels=given.get("kv_channels") or sizes["hidden_size"] // heads,
        vocab_size=given["vocab_size"],
        max_position_embeddings=given.get("max_position_embeddings") or 2048,
        norm_epsilon=given.get("norm_epsilon", given.get("layernorm_epsilon", 1e-5)),
        linear_biases=frozenset(biases),
        qk_layernorm=has_head_norms,
        tied_embeddings=not given.get("untie_embeddings_and_output_weights"),
        rotary_base=float(given.get("rotary_base") or 10000),
    )


def open_weights(folder: str | Path, shape: ModelShape) -> tuple[dict[str, Rule], Weights]:
    """The rule of every parameter, by name, and the weights. Headers are checked; no layer is read yet.

    Raises ConfigurationError: missing, extra or misshapen tensors, a tied output layer that is not the embedding, torn
    files, or a folder of adapters.
    """
    files = folders.megatron_files(folder)
    if files is None:
        source = unpacked(open_source(folder))
        require(
            len(source.headers) >= shape.num_layers,  # a wrong number of layers could take minutes
            f"the tensors in {folder} do not fit its config.json: {len(source.headers)} tensors, {shape.num_layers:,} "
            "layers.",
        )
        rules = rules_for(shape, source.headers)
        check_inventory(source, expected_tensors(rules), shape.tied_embeddings)
        header = source.headers.get(OUTPUT_WEIGHT)
        if shape.tied_embeddings and header is not None and header.dtype in NUMBER_TYPES:
            output = replace(rules[OUTPUT], hf_tensors=(HFTensor(OUTPUT_WEIGHT, header.shape),))
            _check_tied(source, OUTPUT_WEIGHT, output, rules[EMBEDDING])
        return rules, source
    weights = open_megatron(files)
    rules = rules_for(shape)
    weights.check(owned_rules(rules, shape))
    if shape.tied_embeddings:  # the last pipeline stage has its own copy
        if weights.find(rules[OUTPUT]) is not None:
            _check_tied(weights, OUTPUT, rules[OUTPUT], rules[EMBEDDING])
        rules[OUTPUT] = replace(rules[OUTPUT], name=EMBEDDING)
    return rules, weights


def _check_tied(weights: Weights, name: str, output: Rule, embedding: Rule) -> None:
    """Raise ConfigurationError if a model that is called tied has an output layer that is not its embedding.

    name: of the output layer in the files. A few rows are read, evenly spaced.
    """
    (ours,), (theirs,) = output.hf_tensors, embedding.hf_tensors
    is_same, num_rows = ours.shape == theirs.shape, theirs.shape[0]
    for at in sorted({(num_rows - 1) * nth // 15 for nth in range(16)}) if is_same else ():
        row, (one, other) = slice(at, at + 1), torch.empty(2, 1, *theirs.shape[1:])
        weights.read_rows(output, RowRange(ours.name, row, row), one)
        weights.read_rows(embedding, RowRange(theirs.name, row, row), other)
        is_same = is_same and torch.equal(one, other)
    require(
        is_same,
        f"{weights.folder} has a {name} of its own, which is not the embedding, but its config.json says that they are "
        'tied: set "tie_word_embeddings" to false there if it was trained, or remove the tensor.',
    )


def owned_rules(rules: Mapping[str, Rule], shape: ModelShape) -> dict[str, Rule]:
    """Rules of all parameters except a tied output layer, which is the embedding."""
    return {name: rule for name, rule in rules.items() if not (shape.tied_embeddings and name == OUTPUT)}


def checked_shape(config: RunConfig) -> ModelShape:
    """Shape of the base model. ConfigurationError if it is missing, or contradicts the flags or the layout."""
    base = config.model.pretrained_checkpoint
    assert base is not None
    if config.model.base_precision == "nf4":
        require_packages("nf4", "bitsandbytes")
    shape = read_model_shape(base)
    if dist.get_rank() == 0:  # each rank opens them again when it loads
        open_weights(base, shape)
    problems = [*compare_shape(config.model.shape_flags, shape), *check_layout(config.parallel, shape)]
    problems += check_lengths(config.data, shape)
    problems += check_quantized(config.model, config.parallel.tensor_model_parallel_size, shape)
    if problems:
        raise ConfigurationError(*problems)
    return shape


def known_fingerprint(base: str | Path) -> Mapping[str, str] | None:
    """Fingerprint of a base model's folder; None if it has no files to take it from."""
    try:
        return run_record.fingerprint(str(base))
    except OSError:
        return None


def require_same_model(folder: str | Path) -> None:
    """Raise ConfigurationError on every rank if a node has another model in `folder` than the first one.

    A collective. One rank of each node opens its files; every rank does where the launcher does not tell nodes apart.
    """
    looks = "LOCAL_WORLD_SIZE" not in os.environ or place_on_node().rank == 0
    fingerprint_here = checked_together(lambda: known_fingerprint(folder) or {} if looks else None)
    require_same(fingerprint_here, f"--pretrained-checkpoint {folder}", "another model")


# A byte of a file is read once for all data-parallel replicas: they hold the same slices, so one of them reads a
# parameter and broadcasts it. Columns of a matrix are strided in a file, so each tensor-parallel rank reads its share
# of the rows, which is contiguous, and an all-to-all makes columns of them. Values are converted to the parameter's
# type before they are sent, which gives the same bits as reading alone.
#
# All ranks issue these collectives in the order of the parameters, so no two wait for each other. A rank that fails
# stops reading but goes on taking part, or the others would hang; at the end its error is raised on all ranks.

QUANTIZED_AT_ONCE = 2**21  # numbers
MAX_IN_FLIGHT = 4  # broadcasts that have started and not ended


class LoadReport(NamedTuple):
    """What one rank read, and wall seconds."""

    counts: ReadCounts
    seconds: float


def load_pretrained(
    model_chunks: Sequence[nn.Module],
    folder: str | Path,
    shape: ModelShape,
    *,
    tensor_parallel_rank: int,
    tensor_parallel_size: int,
    progress: bool,
    together: bool = False,
) -> LoadReport:
    """Fill the base parameters of bare GPTModels in place, in their own dtype. Adapters keep their values.

    A collective of all ranks, where there are several. The first one alone reads and checks the headers, and sends
    them. One rank of each other node looks whether its files are the same.

    folder: a Hugging Face folder or a base model in Megatron's format, of the shape that `read_model_shape` gives.
    together: replicas and tensor-parallel ranks read for one another; by default each rank reads its own slices.

    Raises ConfigurationError on every rank. Before a weight is read, for missing, extra, misshapen or truncated tensors
    and for a parameter without a rule; after that, for a file that cannot be read or is damaged.
    """
    start = time.perf_counter()
    files = folders.megatron_files(folder)
    if files is not None and (files / folders.MANIFEST).is_file():
        load.require_whole(files)
    require_same_model(folder)
    if files is not None and not (files / folders.INDEX).is_file():
        # Old files of ranks hold mapped tensors: all open them.
        rules, weights = checked_together(lambda: open_weights(folder, shape))
    else:
        rules, weights = from_first_rank(lambda: open_weights(folder, shape))
        if dist.is_initialized() and dist.get_rank() > 0:
            weights.counts = ReadCounts()  # it received the first rank's
    to_fill = checked_together(lambda: _with_rules(model_chunks, rules, tensor_parallel_size))
    to_fill.sort(key=lambda pair: weights.place(pair[0]))
    num_bytes = sum(tensor.nbytes for _, parameter in to_fill for tensor in stored_tensors(parameter))
    with progress_bar("Loading weights", num_bytes, in_bytes=True, enabled=progress) as advance:
        groups: Any = (None, None)
        if together:
            groups = parallel_state.get_tensor_model_parallel_group(), parallel_state.get_data_parallel_group()
        fill_parameters(to_fill, weights, tensor_parallel_rank, tensor_parallel_size, groups, advance)
    return LoadReport(weights.counts, time.perf_counter() - start)


def base_parameters(chunk: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters of the pretrained model, without adapters, by names that number layers over all stages."""
    for name, parameter in chunk.named_parameters():
        if ".adapter." not in name:
            if local := LOCAL_LAYER.match(name):
                layer: Any = chunk.get_submodule(local[1])
                name = f"decoder.layers.{layer.layer_number - 1}{name[local.end() :]}"  # megatron-core counts from 1
            yield name, parameter


def _with_rules(
    model_chunks: Sequence[nn.Module], rules: Mapping[str, Rule], size: int
) -> list[tuple[Rule, nn.Parameter]]:
    pairs = []
    for name, parameter in (named for chunk in model_chunks for named in base_parameters(chunk)):
        rule = rules.get(name)
        if rule is None:
            raise ConfigurationError(
                f"{name} {list(parameter.shape)} is part of the model, but no tensor of the checkpoint holds it: "
                f"the model was built with another shape than that of --pretrained-checkpoint."
            )
        require(
            rule.accepts(parameter.shape, size),
            f"{name} is {list(parameter.shape)} on a rank, but --pretrained-checkpoint gives "
            f"{list(rule.local_shape(size))} at --tensor-model-parallel-size {size}.",
        )
        pairs.append((rule, parameter))
    return pairs


def _some_rows(rule: Rule, local: Tensor, rank: int, size: int) -> Iterator[tuple[RowRange, slice]]:
    """Few rows of a matrix at a time, which lie together in the files, and where they are in a rank's part of it."""
    ranges = [rows for each in row_ranges(rule, max_elements=QUANTIZED_AT_ONCE).values() for rows in each]
    for part in rule.global_slices(local, rank, size):
        first, own = part.offset[0], part.view.storage_offset() // part.view.shape[1]
        for rows in ranges:
            start, stop = max(rows.megatron.start, first), min(rows.megatron.stop, first + len(part.view))
            if start < stop:
                hf = rows.hf.start - rows.megatron.start
                there = RowRange(rows.name, slice(hf + start, hf + stop), slice(start, stop))
                yield there, slice(own + start - first, own + stop - first)


@dataclass
class _Reader:
    """Reads this rank's parameters. After an exception it reads nothing more, but still takes part in collectives."""

    weights: Weights
    rank: int
    size: int
    group: dist.ProcessGroup | None  # tensor-parallel ranks that read for one another
    failure: Exception | None = None

    def fill(self, rule: Rule, parameter: nn.Parameter) -> None:
        """Read a parameter, a quantized one some rows at a time: no more of it is ever there in full precision."""
        quantized: Any = getattr(parameter, "quantized", None)
        group = self.group if isinstance(rule, Columns) and self.size > 1 else None
        if quantized is not None:
            for rows, own in _some_rows(rule, parameter, self.rank, self.size):
                source = self.weights
                if isinstance(source, NF4Source) and quantized.precision == "nf4" and rows.name in source.in_codes:
                    self._read_rows(source.read_codes, rule, rows, quantized.codes[own], group)
                    self._read_rows(source.read_scales, rule, rows, quantized.scales[own], group)
                    continue
                values = torch.empty((own.stop - own.start, quantized.shape[1]), device=quantized.codes.device)
                self._read_rows(source.read_rows, rule, rows, values, group)
                self._try(quantized.fill_rows, own, values)
            for tensor in stored_tensors(parameter):
                self._try(rule.clear_padding, tensor, self.rank)
        elif group is not None and self.weights.holds_whole_rows(rule, parameter.dtype):
            rows = slice(0, len(parameter))
            there = RowRange(rule.hf_tensors[0].name, rows, rows)
            self._read_rows(self.weights.read_rows, rule, there, parameter.detach(), group)
        else:
            self._try(self.weights.read, rule, parameter.detach(), self.rank, self.size)

    def _read_rows(
        self, how: Callable[..., None], rule: Rule, rows: RowRange, values: Tensor, group: dist.ProcessGroup | None
    ) -> None:
        """Fill `values` with some rows, or a rank's columns of them; the ranks of a group read them for one another."""
        share = slice(0, len(values)) if group is None else share_of_rows(len(values), self.rank, self.size)
        starts = rows.hf.start + share.start, rows.megatron.start + share.start
        num_rows = share.stop - share.start
        width = values.shape[1] * (self.size if isinstance(rule, Columns) else 1)
        whole = torch.empty((num_rows, width), dtype=values.dtype)  # on the host
        if num_rows:
            some = RowRange(rows.name, *(slice(at, at + num_rows) for at in starts))
            self._try(how, rule, some, whole)
        if group is not None:
            columns_from_rows_over_tensor_parallel(whole, values, group)
        else:
            first = self.rank * values.shape[1] if isinstance(rule, Columns) else 0
            values.copy_(whole[:, first : first + values.shape[1]])

    def _try(self, step: Callable[..., Any], *arguments: Any) -> None:
        if self.failure is None:
            try:
                step(*arguments)
            except Exception as error:  # noqa: BLE001 - the other ranks wait for this one in the next collective
                self.failure = error

    def raise_failure(self) -> None:
        if self.failure is not None:
            raise self.failure


def read_trained_values(rule: Rule, weights: Weights, precision: str, dtype: torch.dtype) -> Tensor:  # [out, in]
    """What a run in `dtype` with this --base-precision computes with, in `dtype`."""
    weight: Any = nn.Parameter(torch.empty(rule.local_shape(1), device="meta"), requires_grad=False)
    weight.quantized = QuantizedWeight(precision, weight.shape, dtype, "cpu")
    reader = _Reader(weights, 0, 1, None)
    reader.fill(rule, weight)
    reader.raise_failure()
    return weight.quantized.dense()


@torch.no_grad()
def fill_parameters(
    to_fill: Sequence[tuple[Rule, nn.Parameter]],
    weights: Weights,
    rank: int,
    size: int,
    groups: tuple[dist.ProcessGroup | None, dist.ProcessGroup | None],
    advance: Callable[[int], None],
) -> None:
    """Fill contiguous parameters in place and in this order, which must be the same on all ranks of the groups.

    `advance` is called with the bytes of every parameter that has been read or is being sent.

    Raises on all ranks as `raise_failures` does, if a rank cannot read its part.
    """
    tensor_parallel, replicas = groups
    replica, num_replicas = (0, 1) if replicas is None else (replicas.rank(), replicas.size())
    reader = _Reader(weights, rank, size, tensor_parallel)
    read_bytes = [0] * num_replicas
    in_flight: deque[Wait] = deque()
    for rule, parameter in to_fill:
        held = stored_tensors(parameter)
        num_bytes = sum(tensor.nbytes for tensor in held)
        source = read_bytes.index(min(read_bytes))  # the replica that has read least so far
        read_bytes[source] += num_bytes
        if source == replica:
            reader.fill(rule, parameter)
        in_flight += [start_broadcast(tensor, source, replicas) for tensor in held]
        while len(in_flight) > MAX_IN_FLIGHT:
            in_flight.popleft()()
            wait_for_device()
        advance(num_bytes)
    for wait in in_flight:
        wait()
    checked_together(reader.raise_failure)
