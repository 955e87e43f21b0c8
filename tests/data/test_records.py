"""Formats of records, found by their first fields or named by flags; what of a record is learned, as tokens."""

from itertools import cycle
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_peft.config import ConfigurationError
from megatron_peft.data.files import RecordFiles
from megatron_peft.data.instruction import InstructionDataset
from megatron_peft.data.records import ColumnNames, Fit, encode_segments, format_of, tokenize_record
from megatron_peft.data.tokenizers import HuggingFaceTokenizer, SentencePieceTokenizer
from megatron_peft.tasks.prepare import TaskTemplate
from tests.data.tiny_tokenizers import CHATML, save_tokenizer

QUESTION = {"role": "user", "content": "the cat?"}
ANSWER = {"role": "assistant", "content": "sat"}
ALPACA = {"instruction": "name it", "input": "the cat", "output": "sat"}
KIND, ASKED = {"role": "system", "content": "be kind"}, {"role": "user", "content": "name it"}
WHOLE = {"text": "all of it, as the file of Alpaca's authors has it"}


def part(text: str) -> dict:
    return {"type": "text", "text": text}


def native(record: dict, columns: ColumnNames = ColumnNames(), chat: bool = True) -> dict:  # noqa: B008 - frozen
    return format_of(tuple(record), columns, chat).native(record)


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"messages": [QUESTION, ANSWER]}, {"messages": [QUESTION, ANSWER]}),
        ({"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "b"}),
        ({"text": "a"}, {"text": "a"}),
        ({"instruction": "1", "text": 2, "prompt": ""},) * 2,  # a text is whole, the others are not
        *[({"prompt": "a", "completion": "b", "chosen": "b", "rejected": "c"},) * 2],  # what can be read is read
        (
            {"conversations": [{"from": "human", "value": "the cat?"}, {"from": "gpt", "value": "sat"}], "id": 7},
            {"messages": [QUESTION, ANSWER], "id": 7},
        ),
        (
            {"conversations": [{"from": "tool", "value": "3"}], "system": "be kind", "tools": '\n[{"name": "f"}]'},
            {"messages": [KIND, {"role": "tool", "content": "3"}], "tools": [{"name": "f"}]},
        ),
        pytest.param(
            {"conversations": [{"from": "observation", "value": "3", "name": "f"}], "system": ""},
            {"messages": [{"role": "tool", "content": "3", "name": "f"}]},
            id="a tool's turn with another field",
        ),
        pytest.param(
            {"messages": [QUESTION, ANSWER], "system": "be kind"},
            {"messages": [KIND, QUESTION, ANSWER]},
            id="system beside messages",
        ),
        pytest.param(
            {"messages": [KIND, QUESTION, ANSWER], "system": "be brief"},
            {"messages": [KIND, QUESTION, ANSWER]},
            id="system in both places",
        ),
        ({"conversations": [QUESTION, ANSWER]}, {"messages": [QUESTION, ANSWER]}),
        pytest.param(
            {"messages": [KIND, QUESTION | {"role": "human"}, ANSWER | {"role": "gpt"}]},
            {"messages": [KIND, QUESTION, ANSWER]},
            id="roles of ShareGPT",
        ),
        ({"messages": [QUESTION | {"role": "observation"}, ANSWER]},) * 2,  # a chat template's own name
        (
            {"messages": [{"role": "user", "content": [part("the "), part("cat?")]}, ANSWER]},
            {"messages": [QUESTION, ANSWER]},
        ),
        (ALPACA | WHOLE, {"messages": [{"role": "user", "content": "name it\n\nthe cat"}, ANSWER]} | WHOLE),
        (
            ALPACA | {"input": "", "system": "be kind", "history": [["the cat?", "sat"], ["name it", "Tom"]]},
            {"messages": [KIND, QUESTION, ANSWER, ASKED, ANSWER | {"content": "Tom"}, ASKED, ANSWER]},
        ),
        pytest.param(ALPACA | {"input": "", "system": ""}, {"messages": [ASKED, ANSWER]}, id="an empty system text"),
    ],
)
def test_the_fields_of_a_record_are_its_format(record, expected):
    assert native(record) == expected


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        pytest.param("text output instruction completion prompt messages", "messages", id="messages"),
        pytest.param("text output instruction conversations completion prompt", "prompt", id="prompt"),
        pytest.param("text output instruction conversations", "messages", id="ShareGPT"),
        pytest.param("text output instruction", "prompt", id="Alpaca"),
    ],
)
def test_the_first_format_whose_fields_are_there_applies(fields, kind):
    assert format_of(tuple(fields.split()), ColumnNames(), False).kind == kind


@pytest.mark.parametrize(
    ("other", "kind"),
    [({"type": "image_url", "image_url": {"url": "a.png"}}, "image_url"), ("word", "str"), ({"type": "text"}, "text")],
)
def test_a_part_of_a_message_that_is_no_text_is_named(other, kind):
    record = {"messages": [QUESTION, {"role": "user", "content": [part("the cat?"), other]}]}
    with pytest.raises(ConfigurationError, match=f'"content" of message 2 has a part of type {kind}: .*Leave the'):
        native(record)


@pytest.mark.parametrize("given", [{}, {"input": "", "system": ""}, {"input": "the cat"}])
def test_alpaca_without_a_chat_template_has_the_prompt_of_its_authors(given):
    found = native({"instruction": "name it", "output": "sat", **given}, chat=False)
    asked = {"instruction": "name it", "input": given.get("input", "")}
    assert found == {"prompt": TaskTemplate("instructions").prompt(asked), "completion": "sat"}
    assert found["prompt"].startswith("Below is") and ("### Input" in found["prompt"]) is bool(given.get("input"))
    with pytest.raises(ConfigurationError, match='has "system", which Alpaca.*give --chat-template'):
        native(ALPACA | {"system": "be kind"}, chat=False)


@pytest.mark.parametrize(
    ("columns", "record", "expected"),
    [
        (ColumnNames("q", "a"), {"q": "1", "a": "2", "text": "3"}, {"prompt": "1", "completion": "2", "text": "3"}),
        (ColumnNames(response="a"), {"prompt": "1", "a": "2", "completion": "3"}, {"prompt": "1", "completion": "2"}),
        (ColumnNames(text="body"), {"body": "1", "messages": "x"}, {"text": "1", "messages": "x"}),
        (ColumnNames(messages="chat"), {"chat": [{"from": "gpt", "value": "sat"}]}, {"messages": [ANSWER]}),
        (ColumnNames("input", "output"), ALPACA, {"prompt": "the cat", "completion": "sat", "instruction": "name it"}),
    ],
)
def test_columns_that_flags_name_are_taken_whatever_else_is_there(columns, record, expected):
    assert native(record, columns) == expected


@pytest.mark.parametrize(
    ("columns", "record", "told"),
    [
        (
            ColumnNames(),
            {"prompt": "1", "chosen": "2", "rejected": "3"},
            r"is a preference pair .*no preference loss \(DPO\).*--response-column chosen, or --messages-column chosen",
        ),
        (ColumnNames(), {"q": "1", "a": "2"}, "the fields q, a, but neither .*--prompt-column q --response-column a,"),
        (ColumnNames(), {"body": "1"}, "the fields body, but .* --messages-column NAME or --text-column NAME"),
        (ColumnNames("q", "a"), {"q": "1", "b": "2"}, '--response-column: there is no field "a"; the record has q, b'),
        (ColumnNames("q"), {"q": "1", "b": "2"}, 'the record: there is no field "completion"'),
        (ColumnNames(text="t"), {"q": "1"}, '--text-column: there is no field "t"; the record has q'),
        (ColumnNames(), {"instruction": "1"}, 'lacks the field "output" .*format of its first one, here Alpaca'),
        (ColumnNames(), {"conversations": "x"}, '"conversations" is not a list'),
        (ColumnNames(), {"conversations": [{"from": "function_call", "value": "f"}]}, "message 1 is from 'function_c"),
        (ColumnNames(), {"conversations": [{"from": "gpt"}]}, 'message 1 lacks the field "value"'),
        (ColumnNames(), ALPACA | {"history": ["a", "b"]}, '"history" is not a list of pairs'),
        (ColumnNames(messages="m"), {"m": [], "x": 1}, '"m" is not a list'),
    ],
)
def test_what_is_not_of_a_format_says_the_fields_and_the_flags(columns, record, told):
    with pytest.raises(ConfigurationError, match=told):
        native(record, columns)


def test_all_records_of_a_file_have_the_format_of_its_first_and_files_of_a_run_may_differ(write_lines, hf):
    mixed = write_lines([{"text": "the cat"}, {"messages": [QUESTION, ANSWER]}], "mixed.jsonl")
    with pytest.raises(ConfigurationError, match='mixed.jsonl, line 2: lacks the field "text" .*here "text"'):
        InstructionDataset(RecordFiles([mixed], "--d"), Fit(hf, 64))
    unknown = write_lines([{"q": "1"}], "unknown.jsonl")
    with pytest.raises(ConfigurationError, match="unknown.jsonl, line 1: the record has the fields q, but"):
        InstructionDataset(RecordFiles([unknown], "--d"), Fit(hf, 64))
    files = [write_lines([{"text": "the cat"}]), write_lines([ALPACA] * 2, "alpaca.jsonl")]
    dataset = InstructionDataset(RecordFiles(files, "--d"), Fit(hf, 64))
    assert dataset.lengths_of_files() == [1, 2] and hf.decode(dataset[2].labels[dataset[2].loss_mask > 0]) == "sat"


def test_the_alpaca_file_of_the_examples_is_read_as_it_is(hf):
    path = Path(__file__).parents[2] / "examples" / "data" / "instructions" / "code.json"
    records = RecordFiles([str(path)], "--train-data-path")
    dataset = InstructionDataset(records, Fit(hf, 1024))
    answer = hf.decode(dataset[0].labels[dataset[0].loss_mask > 0])
    assert len(dataset) == 12 and answer == records[0]["output"] and dataset.warnings == []


def test_a_chat_template_of_the_users_own_takes_the_place_of_the_tokenizers(tmp_path):
    folder, own = str(save_tokenizer(tmp_path / "t", chat_template=None)), CHATML.replace("\n", ": ")
    (tmp_path / "own.jinja").write_text(own)
    for template in (own, str(tmp_path / "own.jinja")):
        tokenizer = HuggingFaceTokenizer(folder, template)
        assert tokenizer.render_chat([QUESTION]) == "<|im_start|>user: the cat?<|im_end|>: "
        assert tokenizer.chat_template == own
    for template, told in (("nowhere.jinja", "nowhere.jinja"), ("{% for", ".*cannot be read")):
        with pytest.raises(ConfigurationError, match=f"--chat-template {told}"):
            HuggingFaceTokenizer(folder, template)


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
    tokenizer = tokenizer_of(template, tmp_path)
    assert trained_text(ANSWERED, tokenizer) == "[assistant]yo<|im_end|>"
    twice = {"messages": ANSWERED["messages"] * 2}
    assert trained_text(twice, tokenizer) == "[assistant]yo[assistant]yo<|im_end|>", "the last answer alone"


def test_an_answer_ends_at_the_last_end_token_of_its_turn(hf):
    record = {"messages": [ANSWERED["messages"][0], {"role": "assistant", "content": "yo<|im_end|>ho"}]}
    assert trained_text(record, hf) == "yo<|im_end|>ho<|im_end|>"


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
    named_by_template = Fit(HuggingFaceTokenizer(hf.folder, "{# name #}" + CHATML.replace("m['role']", "m.name")), 64)
    assert "name" not in str(InstructionDataset(RecordFiles([write_lines(named)], FLAG), named_by_template).warnings)
    left_out = '"id" (2 records), "messages[].name" (2 records), "messages[].weight" (2 records), "tools" (1 records)'
    assert warnings == [f'fields that nothing reads were left out: {left_out}, "\\x1b[2Jsource" (1 records).']


@pytest.mark.parametrize(
    ("written", "told"),
    [
        (
            "split('</think>')[-1]",
            ['fields that nothing reads were left out: "part of messages[].content" (1 records).'],
        ),
        ("replace('\n', '')", []),
    ],
    ids=["without reasoning", "without line breaks"],
)
def test_answers_of_which_the_template_writes_a_part_are_counted(tmp_path, write_lines, written, told):
    tokenizer = tokenizer_of(CHATML.replace("m['content']", f"m['content'].{written}"), tmp_path)
    answers = [{"role": "assistant", "content": content} for content in ("<think>\na\n</think>\n\nb", "b", "\n")]
    chats = [{"messages": [{"role": "user", "content": "q"}, answer]} for answer in answers]
    chats[0]["messages"] += chats[1]["messages"]  # one of its answers is written as it is
    assert InstructionDataset(RecordFiles([write_lines(chats)], FLAG), Fit(tokenizer, 64)).warnings == told


def test_bos_is_put_before_prompts_and_texts_but_the_template_writes_its_own(tmp_path):
    tokenizer = HuggingFaceTokenizer(str(save_tokenizer(tmp_path, adds_bos=True)))
    records = ({"prompt": "the", "completion": "cat"}, {"text": "the"}, ANSWERED)
    assert [tokenize_record(record, tokenizer).ids[0] for record in records] == [3, 3, 1]


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
        (
            {"messages": [{"role": role, "content": "a"} for role in ("user", "bot", "user")]},
            'no message has the role "assistant", .*roles are "user", "bot".: give',
        ),
        ({"messages": [{"role": ["user"], "content": "a"}]}, '"role" of message 1 is not text but list'),
    ],
)
def test_what_is_wrong_with_a_record_is_an_error(hf, record, message):
    with pytest.raises(ConfigurationError, match=message):
        tokenize_record(record, hf)


# Chat templates in the manner of Mistral's, Qwen2's and Qwen3's: what is rendered, and what the loss counts.

TEMPLATES = Path(__file__).parent / "templates"
MISTRAL, QWEN2, QWEN3 = ((TEMPLATES / f"{name}.jinja").read_text() for name in ("mistral", "qwen2", "qwen3"))
SYSTEM = {"role": "system", "content": "the cat"}
ASKED = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "bonjour"}]
AGAIN = [{"role": "user", "content": "world"}, {"role": "assistant", "content": "le monde"}]
REASONED = [ASKED[0], {**ASKED[1], "reasoning_content": "French"}]
END = "<|im_end|>"
ASKING = f"<|im_start|>user\nhello{END}\n<|im_start|>assistant\n"
HELPING = f"<|im_start|>system\nYou help.{END}\n{ASKING}"
OF_THE_CAT = f"<|im_start|>system\nthe cat{END}\n{ASKING}"
# Texts that the loss does not count and texts that it does, in turns.
CASES = [
    (MISTRAL, ASKED, ["<s>[INST] hello[/INST]", f" bonjour{END}"]),
    (MISTRAL, [SYSTEM, *ASKED], ["<s>[INST] the cat\n\nhello[/INST]", f" bonjour{END}"]),
    (MISTRAL, ASKED + AGAIN, ["<s>[INST] hello[/INST]", f" bonjour{END}", "[INST] world[/INST]", f" le monde{END}"]),
    (QWEN2, [SYSTEM, *ASKED], [OF_THE_CAT, f"bonjour{END}", "\n"]),
    (QWEN2, ASKED + AGAIN, [HELPING, f"bonjour{END}", "\n" + ASKING.replace("hello", "world"), f"le monde{END}", "\n"]),
    (QWEN3, ASKED, [ASKING, f"<think>\n\n</think>\n\nbonjour{END}", "\n"]),
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
