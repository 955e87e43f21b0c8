"""Translations of a model and their score."""

import json
import sys
from types import SimpleNamespace

import pytest

from megatron_peft.demo import run, scoring
from megatron_peft.demo.data import DemoScore, Pair
from megatron_peft.demo.scoring import translate
from megatron_peft.training.metrics import read_metrics
from tests.evaluation.worded_llama import save_worded_llama

LETTERS = SimpleNamespace(  # a character an id
    eos_id=0, encode_prompt=lambda text: list(map(ord, text)), decode=lambda ids: "".join(map(chr, ids))
)


@pytest.mark.parametrize(
    ("told", "answer"), [("\n\n Ouvrir \nEnglish: and on", "Ouvrir"), ("", ""), (" \n ", ""), (" a b \n c", "a b")]
)
def test_an_answer_is_the_first_line_that_is_not_empty(monkeypatch, told, answer):
    """Of a model that answers with this text; blank lines in front do not end an answer, the end of its line does."""

    def generate(model, prompts, settings, report):
        assert [LETTERS.decode(prompt) for prompt in prompts] == ["English: Open file\nFrench:"]
        assert settings.end_ids == {0}
        report(len(prompts))
        ends = [n for n in range(1, len(told)) if settings.is_complete(list(told.encode())[:n])]
        assert not ends or told[: ends[0]].strip() == answer
        return [list(told.encode())[: ends[0] if ends else None]]

    monkeypatch.setattr(scoring, "generate", generate)
    reported: list[int] = []
    pairs = [Pair("Open file", "Ouvrir le fichier")]
    assert translate([], LETTERS, pairs, reported.append) == (answer,) and reported == [1]


@pytest.fixture
def flags(tmp_path) -> list[str]:
    """A run of a random Llama with a tokenizer of whole words; hardly anything ends an answer but its length."""
    paths = {"pretrained-checkpoint": save_worded_llama(tmp_path / "base")}
    paths |= dict.fromkeys(("train-data-path", "valid-data-path"), tmp_path / "data.jsonl")
    return [*(f"--{name}={path}" for name, path in paths.items()), "--num-workers=0", "--seq-length=128"]


def write_pairs(folder, french) -> None:
    pairs = [Pair(f"w{i} w{i + 7}", text).as_record() for i, text in enumerate(french)]
    (folder / "data.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))


def test_a_model_scores_its_own_answers_with_a_hundred(tmp_path, monkeypatch, flags):
    output = tmp_path / "score.json"
    monkeypatch.setattr(sys, "argv", ["scoring", str(output), *flags, "--train-iters=1", "--lora-rank=2"])

    def scored_against(french):
        write_pairs(tmp_path, french)
        scoring.main()
        return DemoScore.read(output)

    first = scored_against(["w1 w2 w3"] * 5)
    second = scored_against(first.translations)
    assert len(first.translations) == 5 and first.bleu < 10 and "tok:13a" in first.bleu_signature
    assert second.translations == first.translations and second.bleu == pytest.approx(100)
    assert second.validation_loss < first.validation_loss
    # Of tests.tiny_llama: 4 layers, hidden 96, 6 heads and 2 + 2 key-value heads of 20, gate and up of 160.
    assert first.trainable_parameters == 4 * 2 * ((96 + 200) + (120 + 96) + (96 + 320) + (160 + 96))


def test_the_base_is_scored_after_training_as_it_was_before_it(tmp_path, monkeypatch, flags):
    write_pairs(tmp_path, ["w1 w2 w3"] * 5)
    flags += ["--train-iters=3", "--peft-method=full", "--lr=1e-2"]
    save = str(tmp_path / "run")
    monkeypatch.setattr(run, "MOST_NEW_TOKENS", scoring.MAX_NEW_TOKENS)
    for program, words in (
        (scoring, [str(tmp_path / "untrained.json"), *flags]),
        (run, [str(tmp_path), *flags, "--save", save]),
        (scoring, [str(tmp_path / "loaded.json"), *flags, "--load", save]),
    ):
        monkeypatch.setattr(sys, "argv", ["program", *words])
        program.main()
    untrained, before, after, loaded = (
        DemoScore.read(tmp_path / f"{name}.json") for name in ("untrained", "before", "after", "loaded")
    )
    assert (before.translations, before.validation_loss) == (untrained.translations, untrained.validation_loss)
    assert after.validation_loss < before.validation_loss - 0.1
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["validation_loss"] == after.validation_loss
    assert after.validation_loss == pytest.approx(loaded.validation_loss, rel=1e-6)


def test_a_score_that_is_cut_short_leaves_no_file(tmp_path, monkeypatch):
    def fail(source, target):
        raise OSError("killed")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="killed"):
        DemoScore(12.5, "nrefs:1", 1.75, 1000, ("Fermé",)).write(tmp_path / "after.json")
    assert not (tmp_path / "after.json").exists()
