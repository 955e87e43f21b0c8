"""The demo from its command line to its report, with stand-ins for downloads and torchrun."""

import io
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from megatron_peft.cli.parser import parse_arguments, read_config
from megatron_peft.commands import demo
from megatron_peft.config import METHODS, ConfigurationError
from megatron_peft.demo import run
from megatron_peft.demo import run as module
from megatron_peft.demo.data import Pair, PairFiles
from megatron_peft.demo.run import DemoScore, run_demo, training_flags
from megatron_peft.experiment.plots import Translation

LAMBDAS = {"iteration": 60, "lambda": {"decoder.layers.0.mlp.linear_fc1": 0.4}}
HELD_OUT = [Pair(f"message {i}", f"texte {i}") for i in range(20)]


class Launcher:
    """Stands in for torchrun: notes what is launched and leaves the files that the program would."""

    def __init__(self):
        self.commands: list[tuple[str, ...]] = []
        self.fails_in: str | None = None

    def __call__(self, *command):
        self.commands.append(command)
        if self.fails_in in command:
            raise ConfigurationError("ended with exit code 1; see above.")
        if command[1] != module.PROGRAM[1]:
            trained = "--load" in command
            words = tuple(f"{'texte' if trained else 'text'} {i}" for i in range(len(HELD_OUT)))
            DemoScore(20.5 if trained else 3.0, "nrefs:1", 1.7 if trained else 3.9, 4096, words).write(Path(command[2]))
        else:
            save = Path(command[command.index("--save") + 1])
            save.mkdir(parents=True, exist_ok=True)
            records = [{"iteration": i, "loss": 3.0, "grad_norm": 1.0, "step_seconds": 0.5} for i in range(1, 61)]
            (save / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
            if "hybrid" in command:
                (save / "lambda.jsonl").write_text(json.dumps(LAMBDAS) + "\n")

    def programs(self):
        return ["train" if command[1] == module.PROGRAM[1] else Path(command[2]).stem for command in self.commands]


@pytest.fixture
def launcher(monkeypatch, tmp_path) -> Launcher:
    def prepare_pairs(folder, downloads):
        folder.mkdir(parents=True, exist_ok=True)
        files = PairFiles(folder / "train.jsonl", folder / "valid.jsonl")
        for path in (files.train, files.valid):
            path.write_text("".join(json.dumps(pair.as_record()) + "\n" for pair in HELD_OUT))
        return files

    launcher = Launcher()
    monkeypatch.setattr(module, "prepare_model", lambda folder, downloads: folder)
    monkeypatch.setattr(module, "prepare_pairs", prepare_pairs)
    monkeypatch.setattr(module, "_launch", launcher)
    return launcher


def test_lambdas_of_a_hybrid_reach_the_picture(tmp_path, launcher, monkeypatch):
    drawn = []
    monkeypatch.setattr(module, "plot_run", lambda *arguments: drawn.append(arguments[-1]))
    run_demo(tmp_path, "hybrid")
    run_demo(tmp_path, "lora")
    assert drawn == [[LAMBDAS], []]


def test_the_report_holds_what_was_measured(tmp_path, launcher):
    run_demo(tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["seconds"] >= 0
    assert (report["bleu_before"], report["bleu_after"]) == (3.0, 20.5)
    assert (report["validation_loss_before"], report["validation_loss_after"]) == (3.9, 1.7)
    assert (report["tensor_parallel_size"], report["trainable_parameters"]) == (3, 4096)
    assert (report["training_seconds"], report["iterations"], report["held_out_messages"]) == (30.0, 60, 20)
    example = report["translations"][1]
    assert example == {"source": "message 2", "reference": "texte 2", "before": "text 2", "after": "texte 2"}
    assert (tmp_path / "report.png").stat().st_size > 10_000


def test_scored_before_and_after_training_with_the_flags_of_training(tmp_path, launcher):
    run_demo(tmp_path, extra_flags=["--seed", "7"])
    assert launcher.programs() == ["before", "train", "after"]
    before, training, after = launcher.commands
    assert before[3:] == training[2 : len(before) - 1]
    assert after[3 : len(before)] == before[3:]
    assert after[len(before) :] == ("--load", str(tmp_path / "lora" / "checkpoints"), "--finetune")
    assert before[-2:] == ("--seed", "7")


def test_a_second_call_reuses_everything_and_other_flags_begin_afresh(tmp_path, launcher):
    first = run_demo(tmp_path)
    launcher.commands.clear()
    second = run_demo(tmp_path)
    assert launcher.commands == []
    assert (second.bleu_after, second.training_seconds) == (first.bleu_after, first.training_seconds)
    run_demo(tmp_path, "full")
    assert (tmp_path / "lora" / "trained").exists(), "other methods have their own folder"
    launcher.commands.clear()
    run_demo(tmp_path, extra_flags=["--lr", "1e-3"])
    assert launcher.programs() == ["before", "train", "after"]
    assert "--load" not in launcher.commands[1]


def test_a_training_that_was_stopped_continues_from_its_checkpoint(tmp_path, launcher):
    launcher.fails_in = module.PROGRAM[1]
    with pytest.raises(ConfigurationError):
        run_demo(tmp_path)
    checkpoints = tmp_path / "lora" / "checkpoints"
    checkpoints.mkdir()
    launcher.fails_in = None
    launcher.commands.clear()
    run_demo(tmp_path)
    assert launcher.programs() == ["train", "after"]
    assert launcher.commands[0][-2:] == ("--load", str(checkpoints))


@pytest.mark.parametrize("method", METHODS)
def test_the_flags_are_those_of_pretrain_peft(method, tmp_path):
    flags = module.training_flags(tmp_path, PairFiles(tmp_path / "a.jsonl", tmp_path / "b.jsonl"), method)
    config = parse_arguments(flags, {"WORLD_SIZE": "3"})
    assert config.peft.method == method and config.optimizer.lr == METHODS[method].demo_lr
    assert config.parallel.data_parallel_size == 1 and config.training.train_iters == module.ITERATIONS
    assert config.data.pack_sequences


def test_a_program_that_fails_is_named_with_its_exit_code(monkeypatch):
    def start(command, env):
        assert command[-2:] == ["/x/pretrain_peft.py", "--flag"] and env["OMP_NUM_THREADS"] == "1"
        return SimpleNamespace(wait=lambda: 2)

    monkeypatch.setattr(module.subprocess, "Popen", start)
    with pytest.raises(ConfigurationError, match=r"/x/pretrain_peft.py --flag ended with exit code 2"):
        module._launch("/x/pretrain_peft.py", "--flag")


def test_the_tables_show_scores_translations_and_where_the_rest_lies(tmp_path, launcher):
    examples = tuple(Translation(f"source{i} [bold]", f"ref{i}", f"before{i}", f"after{i}") for i in range(9))
    report = replace(run_demo(tmp_path), trainable_parameters=4055040, seconds=412.0, translations=examples)
    console = Console(file=io.StringIO(), width=160)
    run.print_report(report, Path("runs/demo"), console)
    text = console.file.getvalue()
    rows = [" ".join(line.replace("│", " ").split()) for line in text.splitlines()]
    assert {"BLEU 3.0 20.5", "validation loss 3.900 1.700", "source1 [bold] ref1 before1 after1"} <= set(rows)
    assert f"after{run.NUM_SHOWN}" not in text
    assert "4,055,040 trainable parameters, 60 iterations in 30 s on 3 tensor-parallel ranks; 412 s in all." in text
    assert "runs/demo/report.json" in text


def test_flags_that_are_not_the_demos_go_to_the_training(monkeypatch):
    made: list = []
    monkeypatch.setattr(module, "run_demo", lambda *arguments: made.append(arguments) or "report")
    monkeypatch.setattr(run, "print_report", lambda *arguments: made.append(arguments))
    assert demo.main(["--method", "full", "--lr", "1e-4", "--output", "there"]) == 0
    assert made == [(Path("there"), "full", ["--lr", "1e-4"]), ("report", Path("there"))]


def test_a_shorter_run_has_a_shorter_warmup(monkeypatch):
    """Nobody who types --train-iters 4 has to know of the demo's warm-up."""
    made: list = []
    monkeypatch.setattr(module, "run_demo", lambda *arguments: made.append(arguments[-1]))
    monkeypatch.setattr(run, "print_report", lambda *_: None)
    short, typed = ["--train-iters", "4"], ["--train-iters", "320", "--lr-warmup-iters", "3"]
    assert [demo.main(words) for words in (short, typed, ["--train-iters", "320"])] == [0, 0, 0]
    assert made == [[*short, "--lr-warmup-iters", "0"], typed, ["--train-iters", "320", "--lr-warmup-iters", "20"]]
    files = PairFiles(Path("train.jsonl"), Path("valid.jsonl"))
    words = [*training_flags(Path("model"), files, "lora"), *made[0]]
    assert read_config(words, {"WORLD_SIZE": "3"}).optimizer.lr_warmup_iters == 0


def test_an_interrupt_changes_the_exit_code_alone(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "run_demo", interrupted)
    assert demo.main([]) == 130 and capsys.readouterr().err == ""
