"""From records to samples: what of a record the loss counts, how long it is, which are left out and said so."""

import time
from itertools import cycle
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_peft.config import ConfigurationError
from megatron_peft.data import tokenizers
from megatron_peft.data.files import RecordFiles
from megatron_peft.data.instruction import InstructionDataset
from megatron_peft.data.records import Fit, encode_segments, tokenize_record
from megatron_peft.data.tokenizers import HuggingFaceTokenizer, NullTokenizer, SentencePieceTokenizer
from tests.data.tiny_tokenizers import CHATML, save_tokenizer
from tests.time_limits import seconds

FLAG = "--train-data-path"
ANSWERED = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}


def trained_text(record: dict, tokenizer: HuggingFaceTokenizer) -> str:
    """What the loss counts, special tokens shown."""
    ids, trained = tokenize_record(record, tokenizer)
    return tokenizer._tokenizer.decode([i for i, flag in zip(ids, trained, strict=True) if flag])


def test_loss_is_on_the_completion_or_on_all_of_a_text_and_its_end(hf):
    ids, trained = tokenize_record({"prompt": "the cat:", "completion": " le chat", "id": 7}, hf)
    prompt, completion = hf.encode("the cat:"), hf.encode(" le chat")
    assert ids == [*prompt, *completion, hf.eos_id]
    assert trained == [False] * len(prompt) + [True] * (len(completion) + 1)
    ids, trained = tokenize_record({"text": "the cat"}, hf)
    assert (ids, trained) == ([*hf.encode("the cat"), hf.eos_id], [True] * len(ids))


def test_a_text_above_the_limit_is_named_by_its_record(write_lines, hf, sentencepiece_file, monkeypatch):
    records = RecordFiles([write_lines([{"prompt": "the cat", "completion": " " + "x" * 20}])], FLAG)
    for tokenizer in (hf, SentencePieceTokenizer(str(sentencepiece_file))):
        monkeypatch.setattr(tokenizers, "MAX_TEXT", 28)
        assert len(InstructionDataset(records, Fit(tokenizer, 64))) == 1
        monkeypatch.setattr(tokenizers, "MAX_TEXT", 27)
        with pytest.raises(ConfigurationError, match="data.jsonl, line 1: the text has 28 characters, .* 27: split it"):
            InstructionDataset(records, Fit(tokenizer, 64))


def test_loss_is_on_every_answer_of_a_conversation_up_to_its_end_token(hf):
    said = [("system", "You translate."), ("user", "hello"), ("assistant", "bonjour")]
    said += [("user", "the cat"), ("assistant", "le chat")]
    record = {"messages": [{"role": role, "content": content} for role, content in said]}
    assert trained_text(record, hf) == "bonjour<|im_end|>le chat<|im_end|>"
    ids, _ = tokenize_record(record, hf)
    assert ids == hf.encode(hf.render_chat(record["messages"]))


def tokenizer_of(template: str, folder) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(str(save_tokenizer(folder, chat_template=template)))


def test_an_answer_that_the_template_does_not_end_is_ended(tmp_path):
    template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    assert trained_text(ANSWERED, tokenizer_of(template, tmp_path)) == "[assistant]yo<|im_end|>"


TOOL_CHATML = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['tool_calls'] %}{{ m['tool_calls'] | tojson }}"
    "{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}{{ persona or '' }}"
)
CALLING = {
    "tools": [{"type": "function", "function": {"name": "weather"}}],
    "messages": [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "weather"}]},
        {"role": "tool", "content": "rain"},
        {"role": "assistant", "content": "rain"},
    ],
}


def test_tools_and_calls_go_through_the_template_and_calls_are_learned(tmp_path):
    tokenizer = tokenizer_of(TOOL_CHATML, tmp_path)
    ids, _ = tokenize_record(CALLING, tokenizer)
    text = tokenizer._tokenizer.decode(ids)
    assert text.startswith("<|im_start|>tools\n[") and text.count("weather") == 2 and "None" not in text
    assert trained_text(CALLING, tokenizer) == '[{"name": "weather"}]<|im_end|>rain<|im_end|>'
    for change, told in (
        ({"tools": "weather"}, '"tools" is not a list of objects'),
        ({"persona": "kind"}, "the chat template reads persona, which the record has"),
        ({"messages": [{"role": "assistant", "content": None}]}, '"content" of message 1 is not text but NoneType'),
    ):
        with pytest.raises(ConfigurationError, match=told):
            tokenize_record(CALLING | change, tokenizer)


@pytest.mark.parametrize(
    ("turn", "told"),
    [
        ({"content": "a", "weight": 0}, "message 2 has the weight 0, but the loss covers every assistant turn"),
        ({"content": "a", "function_call": {"name": "f"}}, "message 2 has a function_call, .*one of tool_calls"),
        ({"content": None, "tool_calls": [{"name": "f"}]}, "message 2 has tool_calls, which the .*template does not"),
    ],
)
@pytest.mark.parametrize("comment", ["", "{# tool_calls, function_call #}"])
def test_a_turn_that_sets_what_is_learned_or_that_the_template_does_not_write_is_an_error(
    tmp_path, comment, turn, told
):
    tokenizer = tokenizer_of(comment + CHATML, tmp_path)
    record = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", **turn}]}
    with pytest.raises(ConfigurationError, match=told):
        tokenize_record(record, tokenizer)


def test_fields_that_nothing_reads_are_counted_once_those_of_messages_too(write_lines, hf):
    turn = {"role": "assistant", "content": "a", "weight": 1, "name": "me", "function_call": None}
    named = [{"messages": [{"role": "user", "content": "q", "name": "you"}, turn]}] * 2
    chats = write_lines([ANSWERED | {"tools": [], "id": 1}, ANSWERED | {"id": 2}, *named])
    texts = write_lines([{"text": "the cat", "\x1b[2Jsource": "web"}], "texts.jsonl")
    warnings = InstructionDataset(RecordFiles([chats, texts], FLAG), Fit(hf, 64)).warnings
    left_out = '"id" (2 records), "messages[].name" (2 records), "messages[].weight" (2 records), "tools" (1 records)'
    assert warnings == [f'fields that nothing reads were left out: {left_out}, "\\x1b[2Jsource" (1 records).']


def test_bos_is_put_before_prompts_and_texts_but_the_template_writes_its_own(tmp_path):
    tokenizer = HuggingFaceTokenizer(str(save_tokenizer(tmp_path, adds_bos=True)))
    records = ({"prompt": "the", "completion": "cat"}, {"text": "the"}, ANSWERED)
    starts = [tokenize_record(record, tokenizer).ids[0] for record in records]
    assert starts == [3, 3, 1]


def test_a_sentencepiece_completion_does_not_begin_with_a_space_of_its_own(sentencepiece_file):
    tokenizer = SentencePieceTokenizer(str(sentencepiece_file))
    prompt, completion = encode_segments(tokenizer.encode, ["the cat", "s"])
    assert prompt == tokenizer.encode("the cat")
    assert tokenizer.decode(prompt + completion) == "the cats"
    assert tokenizer.decode(prompt + tokenizer.encode("s")) == "the cat s"  # what the joined text avoids


@settings(max_examples=100)
@example(parts=["hello wo", "rld"])  # a token of the whole text would straddle the boundary
@given(parts=st.lists(st.text(alphabet="ab \nhelothcatsm", max_size=8), min_size=1, max_size=5))
def test_the_ids_before_a_boundary_are_those_of_the_text_before_it(hf, parts):
    pieces = encode_segments(hf.encode, parts)
    assert pieces[0] == hf.encode(parts[0])
    assert hf.decode([i for piece in pieces for i in piece]) == "".join(parts)
    assert [hf.decode(piece) for piece in pieces] == parts


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "a"}, 'lacks the field "completion"'),
        ({"prompt": "a", "completion": 3}, '"completion" is not text but int'),
        ({"messages": [{"role": "user"}]}, 'message 1 lacks the field "content"'),
        ({"messages": [{"role": "user", "content": "a"}]}, 'no message has the role "assistant"'),
        ({"messages": [{"role": "assistant", "content": 40 * "a"}] * 1000}, "1,000 messages with 49,000 characters"),
    ],
)
def test_what_is_wrong_with_a_record_is_an_error(hf, record, message):
    with pytest.raises(ConfigurationError, match=message):
        tokenize_record(record, hf)


def test_a_few_thousand_short_records_take_a_moment(write_lines, hf):
    record = {"prompt": "English: the cat sat on the mat\nFrench:", "completion": " le chat dort"}
    records = RecordFiles([write_lines([record] * 3000)], FLAG)
    begin = time.process_time()
    assert len(InstructionDataset(records, Fit(hf, 64))) == 3000
    assert time.process_time() - begin < seconds(2)  # CPU seconds; 0.5 measured


RECORDS = [
    {"prompt": "1 2", "completion": "3"},  # 3 positions with the end token
    {"prompt": "1 2", "completion": "3 4 5 6"},  # 6: longer than 4
    {"prompt": "1 2 3 4 5", "completion": "6"},  # 6, and 4 hold the prompt alone
    {"prompt": "", "completion": ""},  # the end token alone: nothing to predict
    {"prompt": "1 2 3", "completion": "4"},  # 4
]


def surveyed(write_lines, overlong: str, records=RECORDS):
    lines = RecordFiles([write_lines(records)], FLAG)
    return InstructionDataset(lines, Fit(NullTokenizer(99), 4, overlong))


def test_truncation_cuts_the_end_and_skips_prompts_that_fill_the_sequence(write_lines):
    dataset = surveyed(write_lines, "truncate")
    assert dataset.lengths.tolist() == [len(dataset[i]) for i in range(3)] == [3, 4, 4]
    assert dataset[1].labels.tolist() == [2, 3, 4, 5]
    assert dataset[1].loss_mask.tolist() == [0, 1, 1, 1]
    assert [int(dataset[i].tokens[-1]) for i in range(3)] == [3, 4, 4]
    cut, filled, empty = dataset.warnings
    assert cut.startswith("1 of 5 samples are longer than --seq-length 4 and were cut at their end (first:")
    assert cut.endswith("data.jsonl, line 2).")
    assert "1 of 5" in filled and "their prompt alone fills it" in filled and "line 3" in filled
    assert "1 of 5" in empty and "have no token to learn from" in empty and "line 4" in empty


def test_skip_leaves_all_overlong_samples_out_and_a_bad_record_ends_the_run_before_it_begins(write_lines):
    dataset = surveyed(write_lines, "skip")
    assert dataset.lengths.tolist() == [3, 4] and len(dataset.warnings) == 2
    assert "2 of 5 samples are longer than --seq-length 4 and were skipped" in dataset.warnings[0]
    assert surveyed(write_lines, "error", [RECORDS[0], RECORDS[4]]).warnings == []
    for records, overlong, told in (
        (RECORDS, "error", "line 2: the sample takes 6 tokens, above --seq-length 4: raise it"),
        ([RECORDS[0], RECORDS[3]], "error", "line 2: the sample has no token to learn from"),
        ([RECORDS[2]], "truncate", "all 1 samples were skipped .*line 1.*their prompt alone fills it"),
    ):
        with pytest.raises(ConfigurationError, match=told):
            surveyed(write_lines, overlong, records)


# Chat templates in the manner of Mistral's, Qwen2's and Qwen3's: what is rendered, and what the loss counts.

TEMPLATES = Path(__file__).parent / "templates"
MISTRAL, QWEN2, QWEN3 = ((TEMPLATES / f"{name}.jinja").read_text() for name in ("mistral", "qwen2", "qwen3"))
SYSTEM = {"role": "system", "content": "the cat"}
ASKED = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "bonjour"}]
AGAIN = [{"role": "user", "content": "world"}, {"role": "assistant", "content": "le monde"}]
REASONED = [ASKED[0], {**ASKED[1], "reasoning_content": "French"}]
END = "<|im_end|>"
QUESTION = f"<|im_start|>user\nhello{END}\n<|im_start|>assistant\n"
HELPING = f"<|im_start|>system\nYou help.{END}\n{QUESTION}"
OF_THE_CAT = f"<|im_start|>system\nthe cat{END}\n{QUESTION}"
# Texts that the loss does not count and texts that it does, in turns.
CASES = [
    (MISTRAL, ASKED, ["<s>[INST] hello[/INST]", f" bonjour{END}"]),
    (MISTRAL, [SYSTEM, *ASKED], ["<s>[INST] the cat\n\nhello[/INST]", f" bonjour{END}"]),
    (MISTRAL, ASKED + AGAIN, ["<s>[INST] hello[/INST]", f" bonjour{END}", "[INST] world[/INST]", f" le monde{END}"]),
    (QWEN2, [SYSTEM, *ASKED], [OF_THE_CAT, f"bonjour{END}", "\n"]),
    (
        QWEN2,
        ASKED + AGAIN,
        [HELPING, f"bonjour{END}", "\n" + QUESTION.replace("hello", "world"), f"le monde{END}", "\n"],
    ),
    (QWEN3, ASKED, [QUESTION, f"<think>\n\n</think>\n\nbonjour{END}", "\n"]),
    (QWEN3, [SYSTEM, *REASONED], [OF_THE_CAT, f"<think>\nFrench\n</think>\n\nbonjour{END}", "\n"]),
]


@pytest.mark.parametrize(("template", "messages", "expected"), CASES)
def test_the_loss_counts_the_answers_with_their_end(template, messages, expected, tmp_path):
    tokenizer = tokenizer_of(template, tmp_path)
    ids, trained = tokenize_record({"messages": messages}, tokenizer)
    assert ids == tokenizer.encode("".join(expected)) == tokenizer.encode(tokenizer.render_chat(messages))
    counted = [flag for text, flag in zip(expected, cycle([False, True])) for _ in tokenizer.encode(text)]
    assert trained == counted


REWRITTEN = "split the conversation into records of one answer each"


@pytest.mark.parametrize(
    ("template", "messages", "told"),
    [
        (QWEN3, ASKED + AGAIN, REWRITTEN),
        (MISTRAL, [SYSTEM, *ASKED, *AGAIN], REWRITTEN),
        (MISTRAL, [ASKED[0], *ASKED], "refuses the messages: user and assistant must take turns"),
    ],
)
def test_a_conversation_that_the_template_would_rewrite_or_refuses_is_told(template, messages, told, tmp_path):
    with pytest.raises(ConfigurationError, match=told):
        tokenize_record({"messages": messages}, tokenizer_of(template, tmp_path))
