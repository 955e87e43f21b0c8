"""Training of a two-layer Llama on the device beside what the CPU did, and beside itself: kernels, waits, checkpoints.

The ten losses of each method are recorded from a CPU in float32 with padded samples (`losses.json`). Packed samples,
recomputed activations, fused kernels and Transformer Engine compute the same function, so all are compared with them.
Products of the frozen base are in full float32 here, whatever the environment allows.
"""

import contextlib
import math
import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_peft.adapters.step import adapters_step
from megatron_peft.benchmarks.check_gpu.measure import attempt, kernels_of
from megatron_peft.benchmarks.check_gpu.subjects import (
    ADAPTERS,
    FULL_RECOMPUTE,
    LLAMA,
    CheckPlace,
    largest_relative,
    microbatches,
    quiet,
    random_samples,
    run_config,
    state_of,
)
from megatron_peft.benchmarks.measure import Figure
from megatron_peft.checkpoint.load import load_checkpoint
from megatron_peft.checkpoint.save import Saver
from megatron_peft.config import ConfigurationError
from megatron_peft.conversion.pretrained import load_pretrained
from megatron_peft.evaluation.generation import GenerationSettings, generate
from megatron_peft.models.families import read_shape
from megatron_peft.models.gpt import build_model_chunks, uses_transformer_engine
from megatron_peft.models.kernels import Installed, require_packed_attention
from megatron_peft.runtime.precision import full_precision
from megatron_peft.training.state import TrainingState
from megatron_peft.training.step import finish_gradients, finish_with, run_schedule, train_step

# Adam turns the rounding of a small gradient into a whole step, so losses differ by more than one result is rounded:
# within 1,000 units of the last place of float32. Weights in bf16 are rounded before anything is computed with them.
LOSS_TOLERANCE = {False: 1000 * torch.finfo(torch.float32).eps, True: torch.finfo(torch.bfloat16).eps}
WAITS_OF_A_STEP = 2  # for losses and what is finite, and for the norm of the gradients


def check_losses(place: CheckPlace) -> Iterator[Figure]:
    """For each implementation and method: padded, packed and recomputed, in float32 and bf16."""
    for implementation in _implementations():
        for method in place.sizes.methods:
            for bf16, packed, recomputed in _variants(place, implementation)[: place.sizes.num_variants]:
                words = ["bf16" if bf16 else "float32", "packed" if packed else "padded", *["recomputed"] * recomputed]
                name = f"{method}, {implementation}: {', '.join(words)}"
                yield from attempt(name, _compare_losses, place, method, implementation, bf16, packed, recomputed)


def record_losses(place: CheckPlace) -> dict[str, list[float]]:
    """Of the CPU: what other devices are compared with."""
    return {method: _losses_of(place, method) for method in ADAPTERS}


def _implementations() -> list[str]:
    installed = Installed.detected()
    return ["local", *(["transformer_engine"] if installed.cuda and installed.transformer_engine else [])]


def _variants(place: CheckPlace, implementation: str) -> list[tuple[bool, bool, bool]]:
    """(bf16, packed, recomputed), padded where a run would refuse to pack: on a GPU kernels take bf16 only."""
    wanted = [(False, True, True), (False, False, False), (True, False, True), (True, True, False)]
    wanted += [(True, True, True)] * Installed.detected().cuda
    packs = {bf16: _packs(place, bf16=bf16, transformer_impl=implementation) for bf16 in (False, True)}
    return list(dict.fromkeys((bf16, packed and packs[bf16], recomputed) for bf16, packed, recomputed in wanted))


def _packs(place: CheckPlace, **model: Any) -> bool:
    """Whether a run with these settings of the model takes --pack-sequences here."""
    config = run_config("random", "lora", model=model, data={"pack_sequences": True})
    installed = Installed.detected()
    with_engine = uses_transformer_engine(config.model.transformer_impl, installed)
    try:
        require_packed_attention(config, place.sizes.layer, with_engine, installed)
    except ConfigurationError:
        return False
    return True


def _compare_losses(
    name: str, place: CheckPlace, method: str, implementation: str, bf16: bool, packed: bool, recomputed: bool
) -> Figure:
    transformer = FULL_RECOMPUTE if recomputed else {}
    model = {"bf16": bf16, "transformer_impl": implementation}
    found = _losses_of(place, method, packed, model=model, transformer=transformer)
    return _near_recorded(name, place, method, found, bf16)


def _near_recorded(name: str, place: CheckPlace, method: str, found: list[float], bf16: bool = False) -> Figure:
    expected = place.recorded[method][: len(found)]
    note = f"losses {found[0]:.6f} to {found[-1]:.6f}, CPU {expected[0]:.6f} to {expected[-1]:.6f}"
    return Figure(name, largest_relative(found, expected), LOSS_TOLERANCE[bf16], note=note)


@full_precision
def _losses_of(place: CheckPlace, method: str, packed: bool = False, **groups: Any) -> list[float]:
    state = state_of(place, method, **{"model": {"transformer_impl": "local"}, **groups})
    return _train(state, place.sizes.loss_steps, packed)


def _train(state: TrainingState, num_steps: int, packed: bool = False) -> list[float]:
    return [train_step(state, microbatches(packed)).loss for _ in range(num_steps)]


FUSIONS = ("bias_activation_fusion", "bias_dropout_fusion", "apply_rope_fusion", "cross_entropy_loss_fusion")


def check_fusions(place: CheckPlace) -> Iterator[Figure]:
    """What is on without flags, in float32 and bf16, and the losses without each one; whose Adam it is."""
    for words, bf16 in (("float32", False), ("bf16", True)):  # the loss is fused in bf16 alone
        state = state_of(place, "boft", model={"bf16": bf16})
        is_on = {name: bool(getattr(state.model_chunks[0].config, name)) for name in FUSIONS}
        yield from (Figure(f"{words}: {name} is on", float(on)) for name, on in is_on.items())
        yield from attempt(f"{words}: all that is on", _fused, place, bf16, {})
        for fusion in (name for name, on in is_on.items() if on):
            yield from attempt(f"{words}: without {fusion}", _fused, place, bf16, {fusion: False})
    (optimizer, *_) = getattr(state.optimizer, "chained_optimizers", [state.optimizer])
    adam = type(optimizer.optimizer).__module__
    yield Figure("Adam of torch", float(adam.startswith("torch.")), note=adam)


def _fused(name: str, place: CheckPlace, bf16: bool, transformer: dict[str, Any]) -> Figure:
    found = _losses_of(place, "boft", transformer=transformer, model={"bf16": bf16})
    return _near_recorded(name, place, "boft", found, bf16)


BACKENDS = ("auto", "flash", "fused", "unfused")


def check_attention(place: CheckPlace) -> Iterator[Figure]:
    """The first loss in bf16 with each backend; the note names the kernels of attention that ran."""
    local, *engines = _implementations()
    # Transformer Engine chooses once in a process.
    chosen = [*((local, backend) for backend in BACKENDS), *((engine, "auto") for engine in engines)]
    for implementation, backend in chosen:
        yield from attempt(f"{implementation}, {backend}", _backend, place, implementation, backend)


def _backend(name: str, place: CheckPlace, implementation: str, backend: str) -> Figure:
    model = {"bf16": True, "transformer_impl": implementation, "attention_backend": backend}
    state, found = state_of(place, "lora", model=model), []
    kernels = kernels_of(lambda: found.extend(_train(state, 1)), place.device)
    words = ("flash", "fmha", "cudnn", "attention", "softmax", "efficient")
    named = sorted({one.name[:60] for one in kernels if any(word in one.name.lower() for word in words)})
    figure = _near_recorded(name, place, "lora", found, bf16=True)
    return replace(figure, note="; ".join(named)[:400])


def check_recompute(place: CheckPlace) -> Iterator[Figure]:
    """Three losses with dropout: the recomputed forward must draw the masks of the first one. Ten of each module."""
    yield from attempt("recomputed or kept", _dropout_recomputed, place)
    for module in _recomputable():
        yield from attempt(f"--recompute-modules {module}", _module_recomputed, place, module)


@full_precision
def _dropout_recomputed(name: str, place: CheckPlace) -> list[Figure]:
    dropout = {"peft": {"lora_dropout": 0.2}, "model": {"transformer_impl": "local"}}
    kept, recomputed = (
        _train(state_of(place, "lora", transformer={"hidden_dropout": 0.1, **more}, **dropout), 3)
        for more in ({}, FULL_RECOMPUTE)
    )
    without = place.recorded["lora"][:3]
    note = f"{recomputed[-1]:.6f} and {kept[-1]:.6f}; without dropout {without[-1]:.6f}"
    acts = largest_relative(kept, without) > LOSS_TOLERANCE[False]
    return [
        Figure(name, largest_relative(recomputed, kept), LOSS_TOLERANCE[False], note=note),
        Figure("dropout changes nothing", float(not acts), 0.0),
    ]


def _recomputable() -> list[str]:
    """megatron-core recomputes norms on a GPU with Transformer Engine only."""
    installed = Installed.detected()
    norms = ["layernorm"] if installed.transformer_engine or not installed.cuda else []
    return ["core_attn", *norms, "mlp"]


def _module_recomputed(name: str, place: CheckPlace, module: str) -> Figure:
    selective = {"recompute_granularity": "selective"}
    found = _losses_of(place, "lora", transformer=selective, model={"recompute_modules": (module,)})
    return _near_recorded(name, place, "lora", found)


# Waits. torch raises, or warns, where the host reads from the device. Warm up first: libraries wait while they start.


def check_waits(place: CheckPlace) -> Iterator[Figure]:
    """None in forward, backward and gradient sums of two microbatches, which raise; two in a whole step."""
    kinds = {"padded": False, "packed": True} if _packs(place, bf16=True) else {"padded": False}
    for method in place.sizes.methods:
        for kind, packed in kinds.items():
            name = f"{method}, {kind}: waits in a step, none of them in its microbatches"
            yield from attempt(name, _count_waits, place, method, packed)


def _count_waits(name: str, place: CheckPlace, method: str, packed: bool) -> Figure:
    state = state_of(place, method, model={"bf16": True})
    _train(state, 2, packed)
    with _sync_debug_mode("error"), adapters_step(state.model_chunks) as step:
        finish_with(state.model_chunks, partial(finish_gradients, step=step))
        run_schedule(state.model_chunks, microbatches(packed), forward_only=False)
    with _sync_debug_mode("warn"), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        _train(state, 1, packed)
    places = [f"{Path(one.filename).name}:{one.lineno}" for one in told if "synchroniz" in str(one.message)]
    note = ", ".join(places) if torch.cuda.is_available() else "a CPU never waits"
    return Figure(name, len(places), WAITS_OF_A_STEP, note=note)


@contextlib.contextmanager
def _sync_debug_mode(mode: str) -> Iterator[None]:
    if not torch.cuda.is_available():
        yield
        return
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


# Checkpoints.


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    """Kernels that give the same bits twice; cuBLAS needs CUBLAS_WORKSPACE_CONFIG besides, which the command sets."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def check_checkpoints(place: CheckPlace) -> Iterator[Figure]:
    """A run that is stopped after two steps and resumed goes on bit for bit, with either way to save."""
    method = place.sizes.methods[-1]
    for way, is_async in (("saved at once", False), ("--async-save", True)):
        name = f"{method}, {way}: losses and tensors that differ after 3 steps"
        yield from attempt(name, _resumed, place, method, is_async)


@_deterministic()
def _resumed(name: str, place: CheckPlace, method: str, is_async: bool) -> Figure:
    # The kernels of fused attention add up in any order; those that compute all scores do not.
    model = {"transformer_impl": "local", "attention_backend": "unfused"}
    settings = {"save": str(place.folder / f"resume {is_async}"), "async_save": is_async}
    state = state_of(place, method, model=model, checkpoint=settings)
    _train(state, 2)
    state.position.iteration = 2
    with Saver(state.config.checkpoint) as saver:
        saver.start(state)
        undisturbed = _train(state, 3)  # an asynchronous save writes meanwhile
        outcome = saver.finish()
    assert outcome is not None
    if outcome.error is not None:
        raise outcome.error
    again = state_of(place, method, model=model, checkpoint={**settings, "load": settings["save"]})
    load_checkpoint(again)
    resumed = _train(again, 3)
    differing = sum(one != other for one, other in zip(resumed, undisturbed, strict=True))
    different = _tensors_that_differ(state, again)
    return Figure(name, differing + different, 0, note=f"last loss {resumed[-1]:.9f} and {undisturbed[-1]:.9f}")


def _tensors_that_differ(state: TrainingState, other: TrainingState) -> int:
    pairs = zip(state.model_chunks[0].parameters(), other.model_chunks[0].parameters(), strict=True)
    return sum(not torch.equal(one, two) for one, two in pairs)


# Answers.

LARGEST_LOGIT_DIFFERENCE = 1e-4
NUM_NEW = 8


@full_precision
def check_answers(place: CheckPlace) -> list[Figure]:
    """Prompts of several lengths in one batch; transformers reads each prompt with our answer."""
    from transformers import AutoModelForCausalLM

    config = run_config(str(place.llama), "lora", model={"transformer_impl": "local"})
    shape = read_shape(str(place.llama))
    chunks = build_model_chunks(shape, config.model, config.parallel)
    with quiet():
        load_pretrained(chunks, str(place.llama), shape, tensor_parallel_rank=0, tensor_parallel_size=1, progress=False)
    loaded: Any = AutoModelForCausalLM.from_pretrained(place.llama, dtype=torch.float32)
    reference = loaded.to(place.device)
    prompts = [tuple(int(token) for token in one.tokens) for one in random_samples()]
    found = generate(chunks, prompts, GenerationSettings(frozenset(), NUM_NEW, batch_size=len(prompts)))
    differing, largest = 0, 0.0
    for prompt, answer in zip(prompts, found, strict=True):
        ids = torch.tensor([[*prompt, *answer]], device=place.device)
        with torch.no_grad():
            expected = reference(ids).logits[0]
            positions = torch.arange(ids.shape[1], device=place.device)[None]
            ours = chunks[0](ids, positions, None)[0, :, : LLAMA["vocab_size"]]
        largest = max(largest, float((ours - expected).abs().nan_to_num(math.inf).max()))
        differing += answer != expected[len(prompt) - 1 : -1].argmax(-1).tolist()
    return [
        Figure(
            "answers that are not transformers'", differing, 0, note=f"{len(prompts)} prompts, {NUM_NEW} tokens each"
        ),
        Figure("largest difference of a logit", largest, LARGEST_LOGIT_DIFFERENCE),
    ]
