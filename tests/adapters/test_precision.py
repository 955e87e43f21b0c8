"""What must be exact is exact where the environment switches TF32 on, as container images do.

On a CPU TF32 is emulated; check-gpu runs the first test where it is real.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from megatron_peft.adapters import boft, urnn
from megatron_peft.adapters.boft import Boft, nearest_orthogonal
from megatron_peft.adapters.rotation import BlockRotation
from megatron_peft.adapters.step import AdaptersStep
from megatron_peft.adapters.unitary import as_real, change_from_start, exponential_step, orthogonality_error, structured
from megatron_peft.adapters.urnn import StructuredUrnn
from megatron_peft.config import PeftConfig
from megatron_peft.lora_ga.initialize import SketchProduct, _AddInBackward
from megatron_peft.parallel.layout import LinearLayout
from megatron_peft.runtime import cpu, precision
from tests.emulated_tf32 import tf32
from tests.one_rank import Place


@pytest.fixture
def without_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """`full_precision` does nothing."""
    monkeypatch.setattr(precision, "_set_full_precision", lambda: ("highest", [], []))


def made(module, method: str, **settings) -> BlockRotation:
    cpu.install()
    layout = LinearLayout("column", 256, 32, Place(0, 1))  # type: ignore[arg-type]
    return module.build(layout, PeftConfig(method, **settings), "decoder.layers.0.linear.adapter", 0, torch.float32)


@torch.no_grad()
def moved_boft() -> Boft:
    adapter = made(boft, "boft")
    adapter.Q += 0.1 * drawn_like(adapter.Q)
    return adapter


@torch.no_grad()
def moved_urnn() -> StructuredUrnn:
    """theta at a distance of 1e-3 from theta_0."""
    adapter = made(urnn, "urnn")
    adapter.theta += 1e-3 * drawn_like(adapter.theta)
    return adapter


def drawn_like(parameter: Tensor) -> Tensor:
    return torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0), device="cpu").to(parameter.device)


def rotation_error(adapter: BlockRotation) -> float:
    with tf32(), torch.no_grad():
        D = adapter.changes()
    return float(orthogonality_error(D + torch.eye(D.shape[-1], device=D.device)))


def relative_error(adapter: StructuredUrnn) -> float:
    """Of D beside float64's."""
    with tf32(), torch.no_grad():
        D = adapter.changes()
    start, permutation = adapter.start.double(), adapter.constants()[1]
    theta = adapter.theta.detach().double()
    exact = as_real(change_from_start(theta, structured(start, permutation), permutation))
    return float((D - exact).norm() / exact.norm())


@pytest.mark.gpu("precision")
def test_boft_is_orthogonal_and_urnns_small_change_is_right(figure):
    figure("boft: orthogonality error while TF32 is allowed", rotation_error(moved_boft()), 1e-5)
    figure("urnn: orthogonality error while TF32 is allowed", rotation_error(moved_urnn()), 1e-5)
    # float32's own, of a difference a thousand times smaller than its terms
    figure("urnn: relative error of a small change", relative_error(moved_urnn()), 2e-4)


@pytest.mark.usefixtures("without_precision")
def test_neither_is_where_nothing_asks_for_full_precision():
    assert 1e-3 < rotation_error(moved_boft()) < 2e-3
    assert 0.09 < relative_error(moved_urnn()) < 0.13


class Layer(nn.Module):
    """What a step's rotations know of an adapted layer."""

    def __init__(self, adapter: BlockRotation) -> None:
        super().__init__()
        self.adapter, self.weight = adapter, torch.zeros(256, 32)


def test_a_steps_blocks_and_gradients_are_not_rounded():
    layers = nn.ModuleList([Layer(moved_boft()), Layer(moved_urnn())])
    with tf32() as mode:
        step = AdaptersStep([layers])
        step.begin()
        for layer in layers:
            layer.adapter.held.total.normal_(generator=torch.Generator().manual_seed(0))
        step.finish([])
    assert mode.num_rounded == 0
    assert all(layer.adapter.trained.grad.norm() > 0 for layer in layers)


@pytest.mark.parametrize("make", [moved_boft, moved_urnn])
def test_nor_are_those_of_blocks_that_are_built_in_each_forward(make):
    adapter = make()
    with tf32() as mode:
        adapter.changes().sum().backward()
    assert mode.num_rounded == 0 and adapter.trained.grad.norm() > 0


def near_orthogonal() -> Tensor:
    return torch.eye(8) + 0.02 * torch.randn(16, 8, 8, generator=torch.Generator().manual_seed(0))


def unitary_and_gradient() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    U, G = torch.randn(2, 4, 8, 8, dtype=torch.complex64, generator=draw)
    return torch.linalg.qr(U)[0], G


def test_projection_and_the_unitary_step_end_on_the_group_and_the_error_is_measured_right():
    with tf32() as mode:
        projected, stepped = nearest_orthogonal(near_orthogonal()), exponential_step(*unitary_and_gradient(), 0.1)
        errors = [float(orthogonality_error(found)) for found in (projected, stepped)]
    assert mode.num_rounded == 0 and max(errors) < 1e-5


@pytest.mark.usefixtures("without_precision")
def test_they_do_not_where_nothing_asks_for_full_precision():
    with tf32():
        projected, stepped = nearest_orthogonal(near_orthogonal()), exponential_step(*unitary_and_gradient(), 0.1)
        measured = orthogonality_error(torch.linalg.qr(near_orthogonal())[0])
    assert all(orthogonality_error(found) > 1e-4 for found in (projected, stepped)) and measured > 1e-4


@pytest.mark.parametrize("is_first", [True, False])
def test_lora_gas_sketches_are_not_rounded(is_first):
    cpu.install()
    draw = torch.Generator().manual_seed(0)
    x, grad = torch.randn(5, 2, 12, generator=draw), torch.randn(5, 2, 8, generator=draw)
    narrow = torch.randn(4, 12 if is_first else 8, generator=draw)
    product, call = SketchProduct(narrow, 8 if is_first else 12, is_first), SimpleNamespace(splits_sequence=False)
    z = torch.zeros_like(grad, requires_grad=True)
    with tf32() as mode:
        _AddInBackward.apply(z, x, None, product, call).backward(grad)
    flat = x.flatten(0, 1), grad.flatten(0, 1)
    G = flat[1].T.double() @ flat[0].double()
    exact = narrow.double() @ (G.T if is_first else G)
    assert mode.num_rounded == 0
    torch.testing.assert_close(product.total, exact.float(), rtol=1e-5, atol=1e-5)
