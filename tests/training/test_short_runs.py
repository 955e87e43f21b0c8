"""A two-layer Llama trains on any device as a CPU has recorded it.

Ten losses of each method are recorded from a CPU in float32 with padded samples. Packed samples, recomputed
activations, fused kernels and Transformer Engine compute the same function, so all are compared with them.
"""

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch

from megatron_peft.benchmarks.measure import Figure
from megatron_peft.config import ConfigurationError
from megatron_peft.config.untrusted import read_json_object
from megatron_peft.models.gpt import uses_transformer_engine
from megatron_peft.models.kernels import Installed, require_packed_attention
from tests.benchmarks.gpu_subjects import (
    FULL_RECOMPUTE,
    LOSSES,
    chosen_sizes,
    largest_relative,
    losses_of,
    run_config,
    state_of,
)
from tests.benchmarks.gpu_subjects import SIZES as ALL_SIZES

SIZES = chosen_sizes()
RECORDED: dict[str, list[float]] = read_json_object(LOSSES)["losses"]
# Adam turns the rounding of a small gradient into a whole step, so losses differ by more than one result is rounded:
# within 1,000 units of the last place of float32. Weights in bf16 are rounded before anything is computed with them.
TOLERANCE = {False: 1000 * torch.finfo(torch.float32).eps, True: torch.finfo(torch.bfloat16).eps}
LOCAL = {"transformer_impl": "local"}
FUSIONS = ("bias_activation_fusion", "bias_dropout_fusion", "apply_rope_fusion", "cross_entropy_loss_fusion")
Way = tuple[bool, bool, bool]  # in bf16, packed, recomputed

pytestmark = pytest.mark.usefixtures("alone")


def near_the_cpus(figure: Any, name: str, method: str, found: list[float], bf16: bool = False) -> None:
    expected = RECORDED[method][: len(found)]
    note = f"losses {found[0]:.6f} to {found[-1]:.6f}, CPU {expected[0]:.6f} to {expected[-1]:.6f}"
    figure(name, largest_relative(found, expected), TOLERANCE[bf16], note=note)


@pytest.mark.parametrize(("found", "misses"), [(2.0001, False), (2.001, True), (float("nan"), True)])
def test_a_loss_that_is_not_the_recorded_one_misses(monkeypatch, found, misses):
    monkeypatch.setitem(RECORDED, "lora", [1.0, 2.0, 3.0])
    figures: list[Figure] = []
    near_the_cpus(lambda *words, **more: figures.append(Figure(*words, **more)), "x", "lora", [1.0, found])
    assert [one.reached for one in figures] == [not misses]


def implementations() -> list[str]:
    installed = Installed.detected()
    return ["local", *(["transformer_engine"] if installed.cuda and installed.transformer_engine else [])]


def ways_to_train(implementation: str) -> list[Way]:
    """Padded where a run would refuse to pack: on a GPU kernels take bf16 only."""
    wanted = [(False, True, True), (False, False, False), (True, False, True), (True, True, False)]
    wanted += [(True, True, True)] * Installed.detected().cuda
    packs = {bf16: run_packs(implementation, bf16) for bf16 in (False, True)}
    return list(dict.fromkeys((bf16, packed and packs[bf16], recomputed) for bf16, packed, recomputed in wanted))


def run_packs(implementation: str, bf16: bool) -> bool:
    """Whether a run takes --pack-sequences here."""
    model = {"bf16": bf16, "transformer_impl": implementation}
    config = run_config("random", "lora", model=model, data={"pack_sequences": True})
    installed = Installed.detected()
    with_engine = uses_transformer_engine(config.model.transformer_impl, installed)
    try:
        require_packed_attention(config, SIZES.layer, with_engine, installed)
    except ConfigurationError:
        return False
    return True


def in_words(way: Way) -> str:
    bf16, packed, recomputed = way
    return ", ".join(["bf16" if bf16 else "float32", "packed" if packed else "padded", *["recomputed"] * recomputed])


CASES = {
    f"{implementation}: {in_words(way)}": (implementation, way)
    for implementation in implementations()
    for way in ways_to_train(implementation)[: SIZES.num_variants]
}


H100 = Installed(True, transformer_engine=True, varlen_attention=True, compute_capability=(9, 0), cudnn=92000)
A100 = replace(H100, compute_capability=(8, 0))  # without flash-attn, which alone packs there


@pytest.mark.parametrize(
    ("installed", "implementation", "packed"),
    [
        (Installed(cuda=False), "local", {False, True}),
        (H100, "local", {True}),
        (H100, "transformer_engine", {True}),
        (A100, "local", {True}),
        (A100, "transformer_engine", set()),
        (replace(A100, varlen_attention=False), "local", set()),
    ],
)
def test_samples_are_packed_only_where_a_run_would_not_refuse_it(monkeypatch, installed, implementation, packed):
    """`packed` holds whether bf16, of the ways that pack."""
    monkeypatch.setattr(Installed, "detected", lambda: installed)
    ways = ways_to_train(implementation)
    assert {bf16 for bf16, packs, _ in ways if packs} == packed
    assert len(set(ways)) == len(ways) and {bf16 for bf16, _, _ in ways} == {False, True}
    assert run_packs("auto", bf16=True) is (installed == H100 or not installed.cuda)  # with Transformer Engine


@pytest.mark.slow
def test_what_a_gpu_fuses_keeps_the_losses(llama, figure, monkeypatch):
    """megatron-core's fused functions, run eagerly, ten steps. In float32 its fused loss would miss."""
    monkeypatch.setattr(Installed, "detected", lambda: Installed(cuda=True))
    monkeypatch.setitem(globals(), "SIZES", ALL_SIZES["cpu"])
    monkeypatch.setitem(globals(), "CASES", {in_words(way): ("local", way) for way in ways_to_train("local")[:3]})
    with torch.compiler.set_stance("force_eager"):
        for method, case in product(("lora", "lora-ga", "boft"), CASES):
            test_losses_are_those_of_the_cpu(llama, figure, method, case)
        for bf16, fusion in product((False, True), (None, *FUSIONS)):
            test_losses_without_a_fused_kernel(llama, figure, bf16, fusion)
        test_recomputed_activations_have_the_same_dropout(llama, figure)
        for module in recomputable():
            test_losses_while_a_module_is_recomputed(llama, figure, module)
    assert state_of(llama, "boft", model={"bf16": True}).model_chunks[0].config.cross_entropy_loss_fusion


@pytest.mark.gpu("losses")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method", SIZES.methods)
def test_losses_are_those_of_the_cpu(llama, figure, method, case):
    implementation, (bf16, packed, recomputed) = CASES[case]
    transformer = FULL_RECOMPUTE if recomputed else {}
    state = state_of(llama, method, model={"bf16": bf16, "transformer_impl": implementation}, transformer=transformer)
    near_the_cpus(figure, f"{method}, {case}", method, losses_of(state, SIZES.loss_steps, packed), bf16)


@pytest.mark.gpu("fusions")
@pytest.mark.parametrize("fusion", [None, *FUSIONS])
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])  # the loss is fused in bf16 alone
def test_losses_without_a_fused_kernel(llama, figure, bf16, fusion):
    """Of those that are on without flags; the first of them tells whose Adam it is."""
    words = "bf16" if bf16 else "float32"
    state = state_of(llama, "boft", model={"bf16": bf16})
    if fusion is None:
        (optimizer, *_) = getattr(state.optimizer, "chained_optimizers", [state.optimizer])
        adam = type(optimizer.optimizer).__module__
        figure(f"{words}: Adam of torch", float(adam.startswith("torch.")), note=adam)
    else:
        is_on = bool(getattr(state.model_chunks[0].config, fusion))
        figure(f"{words}: {fusion} is on", float(is_on))
        if not is_on:
            return
    state = state_of(llama, "boft", model={"bf16": bf16, **LOCAL}, transformer={fusion: False} if fusion else {})
    what = f"without {fusion}" if fusion else "all that is on"
    near_the_cpus(figure, f"{words}: {what}", "boft", losses_of(state, SIZES.loss_steps), bf16)


@pytest.mark.gpu("recompute")
def test_recomputed_activations_have_the_same_dropout(llama, figure):
    kept, recomputed = (
        losses_of(state_of(llama, "lora", peft={"lora_dropout": 0.2}, model=LOCAL, transformer=transformer), 3)
        for transformer in ({"hidden_dropout": 0.1}, {"hidden_dropout": 0.1, **FULL_RECOMPUTE})
    )
    without = RECORDED["lora"][:3]
    note = f"{recomputed[-1]:.6f} and {kept[-1]:.6f}; without dropout {without[-1]:.6f}"
    figure("recomputed or kept", largest_relative(recomputed, kept), TOLERANCE[False], note=note)
    figure("dropout changes nothing", float(largest_relative(kept, without) <= TOLERANCE[False]), 0.0)


@pytest.mark.parametrize("method", ["lora", "hybrid"])
@pytest.mark.parametrize("module", ["layernorm", "mlp"])
def test_dropout_of_the_low_rank_is_the_same_while_a_module_is_recomputed(llama, method, module):
    """Bit for bit: a norm's output, which the mask multiplies, is freed and filled again; an MLP draws twice in all."""
    selective = {"transformer": {"recompute_granularity": "selective"}, "model": {"recompute_modules": (module,)}}
    kept, recomputed = (
        losses_of(state_of(llama, method, peft={"lora_dropout": 0.2}, **how), 3) for how in ({}, selective)
    )
    assert kept == recomputed


def recomputable() -> list[str]:
    """megatron-core recomputes norms on a GPU with Transformer Engine only."""
    installed = Installed.detected()
    return ["core_attn", *["layernorm"] * (installed.transformer_engine or not installed.cuda), "mlp"]


@pytest.mark.gpu("recompute")
@pytest.mark.parametrize("module", recomputable())
def test_losses_while_a_module_is_recomputed(llama, figure, module):
    selective = {"recompute_granularity": "selective"}
    state = state_of(llama, "lora", transformer=selective, model={"recompute_modules": (module,)})
    near_the_cpus(figure, f"--recompute-modules {module}", "lora", losses_of(state, SIZES.loss_steps))
