"""A real llama.cpp computes from our GGUF what the run does; what it would serve wrong is refused.

The marked tests are run by `make test-engines`, which has llama.cpp in an environment of its own.
"""

import json
import os
import re
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from megatron_peft.commands import convert
from megatron_peft.config import ConfigurationError
from megatron_peft.conversion.peft_export import export_adapter
from megatron_peft.serving import served
from megatron_peft.serving.engine import GGUF, LlamaCpp, plain_alpha
from tests.serving import runs
from tests.serving.test_engine import METHODS

PYTHON = Path(os.environ.get("LLAMA_CPP_PYTHON", ".venv-llama-cpp/bin/python"))
ENGINE = ["--engine-python", str(PYTHON)]
TOLERANCE = 5e-5
LORA = {"peft_type": "LORA", "r": 16, "lora_alpha": 32}


def test_the_plain_alpha_gives_the_scale_of_rslora():
    assert plain_alpha(LORA) == 32 and plain_alpha({**LORA, "rank_pattern": {"q_proj": 4}}) == 32
    assert plain_alpha({**LORA, "use_rslora": True}) / 16 == 32 / 16**0.5


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"peft_type": "BOFT"}, "LoRA only, not BOFT: export the run with --as-lora"),
        ({"use_dora": True, "bias": "all"}, "knows no use_dora, bias of adapter_config.json: merge"),
        ({"alpha_pattern": {"q_proj": 4}}, "knows no alpha_pattern"),
        ({"rank_pattern": {"q_proj": 4}, "use_rslora": True}, "knows no rank_pattern"),
    ],
)
def test_what_one_alpha_cannot_express_is_refused(settings, told):
    with pytest.raises(ConfigurationError, match=told):
        plain_alpha({**LORA, **settings})


def test_another_scale_than_the_configs_is_named():
    slots, factors = {"blk.0.attn_q.weight": [["layers.0.q_proj", 32, 32]]}, [[16, 32], [32, 16], True, 2.0]
    found = {"error": None, "unbound": [], "bound": {"blk.0.attn_q.weight": [factors]}}
    settings = {**LORA, "target_modules": ["q_proj"]}
    assert served.binding_of("llama.cpp 1", slots, found, settings).problems == ()
    problems = served.binding_of("llama.cpp 1", slots, found, {**settings, "use_rslora": True}).problems
    assert problems == ("another scale than adapter_config.json says: layers.0.q_proj (2, not 8)",)


def test_an_engine_that_is_not_there_is_told_before_anything_is_written(tmp_path, capfd):
    words = ["--input", str(tmp_path), "--output", str(tmp_path / "new"), "--gguf", "--engine-python", sys.executable]
    assert convert.main(["export-adapter", *words]) == 2 and not (tmp_path / "new").exists()
    told = " ".join(capfd.readouterr().err.split())
    assert re.search("has no llama.cpp: .*xllamacpp.*make engines makes .venv-llama-cpp", told)


FAMILIES = ("Mistral", "Qwen2", "Qwen3")


@pytest.mark.engines
@pytest.mark.parametrize("name", [*METHODS, *FAMILIES])
def test_log_probabilities_are_those_of_the_run(name, tmp_path, capsys, served_rows):
    family, method = (name, "LoRA") if name in FAMILIES else ("Llama", name)
    _, run = runs.trained(tmp_path, *METHODS[method].split(), family=family)
    is_lora = method.startswith("LoRA")
    words = ["--input", str(run), "--output", str(tmp_path / "adapter"), "--gguf"]
    words += [] if is_lora else "--as-lora --tolerance 1e-6 --num-tokens 0".split()
    assert convert.main(["export-adapter", *words, *ENGINE]) == 0
    assert f"--lora {tmp_path / 'adapter' / GGUF}" in capsys.readouterr().out
    given = tmp_path / "adapter" / (GGUF if name == "LoRA" else "")
    # Norms and embeddings of full fine-tuning are in no LoRA: it is what HF PEFT makes of the export.
    words = ["--tolerance", str(TOLERANCE), *([] if method == "full" else ["--reference", str(run)])]
    code = convert.main(["verify", "--engine", "llama.cpp", "--input", str(given), *words, *ENGINE])
    told = capsys.readouterr().out
    assert code == 0 and told.rstrip().endswith("served as it was trained"), told
    found = re.match(
        r"(?P<engine>llama.cpp \S+) binds (?P<bound>\d+) .*largest difference (?P<largest>\S+),", told, re.S
    )
    assert found is not None and float(found["largest"]) < TOLERANCE, told
    form, cell = "GGUF" if is_lora else "GGUF, --as-lora", f"{found['bound']} bound, {float(found['largest']):.1e}"
    served_rows.add(found["engine"], method, form, family, cell)


@pytest.fixture(scope="module")
def lora(tmp_path_factory) -> tuple[Path, Path, Path]:
    """Base, run, and export."""
    folder = tmp_path_factory.mktemp("lora")
    base, run = runs.trained(folder, "--peft-method", "lora", "--lora-rank", str(runs.RANK))
    return base, run, export_adapter(run, folder / "adapter", license="mit")


RANKS = {name: how for name, how in runs.SILENT_IN_CONFIG.items() if name.startswith("rank")}
# The config beside a file that was converted before it was changed.
BESIDE_FILE = {"other alpha": {"lora_alpha": 64}, "ignored rsLoRA": {"use_rslora": True}, "other rank": {"r": 16}}
# The converter names these as llama.cpp does, whatever HF PEFT would make of them.
UNDERSTOOD = ("wrong prefix", "one wrong prefix", "unknown module")
SAID = {
    **dict.fromkeys(("good", *UNDERSTOOD), "^$"),
    "dropped module": "^missing, though target_modules names them: model.layers.0.mlp.down_proj$",
    "absent layer": "does not read it: .*Can not map tensor .*layers.7",
    "dropped A of q": "model.layers.0.self_attn.q_proj has no pair of factors",
    "A's rank is not B's": "model.layers.0.mlp.down_proj has no pair of factors of one rank",
    "rank cut": "^factors of other shapes than their layer's: .*rank 4",
    "not finite": r"^NaN or infinite: model.layers.0.self_attn.o_proj$",
    "half of B's rows": "^factors of other shapes than their layer's: model.layers.0.mlp.down_proj",
    "empty": "^missing",
    "other alpha": "^another scale than adapter_config.json says: .*4, not 8",
    "ignored rsLoRA": "^another scale .*4, not 11.3137",
}


@pytest.fixture(scope="module")
def bindings(lora, tmp_path_factory) -> dict[str, served.Binding]:
    """What one process of the engine says of the good adapter and of each that is spoilt."""
    base, _, adapter = lora
    folder, faults = tmp_path_factory.mktemp("faults"), {**runs.SILENT_IN_NAMES, **RANKS, **runs.SILENT_IN_NUMBERS}
    files = {"good": adapter} | {name: runs.spoilt(adapter, folder / name, how) for name, how in faults.items()}
    with LlamaCpp(PYTHON) as engine:
        engine.write_gguf(adapter, base)
    files |= {name: runs.spoilt(adapter, folder / name, how) / GGUF for name, how in BESIDE_FILE.items()}
    return dict(zip(files, served.bindings_of(PYTHON, base, [*files.values()], LlamaCpp), strict=True))


@pytest.mark.engines
@pytest.mark.parametrize("name", ["good", *runs.SILENT_IN_NAMES, *RANKS, *BESIDE_FILE])
def test_what_would_be_served_wrong_is_refused_by_name(bindings, name):
    problems = bindings[name].problems
    assert re.search(SAID.get(name, "."), "\n".join(problems)), problems


@pytest.mark.engines
@pytest.mark.parametrize("name", [*UNDERSTOOD, *runs.SILENT_IN_NUMBERS])
def test_what_is_bound_and_wrong_is_seen_in_numbers_alone(lora, bindings, name, tmp_path):
    base, run, adapter = lora
    assert bindings[name].problems == ()
    spoilt = runs.spoilt(adapter, tmp_path / "spoilt", {**runs.SILENT_IN_NAMES, **runs.SILENT_IN_NUMBERS}[name])
    (spoilt / GGUF).unlink()  # of the good one
    problem = served.compare_served(PYTHON, base, spoilt, run, 64, kind=LlamaCpp).problem(TOLERANCE)
    assert (problem is None) == (name in UNDERSTOOD), problem


@pytest.mark.engines
def test_a_conversion_that_fails_leaves_nothing_and_says_what_the_converter_said(lora, tmp_path, monkeypatch, capfd):
    base, run, _ = lora
    config = json.loads((base / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["NoSuchModel"]}))
    monkeypatch.setattr(served, "base_of_adapter", lambda *_: tmp_path)
    words = ["--input", str(run), "--output", str(tmp_path / "new"), "--gguf", *ENGINE]
    assert convert.main(["export-adapter", *words]) == 2 and not (tmp_path / "new").exists()
    assert "llama.cpp failed" in (told := capfd.readouterr().err) and "NoSuchModel" in told


@pytest.mark.engines
def test_a_merged_model_is_served_too_and_nan_refused(lora, tmp_path, capsys):
    _, run, _ = lora
    assert convert.main(["merge", "--input", str(run), "--output", str(tmp_path / "merged")]) == 0
    words = ["--input", str(tmp_path / "merged"), "--reference", str(run), "--tolerance", str(TOLERANCE)]
    assert convert.main(["verify", "--engine", "llama.cpp", *words, *ENGINE]) == 0
    assert capsys.readouterr().out.endswith("served as it was trained\n")
    file = tmp_path / "merged" / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "model.norm.weight": tensors["model.norm.weight"] * float("nan")}, file, {"format": "pt"})
    assert convert.main(["verify", "--engine", "llama.cpp", *words, *ENGINE]) == 1
    assert "log-probabilities differ by nan" in capsys.readouterr().out
