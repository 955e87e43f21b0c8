"""The demo from its command line to its report, with stand-ins for downloads and ranks."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from rich.console import Console

from megatron_peft.cli.parser import read_config
from megatron_peft.commands import demo
from megatron_peft.config import METHODS, ConfigurationError
from megatron_peft.demo import run, scoring
from megatron_peft.demo import run as module
from megatron_peft.demo.data import DemoScore, Pair, PairFiles, read_pairs
from megatron_peft.demo.run import draw_picture, run_demo, training_flags

LAMBDAS = {"iteration": 60, "lambda": {"decoder.layers.0.mlp.linear_fc1": 0.4}}
WHAT = ("source", "reference", "before", "after")
HELD_OUT = [Pair(f"message {i}", f"texte {i}") for i in range(20)]


class Launcher:
    """Stands in for the ranks: notes what is launched and leaves the files that they would."""

    def __init__(self):
        self.commands: list[tuple[str, ...]] = []
        self.launches: list[dict[str, str]] = []
        self.exit_code = 0

    def __call__(self, started, command, launch, program) -> int:
        assert started == "megatron_peft.demo.run"
        self.launches.append(launch)
        self.commands.append(command)
        folder, save = Path(command[0]), Path(command[command.index("--save") + 1])
        save.mkdir(parents=True, exist_ok=True)
        records = [{"iteration": i, "loss": 3.0, "grad_norm": 1.0, "step_seconds": 0.5} for i in range(1, 61)]
        (save / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        if "hybrid" in command:
            (save / "lambda.jsonl").write_text(json.dumps(LAMBDAS) + "\n")
        if self.exit_code:  # it stops after training
            return self.exit_code
        scored = range(0, len(HELD_OUT), module.SCORED_OF)
        for name, word, bleu, loss in (("before", "text", 3.0, 3.9), ("after", "texte", 20.5, 1.7)):
            words = tuple(f"{word} {i}" for i in scored)
            DemoScore(bleu, "nrefs:1", loss, 4096, words).write(folder / f"{name}.json")
        return 0


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
    monkeypatch.setattr(module, "start_processes", launcher)
    monkeypatch.setattr(module.os, "environ", {})
    return launcher


def test_lambdas_of_a_hybrid_reach_the_picture(tmp_path, launcher, monkeypatch):
    drawn = []
    monkeypatch.setattr(module, "draw_picture", lambda *arguments: drawn.append(arguments[-1]))
    run_demo(tmp_path, "hybrid")
    run_demo(tmp_path, "lora")
    assert drawn == [[LAMBDAS], []]


def test_the_report_holds_what_was_measured(tmp_path, launcher):
    run_demo(tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["seconds"] >= 0
    assert (report["bleu_before"], report["bleu_after"]) == (3.0, 20.5)
    assert (report["validation_loss_before"], report["validation_loss_after"]) == (3.9, 1.7)
    assert (report["pipeline_parallel_size"], report["trainable_parameters"]) == (2, 4096)
    assert (report["training_seconds"], report["iterations"], report["held_out_messages"]) == (30.0, 60, 10)
    example = report["translations"][1]
    assert example == {"source": "message 2", "reference": "texte 2", "before": "text 2", "after": "texte 2"}
    samples = (tmp_path / "lora" / "checkpoints" / "samples.jsonl").read_text().splitlines()
    assert json.loads(samples[1])["prompt"] == "English: message 2\nFrench:" and len(samples) == 7
    assert (tmp_path / "report.png").stat().st_size > 10_000


def test_only_short_messages_are_trained_on_and_scored(tmp_path, launcher, monkeypatch):
    long = Pair("word " * (module.MOST_WORDS + 1), "long")
    monkeypatch.setattr(sys.modules[__name__], "HELD_OUT", [long, *HELD_OUT])
    assert run_demo(tmp_path)["translations"][0]["source"] == "message 0"
    flags = launcher.commands[0]
    trained, scored = (Path(flags[flags.index(f"--{which}-data-path") + 1]) for which in ("train", "valid"))
    assert read_pairs(trained) == HELD_OUT[1:] and read_pairs(scored) == HELD_OUT[1 :: module.SCORED_OF]
    assert len(read_pairs(trained.with_name("train.jsonl"))) == len(HELD_OUT), "your own run may take all"


def test_one_launch_trains_and_scores_with_the_flags_that_were_typed(tmp_path, launcher):
    run_demo(tmp_path, extra_flags=["--seed", "7"])
    assert [command[0] for command in launcher.commands] == [str(tmp_path / "lora")]
    checkpoints = str(tmp_path / "lora" / "checkpoints")
    assert launcher.commands[0][-6:] == ["--seed", "7", "--save", checkpoints, "--resume", "auto"]


def test_it_runs_on_as_many_ranks_as_the_typed_layout_has(tmp_path, launcher, capsys):
    report = run_demo(tmp_path)
    assert launcher.launches == [{"nproc_per_node": "2"}] and module._ranks(report) == "2 pipeline stages"
    layout = ["--tensor-model-parallel-size", "3", "--pipeline-model-parallel-size"]
    assert module._ranks(run_demo(tmp_path, extra_flags=[*layout, "1"])) == "3 tensor-parallel ranks"
    run_demo(tmp_path, extra_flags=[*layout, "2"])
    assert [launch["nproc_per_node"] for launch in launcher.launches] == ["2", "3", "6"]
    assert module._ranks({"tensor_parallel_size": 1, "pipeline_parallel_size": 1}) == "one rank"


def test_a_second_call_reuses_everything_and_other_flags_begin_afresh(tmp_path, launcher):
    first = run_demo(tmp_path)
    launcher.commands.clear()
    second = run_demo(tmp_path)
    assert launcher.commands == []
    assert {**second, "seconds": 0} == {**first, "seconds": 0}
    run_demo(tmp_path, "full")
    assert (tmp_path / "lora" / "after.json").exists(), "other methods have their own folder"
    (tmp_path / "lora" / "checkpoints" / "old").touch()
    run_demo(tmp_path, extra_flags=["--lr", "1e-3"])
    assert len(launcher.commands) == 2 and not (tmp_path / "lora" / "checkpoints" / "old").exists()


@pytest.mark.parametrize("code", [2, 130])
def test_a_run_that_was_stopped_ends_with_the_code_of_its_ranks_and_goes_on_in_its_folder(tmp_path, launcher, code):
    """What is wrong a rank has said."""
    launcher.exit_code = code
    with pytest.raises(SystemExit, match=str(code)):
        run_demo(tmp_path)
    assert module.os.environ["OMP_NUM_THREADS"] == "1"
    (tmp_path / "lora" / "checkpoints" / "kept").touch()
    launcher.exit_code = 0
    assert run_demo(tmp_path)["bleu_after"] == 20.5
    assert (tmp_path / "lora" / "checkpoints" / "kept").exists()
    assert launcher.commands[0] == launcher.commands[1]


def test_a_folder_of_somebodys_own_run_is_not_emptied(tmp_path, launcher):
    own = tmp_path / "lora" / "iter_0000100"
    own.mkdir(parents=True)
    with pytest.raises(ConfigurationError, match="lora is there, and no demo made it: give another --output than"):
        run_demo(tmp_path)
    assert own.exists()


@pytest.mark.parametrize("method", METHODS)
def test_the_flags_are_those_of_pretrain_peft(method, tmp_path):
    flags = module.training_flags(tmp_path, PairFiles(tmp_path / "a.jsonl", tmp_path / "b.jsonl"), method)
    config = read_config(flags, {"WORLD_SIZE": "2"})
    assert config.peft.method == method and config.optimizer.lr == METHODS[method].demo_lr
    assert config.parallel.data_parallel_size == 1 and config.training.train_iters == module.ITERATIONS
    assert config.data.pack_sequences


def test_little_is_trained_and_all_is_scored_at_once(tmp_path):
    """What a demo takes: 15 milliseconds of a core for each trained token, and a step of generation for each batch."""
    flags = module.training_flags(tmp_path, PairFiles(tmp_path / "a.jsonl", tmp_path / "b.jsonl"), "lora")
    config = read_config(flags, {"WORLD_SIZE": "2"})
    tokens = config.training.train_iters * config.global_batch_size * config.data.seq_length
    assert 0.015 * tokens <= 0.75 * 240, "CPU seconds, three quarters of those that a newcomer is promised"
    assert scoring.BATCH_SIZE >= 66, "messages are scored"


def test_the_tables_show_scores_translations_and_where_the_rest_lies(tmp_path, launcher):
    examples = [{word: f"[b]{word}{i}" for word in WHAT} for i in range(9)]
    report = {**run_demo(tmp_path), "trainable_parameters": 4055040, "seconds": 412.0, "translations": examples}
    console = Console(file=io.StringIO(), width=160)
    run.print_report(report, Path("runs/demo"), console)
    text = console.file.getvalue()
    rows = [" ".join(line.replace("│", " ").split()) for line in text.splitlines()]
    assert {"BLEU 3.0 20.5", "validation loss 3.900 1.700", "[b]source1 [b]reference1 [b]before1 [b]after1"} <= set(
        rows
    )
    assert f"after{run.NUM_SHOWN}" not in text
    assert "4,055,040 trainable parameters, 60 iterations in 30 s on 2 pipeline stages; 412 s in all." in text
    assert "runs/demo/report.json" in text
    assert r"generate --load runs/demo/lora/checkpoints --prompt $'English: Open the file\nFrench:'" in text
    assert "megatron-peft report runs/demo/lora/checkpoints\n" in text


def test_flags_that_are_not_the_demos_go_to_the_training(monkeypatch):
    made: list = []
    monkeypatch.setattr(module, "run_demo", lambda *arguments: made.append(arguments) or "report")
    monkeypatch.setattr(run, "print_report", lambda *arguments: made.append(arguments))
    assert demo.main(["--method", "full", "--lr", "1e-4", "--output", "there"]) == 0
    assert made == [(Path("there"), "full", ["--lr", "1e-4"]), ("report", Path("there"))]
    assert demo.main(["--peft-method", "hybrid"]) == 0
    assert made[2] == (Path("runs/demo"), "hybrid", ["--peft-method", "hybrid"])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--method lora --peft-method boft", "--method lora contradicts --peft-method boft: leave one out"),
        ("--nproc-per-node 4", "--nproc-per-node: the demo starts a rank for each part of a layout itself"),
    ],
)
def test_flags_that_contradict_the_demo_are_refused(capsys, words, told):
    assert demo.main(words.split()) == 2
    assert told in " ".join(capsys.readouterr().err.split())


def test_a_short_run_needs_no_word_of_a_warmup() -> None:
    """Nobody who types --train-iters 4 has to know of one."""
    words = [*training_flags(Path("model"), PairFiles(Path("train.jsonl"), Path("valid.jsonl")), "lora")]
    assert read_config([*words, "--train-iters", "4"], {"WORLD_SIZE": "2"}).training.train_iters == 4


@pytest.mark.parametrize("rank", [0, 1])
def test_an_interrupted_rank_ends_with_130_and_the_first_one_says_so(monkeypatch, capsys, rank):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    ended: list[int] = []
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setattr(run, "_train_and_score", interrupted)
    monkeypatch.setattr(run.os, "_exit", ended.append)
    monkeypatch.setattr(sys, "argv", ["run", "folder"])
    run.main()
    assert ended == [130] and capsys.readouterr().err == ("" if rank else "megatron-peft demo: interrupted\n")


def test_an_interrupt_changes_the_exit_code_alone(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "run_demo", interrupted)
    assert demo.main([]) == 130 and capsys.readouterr().err == ""


RECORDS = [
    {"iteration": 10, "loss": 3.0, "grad_norm": 2.0},
    {"iteration": 20, "loss": 2.5, "grad_norm": 1.5, "validation_loss": 2.6},
    {"iteration": 30, "loss": None, "grad_norm": 1.0},  # a loss that was not a number
]
VALIDATED = [{**RECORDS[0], "validation_loss": 2.8}, *RECORDS[1:]]  # between the base model and the end
TRANSLATIONS = [dict(zip(WHAT, ("Pay $5_^ or $6", "Payez 5 $", "", "Payez " + "beaucoup " * 40), strict=True))]
REPORT = {
    "method": "lora",
    "tensor_parallel_size": 1,
    "pipeline_parallel_size": 2,
    "bleu_before": 3.0,
    "bleu_after": 20.0,
}
REPORT |= {"validation_loss_before": 4.0, "validation_loss_after": 1.75, "held_out_messages": 66}


@pytest.fixture
def drawn(tmp_path, monkeypatch) -> Callable[..., Figure]:
    """Draws a run as it is saved, over an older picture."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k)))
    (tmp_path / "report.png").write_bytes(b"old")

    def draw(records=RECORDS, translations=TRANSLATIONS, *more) -> Figure:
        draw_picture(tmp_path / "report.png", {**REPORT, "translations": translations}, records, *more)
        return figures[-1]

    return draw


def _axes(figure):
    return {axes.get_title(loc="left"): axes for axes in figure.axes}


def test_the_picture_of_a_run_is_a_png_that_replaces_the_old_one(drawn, tmp_path):
    for arguments in ((), ([], [])):  # a run without records still has its scores
        drawn(*arguments)
        height, width, _ = imread(tmp_path / "report.png").shape
        assert width > 1000 and height > 500
        assert [path.name for path in tmp_path.iterdir()] == ["report.png"]


def test_curves_show_what_was_measured(drawn):
    figure = drawn()
    axes = _axes(figure)
    assert figure.subfigs[0].get_supxlabel() == module.LOSS_CAPTION
    training, held_out = axes["Loss"].lines
    assert training.get_xydata().tolist() == [[10, 3.0], [20, 2.5]]
    assert held_out.get_xydata().tolist() == [[0, 4.0], [20, 1.75]]
    assert axes["Gradient norm"].lines[0].get_xydata().tolist() == [[10, 2.0], [20, 1.5], [30, 1.0]]
    assert [bar.get_height() for bar in axes["BLEU, 66 held-out messages"].patches] == [3.0, 20.0]
    assert held_out.get_label() == "held out: all 66 messages"


@pytest.mark.parametrize(
    ("records", "line"), [pytest.param(RECORDS, "None", id="two losses"), pytest.param(VALIDATED, "-", id="three")]
)
def test_held_out_losses_are_joined_only_if_one_lies_between(drawn, records, line):
    held_out = _axes(drawn(records))["Loss"].lines[1]
    assert held_out.get_marker() == "o" and held_out.get_linestyle() == line


def test_translations_stand_beside_their_reference_cut_to_fit(drawn):
    cells = drawn().axes[-1].tables[0].get_celld()
    source, reference, before, after = (cells[1, column].get_text().get_text() for column in range(4))
    assert (source, reference, before) == ("Pay $5_^ or $6", "Payez 5 $", "(nothing)")
    assert after.count("\n") == 2 and after.endswith("…")


def test_a_hybrid_has_its_lambdas_between_curves_and_translations(drawn):
    lambdas = [{"iteration": at, "lambda": {"decoder.layers.0.mlp.linear_fc1": at / 100}} for at in (10, 20)]
    image = _axes(drawn(RECORDS, TRANSLATIONS, lambdas))["linear_fc1"].images[0]
    assert image.get_array().tolist() == [[0.1, 0.2]] and image.get_clim() == (0, 1)
    assert image.axes.get_xlim() == (5, 25)
