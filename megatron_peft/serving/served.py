"""What a serving engine makes of an adapter or a model, asked of the engine itself: what it binds, and its numbers.

vLLM answers "success" to an adapter whose names it binds to nothing, and then serves the base. So its own loader reads
the adapter here, every module is looked for in what it has bound, and its log-probabilities are compared with a
reference's. llama.cpp is silent of a module that is not there.
"""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from megatron_peft.checkpoint.run_record import ADAPTER_CONFIG
from megatron_peft.config import ConfigurationError, require, sources, untrusted
from megatron_peft.conversion.model_card import CARD, add_engine
from megatron_peft.conversion.peft_export import PeftAdapter
from megatron_peft.conversion.peft_targets import is_targeted, of_module
from megatron_peft.conversion.verify import Difference, logits_of, random_tokens
from megatron_peft.models.families import family_of, read_shape
from megatron_peft.serving.engine import GGUF, Engine, LlamaCpp, largest_rank

PREFIXES = (1, 5, 17)  # tokens before the compared ones; and all that are asked for
MOVES = 0.1  # how far an adapter has to move log-probabilities for a comparison to show that it is there
LEAST = -80.0  # log-probabilities below are taken for this: llama.cpp computes their exponential in float32
MOST_NAMED = 3


@dataclass(frozen=True)
class Binding:
    """What the engine did with the modules of an adapter.

    problems: sentences, none if every module is where it belongs.
    """

    engine: str
    num_bound: int
    rank: int
    problems: tuple[str, ...]

    def __str__(self) -> str:
        summary = f"{self.engine} binds {self.num_bound} modules, rank {self.rank}"
        return "\n".join([summary, *(f"REFUSED: {problem}" for problem in self.problems)])


@dataclass(frozen=True)
class Served:
    """Log-probabilities of the engine beside the reference's: the largest difference, and what the adapter changes."""

    engine: str
    difference: Difference
    moved: float | None  # None of a model without an adapter
    num_prefixes: int

    def problem(self, tolerance: float) -> str | None:
        if not self.difference.relative <= tolerance:
            return f"log-probabilities differ by {self.difference.relative:.3g}, more than --tolerance {tolerance:g}"
        if self.moved is not None and self.moved < MOVES:
            return (
                f"the adapter moves log-probabilities by {self.moved:.3g} at most: too little to tell it from the base"
            )
        return None

    def __str__(self) -> str:
        moved = "" if self.moved is None else f"; the adapter moves them by {self.moved:.3g}"
        return f"log-probabilities after {self.num_prefixes} prefixes: {self.difference}{moved}"


def check_served(
    python: Path | None,
    folder: Path,
    base: str | None,
    reference: Path | None,
    num_tokens: int,
    tolerance: float | None,
    kind: type[Engine] = Engine,
    update_card: bool = False,
) -> int:
    """Print what the engine makes of an adapter of HF PEFT or of a model; exit code 1 if something is wrong.

    folder: or a .gguf file beside the config; of a folder with one llama.cpp reads that.
    base: of an adapter, None is the one that it names; reference: None is what HF PEFT makes of the adapter.
    tolerance: of log-probabilities, relative to the largest; None compares none.
    update_card: of what is right, the folder's model card says so.
    """
    adapter, is_file = folder, folder.suffix == ".gguf"
    folder = folder.parent if is_file else folder
    require(not update_card or (folder / CARD).is_file(), f"--update-card: {folder} has no model card ({CARD}).")
    is_adapter = (folder / ADAPTER_CONFIG).is_file()
    message = f"{folder} holds no {ADAPTER_CONFIG}: a model needs --reference, and has nothing to bind."
    require(is_adapter or (not is_file and reference is not None and tolerance is not None), message)
    model, problems, right = folder, list[str](), list[str]()
    if is_adapter:
        if kind is LlamaCpp and (folder / GGUF).is_file() and not is_file:
            adapter = folder / GGUF
        model = base_of_adapter(folder, base)
        message = f"vLLM takes no LoRA for the model of {model}: merge it."
        require(kind is not Engine or not _takes_no_lora(model), message)
        (binding,) = bindings_of(python, model, [adapter], kind)
        problems += binding.problems
        print(binding, flush=True)
        right.append(str(binding))
    if tolerance is not None and not problems:
        served = compare_served(
            python, model, adapter if is_adapter else None, reference or folder, num_tokens, base, kind
        )
        problem = served.problem(tolerance)
        print(served, *([f"REFUSED: {problem}"] if problem else []), sep="\n")
        problems += [problem] if problem else []
        right.append(f"{served.engine}: {served}, {'of the run' if reference else 'of HF PEFT'} as reference")
    if update_card and not problems:
        add_engine(folder, right)
    print("REFUSED" if problems else "binds" if tolerance is None else "served as it was trained")
    return 1 if problems else 0


def base_of_adapter(folder: Path, base: str | None) -> Path:
    """The folder of `base`, or of the one that an adapter names. ConfigurationError: there is none."""
    named = base or untrusted.read_json_object(folder / ADAPTER_CONFIG).get("base_model_name_or_path") or ""
    wanted = "give --pretrained-checkpoint, the base's Hugging Face folder."
    require(bool(named), f"{folder} names no base: {wanted}")
    model = Path(sources.local_model(named, f"the base of {folder} (or --pretrained-checkpoint):"))
    require((model / "config.json").is_file(), f"{model}, the base of {folder}, holds no config.json: {wanted}")
    return model


def _takes_no_lora(model: Path) -> bool:
    with suppress(ConfigurationError):  # a family of others, of which the engine itself says what it takes
        return not family_of(read_shape(str(model)).architecture).vllm_serves_lora
    return False


def bindings_of(
    python: Path | None, model: Path, adapters: Sequence[Path], kind: type[Engine] = Engine
) -> list[Binding]:
    """Let the engine's loader read adapters for the model of a folder, whose weights are not read."""
    settings = [_settings(adapter) for adapter in adapters]
    files, options = [str(adapter.absolute()) for adapter in adapters], kind.of_adapters(settings)
    with kind(python) as engine:
        answer = engine.ask("bind", model=str(model.absolute()), adapters=files, **options)
    pairs = zip(answer["adapters"], settings, strict=True)
    return [binding_of(engine.name, answer["slots"], *each) for each in pairs]


def binding_of(engine: str, slots: Mapping[str, Any], reply: Mapping[str, Any], settings: Mapping[str, Any]) -> Binding:
    """What the script has found of an adapter with these settings."""
    bound = sum(part is not None for parts in reply.get("bound", {}).values() for part in parts)
    if error := reply["error"]:
        problems = (f"{engine.partition(' ')[0]} does not read it: {error}",)
    else:
        problems = tuple(_problems(slots, reply, settings))
    return Binding(engine, bound, largest_rank(settings), problems)


def give_in_memory(engine: Engine, adapter: PeftAdapter) -> Binding:
    """Let an open vLLM answer with an adapter that lies in no file: its process reads this one's memory.

    engine: opened in one process with `enable_lora`, `max_loras` 2 and the adapter's `lora_settings`.

    ConfigurationError: it does not bind the adapter whole, and goes on with the one before.
    """
    tensors = safetensors.torch.save(
        {name: tensor.float().clone(memory_format=torch.contiguous_format) for name, tensor in adapter.tensors()}
    )
    memory = os.memfd_create("adapter")
    try:
        with open(memory, "wb", closefd=False) as file:
            file.write(tensors)
        answer = engine.ask("give", config=adapter.config, tensors=f"/proc/{os.getpid()}/fd/{memory}")
    finally:
        os.close(memory)
    binding = binding_of(engine.name, answer["slots"], answer["found"], adapter.config)
    engine.ask("keep", is_kept=not binding.problems)
    if binding.problems:
        raise ConfigurationError(*binding.problems)
    return binding


def compare_served(
    python: Path | None,
    model: Path,
    adapter: Path | None,
    reference: Path,
    num_tokens: int,
    base: str | None = None,
    kind: type[Engine] = Engine,
) -> Served:
    """Run the engine on prefixes of random tokens, and the reference as `verify` runs it, both in float32.

    base: of a reference that is adapters; None is the one that they name.
    """
    shape = read_shape(str(model))
    tokens = random_tokens(shape.vocab_size, min(num_tokens, shape.longest_sequence - 1))
    name, *answers = served_log_probs(python, model, [adapter] if adapter else [], tokens, kind=kind)
    answers = [tensor.clamp(min=LEAST) for tensor in (*answers, after_prefixes(logits_of(reference, tokens, base)))]
    *_, served, expected = answers
    moved = (served - answers[0]).abs().max().item() if adapter else None
    return Served(name, Difference.of(served, expected), moved, len(served))


def served_log_probs(
    python: Path | None,
    model: Path,
    adapters: Sequence[Path],
    tokens: Tensor,
    least_limit: int = 1,
    kind: type[Engine] = Engine,
) -> tuple[str, *tuple[Tensor, ...]]:
    """The engine's name, and its log-probabilities [n, vocabulary] after each prefix of the rows of `tokens` [b, s]:
    of the model, and with each of the adapters. It reserves room for ranks of `least_limit` or more."""
    ends = [end + 1 for end in _ends(tokens.shape[1])]
    prompts = [row[:end].tolist() for row in tokens for end in ends]
    settings: dict[str, Any] = {"dtype": "float32", "max_model_len": tokens.shape[1] + 1}
    if adapters:
        settings |= kind.of_adapters([*map(_settings, adapters)], least_limit)
    with kind(python) as engine:
        engine.open(model, adapters, settings)
        log_probs = engine.ask("log_probs", prompts=prompts)["log_probs"]
    return engine.name, *map(torch.tensor, log_probs)


def after_prefixes(logits: Tensor) -> Tensor:  # [b, s, vocabulary] -> [n, vocabulary]
    """The log-probabilities that `served_log_probs` asks an engine for."""
    return logits[:, _ends(logits.shape[1])].flatten(0, 1).log_softmax(-1)


def _ends(num_tokens: int) -> list[int]:
    return [end - 1 for end in sorted({*(length for length in PREFIXES if length < num_tokens), num_tokens})]


def _settings(adapter: Path) -> dict[str, Any]:
    """The config in an adapter's folder, or beside its file."""
    return untrusted.read_json_object((adapter if adapter.is_dir() else adapter.parent) / ADAPTER_CONFIG)


def _problems(slots: Mapping[str, Any], reply: Mapping[str, Any], settings: Mapping[str, Any]) -> Iterator[str]:
    """What would be served silently wrong."""
    if unbound := reply["unbound"]:
        yield f"bound to nothing, so the base is served in their place: {_some(unbound)}"
    kind = settings.get("peft_type", "LORA")
    if kind != "LORA":
        yield f"peft_type of its config is {kind}, and servers take LORA alone"
    missing, misshapen, infinite, scaled = [], [], [], []
    for layer, parts in slots.items():
        for (name, outputs, inputs), factors in zip(parts, reply["bound"][layer], strict=True):
            if factors is None:
                missing += [name] if is_targeted(settings, name) else []
                continue
            A, B, is_finite, *scale = factors
            own = of_module(settings, "rank_pattern", "r", name)
            if inputs is not None and (A != [own, inputs] or B != [outputs, own]):
                misshapen.append(f"{name} (A {A}, B {B}; rank {own} of {outputs} x {inputs} features)")
            infinite += [] if is_finite else [name]
            if scale and not math.isclose(scale[0], expected := _scale(name, settings), rel_tol=1e-6):
                scaled.append(f"{name} ({scale[0]:.6g}, not {expected:.6g})")
    if missing:
        yield f"missing, though target_modules names them: {_some(missing)}"
    if misshapen:
        yield f"factors of other shapes than their layer's: {_some(misshapen)}"
    if infinite:
        yield f"NaN or infinite: {_some(infinite)}"
    if scaled:
        yield f"another scale than {ADAPTER_CONFIG} says: {_some(scaled)}"
    if not unbound and not missing and not any(map(any, reply["bound"].values())):
        yield "no module of it is bound, so the base is served"


def _scale(name: str, settings: Mapping[str, Any]) -> float:
    rank = of_module(settings, "rank_pattern", "r", name)
    alpha = of_module(settings, "alpha_pattern", "lora_alpha", name)
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _some(names: Sequence[str]) -> str:
    rest = f", and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + rest
