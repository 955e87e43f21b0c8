"""check-gpu on a CPU: that its lines run, what it does with failures, and that the page and its lines agree."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_peft.adapters import low_rank
from megatron_peft.benchmarks import LINES, SIZES_VARIABLE, Line
from megatron_peft.benchmarks import check_gpu as run
from megatron_peft.benchmarks.measure import Figure
from megatron_peft.commands import check_gpu as command
from megatron_peft.models import layers
from megatron_peft.runtime import precision
from tests.adapters.test_operation_counts import A_MICROBATCH
from tests.benchmarks import gpu_subjects as subjects
from tests.benchmarks import test_on_one_gpu as on_one_gpu
from tests.benchmarks.test_on_one_gpu import Kernel, busy_share
from tests.emulated_tf32 import FACTORS, as_tf32

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "untested-on-cuda.md"
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


def test_every_line_has_tests() -> None:
    files = [path for path in (ROOT / "tests").rglob("test_*.py") if path != Path(__file__)]
    assert {*LINES} == {name for path in files for name in re.findall(r"mark\.gpu\(\"([^\"]*)\"\)", path.read_text())}
    assert run.files_of("alibi", ROOT) == [ROOT / "tests" / "models" / "test_attention.py"]


def test_cheap_lines_pass_on_a_cpu_and_say_that_this_proves_nothing(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setenv(SIZES_VARIABLE, "set by the command")
    assert command.main([*CHEAP, "--tiny", "--output", str(tmp_path / "found.json")]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("This proves nothing about CUDA") == 2
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["proves_something_about_cuda"] is False and found["device"] == "cpu"
    assert [line["name"] for line in found["lines"]] == CHEAP
    assert all(line.keys() == {"name", "verdict", "seconds", "figures", "error", "settles"} for line in found["lines"])
    assert all(line["figures"] for line in found["lines"])


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [["--tiny"], []], ids=["tiny", "cpu"])
def test_every_line_passes_on_a_cpu(tmp_path, sizes) -> None:
    """In a process of its own, whose tests take other sizes than these ones."""
    words = [sys.executable, "-m", "megatron_peft", "check-gpu", *sizes, "--output", str(tmp_path / "found.json")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = json.loads((tmp_path / "found.json").read_text())["lines"]
    assert [line["name"] for line in lines] == [*LINES]
    methods = {figure["name"].split(",")[0] for line in lines if line["name"] == "losses" for figure in line["figures"]}
    assert methods == {*subjects.SIZES["tiny" if sizes else "cpu"].methods}


class RoundedFactors(TorchDispatchMode):
    """Every float32 product as a GPU's TF32 would compute it, whatever torch's settings say."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        factors = FACTORS.get(func.overloadpacket, slice(0, 0))
        rounded = [as_tf32(arg) for arg in args[factors]]
        return func(*args[: factors.start], *rounded, *args[factors.stop :], **(kwargs or {}))


def no_full_precision(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(precision, "_set_full_precision", lambda: ("highest", [], []))


def other_slopes(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(layers, "alibi_slopes", lambda num_heads: torch.full((num_heads,), 0.5))


def a_read_in_each_layer(patch: pytest.MonkeyPatch) -> None:
    fused = low_rank.frozen_linear_plus_low_rank
    patch.setattr(low_rank, "frozen_linear_plus_low_rank", lambda x, *more: x.sum().item() and fused(x, *more))


def losses_that_are_off(patch: pytest.MonkeyPatch) -> None:
    step = subjects.train_step
    patch.setattr(subjects, "train_step", lambda *words: SimpleNamespace(loss=1.001 * step(*words).loss))


# By line: what is broken, and figures that then miss their targets.
FAULTS: dict[str, tuple[Callable[[pytest.MonkeyPatch], Any], list[str]]] = {
    "precision": (no_full_precision, ["boft: orthogonality error while TF32 is allowed"]),
    "layers": (
        lambda patch: RoundedFactors(),
        [f"lora, float32: {what}" for what in ("output and input gradient", "gradients of parameters")],
    ),
    "alibi": (other_slopes, ["alibi, 37 positions, float32"]),
    "losses": (losses_that_are_off, ["lora, local: float32, packed, recomputed"]),
    "waits": (a_read_in_each_layer, ["lora, padded: waits in its microbatches", "lora, packed: waits in a step"]),
}


@pytest.mark.parametrize("name", [*list(FAULTS)[:-1], pytest.param("waits", marks=pytest.mark.slow)])
def test_a_planted_fault_fails_its_line_by_name(name, monkeypatch) -> None:
    plant, figures = FAULTS[name]
    planted: AbstractContextManager[Any] = plant(monkeypatch) or nullcontext()
    with planted:
        [outcome] = run.run_lines({name: run.files_of(name, ROOT)}, ROOT, Console(quiet=True))
    missed = {figure.name for figure in outcome.figures if figure.reached is False}
    assert outcome.verdict == "FAIL" and {*figures} <= missed
    assert not any(re.search("bf16: (output|gradients)", name) for name in missed), (
        f"TF32 is no matter of bf16: {missed}"
    )


@pytest.fixture
def lines_of(tmp_path, monkeypatch) -> Callable[..., tuple[list[run.LineOutcome], str]]:
    """Outcomes of lines whose tests are these texts, and what is printed."""
    (tmp_path / "conftest.py").write_text("from tests.conftest import figure, pytest_pyfunc_call\n")
    (tmp_path / "pyproject.toml").write_text("[tool.pytest.ini_options]\nmarkers = ['gpu(line): of a line']\n")

    def outcomes(**texts: str) -> tuple[list[run.LineOutcome], str]:
        paths = {name: tmp_path / f"{tmp_path.name}_{name}.py" for name in texts}  # modules of one process
        for name, path in paths.items():
            path.write_text(f"import pytest\npytestmark = pytest.mark.gpu('{name}')\n{texts[name]}")
            monkeypatch.setitem(LINES, name, Line("a line"))
        console = Console(record=True, width=200)
        found = run.run_lines({name: [path] for name, path in paths.items()}, tmp_path, console)
        console.print(run._summary(found))
        return found, console.export_text()

    return outcomes


RAISES = "def test_a_kernel(): raise ValueError('a [bad] kernel')\n"


def test_a_line_that_fails_names_itself_and_the_others_go_on(lines_of) -> None:
    off = "def test_two(figure):\n    figure('off', 2.0, 1.0)\n    figure('nan', float('nan'), 1.0)\n"
    broken = "import no_such_module\n"
    passes = "def test_one(figure): figure('GPUs', 0.0)\ndef test_two(): pass\n"
    found, text = lines_of(world=RAISES, layers=broken, alibi=off, versions=passes, waits="")
    assert [one.verdict for one in found] == ["FAIL", "error", "FAIL", "pass", "error"]
    assert "a kernel" in text and "ValueError: a [bad] kernel" in text and "off; nan" in text
    assert "No module named 'no_such_module'" in found[1].error
    assert [one.name for one in found[3].figures] == ["GPUs", "two"]


def test_a_test_that_raises_is_a_figure_that_failed_and_the_line_goes_on(lines_of, tmp_path) -> None:
    measured = "def test_two(figure):\n    figure('first', 1.0)\n    raise ValueError('no second one')\n"
    [outcome], text = lines_of(losses=RAISES + measured + "def test_three(figure): figure('third', 1.0, 1.0)\n")
    assert [(one.name, one.reached) for one in outcome.figures] == [
        ("a kernel", False),
        ("first", None),
        ("two", False),
        ("third", True),
    ]
    assert outcome.verdict == "FAIL" and outcome.figures[0].note == "ValueError: a [bad] kernel"
    assert "ValueError: a [bad] kernel" in text
    run._write(tmp_path / "found.json", [outcome], is_gpu=False)
    written = json.loads((tmp_path / "found.json").read_text())["lines"][0]["figures"]
    assert [one["measured"] for one in written] == [None, 1.0, None, 1.0]


def test_a_figure_that_misses_its_target_fails_its_test_without_check_gpu_too(lines_of, tmp_path) -> None:
    """`lines_of` has made the folder."""
    test = tmp_path / f"{tmp_path.name}.py"
    for measured, code in ((1.0, pytest.ExitCode.OK), (2.0, pytest.ExitCode.TESTS_FAILED)):
        test.write_text(f"def test_two(figure): figure('of {measured}', {measured}, 1.0)\n")
        assert pytest.main([f"--rootdir={tmp_path}", "-p", "no:terminalreporter", str(test)]) == code
        sys.modules.pop(test.stem)


def test_nothing_more_is_run_once_cuda_is_gone(lines_of, tmp_path, monkeypatch) -> None:
    gone = tmp_path / "gone"
    monkeypatch.setattr(run, "device_answers", lambda: not gone.exists())
    fatal = f"def test_fatal():\n    open({str(gone)!r}, 'w')\n    raise RuntimeError('an illegal memory access')\n"
    before, after = ("def test_{}(figure): figure('{}', 0.0)\n".format(*[one] * 2) for one in ("before", "after"))
    found, _ = lines_of(world=before + fatal + after, versions=after)
    assert [one.verdict for one in found] == ["error", "not run"]
    assert [one.name for one in found[0].figures] == ["before", "fatal"] and not found[1].figures


def test_without_the_tests_the_command_says_what_is_missing_and_the_way_out(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(command, "__file__", str(tmp_path / "megatron_peft" / "commands" / "check_gpu.py"))
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == "hypothesis" else version(name))
    assert command.main([]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert f"{tmp_path}/tests is not there and hypothesis is not installed. Run it in a checkout" in told
    assert "pip install --editable '.[test]'" in told


def test_every_package_with_an_nccl_is_named(monkeypatch) -> None:
    notes: dict[str, str] = {}
    installed = [SimpleNamespace(name=name, version="2.29.7") for name in ("nvidia-nccl-cu13", "nvidia-cudnn-cu13")]
    monkeypatch.setattr(on_one_gpu, "distributions", lambda: installed)
    on_one_gpu.test_what_is_installed(lambda name, *_, note="": notes.update({name: note}))
    assert notes["NCCL"] == "nvidia-nccl-cu13 2.29.7"


@pytest.mark.parametrize(
    ("words", "processes", "told"),
    [(["c"], 1, "no line is called c: there are versions"), (["--nope"], 1, "--nope"), ([], 2, "without torchrun")],
)
def test_what_cannot_run_is_told(words, processes, told, capsys, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    assert command.main(words) == 2
    assert told in capsys.readouterr().err


def test_kernels_that_overlap_count_once() -> None:
    kernels = [Kernel("a", 0, 4), Kernel("b", 2, 5), Kernel("c", 8, 10)]
    assert busy_share(kernels) == pytest.approx(0.7)
    assert busy_share([]) == 0


def test_kernels_of_an_adapter_are_compared_with_the_operations_that_are_counted(monkeypatch) -> None:
    """Those of tests/adapters/test_operation_counts.py, which the page names too."""
    row = next(line for line in PAGE.read_text().splitlines() if line.startswith("| few kernels a layer |"))
    assert all(f"{forward} + {backward}" in row for forward, backward, _ in A_MICROBATCH.values())
    monkeypatch.setattr(on_one_gpu, "device", lambda: torch.device("cpu"))
    assert on_one_gpu.added_kernels("x", 480, 6).reached is None
    monkeypatch.setattr(on_one_gpu, "device", lambda: torch.device("cuda", 0))
    found = {number: on_one_gpu.added_kernels("x", number, 6) for number in (48, 49)}
    assert found[48].reached and found[49].reached is False and "6 operations in each of 4" in found[48].note
    assert on_one_gpu.added_kernels("x", 480, None).reached is None, "a method of another package"


def test_a_layers_kernels_are_compared_with_the_frozen_ones(monkeypatch) -> None:
    counts, figures, of_frozen_layer = iter([100, 140, 190]), [], {}
    monkeypatch.setattr(on_one_gpu, "device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(on_one_gpu, "milliseconds", lambda *_: 1.0)
    monkeypatch.setattr(on_one_gpu, "random_state", lambda *_: None)
    monkeypatch.setattr(on_one_gpu, "microbatch_step", lambda *_: lambda: None)
    monkeypatch.setattr(on_one_gpu, "kernels_of", lambda *_: [Kernel("a", 0, 1)] * next(counts))
    for method in (None, "lora-ga", "another"):
        on_one_gpu.test_time_of_a_layer(
            lambda *words, **more: figures.append(Figure(*words, **more)), of_frozen_layer, method, 8
        )
    assert [(one.name, one.measured, one.target) for one in figures if "beyond" in one.name] == [
        ("lora-ga, 8 tokens: kernels beyond the frozen layer's", 40, 80),
        ("another, 8 tokens: kernels beyond the frozen layer's", 90, None),
    ]
