"""Export a run of any method, full fine-tuning included, as an ordinary LoRA of HF PEFT, with what that changes.

The modules' ranks differ. PEFT could say so (rank_pattern), but most versions of vLLM read one rank and one alpha: all
are padded with zeros to the largest rank, which changes no result, and alpha is that rank, so that the scale is 1. vLLM
reserves the largest rank for every module anyway.
"""

import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import torch

from megatron_peft.adapters import low_rank
from megatron_peft.config import PeftConfig, require
from megatron_peft.conversion.logits_change import LogitsChange, logits_change
from megatron_peft.conversion.lora_approximation import LeftOut, ModuleLora, RunAsLora, approximate, check_limits
from megatron_peft.conversion.model_card import Exported, check_license, write_card
from megatron_peft.conversion.peft import STEM, opened_by_others, write_adapter_config
from megatron_peft.conversion.peft_config import PREFIX, shortest_targets
from megatron_peft.conversion.trained_adapters import LowRankFactors, base_of, open_run
from megatron_peft.conversion.writer import SafetensorsWriter, TensorSpec, check_new, new_folder

TOLERANCE, MAX_RANK, NUM_TOKENS = 0.05, 256, 64
MOST_NAMED = 6  # parameters that are left out, the largest changes first


def export_as_lora(
    input: str | Path,
    output: str | Path,
    *,
    pretrained_checkpoint: str | Path | None = None,
    tolerance: float = TOLERANCE,
    max_rank: int = MAX_RANK,
    num_tokens: int = NUM_TOKENS,
    license: str | None = None,
    progress: bool = True,
) -> Path:
    """Write `output`, and print rank, residual and change of logits of every layer.

    Args:
        input: the --save folder of a run, of any method and layout.
        output: must not exist.
        pretrained_checkpoint: the base, if it is not where the run says.
        tolerance: relative Frobenius error of each module's change of weight.
        max_rank: of a module.
        num_tokens: of each of two random sequences on which logits are compared, which takes the memory of one model
            in float32; 0 leaves the comparison out.
        license: of the model card; None takes the base's.
        progress: show a bar at a terminal.

    Raises:
        ConfigurationError: before anything is written: no checkpoint, another base, a limit that cannot be used, an
            output that exists, damaged files.
    """
    check_new(output)
    check_license(license)
    check_limits(tolerance, max_rank)
    require(num_tokens >= 0, f"--num-tokens is {num_tokens}; it cannot be negative.")
    run = open_run(input)
    base = base_of(run, pretrained_checkpoint)
    lora = approximate(run, base, tolerance, max_rank, progress)
    change = logits_change(run, base, lora, num_tokens) if num_tokens else None
    print("\n".join(_lines(lora, change, tolerance)), flush=True)
    named, section = opened_by_others(str(base)), _section(lora, change, tolerance)
    card = Exported(run.folder, run.record, Path(output), named, True, lora.rank, license, section)
    with new_folder(output) as draft:
        targets = shortest_targets((one.module for one in lora.modules), run.record.shape.num_layers)
        settings = PeftConfig(lora_rank=lora.rank, lora_alpha=lora.rank)
        write_adapter_config(draft, named, targets, low_rank.EXPORT.config(settings, targets))
        _write_weights(draft, lora)
        write_card(draft, card)
    return Path(output)


def _write_weights(draft: Path, lora: RunAsLora) -> None:
    """Every module's factors, padded to one rank, in float32."""
    specs = {
        f"{PREFIX}{one.module}.{name}": TensorSpec(shape, torch.float32)
        for one in lora.modules
        for name, shape in low_rank.EXPORT.shapes({"r": lora.rank}, len(one.found.B), one.found.A.shape[1]).items()
    }
    with SafetensorsWriter(draft, specs, max_shard_bytes=sys.maxsize, stem=STEM) as writer:
        for one in lora.modules:
            for name, tensor in vars(LowRankFactors(one.found.A, one.found.B).padded(lora.rank)).items():
                writer.write(f"{PREFIX}{one.module}.lora_{name}.weight", tensor)


# What is printed, and stands on the card.


def _lines(lora: RunAsLora, change: LogitsChange | None, tolerance: float) -> list[str]:
    rows = [
        f"layer {number:3}: {_cells(modules)}" + (f"; change of logits {logits}" if logits else "")
        for number, modules, logits in _rows(lora, change)
    ]
    return [*rows, *_summary(lora, change, tolerance)]


def _section(lora: RunAsLora, change: LogitsChange | None, tolerance: float) -> str:
    rows = (f"| {number} | {_cells(modules)} | {logits} |" for number, modules, logits in _rows(lora, change))
    head = "| layer | rank (residual) of each module | change of logits |\n|---|---|---|"
    return "\n\n".join(["## As a LoRA", *_summary(lora, change, tolerance), "\n".join([head, *rows])])


def _rows(lora: RunAsLora, change: LogitsChange | None) -> list[tuple[int, list[ModuleLora], str]]:
    """Number, modules and change of logits of each decoder layer that has any."""
    by_number: Mapping[int, list[ModuleLora]] = defaultdict(list)
    for layer, modules in lora.layers.items():
        by_number[int(layer.split(".")[2])] += modules
    logits = {} if change is None else {number: f"{one.relative:.2g}" for number, one in enumerate(change.layers)}
    return [(number, by_number[number], logits.get(number, "")) for number in sorted(by_number)]


def _cells(modules: list[ModuleLora]) -> str:
    return ", ".join(
        f"{one.module.rpartition('.')[2]} {one.found.rank} ({'exact' if one.is_exact else f'{one.found.residual:.3g}'})"
        for one in modules
    )


def _summary(lora: RunAsLora, change: LogitsChange | None, tolerance: float) -> list[str]:
    is_exact = all(one.is_exact for one in lora.modules)
    largest = max(one.found.residual for one in lora.modules)
    residual = (
        "the run's own product in every module"
        if is_exact
        else f"the change of the weights has a relative Frobenius error of {lora.residual:.3g} over all modules and of "
        f"at most {largest:.3g} in one"
    )
    lines = [f"A LoRA of rank {lora.rank} (modules of a smaller rank are padded with zeros): {residual}."]
    num_above = sum(one.found.residual > tolerance for one in lora.modules)
    if num_above:
        lines.append(
            f"{num_above} of {len(lora.modules)} modules reached the largest rank allowed with an error above "
            f"--tolerance {tolerance:g}: a higher --max-rank brings it down."
        )
    return [*lines, *_told_left_out(lora), *_told_logits(change)]


def _told_left_out(lora: RunAsLora) -> list[str]:
    if not lora.left_out:
        return []
    ordered = sorted(lora.left_out, key=lambda one: -one.squared_change)
    return [
        f"Left out, since this LoRA is of the layers' linear weights: the changes of {len(ordered)} others, "
        f"{lora.share_left_out:.2%} of the Frobenius norm of all changes. The largest are "
        f"{', '.join(map(_told, ordered[:MOST_NAMED]))}."
    ]


def _told(one: LeftOut) -> str:
    return f"{one.name} ({one.relative:.2%} of its norm)"


def _told_logits(change: LogitsChange | None) -> list[str]:
    if change is None:
        return []
    whole = change.whole
    return [
        f"Logits on random tokens, against the run's own model: largest difference {whole.logits.absolute:.3g}, "
        f"relative {whole.logits.relative:.3g}; same best token at {whole.same_best} of {whole.num_positions} "
        f"positions. A layer's change of logits is that of its factors alone."
    ]
