from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_peft.config import ConfigurationError
from megatron_peft.data.instruction import encode_parts, tokenize_record
from megatron_peft.data.tokenizers import HuggingFaceTokenizer, NullTokenizer, SentencePieceTokenizer
from tests.data.tiny_tokenizers import save_tokenizer


def trained_text(record: dict, tokenizer: HuggingFaceTokenizer) -> str:
    """What the loss counts, special tokens shown."""
    ids, trained = tokenize_record(record, tokenizer)
    return tokenizer._tokenizer.decode([i for i, flag in zip(ids, trained, strict=True) if flag])


def test_loss_is_on_the_completion_and_its_end(hf):
    ids, trained = tokenize_record({"prompt": "the cat:", "completion": " le chat", "id": 7}, hf)
    prompt, completion = hf.encode("the cat:"), hf.encode(" le chat")
    assert ids == [*prompt, *completion, hf.eos_id]
    assert trained == [False] * len(prompt) + [True] * (len(completion) + 1)


def test_loss_is_on_all_of_a_text(hf):
    ids, trained = tokenize_record({"text": "the cat"}, hf)
    assert (ids, trained) == ([*hf.encode("the cat"), hf.eos_id], [True] * len(ids))


def test_loss_is_on_every_answer_of_a_conversation_up_to_its_end_token(hf):
    record = {
        "messages": [
            {"role": "system", "content": "You translate."},
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": "bonjour"},
            {"role": "user", "content": "the cat"},
            {"role": "assistant", "content": "le chat"},
        ]
    }
    assert trained_text(record, hf) == "bonjour<|im_end|>le chat<|im_end|>"
    ids, _ = tokenize_record(record, hf)
    assert ids == hf.encode(hf.render_chat(record["messages"]))


def test_an_answer_that_the_template_does_not_end_is_ended(tmp_path):
    template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    tokenizer = HuggingFaceTokenizer(str(save_tokenizer(tmp_path, chat_template=template)))
    answer = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    assert trained_text({"messages": answer}, tokenizer) == "[assistant]yo<|im_end|>"


def test_bos_is_put_before_prompts_and_texts_but_the_template_writes_its_own(tmp_path):
    tokenizer = HuggingFaceTokenizer(str(save_tokenizer(tmp_path, adds_bos=True)))
    answer = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}
    starts = [
        tokenize_record(record, tokenizer).ids[0]
        for record in ({"prompt": "the", "completion": "cat"}, {"text": "the"}, answer)
    ]
    assert starts == [3, 3, 1]


def test_a_token_never_straddles_the_end_of_the_prompt(hf):
    whole = hf.encode("hello world")
    assert len(hf.encode("hello wo")) + len(hf.encode("rld")) > len(whole)  # joined, one token would
    assert encode_parts(hf.encode, ["hello wo", "rld"]) == [hf.encode("hello wo"), hf.encode("rld")]


def test_a_sentencepiece_completion_does_not_begin_with_a_space_of_its_own(sentencepiece_file):
    tokenizer = SentencePieceTokenizer(str(sentencepiece_file))
    prompt, completion = encode_parts(tokenizer.encode, ["the cat", "s"])
    assert prompt == tokenizer.encode("the cat")
    assert tokenizer.decode(prompt + completion) == "the cats"
    assert tokenizer.decode(prompt + tokenizer.encode("s")) == "the cat s"  # what the joined text avoids


@settings(max_examples=100)
@given(parts=st.lists(st.text(alphabet="ab \nhelothcatsm", max_size=8), min_size=1, max_size=5))
def test_the_ids_before_a_boundary_are_those_of_the_text_before_it(hf, parts):
    pieces = encode_parts(hf.encode, parts)
    assert pieces[0] == hf.encode(parts[0])
    assert hf.decode([i for piece in pieces for i in piece]) == "".join(parts)
    assert [hf.decode(piece) for piece in pieces] == parts


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"question": "?", "answer": "!"}, 'the fields question, answer, but neither "prompt" and "completion", nor'),
        ({}, "the fields \\(none\\)"),
        ({"prompt": "a"}, 'lacks the field "completion"'),
        ({"completion": "a"}, 'lacks the field "prompt"'),
        ({"prompt": "a", "completion": 3}, '"completion" is not text but int'),
        ({"prompt": ["a"], "completion": "b"}, '"prompt" is not text but list'),
        ({"text": None}, '"text" is not text but NoneType'),
        ({"messages": "hi"}, '"messages" is not a list'),
        ({"messages": []}, '"messages" is not a list .* or it is empty'),
        ({"messages": ["hi"]}, "message 1 is not an object but str"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant"}]},
            'message 2 lacks the field "content"',
        ),
        ({"messages": [{"role": "user", "content": {}}]}, '"content" of message 1 is not text but dict'),
        ({"messages": [{"role": "user", "content": "a"}]}, 'no message has the role "assistant"'),
    ],
)
def test_what_is_wrong_with_a_record_is_told(hf, record, message):
    with pytest.raises(ConfigurationError, match=message):
        tokenize_record(record, hf)


def test_messages_without_a_template_are_refused():
    with pytest.raises(ConfigurationError, match="no chat template"):
        tokenize_record({"messages": [{"role": "assistant", "content": "1"}]}, NullTokenizer(9))
