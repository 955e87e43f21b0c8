"""The start spans the leading singular directions of the weights' gradient, which it never forms, in a model."""

import json
import math
from collections.abc import Collection
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from peft.tuners.lora.config import LoraConfig, LoraGAConfig
from peft.tuners.lora.layer import Linear
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_peft.adapters.attach import attach_adapters, linear_layers, start_gradients_at_the_embedding
from megatron_peft.adapters.frozen_linear import FrozenLinearCall
from megatron_peft.config import ConfigurationError
from megatron_peft.lora_ga.initialize import SketchProduct, _Sketch, init_from_gradients
from megatron_peft.lora_ga.sketch import INIT_RULES
from megatron_peft.models.families import read_shape
from megatron_peft.models.layers import RMSNorm, _SwiGLU
from megatron_peft.parallel.layout import LinearLayout
from megatron_peft.runtime import cpu
from megatron_peft.training.run import build_state, first_steps
from megatron_peft.training.step import finish_with, run_schedule
from tests.kept import kept_for_backward
from tests.one_rank import Place, one_rank
from tests.tiny_llama import save_llama, save_pairs
from tests.training.layout_runs import Job, data_of

RANK = 4
WIDE = {"hidden_size": 192, "num_attention_heads": 12, "num_key_value_heads": 4, "vocab_size": 64}


@one_rank()
def exact_and_started(job: Job, inits: Collection[str]) -> Any:
    """The exact gradient [out, in] of the mean loss by layer; the start of each of these names; what a NaN is told as;
    bytes that a batch keeps for backward in the frozen base and in the passes of the first start."""
    config, shape = job.config(1), read_shape(job.base)
    data = data_of(config)
    (chunk,) = (wrapped.module for wrapped in build_state(config, shape, data.train_iters).model_chunks)
    steps = first_steps(config, data.train)
    num_tokens = sum(microbatch.num_loss_tokens for step in steps for microbatch in step)
    kept: list[int] = []

    def replay() -> float:
        finish_with([chunk], None)
        with kept_for_backward() as tensors:
            reports = [run_schedule([chunk], steps[0], forward_only=False).sum(0)]
        memories = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
        for parameter in chunk.parameters():  # are there anyway
            memories.pop(parameter.untyped_storage().data_ptr(), None)
        kept.append(sum(memories.values()))
        reports += [run_schedule([chunk], step, forward_only=False).sum(0) for step in steps[1:]]
        return float(sum(report[0] for report in reports)) / num_tokens

    layers = {target.name: target.module for target in linear_layers(chunk)}
    gradients, loss = _exact_gradients(layers, replay)
    gradients = {name: G / num_tokens for name, G in gradients.items()}
    hook = start_gradients_at_the_embedding(chunk)
    replay()
    hook.remove()
    starts, (_, *kept_by_frozen_base) = {}, list(kept)
    kept.clear()
    for init in inits:
        peft = replace(config.peft, lora_ga_init=init)
        attach_adapters([chunk], peft, config.training.seed)
        with _NewShapes() as new:
            report = _start(chunk, peft, replay, num_tokens)
        adapters = {name: module.adapter for name, module in layers.items()}
        starts[init] = SimpleNamespace(
            A={name: adapter.A.detach() for name, adapter in adapters.items()},  # [r, in]
            B={name: adapter.B.detach() for name, adapter in adapters.items()},  # [out, r]
            change=[float(adapter.delta_weight().norm()) for adapter in adapters.values()],
            energy=report.energy,
            losses=(replay(), loss),  # with the adapters and without
            shapes=new.shapes,  # of new tensors meanwhile
        )
    layers["decoder.layers.1.mlp.linear_fc2"].weight.data[0, 0] = torch.nan
    with pytest.raises(ConfigurationError) as told:
        _start(chunk, config.peft, replay, 1)
    kept_bytes = [*kept_by_frozen_base, *kept[:2]]
    return SimpleNamespace(gradients=gradients, starts=starts, nan_message=str(told.value), kept_bytes=kept_bytes)


def _start(chunk: Any, peft: Any, replay: Any, num_tokens: int) -> Any:
    return init_from_gradients([chunk], peft, 1, replay, num_tokens)


def _exact_gradients(layers: dict[str, Any], replay: Any) -> tuple[dict[str, torch.Tensor], float]:
    for module in layers.values():
        module.adapter, module.is_frozen = None, False
        module.weight.requires_grad_(True)
    loss = replay()
    gradients = {name: module.weight.grad.double() for name, module in layers.items()}
    for module in layers.values():
        module.weight.requires_grad_(False)
        module.weight.grad = None
    return gradients, loss


class _NewShapes(TorchDispatchMode):
    """Shapes of the tensors that operations return and that are not views of what they were given."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.shapes.add(tuple(tensor.shape))
        return result


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """24 samples: a gradient of full rank with a flat spectrum, as a model of random weights has it."""
    folder = tmp_path_factory.mktemp("start")
    peft = {"method": "lora-ga", "lora_rank": RANK, "lora_ga_batches": 3}
    base, data = str(save_llama(folder / "base", num_hidden_layers=2)), str(save_pairs(folder / "pairs.jsonl"))
    return exact_and_started(Job("start", base, data, peft=peft), ["aligned"])


SHORT = (("1 22 3 41 5 16", "7 28 9 50"), ("60 2 13", "4 5 6 57"))


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """Fewer tokens than the sketch is wide: it is exact to rounding. Activations and sketches are smaller than any
    weight."""
    folder = tmp_path_factory.mktemp("short")
    samples = [{"prompt": prompt, "completion": " " + text} for prompt, text in SHORT]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, samples)) + "\n")
    base, data = str(save_llama(folder / "base", num_hidden_layers=2, **WIDE)), str(folder / "pairs.jsonl")
    groups = {"training": {"micro_batch_size": 1, "global_batch_size": 1}, "data_settings": {"vocab_size": 63}}
    peft = {"method": "lora-ga", "lora_rank": RANK, "lora_ga_batches": 2}
    return exact_and_started(Job("short", base, data, peft=peft, **groups), INIT_RULES)


def _sine(found_rows, exact_rows):
    """Of the largest principal angle between two row spaces."""
    found_basis, exact_basis = (torch.linalg.qr(rows.double().T)[0] for rows in (found_rows, exact_rows))
    return float((exact_basis - found_basis @ (found_basis.T @ exact_basis)).norm(2))


def test_captured_energy_is_that_of_the_exact_subspace_and_is_reported(found):
    """By orthonormal rows with the norm of LoRA's own start."""
    for name, G in found.gradients.items():
        A = found.starts["aligned"].A[name]
        torch.testing.assert_close(3 * A @ A.T, torch.eye(RANK), atol=1e-5, rtol=0)
        exact = torch.linalg.svdvals(G)[:RANK].square().sum()
        assert 3 * (G @ A.T.double()).square().sum() > 0.99 * exact, name
        true = float(exact / G.square().sum())
        assert found.starts["aligned"].energy[name] == pytest.approx(true, rel=0.05), name


@pytest.mark.parametrize("init", INIT_RULES)
def test_the_start_preserves_the_function_and_makes_no_tensor_of_a_weights_size(short, init):
    with_adapters, without = short.starts[init].losses
    assert with_adapters == pytest.approx(without, rel=1e-6)
    assert max(short.starts[init].change) < 1e-5
    smallest = min(G.numel() for G in short.gradients.values())
    assert max(math.prod(shape) for shape in short.starts[init].shapes) < smallest


def test_paper_is_the_best_approximation_of_the_mean_losss_gradient(short):
    for name, G in short.gradients.items():
        U, S, Vh = torch.linalg.svd(G, full_matrices=False)
        started = short.starts["paper"]
        product = started.B[name].double() @ started.A[name].double()
        torch.testing.assert_close(product, (U * S)[:, :RANK] @ Vh[:RANK], atol=1e-3 * float(S[0]), rtol=0)


def test_original_equals_an_exact_svd_under_our_formula(short):
    """Up to the signs of the vectors, each turned alike on both sides."""
    for name, G in short.gradients.items():
        U, S, Vh = torch.linalg.svd(G, full_matrices=False)
        c = math.sqrt(math.sqrt(G.shape[0]) / 16)
        A, B = short.starts["original"].A[name].double(), short.starts["original"].B[name].double()
        separate = S[:-1] - S[1:] > 0.02 * S[0]
        for k in range(RANK):
            if separate[max(k - 1, 0) : k + 1].all():
                assert abs(float(A[k] @ Vh[k])) == pytest.approx(c, rel=1e-3), (name, k)
            if separate[RANK + k - 1 : RANK + k + 1].all():
                assert abs(float(B[:, k] @ U[:, RANK + k])) == pytest.approx(c, rel=1e-3), (name, k)
        for product in (A @ A.T, B.T @ B):
            torch.testing.assert_close(product, c**2 * torch.eye(RANK, dtype=torch.float64), atol=1e-4, rtol=0)


def test_original_spans_what_hugging_face_pefts_start_spans(short):
    for name, G in short.gradients.items():
        torch.manual_seed(0)
        base = torch.nn.Linear(G.shape[1], G.shape[0], bias=False)
        base._peft_loraga_grad = G.float()  # what preprocess_loraga leaves
        config = LoraConfig(r=RANK, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())
        theirs = Linear(base, "default", config, r=RANK, lora_alpha=RANK)
        ours = short.starts["original"]
        assert _sine(ours.A[name], theirs.lora_A["default"].weight.detach()) < 1e-2, name
        assert _sine(ours.B[name].T, theirs.lora_B["default"].weight.detach().T) < 1e-2, name


def test_the_passes_keep_for_backward_what_the_frozen_base_keeps_and_a_gradient_that_is_not_finite_is_an_error(short):
    frozen, *passes = short.kept_bytes
    assert frozen and passes == [frozen, frozen]
    assert short.nan_message.startswith("LoRA-GA's start: the gradient of decoder.layers.0.")
    assert all(text in short.nan_message for text in ("is NaN or infinite", "--peft-method lora"))


S, BATCH, IN, OUT, WIDTH = 5, 3, 12, 8, 4
ALONE: Any = Place(0, 1)


def draw(name: str, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(map(ord, name))))


def normed(h: torch.Tensor) -> torch.Tensor:
    """Normed and taken through the entrance of a column-parallel layer of one rank."""
    cpu.install()
    settings: Any = SimpleNamespace(params_dtype=torch.float32, sequence_parallel=False)
    norm = RMSNorm(settings, h.shape[-1])
    norm.weight.data.copy_(draw("norm", h.shape[-1]))
    return copy_to_tensor_model_parallel_region(norm(h), ALONE)


@pytest.mark.parametrize("make", [_SwiGLU.apply, normed, torch.tanh])
@pytest.mark.parametrize("is_first", [True, False])
def test_passes_add_up_a_narrow_product_and_save_no_input_that_can_be_recomputed(is_first, make):
    num_features = make(draw("h", 1, 1, 2 * IN)).shape[-1]
    weight, omega, Q = draw("W", OUT, num_features), draw("omega", WIDTH, num_features), draw("Q", OUT, WIDTH)
    branch = SketchProduct(omega, OUT, True) if is_first else SketchProduct(Q.T, num_features, False)
    G = torch.zeros(OUT, num_features)
    for microbatch in ("first", "second"):
        x = make(draw(microbatch, S, BATCH, 2 * IN).requires_grad_())
        dy = draw(f"d {microbatch}", S, BATCH, OUT)
        with kept_for_backward() as kept:
            y = branch(x, FrozenLinearCall(weight, None, False, False, ALONE))
        assert len([tensor for tensor in kept if tensor.shape == x.shape]) == (make is torch.tanh)
        torch.testing.assert_close(y, x @ weight.T)
        torch.testing.assert_close(*torch.autograd.grad(y, x, dy), dy @ weight)
        G += dy.flatten(0, 1).T @ x.detach().flatten(0, 1)
    torch.testing.assert_close(branch.total, omega @ G.T if is_first else Q.T @ G, atol=1e-4, rtol=1e-4)


def test_a_ranks_columns_of_omega_are_a_matrix_of_their_own():
    """With a slice of a wider one a product by oneDNN took 500 times as long."""
    layout, weight = LinearLayout("row", OUT, IN, Place(1, 3)), draw("W", OUT, IN // 3)  # pyright: ignore[reportArgumentType]
    target: Any = SimpleNamespace(name="layer", module=SimpleNamespace(layout=layout, weight=weight, adapter=None))
    omega = _Sketch(target, 2, "aligned", 0).branch.narrow
    assert omega.shape[1] == IN // 3 and omega.is_contiguous()


def test_sums_are_float32_beside_bfloat16_activations():
    branch = SketchProduct(draw("omega", WIDTH, IN).bfloat16(), OUT, is_first=True)
    call = FrozenLinearCall(draw("W", OUT, IN).bfloat16(), None, False, False, ALONE)
    y = branch(draw("x", S, BATCH, IN).bfloat16().requires_grad_(), call)
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and branch.total.dtype == torch.float32
    assert branch.total.any()
