"""Tokenizers are transformers' and sentencepiece's own; a chat template's parts tell what the assistant said."""

import json
import subprocess
import sys
from functools import partial
from inspect import signature
from pathlib import Path

import pytest
import sentencepiece
from megatron.core.tokenizers.text.libraries.null_tokenizer import NullTokenizer as MegatronNullTokenizer
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_peft.config import ConfigurationError, DataConfig
from megatron_peft.data.tokenizers import (
    ChatSegment,
    HuggingFaceTokenizer,
    NullTokenizer,
    build_tokenizer,
    require_vocabulary_fits,
    split_chat,
    template_inputs,
)
from tests.data.tiny_tokenizers import save_tokenizer

MESSAGES = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "bonjour"}]


def config(**settings) -> DataConfig:
    return DataConfig(train_data_path=("a.jsonl",), **settings)


def test_the_default_tokenizer_is_that_of_the_base_model(tokenizer_folder):
    theirs = AutoTokenizer.from_pretrained(tokenizer_folder)
    ours = build_tokenizer(config(), str(tokenizer_folder))
    ids = ours.encode("hello world")
    assert ids == theirs.encode("hello world", add_special_tokens=False)
    assert ours.decode([*ids, ours.eos_id]) == "hello world"
    assert (ours.vocab_size, ours.eos_id, ours.eod, ours.bos_id) == (len(theirs), 2, 2, None)
    assert ours.render_chat(MESSAGES) == theirs.apply_chat_template(MESSAGES, tokenize=False)


@pytest.mark.parametrize(("left", "right"), [("", ""), ("-", ""), ("", "-"), ("-", "-")])
def test_marks_of_what_is_generated_are_no_part_of_a_template(left, right):
    marked = f"{{%{left} generation {right}%}}{{{{ messages[0].name }}}}{{%{left} endgeneration {right}%}}"
    assert template_inputs(marked).fields == {"name"}


def changed_json(path: Path, *keys: str, **values) -> None:
    """Set values in a JSON object of a file, or in one within it."""
    saved = inner = json.loads(path.read_text())
    for key in keys:
        inner = inner[key]
    inner.update(values)
    path.write_text(json.dumps(saved))


def test_a_truncation_saved_with_the_tokenizer_does_not_cut(tmp_path):
    truncation = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    changed_json(save_tokenizer(tmp_path) / "tokenizer.json", truncation=truncation)
    assert len(HuggingFaceTokenizer(str(tmp_path)).encode("the cat sat on the mat")) > 2


def test_a_sentencepiece_model_is_read_from_a_file_or_from_its_folder(sentencepiece_file):
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_file))
    for source in (sentencepiece_file, sentencepiece_file.parent):
        ours = build_tokenizer(config(tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(source)), None)
        ids = ours.encode("the cat sat")
        assert ids == theirs.encode("the cat sat") and ours.decode(ids) == "the cat sat"
        assert (ours.vocab_size, ours.eos_id, ours.bos_id) == (theirs.get_piece_size(), theirs.eos_id(), None)


def test_llama_2s_tokenizer_puts_its_first_token_before_a_text(sentencepiece_file):
    plain, gpt, llama = (
        build_tokenizer(config(tokenizer_type=kind, tokenizer_model=str(sentencepiece_file)), None)
        for kind in ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")
    )
    ids = plain.encode("the cat sat")
    assert gpt.encode_prompt("the cat sat") == plain.encode_prompt("the cat sat") == ids
    assert llama.encode_prompt("the cat sat") == [llama.prefix_id, *ids] and llama.bos_id == llama.prefix_id != 0
    assert llama.decode(llama.encode_prompt("the cat sat")) == "the cat sat"
    assert plain.digest == gpt.digest != llama.digest, "their tokens are not kept in one cache"


def test_null_tokenizer_means_what_it_meant_to_megatron_and_refuses_an_id_above_its_own():
    """From 0.18 on megatron-core counts the end of a document in."""
    theirs = MegatronNullTokenizer(99 + ("eod_id" in signature(MegatronNullTokenizer).parameters))
    ours = build_tokenizer(config(tokenizer_type="NullTokenizer", vocab_size=99), None)
    assert (ours.vocab_size, ours.eod) == (theirs.vocab_size, theirs.eod) == (100, 99)
    assert ours.encode("3 1 4") == theirs.text_to_ids("3 1 4")
    assert ours.decode([3, 1, 4]) == "3 1 4"
    with pytest.raises(ConfigurationError, match=r"id \[100\] is not below --vocab-size 99"):
        ours.encode("3 100")


def test_sources_that_hold_no_tokenizer_are_named(tmp_path):
    torn = tmp_path / "torn.model"
    torn.write_bytes(b"not a model")
    for kind, source, message in (
        ("HuggingFaceTokenizer", tmp_path / "nowhere", "nowhere: no such folder: .*, or ORG/NAME of the"),
        ("HuggingFaceTokenizer", tmp_path, "holds no tokenizer that transformers can read"),
        ("SentencePieceTokenizer", tmp_path, "tokenizer.model: no such file"),
        ("SentencePieceTokenizer", torn, "torn.model is not a sentencepiece model"),
        ("HuggingFaceTokenizer", None, "no tokenizer: give --tokenizer-model"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            build_tokenizer(config(tokenizer_type=kind, tokenizer_model=source and str(source)), None)


def _without_unknown(folder: Path) -> None:
    words = {"type": "WordLevel", "vocab": {"a": 0, "</s>": 1}, "unk_token": "<unk>"}
    end = {"id": 1, "content": "</s>", **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)}
    parts = {"model": words, "added_tokens": [end | {"special": True}], "pre_tokenizer": {"type": "WhitespaceSplit"}}
    changed_json(folder / "tokenizer.json", **parts)
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}')


def _template_without_its_token(folder: Path) -> None:
    first, text = {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    template = {"type": "TemplateProcessing", "single": [first, text], "pair": [text], "special_tokens": {}}
    changed_json(folder / "tokenizer.json", post_processor=template)


def _with_setting(folder: Path, **setting) -> None:
    changed_json(folder / "tokenizer_config.json", **setting)


@pytest.mark.parametrize(
    ("plant", "told"),
    [
        (_without_unknown, "cannot encode 'zebra': WordLevel error: Missing .UNK. token"),
        (_template_without_its_token, "cannot encode 'a': no entry found for key"),
        (partial(_with_setting, model_max_length="x"), "cannot encode 'a': '>' not supported"),
        (partial(_with_setting, chat_template=5), "its chat_template is not a text"),
        (partial(_with_setting, chat_template={"default": 5}), "its chat_template is not a text"),
    ],
)
def test_a_tokenizer_that_cannot_encode_is_told(tmp_path, plant, told):
    folder = save_tokenizer(tmp_path, chat_template=None)
    plant(folder)
    with pytest.raises(ConfigurationError, match=f"--tokenizer-model {folder}.*{told}"):
        HuggingFaceTokenizer(str(folder)).encode("zebra")


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages|tojson }}{% generation %}{{ tools|tojson(indent=2) }}{% endgeneration %}{{ bos_token }}",
        "{% for m in messages %}\n  {% if loop.index > 9 %}{% break %}{% endif %}\n{{ m.thinking }}{% endfor %}\n",
        "{% set n = namespace(a=dict(b=1)) %}{{ n.a }}{{ strftime_now('%Y') }}{{ documents }} {{ other }}",
    ],
)
def test_a_chat_template_has_all_that_transformers_gives_it(tmp_path, template):
    folder = save_tokenizer(tmp_path, chat_template=template)
    asked = [{**MESSAGES[0], "name": None}, {**MESSAGES[1], "thinking": "é"}]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"a": [1.5, None]}}}]
    ours, theirs = HuggingFaceTokenizer(str(folder)), AutoTokenizer.from_pretrained(folder)
    for given in (tools, None):
        expected = theirs.apply_chat_template(asked, tools=given, tokenize=False, add_generation_prompt=True)
        assert ours.render_chat(asked, True, given) == expected != ""


@pytest.mark.parametrize("template", ["{{ messages[0].content }}", "{{ messages[-1].content | upper }}"])
def test_a_last_message_that_is_to_go_on_has_to_stand_in_the_text(tmp_path, template):
    tokenizer = HuggingFaceTokenizer(str(save_tokenizer(tmp_path, chat_template=template)))
    with pytest.raises(ConfigurationError, match="continue_final_message"):
        tokenizer.render_chat(MESSAGES, continue_final_message=True)


def test_messages_need_a_chat_template(tmp_path):
    tokenizer = HuggingFaceTokenizer(str(save_tokenizer(tmp_path, chat_template=None)))
    for bare, name in ((tokenizer, str(tmp_path)), (NullTokenizer(99), "NullTokenizer")):
        with pytest.raises(ConfigurationError, match=f"{name} has no chat template"):
            bare.render_chat(MESSAGES)


def test_code_beside_a_tokenizer_is_never_run(tmp_path, monkeypatch):
    """Where it is not told otherwise, transformers asks at the terminal."""
    mark = tmp_path / "ran"
    (tmp_path / "config.json").write_text('{"model_type": "strange"}')
    settings = {"tokenizer_class": "Strange", "auto_map": {"AutoTokenizer": ["strange.Strange", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "strange.py").write_text(f"open({str(mark)!r}, 'w')\nclass Strange: pass\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(ConfigurationError, match="holds no tokenizer that transformers can read"):
        HuggingFaceTokenizer(str(tmp_path))
    assert not mark.exists()


@pytest.mark.parametrize("model_type", ["llama", "bloom", "qwen2"])
def test_a_tokenizer_is_of_the_class_that_auto_tokenizer_chooses(tmp_path, model_type):
    folder = save_tokenizer(tmp_path)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    for named in ("TokenizersBackend", "PreTrainedTokenizerFast"):
        _with_setting(folder, tokenizer_class=named)
        ours, theirs = HuggingFaceTokenizer(str(folder)), AutoTokenizer.from_pretrained(folder)
        assert type(ours._tokenizer) is type(theirs) and ours.encode("the cat") == theirs.encode("the cat")


def test_a_tokenizer_of_llama_is_read_without_torch(tmp_path):
    (save_tokenizer(tmp_path) / "config.json").write_text('{"model_type": "llama"}')
    read = f"from megatron_peft.data.tokenizers import HuggingFaceTokenizer as H; H({str(tmp_path)!r})"
    program = f"{read}; import sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2], check=True)


def test_an_id_above_the_number_of_tokens_counts(tmp_path):
    """Few tokens, one of which has an id that the model has no row for."""
    words = Tokenizer(models.WordLevel({"a": 0, "</s>": 1, "b": 1_000_000}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>").save_pretrained(tmp_path)
    tokenizer = HuggingFaceTokenizer(str(tmp_path))
    assert tokenizer.vocab_size == 3
    with pytest.raises(ConfigurationError, match="has ids up to 1000000"):
        require_vocabulary_fits(tokenizer, 1000)


def test_a_tokenizer_of_another_model_is_refused_or_doubted_and_a_rounded_vocabulary_is_not():
    with pytest.raises(ConfigurationError, match="has ids up to 99, but the embedding .* has 99 rows"):
        require_vocabulary_fits(NullTokenizer(99), 99)
    assert "ids up to 999, but the embedding" in require_vocabulary_fits(NullTokenizer(999), 49152)
    for largest, rows in ((99, 100), (128_255, 128_256), (250_680, 250_880)):
        assert not require_vocabulary_fits(NullTokenizer(largest), rows)


def chatml(messages, add_generation_prompt=False) -> str:
    text = "".join(f"<{m['role']}>{m['content']}</>" for m in messages)
    return text + ("<assistant>" if add_generation_prompt else "")


def thinking(messages, add_generation_prompt=False) -> str:
    """Its generation prompt has what a finished turn lacks."""
    return chatml(messages, add_generation_prompt) + ("<think>" if add_generation_prompt else "")


SAID, ANSWER = "<user>hello</><assistant>", "bonjour</>"


@pytest.mark.parametrize(
    ("template", "messages", "untrained_and_trained"),
    [
        (chatml, MESSAGES * 2 + MESSAGES[:1], [SAID, ANSWER, SAID, ANSWER, "<user>hello</>"]),
        (thinking, MESSAGES, [SAID, ANSWER, ""]),
        (chatml, MESSAGES[1:], ["<assistant>", ANSWER, ""]),
    ],
)
def test_the_assistants_turns_are_trained_and_their_headers_are_not(template, messages, untrained_and_trained):
    expected = [ChatSegment(text, number % 2 == 1) for number, text in enumerate(untrained_and_trained)]
    assert split_chat(template, messages) == expected
