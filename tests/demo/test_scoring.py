from __future__ import annotations

import json
import sys

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from megatron_peft.demo import scoring
from megatron_peft.demo.pairs import Pair
from megatron_peft.demo.score import Score
from tests.tiny_llama import VOCAB_SIZE, save_llama

NUM_PAIRS = 5


@pytest.fixture
def base(tmp_path):
    """A random Llama with a tokenizer of whole words, w0 to w900; nothing ends an answer but its length."""
    folder = save_llama(tmp_path / "base", num_hidden_layers=2)
    words = {f"w{i}": i for i in range(VOCAB_SIZE - 4)}
    words |= {"<unk>": len(words), "English:": len(words) + 1, "French:": len(words) + 2, "</s>": len(words) + 3}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>").save_pretrained(folder)
    return folder


def _write_pairs(path, frenches):
    pairs = [Pair(f"w{i} w{i + 7}", french) for i, french in enumerate(frenches)]
    path.write_text("".join(json.dumps(pair.as_record()) + "\n" for pair in pairs))


def test_a_model_scores_its_own_answers_with_a_hundred(tmp_path, base, monkeypatch):
    data, output = tmp_path / "valid.jsonl", tmp_path / "score.json"
    flags = ["--pretrained-checkpoint", str(base), "--train-data-path", str(data), "--valid-data-path", str(data)]
    command = ["scoring", str(output), *flags, "--train-iters", "1", "--lora-rank", "2", "--num-workers", "0"]
    monkeypatch.setattr(sys, "argv", [*command, "--seq-length", "128"])

    _write_pairs(data, ["w1 w2 w3"] * NUM_PAIRS)
    scoring.main()
    first = Score.read(output)
    _write_pairs(data, first.translations)
    scoring.main()
    second = Score.read(output)

    assert len(first.translations) == NUM_PAIRS and first.bleu < 10
    assert second.translations == first.translations and second.bleu == pytest.approx(100)
    assert second.validation_loss < first.validation_loss
    assert first.trainable_parameters == _lora_parameters(rank=2)


def _lora_parameters(rank):
    """By hand, from tests.tiny_llama: hidden 96, 6 heads and 2 + 2 key-value heads of 20, gate and up of 160."""
    qkv, proj, fc1, fc2 = (96, 200), (120, 96), (96, 320), (160, 96)
    return 2 * rank * sum(width_in + width_out for width_in, width_out in (qkv, proj, fc1, fc2))
