from __future__ import annotations

import pytest

from megatron_peft.config import ConfigurationError
from megatron_peft.data.chat import Part, chat_parts


def turns(*roles: str) -> list[dict]:
    return [{"role": role, "content": f"{role}{i}"} for i, role in enumerate(roles)]


def chatml(messages, add_generation_prompt=False) -> str:
    text = "".join(f"<{m['role']}>{m['content']}</>" for m in messages)
    return text + ("<assistant>" if add_generation_prompt else "")


def test_what_the_assistant_says_is_trained_and_its_header_is_not():
    assert chat_parts(chatml, turns("system", "user", "assistant", "user", "assistant", "user")) == [
        Part("<system>system0</><user>user1</><assistant>", False),
        Part("assistant2</>", True),
        Part("<user>user3</><assistant>", False),
        Part("assistant4</>", True),
        Part("<user>user5</>", False),
    ]


def test_a_generation_prompt_that_a_finished_turn_lacks_does_not_hurt():
    def thinking(messages, add_generation_prompt=False):
        return chatml(messages, add_generation_prompt) + ("<think>" if add_generation_prompt else "")

    assert chat_parts(thinking, turns("user", "assistant"))[:2] == [
        Part("<user>user0</><assistant>", False),
        Part("assistant1</>", True),
    ]


def test_an_assistant_who_begins_is_trained_from_the_start():
    assert chat_parts(chatml, turns("assistant"))[:2] == [Part("", False), Part("<assistant>assistant0</>", True)]


def test_a_template_that_rewrites_the_past_is_refused():
    def rewriting(messages, add_generation_prompt=False):
        return f"{len(messages)} turns: " + chatml(messages, add_generation_prompt)

    with pytest.raises(ConfigurationError, match="cannot be told apart: split the conversation"):
        chat_parts(rewriting, turns("user", "assistant"))


def test_a_conversation_without_an_answer_is_refused():
    with pytest.raises(ConfigurationError, match='no message has the role "assistant"'):
        chat_parts(chatml, turns("user", "user"))
