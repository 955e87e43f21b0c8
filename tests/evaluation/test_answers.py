"""Settings and the stream of tools/generate.py; answers of a model are in test_harness.py."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_peft.config import ConfigurationError
from megatron_peft.evaluation.answers import AnswerSettings, Stream
from megatron_peft.evaluation.stop import StopTexts


class Bytes:
    """A byte an id."""

    special_tokens: dict[str, int] = {}

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")


def _streamed(text, *stops):
    written: list[str] = []
    tokenizer: Any = Bytes()
    stream = Stream(tokenizer, StopTexts(tokenizer, stops), written.append)
    for token in Bytes().encode(text):
        stream.add(0, token)
    before_the_end = "".join(written)
    stream.end()
    return before_the_end, "".join(written)


def test_the_text_grows_and_half_a_character_waits():
    assert _streamed("café") == ("café", "café\n")
    written: list[str] = []
    tokenizer: Any = Bytes()
    stream = Stream(tokenizer, StopTexts(tokenizer, []), written.append)
    for token in "é".encode()[:1]:
        stream.add(0, token)
    assert "".join(written) == ""


def test_what_may_become_a_stop_is_held_back_and_a_stop_never_shown():
    assert _streamed("one\nQ:two", "\nQ:") == ("one", "one\n")
    assert _streamed("one\nQ", "\nQ:") == ("one", "one\nQ\n"), "it was none"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "exactly one of --prompt TEXT and --prompt-file FILE"),
        ({"prompt": "a", "prompt_file": "b"}, "exactly one of"),
        ({"prompt": "a", "num_samples": 3}, "--num-samples 3 with --temperature 0 gives one answer 3 times"),
        ({"prompt": "a", "max_new_tokens": 0}, "--max-new-tokens is 0; it must be above 0"),
    ],
)
def test_contradictions_are_told(values, message):
    with pytest.raises(ConfigurationError, match=message):
        AnswerSettings(**values)


def test_a_stop_text_writes_a_new_line_as_backslash_n_and_a_prompt_stands_as_it_is():
    settings = AnswerSettings(prompt="$\\theta$", stop=["\\n\\n"], temperature=0.5, top_k=3, sampling_seed=9)
    assert settings.records() == [{"prompt": "$\\theta$"}]
    assert settings.plan.until == ("\n\n",)
    assert (settings.plan.sampling.temperature, settings.plan.sampling.top_k, settings.plan.seed) == (0.5, 3, 9)


def test_a_file_that_cannot_be_written_is_told_before_anything_is_asked(tmp_path):
    (tmp_path / "file").touch()
    for output, message in ((tmp_path, "is a folder: give a file"), (tmp_path / "file" / "x", "cannot be written")):
        with pytest.raises(ConfigurationError, match=f"--output {output} {message}"):
            AnswerSettings(prompt="a", output=str(output)).records()
    AnswerSettings(prompt="a", output=str(tmp_path / "new" / "out.jsonl")).records()
    assert (tmp_path / "new").is_dir()
