"""`megatron-peft`: its commands, its answers to slips, and completion."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_peft.cli.launch import LOADING, tell_loading
from megatron_peft.commands import convert, plan, train
from megatron_peft.commands.program import COMMANDS, main

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", [*COMMANDS, *(f"convert {name}" for name in convert.COMMANDS)])
def test_every_command_has_help_under_its_own_name(name, capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["megatron-peft"])
    assert main([*name.split(), "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: megatron-peft {name} ")
    assert f"megatron-peft {name}".startswith(sys.argv[0])


def test_ctrl_c_is_one_line_of_any_command(monkeypatch, capsys) -> None:
    def interrupted(words):
        raise KeyboardInterrupt

    monkeypatch.setattr(plan, "main", interrupted)
    assert main(["plan"]) == 130
    assert capsys.readouterr().err == "megatron-peft plan: interrupted\n"


def test_output_without_a_reader_ends_quietly() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "megatron_peft", "--version"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_the_first_rank_reports_what_takes_seconds_in_a_log_too(monkeypatch, capsys) -> None:
    for rank, told in (("0", LOADING), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        tell_loading()
        assert capsys.readouterr().err == told and not told.startswith("\n")


def test_commands_and_their_commands_are_listed(capsys) -> None:
    assert main([]) == main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"    {name}" in shown for name in COMMANDS)
    assert main(["data", "--help"]) == 0
    assert "preprocess" in capsys.readouterr().out


def test_a_folder_of_another_run_is_refused_before_anything_is_loaded(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(train, "start_ranks", lambda *_: 0)
    monkeypatch.setattr(train, "shape_of", None)  # of no model
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("3\n")
    words = "train --pretrained-checkpoint model --train-data-path a.jsonl --train-iters 2 --nproc-per-node 2 --save"
    assert main([*words.split(), str(tmp_path)]) == 2
    assert f"--save {tmp_path} already holds the checkpoints of a run" in capsys.readouterr().err


def test_a_slip_is_told_with_the_nearest_command(capsys) -> None:
    for words, told in (
        (["trian"], "did you mean train?"),
        (["data", "preprare"], "did you mean data prepare?"),
        (["preview"], "did you mean data preview?"),
        (["convert", "mrege"], "mrege is not a command; did you mean merge?"),
    ):
        assert main(words) == 2
        assert told in capsys.readouterr().err


def test_bash_completes_commands_flags_and_values(tmp_path: Path, capsys) -> None:
    assert main(["completion", "bash"]) == 0
    script = tmp_path / "completion.sh"
    script.write_text(capsys.readouterr().out)

    typed = ("tr", "train --lora-r", "train --peft-method boft", "convert merge --max")
    states = (f"COMP_WORDS=(megatron-peft {words}); COMP_CWORD={len(words.split())}" for words in typed)
    lines = (f"{state}; _shtab_megatron_peft; echo ${{COMPREPLY[@]}}" for state in states)
    code = "\n".join([f"source {script}", *lines])
    done = subprocess.run(["bash", "-c", code], check=True, capture_output=True, text=True)
    commands, flags, methods, of_merge = map(str.split, done.stdout.splitlines())
    assert commands == ["train"] and methods == ["boft"]
    assert "--lora-rank" in flags and "--max-shard-size" in of_merge


def test_tools_are_the_same_commands() -> None:
    for name in COMMANDS.keys() - {"train", "completion", "data preview"}:
        group, _, last = name.replace("-", "_").rpartition(" ")
        module, main = (group, f"{last}_{group}") if group else (last, "main")
        script = ROOT / "tools" / f"{main if group else last}.py"
        assert f"from megatron_peft.commands.{module} import {main}" in script.read_text()
