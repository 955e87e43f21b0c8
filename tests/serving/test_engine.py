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
from megatron_peft.conversion.convert import megatron_to_hf, merge
from megatron_peft.conversion.peft_export import export_adapter, export_as_lora
from megatron_peft.conversion.verify import Difference, logits_of, random_tokens
from megatron_peft.models.families import config_of_shape, read_shape
from megatron_peft.serving import served
from tests.certify import test_certify as certify_tests
from tests.serving import runs
from tests.serving.test_binding import SAID

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
    assert re.search(SAID.get(name, "."), (*faulty[name].problems, "")[0]), name


@pytest.mark.parametrize("name", runs.SILENT_IN_NUMBERS)
def test_what_is_bound_and_wrong_is_seen_in_numbers_alone(lora, faulty, name, tmp_path):
    base, run, adapter = lora
    assert faulty[name].problems == ()
    folder = runs.spoilt(adapter, tmp_path / "spoilt", runs.SILENT_IN_NUMBERS[name])
    assert served.compare_served(PYTHON, base, folder, run, 64).problem(TOLERANCE) is not None


METHODS = {
    "LoRA": "--peft-method lora --lora-rank 8",
    "LoRA, rsLoRA": "--peft-method lora --lora-rank 16 --lora-rs",
    "LoRA-GA": "--peft-method lora-ga --lora-rank 8 --lora-ga-batches 2",
    "LoRA-GA, paper's start": "--peft-method lora-ga --lora-rank 8 --lora-ga-batches 2 --lora-ga-init paper",
    "BOFT": "--peft-method boft --boft-block-size 8 --boft-factors 2",
    "uRNN": "--peft-method urnn --urnn-block-size 16",
    "Hybrid": "--peft-method hybrid --lora-rank 8 --boft-block-size 8 --boft-factors 2 --lora-ga-batches 2",
    "full": "--peft-method full --lr 2e-3",
}


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_every_method_is_bound_and_computes_what_the_run_does(family, tmp_path, served_rows):
    exported, logits = {}, {}
    for method, flags in METHODS.items():
        (tmp_path / method).mkdir()
        base, run = runs.trained(tmp_path / method, *flags.split(), family=family)
        folder = tmp_path / method / "adapter"
        is_lora = method.startswith("LoRA")
        adapter = export_adapter(run, folder) if is_lora else export_as_lora(run, folder, tolerance=1e-6, num_tokens=0)
        tokens = random_tokens(read_shape(str(base)).vocab_size, 64)
        # Norms and embeddings of full fine-tuning are in no LoRA: it is what HF PEFT makes of the export.
        exported[method], logits[method] = adapter, logits_of(adapter if method == "full" else run, tokens)
    name, of_base, *found = served.served_log_probs(PYTHON, base, [*exported.values()], tokens)
    bound = served.bindings_of(PYTHON, base, [*exported.values()])
    for method, binding, log_probs in zip(exported, bound, found, strict=True):
        difference = Difference.of(log_probs, served.after_prefixes(logits[method]))
        as_lora = "adapter" if method.startswith("LoRA") else "adapter, --as-lora"
        served_rows.add(name, method, as_lora, family, f"{binding.num_bound} bound, {difference.absolute:.1e}")
        assert binding.problems == () and binding.num_bound == 14
        assert difference.absolute < TOLERANCE and (log_probs - of_base).abs().max() > served.MOVES, method


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3", "Bloom"])
@pytest.mark.parametrize("method", ["LoRA", "Hybrid", "full"])
def test_merged_models_compute_what_the_run_does(method, family, tmp_path, served_rows):
    _, run = runs.trained(tmp_path, *METHODS[method].split(), family=family)
    model = (megatron_to_hf if method == "full" else merge)(run, tmp_path / "model")
    found = served.compare_served(PYTHON, model, None, run, 64)
    served_rows.add(found.engine, method, "model", family, f"{found.difference.absolute:.1e}")
    # vLLM's Bloom computes GELU itself, Bloom its approximation by tanh.
    assert found.difference.absolute < (1e-3 if family == "Bloom" else TOLERANCE)


@pytest.mark.parametrize("method", ["LoRA", "full"])
def test_the_command_says_that_it_is_served_as_it_was_trained(method, tmp_path, capsys):
    _, run = runs.trained(tmp_path, *METHODS[method].split())
    export, of_run = (export_adapter, ["--reference", str(run)]) if method == "LoRA" else (export_as_lora, [])
    adapter = export(run, tmp_path / "adapter")
    words = ["verify", "--input", str(adapter), "--engine", "vllm", "--engine-python", str(PYTHON), *of_run]
    assert convert.main(words) == 0
    assert capsys.readouterr().out.rstrip().endswith("served as it was trained")


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
    exported = "" if family == "qwen3" else " exported,"
    assert printed.endswith(f"trained, merged,{exported} served: equal\n")
    rows = [line for line in printed.splitlines() if line.startswith("│") and "vLLM" in line]
    assert len(rows) == {"qwen3": 1, "bloom": 2}.get(family, 4)  # of Bloom the second is not compared


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
