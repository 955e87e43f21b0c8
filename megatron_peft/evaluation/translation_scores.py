"""BLEU by sacreBLEU and ROUGE-L by rouge-score, with the settings that their figures depend on."""

import re
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import NamedTuple

from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import Tokenizer
from sacrebleu.metrics.bleu import BLEU


class Bleu(NamedTuple):
    """Corpus score, 0 to 100, and sacreBLEU's signature of it."""

    score: float
    signature: str


def corpus_bleu(references: Sequence[str], translations: Sequence[str], tokenize: str = "13a") -> Bleu:
    """sacreBLEU's corpus score with one reference a translation; `tokenize` as its own flag (zh, ja-mecab, char)."""
    metric = BLEU(tokenize=tokenize)
    score = metric.corpus_score(list(translations), [list(references)]).score
    return Bleu(score, str(metric.get_signature()))


def rouge_l(reference: str, translation: str) -> float:
    """F-measure of the longest common subsequence, 0 to 100, with rouge-score's own tokens.

    These are runs of a-z and 0-9 in lower case, so an accent cuts a word in two and Chinese has no tokens at all;
    `rouge_l_words` is for such languages.
    """
    return 100 * _scorer(None).score(reference, translation)["rougeL"].fmeasure


def rouge_l_words(reference: str, translation: str) -> float:
    """As `rouge_l`, over words of any alphabet; of scripts without spaces each character is a token."""
    return 100 * _scorer(_words()).score(reference, translation)["rougeL"].fmeasure


class WordTokenizer(Tokenizer):
    """Words in lower case with their accents; Chinese, Japanese and Thai characters by themselves."""

    UNSPACED = r"\u0e00-\u0e7f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
    TOKEN = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+")

    def tokenize(self, text: str) -> list[str]:
        return self.TOKEN.findall(text.casefold())


@cache
def _words() -> WordTokenizer:
    return WordTokenizer()


@lru_cache(maxsize=4)
def _scorer(tokenizer: Tokenizer | None) -> RougeScorer:
    return RougeScorer(["rougeL"], tokenizer=tokenizer)
