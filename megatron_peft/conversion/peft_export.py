"""A run's adapters as a folder of Hugging Face PEFT, in the form of their method or, for any method, as a LoRA."""

import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_peft.adapters import low_rank
from megatron_peft.checkpoint.folders import megatron_files, new_folder
from megatron_peft.checkpoint.run_record import ADAPTER_CONFIG
from megatron_peft.config import ConfigurationError, PeftConfig, PeftFormat, methods, require, sources
from megatron_peft.conversion.hf_files import copy_trained_tokenizer
from megatron_peft.conversion.lora_approximation import RunAsLora, approximate
from megatron_peft.conversion.model_card import NUM_TOKENS, Exported, add_logits, check_export, write_card
from megatron_peft.conversion.trained_adapters import (
    PREFIX,
    Run,
    TrainedAdapters,
    base_of,
    open_adapters,
    open_run,
    rows_of_modules,
    shortest_targets,
)
from megatron_peft.conversion.verify import Difference, LogitComparison, logits_change
from megatron_peft.conversion.writer import write_safetensors
from megatron_peft.models.families import rules_for


class PeftAdapter(NamedTuple):
    """An adapter of HF PEFT: fields of its config, and its tensors by name, each computed when its turn comes."""

    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    tensors: Callable[[], Iterable[tuple[str, Tensor]]]  # in the order of `shapes`


def in_own_form(adapters: TrainedAdapters) -> PeftAdapter:
    """A run's adapter in the form of its method. ConfigurationError: HF PEFT cannot express the method."""
    record, peft = adapters.record, adapters.record.config.peft
    form = form_of(peft)
    if form is None:
        raise ConfigurationError(
            f"--input {adapters.folder}: HF PEFT has no equivalent of --peft-method {peft.method}. "
            f"{methods.OTHER_EXPORTS}."
        )
    rules = [
        rule for rule in rules_for(record.shape).values() if rule.is_linear and rule.layer in record.adapted_layers
    ]
    sizes: dict[str, Any] = {module: size for rule in rules for module, size in rule.modules.items()}
    targets = shortest_targets(sizes, record.shape.num_layers)
    config = form.config(peft, targets)
    shared = form.shared(peft, sizes)
    shapes = {name: (*tensor.shape,) for name, tensor in shared.items()}
    for module, size in sizes.items():
        shapes |= {f"{PREFIX}{module}.{name}": shape for name, shape in form.shapes(config, *size).items()}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        yield from shared.items()
        for rule in rules:
            layer = rule.layer
            tensors = form.tensors(adapters.of(layer), peft, layer, rule.local_shape(1)[0])
            rows = {name: rows_of_modules(rule, tensors[name]) for name in form.rows}
            for module, name in product(rule.modules, tensors):
                yield f"{PREFIX}{module}.{name}", rows[name][module] if name in rows else tensors[name]

    return PeftAdapter(_config(targets, config), shapes, tensors)


def form_of(peft: PeftConfig) -> PeftFormat | None:
    """How HF PEFT writes the method's adapters; None if it cannot."""
    return getattr(import_module(peft.spec.adapter), "EXPORT", None)


def is_exportable(peft: PeftConfig) -> bool:
    """Return True if HF PEFT can express the method with its settings."""
    form = form_of(peft)
    try:
        return form is not None and bool(form.config(peft, []))
    except ConfigurationError:
        return False


def _config(target_modules: Sequence[str], own: Mapping[str, Any]) -> Mapping[str, Any]:
    """`own`: the fields of its kind of adapter."""
    known = {"task_type": "CAUSAL_LM", "base_model_name_or_path": None, "inference_mode": True}
    return {**known, "target_modules": list(target_modules), "modules_to_save": None, **own}


def export_adapter(
    input: Run,
    output: str | Path,
    *,
    pretrained_checkpoint: str | Path | None = None,
    license: str | None = None,
    num_tokens: int | None = None,
) -> Path:
    """Write `output`, which `peft.PeftModel.from_pretrained(base, output)` opens; print what has to be known of it.

    `input` is the --save folder of a run, of any layout; `pretrained_checkpoint` its base, if it is not where the run
    says. The base's weights are not read. `license` is that of the model card; None takes the base's. Logits are then
    compared on `num_tokens`, as by `add_logits`.

    Raises ConfigurationError: before anything is written: no checkpoint or no adapters, a method that HF PEFT cannot
    express, another base, an output that exists, damaged files.
    """
    check_export(output, license)
    adapters = open_adapters(input)
    record, adapter = adapters.record, in_own_form(adapters)
    base = record.config.model.pretrained_checkpoint
    if pretrained_checkpoint is not None or Path(base or "").is_dir():
        base = str(base_of(adapters, pretrained_checkpoint))
    named, rank = _opened_by_others(base), adapter.config.get("r")
    _write(Exported(adapters.folder, record, Path(output), named, True, rank, license), adapter, num_tokens)
    form = form_of(record.config.peft)
    assert form is not None
    print(form.note(record.config.peft), end="", flush=True)
    return Path(output)


def _opened_by_others(base: str | None) -> str | None:
    """The base's name; None, which is printed, if it is in Megatron's form."""
    if base is None or megatron_files(base) is None:
        return base
    print(
        f"The base model {base} is in Megatron's form, which HF PEFT does not open, so the adapter names none: "
        f"megatron-peft convert megatron-to-hf makes a Hugging Face folder of it, to put the adapter on."
    )
    return None


def _write(card: Exported, adapter: PeftAdapter, num_tokens: int | None) -> None:
    """Write the folder of an adapter: its config, its weights in one file, since HF PEFT has no shards, and a card."""
    base = card.base
    config = {**adapter.config, "base_model_name_or_path": sources.hub_name(base or "") or base}
    specs = {name: torch.empty(shape, dtype=torch.float32, device="meta") for name, shape in adapter.shapes.items()}
    with new_folder(card.output) as draft:
        (draft / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        write_safetensors(draft, specs, adapter.tensors(), max_shard_bytes=sys.maxsize, stem="adapter_model")
        copy_trained_tokenizer(card.record.config.data, draft)
        write_card(draft, card)
    add_logits(card, num_tokens)


# As a LoRA. The modules' ranks differ. PEFT could say so (rank_pattern), but most versions of vLLM read one rank and
# one alpha: all are padded with zeros to the largest rank, which changes no result, and alpha is that rank, so that the
# scale is 1. vLLM reserves the largest rank for every module anyway.

TOLERANCE, MAX_RANK = 0.05, 256
MOST_NAMED = 6  # parameters that are left out, the largest changes first
LogitsChange = tuple[LogitComparison, list[Difference]]


def in_lora_form(lora: RunAsLora, num_layers: int) -> PeftAdapter:
    """A LoRA that stands for a run, of a model with that many layers."""
    targets = shortest_targets((module.module for module in lora.modules), num_layers)
    shapes = {
        f"{PREFIX}{module.module}.{name}": shape
        for module in lora.modules
        for name, shape in low_rank.EXPORT.shapes(
            {"r": lora.rank}, len(module.factors.B), module.factors.A.shape[1]
        ).items()
    }

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for module in lora.modules:
            for name, tensor in vars(module.factors.padded(lora.rank)).items():
                yield f"{PREFIX}{module.module}.lora_{name}.weight", tensor

    settings = PeftConfig(lora_rank=lora.rank, lora_alpha=lora.rank)
    return PeftAdapter(_config(targets, low_rank.EXPORT.config(settings, targets)), shapes, tensors)


def export_as_lora(
    input: Run,
    output: str | Path,
    *,
    pretrained_checkpoint: str | Path | None = None,
    tolerance: float = TOLERANCE,
    max_rank: int = MAX_RANK,
    num_tokens: int = NUM_TOKENS,
    license: str | None = None,
    progress: bool = True,
    refused_above: float | None = None,
) -> Path:
    """Write `output`, and print rank, residual and change of logits of every layer. As `export_adapter`, and:

    input: the --save folder of a run, of any method and layout, full fine-tuning included.
    tolerance: relative Frobenius error of each module's change of weight.
    max_rank: of a module.
    num_tokens: of each of two random sequences on which logits are compared, which takes the memory of one model
        in float32; 0 leaves the comparison out.
    refused_above: an error of a module that `max_rank` leaves and that is none any more.

    Raises ConfigurationError: before anything is written: no checkpoint, another base, a limit that cannot be used, an
    output that exists, damaged files, an error that is refused.
    """
    check_export(output, license)
    require(0 <= tolerance < 1, f"--tolerance is {tolerance:g}; it is a relative error, at least 0 and below 1.")
    require(max_rank > 0, f"--max-rank is {max_rank}; it must be above 0.")
    require(num_tokens >= 0, f"--num-tokens is {num_tokens}; it cannot be negative.")
    run = open_run(input)
    base = base_of(run, pretrained_checkpoint)
    lora = approximate(run, base, tolerance, max_rank, progress, refused_above)
    change = logits_change(run, base, lora, num_tokens) if num_tokens else None
    rows, summary = _rows(lora, change), _summary(lora, change, tolerance)
    for number, modules, logits in rows:
        print(f"layer {number:3}: {modules}" + (f"; change of logits {logits}" if logits else ""))
    print("\n".join(summary), flush=True)
    table = [f"| {number} | {modules} | {logits} |" for number, modules, logits in rows]
    head = "| layer | rank (residual) of each module | change of logits |\n|---|---|---|"
    section = "\n\n".join(["## As a LoRA", *summary, "\n".join([head, *table])])
    named = _opened_by_others(str(base))
    card = Exported(run.folder, run.record, Path(output), named, True, lora.rank, license, section)
    more = 0 if run.record.config.model.base_precision == "run" else num_tokens  # else it has been compared
    _write(card, in_lora_form(lora, run.record.shape.num_layers), more)
    return Path(output)


def _rows(lora: RunAsLora, change: LogitsChange | None) -> list[tuple[int, str, str]]:
    """Number, ranks of the modules and change of logits of each decoder layer that has any."""
    by_number: Mapping[int, list[str]] = defaultdict(list)
    for layer, modules in lora.layers.items():
        for module in modules:
            residual = "exact" if module.is_exact else f"{module.factors.residual:.3g}"
            name = module.module.rpartition(".")[2]
            by_number[int(layer.split(".")[2])].append(f"{name} {module.factors.rank} ({residual})")
    return [
        (number, ", ".join(by_number[number]), "" if change is None else f"{change[1][number].relative:.2g}")
        for number in sorted(by_number)
    ]


def _summary(lora: RunAsLora, change: LogitsChange | None, tolerance: float) -> list[str]:
    """Paragraphs on ranks and residuals, on what is left out, and on logits."""
    largest = max(module.factors.residual for module in lora.modules)
    residual = (
        "the run's own product in every module"
        if all(module.is_exact for module in lora.modules)
        else f"the change of the weights has a relative Frobenius error of {lora.residual:.3g} over all modules and of "
        f"at most {largest:.3g} in one"
    )
    lines = [f"A LoRA of rank {lora.rank} (modules of a smaller rank are padded with zeros): {residual}."]
    num_above = sum(module.factors.residual > tolerance for module in lora.modules)
    if num_above:
        lines.append(
            f"{num_above} of {len(lora.modules)} modules reached the largest rank allowed with an error above "
            f"--tolerance {tolerance:g}: a higher --max-rank brings it down."
        )
    if lora.left_out:
        ordered = sorted(lora.left_out, key=lambda parameter: -parameter.squared_change)[:MOST_NAMED]
        named = ", ".join(f"{parameter.name} ({parameter.relative:.2%} of its norm)" for parameter in ordered)
        lines.append(
            f"Left out, since this LoRA is of the layers' linear weights: the changes of {len(lora.left_out)} others, "
            f"{lora.share_left_out:.2%} of the Frobenius norm of all changes. The largest are {named}."
        )
    if change is not None:
        whole = change[0]
        lines.append(
            f"Logits on random tokens, against the run's own model: {whole.logits}; same best token at "
            f"{whole.same_best} of {whole.num_positions} positions. A layer's change of logits is that of its factors "
            f"alone."
        )
    return lines
