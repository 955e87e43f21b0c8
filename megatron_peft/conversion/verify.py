"""Compare two models on the same tokens: their logits and the outputs of their layers.

transformers runs a Hugging Face folder, HF PEFT its own adapters, and our model everything in Megatron's format: a base
model, a run's adapters on their base, or a fully fine-tuned model. All in float32, in one process, one after the other.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megatron_peft.adapters.quantized_weight import QuantizedWeight
from megatron_peft.checkpoint import folders, load, run_record
from megatron_peft.config import (
    ConfigurationError,
    ModelConfig,
    ParallelConfig,
    require,
    require_packages,
    sources,
    untrusted,
)
from megatron_peft.conversion import hf_files, lora_approximation, trained_adapters
from megatron_peft.conversion.pretrained import (
    base_parameters,
    known_fingerprint,
    load_pretrained,
    open_weights,
    read_model_shape,
)
from megatron_peft.models.rules import WEIGHT
from megatron_peft.models.shape import ModelShape

logger = logging.getLogger(__name__)

BATCH_SIZE = 2


class Trace(NamedTuple):
    """Logits [batch, sequence, vocabulary] and outputs of layers [batch, sequence, hidden]."""

    logits: Tensor
    layers: list[Tensor]


@dataclass(frozen=True)
class Difference:
    """Largest difference between two tensors, and the largest magnitude in the second."""

    absolute: float
    scale: float

    @property
    def relative(self) -> float:
        return self.absolute / self.scale

    def __str__(self) -> str:
        return f"largest difference {self.absolute:.3g}, relative {self.relative:.3g}"

    @classmethod
    def of(cls, tensor: Tensor, reference: Tensor) -> "Difference":
        return cls((tensor - reference).abs().max().item(), reference.abs().max().item())


@dataclass(frozen=True)
class LogitComparison:
    """Differences of two models; `same_best` of `num_positions` positions have the same most likely token."""

    logits: Difference
    layers: list[Difference]
    same_best: int
    num_positions: int
    on_original: Difference | None = None  # of logits, with the original weights of a base that was quantized


class Subject(NamedTuple):
    """A base model, what runs it (with adapters), and, for a run on a quantized base, what runs it on the original."""

    base: Path
    trace: Callable[[Tensor], Trace]
    on_original: Callable[[Tensor], Trace] | None = None


def verify(
    input: str | Path, reference: str | Path, *, pretrained_checkpoint: str | Path | None = None, num_tokens: int = 64
) -> LogitComparison:
    """Compare the models of two folders, of any format above, on two sequences of random tokens.

    `pretrained_checkpoint` is the base model of adapters; None takes the one that they were trained on.

    Raises ConfigurationError: a folder is not a model, or the two have vocabularies or layers of different sizes.
    """
    given = {"--input": input, "--reference": reference}
    subjects = [_subject(flag, Path(folder), pretrained_checkpoint) for flag, folder in given.items()]
    shapes = [read_model_shape(subject.base) for subject in subjects]
    for size in ("vocab_size", "num_layers", "hidden_size"):
        sizes = [getattr(shape, size) for shape in shapes]
        require(sizes[0] == sizes[1], f"{input} and {reference} are not comparable: {size} {sizes[0]} and {sizes[1]}.")
    longest = min(shape.longest_sequence for shape in shapes)
    require(0 < num_tokens <= longest, f"--num-tokens {num_tokens} must be at least 1 and at most {longest}.")
    tokens = random_tokens(shapes[0].vocab_size, num_tokens)
    traces = [subject.trace(tokens) for subject in subjects]
    for flag, folder, trace in zip(given, given.values(), traces, strict=True):
        message = f"{flag} {folder}: its logits are NaN or infinite, so its weights may be too."
        require(untrusted.is_finite(trace.logits), message)
    comparison = _compare(*traces)
    if not any(subject.on_original for subject in subjects):
        return comparison
    pairs = zip(subjects, traces, strict=True)
    original = [trace if subject.on_original is None else subject.on_original(tokens) for subject, trace in pairs]
    return replace(comparison, on_original=Difference.of(original[0].logits, original[1].logits))


def logits_of(folder: str | Path, tokens: Tensor, base: str | Path | None = None) -> Tensor:
    """Run the model in a folder as `verify` does, [b, s] -> [b, s, vocabulary]; base: of adapters, None is the one that
    they name."""
    return _subject("--input", Path(folder), base).trace(tokens).logits


def random_tokens(vocab_size: int, num_tokens: int) -> Tensor:  # -> [BATCH_SIZE, num_tokens]
    """The tokens on which models are compared."""
    return torch.randint(0, vocab_size, (BATCH_SIZE, num_tokens), generator=torch.Generator().manual_seed(0))


def _compare(trace: Trace, reference: Trace) -> LogitComparison:
    same = trace.logits.argmax(-1) == reference.logits.argmax(-1)
    layers = [Difference.of(*pair) for pair in zip(trace.layers, reference.layers, strict=True)]
    return LogitComparison(Difference.of(trace.logits, reference.logits), layers, int(same.sum()), same.numel())


def _subject(flag: str, folder: Path, base: str | Path | None) -> Subject:
    """The base model, `base` or the one that is named, and the function that runs what the folder of `flag` holds."""
    require(folder.is_dir(), f"{flag} {folder} is not a folder: give a model, a run or an adapter of HF PEFT.")
    files, config = folders.megatron_files(folder), folder / run_record.ADAPTER_CONFIG
    record = run_record.read_record(files) if files is not None and (files / folders.RECORD).is_file() else None
    run = record if record is not None and record.config.peft.trains_adapters else None
    settings = untrusted.read_json_object(config) if files is None and config.is_file() else {}
    if run is None and "peft_type" not in settings:
        is_model = files is not None or (folder / hf_files.CONFIG).is_file()
        require(is_model, f"{flag} {folder} holds no model: neither a {hf_files.CONFIG} nor a checkpoint.")
        return Subject(folder, partial(_trace_transformers if files is None else _trace_ours, folder))
    trained_on = run.config.model.pretrained_checkpoint if run else settings.get("base_model_name_or_path")
    named = base or trained_on
    if run is None and not base:
        what = f"the base model of {flag} {folder} (or give --pretrained-checkpoint):"
        named = sources.local_model(trained_on or "", what)
    base = Path(named or "")
    require(
        bool(named) and base.is_dir(),
        f"the base model {base} of {flag} {folder} is not there: give its folder with --pretrained-checkpoint.",
    )
    if run is None:
        return Subject(base, partial(_trace_transformers, base, adapter=folder))
    # Not an error, because the same weights in another format have other files.
    differing = run_record.differing_base(run, read_model_shape(base), known_fingerprint(base))
    if differing:
        logger.warning("%s was trained on %s; %s differs from it in %s", folder, trained_on, base, ", ".join(differing))
    trace, model = partial(_trace_ours, base, adapters=(folder, run)), run.config.model
    if model.base_precision == "run":
        return Subject(base, trace)
    return Subject(base, partial(trace, **model.quantization), trace)


# How each library runs a model.


def _trace_transformers(base: Path, tokens: Tensor, adapter: Path | None = None) -> Trace:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    with _refusals_named("transformers", base):
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            base, dtype=torch.float32, local_files_only=True, trust_remote_code=False
        )
    if adapter is not None:
        require_packages("peft", "peft")
        from peft import PeftModel

        with _refusals_named("HF PEFT", adapter, " For BOFT with several factors it needs its CUDA extension."):
            model = PeftModel.from_pretrained(model, str(adapter))
    stacks = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    layers = next(stack for stack in stacks if len(stack) == model.config.num_hidden_layers)
    return _traced(lambda: model.eval()(tokens).logits, layers)


@contextmanager
def _refusals_named(library: str, folder: Path, hint: str = "") -> Iterator[None]:
    """Convert a library's loading errors to ConfigurationError."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - each library has its own errors
        reason = " ".join(str(error).split())[:200]
        raise ConfigurationError(f"{library} cannot open {folder} ({type(error).__name__}: {reason}).{hint}") from error


def _trace_ours(
    base: Path, tokens: Tensor, adapters: tuple[Path, run_record.RunRecord] | None = None, **quantization: Any
) -> Trace:
    from megatron_peft.adapters.attach import attach_adapters

    shape = read_model_shape(base)
    with _our_model(shape, base, **quantization) as chunk:
        if adapters is not None:
            config = adapters[1].config
            attach_adapters([chunk], config.peft, config.training.seed)
            for weight in (module for module in chunk.modules() if isinstance(module, QuantizedWeight)):
                weight.rounded_to = torch.bfloat16 if config.model.bf16 else torch.float32
        load_pretrained([chunk], base, shape, tensor_parallel_rank=0, tensor_parallel_size=1, progress=True)
        if adapters is not None:
            load.load_trained_parameters([chunk], adapters[0])
        return _trace_chunk(chunk, tokens, shape.vocab_size)


@contextmanager
def _our_model(shape: ModelShape, base: Path, **quantization: Any) -> Iterator[Any]:
    """A GPTModel in float32 without its weights, in a world of one rank."""
    from megatron_peft.models.gpt import build_model_chunks
    from megatron_peft.runtime.launch import start_model_parallel, start_world, stop

    parallel = ParallelConfig()
    start_world()
    try:
        start_model_parallel(parallel, seed=0)
        model = ModelConfig(str(base), transformer_impl="local", **quantization)
        (chunk,) = build_model_chunks(shape, model, parallel)
        yield chunk
    finally:
        stop()


def _trace_chunk(chunk: Any, tokens: Tensor, vocab_size: int, hidden: Tensor | None = None) -> Trace:
    """Run a GPTModel; with `hidden` [b, s, h], from its decoder on."""
    device = next(chunk.parameters()).device
    positions = torch.arange(tokens.shape[1], device=device).expand(tokens.shape)
    start = None if hidden is None else hidden.transpose(0, 1).contiguous().to(device)
    run = lambda: chunk.eval()(tokens.to(device), positions, None, decoder_input=start)[..., :vocab_size]  # noqa: E731
    trace = _traced(run, chunk.decoder.layers)
    return Trace(trace.logits, [layer.transpose(0, 1) for layer in trace.layers])  # [s, b, h] to [b, s, h]


@torch.no_grad()
def _traced(run: Callable[[], Tensor], layers: Iterable[nn.Module]) -> Trace:
    """Run a model and keep the output of each layer (its first, if it returns several)."""
    outputs: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        outputs.append((output if isinstance(output, Tensor) else output[0]).float().cpu())

    hooks = [layer.register_forward_hook(keep) for layer in layers]
    logits = run().float().cpu()
    for hook in hooks:
        hook.remove()
    return Trace(logits, outputs)


@torch.no_grad()
def logits_change(
    run: trained_adapters.TrainedAdapters, base: Path, lora: lora_approximation.RunAsLora, num_tokens: int
) -> tuple[LogitComparison, list[Difference]]:
    """Compare a run with what its LoRA computes, on two random sequences. Needs the memory of one model in float32.

    Returns what the written adapter changes, in which parameters that a LoRA leaves out have the base's values; and the
    change of logits where the weights of one decoder layer alone are base and factors, layer by layer.
    """
    shape, peft = run.record.shape, run.record.config.peft
    tokens = random_tokens(shape.vocab_size, min(num_tokens, shape.max_position_embeddings))
    with _our_model(shape, base) as chunk:
        folder = base if peft.trains_adapters else run.folder
        load_pretrained([chunk], folder, shape, tensor_parallel_rank=0, tensor_parallel_size=1, progress=False)
        parameters = dict(base_parameters(chunk))
        for layer in run.record.adapted_layers if peft.trains_adapters else ():
            weight = parameters[layer + WEIGHT]
            weight.copy_(import_module(peft.spec.adapter).merge(weight.detach().cpu(), run.of(layer), peft))
        reference, blocks, changes = _trace_chunk(chunk, tokens, shape.vocab_size), chunk.decoder.layers, []
        rules, weights = open_weights(base, shape)

        def become_lora(name: str) -> None:
            weights.read(rules[name], parameters[name], 0, 1)
            for module in lora.layers.get(rules[name].layer, ()):
                change = (module.factors.B @ module.factors.A).to(parameters[name])
                for rows in module.ranges:
                    parameters[name][rows.megatron] += change[rows.hf]

        for number in range(shape.num_layers):
            names = [layer + WEIGHT for layer in lora.layers if layer.startswith(f"decoder.layers.{number}.")]
            before = {name: parameters[name].clone() for name in names}
            for name in before:
                become_lora(name)
            chunk.decoder.layers = blocks[number:]  # what comes before them has not changed
            hidden = reference.layers[number - 1] if number else None
            logits = _trace_chunk(chunk, tokens, shape.vocab_size, hidden).logits
            changes.append(Difference.of(logits, reference.logits))
            chunk.decoder.layers = blocks
            for name, weight in before.items():
                parameters[name].copy_(weight)
        for name in parameters:
            become_lora(name)
        return _compare(_trace_chunk(chunk, tokens, shape.vocab_size), reference), changes
