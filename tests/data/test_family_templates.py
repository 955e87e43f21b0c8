"""Chat templates in the manner of Mistral's, Qwen2's and Qwen3's: what is rendered, and what the loss counts."""

from itertools import cycle

import pytest

from megatron_peft.config import ConfigurationError
from megatron_peft.data.records import tokenize_record
from megatron_peft.data.tokenizers import HuggingFaceTokenizer
from tests.data.tiny_tokenizers import save_tokenizer

# Turns must alternate; a system message is written into the last user's turn.
MISTRAL = """
{%- set system = messages[0]['content'] if messages[0]['role'] == 'system' else '' -%}
{%- set turns = messages[1:] if system else messages -%}
{{- bos_token -}}
{%- for turn in turns -%}
    {%- if (turn['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{- raise_exception('user and assistant must take turns') -}}
    {%- endif -%}
    {%- if turn['role'] == 'user' -%}
        {%- set last = loop.index0 >= turns | length - 2 -%}
        {{- '[INST] ' + (system + '\n\n' if system and last else '') + turn['content'] + '[/INST]' -}}
    {%- else -%}
        {{- ' ' + turn['content'] + eos_token -}}
    {%- endif -%}
{%- endfor -%}"""
# A default system message.
QWEN2 = """
{%- for message in messages -%}
    {%- if loop.first and messages[0]['role'] != 'system' -%}
        {{- '<|im_start|>system\nYou help.<|im_end|>\n' -}}
    {%- endif -%}
    {{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"""
# The answer to the last question has its reasoning, even if it is empty; earlier answers lose theirs.
QWEN3 = """
{%- set found = namespace(last_question=messages | length - 1, searching=true) -%}
{%- for message in messages[::-1] -%}
    {%- if found.searching and message.role == 'user' -%}
        {%- set found.searching = false -%}
        {%- set found.last_question = messages | length - 1 - loop.index0 -%}
    {%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\n' -}}
    {%- if message.role == 'assistant' -%}
        {%- set reasoning = message.reasoning_content if message.reasoning_content is string else '' -%}
        {%- if loop.index0 > found.last_question -%}
            {{- '<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' -}}
        {%- endif -%}
    {%- endif -%}
    {{- message.content + '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\n' -}}
    {%- if enable_thinking is defined and enable_thinking is false -%}{{- '<think>\n\n</think>\n\n' -}}{%- endif -%}
{%- endif -%}"""
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
