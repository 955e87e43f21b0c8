"""Steps and layers are really run and timed, and what they keep and send is counted, of the right things."""

import json
import re
from collections import Counter
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import nn

from megatron_peft.benchmarks import BENCHMARKS, files, layers, measure, steps, subjects
from megatron_peft.benchmarks.layers import crossover_figures
from megatron_peft.benchmarks.subjects import STEPS, Setting, on_ranks
from megatron_peft.models.families import read_shape
from megatron_peft.runtime import cpu_kernels
from megatron_peft.training import run as start_module
from tests.one_rank import one_rank


@pytest.mark.parametrize("figures", [steps.rotation_figures, steps.hybrid_full_figures, steps.quantized_figures])
def test_a_figure_is_the_quotient_of_the_two_that_it_names(figures, even: Setting) -> None:
    for figure in figures(even):
        amounts = [float(text) for text in re.findall(r"([\d.]+) (?:CPU s|MiB)", figure.note)[:2]]
        assert amounts[0] > 0 and figure.measured == pytest.approx(amounts[0] / amounts[1], rel=0.2)
        if "step" in figure.name:
            above, below = re.findall(r"(\w+) step", figure.name)
            assert [above, below] == re.findall(r"(\w+) [\d.]+ CPU s", figure.note)


def test_a_step_is_judged_by_what_it_takes_beyond_the_floor_of_the_same_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"frozen": [1.0, 2.0, 1.0], "frozen-mkl": [2.0, 2.0, 2.0], "lora": [1.5, 2.4, 1.3]}
    seconds |= {"lora adds": [0.25, 0.5, 0.3], "lora spares": [0.02, 0.04, 0.1]}
    monkeypatch.setattr(measure, "on_ranks", lambda run, setting, **_: [seconds] * setting.world_size)
    monkeypatch.setattr(steps, "METHODS", ("lora",))
    (figure,) = steps.ratio_figures(Setting("nowhere", tensor_parallel=2))
    assert (figure.name, figure.unit) == ("TP2: lora step beyond its floor", "hundredths of the frozen step")
    assert figure.measured == pytest.approx(100 * (1.3 - (1 + 0.25 - 0.02)))
    assert (figure.target, figure.reached) == (steps.BOOKKEEPING["lora"], False)
    assert figure.note.startswith("step 1.300 (1.200 to 1.500; against MKL 0.750), floor 1.230; lora 3.000 CPU s")
    seconds["lora"] = [1.2, 2.0, 1.0]
    (figure,) = steps.ratio_figures(Setting("nowhere", tensor_parallel=2))
    assert figure.note.startswith("below its floor: not measured, take more --turns; step 1.000 ")


def floors_of_steps(setting: Setting) -> dict[str, Counter]:
    """Started on a rank. The products that a step has beyond the frozen base's (+) and has not (-), by their shapes."""
    logs = {name: measure.products_of(STEPS[name](setting)) for name in ("frozen", "lora", "boft")}
    ran = []
    for log in logs.values():
        log.again = {call: partial(ran.append, call) for call in log.again}
    found = {}
    for name in ("lora", "boft"):
        for mark, pair in {"+": ("frozen", name), "-": (name, "frozen")}.items():
            measure.products_beyond(logs[pair[1]], logs[pair[0]])()
            found[name + mark] = Counter(ran)
            ran.clear()
    return found


def test_a_floor_is_of_the_products_that_the_frozen_base_lacks(even: Setting) -> None:
    """A low rank: six narrow ones a layer, without the first's input gradient. A rotation: those of its blocks."""
    (found,) = on_ranks(floors_of_steps, even)
    num_layers = 4 * read_shape(even.checkpoint).num_layers
    assert sum(found["lora+"].values()) == 6 * num_layers - 1
    assert all(any(even.rank in shape for shape in factors) for factors in found["lora+"])
    assert sum(found["lora-"].values()) == 1  # the first layer's input gradient
    batched = [factors for factors in found["boft+"] if len(factors[1]) == 3]
    assert len(batched) > 4 and any("linalg_inv_ex" in factors for factors in found["boft+"])


def test_recorded_products_run_again_on_copies_and_leave_the_step_alone():
    total, x = torch.zeros(2, 2), torch.ones(2, 2)
    log = measure.products_of(lambda: total.addmm_(x, x))
    run = measure.products_beyond(log, measure.ProductLog())
    run()
    assert torch.equal(total, torch.full((2, 2), 4.0))
    assert torch.equal(next(iter(log.again.values())).args[0], torch.full((2, 2), 4.0))


def products_of_steps(setting: Setting) -> dict[str, set[str]]:
    """Started on a rank. Which operators multiply activations with weights in a step."""
    cpu_kernels._FEWEST_FOR_ONEDNN = 0  # the model is a small one
    found = {}
    for name in ("frozen", "frozen-mkl", "boft"):
        step = STEPS[name](setting)
        with torch.profiler.profile() as profile:
            step()
        events = {event.name for event in profile.events()}
        found[name] = {product for product in PRODUCTS if product in events}
    return found


ONEDNN, PRODUCTS = "mkldnn::_linear_pointwise", ("mkldnn::_linear_pointwise", "aten::mm", "aten::addmm")


def test_the_frozen_base_multiplies_as_an_adapted_model_does(even: Setting) -> None:
    (found,) = on_ranks(products_of_steps, even)
    assert ONEDNN in found["boft"]
    assert found["frozen"] == {ONEDNN} and ONEDNN not in found["frozen-mkl"]


def test_each_storage_counts_once_and_weights_do_not():
    weight = nn.Linear(4, 4, bias=False)
    x = torch.randn(10, 4, requires_grad=True)

    def forward() -> None:
        y = weight(x)
        (y * x + y.exp()).sum()

    assert steps.saved_bytes(weight, forward) == 3 * 10 * 4 * 4  # x, y and exp(y)


def test_twice_the_rank_keeps_twice_the_narrow_activations(even: Setting):
    """[tokens, rank] in float32 of four linear layers in each of four; only LoRA and the Hybrid have a rank."""
    kept, wider = (subjects.in_world(replace(even, rank=rank), steps.count_methods) for rank in (4, 8))
    narrow = 4 * 4 * even.rows * even.positions * 4 * 4
    grown = {name: wider[name] - kept[name] for name in kept}
    assert grown == {"frozen": 0, "lora": narrow, "boft": 0, "urnn": 0, "hybrid": narrow}


def test_real_steps_reach_the_targets(tiny: Setting) -> None:
    settings = [replace(tiny, **layout) for layout in BENCHMARKS["collectives"].layouts]
    figures = {figure.name: figure for setting in settings for figure in steps.collectives_figures(setting)}
    calls = [figure for name, figure in figures.items() if "bytes" not in name]
    assert [figure.measured for figure in calls] == [1, 0, 1 + 8, 0, 1, 0, 1 + 2 * 8, 0]
    assert all(figure.reached for figure in calls)
    # 4 layers: 2 row-parallel layers each forward, 2 column-parallel ones back, embedding and output, 3 for the loss.
    assert "frozen 21 calls" in figures["TP2: LoRA's all-reduces above the frozen base's"].note
    assert "8 all_gather" in figures["TP2+SP: LoRA's other calls wider than r"].note


def test_memory_that_steps_free_is_to_be_given_back(monkeypatch: pytest.MonkeyPatch):
    done: list = []
    monkeypatch.setattr(measure, "give_back_freed_memory", lambda: done.append("asked"))
    monkeypatch.setattr(measure, "STEPS", {"lora": lambda setting: lambda: done.append("step")})
    measure.run_steps(Setting("nowhere"), "lora", num_steps=1, keeps_freed=False)
    assert done == ["asked", "step"]


def test_a_real_start_sees_every_batch_twice(monkeypatch: pytest.MonkeyPatch, tiny: Setting):
    """With two batches the start runs four, the frozen base three (one does not count)."""
    runs = []
    schedule = start_module.run_schedule
    monkeypatch.setattr(steps, "NUM_BATCHES", 2)
    monkeypatch.setattr(
        start_module, "run_schedule", lambda *args, **kwargs: runs.append(1) or schedule(*args, **kwargs)
    )
    frozen, a_batch = subjects.in_world(tiny, steps.time_start)
    assert len(runs) == 4 and frozen > 0 and a_batch > 0


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("peft")
    monkeypatch.setattr(layers, "WIDTH", 64)
    monkeypatch.setattr(layers, "NUM_TOKENS", 8)
    with one_rank():
        yield


def test_layers_start_as_linear_ones_and_have_the_same_number_of_blocks(small):
    ours, theirs = layers.LAYERS["BOFT"](), layers._hf_boft()
    x = torch.randn(8, 1, 64)
    weight = theirs.base_model.model[0].base_layer.weight
    torch.testing.assert_close(theirs(x), x @ weight.t())
    rotations = dict(theirs.named_parameters())["base_model.model.0.boft_R.default"]
    assert rotations.shape == (3, 64 // 8, 8, 8) and ours(x).shape == x.shape


def test_steps_run_forward_and_backward(small):
    seen = []
    for build in layers.LAYERS.values():
        layer = build()
        layers._step(lambda x, layer=layer: seen.append(x) or layer(x))()
    assert len(seen) == 3 and all(x.grad is not None and x.grad.abs().sum() > 0 for x in seen)


def test_the_way_in_use_stands_first(monkeypatch):
    monkeypatch.setattr(layers, "CROSSOVER_NUM_TOKENS", 8)
    monkeypatch.setattr(layers, "DENSE_UP_TO", 16)
    figures = crossover_figures(Setting("nowhere", turns=1))
    found = [figure.name.removeprefix("groups of ") for figure in figures]
    assert found == ["4: dense / fourier", "16: dense / fourier", "32: fourier / dense", "64: fourier / dense"]
    assert all(figure.measured > 0 and figure.target == 1.0 for figure in figures)


def test_benchmarks_are_those_of_the_documentation() -> None:
    page = Path(__file__).parents[2] / "docs" / "benchmarks.md"
    assert re.findall(r"^\| `([a-z0-9-]+)` \|", page.read_text(), re.M) == list(BENCHMARKS)
    for name, benchmark in BENCHMARKS.items():
        module, _, function = benchmark.measure.partition(":")
        assert callable(getattr(import_module(f"megatron_peft.benchmarks.{module}"), function)), name


def test_model_that_is_there_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(files, "loading_figures", lambda setting: seen.append(setting) or [])
    (tmp_path / "model").mkdir()
    BENCHMARKS["loading"].figures(tmp_path, tmp_path / "model", turns=2)
    assert seen == [Setting(str(tmp_path / "model"), tensor_parallel=3, turns=2)]


def test_every_token_counts_and_labels_are_the_next_tokens() -> None:
    batch = subjects.microbatch(Setting("nowhere", rows=2, positions=8), vocab_size=50)
    assert torch.equal(batch.tokens[:, 1:], batch.labels[:, :-1])
    assert batch.num_loss_tokens == 16


def test_small_model_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    monkeypatch.setattr(subjects, "SHAPE", {**subjects.SHAPE, **small, "num_hidden_layers": 1})
    folder = subjects.save_shape(tmp_path / "a")
    assert json.loads((folder / "config.json").read_text())["hidden_size"] == 16
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert (subjects.save_shape(folder) / "model.safetensors").stat().st_mtime_ns == written


def losses_of_two_steps(setting: Setting) -> dict[str, list[float]]:
    """Started on a rank. Loss sums of our steps, in the same world."""
    losses = {}
    for name in ("frozen", "lora", "full"):
        step = STEPS[name](setting)
        answers = [step() for _ in range(3)]  # a tensor is the schedule's: sum of the losses, tokens, positions
        losses[name] = [(a[0, 0] / a[0, 1]).item() if isinstance(a, torch.Tensor) else a.loss for a in answers]
    return losses


def test_frozen_base_learns_nothing_and_the_others_do(tiny: Setting) -> None:
    (losses,) = on_ranks(losses_of_two_steps, replace(tiny, microbatches=2))
    frozen, lora, full = losses["frozen"], losses["lora"], losses["full"]
    assert frozen[0] == frozen[2] == pytest.approx(lora[0], rel=1e-6) == pytest.approx(full[0], rel=1e-6)
    assert lora[2] < lora[0] and full[2] < full[0]


def test_peer_starts_from_the_same_weights_and_learns(tiny: Setting) -> None:
    step = subjects.hf_peft_step(tiny)
    losses = [step() for _ in range(3)]
    assert losses[2] < losses[0]
