"""Translating with a model, and sacreBLEU of what comes out."""

from collections.abc import Callable, Sequence

from megatron.core.models.gpt import GPTModel
from sacrebleu.metrics import BLEU

from megatron_peft.data.tokenizers import Tokenizer
from megatron_peft.demo.data import Pair
from megatron_peft.evaluation.generation import GenerationSettings, generate

MAX_NEW_TOKENS = 64  # two held-out references are longer; an untrained model may never end
BATCH_SIZE = 64


def translate(
    model_chunks: Sequence[GPTModel],
    tokenizer: Tokenizer,
    pairs: Sequence[Pair],
    report: Callable[[int], None] = lambda n: None,
) -> tuple[str, ...]:
    """The model's French for each pair's English; `report` is told how many more messages are done."""
    settings = GenerationSettings(
        end_ids=frozenset({tokenizer.eos_id}),
        max_new_tokens=MAX_NEW_TOKENS,
        batch_size=BATCH_SIZE,
        is_complete=lambda ids: "\n" in tokenizer.decode(ids).lstrip(),  # an answer is one line
    )
    prompts = [tokenizer.encode_prompt(pair.prompt) for pair in pairs]
    return tuple(first_line(tokenizer.decode(ids)) for ids in generate(model_chunks, prompts, settings, report))


def first_line(text: str) -> str:
    """The first line that is not empty: an untrained model begins with blank lines and then talks on."""
    lines = text.strip().splitlines()
    return lines[0].strip() if lines else ""


def corpus_bleu(translations: Sequence[str], pairs: Sequence[Pair]) -> tuple[float, str]:
    """(sacreBLEU's corpus score with its default settings, 0 to 100; its signature)."""
    metric = BLEU()
    score = metric.corpus_score(list(translations), [[pair.french for pair in pairs]]).score
    return score, str(metric.get_signature())
