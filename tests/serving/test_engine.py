"""A real vLLM binds what was exported and computes what the run does; adapters that it would serve wrong are refused.

Run by `make test-engines`, which has vLLM in an environment of its own.
"""

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_peft.certify import converted
from megatron_peft.checkpoint.run_record import read_run_record
from megatron_peft.commands import certify, convert
from megatron_peft.conversion.peft_export import export_adapter, export_as_lora
from megatron_peft.conversion.verify import logits_of, random_tokens
from megatron_peft.models.families import config_of_shape, read_shape
from megatron_peft.serving import served
from tests.certify import test_certify as certify_tests
from tests.serving import runs

PYTHON = Path(os.environ.get("ENGINE_PYTHON", ".venv-vllm/bin/python"))
pytestmark = pytest.mark.engines
TOLERANCE = 5e-5


@pytest.fixture(scope="module")
def lora(tmp_path_factory) -> tuple[Path, Path, Path]:
    """Base, run, and export."""
    folder = tmp_path_factory.mktemp("lora")
    base, run = runs.trained(folder, "--peft-method", "lora", "--lora-rank", str(runs.RANK))
    return base, run, export_adapter(run, folder / "adapter", license="mit")


@pytest.fixture(scope="module")
def faulty(lora, tmp_path_factory) -> dict[str, served.Binding]:
    """What one process of the engine says of the good adapter and of each that is spoilt."""
    base, _, adapter = lora
    folder = tmp_path_factory.mktemp("faults")
    faults = {**runs.SILENT_IN_NAMES, **runs.SILENT_IN_CONFIG, **runs.SILENT_IN_NUMBERS}
    folders = {"good": adapter} | {name: runs.spoilt(adapter, folder / name, how) for name, how in faults.items()}
    return dict(zip(folders, served.bindings_of(PYTHON, base, [*folders.values()]), strict=True))


def test_a_good_adapter_is_bound_whole(faulty):
    assert faulty["good"].problems == () and faulty["good"].num_bound == 2 * 7


@pytest.mark.parametrize("name", [*runs.SILENT_IN_NAMES, *runs.SILENT_IN_CONFIG])
def test_what_would_not_be_served_is_refused_by_what_is_bound(faulty, name):
    assert faulty[name].problems, name


@pytest.mark.parametrize("name", runs.SILENT_IN_NUMBERS)
def test_what_is_bound_and_wrong_is_seen_in_numbers_alone(lora, faulty, name, tmp_path):
    base, run, adapter = lora
    assert faulty[name].problems == ()
    folder = runs.spoilt(adapter, tmp_path / "spoilt", runs.SILENT_IN_NUMBERS[name])
    assert served.compare_served(PYTHON, base, folder, run, 64).problem(TOLERANCE) is not None


METHODS = {
    "lora": "--lora-rank 8",
    "rslora": "--peft-method lora --lora-rank 16 --lora-rs",
    "lora-ga": "--lora-rank 8 --lora-ga-batches 2",
    "lora-ga, paper": "--peft-method lora-ga --lora-rank 8 --lora-ga-batches 2 --lora-ga-init paper",
    "boft": "--boft-block-size 8 --boft-factors 2",
    "urnn": "--urnn-block-size 16",
    "hybrid": "--lora-rank 8 --boft-block-size 8 --boft-factors 2 --lora-ga-batches 2",
    "full": "--peft-method full --lr 2e-3",
}
FAMILIES = {family: "--peft-method lora --lora-rank 8" for family in ("Mistral", "Qwen2", "Qwen3")}


@pytest.mark.parametrize("name", [*METHODS, *FAMILIES])
def test_log_probabilities_are_those_of_the_run(name, tmp_path, capsys):
    if name in FAMILIES:
        _, run = runs.trained(tmp_path, *FAMILIES[name].split(), family=name)
        is_served(export_adapter(run, tmp_path / "adapter"), run, capsys)
        return
    flags = METHODS[name] if "--peft-method" in METHODS[name] else f"--peft-method {name} {METHODS[name]}"
    _, run = runs.trained(tmp_path, *flags.split())
    is_lora = name.startswith(("lora", "rslora"))
    output = tmp_path / "adapter"
    adapter = export_adapter(run, output) if is_lora else export_as_lora(run, output, tolerance=1e-6, num_tokens=0)
    # Norms and embeddings of full fine-tuning are in no LoRA: it is what HF PEFT makes of the export.
    is_served(adapter, None if name == "full" else run, capsys)


def is_served(adapter: Path, run: Path | None, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["verify", "--input", str(adapter), "--engine", "vllm", *(["--reference", str(run)] if run else [])]
    code = convert.main([*words, "--engine-python", str(PYTHON)])
    told = capsys.readouterr().out
    assert code == 0 and told.rstrip().endswith("served as it was trained"), told
    largest = re.search(r"largest difference ([\d.e-]+), relative", told)
    assert largest is not None and float(largest[1]) < TOLERANCE, told


CERTIFIED = "--mock-data --train-iters 9 --micro-batch-size 2 --global-batch-size 4 --seq-length 64 --lr 1e-3"


@pytest.mark.parametrize(
    ("family", "flags"),
    [
        ("llama", "--peft-method lora --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --world-size 4"),
        ("llama", "--peft-method hybrid --lora-rank 4 --boft-block-size 8 --boft-factors 2 --bf16"),
        ("qwen3", "--peft-method full"),
        ("bloom", "--peft-method lora --lora-rank 4"),
    ],
)
def test_a_certificate_ends_in_the_engine(family, flags, tmp_path, capsys):
    shape = certify_tests.BLOOM if family == "bloom" else replace(certify_tests.LLAMA, architecture=family)
    (tmp_path / "config.json").write_text(json.dumps(config_of_shape(shape)))
    words = [*CERTIFIED.split(), *flags.split(), "--pretrained-checkpoint", str(tmp_path / "config.json")]
    assert certify.main([*words, "--engine", "vllm", "--engine-python", str(PYTHON)]) == 0
    printed = capsys.readouterr().out
    exported = "" if family == "qwen3" or "hybrid" in flags else " exported,"
    assert printed.endswith(f"trained, merged,{exported} served: equal\n")
    num_served = {"qwen3": 1, "bloom": 1}.get(family, 4)
    assert printed.count("vLLM 0.") == num_served


def test_a_certificate_with_a_wrong_alpha_is_refused_by_the_engine(lora, tmp_path, monkeypatch):
    """What training changed is what the difference is measured by, so no adapter is too small."""
    base, run, adapter = lora
    tokens = random_tokens(read_shape(str(base)).vocab_size, 24)
    logits = logits_of(base, tokens), logits_of(run, tokens)
    config = read_run_record(run).config
    folders = {"right": adapter, "wrong": runs.spoilt(adapter, tmp_path / "spoilt", {"lora_alpha": 64})}
    for name, folder in folders.items():
        monkeypatch.setattr(converted, "export_lora", lambda *_, folder=folder: folder)
        bound, *served = converted.compare_in_engine(PYTHON, config, tokens, logits)
        assert bound.passed and [one.passed for one in served] == [name == "right"] * 2
