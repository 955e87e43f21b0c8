"""check-gpu on a CPU: that its checks run, what it does with failures, and that the page and its lines agree."""

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_peft.benchmarks import check_gpu
from megatron_peft.benchmarks.check_gpu import LINES, Line, accuracy, function_of, run, setup, speed, training
from megatron_peft.benchmarks.check_gpu.measure import Kernel, attempt, busy_share
from megatron_peft.benchmarks.check_gpu.subjects import SHARD_405B, CheckPlace, shape_of_llama
from megatron_peft.benchmarks.measure import Figure
from megatron_peft.commands import check_gpu as command
from megatron_peft.config.untrusted import read_json_object
from megatron_peft.models.kernels import Installed
from megatron_peft.runtime import cpu
from tests.adapters.test_operation_counts import A_MICROBATCH
from tests.emulated_tf32 import FACTORS, as_tf32
from tests.one_rank import one_rank

PAGE = Path(__file__).parents[2] / "docs" / "untested-on-cuda.md"
NO_ROW = {
    "versions",
    "checkpoints",
}  # a record of what was there; equality on a CPU is tested, the page has no row for it
CHEAP = ["versions", "world", "losses"]


def rows_of_the_page() -> dict[str, str]:
    """First column -> last column, of the table of paths."""
    table = PAGE.read_text().split("\n## ")[0]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]
    assert {len(one) for one in cells} == {5} and all(all(one) for one in cells), "an empty or a torn cell"
    return {one[0]: one[-1] for one in cells[2:]}


def test_rows_of_the_page_and_lines_name_each_other() -> None:
    rows = rows_of_the_page()
    by_page = {
        (row, line)
        for row, last in rows.items()
        if not last.startswith(("needs", "not covered"))
        for line in re.findall(r"`([^`]*)`", last)
        if line in LINES
    }
    by_lines = {(row, name) for name, line in LINES.items() for row in line.settles}
    assert by_page == by_lines
    assert {name for name, line in LINES.items() if not line.settles} == NO_ROW


def test_a_row_without_a_line_says_why() -> None:
    settled = {row for line in LINES.values() for row in line.settles}
    reasons = {row: last for row, last in rows_of_the_page().items() if row not in settled}
    assert all(re.match("(needs|not covered:) .{10}", last) for last in reasons.values()), reasons


def test_the_page_explains_every_line() -> None:
    below = PAGE.read_text().split("\n## ")[1]
    assert re.findall(r"^\| `([\w-]+)` \|", below, re.MULTILINE) == [*LINES]


def test_every_line_has_its_function() -> None:
    for name, line in LINES.items():
        module = __import__(f"{check_gpu.__name__}.{line.module}", fromlist=["_"])
        assert callable(getattr(module, function_of(name)))


def test_cheap_lines_pass_on_a_cpu_and_say_that_this_proves_nothing(tmp_path, capsys) -> None:
    assert command.main([*CHEAP, "--tiny", "--output", str(tmp_path / "found.json")]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("This proves nothing about CUDA") == 2
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["proves_something_about_cuda"] is False and found["device"] == "cpu"
    assert [line["name"] for line in found["lines"]] == CHEAP
    assert all(line["figures"] for line in found["lines"])


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [["--tiny"], []], ids=["tiny", "cpu"])
def test_every_line_passes_on_a_cpu(tmp_path, sizes) -> None:
    assert command.main([*sizes, "--output", str(tmp_path / "found.json")]) == 0


@pytest.fixture
def place(tmp_path) -> CheckPlace:
    cpu.install()  # as a world does: calls to CUDA go to the CPU
    return CheckPlace(tmp_path, run.TINY)


class RoundedFactors(TorchDispatchMode):
    """Every float32 product as a GPU's TF32 would compute it, whatever torch's settings say."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        factors = FACTORS.get(func.overloadpacket, slice(0, 0))
        rounded = [as_tf32(arg) for arg in args[factors]]
        return func(*args[: factors.start], *rounded, *args[factors.stop :], **(kwargs or {}))


def test_products_in_tf32_fail_the_layers(place) -> None:
    lora_only = replace(place, sizes=replace(run.TINY, methods=("lora",)))
    with one_rank(), RoundedFactors():
        figures = accuracy.check_layers(lora_only)
    assert not any(one.reached for one in figures if "float32: " in one.name)
    assert all(one.reached for one in figures if "bf16: " in one.name)


@pytest.mark.parametrize(("found", "passes"), [(2.0001, True), (2.001, False), (float("nan"), False)])
def test_losses_that_are_not_the_recorded_ones_fail(place, found, passes) -> None:
    recorded = replace(place, recorded={"lora": [1.0, 2.0, 3.0]})
    assert training._near_recorded("x", recorded, "lora", [1.0, found]).reached is passes


def broken(place: CheckPlace) -> list[Figure]:
    raise ValueError("a [bad] kernel")


def test_a_line_that_fails_names_itself_and_the_others_go_on(place, monkeypatch) -> None:
    monkeypatch.setattr(setup, "check_world", broken)
    monkeypatch.setattr(
        accuracy, "check_alibi", lambda place: [Figure("off", 2.0, 1.0), Figure("nan", float("nan"), 1.0)]
    )
    monkeypatch.setattr(setup, "check_versions", lambda place: [Figure("GPUs", 0.0)])
    console = Console(record=True, width=200)
    outcomes = run.run_lines(["world", "alibi", "versions"], place, console)
    assert [one.verdict for one in outcomes] == ["error", "FAIL", "pass"]
    console.print(run._summary(outcomes))
    text = console.export_text()
    assert "world: ValueError: a [bad] kernel" in text and "off; nan" in text


def test_a_measurement_that_raises_is_a_figure_that_failed_and_the_line_goes_on(place, monkeypatch, tmp_path) -> None:
    """The losses of one variant of one method; all others are measured."""

    def losses(place: CheckPlace, method: str, *_: Any, **groups: Any) -> list[float]:
        if method == "hybrid" and groups["model"]["bf16"]:
            raise ValueError("a [bad] kernel")
        return [1.0, 2.0]

    monkeypatch.setattr(training, "_losses_of", losses)
    several = replace(place.sizes, num_variants=4)
    recorded = CheckPlace(tmp_path, several, {"lora": [1.0, 2.0], "hybrid": [1.0, 2.0]})
    console = Console(record=True, width=200)
    [outcome] = run.run_lines(["losses"], recorded, console)
    failed = [one for one in outcome.figures if not one.reached]
    assert outcome.verdict == "FAIL" and len(outcome.figures) == 8 and len(failed) == 2
    assert (
        failed[0].name == "hybrid, local: bf16, padded, recomputed" and failed[0].note == "ValueError: a [bad] kernel"
    )
    assert "ValueError: a [bad] kernel" in console.export_text()
    run._write(tmp_path / "found.json", [outcome], is_gpu=False)
    written = json.loads((tmp_path / "found.json").read_text())["lines"][0]["figures"]
    assert [one["measured"] is None for one in written] == [not one.reached for one in outcome.figures]


def test_a_line_that_raises_keeps_what_it_has_measured(place, monkeypatch) -> None:
    def half(place: CheckPlace) -> Iterator[Figure]:
        yield Figure("first", 1.0)
        raise ValueError("no second one")

    monkeypatch.setattr(setup, "check_world", half)
    [outcome] = run.run_lines(["world"], place, Console(quiet=True))
    assert (outcome.verdict, outcome.error) == ("error", "ValueError: no second one")
    assert [one.name for one in outcome.figures] == ["first"]


def test_nothing_more_is_run_once_cuda_is_gone(place, monkeypatch) -> None:
    def gone() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def fatal(name: str) -> Figure:
        monkeypatch.setattr(torch.cuda, "synchronize", gone)
        gone()
        return Figure(name, 0.0)

    def line(place: CheckPlace) -> Iterator[Figure]:
        yield Figure("before", 0.0)
        yield from attempt("fatal", fatal)
        yield from attempt("after", lambda name: Figure(name, 0.0))

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(setup, "check_world", line)
    outcomes = run.run_lines(["world", "versions"], place, Console(quiet=True))
    assert [one.verdict for one in outcomes] == ["error", "not run"]
    assert [one.name for one in outcomes[0].figures] == ["before"]


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
def test_samples_are_packed_only_where_a_run_would_not_refuse_it(
    place, monkeypatch, installed, implementation, packed
) -> None:
    """`packed` holds whether bf16, of the variants that pack."""
    monkeypatch.setattr(Installed, "detected", lambda: installed)
    variants = training._variants(place, implementation)
    assert {bf16 for bf16, packs, _ in variants if packs} == packed
    assert len(set(variants)) == len(variants) and {bf16 for bf16, _, _ in variants} == {False, True}
    monkeypatch.setattr(training, "_count_waits", lambda name, *_: Figure(name, 0.0))
    kinds = {figure.name.split(": ")[0] for figure in training.check_waits(place)}
    by_default = installed == H100 or not installed.cuda  # with Transformer Engine, as it is installed
    assert ("lora, packed" in kinds) is by_default


@pytest.mark.slow
def test_what_a_gpu_fuses_passes_the_lines_of_losses(tmp_path, monkeypatch) -> None:
    """megatron-core's fused functions, run eagerly. In float32 its fused loss would miss `losses` and `recompute`."""
    monkeypatch.setattr(Installed, "detected", lambda: Installed(cuda=True))
    sizes = replace(run.CPU, methods=("lora", "lora-ga", "boft"), num_variants=3)
    place = CheckPlace(tmp_path, sizes, read_json_object(run.LOSSES)["losses"])
    with one_rank(), torch.compiler.set_stance("force_eager"):
        lines = [training.check_losses, training.check_recompute, training.check_fusions]
        figures = [figure for line in lines for figure in line(place)]
    assert not [figure for figure in figures if figure.reached is False]
    assert "bf16: without cross_entropy_loss_fusion" in {figure.name for figure in figures}


def driver() -> str:
    return setup._driver("driver").note


def tell_version(reference: Any) -> None:
    """As libcuda's, of a driver for CUDA 13.1."""
    reference._obj.value = 13010


def test_versions_name_the_driver_and_every_nccl(monkeypatch) -> None:
    assert setup._driver("driver") == Figure("driver", 0.0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(setup.ctypes, "CDLL", lambda name: SimpleNamespace(cuDriverGetVersion=tell_version))
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert driver().startswith("takes CUDA 13.1;")
    nvml = SimpleNamespace(nvmlInit=lambda: None, nvmlSystemGetDriverVersion=lambda: "580.65.06")
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert driver() == "580.65.06"
    monkeypatch.setattr(nvml, "nvmlInit", lambda: 1 // 0)  # the package without the library
    assert driver().startswith("takes CUDA 13.1;")
    monkeypatch.setattr(setup.nccl, "version", lambda: (2, 29, 7))
    installed = [SimpleNamespace(name=name, version="2.29.7") for name in ("nvidia-nccl-cu13", "nvidia-cudnn-cu13")]
    monkeypatch.setattr(setup, "distributions", lambda: installed)
    assert setup._nccl("NCCL") == Figure("NCCL", 1.0, note="torch's 2.29.7, nvidia-nccl-cu13 2.29.7")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert setup._nccl("NCCL").note == "nvidia-nccl-cu13 2.29.7"


@pytest.mark.parametrize(
    ("words", "told"), [(["c"], "no line is called c: there are versions"), (["--nope"], "--nope")]
)
def test_a_wrong_word_is_told(words, told, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        command.main(words)
    assert told in capsys.readouterr().err


def test_several_processes_are_refused(monkeypatch, capsys) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="2"):
        command.main([])
    assert "start it without torchrun" in capsys.readouterr().err


def test_kernels_that_overlap_count_once() -> None:
    kernels = [Kernel("a", 0, 4), Kernel("b", 2, 5), Kernel("c", 8, 10)]
    assert busy_share(kernels) == pytest.approx(0.7)
    assert busy_share([]) == 0


def test_kernels_of_an_adapter_are_compared_with_the_operations_that_are_counted() -> None:
    """Those of tests/adapters/test_operation_counts.py, which the page names too."""
    counted = {method: forward + backward for method, (forward, backward, _) in A_MICROBATCH.items()}
    assert speed.ADDED_OPERATIONS == {**counted, "lora-ga": counted["lora"]}
    row = next(line for line in PAGE.read_text().splitlines() if line.startswith("| few kernels a layer |"))
    assert all(f"{forward} + {backward}" in row for forward, backward, _ in A_MICROBATCH.values())
    gpu = torch.device("cuda", 0)
    found = {number: speed.added_kernels("x", "boft", number, gpu) for number in (48, 49)}
    assert found[48].reached and found[49].reached is False and "6 operations in each of 4" in found[48].note
    assert speed.added_kernels("x", "boft", 480, torch.device("cpu")).reached is None
    assert speed.added_kernels("x", "of another package", 480, gpu).reached is None


def test_a_layers_kernels_are_compared_with_the_frozen_ones(place, monkeypatch) -> None:
    counts = iter([100, 140, 190])
    monkeypatch.setattr(speed, "random_state", lambda *_: None)
    monkeypatch.setattr(speed, "microbatch_step", lambda *_: lambda: None)
    monkeypatch.setattr(speed, "kernels_of", lambda *_: [Kernel("a", 0, 1)] * next(counts))
    figures = {one.name: one.measured for one in speed.check_layer_time(place)}
    beyond = {name: number for name, number in figures.items() if "beyond" in name}
    assert beyond == {
        "lora, 8 tokens: kernels beyond the frozen layer's": 40,
        "hybrid, 8 tokens: kernels beyond the frozen layer's": 90,
    }


def test_flops_and_shapes_are_those_of_the_models() -> None:
    whole = replace(SHARD_405B, num_attention_heads=128, num_query_groups=8, ffn_hidden_size=53248, num_layers=126)
    flops = speed.model_flops(replace(whole, vocab_size=128256), 1)
    assert flops == pytest.approx(4 * (405.85e9 - 128256 * 16384), rel=1e-3)  # embeddings are no product
    one = shape_of_llama(8, 16, 2, 1, 4, vocab=10)
    assert speed.model_flops(one, 3) == 4 * 3 * (8 * (8 + 2 * 4 + 8) + 3 * 8 * 16 + 80) + 12 * 8 * 9 / 2


def test_lines_are_declared_without_torch() -> None:
    assert Line.__module__ == "megatron_peft.benchmarks.check_gpu"
    source = Path(check_gpu.__file__).read_text()
    assert "import torch" not in source
