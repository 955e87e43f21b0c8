"""Formats of records: found by the fields of a file's first record, or named by flags; what each becomes."""

from pathlib import Path

import pytest

from megatron_peft.config import ConfigurationError
from megatron_peft.data.files import RecordFiles
from megatron_peft.data.instruction import InstructionDataset
from megatron_peft.data.records import ColumnNames, Fit, format_of
from megatron_peft.data.tokenizers import HuggingFaceTokenizer
from megatron_peft.tasks.prepare import TaskTemplate
from tests.data.tiny_tokenizers import CHATML, save_tokenizer

QUESTION = {"role": "user", "content": "the cat?"}
ANSWER = {"role": "assistant", "content": "sat"}
ALPACA = {"instruction": "name it", "input": "the cat", "output": "sat"}


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
        *[({"prompt": "a", "completion": "b", "chosen": "b", "rejected": "c"},) * 2],  # what can be read is read
        (
            {"conversations": [{"from": "human", "value": "the cat?"}, {"from": "gpt", "value": "sat"}], "id": 7},
            {"messages": [QUESTION, ANSWER], "id": 7},
        ),
        (
            {"conversations": [{"from": "tool", "value": "3"}], "system": "be kind", "tools": '[{"name": "f"}]'},
            {
                "messages": [{"role": "system", "content": "be kind"}, {"role": "tool", "content": "3"}],
                "tools": [{"name": "f"}],
            },
        ),
        ({"conversations": [QUESTION, ANSWER]}, {"messages": [QUESTION, ANSWER]}),
        (
            {"messages": [{"role": "user", "content": [part("the "), part("cat?")]}, ANSWER]},
            {"messages": [QUESTION, ANSWER]},
        ),
        (
            ALPACA | {"text": "all of it, as the file of Alpaca's authors has it"},
            {"messages": [{"role": "user", "content": "name it\n\nthe cat"}, ANSWER]}
            | {"text": "all of it, as the file of Alpaca's authors has it"},
        ),
        (
            ALPACA | {"input": "", "system": "be kind", "history": [["the cat?", "sat"]]},
            {
                "messages": [
                    {"role": "system", "content": "be kind"},
                    QUESTION,
                    ANSWER,
                    {"role": "user", "content": "name it"},
                    ANSWER,
                ]
            },
        ),
    ],
)
def test_the_fields_of_a_record_are_its_format(record, expected):
    assert native(record) == expected


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
    record = {"instruction": "name it", "output": "sat", **given}
    found = native(record, chat=False)
    asked = {"instruction": "name it", "input": given.get("input", "")}
    assert found == {"prompt": TaskTemplate("instructions").prompt(asked), "completion": "sat"}
    assert found["prompt"].startswith("Below is an instruction") and ("### Input" in found["prompt"]) is (
        bool(given.get("input"))
    )


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
        (ColumnNames(), {"instruction": "1", "text": 2, "prompt": ""}, None),
        (ColumnNames(), {"instruction": "1"}, 'lacks the field "output" .*format of its first one, here Alpaca'),
        (ColumnNames(), {"conversations": "x"}, '"conversations" is not a list'),
        (
            ColumnNames(),
            {"conversations": [{"from": "function_call", "value": "f"}]},
            "message 1 is from 'function_call'",
        ),
        (ColumnNames(), {"conversations": [{"from": "gpt"}]}, 'message 1 lacks the field "value"'),
        (ColumnNames(), ALPACA | {"history": ["a", "b"]}, '"history" is not a list of pairs'),
        (ColumnNames(messages="m"), {"m": [], "x": 1}, '"m" is not a list'),
    ],
)
def test_what_is_not_of_a_format_says_the_fields_and_the_flags(columns, record, told):
    if told is None:
        assert native(record, columns)["text"] == 2  # a text is whole, the others are not
        return
    with pytest.raises(ConfigurationError, match=told):
        native(record, columns)


def test_alpacas_prompt_has_no_place_for_a_system_message():
    with pytest.raises(ConfigurationError, match='has "system", which Alpaca.*give --chat-template'):
        native(ALPACA | {"system": "be kind"}, chat=False)


def test_all_records_of_a_file_have_the_format_of_its_first(write_lines, hf):
    mixed = write_lines([{"text": "the cat"}, {"messages": [QUESTION, ANSWER]}])
    with pytest.raises(ConfigurationError, match='data.jsonl, line 2: lacks the field "text" .*here "text"'):
        InstructionDataset(RecordFiles([mixed], "--d"), Fit(hf, 64))
    unknown = write_lines([{"q": "1"}], "unknown.jsonl")
    with pytest.raises(ConfigurationError, match="unknown.jsonl, line 1: the record has the fields q, but"):
        InstructionDataset(RecordFiles([unknown], "--d"), Fit(hf, 64))


def test_the_alpaca_file_of_the_examples_is_read_as_it_is(hf):
    path = Path(__file__).parents[2] / "examples" / "data" / "instructions" / "code.json"
    records = RecordFiles([str(path)], "--train-data-path")
    dataset = InstructionDataset(records, Fit(hf, 1024))
    first = dataset[0]
    answer = hf.decode(first.labels[first.loss_mask > 0])
    assert len(dataset) == 12 and answer == records[0]["output"] and dataset.warnings == []


def test_files_of_one_run_may_have_different_formats(write_lines, hf):
    files = [write_lines([{"text": "the cat"}]), write_lines([ALPACA] * 2, "alpaca.jsonl")]
    dataset = InstructionDataset(RecordFiles(files, "--d"), Fit(hf, 64))
    assert dataset.lengths_of_files() == [1, 2] and hf.decode(dataset[2].labels[dataset[2].loss_mask > 0]) == "sat"


@pytest.mark.parametrize("as_file", [True, False])
def test_a_chat_template_of_the_users_own_takes_the_place_of_the_tokenizers(tmp_path, as_file):
    folder, own = str(save_tokenizer(tmp_path / "t", chat_template=None)), CHATML.replace("\n", ": ")
    path = tmp_path / "own.jinja"
    path.write_text(own)
    tokenizer = HuggingFaceTokenizer(folder, str(path) if as_file else own)
    assert tokenizer.render_chat([QUESTION]) == "<|im_start|>user: the cat?<|im_end|>: "
    assert tokenizer.chat_template == own


@pytest.mark.parametrize(
    ("template", "told"),
    [("nowhere.jinja", "--chat-template nowhere.jinja"), ("{% for", "--chat-template .*cannot be read")],
)
def test_a_chat_template_that_is_no_file_and_no_template_is_an_error(tokenizer_folder, template, told):
    with pytest.raises(ConfigurationError, match=told):
        HuggingFaceTokenizer(str(tokenizer_folder), template)
