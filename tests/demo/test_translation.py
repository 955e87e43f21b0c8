from __future__ import annotations

import pytest

from megatron_peft.demo import translation as module
from megatron_peft.demo.pairs import Pair
from megatron_peft.demo.translation import corpus_bleu, first_line, translate


class Letters:
    """A tokenizer of one character an id."""

    eos_id = 0

    def encode_prompt(self, text):
        return list(map(ord, text))

    def decode(self, ids):
        return "".join(map(chr, ids))


@pytest.fixture
def says(monkeypatch):
    """A model that answers every prompt with one text; asks after each letter whether the answer is complete."""

    def generate(model, prompts, settings, report):
        ids: list[int] = []
        for letter in model.encode():
            ids.append(letter)
            if settings.is_complete(ids):
                break
        report(len(prompts))
        model_saw.append((["".join(map(chr, prompt)) for prompt in prompts], "".join(map(chr, ids)), settings))
        return [ids for _ in prompts]

    model_saw: list = []
    monkeypatch.setattr(module, "generate", generate)
    return model_saw


def test_an_answer_is_the_first_line_that_is_not_empty(says):
    reported: list[int] = []
    pairs = [Pair("Open file", "Ouvrir le fichier")]
    assert translate("\n\n Ouvrir \nEnglish: and on", Letters(), pairs, reported.append) == ("Ouvrir",)
    prompts, generated, settings = says[0]
    assert prompts == ["English: Open file\nFrench:"]
    assert generated == "\n\n Ouvrir \n", "blank lines in front do not end an answer, the end of its line does"
    assert settings.end_ids == {0}
    assert reported == [1]


@pytest.mark.parametrize(("text", "line"), [("", ""), (" \n ", ""), (" a b \n c", "a b")])
def test_first_line(text, line):
    assert first_line(text) == line


def test_bleu_is_sacrebleus_over_the_corpus():
    pairs = [Pair("a", "le chat est sur le tapis"), Pair("b", "il pleut des cordes ce matin")]
    exact, signature = corpus_bleu([pair.french for pair in pairs], pairs)
    half, _ = corpus_bleu(["le chat est sur le tapis", "rien de cela"], pairs)
    assert exact == pytest.approx(100)
    assert 30 < half < 70
    assert "tok:13a" in signature and "version:" in signature
