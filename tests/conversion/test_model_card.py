"""The card of an export: what the hub reads, what the run was, and lines that do serve it."""

import dataclasses
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from megatron_peft.commands.convert import main
from megatron_peft.config import ConfigurationError
from megatron_peft.conversion.convert import megatron_to_hf, merge
from megatron_peft.conversion.model_card import Exported, serving_lines, write_card
from megatron_peft.conversion.peft_export import export_adapter
from megatron_peft.conversion.verify import random_tokens, verify
from tests.checkpoint.runs import make_config, make_record
from tests.conversion.megatron_folders import ODD, global_tensors, save_random, save_run

BLOOM = make_record(shape=dataclasses.replace(ODD, architecture="bloom"))
NO_LICENSE = "names no license, since neither --license nor the base's card does"


def made(folder: Path, **changes: Any) -> str:
    """The card of an export of a record that needs no files."""
    folder.mkdir(exist_ok=True)
    plain = {"run": folder, "record": make_record(), "output": folder, "base": "org/base", "is_adapter": True}
    write_card(folder, Exported(**plain | changes))
    return (folder / "README.md").read_text()


def test_the_hub_reads_it(tmp_path):
    data = ModelCard(made(tmp_path, lora_rank=4, license="apache-2.0")).data.to_dict()
    common = {"pipeline_tag": "text-generation", "tags": ["megatron-peft", "lora"]}
    assert data == {"base_model": "org/base", "library_name": "peft", "license": "apache-2.0", **common}
    cached = "/home/a/.cache/huggingface/hub/models--meta-llama--Llama-3.1-8B/snapshots/0e9e39f"
    data = ModelCard(made(tmp_path / "merged", base=cached, is_adapter=False)).data
    assert (data.base_model, data.library_name, data.license) == ("meta-llama/Llama-3.1-8B", "transformers", None)


OWN = {"license": "other", "license_name": "own", "license_link": "https://x"}
LINKS = ("http://x", "javascript:alert(1)", "../LICENSE", "NOTICE", "'https://x) [a](https://y'")
NO_LICENSES = ("'mit](https://x)'", "other\nlicense_name: '# own'", "[mit]", "{")


@pytest.mark.parametrize(
    ("card", "found"),
    [
        ("---\nlicense: mit\n---\n# base", {"license": "mit"}),
        ("---\nlicense: other\nlicense_name: own\nlicense_link: https://x\ntags:\n- a\n---", OWN),
        ("---\nlicense: other\nlicense_link: LICENSE\n---", {"license": "other", "license_link": "LICENSE"}),
        *(pytest.param(f"---\nlicense: other\nlicense_link: {one}\n---", {}, id=f"link {one}") for one in LINKS),
        *((f"---\nlicense: {license}\n---", {}) for license in NO_LICENSES),
        *(("# license: mit", {}), (None, {})),
    ],
)
def test_the_license_is_the_bases_or_is_asked_for(card, found, tmp_path, capsys):
    if card is not None:
        (tmp_path / "base").mkdir()
        (tmp_path / "base" / "README.md").write_text(card)
        (tmp_path / "base" / "LICENSE").touch()
    data = ModelCard(made(tmp_path / "out", base=str(tmp_path / "base"))).data.to_dict()
    assert {name: value for name, value in data.items() if "license" in name} == found
    assert (NO_LICENSE in capsys.readouterr().out) == (not found)
    assert ModelCard(made(tmp_path / "out", base=str(tmp_path / "base"), license="x-1")).data.license == "x-1"


@pytest.mark.parametrize(("rank", "served"), [(1, 1), (2, 8), (8, 8), (9, 16), (200, 256), (257, 320), (512, 512)])
def test_vllm_is_given_a_rank_that_it_takes(rank, served, tmp_path):
    output = tmp_path / "my lora"
    (line,) = re.findall("^vllm .*$", made(output, lora_rank=rank, output=output), re.M)
    *command, modules = shlex.split(line)
    assert command == f"vllm serve org/base --enable-lora --max-lora-rank {served} --lora-modules".split()
    assert modules == "my lora=my lora"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"lora_rank": 513}, "vLLM takes ranks up to 512; this one is 513. Merge the run"),
        ({}, "vLLM serves LoRA only. Export the run with `--as-lora`, or: merge the run"),
        ({"lora_rank": 8, "record": BLOOM}, "vLLM takes no LoRA for BloomForCausalLM. Merge the run"),
    ],
)
def test_what_vllm_does_not_take_has_a_way_out_instead_of_a_line(changes, told, tmp_path):
    card = made(tmp_path, **changes)
    assert told in card and "vllm serve" not in card and "PeftModel.from_pretrained" in card


def test_method_data_and_figures_are_the_runs(tmp_path):
    lines = [
        {"iteration": 1, "loss": 3.0, "validation_loss": 2.5, "epoch": 0.1, "lambda": {"mean": 0.5}},
        {"iteration": 2, "loss": 2.25, "epoch": 0.2},
        {"iteration": 3, "loss": 1.0},  # after the checkpoint
    ]
    text = "\n".join(map(json.dumps, lines)) + '\n{"iteration": 4, "lo'
    (tmp_path / "metrics.jsonl").write_text(text)
    card = made(tmp_path / "out", run=tmp_path / "iter_0000002", lora_rank=4)
    rows = dict(re.findall(r"^\| ([\w ]+) \| (.*) \|$", card, re.M))
    assert rows["method"] == "`lora`: W + s B A; B starts at zero"
    assert "longest sample" not in rows and rows["maximum sequence length"] == "32 tokens", "of an older record"
    assert "--lora-rank 4 --lora-alpha 32" in rows["settings"] and "hybrid" not in rows["settings"]
    assert rows["training"] == "`pairs.jsonl`"
    figures = {"iterations": "2", "samples": "8", "tokens": "100", "training loss": "2.25", "validation loss": "2.5"}
    assert rows.items() >= figures.items() and rows["epochs"] == "0.2"


def test_card_has_the_longest_sample_of_the_data(tmp_path):
    card = made(tmp_path, record=dataclasses.replace(make_record(), longest_sample=30))
    assert "| longest sample | 30 tokens |" in card and "| maximum sequence length | 32 tokens |" in card


def test_names_of_others_are_neither_markdown_nor_folders_of_the_machine(tmp_path):
    name = "a`b|[c](x)\n\n# Heading `` \x1b[31m.jsonl"
    config = make_config(data_settings={"train_data_path": (f"{tmp_path}/data/{name}",)})
    base = tmp_path / "folder" / "[base](x)"
    card = made(tmp_path / "out", record=make_record(config=config), base=str(base), lora_rank=8)
    assert str(tmp_path) not in card and "\n# Heading" not in card and "\x1b" not in card
    html = MarkdownIt("commonmark").enable("table").render(card.partition("\n---\n")[2])
    assert html.count("<h1>") == 1 and "<a " not in html
    assert "<code>a`b|[c](x)  # Heading ``  [31m.jsonl</code>" in html and "<code>[base](x)</code>" in html


def test_the_python_on_an_adapters_card_runs_it(moved, tmp_path):
    adapter = export_adapter(moved.run("tp2"), tmp_path / "adapter")
    lines = serving_lines(adapter, moved.run("tp2"))
    assert "pip install transformers peft" in lines.partition("```python")[0]
    blocks = re.findall(r"```python\n(.*?)```", lines, re.S)
    tokens, logits = random_tokens(1001, 8), []
    for block in blocks:
        names: dict[str, Any] = {}
        exec(block, names)
        with torch.no_grad():
            logits.append(names["model"].eval()(tokens).logits)
    assert len(blocks) == 2 and torch.equal(*logits)
    assert verify(adapter, moved.base("base")).logits.relative > 0.01


def test_the_tool_ends_with_the_lines_of_the_card(moved, tmp_path, capsys):
    outputs = {name: tmp_path / name for name in ("adapter", "as lora", "merged")}
    common = ["--input", str(moved.run("tp2")), "--license", "mit", "--output"]
    assert main(["export-adapter", *common, str(outputs["adapter"])]) == 0
    assert main(["export-adapter", "--as-lora", "--num-tokens", "8", *common, str(outputs["as lora"])]) == 0
    assert main(["merge", *common, str(outputs["merged"])]) == 0
    printed = capsys.readouterr().out
    lines = {name: serving_lines(output, moved.run("tp2")) for name, output in outputs.items()}
    for name, output in outputs.items():
        assert f"wrote {output}\n\n{lines[name]}\n" in printed
        assert str(tmp_path) in lines[name] and str(moved.bases) not in (output / "README.md").read_text()
        assert ModelCard.load(output / "README.md").data.license == "mit"
        assert str(tmp_path) not in (output / "README.md").read_text()
    assert printed.endswith(f"{lines['merged']}\n")
    assert f"vllm serve {shlex.quote(str(outputs['merged']))}\n" in printed
    assert "--max-lora-rank 8 " in lines["adapter"]


def test_a_model_of_full_fine_tuning_has_a_card_and_a_converted_one_has_none(tmp_path):
    original = save_random(tmp_path / "hf")
    run = save_run(original, tmp_path / "run", global_tensors(original))
    megatron_to_hf(run, tmp_path / "out", license="mit", progress=False)
    data = ModelCard.load(tmp_path / "out" / "README.md").data
    assert (data.base_model, data.library_name, data.tags) == ("hf", "transformers", ["megatron-peft", "full"])
    assert data.license == "mit"
    (run / "iter_0000002" / "run_record.json").unlink()
    megatron_to_hf(run, tmp_path / "bare", pretrained_checkpoint=original, progress=False)
    assert not (tmp_path / "bare" / "README.md").exists()


@pytest.mark.parametrize("convert", [export_adapter, merge, megatron_to_hf])
def test_a_license_that_is_no_identifier_is_refused(convert, moved, tmp_path):
    with pytest.raises(ConfigurationError, match="--license 'my own' is not a license identifier"):
        convert(moved.run("tp2"), tmp_path / "out", license="my own")
    assert not list(tmp_path.iterdir())
