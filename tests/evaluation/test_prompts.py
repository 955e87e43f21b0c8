"""Prompts of a file, and what is wrong with them by line."""

from __future__ import annotations

import pytest

from megatron_peft.config import ConfigurationError
from megatron_peft.evaluation.prompts import encode_prompts, read_prompts


class Letters:
    prefix_id = 1

    def encode(self, text):
        return list(map(ord, text))

    def encode_prompt(self, text):
        return [0, *map(ord, text)] if text else []

    def render_chat(self, messages, add_generation_prompt=False):
        return "".join(f"<{message['content']}>" for message in messages) + "?" * add_generation_prompt


def _file(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    return path


def test_a_text_holds_a_prompt_a_line(tmp_path):
    assert read_prompts(_file(tmp_path, "a.txt", "one\n\n{two\n")) == [{"prompt": "one"}, {"prompt": "{two"}]


def test_json_lines_keep_their_other_fields(tmp_path):
    assert read_prompts(_file(tmp_path, "a.jsonl", '{"prompt": "x", "id": 3}\n')) == [{"prompt": "x", "id": 3}]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"prompt": "x"}\nx\n', r"a\.jsonl:2: not JSON"),
        ("a.jsonl", '{"text": "x"}\n', r'a\.jsonl:1: neither {"prompt": "..."} nor'),
        ("a.jsonl", "[1]\n", r"a\.jsonl:1: neither"),
        ("a.jsonl", '{"messages": "hi"}', r"a\.jsonl:1: neither"),
        ("a.txt", "\n", "holds no prompt"),
    ],
)
def test_wrong_lines_are_named(tmp_path, name, text, message):
    with pytest.raises(ConfigurationError, match=message):
        read_prompts(_file(tmp_path, name, text))


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(ConfigurationError, match="--prompt-file .*none.txt cannot be read"):
        read_prompts(tmp_path / "none.txt")


def test_prompts_and_conversations_become_ids():
    records = [{"prompt": "a"}, {"prompt": ""}, {"messages": [{"role": "user", "content": "b"}]}]
    tokenizer = Letters()
    assert encode_prompts(records, tokenizer, False, 9) == [[0, 97], [1], [60, 98, 62, 63]]  # type: ignore[arg-type]
    assert encode_prompts(records[:1], tokenizer, True, 9) == [[60, 97, 62, 63]]  # type: ignore[arg-type]


def test_a_prompt_leaves_room_for_a_token():
    with pytest.raises(ConfigurationError, match="prompt 1 has 4 tokens, but the model has 4 positions"):
        encode_prompts([{"prompt": "abc"}], Letters(), False, 4)  # type: ignore[arg-type]
