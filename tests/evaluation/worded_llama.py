"""A tiny Llama with a tokenizer of whole words and a chat template, and training data for it."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from tests.tiny_llama import VOCAB_SIZE, save_llama

SPECIAL = ("<unk>", "<s>", "</s>", "<end>")
WORDS = [f"w{i}" for i in range(VOCAB_SIZE - len(SPECIAL))]


def save_worded_llama(folder: Path, seed: int = 0, **sizes: Any) -> Path:
    """Words w0, w1, ... are the ids 0, 1, ..."""
    save_llama(folder, seed, bos_token_id=VOCAB_SIZE - 3, eos_token_id=VOCAB_SIZE - 2, pad_token_id=None, **sizes)
    save_words(folder)
    return folder


def save_words(folder: Path) -> None:
    """The tokenizer alone."""
    ids = {word: index for index, word in enumerate([*WORDS, *SPECIAL])}
    tokenizer = Tokenizer(WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()  # type: ignore[assignment]
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "additional_special_tokens": ["<end>"]}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.chat_template = "{% for m in messages %}<s> {{ m.content }} {% endfor %}"
    fast.save_pretrained(folder)


def save_worded_pairs(path: Path) -> Path:
    """Eight samples: after w5 comes w6 w7 w8."""
    pairs = [{"prompt": f"w{i} ", "completion": " ".join(f"w{i + k}" for k in (1, 2, 3))} for i in range(8)]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return path
