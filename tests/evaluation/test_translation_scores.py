"""BLEU and ROUGE-L are the reference packages' own figures."""

from __future__ import annotations

import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from megatron_peft.evaluation.translation_scores import corpus_bleu, rouge_l, rouge_l_words

WORDS = st.sampled_from("the a cat dog sat on mat red été Élève 42 don't , . ! % x".split())
SENTENCES = st.lists(WORDS, max_size=12).map(" ".join)
CORPUS = st.lists(st.tuples(SENTENCES.filter(bool), SENTENCES), min_size=1, max_size=8)


@settings(max_examples=50)
@given(CORPUS)
def test_bleu_equals_sacrebleus(pairs: list[tuple[str, str]]) -> None:
    references, translations = zip(*pairs, strict=True)
    expected = sacrebleu.corpus_bleu(list(translations), [list(references)]).score
    assert corpus_bleu(references, translations).score == expected


@settings(max_examples=50)
@given(SENTENCES, SENTENCES)
def test_rouge_l_equals_rouge_scores(reference: str, translation: str) -> None:
    expected = RougeScorer(["rougeL"]).score(reference, translation)["rougeL"].fmeasure
    assert rouge_l(reference, translation) == pytest.approx(100 * expected)


def test_signature_names_what_the_score_depends_on() -> None:
    signature = corpus_bleu(["a b c d"], ["a b c d"]).signature
    assert signature == f"nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:{sacrebleu.__version__}"
    assert "tok:zh" in corpus_bleu(["你好"], ["你好"], "zh").signature


def test_chinese_needs_its_own_tokens() -> None:
    reference, translation = "我今天去学校上课。", "我今天去公园散步。"
    assert corpus_bleu([reference], [translation], "zh").score > corpus_bleu([reference], [translation]).score


def test_rouge_l_over_words_knows_accents_and_unspaced_scripts() -> None:
    assert rouge_l("élève", "ève") > 0, "the package's own tokens cut at accents"
    assert rouge_l_words("élève", "ève") == 0
    assert rouge_l_words("L'élève lit.", "l'ÉLÈVE lit") == 100
    assert rouge_l("我去学校", "我去学校") == 0
    assert rouge_l_words("我去学校", "我在学校") == 75
