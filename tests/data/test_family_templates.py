"""Chat templates in the manner of Mistral's, Qwen2's and Qwen3's: what is rendered, and what the loss counts."""

from itertools import cycle
from pathlib import Path

import pytest

from megatron_peft.config import ConfigurationError
from megatron_peft.data.records import tokenize_record
from megatron_peft.data.tokenizers import HuggingFaceTokenizer
from tests.data.tiny_tokenizers import save_tokenizer

TEMPLATES = Path(__file__).parent / "templates"
MISTRAL, QWEN2, QWEN3 = ((TEMPLATES / f"{name}.jinja").read_text() for name in ("mistral", "qwen2", "qwen3"))
SYSTEM = {"role": "system", "content": "the cat"}
ASKED = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "bonjour"}]
AGAIN = [{"role": "user", "content": "world"}, {"role": "assistant", "content": "le monde"}]
REASONED = [ASKED[0], {**ASKED[1], "reasoning_content": "French"}]
END = "<|im_end|>"
QUESTION = f"<|im_start|>user\nhello{END}\n<|im_start|>assistant\n"
# Texts that the loss does not count and texts that it does, in turns.
CASES = [
    (MISTRAL, ASKED, ["<s>[INST] hello[/INST]", f" bonjour{END}"]),
    (MISTRAL, [SYSTEM, *ASKED], ["<s>[INST] the cat\n\nhello[/INST]", f" bonjour{END}"]),
    (MISTRAL, ASKED + AGAIN, ["<s>[INST] hello[/INST]", f" bonjour{END}", "[INST] world[/INST]", f" le monde{END}"]),
    (QWEN2, [SYSTEM, *ASKED], [f"<|im_start|>system\nthe cat{END}\n{QUESTION}", f"bonjour{END}", "\n"]),
    (
        QWEN2,
        ASKED + AGAIN,
        [
            f"<|im_start|>system\nYou help.{END}\n{QUESTION}",
            f"bonjour{END}",
            f"\n<|im_start|>user\nworld{END}\n<|im_start|>assistant\n",
            f"le monde{END}",
            "\n",
        ],
    ),
    (QWEN3, ASKED, [QUESTION, f"<think>\n\n</think>\n\nbonjour{END}", "\n"]),
    (
        QWEN3,
        [SYSTEM, *REASONED],
        [f"<|im_start|>system\nthe cat{END}\n{QUESTION}", f"<think>\nFrench\n</think>\n\nbonjour{END}", "\n"],
    ),
]


def tokenizer_of(template: str, folder) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(str(save_tokenizer(folder, chat_template=template)))


@pytest.mark.parametrize(("template", "messages", "expected"), CASES)
def test_the_loss_counts_the_answers_with_their_end(template, messages, expected, tmp_path):
    tokenizer = tokenizer_of(template, tmp_path)
    ids, trained = tokenize_record({"messages": messages}, tokenizer)
    assert ids == tokenizer.encode("".join(expected)) == tokenizer.encode(tokenizer.render_chat(messages))
    counted = [flag for text, flag in zip(expected, cycle([False, True])) for _ in tokenizer.encode(text)]
    assert trained == counted


def test_a_conversation_whose_earlier_turns_would_be_rewritten_is_refused(tmp_path):
    for number, (template, messages) in enumerate([(QWEN3, ASKED + AGAIN), (MISTRAL, [SYSTEM, *ASKED, *AGAIN])]):
        tokenizer = tokenizer_of(template, tmp_path / str(number))
        with pytest.raises(ConfigurationError, match="split the conversation into records of one answer each"):
            tokenize_record({"messages": messages}, tokenizer)


def test_what_a_template_refuses_is_said(tmp_path):
    with pytest.raises(ConfigurationError, match="refuses the messages: user and assistant must take turns"):
        tokenize_record({"messages": [ASKED[0], *ASKED]}, tokenizer_of(MISTRAL, tmp_path))
