"""What is said of vLLM's answers, from recorded ones, and what happens without an engine."""

import json
import re
import sys
from pathlib import Path

import pytest
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from megatron_peft.cli.parser import read_config
from megatron_peft.commands import convert
from megatron_peft.config import ConfigurationError
from megatron_peft.config.evaluation import EngineSettings
from megatron_peft.conversion import model_card
from megatron_peft.conversion.peft_export import export_adapter
from megatron_peft.conversion.verify import Difference
from megatron_peft.serving import engine, served, trained
from tests.serving import runs
from tests.serving.recorded import FILE, KEPT
from tests.tiny_llama import save_llama

RECORDED = json.loads(FILE.read_text())
SAID = {
    "wrong prefix": "bound to nothing, so the base is served in their place: layers.0",
    "dropped module": "missing, though target_modules names them: model.layers.0.mlp.down_proj",
    "dropped A of q": "missing, .*: model.layers.0.self_attn.q_proj$",
    "half of B's rows": "factors of other shapes than .*: model.layers.0.mlp.down_proj .*64, 8.*of 128 x 256",
    "rank cut": "factors of other shapes than their layer's: .* and 11 more",
    "not finite": "NaN or infinite: model.layers.0.self_attn.o_proj",
    "DoRA": "vLLM does not read it: .*DoRA",
}


def binding(name: str) -> served.Binding:
    at = RECORDED["names"].index(name)
    return served.binding_of(RECORDED["engine"], RECORDED["slots"], RECORDED["adapters"][at], RECORDED["settings"][at])


def test_a_good_adapter_is_bound_whole():
    found = binding("good")
    assert found.problems == () and (found.num_bound, found.rank) == (14, 8)
    assert str(found) == "vLLM 0.32.0 binds 14 modules, rank 8"


@pytest.mark.parametrize("name", KEPT)
def test_what_would_be_served_wrong_is_named(name):
    problems = binding(name).problems
    assert problems and re.search(SAID[name], problems[0]), problems
    assert f"\nREFUSED: {problems[0]}" in str(binding(name))


def test_other_ways_to_name_targets_are_read_as_hf_peft_reads_them():
    good, dropped = RECORDED["settings"][0], RECORDED["adapters"][RECORDED["names"].index("dropped module")]
    for targets in ("all-linear", r".*\.(down|o)_proj", ["layers.0.mlp.down_proj"]):
        (problem,) = served.binding_of("vLLM", RECORDED["slots"], dropped, {**good, "target_modules": targets}).problems
        assert problem.endswith("model.layers.0.mlp.down_proj"), targets
    assert served.binding_of("vLLM", RECORDED["slots"], dropped, {**good, "target_modules": ["q_proj"]}).problems == ()


LAYERS = [f"model.layers.{layer}" for layer in (0, 1, 10)]
NAMES = [f"{layer}.{name}" for layer in LAYERS for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")]
ENDS = ["q_proj", "down_proj"]


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ENDS, "layers_to_transform": [1]},
        {"target_modules": ENDS, "layers_to_transform": 1, "layers_pattern": "layers"},
        {"target_modules": ENDS, "layers_to_transform": [0, 10], "layers_pattern": ["h", "layers"]},
        {"target_modules": [*ENDS, NAMES[1]], "layers_to_transform": [1], "layers_pattern": "blocks"},
        {"target_modules": ENDS, "layers_to_transform": []},
        {"target_modules": ENDS, "exclude_modules": ["layers.0.self_attn.q_proj", "mlp"]},
        {"target_modules": r".*layers\.\d\..*proj", "exclude_modules": r".*\.o_proj"},
        {"target_modules": ["q_proj", "o_proj"], "modules_to_save": ["o_proj", "lm_head"]},
        {"target_modules": ENDS, "rank_pattern": {"q_proj": 4, r"0\..*_proj": 2}},
        {"target_modules": ENDS, "rank_pattern": {"proj": 4, NAMES[0]: 2, r"^model\.layers\.1\.mlp\..*": 16}},
    ],
)
def test_settings_are_read_as_hf_peft_reads_them(settings):
    config = LoraConfig(r=8, **settings)
    for name in NAMES:
        slots = {name: [[name, 32, 32]]}
        rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern, name), config.r)
        absent, there = (
            {"error": None, "unbound": [], "bound": {name: [one]}} for one in (None, [[rank, 32], [32, rank], True])
        )
        is_target = bool(check_target_module_exists(config, name))
        problems = served.binding_of("vLLM", slots, absent, {"r": 8, **settings}).problems
        assert any(told.startswith("missing") for told in problems) == is_target, name
        assert served.binding_of("vLLM", slots, there, {"r": 8, **settings}).problems == (), name


def test_a_folder_of_which_nothing_is_bound_is_refused_whatever_its_targets():
    good = RECORDED["adapters"][0]
    empty = {**good, "bound": {layer: [None] * len(parts) for layer, parts in good["bound"].items()}}
    settings = {"r": 8, "target_modules": r"^(model\.language_model(?=\.).*\.(q_proj|v_proj))$"}
    problems = served.binding_of("vLLM", RECORDED["slots"], empty, settings).problems
    assert problems == ("no module of it is bound, so the base is served",)


def test_another_kind_of_adapter_and_a_rank_that_is_no_number_are_told():
    good, bound = RECORDED["settings"][0], RECORDED["adapters"][0]
    problems = served.binding_of("vLLM", RECORDED["slots"], bound, {**good, "peft_type": "IA3"}).problems
    assert problems == ("peft_type of its config is IA3, and servers take LORA alone",)
    with pytest.raises(ConfigurationError, match="a rank that is no whole number: .'eight'."):
        engine.largest_rank({"r": "eight"})


def test_no_lora_is_bound_to_bloom(tmp_path, capfd):
    base, run = runs.trained(tmp_path, "--peft-method", "lora", "--lora-rank", "4", family="Bloom")
    adapter = export_adapter(run, tmp_path / "adapter")
    words = ["verify", "--input", str(adapter), "--engine", "vllm", "--engine-python", "nowhere"]
    assert convert.main([*words, "--reference", str(run)]) == 2
    assert f"vLLM takes no LoRA for the model of {base}: merge it" in " ".join(capfd.readouterr().err.split())
    with pytest.raises(ConfigurationError, match="vLLM takes no LoRA for BloomForCausalLM"):
        trained.export_lora(run, tmp_path / "served")


def test_a_lora_that_does_not_equal_the_run_is_not_served(tmp_path, monkeypatch):
    boft = "--peft-method boft --boft-block-size 8 --boft-factors 2"
    _, run = runs.trained(tmp_path, *boft.split())
    monkeypatch.setattr(trained, "VLLM_RANKS", (1, 8))
    with pytest.raises(ConfigurationError, match="no LoRA of rank 8 equals .*run: of a module it leaves an error of 0"):
        trained.export_lora(run, tmp_path / "served")
    assert not (tmp_path / "served").exists()


def test_an_engine_runs_beside_one_process(tmp_path):
    words = ["--pretrained-checkpoint", str(save_llama(tmp_path / "base")), "--mock-data", "--train-iters", "1"]
    config = read_config([*words, "--tensor-model-parallel-size", "2"], {"WORLD_SIZE": "2"})
    with pytest.raises(ConfigurationError, match="--engine runs beside one process: .*tensor_parallel_size=N"):
        trained.open_engine(config, EngineSettings(engine="vllm"), None)


def test_a_difference_and_an_adapter_that_moves_nothing_are_problems():
    def problem(difference: float, moved: float) -> str:
        found = served.Served("vLLM", Difference(difference, 20.0), moved, 8)
        return found.problem(1e-4) or ""

    assert problem(1e-3, 3.0) == "" and "moves log-probabilities by 0.01" in problem(1e-3, 0.01)
    assert "differ by 0.0002, more than --tolerance 0.0001" in problem(4e-3, 3.0)
    assert "more than --tolerance" in problem(float("nan"), 3.0)


def test_the_smallest_limit_that_vllm_takes_and_none_above_512():
    assert [engine.rank_limit(rank) for rank in (1, 2, 8, 9, 257, 512)] == [1, 8, 8, 16, 320, 512]
    with pytest.raises(ConfigurationError, match="rank 513 is above 512, the highest that vLLM serves: merge it"):
        engine.rank_limit(513)


def test_modules_are_named_to_vllm_by_their_last_parts_where_some_layers_alone_are_adapted():
    """A whole name never matches a layer that vLLM fuses, and its modules would silently be left out."""
    names = [f"model.layers.1.self_attn.{name}_proj" for name in "qkv"] + ["model.layers.2.self_attn.q_proj"]
    settings = trained.lora_settings({"peft_type": "LORA", "r": 8, "target_modules": names})
    assert settings == {"max_lora_rank": 8, "lora_target_modules": ["k_proj", "q_proj", "v_proj"]}


def test_the_card_names_the_engine_and_its_version_only_if_all_is_right(tmp_path, monkeypatch, capsys):
    def verify(version: str, difference: float = 1e-6) -> int:
        found = served.Served(f"vLLM {version}", Difference(difference, 2.0), 3.0, 8)
        monkeypatch.setattr(served, "bindings_of", lambda *_: [served.Binding(f"vLLM {version}", 14, 8, ())])
        monkeypatch.setattr(served, "compare_served", lambda *_: found)
        return convert.main(["verify", "--input", str(tmp_path), "--engine", "vllm", "--update-card"])

    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 8, "base_model_name_or_path": str(tmp_path)}))
    (tmp_path / "config.json").write_text("{}")
    assert verify("1") == 2 and "has no model card (README.md)" in capsys.readouterr().err
    card = tmp_path / "README.md"
    card.write_text("# An adapter\n\nText.\n")
    assert verify("1", difference=1.0) == 1 and card.read_text() == "# An adapter\n\nText.\n"
    model_card.add_engine(tmp_path, ["llama.cpp 3 reads it"])
    assert verify("1") == verify("2") == 0
    text = card.read_text()
    assert text.startswith(
        "# An adapter\n\nText.\n\n## Verified in the engine that serves it\n\n- llama.cpp 3 reads it\n"
    )
    assert text.count("- vLLM 2") == 2 and "vLLM 1" not in text and text.count("## Verified") == 1
    assert "vLLM 2 binds 14 modules, rank 8" in text and "largest difference 1e-06" in text


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--engine-python", "nowhere/python"], "nowhere/python cannot be started .*make engines"),
        (["--engine-python", sys.executable], "has no vLLM: .*make engines"),
        (["--engine-python", "/bin/cat"], "has no vLLM: .*make engines|/bin/cat is no Python: it said"),
        (["--engine-python", "/bin/echo"], "/bin/echo is no Python: it said '.*vllm_script.py"),
        (["--pretrained-checkpoint", "nowhere"], "nowhere, the base of .*, holds no config.json: give --pretrained"),
    ],
)
def test_an_engine_that_is_not_there_is_told(words, told, tmp_path, capfd):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 8, "base_model_name_or_path": str(tmp_path)}))
    (tmp_path / "config.json").write_text("{}")
    assert convert.main(["verify", "--input", str(tmp_path), "--engine", "vllm", "--binding-only", *words]) == 2
    assert re.search(told, " ".join(capfd.readouterr().err.split()))


@pytest.mark.parametrize("kind", [engine.Engine, engine.LlamaCpp])
def test_the_script_imports_nothing_of_ours(kind):
    script = Path(engine.__file__).with_name(kind.script)
    assert "megatron" not in script.read_text().replace("megatron-peft", "")
