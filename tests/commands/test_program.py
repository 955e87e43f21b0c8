"""`megatron-peft`: its commands, its version, its answers to slips, and completion."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from megatron_peft.cli.launch import LOADING, tell_loading
from megatron_peft.commands import plan
from megatron_peft.commands.program import COMMANDS, main

ROOT = Path(__file__).parents[2]
SCRIPTS = {"convert": "convert", "evaluate": "evaluate", "experiment": "experiment", "generate": "generate"}
SCRIPTS |= {"report": "report", "demo": "demo", "bench": "bench", "check_gpu": "check_gpu", "certify": "certify"}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_under_its_own_name(name, capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["megatron-peft"])
    assert main([*name.split(), "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: megatron-peft {name} ")
    assert sys.argv[0] == f"megatron-peft {name}"


def test_ctrl_c_is_one_line_of_any_command(monkeypatch, capsys) -> None:
    def interrupted(words):
        raise KeyboardInterrupt

    monkeypatch.setattr(plan, "main", interrupted)
    assert main(["plan"]) == 130
    assert capsys.readouterr().err == "megatron-peft plan: interrupted\n"


def test_a_terminal_is_told_what_takes_seconds(monkeypatch, capsys) -> None:
    for is_terminal, rank, told in ((True, "0", LOADING), (True, "1", ""), (False, "0", "")):
        monkeypatch.setattr(sys.stderr, "isatty", lambda is_terminal=is_terminal: is_terminal)
        monkeypatch.setenv("RANK", rank)
        tell_loading()
        assert capsys.readouterr().err == told and not told.startswith("\n")


def test_commands_and_their_commands_are_listed(capsys) -> None:
    assert main([]) == main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"    {name}" in shown for name in COMMANDS)
    assert main(["data", "--help"]) == 0
    assert "preprocess" in capsys.readouterr().out


def test_a_slip_is_told_with_the_nearest_command(capsys) -> None:
    for words, told in (
        (["trian"], "did you mean train?"),
        (["data", "preprare"], "did you mean data prepare?"),
        (["preview"], "did you mean data preview?"),
        (["convert", "mrege"], "mrege is not a command; did you mean merge?"),
    ):
        assert main(words) == 2
        assert told in capsys.readouterr().err


def test_version_is_the_packages(capsys) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith(f"megatron-peft {version('megatron-peft')} (megatron-core ")


def test_nothing_heavy_is_imported_for_an_overview_or_a_version() -> None:
    call = "import sys; from megatron_peft.commands.program import main; main(sys.argv[1:])"
    code = f"{call}; assert 'torch' not in sys.modules"
    for words in (["--help"], ["--version"]):
        subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, check=True, capture_output=True)


def test_bash_completes_commands_flags_and_values(tmp_path: Path, capsys) -> None:
    assert main(["completion", "bash"]) == 0
    script = tmp_path / "completion.sh"
    script.write_text(capsys.readouterr().out)

    def completed(*words: str) -> list[str]:
        typed = " ".join(f"'{word}'" for word in ("megatron-peft", *words))
        state = f"COMP_WORDS=({typed}); COMP_CWORD={len(words)}"
        code = f"source {script}; {state}; _shtab_megatron_peft; echo ${{COMPREPLY[@]}}"
        return subprocess.run(["bash", "-c", code], check=True, capture_output=True, text=True).stdout.split()

    assert completed("tr") == ["train"]
    assert "--lora-rank" in completed("train", "--lora-r")
    assert completed("train", "--peft-method", "boft") == ["boft"]
    assert "--max-shard-size" in completed("convert", "merge", "--max")


def test_tools_are_the_same_commands() -> None:
    for script, module in {**SCRIPTS, "prepare_data": "prepare", "preprocess_data": "preprocess"}.items():
        assert f"from megatron_peft.commands.{module} import main" in (ROOT / "tools" / f"{script}.py").read_text()
