"""Configuration files: every flag survives YAML and back, files layer, and what is wrong has a line and a column."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_peft.cli.config_files import file_entries, run_file, text_of
from megatron_peft.cli.flags import Flag, served_flags
from megatron_peft.cli.parser import RunFlags, read_config
from megatron_peft.commands import convert, train
from megatron_peft.config import ConfigurationError, RunConfig

NEEDED = ["--pretrained-checkpoint", "base", "--train-data-path", "a.jsonl", "--train-iters", "5"]
KNOWN = {
    "--lr": Flag(("--lr",), "config", "lr", "", "", section="optimizer"),
    "--bf16": Flag(("--bf16",), "config", "bf16", "", "", constant=True, section="model"),
    "--names": Flag(("--names",), "command", "names", "", ""),
}
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\x85\u2028\u2029\ufeff"), max_size=12)


def file_with(folder: Path, text: str, name: str = "run.yaml") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def read(*words: str) -> RunConfig:
    return read_config([*NEEDED, *words], {})


def values_of(one: Flag) -> st.SearchStrategy[Any]:
    """Anything that the parser may have made of a flag's words; checks of values are not what is tested here."""
    if not one.takes_value:
        return st.booleans() if isinstance(one.constant, bool) else st.just(True)
    number = st.integers(-(10**9), 10**9) if one.kind is int else st.floats(allow_nan=False, allow_infinity=False)
    single = st.sampled_from(one.choices) if one.choices else number if one.kind in (int, float) else TEXTS
    return st.lists(single, min_size=1, max_size=3).map(tuple) if one.many else single


@pytest.mark.parametrize("one", [one for one in served_flags() if one.section], ids=lambda one: one.names[0])
@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_served_flag_survives_yaml_and_back(tmp_path: Path, one: Flag, data: st.DataObject) -> None:
    value = data.draw(values_of(one))
    name = one.names[0]
    text = text_of("a title", {one.section: [(one, value)]})
    (found,) = file_entries(file_with(tmp_path, text), {name: one}, str) or [None]
    if not one.takes_value:
        assert (found is not None and found.words is not None) == value
        return
    assert found is not None and found.flag is one and one.read(found.words or []) == value


def test_a_run_file_gives_the_same_run(tmp_path: Path) -> None:
    words = "--peft-method hybrid --lora-rank 4 --hybrid-lambda-init 0.4 --bf16 --no-rope-fusion --swiglu --lr 3e-5"
    config = read(*words.split(), "--peft-target-modules", "linear_qkv", "linear_fc1", "--no-exit-signal-handler")
    again = file_with(tmp_path, run_file(config, {}))
    assert read_config(["--config", again], {}) == config
    changed = read_config(["--config", again, "--lr", "1e-3"], {})
    assert changed == replace(config, optimizer=replace(config.optimizer, lr=1e-3))


def test_print_config_prints_what_would_run_and_runs_nothing(tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit, match="0"):
        read_config([*NEEDED, "--lr", "0.5", "--nproc-per-node", "2", "--print-config"], {"WORLD_SIZE": "2"})
    shown = capsys.readouterr().out
    assert "  # peak learning rate, reached after the warmup\n  lr: 0.5\n" in shown
    assert "launch:\n  # start this many processes" in shown and "  # lora-rs:" not in shown
    again = read_config(["--config", file_with(tmp_path, shown)], {"WORLD_SIZE": "2"})
    assert again == read_config([*NEEDED, "--lr", "0.5"], {"WORLD_SIZE": "2"})


def test_later_files_override_and_typed_flags_override_all(tmp_path: Path) -> None:
    first = file_with(tmp_path, "lr: 1\nbf16: true\nexit-signal-handler: false\nadam-beta1: 0.5\n", "a.yaml")
    second = file_with(tmp_path, "optimizer: {lr: 2e-4, adam_beta1: null}\nbf16: false\n", "b.yaml")
    config = read("--config", first, second)
    assert (config.optimizer.lr, config.optimizer.adam_beta1, config.model.bf16) == (2e-4, 0.9, False)
    assert not config.training.exit_signal_handler
    on = file_with(tmp_path, "exit-signal-handler: true\n", "on.yaml")
    for files in ([first, on], [on, first], [first, on, first], [on, first, on]):
        assert read("--config", *files).training.exit_signal_handler == (files[-1] == on)
    unfused, not_flash = (
        file_with(tmp_path, text, text[:4]) for text in ("attention-backend: unfused", "use-flash-attn: no")
    )
    assert read("--config", unfused, not_flash).model.attention_backend == "unfused"
    config = read("--lr", "3", "--config", first, "--exit-signal-handler", f"--config={second}")
    assert config.optimizer.lr == 3 and config.training.exit_signal_handler


WRONG = {
    "lr: 1\nlrr: 2\n": "line 2, column 1: --lrr ?",
    "config: b.yaml\n": "line 1, column 1: config is for the command line only: a file cannot hold it.",
    "print_config: true\n": "line 1, column 1: print_config is for the command line only",
    "model:\n  lr: 1\n": "line 2, column 3: lr does not belong to model: write it under optimizer.",
    "optimizer:\n  names: [a]\n": "line 2, column 3: names does not belong to optimizer: write it at the top.",
    "wat: {lr: 1}\n": "line 1, column 1: wat is not a section; the sections are model, optimizer.",
    "lr: 1\noptimizer:\n  lr: 2\n": "line 3, column 3: lr stands here and in line 1, column 1: leave one out.",
    "bf16: maybe\n": "line 1, column 1: bf16 is a switch: true or false, not maybe.",
    "bf16: [true, true]\n": "line 1, column 1: bf16 is a switch",
    "lr: []\n": "line 1, column 1: lr has a list with nothing in it",
    "lr: [1, null]\n": "line 1, column 1: lr has a list with nothing in it, or an empty value in it.",
    "lr: [[1]]\n": "line 1, column 1: a value is a string",
    "lr: !!python/object/apply:os.system [echo]\n": "line 1, column 1: ",
    "? [a]\n: 1\n": "line 1, column 3: a key is the name of a flag.",
    "- lr\n": "is not a table of flags",
    "lr: [1\n": "line 1, column 5: while parsing a flow sequence, expected ',' or ']', but got '<stream end>' (line 2",
    "lr: 1\nsplit: [9,\n  1\nbf16: true\n": "line 2, column 8: while parsing a flow",
    "lr: 1\nsave: 'x\nbf16: true\n": "line 2, column 7: while scanning a quoted",
    "bf16: true\nlr 1\nsplit: 9\n": "line 2, column 1: while scanning a simple key",
    "lr: [1, 2}\n": "line 1, column 10: while parsing a flow sequence, expected ',' or ']', but got '}'.",
    "[" * 5000: "nested too deep",
}


@pytest.mark.parametrize(("text", "told"), WRONG.items(), ids=range(len(WRONG)))
def test_what_is_wrong_is_told_with_its_place(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(told)):
        file_entries(file_with(tmp_path, text), KNOWN, lambda name: f"{name} ?")


def test_everything_that_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    file = file_with(tmp_path, "lora-rnak: 4\nlr: many\nbf16: perhaps\n")
    with pytest.raises(ConfigurationError) as caught:
        read("--config", file, str(tmp_path / "none.yaml"))
    assert len(caught.value.problems) == 3
    assert "line 1, column 1: --lora-rnak is not a known flag; did you mean --lora-rank?" in str(caught.value)
    with pytest.raises(ConfigurationError, match=r"run.yaml, line 1, column 1: --lr: invalid number value: 'many'"):
        read("--config", file_with(tmp_path, "lr: many\n"))
    for words in (["--config"], ["--config", "--lr", "1"], ["--config="], ["--config", ""]):
        with pytest.raises(ConfigurationError, match="--config needs a file"):
            RunFlags(words)


def test_a_tool_reads_its_flags_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = file_with(tmp_path, f"input: nowhere\noutput: {tmp_path}/out\n")
    assert convert.main(["merge", "--config", file]) == 2
    assert "nowhere" in capsys.readouterr().err
    assert convert.main(["merge", "--config", file_with(tmp_path, "inptu: a\n")]) == 2
    assert "line 1, column 1: --inptu is not a known flag; did you mean --input?" in capsys.readouterr().err


def test_the_file_of_a_run_that_resumes_itself_repeats_it_from_its_beginning(tmp_path: Path, monkeypatch) -> None:
    texts: list[str] = []
    monkeypatch.setattr(train, "_run", lambda config, text, *_: texts.append(text))
    monkeypatch.setattr(train, "shape_of", None)  # of no model
    run = tmp_path / "run"
    others = [["--load", str(tmp_path / "run2")], ["--load", str(run), "--finetune"]]
    for load in (["--load", str(run)], ["--load", f"{tmp_path}/./run/best"], *others):
        assert train.main([*NEEDED, "--save", str(run), *load]) == 0
    loads = [read_config(["--config", file_with(tmp_path, text)], {}).checkpoint.load for text in texts]
    assert loads == [None, None, str(tmp_path / "run2"), str(run)]
