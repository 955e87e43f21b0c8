"""Compare two models on the same tokens: their logits and the outputs of their layers.

transformers runs a Hugging Face folder, HF PEFT its own adapters, and our model everything in Megatron's format: a base
model, a run's adapters on their base, or a fully fine-tuned model. All in float32, in one process, one after the other.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_peft.checkpoint.folders import RECORD, megatron_files
from megatron_peft.checkpoint.record import differing_base, find_checkpoint, read_record
from megatron_peft.config import ConfigurationError, ModelConfig, ParallelConfig, require
from megatron_peft.config.hub import local_model
from megatron_peft.config.untrusted import is_finite, read_json_object
from megatron_peft.conversion.hf_files import CONFIG
from megatron_peft.conversion.pretrained import known_fingerprint, read_model_shape

logger = logging.getLogger(__name__)

PEFT_CONFIG = "adapter_config.json"
BATCH_SIZE = 2


@dataclass(frozen=True)
class Trace:
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
        """The largest difference over the largest value of the reference."""
        return self.absolute / self.scale

    @classmethod
    def of(cls, tensor: Tensor, reference: Tensor) -> "Difference":
        """Between two tensors of one shape."""
        return cls((tensor - reference).abs().max().item(), reference.abs().max().item())


@dataclass(frozen=True)
class LogitComparison:
    """Differences of two models; `same_best` of `num_positions` positions have the same most likely token."""

    logits: Difference
    layers: list[Difference]
    same_best: int
    num_positions: int


@dataclass(frozen=True)
class Subject:
    """A folder, the folder of its base model (itself if it is a whole model), and the function that runs it."""

    folder: Path
    base: Path
    trace: "Callable[[Subject, Tensor], Trace]"


def verify(
    input: str | Path,
    reference: str | Path,
    *,
    pretrained_checkpoint: str | Path | None = None,
    num_tokens: int = 64,
    seed: int = 0,
) -> LogitComparison:
    """Compare the models of two folders on random tokens.

    Args:
        input, reference: folders of any format above.
        pretrained_checkpoint: base model of adapters; None takes the one that they were trained on.
        num_tokens: length of each of two sequences.
        seed: of the tokens.

    Raises:
        ConfigurationError: a folder is not a model, or the two have vocabularies or layers of different sizes.
    """
    given = {"--input": input, "--reference": reference}
    subjects = [_subject(flag, Path(folder), pretrained_checkpoint) for flag, folder in given.items()]
    shapes = [read_model_shape(subject.base) for subject in subjects]
    for size in ("vocab_size", "num_layers", "hidden_size"):
        sizes = [getattr(shape, size) for shape in shapes]
        require(sizes[0] == sizes[1], f"{input} and {reference} are not comparable: {size} {sizes[0]} and {sizes[1]}.")
    longest = min(shape.longest_sequence for shape in shapes)
    require(0 < num_tokens <= longest, f"--num-tokens {num_tokens} must be at least 1 and at most {longest}.")
    tokens = random_tokens(shapes[0].vocab_size, num_tokens, seed)
    traces = [subject.trace(subject, tokens) for subject in subjects]
    for flag, folder, trace in zip(given, given.values(), traces, strict=True):
        require(is_finite(trace.logits), f"{flag} {folder}: its logits are NaN or infinite, so its weights may be too.")
    return compare_traces(*traces)


def logits_of(folder: str | Path, tokens: Tensor) -> Tensor:  # [b, s] -> [b, s, vocabulary]
    """Those of the model in a folder of any format above; adapters are put on the base that they name.

    Raises:
        ConfigurationError: the folder is not a model, or its library cannot open it.
    """
    subject = _subject("--input", Path(folder), None)
    return subject.trace(subject, tokens).logits


def random_tokens(vocab_size: int, num_tokens: int, seed: int = 0) -> Tensor:  # -> [BATCH_SIZE, num_tokens]
    """The tokens on which models are compared."""
    return torch.randint(0, vocab_size, (BATCH_SIZE, num_tokens), generator=torch.Generator().manual_seed(seed))


def compare_traces(trace: Trace, reference: Trace) -> LogitComparison:
    """Differences of `trace` from `reference`."""
    same = trace.logits.argmax(-1) == reference.logits.argmax(-1)
    layers = [Difference.of(*pair) for pair in zip(trace.layers, reference.layers, strict=True)]
    return LogitComparison(Difference.of(trace.logits, reference.logits), layers, int(same.sum()), same.numel())


def _subject(flag: str, folder: Path, pretrained_checkpoint: str | Path | None) -> Subject:
    """What the folder of `flag` holds. ConfigurationError: it is not a model, or its base is missing."""
    require(folder.is_dir(), f"{flag} {folder} is not a folder: give a model, a run or an adapter of HF PEFT.")
    trained_on, trace = _runner(folder)
    if trained_on is None:
        is_model = megatron_files(folder) is not None or (folder / CONFIG).is_file()
        require(is_model, f"{flag} {folder} holds no model: neither a {CONFIG} nor a checkpoint.")
        return Subject(folder, folder, trace)
    named = pretrained_checkpoint or trained_on
    if trace is _trace_peft and not pretrained_checkpoint:
        named = local_model(trained_on, f"the base model of {flag} {folder} (or give --pretrained-checkpoint):")
    base = Path(named)
    require(
        bool(named) and base.is_dir(),
        f"the base model {base} of {flag} {folder} is not there: give its folder with --pretrained-checkpoint.",
    )
    if trace is _trace_ours:
        _warn_of_other_base(folder, base)
    return Subject(folder, base, trace)


def _warn_of_other_base(folder: Path, base: Path) -> None:
    """Not an error, because the same weights in another format have other files."""
    record = read_record(find_checkpoint(folder))
    differing = differing_base(record, read_model_shape(base), known_fingerprint(base))
    if differing:
        named = record.config.model.pretrained_checkpoint
        logger.warning("%s was trained on %s; %s differs from it in %s", folder, named, base, ", ".join(differing))


def _runner(folder: Path) -> tuple[str | None, Callable[[Subject, Tensor], Trace]]:
    """The base that a folder of adapters names (None if it holds a whole model), and the function that runs it."""
    files = megatron_files(folder)
    if files is not None:
        record = read_record(files) if (files / RECORD).is_file() else None
        if record is None or not record.config.peft.trains_adapters:
            return None, _trace_ours
        return record.config.model.pretrained_checkpoint or "", _trace_ours
    config = folder / PEFT_CONFIG
    settings = read_json_object(config) if config.is_file() else {}
    if "peft_type" in settings:
        return settings.get("base_model_name_or_path") or "", _trace_peft
    return None, lambda subject, tokens: _trace_hf_model(_transformers_model(subject.base), tokens)


def _trace_ours(subject: Subject, tokens: Tensor) -> Trace:
    from megatron_peft.adapters.attach import attach_adapters
    from megatron_peft.checkpoint.load import load_trained_parameters
    from megatron_peft.conversion.pretrained import load_pretrained
    from megatron_peft.models.gpt import build_model_chunks

    shape = read_model_shape(subject.base)
    with single_process() as parallel:
        model = ModelConfig(str(subject.base), transformer_impl="local")
        chunks = build_model_chunks(shape, model, parallel)
        if subject.base != subject.folder:
            files = megatron_files(subject.folder)
            assert files is not None
            config = read_record(files).config
            attach_adapters(chunks, config.peft, config.training.seed)
        load_pretrained(chunks, subject.base, shape, tensor_parallel_rank=0, tensor_parallel_size=1, progress=True)
        if subject.base != subject.folder:
            load_trained_parameters(chunks, subject.folder)
        device = next(chunks[0].parameters()).device
        positions = torch.arange(tokens.shape[1], device=device).expand(tokens.shape)
        run = lambda: chunks[0].eval()(tokens.to(device), positions, None)[..., : shape.vocab_size]  # noqa: E731
        trace = traced(run, chunks[0].decoder.layers)
        return Trace(trace.logits, [layer.transpose(0, 1) for layer in trace.layers])  # [s, b, h] to [b, s, h]


@contextmanager
def single_process() -> Iterator[ParallelConfig]:
    """A world of one rank, in which a model of ours can be built."""
    from megatron_peft.runtime.launch import start_model_parallel, start_world, stop

    parallel = ParallelConfig()
    start_world()
    try:
        start_model_parallel(parallel, seed=0)
        yield parallel
    finally:
        stop()


def _trace_peft(subject: Subject, tokens: Tensor) -> Trace:
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ConfigurationError(
            f"{subject.folder} is an adapter of HF PEFT, which is not installed: pip install peft."
        ) from error
    model = _transformers_model(subject.base)
    with _refusals_named("HF PEFT", subject.folder, " For BOFT with several factors it needs its CUDA extension."):
        model = PeftModel.from_pretrained(model, str(subject.folder))
    return _trace_hf_model(model, tokens)


def _transformers_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    with _refusals_named("transformers", folder):
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False
        )


@contextmanager
def _refusals_named(library: str, folder: Path, hint: str = "") -> Iterator[None]:
    """Convert a library's loading errors to ConfigurationError."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - each library has its own errors
        reason = " ".join(str(error).split())[:200]
        raise ConfigurationError(f"{library} cannot open {folder} ({type(error).__name__}: {reason}).{hint}") from error


def _trace_hf_model(model: Any, tokens: Tensor) -> Trace:
    stacks = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    layers = next(stack for stack in stacks if len(stack) == model.config.num_hidden_layers)
    return traced(lambda: model.eval()(tokens).logits, layers)


@torch.no_grad()
def traced(run: Callable[[], Tensor], layers: Iterable[nn.Module]) -> Trace:
    """Run a model and keep the output of each layer (its first, if it returns several)."""
    outputs: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        outputs.append((output if isinstance(output, Tensor) else output[0]).float().cpu())

    hooks = [layer.register_forward_hook(keep) for layer in layers]
    logits = run().float().cpu()
    for hook in hooks:
        hook.remove()
    return Trace(logits, outputs)
